# SPDX-License-Identifier: MIT
"""The tables and batches that are measured, and the suites that they form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Ids = Literal["uniform", "zipf"]
Direction = Literal["forward", "dense", "sparse"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "dense", "sparse")
# Batches that a measurement goes round, so that it finds in cache what training would find there.
NUM_BATCHES = 4
ZIPF_EXPONENT = 1.1


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


def make_weight(workload: Workload) -> Tensor:
    """The table [N, F·K] float32. Its scale gives interactions of variance 1."""
    N, F, K = workload.table_shape
    scale = (F * (F - 1) / 2 * K) ** -0.25
    return torch.empty(N, F * K).normal_(0.0, scale, generator=torch.Generator().manual_seed(0))


def make_batches(workload: Workload) -> list[Tensor]:
    """``NUM_BATCHES`` batches of global ids [B, F] int64.

    Zipf: the feature of rank r in its field has probability ∝ r^-1.1; ranks are scattered over the field.
    """
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


@dataclass(frozen=True)
class Suite:
    """What one run measures, in ``passes`` rounds over all subjects of a workload."""

    workloads: tuple[Workload, ...]
    threads: tuple[int, ...]
    passes: int = 3
    min_rounds: int = 3  # a pass; times passes = 9 timings at least
    pass_seconds: float = 0.1  # a pass times a subject for about so long, within 3 to 30 rounds
    max_dense_bytes: int = 2**30  # larger dense gradients are not worth the minutes they take
    effort: float = 1.0  # scales the epochs of the quality comparison

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


SUITES = {
    "full": Suite(
        tuple(
            Workload(num_features, embed_dim, ids)
            for embed_dim in (4, 8, 16)
            for num_features in (100_000, 1_000_000)
            for ids in ("uniform", "zipf")
        ),
        threads=(1, 2),
    ),
    "quick": Suite(
        (
            Workload(100_000, 4, "uniform"),
            Workload(1_000_000, 4, "zipf"),
            Workload(100_000, 16, "uniform"),
        ),
        threads=(1,),
        effort=0.25,
    ),
    # Shows that everything runs; its figures mean nothing.
    "smoke": Suite(
        (Workload(2_000, 4, "zipf", num_fields=5, batch_size=64),),
        threads=(1,),
        pass_seconds=0.001,
        effort=0.01,
    ),
}
