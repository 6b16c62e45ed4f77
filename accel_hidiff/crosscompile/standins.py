"""What stands in for a GPU, its driver and Triton's while AOTInductor compiles for a target.

Each stand-in is here with the reason why it is needed. All of them are put in place together, by `standing_in`, and
taken off when it ends.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from accel_hidiff.crosscompile.attention import attention_chosen
from accel_hidiff.crosscompile.choosing import Candidate, Choice, choose
from accel_hidiff.crosscompile.embedding import embedded
from accel_hidiff.crosscompile.libcuda import build_stub
from accel_hidiff.crosscompile.toolkit import cuda_home
from accel_hidiff.packages.cubin import usage_of
from accel_hidiff.target import Target

_WARP: Final = 32

# Options of Inductor that would ask the device to run something, or take more than one process.
_OPTIONS: Final[dict[str, Any]] = {
    "compile_threads": 1,
    "triton.autotune_at_compile_time": True,  # while compiling: there, `choosing` is asked
    "shape_padding": False,  # would time padded products
    "fx_graph_cache": False,
    "fx_graph_remote_cache": False,
}


@contextmanager
def standing_in(target: Target, folder: Path, choices: list[Choice]) -> Iterator[None]:
    """AOTInductor compiles for the target inside of the block, whatever this machine has.

    Args:
        target: what to compile for.
        folder: an existing one for the driver's stand-in.
        choices: what was taken for each Triton kernel is added to it.

    Raises:
        CompileFailed: the driver's stand-in cannot be built.
        BadInput: a part of NVIDIA's toolkit is not installed.
    """
    import triton.backends
    import triton.knobs
    import triton.runtime.driver as triton_driver
    from torch._dynamo import device_interface
    from torch._inductor import codecache, graph
    from torch._inductor import config as inductor_config
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from torch.utils import cpp_extension

    home = cuda_home()
    properties = device_properties(target)
    build_stub(home / "include" / "cuda.h", folder, os.environ.get("CXX", "g++"))
    paths = {"CUDA_HOME": str(home), "LIBRARY_PATH": _before(folder, os.environ.get("LIBRARY_PATH"))}
    if (assembler := Path(torch.__file__).parent / "bin" / "ptxas").is_file():
        paths["TRITON_PTXAS_PATH"] = str(assembler)  # torch sets it too, but after the first kernels, with Triton's own
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        stack.enter_context(mock.patch.dict(os.environ, paths))
        replace(cpp_extension, "CUDA_HOME", str(home))  # it looked when it was imported, which may be long ago
        for name, answer in _answers(properties).items():
            replace(torch.cuda, name, answer)
            if hasattr(device_interface.CudaInterface, name.lstrip("_")):
                replace(device_interface.CudaInterface, name.lstrip("_"), staticmethod(answer))
        replace(device_interface, "caching_worker_current_devices", {"cuda": 0})
        replace(device_interface, "caching_worker_device_properties", {"cuda": [properties]})
        # Fake tensors start the device's context, and are refused where they cannot.
        replace(fake_tensor, "init_gpu_context", lambda device: None)
        replace(fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda mode: True))
        # Triton looks for an active driver to learn the target.
        replace(triton.backends.backends["nvidia"].driver, "is_active", staticmethod(lambda: True))
        holder = getattr(triton_driver, "driver", triton_driver)
        replace(holder, "_active", _triton_driver(target))
        replace(triton_helpers, "set_driver_to_gpu", lambda: None)
        replace(triton.knobs.compilation, "disable_line_info", True)  # paths of this machine
        # Constants are compared by address, and fake ones have none.
        replace(graph, "is_same_tensor", lambda one, other: one is other)
        replace(torch._C, "_select_conv_backend", _with_cudnn(torch._C._select_conv_backend))
        if hasattr(codecache, "convert_cubin_to_obj"):  # later releases do as `embedded` does
            replace(codecache, "convert_cubin_to_obj", embedded)
        # Arrays of sizes are shared by the address of a passing object, so that two builds differ by accident.
        replace(CppWrapperCpu, "codegen_int_array_var", _own_array)
        replace(PythonWrapperCodegen, "generate_and_run_autotune_block", _chooser(target, choices))
        stack.enter_context(attention_chosen(target.profile.capability))
        stack.enter_context(inductor_config.patch(_OPTIONS))
        yield


def device_properties(target: Target) -> types.SimpleNamespace:
    """What `torch.cuda.get_device_properties` would say of the target's device."""
    profile, limits = target.profile, target.profile.limits
    major, minor = profile.capability
    return types.SimpleNamespace(
        name=profile.torch_name,
        major=major,
        minor=minor,
        multi_processor_count=profile.multiprocessors,
        warp_size=_WARP,
        total_memory=profile.memory_bytes,
        regs_per_multiprocessor=limits.registers_per_multiprocessor,
        max_threads_per_multi_processor=limits.threads_per_multiprocessor,
        max_threads_per_block=1024,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=limits.shared_per_block,
        shared_memory_per_multiprocessor=limits.shared_per_multiprocessor,
        L2_cache_size=profile.l2_bytes,
        is_integrated=0,
    )


def _answers(properties: types.SimpleNamespace) -> dict[str, Callable[..., Any]]:
    """Functions of `torch.cuda`, each with the one answer that the target gives."""
    said: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "set_device": None,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "synchronize": None,
        "set_rng_state": None,
        "get_rng_state": torch.empty(16, dtype=torch.uint8),
    }
    return {name: lambda *args, value=value, **kwargs: value for name, value in said.items()}


def _triton_driver(target: Target) -> types.SimpleNamespace:
    """What Triton and Inductor ask of Triton's driver; a loaded kernel cannot be launched, only looked at."""
    import triton.backends.compiler

    known = {
        "max_shared_mem": target.profile.limits.shared_per_block,
        "multiprocessor_count": target.profile.multiprocessors,
        "warpSize": _WARP,
    }

    def load_binary(name: str, cubin: bytes, *rest: Any) -> tuple[Any, ...]:
        usage = usage_of(cubin)[name]
        # Module, function, ..., threads of a block. No module: Triton 3.9 has the driver unload what there is, when the
        # kernel goes, which is after this stand-in.
        return None, 1, usage.registers, usage.stack_bytes // 4, 1024

    major, minor = target.profile.capability
    return types.SimpleNamespace(
        utils=types.SimpleNamespace(get_device_properties=lambda device: known, load_binary=load_binary),
        launcher_cls=lambda source, metadata: None,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 10 * major + minor, _WARP),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )


def _with_cudnn(select: Callable[..., Any]) -> Callable[..., Any]:
    """cuDNN takes bfloat16 on every architecture that a `Target` can have. Without a device torch says that it does
    not, and plans a convolution of its own in NCHW."""
    backends: Any = torch._C._ConvBackend  # type: ignore[attr-defined]
    instead = {
        backends.Slow2d: backends.Cudnn,
        backends.SlowDilated2d: backends.Cudnn,
        backends.SlowTranspose2d: backends.CudnnTranspose,
    }

    def selected(input: Any, *args: Any, **kwargs: Any) -> Any:  # torch names it so
        found = select(input, *args, **kwargs)
        return instead.get(found, found) if input.is_cuda and input.dtype == torch.bfloat16 else found

    return selected


def _own_array(wrapper: Any, array: str, writeline: Any, known_statically: bool = False, graph: Any = None) -> str:
    """Each use of an array of sizes declares its own."""
    name: str = wrapper._codegen_int_array_var_impl(array, writeline, known_statically)
    return name


def _chooser(target: Target, choices: list[Choice]) -> Callable[[Any], None]:
    """In the place of running kernels to time them: all their configurations are compiled, and `choosing` takes one."""

    def choose_configurations(wrapper: Any) -> None:
        from torch._inductor.async_compile import CompiledTritonKernels
        from torch._inductor.codecache import CudaKernelParamCache
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        # Nothing of this process's earlier graphs: code is linked in the order of the first cache, where a name keeps
        # its place; a kernel of the second one gets more configurations each time that it is compiled.
        CudaKernelParamCache.cache_clear()
        CompiledTritonKernels.cache_clear()
        scope: dict[str, Any] = {}
        exec(f"{wrapper.kernel_autotune_defs.getvalue()}\nasync_compile.wait(globals())\n", scope)
        for name, kernel in scope.items():
            if not isinstance(kernel, CachingAutotuner):
                continue
            if not kernel.launchers:
                kernel.precompile()
            found = [_candidate(launcher) for launcher in kernel.launchers]
            choice = choose(name, found, target.profile.limits)
            taken = kernel.launchers[choice.taken]
            kernel.launchers = [taken]
            kernel.save_gpu_kernel("stream", taken)
            choices.append(choice)

    return choose_configurations


def _candidate(launcher: Any) -> Candidate:
    warps = int(launcher.config.num_warps)
    return Candidate(str(launcher.config), warps, launcher.n_regs, launcher.n_spills or 0, launcher.shared)


def _before(folder: Path, paths: str | None) -> str:
    return f"{folder}:{paths}" if paths else str(folder)
