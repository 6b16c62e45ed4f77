"""A session: this process compiles for a target from now on, with fake weights and inputs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from accel_hidiff.crosscompile.choosing import Choice
from accel_hidiff.crosscompile.requirements import require
from accel_hidiff.crosscompile.standins import standing_in
from accel_hidiff.errors import BadInput
from accel_hidiff.packages.archive import read_archive
from accel_hidiff.packages.native import NativeFacts
from accel_hidiff.target import Target
from accel_hidiff.weights import stood_in_for

_compiled_for: dict[str, Target] = {}  # of this process


class Session:
    """Compiling for a target. Enter it once in a process; what it replaces is put back at its end.

    Args:
        target: what to compile for.
        folder: an existing one for a stand-in of the driver's library.

    Attributes:
        choices: what was taken for each Triton kernel since they were last `taken`.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.choices: list[Choice] = []
        self._folder = folder
        self._stack = ExitStack()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Session:
        """Raises:
        BadInput: this machine lacks something (`requirements`), or this process compiled for another target.
        CompileFailed: the driver's stand-in cannot be built.
        """
        require(self.target)
        if _compiled_for.setdefault("target", self.target) != self.target:
            raise BadInput(
                f"target: expected {_compiled_for['target']}, which this process compiled for, got {self.target}; "
                "torch remembers facts of the device: compile for each target in a process of its own"
            )
        self._stack.enter_context(standing_in(self.target, self._folder, self.choices))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def take_choices(self) -> list[Choice]:
        """The choices of the kernels that were compiled since the last time."""
        taken, self.choices[:] = list(self.choices), []
        return taken

    @contextmanager
    def weightless(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """Fake tensors on the device in the place of a module's weights, and in what is made inside of the block."""
        with stood_in_for(module, lambda weight: _fake(weight, self._mode, device)):
            yield

    def making(self) -> Any:
        """Tensors that are made inside of the block are fake."""
        return self._mode

    def unresolved(self, native: NativeFacts, package: Path) -> list[str]:
        """The symbols of a package's library that neither torch's libraries nor the driver's stand-in have.

        Args:
            native: of the library.
            package: the file that it is in.
        """
        library = self._folder / "checked.so"
        library.write_bytes(read_archive(package).library)
        try:
            ctypes.CDLL(str(self._folder / "libcuda.so"), mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as problem:
            text = str(problem)
            return [name for name in native.undefined if name in text] or [text.rsplit(": ", 1)[-1]]
        finally:
            library.unlink()
        return []

    @staticmethod
    def exported(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
        """A program whose weights are fake tensors of the mode that export made for itself."""
        mode = torch._guards.detect_fake_mode([node.meta.get("val") for node in program.graph.nodes])
        for name, weight in program.state_dict.items():
            fake = _fake(weight, mode, weight.device)
            parameter = isinstance(weight, nn.Parameter)
            program.state_dict[name] = nn.Parameter(fake, requires_grad=False) if parameter else fake
        return program


def _fake(like: Tensor, mode: Any, device: torch.device) -> Tensor:
    with mode:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
