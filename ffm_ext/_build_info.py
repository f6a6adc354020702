# SPDX-License-Identifier: MIT
"""What this build of the package is, and what it runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import _C

__version__: str = _C.build_info()["version"]


def check_contents(is_on: bool) -> bool:
    """Whether operators on CUDA look at what ids, fields, offsets and values hold, and raise as on the CPU.

    It is off at first, unless ``FFM_EXT_CHECK_CONTENTS=1`` is set: the check waits for the device, and cannot be part
    of a CUDA graph. Without it nothing is read out of bounds either. A sample with an id outside the table or a field
    outside ``[0, F)`` gets NaN as its output and gives the table no gradient, and so does one whose offsets fall.

    Returns:
        What it was before.
    """
    return _C.check_contents(is_on)


def build_info() -> dict[str, Any]:
    """What was built and what runs: for bug reports and benchmark headers.

    Returns:
        ``version``, ``torch_built_against``, ``torch``, ``compiler``, ``isa`` (the CPU path in use;
        ``FFM_EXT_ISA`` forces one), ``cuda_archs`` (what CUDA kernels are
        built for, ``compute_`` means PTX; empty: built without CUDA), ``threads`` (of torch's
        pool), ``cpu_count``, ``python``, ``platform``.
    """
    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def library_path() -> Path:
    """``libffm_ext_ops.so``: the operators without Python, for programs in C++ (``examples/cpp_serving``)."""
    return Path(_C.__file__).with_name("libffm_ext_ops.so")
