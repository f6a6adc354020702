# SPDX-License-Identifier: MIT
"""Large tables on large pages, and gradients in memory that is kept."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C

__all__ = ["advise_huge_pages", "empty_table", "kept_bytes", "release"]

# Smaller tables sit in the caches, where pages of 4 KiB do no harm.
_LARGE = 32 << 20


def advise_huge_pages(tensor: Tensor) -> int:
    """Ask Linux to back a CPU tensor with huge pages (``madvise(MADV_HUGEPAGE)``).

    Rows of a large table are read at random, and with pages of 4 KiB nearly each of them misses the TLB. It works best
    before the memory is first written. It is advice: nothing happens where the system has no transparent huge pages
    (``/sys/kernel/mm/transparent_hugepage/enabled`` is ``never``).

    Args:
        tensor: dense, contiguous, on the CPU.

    Returns:
        The number of bytes that the system was asked about: whole huge pages inside the tensor.

    Raises:
        ValueError: the tensor is not a contiguous CPU tensor.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(
            f"advise_huge_pages: tensor must be contiguous on the CPU, got {tensor.layout} on "
            f"{tensor.device} with strides {tensor.stride() if tensor.layout == torch.strided else None}"
        )
    return _C.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def empty_table(
    *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """An uninitialised table; on the CPU and above 32 MB on huge pages, its pages touched by all threads.

    ``FFM_EXT_HUGE_PAGES=0`` leaves the memory as the allocator gives it.

    Raises:
        MemoryError: the CPU has no memory for it.
    """
    table = _empty(shape, dtype, device)
    return table.zero_() if _advise(table) else table


def _empty(
    shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        # What its CPU allocator says; an accelerator's has an exception of its own.
        if "DefaultCPUAllocator" not in str(error):
            raise
        dtype = dtype or torch.get_default_dtype()
        size = math.prod(shape) * dtype.itemsize
        raise MemoryError(
            f"there is no memory for a table of shape {list(shape)} in {dtype}: {size} bytes"
        ) from error


def fits(*shape: int) -> bool:
    """Whether the CPU has memory for a float32 table of that shape: nothing of it is touched."""
    try:
        torch.empty(shape, dtype=torch.float32, device="cpu")
    # Sizes of more than 63 bits are errors of other kinds.
    except (RuntimeError, TypeError, ValueError, MemoryError):
        return False
    return True


def _advise(table: Tensor) -> bool:
    """Ask for huge pages under new memory on the CPU, if there is much of it. Whether that was done."""
    large = table.device.type == "cpu" and table.numel() * table.element_size() >= _LARGE
    if not large or os.environ.get("FFM_EXT_HUGE_PAGES", "1") == "0":
        return False
    advise_huge_pages(table)
    return True


def copied_table(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, in memory as :func:`empty_table` has it."""
    table = _empty(tensor.shape, tensor.dtype, "cpu")
    _advise(table)
    return table.copy_(tensor)


def keep_huge_pages(before: Tensor, after: Tensor) -> Tensor:
    """What a module's tensor became as it was moved or converted, as :func:`empty_table` would have made it.

    The same tensor where it did not move, or lies where that is of no use: on a device, in shared or pinned memory.
    """
    is_plain = type(after) is Tensor and after.layout == torch.strided
    if not is_plain or after.device.type != "cpu" or after.numel() * after.element_size() < _LARGE:
        return after
    if after.data_ptr() == before.data_ptr() or after.is_shared() or after.is_pinned():
        return after
    return copied_table(after)


def kept_bytes() -> int:
    """Bytes of memory that wait for the next gradient and are in no tensor.

    New memory is not free: Linux clears every page of it, which takes as long as a fifth of a backward pass. So results
    from 1 MiB on (gradients of tables, outputs ``"dot"`` and ``"hadamard"``) leave their memory to the next ones when
    they are freed: at most as much as was in use at the same time during the last 16 of them.
    The storage of such a result cannot be resized (``out=``, ``untyped_storage().resize_(0)``).
    ``FFM_EXT_KEEP_MEMORY=0`` keeps nothing, and neither does torch 2.10.
    """
    return _C.kept_bytes()


def release() -> None:
    """Give the memory that :func:`kept_bytes` counts back to the system: after training, say."""
    _C.release_kept_memory()
