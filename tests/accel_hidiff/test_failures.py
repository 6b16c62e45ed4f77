"""Whose fault a failure is: decided from facts, CUDA's among them, on any machine."""

from __future__ import annotations

import pytest
import torch

from accel_hidiff.device import failure_facts, fault_of
from accel_hidiff.errors import CompileFailed
from accel_hidiff.failures import FailureFacts, Fault, judge_failure

HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
ACCELERATOR = ("AcceleratorError", "RuntimeError")
RUNTIME = ("RuntimeError",)
SILENT = (
    "run_func_(...) API call failed at /pytorch/torch/csrc/inductor/aoti_runner/model_container_runner.cpp, line 152"
)
GB = 1 << 30


@pytest.mark.parametrize(
    ("fault", "facts"),
    [
        (
            Fault.MEMORY,
            FailureFacts(("OutOfMemoryError", "RuntimeError"), "CUDA out of memory. Tried to allocate 2.00 GiB"),
        ),
        (Fault.MEMORY, FailureFacts(("MemoryError",), "")),
        (
            Fault.MEMORY,
            FailureFacts(RUNTIME, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        ),
        (Fault.MEMORY, FailureFacts(ACCELERATOR, "CUDA error: out of memory" + HINT, code=2)),
        (
            Fault.MEMORY,
            FailureFacts(RUNTIME, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        ),
        (Fault.MEMORY, FailureFacts(RUNTIME, SILENT, free=1 * GB, total=140 * GB)),
        (Fault.MEMORY, FailureFacts(RUNTIME, SILENT, free=20 * GB, total=80 * GB, refused=1)),
        (
            Fault.MEMORY,
            FailureFacts(RUNTIME, SILENT + ": CUDA out of memory. Tried to allocate", free=20 * GB, total=80 * GB),
        ),
        (
            Fault.MEMORY,
            FailureFacts(RUNTIME, "aoti_torch_empty_strided(2, &buf0_handle) API call failed at wrapper.cpp"),
        ),
        (Fault.ARTIFACT, FailureFacts(RUNTIME, "aoti_torch_cpu_addmm_out(buf0) API call failed at wrapper.cpp")),
        (Fault.ARTIFACT, FailureFacts(RUNTIME, SILENT, free=20 * GB, total=80 * GB)),
        (Fault.ARTIFACT, FailureFacts(RUNTIME, SILENT)),  # of the CPU
        (Fault.ARTIFACT, FailureFacts(RUNTIME, "input 0: expected 4 dimensions, got 3", free=1 * GB, total=140 * GB)),
        (Fault.ARTIFACT, FailureFacts(("ValueError",), "expected 4 dimensions, got 3")),
        (Fault.ARTIFACT, FailureFacts(ACCELERATOR, "CUDA error: invalid argument" + HINT, code=1)),
        (Fault.ARTIFACT, FailureFacts(ACCELERATOR, "CUDA error: no kernel image is available" + HINT, code=209)),
        (Fault.DEVICE, FailureFacts(ACCELERATOR, "CUDA error: an illegal memory access was encountered" + HINT)),
        (Fault.DEVICE, FailureFacts(ACCELERATOR, "CUDA error: device-side assert triggered" + HINT)),
        (Fault.DEVICE, FailureFacts(ACCELERATOR, "CUDA error: misaligned address" + HINT)),
        (Fault.DEVICE, FailureFacts(ACCELERATOR, "CUDA error: unspecified launch failure" + HINT)),
        (Fault.DEVICE, FailureFacts(ACCELERATOR, "CUDA error: uncorrectable ECC error encountered" + HINT)),
        (Fault.DEVICE, FailureFacts(ACCELERATOR, "CUDA error", code=700)),
        # A package does not say why it failed; the device does, when it is waited for.
        (
            Fault.DEVICE,
            FailureFacts(RUNTIME, SILENT, probe="CUDA error: an illegal memory access was encountered" + HINT),
        ),
        (Fault.DEVICE, FailureFacts(RUNTIME, SILENT, probe="CUDA error: unknown error" + HINT)),
        (Fault.DEVICE, FailureFacts(("OutOfMemoryError",), "out of memory", probe="CUDA error: misaligned address")),
        (Fault.MEMORY, FailureFacts(RUNTIME, SILENT, probe="CUDA error: out of memory" + HINT)),
    ],
)
def test_verdicts(fault: Fault, facts: FailureFacts) -> None:
    assert judge_failure(facts) is fault


def test_facts_of_an_error_and_of_what_it_was_raised_from() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as cause:
            raise CompileFailed("unet: expected a package that loads") from cause
    except CompileFailed as error:
        facts = failure_facts(error, torch.device("cpu"))
        assert {"CompileFailed", "OutOfMemoryError", "RuntimeError"} <= set(facts.kinds)
        assert facts.text == "unet: expected a package that loads\nCUDA out of memory"
        assert (facts.code, facts.probe, facts.free, facts.refused) == (None, "", None, 0)
        assert fault_of(error, torch.device("cpu")) is Fault.MEMORY


def test_an_allocation_that_cannot_be_is_told_from_torch_itself() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 62, dtype=torch.int8)
    assert fault_of(raised.value, torch.device("cpu")) is Fault.MEMORY
