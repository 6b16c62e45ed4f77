"""Packages that are really compiled for a GPU, without one: `scripts/test-cuda-build.sh` makes the environment.

Each silent trap is opened again in one test, and the check refuses what comes of it.
"""

from __future__ import annotations

import gc
import queue
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.codecache import CudaKernelParamCache
from torch._inductor.utils import fresh_cache

import accel_hidiff as ah
from accel_hidiff.backends import aot
from accel_hidiff.compiling.blueprint import CompileJob
from accel_hidiff.compiling.pool import CompilePool, Outcome
from accel_hidiff.crosscompile import standins
from accel_hidiff.crosscompile.requirements import judge, look
from accel_hidiff.crosscompile.session import Session
from accel_hidiff.errors import CompileFailed
from accel_hidiff.forms import rows_of_parts
from accel_hidiff.models import load_skeleton
from accel_hidiff.packages import check
from accel_hidiff.packages.cubin import usage_of
from accel_hidiff.packages.facts import PackageFacts, read_package
from accel_hidiff.pipeline import Handle
from accel_hidiff.regions import RegionGraph
from accel_hidiff.target import Target
from compile_cache import CompileCache, Entry

HERE = look()
TARGET = Target.parse("sm_90", torch=HERE.torch or "none", triton=HERE.triton or "none")
_MISSING = [requirement for requirement in judge(TARGET, HERE) if not requirement.met]
pytestmark = [
    pytest.mark.cuda_build,
    pytest.mark.skipif(bool(_MISSING), reason=f"{_MISSING[0].part}: {_MISSING[0].detail}" if _MISSING else ""),
]
MODEL = str(Path(ah.__file__).parent / "demo" / "trained_model")
RESNET, WINDOWED, DECODER = "unet.down_blocks.0.resnets.0", "unet.down_blocks.1.attentions.0", "vae.decoder"

Compile = Callable[..., tuple[Entry, PackageFacts]]


def skeleton(cache: Path, target: Target = TARGET, model: str = MODEL) -> Handle:
    pipe, device = load_skeleton(model, "bfloat16", elsewhere=True)
    options: dict[str, Any] = {"cache": CompileCache(cache), "target": target, "memory_format": "channels_last"}
    handle = ah.accelerate(pipe, hidiffusion=ah.HiDiffusionConfig(), **options)
    handle.meant_for = device
    return handle


def graph_of(handle: Handle, path: str) -> RegionGraph:
    needed = handle.needed([(256, 256)], (20,))
    return next(graph for graph in needed.distinct.values() if graph.region.path == path)


@pytest.fixture
def compile_region(tmp_path: Path) -> Compile:
    """Compiles a region of the demo model in this process, into a cache of its own."""

    def compiled(
        path: str, asked_for: Target = TARGET, model: str = MODEL, wide: bool = False
    ) -> tuple[Entry, PackageFacts]:
        folder = tmp_path / f"session{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        handle = skeleton(tmp_path / "cache", model=model)
        graph = replace(graph_of(handle, path), wide=wide)
        with (
            fresh_cache(),  # nothing of another test
            Session(TARGET, folder) as session,
            session.weightless(graph.region.module, graph.device),
        ):
            backend = aot.AOTBackend(asked_for, session)
            entry = backend.prepare(graph, CompileCache(folder / "cache")).entry
        return entry, read_package(Path(entry.path) / "package.pt2", entry.notes["inputs"])  # type: ignore[arg-type]

    return compiled


@pytest.fixture
def plain_torch() -> Iterator[None]:
    """What a session replaced is back."""
    before = torch.cuda.is_available, torch.cuda.get_device_properties, torch._C._select_conv_backend
    yield
    assert before == (torch.cuda.is_available, torch.cuda.get_device_properties, torch._C._select_conv_backend)
    assert not torch.cuda.is_initialized()


class TestSoundPackages:
    def test_a_residual_block(self, compile_region: Compile, plain_torch: None) -> None:
        entry, facts = compile_region(RESNET)
        assert facts.architectures == ("sm_90",) and facts.externs["convolution"] >= 2
        assert all(call.arguments[0] is None or call.arguments[0].channels_last for call in facts.convolutions)
        assert entry.notes["made_for"] == "h100" and entry.notes["tuned"] == "by rule"
        kernels: Any = entry.notes["kernels"]
        assert {kernel["kernel"] for kernel in kernels} == set(facts.kernels)
        assert all(kernel["candidates"][kernel["taken"]]["registers"] > 0 for kernel in kernels)

    def test_no_kernel_asks_a_driver_to_unload_it(self, compile_region: Compile) -> None:
        from triton.compiler.compiler import CompiledKernel

        compile_region(RESNET)
        kernels = [found for found in gc.get_objects() if isinstance(found, CompiledKernel)]
        assert kernels and all(kernel.module is None for kernel in kernels)

    def test_windowed_attention_is_fused(self, compile_region: Compile) -> None:
        _, facts = compile_region(WINDOWED)
        assert facts.externs["_scaled_dot_product_cudnn_attention"] == 2

    @pytest.mark.parametrize(
        ("path", "divisions"),
        [
            (RESNET, 1),
            (WINDOWED, 1),
            ("unet.up_blocks.1.resnets.0", 1),  # with a skip connection
            ("unet.head", 1),
            ("unet.tail", 1),
            ("unet.down_blocks.0.downsamplers.0", 1),
            ("unet.down_blocks.1.downsamplers.0", 1),  # dilated in the first steps
            ("unet.up_blocks.0.upsamplers.0", 4),  # row, column and image of each number
        ],
    )
    def test_no_kernel_turns_an_image_or_works_out_where_a_token_goes(
        self, compile_region: Compile, path: str, divisions: int
    ) -> None:
        """One layout from the first norm to the result, 32-bit indices, and the window order out of its tables."""
        _, facts = compile_region(path)
        kernels = facts.kernels.values()
        assert kernels and not any(kernel.transposes or kernel.int64 for kernel in kernels)
        assert max(kernel.divisions for kernel in kernels) <= divisions

    def test_a_call_of_large_tensors_has_64_bit_indices(self, compile_region: Compile) -> None:
        """Its graph is another one: a batch of 8 of 1280 channels, 512 x 512, has more than 2^31 numbers."""
        path = "unet.mid_block.resnets.0"
        found = [compile_region(path, model="arch:sdxl", wide=wide)[1].kernels.values() for wide in (False, True)]
        assert [any(kernel.int64 for kernel in kernels) for kernels in found] == [False, True]

    def test_a_decoders_wide_head_writes_the_scores_of_a_part_at_a_time(self, compile_region: Compile) -> None:
        """Products in float32 over operands as they lie, and one kernel between them."""
        _, facts = compile_region(DECODER, model="arch:sdxl")
        assert not any("attention" in name for name in facts.externs)
        products = [call for call in facts.wrapper.calls if call.name == "mm_dtype_out"]
        scores, sums = products[::2], products[1::2]
        keys = scores[0].arguments[1]
        assert keys is not None
        cells, rows = keys.sizes[1], rows_of_parts(keys.sizes[1])
        for made, width in ((scores, cells), (sums, 512)):
            shapes = [(call.out.sizes, call.out.dtype) for call in made if call.out is not None]
            assert shapes == [((part, width), "float32") for part in rows]
        written = [call.out for call in scores]
        between = [call for call in facts.wrapper.calls if any(one in written for one in call.arguments if one)]
        assert len(between) <= len(rows) + 1  # the last part, of another size, takes one kernel more
        assert not any(kernel.int64 for kernel in facts.kernels.values())

    def test_what_it_says_of_kernels_is_what_nvidias_tool_says(self, compile_region: Compile, tmp_path: Path) -> None:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        _, facts = compile_region(RESNET)
        for name, code in facts.native.cubins.items():
            (tmp_path / "k.cubin").write_bytes(code)
            command = [str(tool), "-res-usage", str(tmp_path / "k.cubin")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            registers, stack = (
                int(found[1]) for key in ("REG", "STACK") if (found := re.search(rf"{key}:(\d+)", said))
            )
            assert (registers, stack) == (usage_of(code)[name].registers, usage_of(code)[name].stack_bytes)


class TestTraps:
    """What is silent without the check."""

    def test_plain_softmax_attention(self, compile_region: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(standins, "attention_chosen", lambda capability: nullcontext())
        with pytest.raises(CompileFailed, match="expected 2 calls of a fused attention kernel, got 0"):
            compile_region(WINDOWED)

    def test_convolutions_planned_as_torchs_own(self, compile_region: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(standins, "_with_cudnn", lambda select: select)
        with pytest.raises(CompileFailed, match=r"expected convolutions (by cuDNN|over channels_last images)"):
            compile_region(RESNET)

    def test_another_architecture(self, compile_region: Compile) -> None:
        with pytest.raises(CompileFailed, match="expected GPU code for sm_80, got sm_90"):
            compile_region(RESNET, asked_for=Target.parse("sm_80"))

    def test_no_driver(self, compile_region: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
        def nameless(header: Path, folder: Path, compiler: str) -> Path:
            library = folder / "libcuda.so"
            command = [compiler, "-shared", "-xc++", "-", "-o", str(library)]
            subprocess.run(command, input="", text=True, check=True)
            return library

        monkeypatch.setattr(standins, "build_stub", nameless)
        with pytest.raises(CompileFailed, match=r"expected it to ask for libcuda\.so\.1|is in none"):
            compile_region(RESNET)

    def test_spills(self, compile_region: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.backends.nvidia.compiler import CUDABackend

        parse = CUDABackend.parse_options
        monkeypatch.setattr(CUDABackend, "parse_options", lambda self, options: parse(self, {**options, "maxnreg": 24}))
        monkeypatch.setattr(check, "SPILL_LIMIT", 16)  # these kernels are small
        with pytest.raises(CompileFailed, match="expected at most 16 bytes of spilled registers in a thread, triton_"):
            compile_region(RESNET)

    def test_a_fake_weight_cannot_be_baked(self, compile_region: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has no values: compiling with weights inside ends, and nothing is stored."""
        monkeypatch.setitem(aot.OPTIONS, "aot_inductor.package_constants_in_so", True)
        aot._factors.cache_clear()
        try:
            with pytest.raises(CompileFailed, match=r"AOTInductor failed|is a constant of it"):
                compile_region(RESNET)
        finally:
            aot._factors.cache_clear()


def test_what_a_process_compiled_before_does_not_show(tmp_path: Path) -> None:
    """Code is linked in the order of a dict that all graphs of a process share, where a name keeps its first place."""
    handle, found = skeleton(tmp_path / "cache"), []
    graph = graph_of(handle, RESNET)
    for number in range(2):
        folder = tmp_path / f"session{number}"
        folder.mkdir()
        with Session(TARGET, folder) as session, session.weightless(graph.region.module, graph.device):
            found.append(aot.AOTBackend(TARGET, session).prepare(graph, CompileCache(folder / "cache")).entry.files)
        linked = dict(reversed(CudaKernelParamCache.cache.items()))
        assert len(linked) > 5
        CudaKernelParamCache.cache.clear()
        CudaKernelParamCache.cache.update(linked)
    assert found[0] == found[1]


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the folders are called, and whatever the process compiled before."""
    digests = []
    for name, before in (
        ("cache", ()),
        ("another cache", ("unet.up_blocks.0.resnets.0", "unet.down_blocks.1.resnets.0")),
    ):
        cache = CompileCache(tmp_path / name)
        handle = skeleton(tmp_path / name)
        outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        with CompilePool(1, niceness=0) as pool:
            for path in (*before, RESNET):
                graph = graph_of(handle, path)
                key = handle._dispatcher.binder.key(graph)
                pool.submit(CompileJob.of(graph, key.digest), handle.describe(), cache, outcomes.put)
                outcome = outcomes.get(timeout=300)
                assert outcome.state == "compiled", outcome.error
        entry = cache.get(key)
        assert entry is not None
        digests.append((key.digest, entry.files["package.pt2"].sha256))
    assert digests[0] == digests[1]


def test_explain_finds_what_a_process_compiled(tmp_path: Path) -> None:
    handle = skeleton(tmp_path / "cache")
    needed = handle.needed([(256, 256)], (20,))
    assert len(handle.to_compile(needed)) == len(needed.distinct)
    graph = graph_of(handle, RESNET)
    ended = threading.Event()
    with CompilePool(1, niceness=0) as pool:
        digest = handle._dispatcher.binder.key(graph).digest
        pool.submit(
            CompileJob.of(graph, digest), handle.describe(), CompileCache(tmp_path / "cache"), lambda _: ended.set()
        )
        assert ended.wait(300)
    again = skeleton(tmp_path / "cache", target=Target.parse("h200"))  # another device of the architecture
    assert len(again.to_compile(needed)) == len(needed.distinct) - 1
    found = again.explain(256, 256, 20)
    assert found.made_elsewhere is not None and found.made_elsewhere.startswith("compiled for h100, and serves h200: ")
    states = {row.topology: row.state for row in found.rows}
    assert all(re.match(r"missing \d+ of \d+", state) for state in states.values())
