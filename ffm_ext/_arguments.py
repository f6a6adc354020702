# SPDX-License-Identifier: MIT
"""What every form of the interaction asks of its arguments before a kernel sees them."""

from __future__ import annotations

import operator
import os
import warnings
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import torch
from torch import Tensor

from . import _C

Output = Literal["sum", "dot", "hadamard"]
GradMode = Literal["dense", "sparse", "atomic"]
Loss = Literal["logistic", "squared"]

# More threads than that are a mistake, or end the process: OpenMP does so where the system has no room for them.
MOST_THREADS = max(1024, os.cpu_count() or 1)


def check_choice(where: str, name: str, value: Any, kind: Any) -> Any:
    """``value``; raise ValueError unless it is one that ``kind``, a ``Literal``, names."""
    if value not in get_args(kind):
        raise ValueError(f"{where}: {name} = {value!r} is not one of {', '.join(get_args(kind))}")
    return value


def check_modes(where: str, output: str, grad: str) -> None:
    """Raise ValueError unless ``output`` and ``grad`` are modes that exist."""
    check_choice(where, "output", output, Output)
    check_choice(where, "grad", grad, GradMode)


def table_shape(
    where: str, weight: Tensor, indices: Tensor, num_fields: int | None
) -> tuple[int, int, int]:
    """``(N, F, K)`` of a table given as ``[N, F, K]`` or as ``[N, F·K]``.

    F comes from the table's own shape, from ``num_fields``, or from the columns of ``indices [B, F]``.
    """
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"{where}: weight must be [N, F, K] or [N, F·K], got shape {list(weight.shape)}"
        )
    F = num_fields
    if weight.dim() == 3:
        if F is not None and weight.shape[1] != F:
            raise ValueError(
                f"{where}: num_fields = {F}, but weight has shape {list(weight.shape)}"
            )
        return weight.shape[0], weight.shape[1], weight.shape[2]
    if F is None:
        if indices.dim() != 2:
            raise ValueError(
                f"{where}: num_fields is needed where weight is [N, F·K] and indices is [nnz]"
            )
        F = indices.shape[1]
    if F <= 0 or weight.shape[1] % F:
        raise ValueError(
            f"{where}: weight has {weight.shape[1]} columns, "
            f"which is no multiple of num_fields = {F}"
        )
    return weight.shape[0], F, weight.shape[1] // F


def outside(ids: Tensor, size: int) -> Tensor:
    """Where ids lie outside ``[0, size)``: torch would wrap a size that the dtype of the ids cannot hold."""
    return (ids < 0) | (ids > min(size - 1, torch.iinfo(ids.dtype).max))


def as_tensor(numbers: Any) -> Tensor:
    """A tensor as it is; arrays and lists on the CPU, copied where torch does not take their memory as it lies."""
    if isinstance(numbers, Tensor):
        return numbers
    array = np.asarray(numbers)
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def is_integral(tensor: Tensor) -> bool:
    """Whether its numbers are integers; truth values are none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_feature_fields(
    where: str, feature_fields: Any, num_features: int, num_fields: int
) -> Tensor:
    """The field of each feature, ``[N]``, -1 for one of none, as a tensor.

    Raises:
        TypeError: they are not integers.
        ValueError: there are more or fewer than N, or one is out of range.
    """
    fields = as_tensor(feature_fields)
    if not is_integral(fields):
        raise TypeError(f"{where}: feature_fields is {fields.dtype}, not integers")
    if fields.shape != (num_features,):
        raise ValueError(
            f"{where}: feature_fields must be [{num_features}], got shape {list(fields.shape)}"
        )
    if not _all_within(fields, -1, num_fields - 1):
        wrong = _first("feature_fields", fields, outside(fields, num_fields) & (fields != -1))
        raise ValueError(f"{where}: {wrong} is out of range for {num_fields} fields")
    return fields.long()


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What sums of its numbers are kept in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def result_dtype(where: str, table: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """``dtype``, or that of the table. Raise ValueError where it holds no real numbers."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{where}: dtype = {dtype} is not a floating-point type")
    return table.dtype if dtype is None else dtype


def checks_contents(tensor: Tensor) -> bool:
    """Whether what a tensor holds is looked at: on the CPU always, on CUDA where it was asked for.

    Not inside ``torch.func.vmap``, where it is that of many calls; operators look at it there.
    """
    if torch.compiler.is_compiling() or is_batched(tensor):
        return False
    return tensor.device.type == "cpu" or (tensor.is_cuda and _C.checks_contents())


def is_batched(tensor: Tensor) -> bool:
    """Whether it is that of many calls, inside ``torch.func.vmap`` or by ``is_grads_batched``."""
    functorch = torch._C._functorch
    if functorch.is_legacy_batchedtensor(tensor):
        return True
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_size(where: str, name: str, size: SupportsIndex, least: int = 0) -> int:
    """A size as Python's own integer, which JSON takes; those of NumPy and of tensors go as well.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than ``least``, 0 or 1.
    """
    try:
        found = operator.index(size)
    except TypeError:
        raise TypeError(f"{where}: {name} = {size!r} must be an integer") from None
    if found < least:
        raise ValueError(
            f"{where}: {name} = {found} {'must be positive' if least else 'is negative'}"
        )
    return found


def check_positive(where: str, **sizes: SupportsIndex) -> list[int]:
    """Several of them, see :func:`check_size`."""
    return [check_size(where, name, size, least=1) for name, size in sizes.items()]


def check_num_threads(where: str, num_threads: SupportsIndex | None) -> int | None:
    """A number of threads, from 1 on, or ``None``, see :func:`check_size`."""
    if num_threads is None:
        return None
    found = check_size(where, "num_threads", num_threads, least=1)
    if found > MOST_THREADS:
        raise ValueError(f"{where}: num_threads = {found} is more than {MOST_THREADS}")
    return found


def check_contents(
    where: str, indices: Tensor, values: Tensor | None, offsets: Tensor | None, num_features: int
) -> None:
    """What the operators check by themselves, for modules made of PyTorch's own, which trust their lists.

    Where :func:`checks_contents` says so: elsewhere it would wait for the device. Nothing that is large is copied; only
    where something is wrong a second look says where.

    Raises:
        IndexError: an id is outside ``[0, num_features)``.
        ValueError: offsets do not rise from 0 to nnz, or a value is not finite.
    """
    if not all(checks_contents(t) for t in (indices, values, offsets) if t is not None):
        return
    if offsets is not None:
        check_offsets(where, offsets, indices.numel())
    check_ids(where, "indices", indices, num_features, f"a table of {num_features} features")
    if values is not None:
        check_finite(where, "values", values)


def check_offsets(where: str, offsets: Tensor, num_entries: int) -> None:
    """Raise ValueError unless offsets ``[B + 1]`` rise from 0 to ``num_entries``."""
    B = offsets.numel() - 1
    if offsets[0] != 0:
        raise ValueError(f"{where}: offsets[0] = {int(offsets[0])} must be 0")
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        b = int(falls.nonzero()[0])
        raise ValueError(
            f"{where}: offsets[{b + 1}] = {int(offsets[b + 1])} is less than "
            f"offsets[{b}] = {int(offsets[b])}"
        )
    if offsets[B] != num_entries:
        raise ValueError(
            f"{where}: offsets[{B}] = {int(offsets[B])} must be the number of entries, "
            f"{num_entries}"
        )


def check_ids(where: str, name: str, ids: Tensor, size: int, of: str) -> None:
    """Raise IndexError unless all ids are in ``[0, size)``, as many as ``of`` says what there are."""
    if not _all_within(ids, 0, size - 1):
        raise IndexError(
            f"{where}: {_first(name, ids, outside(ids, size))} is out of range for {of}"
        )


def check_finite(where: str, name: str, numbers: Tensor) -> None:
    """Raise ValueError unless all numbers are finite."""
    limits = torch.finfo(numbers.dtype)
    if not _all_within(numbers, limits.min, limits.max):
        raise ValueError(f"{where}: {_first(name, numbers, ~numbers.isfinite())} is not finite")


def check_fits(where: str, name: str, numbers: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless all numbers, which are finite, are so in a dtype that they are rounded to."""
    if torch.finfo(numbers.dtype).max <= torch.finfo(dtype).max:
        return
    # The largest by size is the first to overflow.
    if numbers.numel() and not torch.stack(numbers.aminmax()).to(dtype).isfinite().all():
        wrong = ~numbers.to(dtype).isfinite()
        raise ValueError(f"{where}: {_first(name, numbers, wrong)} is not finite in {dtype}")


def _first(name: str, tensor: Tensor, wrong: Tensor) -> str:
    """The first element that is wrong: ``"indices[3, 17] = -1"``."""
    at = wrong.nonzero()[0].tolist()
    return f"{name}[{', '.join(map(str, at))}] = {tensor[tuple(at)].item()}"


def _all_within(numbers: Tensor, low: float, high: float) -> bool:
    """Whether all lie in ``[low, high]``; NaN does not."""
    if not numbers.numel():
        return True
    least, greatest = numbers.aminmax()
    return bool(low <= least.item() and greatest.item() <= high)


def alert_not_deterministic(what: str, instead: str) -> None:
    """Raise, or warn, as ``torch.use_deterministic_algorithms`` wants it, of ``what`` is done in any order."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    text = (
        f"{what} in any order, which torch.use_deterministic_algorithms(True) refuses; "
        f"{instead} is deterministic"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=3)
