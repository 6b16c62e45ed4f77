"""Where the time of one call goes: shares by category, and the kernels or operators that take most of it."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.roofline import median_seconds

CATEGORIES: Final = ("attention", "convolution", "matmul", "normalisation", "elementwise", "copies", "other")
REST_OF_CPU: Final = "compiled code and Python"
REST_OF_GPU: Final = "idle"
_TOP: Final = 12
_NAME_LENGTH: Final = 120

# The first pattern that is found names the category: attention kernels name CUTLASS, convolutions name "gemm", and the
# elementwise kernel of eager's group norm names the norm.
_TRITON: Final = (  # named after what was fused, neighbours of a kernel of its own among it
    ("convolution", r"_tem_.*conv|^triton_conv"),
    ("attention", r"_tem_.*(attention|sdpa)|_(red|per)_.*softmax"),
    ("matmul", r"_tem_|^triton_(mm|bmm|addmm)"),
    ("normalisation", r"_(red|per)_.*norm"),
    ("elementwise", r""),
)
_KERNELS: Final = (
    ("copies", r"^mem(cpy|set)|nchwtonhwc|nhwctonchw|direct_copy_kernel|catarraybatchedcopy|copy_device_to_device"),
    ("attention", r"flash_|flash::|fmha|sdpa|attention|softmax"),
    ("convolution", r"fprop|dgrad|wgrad|convol|conv2d|conv3d|winograd|depthwise"),
    ("matmul", r"gemm|gemv|nvjet|cublas|splitk|matmul"),
    ("normalisation", r"rowwisemoments|layer_?norm|group_?norm|batch_?norm|rms_?norm|computefusedparams"),
    ("elementwise", r"elementwise|reduce_kernel|arange|index|fillfunctor"),
)
_OPERATORS: Final = (
    ("attention", r"attention|softmax"),
    ("convolution", r"conv"),
    ("matmul", r"::(addmm|mm|bmm|baddbmm|matmul|linear|mkldnn_linear|addmv|mv|dot)$"),
    ("normalisation", r"norm"),
    ("copies", r"::(copy_|_to_copy|to|clone|contiguous|cat|pad|constant_pad_nd|roll|index_select|fill_|zero_)$"),
    (
        "elementwise",
        r"::(add|sub|mul|div|silu|gelu|sigmoid|exp|sin|cos|neg|pow|rsqrt|remainder|floor_divide|where|clamp|arange)_?$",
    ),
)


@dataclass(frozen=True)
class Taker:
    """A kernel (on a GPU) or an operator (on a CPU), all its calls together; `share` is of the call's time."""

    name: str
    category: str
    calls: int
    ms: float
    share: float


@dataclass(frozen=True)
class StepProfile:
    """One call.

    Attributes:
        ms: on a GPU, the median of calls without the profiler; on a CPU, the profiled call itself.
        shares: of `ms` by category, summing to 1 but for kernels that overlap. On a GPU, "idle" is what is left when
            the time in which any kernel ran is taken off; on a CPU, what no operator accounts for is "compiled code
            and Python".
        top: those that took most, first.
    """

    ms: float
    shares: dict[str, float]
    top: tuple[Taker, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain JSON mapping."""
        return {**asdict(self), "top": [asdict(taker) for taker in self.top]}


@dataclass(frozen=True)
class Span:
    """One run of a kernel, or the self time of one run of an operator, in microseconds; start is 0 for the latter."""

    name: str
    start: float
    us: float


def category(name: str) -> str:
    """One of `CATEGORIES` for a kernel's or an operator's name.

    A Triton kernel that only applies a norm's result to elements is elementwise; one that reduces for a norm is
    normalisation, whatever else was fused into it.

    >>> category("triton_red_fused_native_group_norm_silu_3"), category("triton_poi_fused_native_group_norm_silu_4")
    ('normalisation', 'elementwise')
    """
    lowered = name.lower()
    if re.match(r"\w+::\w+$", lowered):
        table = _OPERATORS
    else:
        table = _TRITON if lowered.startswith("triton_") else _KERNELS
    for found, pattern in table:
        if re.search(pattern, lowered):
            return found
    return "other"


def profile(call: Callable[[], object], device: torch.device) -> StepProfile:
    """Profiles one call, after others without the profiler.

    Args:
        call: what to profile; compiled and warm.
        device: a GPU: its kernels are looked at; a CPU: operators.
    """
    if device.type == "cuda":
        ms = median_seconds(call, device, repeats=5) * 1e3
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):
            torch.zeros(1, device=device).add_(1)  # the first profile of a process pays for starting the tracer
            torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize(device)
        spans = [
            Span(event.name, event.time_range.start, event.time_range.elapsed_us())
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        return summarise(spans, ms, REST_OF_GPU, busy_us(spans))
    call()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        call()
        ms = (time.perf_counter() - start) * 1e3
    spans = [
        Span(event.name, 0.0, event.self_cpu_time_total)
        for event in profiler.events()
        if event.device_type == DeviceType.CPU
    ]
    return summarise(spans, ms, REST_OF_CPU, sum(span.us for span in spans))


def busy_us(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of the spans ran."""
    busy, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        stop = span.start + span.us
        busy += max(0.0, stop - max(span.start, end))
        end = max(end, stop)
    return busy


def summarise(spans: Iterable[Span], ms: float, rest: str, accounted_us: float) -> StepProfile:
    """The profile of a call of `ms` milliseconds, of which spans account for `accounted_us` microseconds."""
    times: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for span in spans:
        times[span.name] += span.us / 1e3
        calls[span.name] += 1
    shares = dict.fromkeys(CATEGORIES, 0.0)
    for name, spent in times.items():
        shares[category(name)] += spent / ms
    shares[rest] = max(0.0, 1 - accounted_us / 1e3 / ms)
    most = sorted(times, key=lambda name: -times[name])[:_TOP]
    top = tuple(
        Taker(name[:_NAME_LENGTH], category(name), calls[name], round(times[name], 3), round(times[name] / ms, 4))
        for name in most
    )
    return StepProfile(round(ms, 3), {name: round(share, 4) for name, share in shares.items()}, top)
