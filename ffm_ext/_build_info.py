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


def build_info() -> dict[str, Any]:
    """What was built and what runs: for bug reports and benchmark headers.

    Returns:
        ``version``, ``torch_built_against``, ``torch``, ``compiler``, ``isa`` (the CPU path in use;
        ``FFM_EXT_ISA`` forces one), ``cuda_archs`` (empty: built without CUDA), ``threads`` (of torch's
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
