# SPDX-License-Identifier: MIT
"""Field-aware factorization machines for PyTorch, fused in C++ and CUDA."""

from importlib.machinery import PathFinder

import torch  # noqa: F401  (its libraries must be loaded before the extension)

# Here alone: an editable install of other sources would be found elsewhere.
if PathFinder.find_spec(f"{__name__}._C", __path__) is None:
    raise ImportError(
        f"{__path__[0]} is a copy of ffm_ext's sources that is not built for this Python: `make build` builds it; in "
        "another folder, Python finds the package that is installed, if any",
        name=f"{__name__}._C",
        path=__path__[0],
    )

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
