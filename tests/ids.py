"""Names of parametrized tests."""

from __future__ import annotations

import re


def without_address(value: object) -> str:
    """The text of any value, the same in every process: workers have to collect the same tests."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
