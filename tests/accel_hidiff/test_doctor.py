"""What doctor says of compiling, with a GPU and without one: facts are given, so that every machine is judged here."""

from __future__ import annotations

import pytest

from accel_hidiff.doctor import Compilers, compiles_for, examine_backend


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Compilers(None, (), "torch: 2.13.0+cpu has no CUDA"), "compiles for this CPU"),
        (
            Compilers("13.0", ("NVIDIA H200",), ""),
            "compiles for this CPU and NVIDIA H200, and with --target for GPUs that are not here",
        ),
        (Compilers("13.0", (), ""), "compiles for this CPU, and with --target for GPUs that are not here"),
        (
            Compilers("13.0", (), "versions: expected torch 2.11.0"),
            "compiles for this CPU; not for GPUs that are not here: versions: expected torch 2.11.0 "
            "(doctor --target sm_90)",
        ),
    ],
)
def test_what_can_be_compiled_for(found: Compilers, says: str) -> None:
    assert compiles_for(found) == says


def test_this_machine() -> None:
    finding = examine_backend("aot")
    assert not finding.usable or finding.detail.startswith("compiles for this CPU")
