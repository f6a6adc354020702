# SPDX-License-Identifier: MIT
"""Samples on disk and in memory: text files in, memory-mapped datasets, batches out, and an encoder of frames."""

from ._dataset import Shard, SparseDataset
from ._encoder import Bins, FieldEncoder, Hash, Numeric, Vocabulary
from ._libffm import convert_libffm, iter_libffm, read_libffm, read_libsvm, write_libffm
from ._store import open_dataset

__all__ = [
    "Bins",
    "FieldEncoder",
    "Hash",
    "Numeric",
    "Shard",
    "SparseDataset",
    "Vocabulary",
    "convert_libffm",
    "iter_libffm",
    "open_dataset",
    "read_libffm",
    "read_libsvm",
    "write_libffm",
]
