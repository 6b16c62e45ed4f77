"""What not every supported set of libraries has: tests that need it are skipped there, with the reason."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable
from typing import Any

import diffusers
import pytest

from accel_hidiff import compat

_NO_AOT = compat.missing_for_aot()
_NO_GUIDERS = compat.missing_for_guiders()

BACKEND = "eager" if _NO_AOT else "aot"  # for tests that only name graphs

needs_aot = pytest.mark.skipif(bool(_NO_AOT), reason=f"backend aot {_NO_AOT}")
needs_guiders = pytest.mark.skipif(bool(_NO_GUIDERS), reason=f"CFGPlusPlusGuidance {_NO_GUIDERS}")


def aot() -> None:
    """Skips the test, or what a fixture is for, where backend "aot" cannot run."""
    if _NO_AOT:
        pytest.skip(f"backend aot {_NO_AOT}")


def whole_regions() -> None:
    """Skips the test where `torch.compile` splits regions, so that another backend goes by its name."""
    if not compat.dynamo_traces_regions():
        pytest.skip("torch.compile does not trace whole regions here")


def diffusers_class(name: str) -> None:
    """Skips the test where diffusers does not have this class yet."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {compat.diffusers_version()} has no {name}")


def scheduler_options(kind: Any, options: Iterable[str]) -> None:
    """Skips the test where diffusers' scheduler does not have one of these options yet."""
    known = inspect.signature(kind.__init__).parameters
    for name in options:
        if name not in known:
            pytest.skip(f"diffusers {compat.diffusers_version()} has no {name} in {kind.__name__}")


def no_onediff() -> None:
    """Skips the test where onediff is installed: it puts stand-ins of its own in place."""
    if importlib.util.find_spec("onediff") is not None:
        pytest.skip("onediff is installed here")
