"""Packages that AOTInductor made, in a serving process: loaded without a compiler, bound to live weights, called."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from accel_hidiff.backends.aot_container import Container, can_load
from accel_hidiff.device import device_index, has_siblings, on_device
from accel_hidiff.errors import CompileFailed
from compile_cache import Entry


class Package:
    """A loaded package, and tensors of its own over the memory of the weights that it is bound to.

    Of its own: `module.to(...)` gives a parameter other memory, and what the code reads must live until the next
    request binds anew. And always the same ones: torch's `load_constants(user_managed=True)` never lets go of a tensor
    that it was given, whatever is loaded in its place (torch 2.13), so that every model that was exchanged would stay
    in memory. These take up other memory, and give it up, but are never given up themselves.

    One call at a time: packages are loaded to be run by a single thread, which is what a CUDA graph can capture, and
    other threads wait here.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self._loader = loader
        self._boxed_run: Callable[[list[Tensor]], list[Tensor]] = loader.boxed_run
        self._device = device if has_siblings(device) else None
        self._slots: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self.names: list[str] = loader.get_constant_fqns()

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Calls it, on its own device whichever is current; empties the list."""
        with self._lock:
            if self._device is None:
                return self._boxed_run(inputs)
            with on_device(self._device):
                return self._boxed_run(inputs)

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Calls run over these weights from now on."""
        with torch.inference_mode():
            for name in self.names:
                weight = tensors[name].detach()
                if name not in self._slots:
                    self._slots[name] = torch.empty(0, dtype=weight.dtype, device=weight.device)
                self._slots[name].set_(weight)  # type: ignore[call-overload]
        self._loader.load_constants(self._slots, False, True, True)  # all of the active buffer

    def unbind(self) -> None:
        """The weights' memory is given up; nothing may call it before it is bound again."""
        # The collector may call this in the middle of anything: in a kernel of tracing, where all operators are meta's.
        with _disable_current_modes(), torch.inference_mode(), torch._C._PreserveDispatchKeyGuard():
            torch._C._set_meta_in_tls_dispatch_include(False)
            for slot in self._slots.values():
                slot.set_()  # type: ignore[call-overload]


# Packages that nobody calls any more, by content and device. The library of a package stays in the process once it is
# loaded (`dlclose` does not unload it), so it is bound to other weights, whoever needs the same program next.
_idle: defaultdict[tuple[str, int], deque[Package]] = defaultdict(deque)


def _release(idle: deque[Package], package: Package) -> None:
    package.unbind()
    idle.append(package)


class _Call:
    """Calls a package; when the last reference to it goes, the package is idle."""

    __slots__ = ("__weakref__", "_run")

    def __init__(self, package: Package) -> None:
        self._run = package.run

    def __call__(self, *inputs: Tensor) -> Any:
        out = self._run(list(inputs))
        return out[0] if len(out) == 1 else tuple(out)


def bound_call(name: str, entry: Entry, file: str, module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """A call of a stored package over a module's live weights.

    Args:
        name: of the region, for errors.
        entry, file: of the compile cache, and the package's name in it.
        module: holds the weights.
        device: where they are.

    Raises:
        CompileFailed: the package does not load, or was made for another structure.
    """
    idle = _idle[entry.files[file].sha256, device_index(device)]
    try:
        package = idle.pop()
    except IndexError:
        advice = f"delete artifact {entry.digest[:12]} from the cache and compile again"
        package = Package(load_package(name, entry.path / file, device, advice), device)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if missing := [weight for weight in package.names if weight not in tensors]:
        raise CompileFailed(
            f"{name}: expected a region that holds {missing[0]}, which artifact {entry.digest[:12]} "
            "binds; it was made for another structure: delete it (compile-cache verify) and compile again"
        )
    with on_device(device):
        package.bind(tensors)
    call = _Call(package)
    weakref.finalize(call, _release, idle, package).atexit = False
    return call


def load_package(name: str, path: Path, device: torch.device, advice: str) -> Any:
    """Loads a package by torch's C++ loader; CompileFailed, with the advice, where it does not load.

    `torch._inductor.aoti_load_package` wraps the same loader, but first probes the vector instructions of this CPU, for
    a log line, by compiling and running programs: a serving process has no use for a compiler. What it would compare
    is part of every action key.

    The package makes the device current that it is loaded for; the one before is current again afterwards.
    """
    index = device_index(device)
    try:
        with on_device(device):
            if can_load(path):
                return Container(path, index)
            run_single_threaded, num_runners = True, 1
            loader = torch._C._aoti.AOTIModelPackageLoader
            return loader(str(path), "model", run_single_threaded, num_runners, index)
    except (RuntimeError, OSError, BadZipFile) as problem:
        got = str(problem).strip().splitlines()[0]
        raise CompileFailed(f"{name}: expected a package that loads, got: {got}; {advice}") from problem
