# SPDX-License-Identifier: MIT
"""The part of a dataset that a process reads.

A dataset falls into a fixed number of ranges, of bytes of a text or of samples of a folder, and each process has some
that follow each other. Since mini-batches are made of every range alike (:meth:`Share.rows`), they do not depend on how
many processes there are.
"""

from __future__ import annotations

from os import PathLike, path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ffm_ext.data import Shard, SparseDataset, open_dataset
from ffm_ext.data._dataset import join_shards
from ffm_ext.data._libffm import MAX_PROBLEMS, lenient_metadata, read_ranges

from ._group import Group

RANGES = 64


class Share:
    """What this process has of a dataset, and how the whole is cut.

    Attributes:
        data: the samples of this process; ``num_features``, ``num_fields`` and ``metadata`` are those of the whole.
        sizes: the number of samples of every range of the whole, ``[ranges]``.
        ranges: the numbers of the ranges that this process has.
    """

    def __init__(self, data: SparseDataset, sizes: np.ndarray, ranges: range) -> None:
        self.data = data
        self.sizes = sizes
        self.ranges = ranges
        # Where its ranges begin in data.
        ends = np.cumsum(sizes[ranges.start : ranges.stop])
        self._starts = ends - sizes[ranges.start : ranges.stop]

    @property
    def num_samples(self) -> int:
        """Of the whole."""
        return int(self.sizes.sum())

    def num_steps(self, batch_size: int) -> int:
        """Into how many batches of at most about ``batch_size`` samples an epoch falls."""
        return max(1, -(-self.num_samples // batch_size))

    def rows(self, step: int, steps: int, orders: list[np.ndarray]) -> Tensor:
        """The samples of ``data`` that are in a batch: of each range, the same stretch of its order.

        Args:
            step: which batch, from 0.
            steps: how many batches there are.
            orders: of each range of this process, the order of its samples.
        """
        found = [
            start + order[len(order) * step // steps : len(order) * (step + 1) // steps]
            for start, order in zip(self._starts, orders, strict=True)
        ]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *found]))


def ranges_of(rank: int, size: int, ranges: int) -> range:
    """The ranges of a process."""
    return range(ranges * rank // size, ranges * (rank + 1) // size)


def read_share(
    file: str | PathLike[str],
    *,
    ranges: int = RANGES,
    lenient: bool = False,
    num_threads: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Share:
    """Read the share of this process of a libffm text, or of a dataset folder. All processes of the group call it.

    Of a text, a process reads the bytes of its ranges alone; a line belongs to the range in which it begins. A folder
    is memory-mapped, and its samples are divided by number.

    Args:
        file: libffm text, or a folder of :func:`ffm_ext.data.convert_libffm`.
        ranges: into how many ranges the dataset falls: not fewer than there are processes. Runs with the same number
            have the same batches.
        lenient, num_threads: as for :func:`ffm_ext.data.read_libffm`.
        group: ``None``: the default group, or this process alone where there is none.

    Raises:
        ValueError, OSError: as :func:`ffm_ext.data.read_libffm`, in every process, also where only one has met a fault.
            Lines are counted from the start of the file.
    """
    members = Group(group)
    if path.isdir(file):
        return share(members.together(lambda: open_dataset(file)), ranges=ranges, group=group)
    _check_ranges("read_share", ranges, members)
    mine = ranges_of(members.rank, members.size, ranges)
    pieces = members.together(
        lambda: read_ranges(file, mine, ranges, lenient=lenient, num_threads=num_threads)
    )
    (sizes,) = members.cat(torch.tensor([len(piece.shard.labels) for piece in pieces]))
    found: dict[str, Any] = {
        "num_features": max(piece.max_index for piece in pieces) + 1,
        "num_fields": max(piece.max_field for piece in pieces) + 1,
        "skipped": sum(piece.skipped for piece in pieces),
        "problems": [text for piece in pieces for text in piece.problems][:MAX_PROBLEMS],
    }
    everyone = members.objects(found)
    data = SparseDataset(
        [join_shards([piece.shard for piece in pieces])],
        num_features=max(one["num_features"] for one in everyone),
        num_fields=max(one["num_fields"] for one in everyone),
        metadata=lenient_metadata(
            lenient,
            sum(one["skipped"] for one in everyone),
            [text for one in everyone for text in one["problems"]][:MAX_PROBLEMS],
        ),
    )
    return Share(data, sizes.numpy(), mine)


def share(
    dataset: SparseDataset, *, ranges: int = RANGES, group: dist.ProcessGroup | None = None
) -> Share:
    """The share of this process of a dataset that all of them can read; nothing is copied.

    Args:
        dataset: the same in every process.
        ranges, group: as for :func:`read_share`.
    """
    members = Group(group)
    _check_ranges("share", ranges, members)
    mine = ranges_of(members.rank, members.size, ranges)
    bounds = np.arange(ranges + 1) * len(dataset) // ranges
    views: list[Shard] = dataset._views(int(bounds[mine.start]), int(bounds[mine.stop]))
    data = SparseDataset(
        views,
        num_features=dataset.num_features,
        num_fields=dataset.num_fields,
        metadata=dataset.metadata,
    )
    return Share(data, np.diff(bounds), mine)


def _check_ranges(where: str, ranges: int, members: Group) -> None:
    if ranges < members.size:
        raise ValueError(f"{where}: ranges = {ranges} is less than the {members.size} processes")
