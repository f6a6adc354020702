# SPDX-License-Identifier: MIT
"""Field-aware factorization machines for PyTorch, fused in C++ and CUDA."""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from . import (  # noqa: F401
    _C,
    _fake,
    _vmap,
    data,
    datasets,
    functional,
    inspection,
    interop,
    memory,
    optim,
    reference,
    training,
)
from ._build_info import __version__, build_info, check_contents, library_path
from .batch import SparseBatch
from .modules import FFM, FM, FFMInteraction, FieldAwareFactorizationMachine
from .quantized import QuantizedFFMInteraction, quantize

__all__ = [
    "FFM",
    "FM",
    "FFMInteraction",
    "FieldAwareFactorizationMachine",
    "QuantizedFFMInteraction",
    "SparseBatch",
    "__version__",
    "build_info",
    "check_contents",
    "data",
    "datasets",
    "functional",
    "inspection",
    "interop",
    "library_path",
    "memory",
    "optim",
    "quantize",
    "reference",
    "training",
]
