"""Named exceptions. Every message is one line: what was expected, what came, what to do."""


class SizeWarning(UserWarning):
    """A request's size costs a bicubic resize in window attention; the message names the nearest that does not."""


class AccelHiDiffError(Exception):
    """Base of every error that accel_hidiff raises on purpose."""


class BadInput(AccelHiDiffError, ValueError):
    """A value from the user is outside of what is accepted: a size, a step count, a ratio, an option."""


class UnknownLayout(BadInput):
    """The UNet is of no family that HiDiffusion knows."""


class NotAPipeline(BadInput):
    """The model is no diffusers pipeline with a UNet2DConditionModel."""


class PatchConflict(AccelHiDiffError, RuntimeError):
    """Something else changed what a patch replaced, so that undoing it would destroy the other change."""


class NoPhase(AccelHiDiffError, RuntimeError):
    """A patched UNet was called without a step: neither its pipeline nor `patch.phase(...)` names one."""


class PipelineBusy(AccelHiDiffError, RuntimeError):
    """A request begins while another thread is in one on the same pipeline object."""


class GraphMiss(AccelHiDiffError, RuntimeError):
    """No compiled graph serves this call, and `on_miss="error"` forbids compiling or running eager."""


class CompileFailed(AccelHiDiffError, RuntimeError):
    """A region could not be exported or compiled."""


class CaptureFailed(AccelHiDiffError, RuntimeError):
    """A compiled call raised while a CUDA graph was being captured of it; whose fault that is, is not looked for."""


class OutOfMemory(AccelHiDiffError, RuntimeError):
    """A request needs more memory than its device has left. Nothing else is wrong: the next request is served."""


class DeviceLost(AccelHiDiffError, RuntimeError):
    """A device answers nothing any more in this process, after an illegal memory access, say: restart the process."""


class BenchFailed(AccelHiDiffError, RuntimeError):
    """A bench has nothing to run, or its reference does not run."""


class DemoFailed(AccelHiDiffError, RuntimeError):
    """A process of the demo failed."""


def first_line(problem: BaseException) -> str:
    """Type and first line of an error; of the one that Dynamo wraps, where it does.

    >>> first_line(ValueError("no\\nand more"))
    'ValueError: no'
    """
    problem = getattr(problem, "inner_exception", problem)
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:300] if lines else ''}"
