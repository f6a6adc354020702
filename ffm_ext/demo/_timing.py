# SPDX-License-Identifier: MIT
"""The fused layer and two ways to write it in plain PyTorch, timed on the same table and batch."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ffm_ext
from ffm_ext.memory import empty_table

REPEATS = 5
PATIENCE = 5.0  # seconds, after which fewer repeats will do: a busy machine should not stretch the demo to minutes


@dataclass(frozen=True)
class Workload:
    """One feature a field, ids uniform in each field; by default the shape of Criteo's display advertising data."""

    num_features: int = 100_000
    num_fields: int = 39
    embed_dim: int = 4
    batch_size: int = 1024

    def __str__(self) -> str:
        return (
            f"F = {self.num_fields}, K = {self.embed_dim}, N = {self.num_features:,}, "
            f"batches of {self.batch_size:,}, float32"
        )


class PairLoop(nn.Module):
    """The textbook form, which torchfm and its kin use: F tables ``[N, K]`` and a loop over the F(F-1)/2 pairs."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        columns = [weight[:, g].contiguous() for g in range(weight.shape[1])]
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(c, freeze=False) for c in columns)

    def forward(self, x: Tensor) -> Tensor:
        rows = [table(x) for table in self.tables]  # F times [B, F, K]
        F = len(rows)
        pairs = [rows[g][:, f] * rows[f][:, g] for f in range(F - 1) for g in range(f + 1, F)]
        return torch.stack(pairs, dim=1).sum((1, 2))


class Vectorised(nn.Module):
    """What to write where there is no kernel: one table with sparse gradients, and all pairs by a transpose.

    Some samples at a time, whose temporaries stay in the cache: several times faster than the whole batch at once.
    """

    chunk = 128

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape[1:]
        self.table = nn.Embedding.from_pretrained(weight.flatten(1), freeze=False, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        # Backward is quickest where the rows were gathered at once, forward alone where they were not.
        if torch.is_grad_enabled():
            parts = self.table(x).split(self.chunk)
        else:
            parts = [self.table(part) for part in x.split(self.chunk)]
        return torch.cat([self._interaction(part.unflatten(2, self.shape)) for part in parts])

    @staticmethod
    def _interaction(rows: Tensor) -> Tensor:  # [b, F, F, K] -> [b]
        everything = (rows * rows.transpose(1, 2)).sum((1, 2, 3))
        return (everything - rows.diagonal(dim1=1, dim2=2).square().sum((1, 2))) / 2


@dataclass(frozen=True)
class Timing:
    """Samples a second of one implementation, the median of several runs.

    Attributes:
        name: of the implementation.
        gradient: the kind of gradient that its backward makes.
        forward: without a graph.
        both: forward and backward.
    """

    name: str
    gradient: str
    forward: float
    both: float


def time_interaction(
    workload: Workload, *, seed: int, on_start: Callable[[str], None] = lambda name: None
) -> list[Timing]:
    """Time the fused layer, :class:`Vectorised` and :class:`PairLoop`, in this order.

    Raises:
        AssertionError: an output differs from the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    N, F, K = workload.num_features, workload.num_fields, workload.embed_dim
    # In memory as the layer has its own, so that the code is compared and not the size of pages.
    weight = empty_table(N, F * K).normal_(0.0, 0.1, generator=generator).view(N, F, K)
    local = torch.randint(N // F, (workload.batch_size, F), generator=generator)
    x = local + torch.arange(F) * (N // F)
    expected = ffm_ext.reference.ffm_interaction(weight.double(), x)

    fused = ffm_ext.FFMInteraction(N, F, K)
    with torch.no_grad():
        fused.weight.copy_(weight.flatten(1))
    layers: dict[tuple[str, str], nn.Module] = {
        ("ffm_ext, fused", "sparse"): fused,
        ("PyTorch, vectorised", "sparse"): Vectorised(weight),
        ("PyTorch, as torchfm", "dense"): PairLoop(weight),
    }
    timings = []
    for (name, gradient), layer in layers.items():
        on_start(name)

        def forward(layer: nn.Module = layer) -> Tensor:
            with torch.no_grad():
                return layer(x)

        def both(layer: nn.Module = layer) -> None:
            layer.zero_grad()
            layer(x).sum().backward()

        torch.testing.assert_close(forward().double(), expected, rtol=1e-4, atol=1e-4)
        forward_time, both_time = _median_seconds(forward), _median_seconds(both)
        layer.zero_grad()
        timings.append(
            Timing(
                name, gradient, workload.batch_size / forward_time, workload.batch_size / both_time
            )
        )
    return timings


def _median_seconds(function: Callable[[], object]) -> float:
    timer = timeit.Timer(function)
    number, _ = timer.autorange()  # calls that take 0.2 s or more; a warm-up too
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < PATIENCE:
        times.append(timer.timeit(number))
    return statistics.median(times) / number
