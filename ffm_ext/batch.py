# SPDX-License-Identifier: MIT
"""A batch of sparse samples: any number of active features in every field."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node
from torch.utils.data._utils.collate import default_collate_fn_map

from ._arguments import as_tensor, is_integral

__all__ = ["SparseBatch"]


class SparseBatch:
    """Samples as lists of active *(feature, field, value)* entries, laid end to end (CSR).

    Sample ``b`` owns the entries ``offsets[b]:offsets[b + 1]``; the entries of a sample may come in any
    order, a field may hold none, one or many of them.

    Args:
        indices: feature ids, ``[nnz]``, int32 or int64.
        fields: the field of each entry, ``[nnz]``, converted to the dtype of ``indices``.
        values: the value of each entry, ``[nnz]``, floating point; ``None`` means that all are 1.
        offsets: where each sample starts, and the end, ``[B + 1]``: ``offsets[0] == 0`` and
            ``offsets[B] == nnz``, as ``torch.nn.EmbeddingBag`` has it with ``include_last_offset=True``.

    Raises:
        TypeError: an argument is not a tensor, or has a dtype that does not fit its meaning.
        ValueError: a shape is wrong, or the tensors lie on different devices.

    What the tensors hold (ids in range, offsets that do not decrease, finite values) is checked by the
    operator that reads them, which knows the size of the table.
    """

    __slots__ = ("fields", "indices", "offsets", "values")

    def __init__(
        self, indices: Tensor, fields: Tensor, values: Tensor | None, offsets: Tensor
    ) -> None:
        for name, tensor in (("indices", indices), ("fields", fields), ("offsets", offsets)):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"SparseBatch: {name} must be a tensor, got {type(tensor).__name__}"
                )
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"SparseBatch: {name} must be int32 or int64, got {tensor.dtype}")
            if tensor.dim() != 1:
                raise ValueError(
                    f"SparseBatch: {name} must have one dimension, got shape {list(tensor.shape)}"
                )
        if values is not None:
            if not isinstance(values, Tensor):
                raise TypeError(
                    f"SparseBatch: values must be a tensor, got {type(values).__name__}"
                )
            if not values.is_floating_point():
                raise TypeError(f"SparseBatch: values must be floating point, got {values.dtype}")
        for name, other in (("fields", fields), ("values", values)):
            if other is not None and other.shape != indices.shape:
                raise ValueError(
                    f"SparseBatch: {name} has shape {list(other.shape)}, "
                    f"indices has {list(indices.shape)}"
                )
        if offsets.numel() == 0:
            raise ValueError(
                "SparseBatch: offsets is empty; it needs a sample count plus one entries"
            )
        for name, other in (("fields", fields), ("values", values), ("offsets", offsets)):
            if other is not None and other.device != indices.device:
                raise ValueError(
                    f"SparseBatch: {name} is on {other.device}, indices is on {indices.device}"
                )
        self.indices = indices
        self.fields = _narrow(fields, indices.dtype)
        self.values = values
        self.offsets = _narrow(offsets, indices.dtype)

    @classmethod
    def from_scipy(cls, matrix: Any, feature_fields: Any) -> SparseBatch:
        """From a ``scipy.sparse`` matrix or array ``[B, N]``: a row is a sample, a column a feature.

        Args:
            matrix: any scipy sparse format; its explicitly stored zeros stay entries. The values of a CSR matrix are
                shared with it where torch has their type.
            feature_fields: the field of every feature (column), ``[N]`` integers.

        Raises:
            TypeError: ``feature_fields`` are not integers.
            ValueError: ``feature_fields`` does not have one entry a column.
        """
        if len(matrix.shape) != 2:
            raise ValueError(
                f"SparseBatch.from_scipy: matrix must have two dimensions, got shape {list(matrix.shape)}"
            )
        csr = matrix.tocsr()
        fields = _feature_fields(feature_fields, csr.shape[1])
        indices = torch.from_numpy(csr.indices.astype(np.int64))
        values = _floats(csr.data)
        offsets = torch.from_numpy(csr.indptr.astype(np.int64))
        return cls(indices, fields[indices], values, offsets)

    @classmethod
    def from_dense(cls, X: Any, feature_fields: Any) -> SparseBatch:
        """From a dense matrix ``[B, N]`` (tensor or array): its nonzeros are the entries.

        Args:
            X: numbers; integers become floating-point ones.
            feature_fields: the field of every feature (column), ``[N]`` integers.

        Raises:
            TypeError: ``feature_fields`` are not integers.
            ValueError: ``X`` does not have two dimensions, or ``feature_fields`` not one entry a column.
        """
        if isinstance(X, Tensor):
            _check_real(X)
            dense = X if X.is_floating_point() else X.to(torch.get_default_dtype())
        else:
            dense = _floats(np.asarray(X))
        if dense.dim() != 2:
            raise ValueError(
                f"SparseBatch.from_dense: X must have two dimensions, got shape {list(dense.shape)}"
            )
        fields = _feature_fields(feature_fields, dense.shape[1]).to(dense.device)
        rows, columns = dense.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=dense.shape[0])
        return cls(columns, fields[columns], dense[rows, columns], _offsets(counts))

    @classmethod
    def from_torch_csr(cls, t: Tensor, feature_fields: Any) -> SparseBatch:
        """From a ``torch.sparse_csr`` tensor ``[B, N]``, on its device; explicitly stored zeros stay entries.

        Args:
            t: int32 or int64 indices, any numbers as values.
            feature_fields: the field of every feature (column), ``[N]`` integers.

        Raises:
            TypeError: ``t`` has another layout, or ``feature_fields`` are not integers.
            ValueError: ``feature_fields`` does not have one entry a column.
        """
        if t.layout != torch.sparse_csr:
            raise TypeError(f"SparseBatch.from_torch_csr: t must be sparse_csr, got {t.layout}")
        if t.dim() != 2:
            raise ValueError(
                f"SparseBatch.from_torch_csr: t must have two dimensions, got shape {list(t.shape)}"
            )
        fields = _feature_fields(feature_fields, t.shape[1]).to(t.device)
        indices = t.col_indices()
        values = t.values()
        _check_real(values)
        values = values if values.is_floating_point() else values.to(torch.get_default_dtype())
        return cls(indices, fields[indices.long()], values, t.crow_indices())

    @classmethod
    def from_lists(cls, samples: Iterable[Sequence[tuple[int, int, float]]]) -> SparseBatch:
        """From Python lists: a sample is a sequence of ``(field, feature, value)``, as in a libffm line.

        Args:
            samples: ``field`` and ``feature`` are integers of Python or NumPy, ``value`` is any real number.

        Raises:
            ValueError: a sample is no sequence, or an entry is not such a triple; the text names it and its position.
        """
        # They take what is of their kind, and nothing else.
        fields, indices, values, offsets = array("q"), array("q"), array("d"), array("q", [0])
        for b, sample in enumerate(samples):
            try:
                entries = enumerate(sample)
            except TypeError:
                raise ValueError(
                    f"SparseBatch.from_lists: samples[{b}] = {sample!r} is not a sequence"
                ) from None
            for i, entry in entries:
                try:
                    field, feature, value = entry
                    fields.append(field)
                    indices.append(feature)
                    values.append(value)
                except (TypeError, ValueError, OverflowError):
                    raise ValueError(
                        f"SparseBatch.from_lists: samples[{b}][{i}] = {entry!r} "
                        "is not (field, feature, value), two int64 and a number"
                    ) from None
            offsets.append(len(fields))
        return cls(
            torch.from_numpy(np.array(indices)),
            torch.from_numpy(np.array(fields)),
            torch.from_numpy(np.array(values)).to(torch.get_default_dtype()),
            torch.from_numpy(np.array(offsets)),
        )

    @classmethod
    def cat(cls, batches: Sequence[SparseBatch]) -> SparseBatch:
        """The samples of several batches, one after the other. ``torch.utils.data.default_collate`` joins them so.

        Values that are left out are 1. Ids are int64 where those of a batch are, or where there are more entries than
        int32 counts.

        Raises:
            TypeError: something is not a :class:`SparseBatch`.
            ValueError: there is no batch, or they are on different devices.
        """
        for i, batch in enumerate(batches):
            if not isinstance(batch, SparseBatch):
                raise TypeError(
                    f"SparseBatch.cat: batches[{i}] is a {type(batch).__name__}, not a SparseBatch"
                )
            if batch.device != batches[0].device:
                raise ValueError(
                    f"SparseBatch.cat: batches[{i}] is on {batch.device}, batches[0] on {batches[0].device}"
                )
        if not batches:
            raise ValueError("SparseBatch.cat: there is no batch")
        starts = accumulate((batch.nnz for batch in batches), initial=0)
        ends = [
            batch.offsets[1:].long() + start for batch, start in zip(batches, starts, strict=False)
        ]
        indices = torch.cat([batch.indices for batch in batches])
        if indices.numel() > torch.iinfo(torch.int32).max:
            indices = indices.long()
        return cls(
            indices,
            torch.cat([batch.fields for batch in batches]),
            cat_or_ones([(batch.values, batch.nnz) for batch in batches], indices.device),
            torch.cat([ends[0].new_zeros(1), *ends]),
        )

    def __len__(self) -> int:
        """The number of samples, B."""
        return self.offsets.numel() - 1

    @property
    def shape(self) -> tuple[int]:
        """``(B,)``: scikit-learn takes samples by their numbers from what has a shape."""
        return (len(self),)

    @property
    def nnz(self) -> int:
        """The number of entries of all samples together."""
        return self.indices.numel()

    @property
    def device(self) -> torch.device:
        """Where all of its tensors are."""
        return self.indices.device

    def __getitem__(self, which: slice | Tensor | np.ndarray | Sequence[Any]) -> SparseBatch:
        """Some of the samples, as a batch: by slice, by sample numbers, or by a boolean mask ``[B]``.

        ``batch[which, ...]``, which scikit-learn writes, is the same.

        Raises:
            IndexError: a sample number is out of range, or the mask has another length.
            TypeError: it is something else. One sample is ``batch[b : b + 1]``.
        """
        if isinstance(which, tuple) and len(which) == 2 and which[1] is Ellipsis:
            which = which[0]
        if isinstance(which, slice) and which.step in (None, 1):
            start, stop, _ = which.indices(len(self))
            offsets = self.offsets[start : max(start, stop) + 1]
            begin, end = int(offsets[0]), int(offsets[-1])
            values = None if self.values is None else self.values[begin:end]
            return SparseBatch(
                self.indices[begin:end], self.fields[begin:end], values, offsets - begin
            )
        if isinstance(which, slice):
            which = range(len(self))[which]
        samples = as_tensor(() if which is None else which).to(self.device)
        is_list = which is not None and samples.dim() == 1
        if not is_list or (
            samples.numel() and (samples.is_floating_point() or samples.is_complex())
        ):
            raise TypeError(
                f"SparseBatch: {which!r} is not a slice, a list of sample numbers or a mask "
                "(one sample is batch[b : b + 1])"
            )
        if samples.numel() == 0 and samples.dtype != torch.bool:
            samples = samples.long()
        if samples.dtype == torch.bool:
            if samples.shape != (len(self),):
                raise IndexError(
                    f"SparseBatch: the mask has shape {list(samples.shape)}, "
                    f"the batch has {len(self)} samples"
                )
            samples = samples.nonzero().squeeze(1)
        samples = _narrow(samples, torch.int64)
        outside = (samples < -len(self)) | (samples >= len(self))
        if outside.any():
            i = int(outside.nonzero()[0])
            raise IndexError(
                f"SparseBatch: sample [{i}] = {int(samples[i])} is out of range for {len(self)} samples"
            )
        samples = torch.where(samples < 0, samples + len(self), samples)
        starts = self.offsets[samples].long()
        counts = self.offsets[samples + 1].long() - starts
        offsets = _offsets(counts)
        entries = torch.arange(int(offsets[-1]), device=self.device)
        entries = entries + torch.repeat_interleave(starts - offsets[:-1], counts)
        values = None if self.values is None else self.values[entries]
        return SparseBatch(self.indices[entries], self.fields[entries], values, offsets)

    def to(self, *args: Any, **kwargs: Any) -> SparseBatch:
        """As ``torch.Tensor.to``: a device moves all tensors, a floating-point dtype converts ``values``.

        Raises:
            TypeError: the dtype is not a floating-point one.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"SparseBatch.to: dtype must be floating point, got {dtype}")

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, non_blocking=non_blocking)

        values = self.values
        if values is not None:
            values = values.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return SparseBatch(move(self.indices), move(self.fields), values, move(self.offsets))

    def pin_memory(self) -> SparseBatch:
        """A copy in pinned memory, for asynchronous copies to an accelerator."""
        values = None if self.values is None else self.values.pin_memory()
        return SparseBatch(
            self.indices.pin_memory(), self.fields.pin_memory(), values, self.offsets.pin_memory()
        )

    def __repr__(self) -> str:
        values = "1" if self.values is None else str(self.values.dtype)
        return (
            f"SparseBatch({len(self)} samples, {self.nnz} entries, ids={self.indices.dtype}, "
            f"values={values}, device={self.device})"
        )


_PARTS = ("indices", "fields", "values", "offsets")


def _flatten(batch: SparseBatch) -> tuple[list[Tensor | None], None]:
    return [getattr(batch, name) for name in _PARTS], None


def _flatten_with_keys(batch: SparseBatch) -> tuple[list[tuple[Any, Tensor | None]], None]:
    return [(GetAttrKey(name), getattr(batch, name)) for name in _PARTS], None


def _unflatten(parts: Iterable[Any], _: object) -> SparseBatch:
    """A batch of whatever torch puts in the places of the tensors; nothing is checked."""
    batch = SparseBatch.__new__(SparseBatch)
    for name, part in zip(_PARTS, parts, strict=True):
        setattr(batch, name, part)
    return batch


def _feature_fields(feature_fields: Any, num_features: int) -> Tensor:
    fields = as_tensor(feature_fields)
    if fields.shape != (num_features,):
        raise ValueError(
            f"SparseBatch: feature_fields has shape {list(fields.shape)}, "
            f"expected one field for each of the {num_features} columns"
        )
    if not is_integral(fields):
        raise TypeError(f"SparseBatch: feature_fields must be integers, got {fields.dtype}")
    return fields.to(torch.int64)


def _narrow(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """``ids`` as ``dtype``; one that it cannot hold becomes its nearest, which is out of every range, too."""
    if ids.dtype == torch.uint64:
        ids = torch.where(
            ids.view(torch.int64) < 0, torch.iinfo(torch.int64).max, ids.view(torch.int64)
        )
    if ids.dtype == dtype or dtype == torch.int64:
        return ids.to(dtype)
    limits = torch.iinfo(dtype)
    return ids.clamp(limits.min, limits.max).to(dtype)


def fields_of_features(field_dims: Sequence[int]) -> Tensor:
    """The field of each feature where one field follows the other, ``[N]`` int64 on the CPU."""
    dims = torch.tensor(field_dims, dtype=torch.int64, device="cpu")
    numbers = torch.arange(len(dims), device="cpu")
    return numbers.repeat_interleave(dims, output_size=sum(field_dims))


def keep_entries(batch: SparseBatch, kept: Tensor) -> SparseBatch:
    """The entries that a mask ``[nnz]`` keeps, of all samples."""
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    values = None if batch.values is None else batch.values[kept]
    offsets = before[batch.offsets.long()]
    return SparseBatch(batch.indices[kept], batch.fields[kept], values, offsets)


def cat_or_ones(
    parts: Sequence[tuple[Tensor | None, int]], device: torch.device | str
) -> Tensor | None:
    """Joins numbers and how many they are; those that are left out are 1. ``None``: all are left out."""
    if all(numbers is None for numbers, _ in parts):
        return None
    return torch.cat(
        [
            torch.ones(size, dtype=torch.float32, device=device) if numbers is None else numbers
            for numbers, size in parts
        ]
    )


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _check_real(values: Tensor | np.ndarray) -> None:
    """Raise where numbers, made floating-point ones, would lose what they are."""
    is_other = isinstance(values, np.ndarray) and values.dtype.kind not in "biufO"
    if is_other or (isinstance(values, Tensor) and values.is_complex()):
        raise TypeError(f"SparseBatch: values must be real numbers, got {values.dtype}")


def _floats(array: np.ndarray) -> Tensor:
    """In its own dtype, where torch has that, else as float32."""
    _check_real(array)
    keep = np.issubdtype(array.dtype, np.floating) and array.dtype.itemsize in (2, 4, 8)
    return as_tensor(array if keep else array.astype(np.float32))


# Programs of torch.export take batches as they are: their inputs are indices, fields, values, offsets, in this order.
register_pytree_node(
    SparseBatch,
    _flatten,
    _unflatten,
    serialized_type_name="ffm_ext.SparseBatch",
    flatten_with_keys_fn=_flatten_with_keys,
)
# torch.save and torch.export.save keep batches, and their files load with weights_only=True.
torch.serialization.add_safe_globals([SparseBatch])
# What a DataLoader without a collate_fn of its own does with the batches that a Dataset has as samples.
default_collate_fn_map[SparseBatch] = lambda batches, **_: SparseBatch.cat(batches)
