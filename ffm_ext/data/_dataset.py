# SPDX-License-Identifier: MIT
"""Labelled samples, in shards."""

from __future__ import annotations

import copy
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from os import PathLike
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ffm_ext._arguments import (
    as_tensor,
    check_contents,
    check_finite,
    check_ids,
    check_size,
    is_integral,
)
from ffm_ext.batch import SparseBatch, cat_or_ones

MAX_INT32 = 2**31 - 1


class Shard(NamedTuple):
    """Some samples: a stretch of a dataset, or a batch of it.

    Attributes:
        batch: their entries.
        labels: ``[n]`` float32.
        weights: how much each counts, ``[n]`` float32; ``None``: all count the same.
    """

    batch: SparseBatch
    labels: Tensor
    weights: Tensor | None


class SparseDataset(Dataset[Shard]):
    """Labelled sparse samples, in one or several shards, in memory or memory-mapped.

    It is a ``torch.utils.data.Dataset``: ``DataLoader(dataset, batch_size, collate_fn=dataset.collate)``.
    :meth:`batches` gives the same without a loader, and without a copy where the order is that of the dataset.

    Args:
        shards: the samples, in order.
        num_features: N; ``None``: one more than the largest id, which reads all of them.
        num_fields: F; ``None``: one more than the largest field.
        metadata: whatever is worth keeping, as JSON has it.

    Attributes:
        shards: ``tuple`` of :class:`Shard`.
        num_features: N, as given or found.
        num_fields: F, as given or found.
        metadata: as given.

    Raises:
        TypeError: a tensor has another dtype than :class:`Shard` says; values are not float32; a size is no integer.
        ValueError: lengths differ, a shard is not on the CPU, or a size is negative.

    Ids are not checked against ``num_features`` here (:meth:`from_arrays` does that), but by the operators.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        *,
        num_features: int | None = None,
        num_fields: int | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.shards = tuple(shards)
        for shard in self.shards:
            _check_shard(shard)
        self.num_features = _size("num_features", num_features, self.shards, "indices")
        self.num_fields = _size("num_fields", num_fields, self.shards, "fields")
        self.metadata = {} if metadata is None else metadata
        self._ends = list(accumulate(len(shard.batch) for shard in self.shards))
        # How a process that is sent this dataset gets it: by opening its folder, if it has one.
        self._source: tuple[Callable[..., SparseDataset], tuple[Any, ...]] | None = None

    @classmethod
    def from_arrays(
        cls,
        batch_or_ids: SparseBatch | Tensor | np.ndarray,
        labels: Any,
        weights: Any = None,
        *,
        num_features: int | None = None,
        num_fields: int | None = None,
    ) -> SparseDataset:
        """From what is in memory.

        Args:
            batch_or_ids: a :class:`~ffm_ext.SparseBatch`, or global feature ids ``[n, F]``: column = field. Ids and
                offsets become int32 where they fit, values float32, and ``None`` where all are 1.
            labels: ``[n]`` numbers.
            weights: ``[n]`` numbers, or ``None``.
            num_features: N, at least; ``None``: one more than the largest id.
            num_fields: F, at least; ``None``: the columns of ``ids``, or one more than the largest field.

        Raises:
            IndexError: an id or a field is negative or too large.
            ValueError: lengths differ, offsets do not rise from 0 to nnz, or a number is not finite.
        """
        where = "SparseDataset.from_arrays"
        if isinstance(batch_or_ids, SparseBatch):
            batch = batch_or_ids.to("cpu")
        else:
            ids = as_tensor(batch_or_ids)
            if ids.dim() != 2:
                raise ValueError(f"{where}: ids must be [n, F], got shape {list(ids.shape)}")
            if not is_integral(ids):
                raise TypeError(f"{where}: ids must be integers, got {ids.dtype}")
            n, F = ids.shape
            num_fields = F if num_fields is None else num_fields
            batch = SparseBatch(
                ids.to("cpu", torch.int64).flatten(),
                torch.arange(F, device="cpu").repeat(n),
                None,
                torch.arange(n + 1, device="cpu") * F,
            )
        batch = compact(batch)
        shard = Shard(
            batch,
            checked_numbers(where, "labels", labels, len(batch)),
            None if weights is None else checked_numbers(where, "weights", weights, len(batch)),
        )
        dataset = cls([shard], num_features=num_features, num_fields=num_fields)
        check_entries(where, batch, dataset.num_features, dataset.num_fields)
        return dataset

    def __len__(self) -> int:
        """The number of samples."""
        return self._ends[-1] if self._ends else 0

    @property
    def nnz(self) -> int:
        """The number of entries of all samples together."""
        return sum(shard.batch.nnz for shard in self.shards)

    @overload
    def __getitem__(self, which: int) -> Shard: ...
    @overload
    def __getitem__(self, which: slice | Sequence[int] | Tensor | np.ndarray) -> SparseDataset: ...

    def __getitem__(
        self, which: int | slice | Sequence[int] | Tensor | np.ndarray
    ) -> Shard | SparseDataset:
        """One sample by its number, or a dataset of one shard: by slice, by sample numbers, or by a mask ``[n]``.

        A slice of step 1 that lies within a shard copies nothing but offsets.
        """
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            if step == 1:
                chosen = join_shards(self._views(start, stop))
            else:
                chosen = self._take(torch.from_numpy(np.arange(start, stop, step)))
        elif isinstance(which, int | np.integer):
            return self.__getitems__([int(which)])
        else:
            rows = as_tensor(which).cpu()
            if not rows.numel() and rows.dtype != torch.bool:
                rows = rows.long()  # an empty list is one of float32
            if rows.dtype == torch.bool:
                if rows.shape != (len(self),):
                    raise IndexError(
                        f"SparseDataset: the mask has shape {list(rows.shape)}, "
                        f"the dataset has {len(self)} samples"
                    )
                rows = rows.nonzero().squeeze(1)
            chosen = self._take(rows)
        return SparseDataset(
            [chosen],
            num_features=self.num_features,
            num_fields=self.num_fields,
            metadata=self.metadata,
        )

    def __getitems__(self, rows: Sequence[int]) -> Shard:
        """A batch of these samples; a ``DataLoader`` calls it with the sample numbers of a batch."""
        return self._take(as_tensor(rows).long())

    @staticmethod
    def collate(samples: Shard | Sequence[Shard]) -> Shard:
        """``collate_fn`` for a ``DataLoader``: joins samples, a :class:`Shard` each, to a batch, which is one too."""
        return samples if isinstance(samples, Shard) else join_shards(samples)

    def batches(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> Iterator[Shard]:
        """The samples once, ``batch_size`` at a time: ``(batch, labels, weights)``.

        Args:
            batch_size: samples in a batch; the last may have fewer.
            shuffle: in random order: shards in random order, and the samples within a shard. So a dataset larger than
                memory is read a shard at a time.
            seed: the order is a function of it.
            drop_last: leave out a last batch that has fewer.

        Raises:
            ValueError: ``batch_size`` is not positive.
        """
        if batch_size <= 0:
            raise ValueError(f"SparseDataset.batches: batch_size = {batch_size} must be positive")
        return self._batches(batch_size, shuffle, seed, drop_last)

    def _batches(
        self, batch_size: int, shuffle: bool, seed: int, drop_last: bool
    ) -> Iterator[Shard]:
        random = torch.Generator("cpu").manual_seed(operator.index(seed))
        order: list[int] = list(range(len(self.shards)))
        if shuffle:
            order = torch.randperm(len(order), generator=random, device="cpu").tolist()
        pieces: list[Shard] = []
        missing = batch_size
        for s in order:
            shard = self.shards[s]
            n, first = len(shard.batch), 0
            rows = torch.randperm(n, generator=random, device="cpu") if shuffle else None
            while first < n:
                last = min(first + missing, n)
                pieces.append(
                    _pick(shard, slice(first, last) if rows is None else rows[first:last])
                )
                missing -= last - first
                first = last
                if missing == 0:
                    yield join_shards(pieces)
                    pieces, missing = [], batch_size
        if pieces and not drop_last:
            yield join_shards(pieces)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write a folder for :func:`open_dataset`: a file a shard (safetensors) and ``dataset.json``.

        It is written beside ``folder`` and then renamed: after a failure, what was there is there still. A dataset that
        is there already is replaced.

        Raises:
            FileExistsError: ``folder`` exists and is not a dataset, or holds anything besides.
            OSError: it cannot be written.
        """
        from ._store import DatasetWriter

        with DatasetWriter(folder) as writer:
            for shard in self.shards:
                writer.add(shard)
            writer.finish(self.num_features, self.num_fields, self.metadata)

    def _views(self, start: int, stop: int) -> list[Shard]:
        """The samples ``start:stop``, a view for each shard that has some."""
        views = []
        s = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[s] - len(self.shards[s].batch)
            last = min(stop, self._ends[s])
            views.append(_pick(self.shards[s], slice(start - begin, last - begin)))
            start, s = last, s + 1
        return views

    def _take(self, rows: Tensor) -> Shard:
        """A copy of these samples."""
        n = len(self)
        if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
            raise TypeError(
                f"SparseDataset: sample numbers must be one list of integers, got {rows.dtype} "
                f"of shape {list(rows.shape)}"
            )
        rows = rows.long()
        outside = (rows < -n) | (rows >= n)
        if outside.any():
            row = int(rows[outside][0])
            raise IndexError(f"SparseDataset: sample {row} is out of range for {n} samples")
        rows = torch.where(rows < 0, rows + n, rows)
        shard_of = torch.bucketize(rows, torch.tensor(self._ends, device="cpu"), right=True)
        order = shard_of.argsort(stable=True)
        pieces = []
        for s in shard_of.unique().tolist():
            begin = self._ends[s] - len(self.shards[s].batch)
            pieces.append(_pick(self.shards[s], rows[order][shard_of[order] == s] - begin))
        joined = join_shards(pieces)
        return joined if len(pieces) < 2 else _pick(joined, order.argsort())

    def __reduce__(self) -> tuple[Any, ...]:
        if self._source is not None:
            reopen, arguments = self._source
            return reopen, (*arguments, self.num_features, self.num_fields, self.metadata)
        # A view drags all that it looks at along. Memory that is shared with a process has to last until that begins.
        self.shards = tuple(_mapped(_without_surroundings, shard) for shard in self.shards)
        return _unpickle, (self.shards, self.num_features, self.num_fields, self.metadata)

    def __copy__(self) -> SparseDataset:
        copied = self.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseDataset:
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._source = None  # what is written to its tensors is to be pickled
        # Not by deepcopy, which copies all that a view looks at.
        copied.shards = tuple(_mapped(Tensor.clone, shard) for shard in self.shards)
        copied.metadata = copy.deepcopy(self.metadata, memo)
        return copied

    def __repr__(self) -> str:
        return (
            f"SparseDataset({len(self)} samples, {self.nnz} entries, {self.num_features} features "
            f"in {self.num_fields} fields, {len(self.shards)} shards)"
        )


def _unpickle(
    shards: tuple[Shard, ...], num_features: int, num_fields: int, metadata: dict[str, Any]
) -> SparseDataset:
    return SparseDataset(
        shards, num_features=num_features, num_fields=num_fields, metadata=metadata
    )


def compact(batch: SparseBatch) -> SparseBatch:
    """The same in the smallest dtypes: int32 ids where they fit, float32 values or none."""
    smallest, largest = 0, 0
    for ids in (batch.indices, batch.fields) if batch.nnz else ():
        smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
    # The numbers of features and fields, too.
    fits = smallest >= -MAX_INT32 and max(largest + 1, batch.nnz) <= MAX_INT32
    values = batch.values
    if values is not None:
        values = None if bool((values == 1).all()) else values.detach().float()
    indices = batch.indices.to(torch.int32 if fits else torch.int64)
    return SparseBatch(indices, batch.fields, values, batch.offsets)


def _check_shard(shard: Shard) -> None:
    batch, labels, weights = shard
    for name, tensor in (("labels", labels), ("weights", weights), ("values", batch.values)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"SparseDataset: {name} must be float32, got {tensor.dtype}")
        if tensor is not None and name != "values" and tensor.shape != (len(batch),):
            raise ValueError(
                f"SparseDataset: {name} has shape {list(tensor.shape)}, "
                f"the batch has {len(batch)} samples"
            )
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"SparseDataset: {name} must be on the CPU, got {tensor.device}")
    if batch.device.type != "cpu":
        raise ValueError(f"SparseDataset: the batch must be on the CPU, got {batch.device}")


def _size(name: str, size: int | None, shards: Sequence[Shard], ids: str) -> int:
    if size is None:
        lists: list[Tensor] = [getattr(shard.batch, ids) for shard in shards]
        return max((int(tensor.max()) + 1 for tensor in lists if tensor.numel()), default=0)
    return check_size("SparseDataset", name, size)


def checked_numbers(where: str, name: str, numbers: Any, n: int) -> Tensor:
    if not isinstance(numbers, Tensor):
        array = np.asanyarray(numbers)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{where}: {name} must be numbers, got {array.dtype}")
        # What a mask hides is no number.
        numbers = torch.from_numpy(np.ma.filled(array.astype(np.float32), np.nan))
    if numbers.is_complex():
        raise TypeError(f"{where}: {name} must be numbers, got {numbers.dtype}")
    tensor = numbers.detach().to("cpu", torch.float32)
    if tensor.shape != (n,):
        raise ValueError(
            f"{where}: {name} has shape {list(tensor.shape)}, but there are {n} samples"
        )
    check_finite(where, name, tensor)
    return tensor


def check_entries(where: str, batch: SparseBatch, num_features: int, num_fields: int) -> None:
    """What the operators check of a batch, for a whole dataset before its first batch is used.

    Raises:
        IndexError: an id is outside ``[0, num_features)``, or a field outside ``[0, num_fields)``.
        ValueError: offsets do not rise from 0 to nnz, or a value is not finite.
    """
    check_contents(where, batch.indices, batch.values, batch.offsets, num_features)
    check_ids(where, "fields", batch.fields, num_fields, f"{num_fields} fields")


def weights_of(dataset: SparseDataset) -> Tensor:
    """The weights of all samples, ``[n]``: 1 where there are none."""
    shards = dataset.shards
    found = cat_or_ones([(shard.weights, len(shard.batch)) for shard in shards], "cpu")
    return torch.ones(len(dataset), device="cpu") if found is None else found


def check_shard(where: str, shard: Shard, num_features: int, num_fields: int) -> None:
    """What a folder may hold and what is made in memory does not.

    Raises:
        IndexError, ValueError: as :func:`check_entries`, or a label or weight is not finite.
    """
    batch, labels, weights = shard
    check_entries(where, batch, num_features, num_fields)
    check_finite(where, "labels", labels)
    if weights is not None:
        check_finite(where, "weights", weights)


def placed(where: str, parts: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Parts, each with what an error calls it."""
    for number, part in enumerate(parts):
        yield (where if len(parts) == 1 else f"{where}: shards[{number}]"), part


def _pick(shard: Shard, which: slice | Tensor) -> Shard:
    batch, labels, weights = shard
    return Shard(batch[which], labels[which], None if weights is None else weights[which])


def join_shards(shards: Sequence[Shard]) -> Shard:
    """One after the other; values and weights that are left out are 1."""
    if len(shards) == 1:
        return shards[0]
    if not shards:
        none = torch.empty(0, dtype=torch.int32, device="cpu")
        empty = SparseBatch(none, none, None, none.new_zeros(1))
        return Shard(empty, none.float(), None)
    weights = [(shard.weights, len(shard.batch)) for shard in shards]
    return Shard(
        SparseBatch.cat([shard.batch for shard in shards]),
        torch.cat([shard.labels for shard in shards]),
        cat_or_ones(weights, "cpu"),
    )


def _mapped(change: Callable[[Tensor], Tensor], shard: Shard) -> Shard:
    """A shard of other tensors."""

    def of(part: Tensor | None) -> Any:
        return None if part is None else change(part)

    batch, labels, weights = shard
    parts = (batch.indices, batch.fields, batch.values, batch.offsets)
    return Shard(SparseBatch(*map(of, parts)), of(labels), of(weights))


def _without_surroundings(part: Tensor) -> Tensor:
    if part.untyped_storage().nbytes() == part.numel() * part.element_size():
        return part
    return part.clone()
