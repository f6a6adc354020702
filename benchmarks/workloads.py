# SPDX-License-Identifier: MIT
"""The tables and batches that are measured, and the suites that they form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ffm_ext import SparseBatch
from ffm_ext.memory import empty_table

Ids = Literal["uniform", "zipf"]
Direction = Literal["forward", "dense", "sparse"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "dense", "sparse")
# Batches that a measurement goes round, so that it finds in cache what training would find there.
NUM_BATCHES = 4
ZIPF_EXPONENT = 1.1
# Entries of a batch where the kernels are compared with the roof: their rows exceed every cache.
ROOF_ENTRIES = 39 * 4096


@dataclass(frozen=True)
class Workload:
    """One feature a field, ``num_fields`` fields of (almost) equal size, ids drawn within each field."""

    num_features: int
    embed_dim: int
    ids: Ids
    num_fields: int = 39  # Criteo's
    batch_size: int = 4096

    @property
    def name(self) -> str:
        return f"N{short(self.num_features)}-K{self.embed_dim}-{self.ids}"

    @property
    def table_shape(self) -> tuple[int, int, int]:
        """[N, F, K]"""
        return self.num_features, self.num_fields, self.embed_dim

    @property
    def table_bytes(self) -> int:
        """Size of the table, and of a dense gradient."""
        return 4 * self.num_features * self.num_fields * self.embed_dim

    @property
    def bytes_read(self) -> int:
        """Bytes of the table that a forward of one batch reads, each row as often as it occurs."""
        return 4 * self.batch_size * self.num_fields**2 * self.embed_dim

    @cached_property
    def field_dims(self) -> tuple[int, ...]:
        size, rest = divmod(self.num_features, self.num_fields)
        return tuple(size + (f < rest) for f in range(self.num_fields))

    @cached_property
    def field_starts(self) -> tuple[int, ...]:
        return tuple(int(start) for start in np.cumsum((0, *self.field_dims[:-1])))

    @property
    def feature_fields(self) -> np.ndarray:
        """The field of each feature, [N]."""
        return np.repeat(np.arange(self.num_fields), self.field_dims)

    def matrix(self, ids: Tensor) -> sp.csr_matrix:
        """Samples [n, F] as a matrix [n, N] of ones."""
        starts = np.arange(len(ids) + 1) * ids.shape[1]
        entries = np.ones(ids.numel()), ids.numpy().ravel(), starts
        return sp.csr_matrix(entries, shape=(len(ids), self.num_features))


@dataclass(frozen=True)
class TextWorkload(Workload):
    """Ten fields of 1 % of the features each, one feature a sample; and a text, ``words`` features a sample."""

    num_fields: int = 11
    words: int = 1

    @property
    def name(self) -> str:
        return f"{super().name}-words{self.words}"

    @property
    def entries(self) -> int:
        """Entries of a sample."""
        return self.num_fields - 1 + self.words

    @cached_property
    def field_dims(self) -> tuple[int, ...]:
        size = self.num_features // 100
        one_hot = (size,) * (self.num_fields - 1)
        return *one_hot, self.num_features - sum(one_hot)


def make_weight(workload: Workload, *, huge_pages: bool = False) -> Tensor:
    """The table [N, F·K] float32. Its scale gives interactions of variance 1.

    huge_pages: as the tables of the modules are.
    """
    N, F, K = workload.table_shape
    scale = (F * (F - 1) / 2 * K) ** -0.25
    weight = empty_table(N, F * K) if huge_pages else torch.empty(N, F * K)
    return weight.normal_(0.0, scale, generator=torch.Generator().manual_seed(0))


def make_batches(workload: Workload) -> list[Any]:
    """``NUM_BATCHES`` batches of global ids [B, F] int64; of a `TextWorkload`, as `SparseBatch`.

    Zipf: the feature of rank r in its field has probability ∝ r^-1.1; ranks are scattered over the field.
    """
    if isinstance(workload, TextWorkload):
        return [_text_batch(workload, seed) for seed in range(NUM_BATCHES)]
    rng = np.random.default_rng(0)
    shape = NUM_BATCHES, workload.batch_size
    columns = []
    for start, size in zip(workload.field_starts, workload.field_dims, strict=True):
        if workload.ids == "uniform":
            local = rng.integers(0, size, shape)
        else:
            cdf = np.cumsum(np.arange(1, size + 1) ** -ZIPF_EXPONENT)
            local = rng.permutation(size)[np.searchsorted(cdf, rng.random(shape) * cdf[-1])]
        columns.append(start + local)
    return list(torch.from_numpy(np.stack(columns, axis=2)))


def _text_batch(workload: TextWorkload, seed: int) -> SparseBatch:
    """Uniform ids and values; a word from each of equal slices of the vocabulary, so that none comes twice."""
    generator = torch.Generator().manual_seed(seed)
    B, words = workload.batch_size, workload.words
    vocabulary = workload.field_dims[-1]
    slices = torch.arange(words + 1) * vocabulary // words
    starts = torch.tensor(workload.field_starts)
    lows = torch.cat([starts[:-1], starts[-1] + slices[:-1]])
    sizes = torch.cat([torch.tensor(workload.field_dims[:-1]), slices.diff()])
    drawn = torch.rand(B, workload.entries, generator=generator, dtype=torch.float64)
    indices = lows + (drawn * sizes).long()
    fields = torch.arange(workload.entries).clamp(max=workload.num_fields - 1).repeat(B)
    values = torch.rand(indices.numel(), generator=generator) + 0.5
    offsets = torch.arange(B + 1) * workload.entries
    return SparseBatch(indices.flatten(), fields, values, offsets)


@dataclass(frozen=True)
class KernelWorkloads:
    """What the kernels are measured on, a list for each question; at one thread, but for the roof."""

    roof: tuple[Workload, ...]
    dims: tuple[Workload, ...]  # they take turns with each other
    dtypes: tuple[Workload, ...]
    latency: tuple[Workload, ...]
    nnz: tuple[TextWorkload, ...]
    batch: tuple[Workload, ...]
    calls: int = 2001  # of a latency, over all passes


@dataclass(frozen=True)
class Suite:
    """What one run measures, in ``passes`` rounds over all subjects of a workload."""

    workloads: tuple[Workload, ...]
    threads: tuple[int, ...]
    passes: int = 3
    min_rounds: int = 3  # a pass; times passes = 9 timings at least
    pass_seconds: float = 0.1  # a pass times a subject for about so long, within 3 to 30 rounds
    max_dense_bytes: int = 2**30  # larger dense gradients are not worth the minutes they take
    effort: float = (
        1.0  # scales the epochs of the quality comparison, and the samples to train with
    )
    training: tuple[Workload, ...] = ()
    memory: tuple[Workload, ...] = ()
    kernels: KernelWorkloads = field(kw_only=True)

    def cases(self) -> Iterator[tuple[int, Workload, int]]:
        """Thread count, workload and number of the pass, in the order of the run.

        Threads come first, since ``torch.compile`` bakes their number in; workloads that share a table
        follow each other.
        """
        for threads in self.threads:
            for workload in self.workloads:
                for number in range(self.passes):
                    yield threads, workload, number


def short(number: float) -> str:
    """1234567 -> '1.23M', 100000 -> '100k'."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{float(f'{number / unit:.3g}'):g}{letter}"
    return f"{number:.3g}"


def _nnz(words: tuple[int, ...], num_features: int, entries: int) -> tuple[TextWorkload, ...]:
    """Batches of about so many entries, at least two samples."""
    return tuple(
        TextWorkload(num_features, 4, "uniform", batch_size=max(2, entries // (10 + n)), words=n)
        for n in words
    )


SUITES = {
    "full": Suite(
        tuple(
            Workload(num_features, embed_dim, ids)
            for embed_dim in (4, 8, 16)
            for num_features in (100_000, 1_000_000)
            for ids in ("uniform", "zipf")
        ),
        threads=(1, 2),
        training=tuple(Workload(1_000_000, K, "zipf") for K in (4, 8)),
        memory=tuple(Workload(N, K, "uniform") for K in (4, 8) for N in (100_000, 1_000_000)),
        kernels=KernelWorkloads(
            roof=tuple(
                Workload(N, K, ids, num_fields=F, batch_size=ROOF_ENTRIES // F)
                for F in (22, 39)
                for K in (4, 8, 16)
                for N in (100_000, 1_000_000)
                for ids in ("uniform", "zipf")
            ),
            dims=tuple(Workload(100_000, K, "uniform") for K in (3, 4, 5, 8, 10, 12, 16)),
            dtypes=tuple(Workload(1_000_000, K, "uniform") for K in (4, 8, 16)),
            latency=tuple(Workload(100_000, 4, "uniform", batch_size=B) for B in (1, 32)),
            nnz=_nnz((1, 3, 10, 30, 100, 300, 1000), 100_000, 40_000),
            batch=tuple(Workload(100_000, 4, "uniform", batch_size=4**power) for power in range(8)),
        ),
    ),
    "quick": Suite(
        (
            Workload(100_000, 4, "uniform"),
            Workload(1_000_000, 4, "zipf"),
            Workload(100_000, 16, "uniform"),
        ),
        threads=(1,),
        effort=0.25,
        training=(Workload(1_000_000, 4, "zipf"),),
        memory=(Workload(100_000, 4, "uniform"),),
        kernels=KernelWorkloads(
            roof=(Workload(100_000, 4, "uniform"), Workload(100_000, 4, "zipf")),
            dims=tuple(Workload(100_000, K, "uniform") for K in (3, 4)),
            dtypes=(Workload(100_000, 4, "uniform"),),
            latency=(Workload(100_000, 4, "uniform", batch_size=1),),
            nnz=_nnz((1, 10, 100), 100_000, 40_000),
            batch=tuple(Workload(100_000, 4, "uniform", batch_size=B) for B in (1, 64, 4096)),
            calls=300,
        ),
    ),
    # Shows that everything runs; its figures mean nothing.
    "smoke": Suite(
        (Workload(2_000, 4, "zipf", num_fields=5, batch_size=64),),
        threads=(1,),
        pass_seconds=0.001,
        effort=0.01,
        training=(Workload(2_000, 4, "zipf", num_fields=5),),
        memory=(Workload(2_000, 4, "uniform", num_fields=5, batch_size=64),),
        kernels=KernelWorkloads(
            roof=(Workload(2_000, 4, "zipf", num_fields=5, batch_size=64),),
            dims=tuple(Workload(2_000, K, "uniform", num_fields=5, batch_size=64) for K in (3, 4)),
            dtypes=(Workload(2_000, 4, "uniform", num_fields=5, batch_size=64),),
            latency=(Workload(2_000, 4, "uniform", num_fields=5, batch_size=1),),
            nnz=_nnz((1, 10), 2_000, 100),
            batch=tuple(Workload(2_000, 4, "uniform", num_fields=5, batch_size=B) for B in (1, 16)),
            calls=30,
        ),
    ),
}
