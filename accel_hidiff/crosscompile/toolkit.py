"""What of NVIDIA's toolkit compiling for a GPU needs: headers, which wheels bring. No driver and no nvcc."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Final

from accel_hidiff.errors import BadInput

HEADERS: Final = {  # a header of each part -> the wheel that brings it
    "cuda.h": "nvidia-cuda-runtime",
    "crt/host_config.h": "nvidia-cuda-crt",
    "cuda/std/version": "nvidia-cuda-cccl",
}


def cuda_home() -> Path:
    """The folder whose `include` has the headers: $CUDA_HOME, else that of the wheels.

    Raises:
        BadInput: there is none, or a header is missing.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    given = os.environ.get("CUDA_HOME")
    home = Path(given) if given else max((site / "nvidia").glob("cu[0-9]*"), default=None)
    if home is None:
        raise BadInput("CUDA headers: expected those of a CUDA build of torch, found none; pip install its wheel")
    for header, wheel in HEADERS.items():
        if not any((home / "include" / place / header).is_file() for place in ("", "cccl")):
            raise BadInput(f"CUDA headers: expected {header} in {home}/include, found none; pip install {wheel}")
    return home
