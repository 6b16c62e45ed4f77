"""A package of AOTInductor through the C interface of its library, so that calls run without Python's lock.

torch's own loader (`torch._C._aoti.AOTIModelPackageLoader`) keeps the GIL for as long as a call takes, and every other
thread of the process, an HTTP server's above all, stands still meanwhile: on the CPU for the whole computation, on a
GPU whenever its queue is full. `ctypes` releases the GIL around a call of a C function, and all that a package can do
is one (torch/csrc/inductor/aoti_runtime/interface.h).
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from torch import Tensor

_MODEL: Final = "data/aotinductor/model/"  # where torch's loader looks, below the archive's own folder
_LIBRARY: Final = ".so"
_NOT_RUN: Final = (".cpp", ".h")  # sources, for people
_PREFIX: Final = "AOTInductorModelContainer"
_BELOW: Final = b"API call failed"  # a function of torch's failed, that the library called

_new_handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors  # tensors -> capsules around owned handles
_take_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Entry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("handle", ctypes.c_void_p))


class Container:
    """One loaded package; with the methods of torch's loader that are used here. One call at a time.

    Args:
        path: of the package, for which `can_load` is true.
        index: of the CUDA device, -1 for the CPU.

    Raises:
        OSError, RuntimeError, zipfile.BadZipFile: it does not load.
    """

    def __init__(self, path: Path, index: int) -> None:
        self._index = index
        files = Path(tempfile.mkdtemp(prefix="accel_hidiff-"))
        remove_files = weakref.finalize(self, shutil.rmtree, files, ignore_errors=True)
        self._library = ctypes.CDLL(str(_unpack(path, files)))
        self._container = ctypes.c_void_p()
        device = b"cpu" if index < 0 else f"cuda:{index}".encode()
        folder = None if index < 0 else str(files).encode()  # kernels are read at their first call
        self._call("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), device, folder)
        if index < 0:
            remove_files()
        self._given, self._made = self._array("GetNumInputs"), self._array("GetNumOutputs")  # handles in a call
        self._run: Any = getattr(self._library, f"{_PREFIX}RunSingleThreaded")
        self._run.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_void_p, ctypes.c_size_t] * 2,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._names = dict(self._constants())
        self._handles: dict[str, tuple[Tensor, Any]] = {}  # constants that it was given, and handles on them
        delete = getattr(self._library, f"{_PREFIX}Delete")
        weakref.finalize(self, _delete, delete, self._container, self._handles).atexit = False

    def get_constant_fqns(self) -> list[str]:
        """The names of the weights in the module that was exported."""
        return list(self._names)

    def load_constants(
        self, constants: Mapping[str, Tensor], use_inactive: bool, check_full_update: bool, user_managed: bool
    ) -> None:
        """Calls read these weights from now on; the tensors stay the caller's, who keeps them."""
        assert user_managed, "copies of weights are never wanted here"
        for name, tensor in constants.items():
            if self._handles.get(name, (None,))[0] is not tensor:
                (handle,) = _new_handles([tensor])
                self._handles[name] = (tensor, _address(handle, None))
        pairs = (_Entry * len(constants))(*[_Entry(self._names[name], self._handles[name][1]) for name in constants])
        options = ctypes.c_bool(use_inactive), ctypes.c_bool(check_full_update)
        count = ctypes.c_size_t(len(constants))
        self._call("UpdateUserManagedConstantBufferPairs", self._container, pairs, count, *options)

    def boxed_run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Calls it; other threads run meanwhile. Empties the list."""
        given, made = self._given, self._made
        if len(inputs) != len(given):
            raise ValueError(f"expected {len(given)} inputs, got {len(inputs)}")
        for number, handle in enumerate(_new_handles(inputs)):
            given[number] = _address(handle, None)
        for number in range(len(made)):
            made[number] = None
        inputs.clear()
        stream = None if self._index < 0 else torch._C._cuda_getCurrentRawStream(self._index)
        try:
            failed = self._run(self._container, given, len(given), made, len(made), stream, None)
        except BaseException:  # by the handler of a signal that came meanwhile, once the call had ended
            _taken(made)
            raise
        if failed:
            raise RuntimeError(f"{_PREFIX}RunSingleThreaded: API call failed at run time{self._reason()}")
        return _taken(made)

    def _array(self, function: str) -> Any:
        """An array for as many handles as a function tells."""
        count = ctypes.c_size_t()
        self._call(function, self._container, ctypes.byref(count))
        return (ctypes.c_void_p * count.value)()

    def _constants(self) -> list[tuple[str, bytes]]:
        """(name in the module, name in the library) of each weight."""
        count = ctypes.c_size_t()
        self._call("GetNumConstants", self._container, ctypes.byref(count))
        names = []
        for number in range(count.value):
            both = []
            for function in ("GetConstantOriginalFQN", "GetConstantName"):
                name = ctypes.c_char_p()
                self._call(function, self._container, ctypes.c_size_t(number), ctypes.byref(name))
                both.append(name.value or b"")
            names.append((both[0].decode(), both[1]))
        return names

    def _call(self, function: str, *arguments: Any) -> None:
        if getattr(self._library, f"{_PREFIX}{function}")(*arguments):
            raise RuntimeError(f"{_PREFIX}{function}: API call failed at load time{self._reason()}")

    def _reason(self) -> str:
        """What the library, and torch below it, say of the last failure on this thread; "" where they say it to stderr
        alone, as before torch 2.13."""
        text = ctypes.c_char_p()
        try:
            if self._library.AOTInductorGetLastError(ctypes.byref(text)) or not text.value:
                return ""
            told = [text.value]
            if _BELOW in text.value:
                below = self._library.torch_exception_get_what_without_backtrace
                below.restype = ctypes.c_char_p
                told.insert(0, below() or b"")
        except AttributeError:  # a function that this torch does not have
            told = [text.value or b""]
        lines = [line for one in told for line in one.decode(errors="replace").strip().splitlines()[:1]]
        return ": " + "; ".join(lines) if lines else ""


def _delete(delete: Any, container: ctypes.c_void_p, handles: dict[str, tuple[Tensor, Any]]) -> None:
    """Nobody calls a container any more; its library stays in the process."""
    delete(container)
    _taken([handle for _, handle in handles.values()])


def _taken(handles: Any) -> list[Tensor]:
    """The tensors of handles that are owned here: asked for once, or they would be freed twice."""
    tensors: list[Tensor] = _take_tensors([_capsule(handle, None, None) for handle in handles if handle])
    return tensors


def can_load(path: Path) -> bool:
    """Whether a package needs no executor of torch's beside its library: for operators that have no C function.

    Raises:
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        names = _model_files(archive)
        return f"{_library_of(names).stem}.json" not in {name.name for name in names}


def _model_files(archive: zipfile.ZipFile) -> list[PurePosixPath]:
    return [PurePosixPath(name) for name in archive.namelist() if f"/{_MODEL}" in f"/{name}"]


def _library_of(names: list[PurePosixPath]) -> PurePosixPath:
    libraries = [name for name in names if name.suffix == _LIBRARY]
    if len(libraries) != 1:
        raise RuntimeError(f"expected one library in the package, got {len(libraries)}")
    return libraries[0]


def _unpack(path: Path, folder: Path) -> Path:
    """Writes what a package needs at run time into a folder; returns where its library is."""
    with zipfile.ZipFile(path) as archive:
        names = _model_files(archive)
        for name in names:
            if name.suffix not in _NOT_RUN:
                (folder / name.name).write_bytes(archive.read(str(name)))
        return folder / _library_of(names).name
