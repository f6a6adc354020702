# SPDX-License-Identifier: MIT
"""The roof of an update: rows of a table and of its state read and written in any order, and nothing else.

Written in Triton, which comes with PyTorch for CUDA.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor


@triton.jit
def _update(weight, state, rows, row_size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.load(rows + tl.program_id(0))
    i = tl.arange(0, block)
    inside = i < row_size
    w = tl.load(weight + row * row_size + i, mask=inside)
    s = tl.load(state + row * row_size + i, mask=inside)
    tl.store(state + row * row_size + i, s + 1e-9, mask=inside)
    tl.store(weight + row * row_size + i, (w * 0.999).to(w.dtype), mask=inside)


class RandomUpdate:
    """``rows`` of weight [N, M] and of a float32 state beside it, a program a row."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.state = torch.ones_like(weight, dtype=torch.float32)
        self.block = triton.next_power_of_2(weight.shape[1])

    def __call__(self, rows: Tensor) -> None:
        size = self.weight.shape[1]
        _update[(rows.numel(),)](self.weight, self.state, rows, size, block=self.block)
