"""TFLOP and bytes of small calls against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention
from torch.utils.flop_counter import flop_registry

from benchmarks.roofline import Ceilings, Work, ceilings, count, median_seconds

CPU = torch.device("cpu")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


CALLS: dict[str, tuple[Callable[[], object], int]] = {
    "linear, one addmm": (lambda: linear(randn(2, 5, 8), randn(3, 8), randn(3)), 2 * 10 * 3 * 8),
    "bmm": (lambda: randn(4, 5, 6) @ randn(4, 6, 7), 2 * 4 * 5 * 7 * 6),
    "3x3 convolution, stride 2": (
        lambda: conv2d(randn(2, 4, 8, 8), randn(6, 4, 3, 3), stride=2, padding=1),
        2 * 2 * 6 * 4 * 4 * (4 * 3 * 3),
    ),
    "grouped convolution": (lambda: conv2d(randn(1, 4, 5, 5), randn(4, 1, 3, 3), groups=4), 2 * 4 * 3 * 3 * 9),
    "self-attention": (
        lambda: scaled_dot_product_attention(*(randn(2, 3, 16, 8) for _ in range(3))),
        2 * (2 * 2 * 3 * 16 * 16 * 8),
    ),
    "cross-attention": (
        lambda: scaled_dot_product_attention(randn(2, 3, 16, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)),
        2 * (2 * 2 * 3 * 16 * 7 * 8),
    ),
    "elementwise": (lambda: torch.nn.functional.silu(randn(9, 9)), 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_flops_are_those_worked_out_by_hand(name: str) -> None:
    call, flops = CALLS[name]
    assert count(call).tflop * 1e12 == pytest.approx(flops)


def test_all_attention_kernels_of_a_cpu_count_the_same() -> None:
    query, key, value = (randn(1, 2, 32, 16) for _ in range(3))
    found = {}
    for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kind):
            found[kind] = count(lambda: scaled_dot_product_attention(query, key, value)).tflop
    assert set(found.values()) == {2 * (2 * 2 * 32 * 32 * 16) / 1e12}


def test_torch_knows_the_attention_kernels_of_a_gpu() -> None:
    names = ("flash", "efficient", "cudnn")
    operators = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention") for name in names]
    assert all(operator in flop_registry for operator in operators)


def gigabytes(call: Callable[[], object]) -> float:
    return count(call).eager_gb * 1e9


def test_bytes_are_operands_and_results_once_each() -> None:
    a, b, wide = randn(10, 20), randn(10, 20), randn(1, 20)
    assert gigabytes(lambda: a + b) == 3 * 800
    assert gigabytes(lambda: a * a) == 2 * 800
    assert gigabytes(lambda: a + wide.expand(10, 20)) == 2 * 800 + 80
    assert gigabytes(lambda: a.to(torch.bfloat16)) == 800 + 400
    assert gigabytes(lambda: torch.mm(a, b.t())) == 2 * 800 + 400


def test_bytes_of_writes_in_place() -> None:
    a, b = randn(10, 20), randn(10, 20)
    assert gigabytes(lambda: a.add_(b)) == 3 * 800
    assert gigabytes(lambda: a.copy_(b)) == 2 * 800
    assert gigabytes(lambda: a.zero_()) == 800


def test_views_and_allocations_move_nothing() -> None:
    a = randn(10, 20)
    calls = [
        lambda: a.view(20, 10), lambda: a.t()[3:], lambda: a.split(5), lambda: a.expand(3, 10, 20),
        lambda: torch.ops.aten._unsafe_view(a, [200]), lambda: torch.empty_like(a), lambda: a.new_empty(7),
    ]  # fmt: skip
    assert [gigabytes(call) for call in calls] == [0] * len(calls)
    assert gigabytes(lambda: a.t().contiguous()) == 2 * 800


def test_floors_and_shares() -> None:
    top, work = Ceilings(matmul_tflop_per_s=500.0, copy_gb_per_s=2000.0), Work(tflop=50.0, eager_gb=40.0)
    assert top.floor_ms(work) == pytest.approx(100)
    assert top.traffic_ms(work) == pytest.approx(20)
    assert top.share(work, ms=200.0) == pytest.approx(0.5)


def test_ceilings_of_this_machine_are_those_of_a_machine() -> None:
    found = ceilings(CPU, torch.float32, tiny=True, repeats=3)
    assert 1e-4 < found.matmul_tflop_per_s < 1e3 and 0.01 < found.copy_gb_per_s < 1e5


def test_median_seconds_leaves_warm_up_out() -> None:
    calls = []
    assert median_seconds(lambda: calls.append(1), CPU, repeats=4, warmup=2) >= 0
    assert len(calls) == 6
