# SPDX-License-Identifier: MIT
"""What the processes of a group tell each other. A process that has joined none is a group of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# What a file may be to blame for, the particular before the general.
_TOLD = (FileNotFoundError, OSError, IndexError, ValueError)

# The newer name of the same, where torch has it.
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def join_torchrun() -> None:
    """Join the other processes that torchrun has started, over gloo."""
    store, rank, size = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
    # The agent may keep its store over a restart, with the addresses of the processes before in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


class Group:
    """The processes of a ``torch.distributed`` group, ``None``: the default one.

    All that it returns is the same in every process, and every sum is taken in the order of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if alone else dist.get_rank(group)
        self.size = 1 if alone else dist.get_world_size(group)
        self._group = group

    def stack(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape, ``[size, *shape]``."""
        if self.size == 1:
            return tensor[None]
        found = tensor.new_empty(self.size * tensor.numel())
        assert _gather is not None
        _gather(found, tensor.contiguous().view(-1), group=self._group)
        return found.view(self.size, *tensor.shape)

    def cat(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors ``[n, …]``, with an ``n`` of its own in each process, one process after the other."""
        if self.size == 1:
            return list(tensors)
        counts = self.stack(torch.tensor(len(tensors[0]))).tolist()
        joined = []
        for tensor in tensors:
            padded = tensor.new_empty(max(counts), *tensor.shape[1:])
            padded[: len(tensor)] = tensor
            # What lies behind the count of a process is never looked at.
            parts = zip(self.stack(padded), counts, strict=True)
            joined.append(torch.cat([part[:n] for part, n in parts]))
        return joined

    def sum(self, *numbers: float) -> list[float]:
        """Sums of float64 numbers."""
        return self.stack(torch.tensor(numbers, dtype=torch.float64)).sum(0).tolist()

    def objects(self, this: T) -> list[T]:
        """Small plain objects, one of each process."""
        if self.size == 1:
            return [this]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, this, group=self._group)
        return found

    def broadcast(self, tensor: Tensor) -> None:
        """Give every process the tensor of the first."""
        if self.size > 1:
            dist.broadcast(tensor, group=self._group, group_src=0)

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier(group=self._group)

    def together(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns; where it raised in some process, all of them raise the error of the first such."""
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except _TOLD as caught:
            error = caught
        kind = next((kind for kind in _TOLD if isinstance(error, kind)), None)
        for first_kind, text in self.objects((kind, str(error))):
            if first_kind is not None:
                raise first_kind(text) from error
        return result
