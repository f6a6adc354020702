# SPDX-License-Identifier: MIT
"""Shapes of the operators without data, for ``torch.compile``, ``torch.export`` and the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import sum_dtype


def _check_device(
    op: str, weight: Tensor, weight_name: str = "weight", **lists: Tensor | None
) -> None:
    """The dispatcher comes here as soon as one argument is on the meta device: then all must be."""
    for name, tensor in lists.items():
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, {weight_name} is on {weight.device}"
            )


def _output_shape(
    vectors: Sequence[int],
    indices: Tensor,
    offsets: Tensor | None,
    output: str,
    within_field: bool,
) -> list[int]:
    F, K = vectors
    B = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    terms = F * (F - 1) // 2 + (F if within_field else 0)
    return {"sum": [B], "dot": [B, terms], "hadamard": [B, terms, K]}[output]


def new_grad_values(values: Tensor | None, values_grad: bool, weight: Tensor) -> Tensor:
    if values_grad and values is not None:
        return torch.empty_like(values, memory_format=torch.contiguous_format)
    return weight.new_empty(0)


@torch.library.register_fake("ffm_ext::ffm_forward")
def _(
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    output: str,
    within_field: bool,
) -> Tensor:
    _check_device(
        "ffm_forward",
        weight,
        indices=indices,
        fields=fields,
        values=values,
        offsets=offsets,
    )
    shape = _output_shape(weight.shape[1:], indices, offsets, output, within_field)
    return weight.new_empty(shape, dtype=sum_dtype(weight) if output == "sum" else weight.dtype)


@torch.library.register_fake("ffm_ext::ffm_backward")
def _(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    output: str,
    within_field: bool,
    values_grad: bool,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    _check_device(
        "ffm_backward",
        weight,
        indices=indices,
        fields=fields,
        values=values,
        offsets=offsets,
        grad_output=grad_output,
    )
    return weight.new_empty(weight.shape), new_grad_values(values, values_grad, weight)


@torch.library.register_fake("ffm_ext::ffm_backward_sparse")
def _(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    output: str,
    within_field: bool,
    values_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_device(
        "ffm_backward_sparse",
        weight,
        indices=indices,
        fields=fields,
        values=values,
        offsets=offsets,
        grad_output=grad_output,
    )
    rows = torch.library.get_ctx().new_dynamic_size()
    return (
        weight.new_empty(rows, dtype=torch.int64),
        weight.new_empty(rows, weight.shape[1], weight.shape[2]),
        new_grad_values(values, values_grad, weight),
    )


@torch.library.register_fake("ffm_ext::ffm_backward_fused_")
def _(
    grad_output: Tensor,
    weight: Tensor,
    states: list[Tensor],
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    output: str,
    within_field: bool,
    values_grad: bool,
    optimizer: str,
    settings: list[float],
    step: int,
    rounding_seed: int | None,
) -> Tensor:
    _check_device(
        "ffm_backward_fused_",
        weight,
        indices=indices,
        fields=fields,
        values=values,
        offsets=offsets,
        grad_output=grad_output,
    )
    return new_grad_values(values, values_grad, weight)


@torch.library.register_fake("ffm_ext::ffm_update_")
def _(
    weight: Tensor,
    states: list[Tensor],
    rows: Tensor | None,
    grad_rows: Tensor,
    optimizer: str,
    settings: list[float],
    step: int,
    rounding_seed: int | None,
) -> None:
    _check_device("ffm_update_", weight, rows=rows, grad_rows=grad_rows)


@torch.library.register_fake("ffm_ext::ffm_train_")
def _(weight: Tensor, *args: object) -> Tensor:
    return weight.new_empty((), dtype=torch.float64)


@torch.library.register_fake("ffm_ext::ffm_backward_values")
def _(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor,
    offsets: Tensor | None,
    output: str,
    within_field: bool,
) -> Tensor:
    _check_device(
        "ffm_backward_values",
        weight,
        indices=indices,
        fields=fields,
        values=values,
        offsets=offsets,
        grad_output=grad_output,
    )
    return new_grad_values(values, True, weight)


def packed_row_bytes(F: int, K: int) -> int:
    """``packed_row_bytes`` of ``csrc/params.h``."""
    size = F * (2 + (4 if K <= 4 else 8 if K <= 8 else -(-K // 16) * 16))
    step = 1 << ((size - 1) % 64).bit_length()
    return -(-size // step) * step


@torch.library.register_fake("ffm_ext::ffm_quantize")
def _(weight: Tensor) -> Tensor:
    row_bytes = packed_row_bytes(int(weight.shape[1]), int(weight.shape[2]))
    return weight.new_empty(weight.shape[0], row_bytes, dtype=torch.uint8)


@torch.library.register_fake("ffm_ext::ffm_dequantize")
def _(packed: Tensor, num_fields: int, embed_dim: int) -> Tensor:
    return packed.new_empty(packed.shape[0], num_fields, embed_dim, dtype=torch.float32)


@torch.library.register_fake("ffm_ext::ffm_forward_int8")
def _(
    packed: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    num_fields: int,
    embed_dim: int,
    output: str,
    within_field: bool,
) -> Tensor:
    _check_device(
        "ffm_forward_int8",
        packed,
        "packed",
        indices=indices,
        fields=fields,
        values=values,
        offsets=offsets,
    )
    shape = _output_shape((num_fields, embed_dim), indices, offsets, output, within_field)
    return packed.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("ffm_ext::gather_sum")
def _(weight: Tensor, indices: Tensor) -> Tensor:
    _check_device("gather_sum", weight, indices=indices)
    return weight.new_empty(indices.shape[0])


@torch.library.register_fake("ffm_ext::ffm_table_ids")
def _(ids: Tensor, starts: Tensor, where: str) -> Tensor:
    return torch.empty_like(ids, memory_format=torch.contiguous_format)
