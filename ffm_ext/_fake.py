# SPDX-License-Identifier: MIT
"""Shapes of the operators without data, for ``torch.compile``, ``torch.export`` and the meta device."""

from __future__ import annotations

import torch
from torch import Tensor


def _check_device(op: str, weight: Tensor, **lists: Tensor | None) -> None:
    """The dispatcher comes here as soon as one argument is on the meta device: then all must be."""
    for name, tensor in lists.items():
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, weight is on {weight.device}")


def _output_shape(
    weight: Tensor, indices: Tensor, offsets: Tensor | None, output: str, within_field: bool
) -> list[int]:
    F, K = weight.shape[1], weight.shape[2]
    B = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    terms = F * (F - 1) // 2 + (F if within_field else 0)
    return {"sum": [B], "dot": [B, terms], "hadamard": [B, terms, K]}[output]


def _grad_values(values: Tensor | None, values_grad: bool, weight: Tensor) -> Tensor:
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
    return weight.new_empty(_output_shape(weight, indices, offsets, output, within_field))


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
    return weight.new_empty(weight.shape), _grad_values(values, values_grad, weight)


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
        _grad_values(values, values_grad, weight),
    )


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
    return _grad_values(values, True, weight)


@torch.library.register_fake("ffm_ext::gather_sum")
def _(weight: Tensor, indices: Tensor) -> Tensor:
    _check_device("gather_sum", weight, indices=indices)
    return weight.new_empty(indices.shape[0])
