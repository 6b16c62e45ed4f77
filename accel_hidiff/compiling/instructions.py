"""Which vector instructions compiler and processor have in common: found out once for all compiling processes.

torch finds it out in each process anew, by compiling up to seven small programs and starting Python, with torch, to
load each. Here one process does so and tells its parent, who hands it down to the others. What is handed down are
torch's own findings, each under what was tried, so that it chooses as it would have chosen; what was not tried before
is tried as ever.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

Found = dict[str, bool]

_found: Found = {}
_PLAIN: Final = "_accel_hidiff_check_build"


def find_out() -> Found:
    """torch's findings of this process: what was tried (a digest of program and flags) -> whether it runs here."""
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    remember()
    valid_vec_isa_list()
    return dict(_found)


def hand_down(found: Found) -> None:
    """This process takes over another one's findings."""
    remember()
    _found.update(found)


def remember() -> None:
    """Nothing is tried twice in this process, and what was handed down is not tried at all."""
    from torch._inductor.cpu_vec_isa import VecISA

    kind: Any = VecISA
    if hasattr(kind, _PLAIN):
        return
    setattr(kind, _PLAIN, kind.check_build)

    def check_build(isa: Any, code: str) -> bool:
        tried = hashlib.sha256(f"{type(isa).__name__}\0{isa._arch_flags}\0{code}".encode()).hexdigest()
        if tried not in _found:
            _found[tried] = bool(getattr(isa, _PLAIN)(code))
        return _found[tried]

    kind.check_build = check_build
