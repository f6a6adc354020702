# SPDX-License-Identifier: MIT
"""Shapes of the operators without data, for ``torch.compile``, ``torch.export`` and the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ._arguments import sum_dtype


def _register(function: Callable[[SimpleNamespace], Any]) -> None:
    """Register a function of the operator's arguments, by their names in its schema, under its own name."""
    op = function.__name__
    schema = getattr(torch.ops.ffm_ext, op).default._schema

    def fake(*given: Any, **named: Any) -> Any:
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= dict(zip(arguments, given, strict=False)) | named
        _check_devices(op, arguments)
        return function(SimpleNamespace(**arguments))

    torch.library.register_fake(f"ffm_ext::{op}", fake)


def _check_devices(op: str, arguments: dict[str, Any]) -> None:
    """The dispatcher comes here as soon as one argument is on the meta device: then all must be."""
    tensors: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, list | tuple):
            parts = ((f"{name}[{i}]", part) for i, part in enumerate(value))
            tensors |= {part_name: part for part_name, part in parts if isinstance(part, Tensor)}
    first = next((name for name in ("weight", "packed") if name in tensors), next(iter(tensors)))
    for name, tensor in tensors.items():
        if tensor.device != tensors[first].device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, {first} is on {tensors[first].device}"
            )


def _output_shape(a: SimpleNamespace, vectors: Sequence[int]) -> list[int]:
    F, K = vectors
    B = a.indices.shape[0] if a.offsets is None else a.offsets.shape[0] - 1
    terms = F * (F - 1) // 2 + (F if a.within_field else 0)
    return {"sum": [B], "dot": [B, terms], "hadamard": [B, terms, K]}[a.output]


def new_grad_values(values: Tensor | None, values_grad: bool, weight: Tensor) -> Tensor:
    if values_grad and values is not None:
        return torch.empty_like(values, memory_format=torch.contiguous_format)
    return weight.new_empty(0)


@_register
def ffm_forward(a: SimpleNamespace) -> Tensor:
    shape = _output_shape(a, a.weight.shape[1:])
    dtype = sum_dtype(a.weight) if a.output == "sum" else a.weight.dtype
    return a.weight.new_empty(shape, dtype=dtype)


@_register
def ffm_backward(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    grad_values = new_grad_values(a.values, a.values_grad, a.weight)
    return a.weight.new_empty(a.weight.shape), grad_values


@_register
def ffm_backward_sparse(a: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return (
        a.weight.new_empty(rows, dtype=torch.int64),
        a.weight.new_empty(rows, a.weight.shape[1], a.weight.shape[2]),
        new_grad_values(a.values, a.values_grad, a.weight),
    )


@_register
def ffm_backward_fused_(a: SimpleNamespace) -> Tensor:
    return new_grad_values(a.values, a.values_grad, a.weight)


@_register
def ffm_backward_values(a: SimpleNamespace) -> Tensor:
    return new_grad_values(a.values, True, a.weight)


@_register
def ffm_update_(a: SimpleNamespace) -> None:
    pass


@_register
def ffm_train_(a: SimpleNamespace) -> Tensor:
    return a.weight.new_empty((), dtype=torch.float64)


def packed_row_bytes(F: int, K: int) -> int:
    """``packed_row_bytes`` of ``csrc/params.h``."""
    size = F * (2 + (4 if K <= 4 else 8 if K <= 8 else -(-K // 16) * 16))
    step = 1 << ((size - 1) % 64).bit_length()
    return -(-size // step) * step


@_register
def ffm_quantize(a: SimpleNamespace) -> Tensor:
    row_bytes = packed_row_bytes(int(a.weight.shape[1]), int(a.weight.shape[2]))
    return a.weight.new_empty(a.weight.shape[0], row_bytes, dtype=torch.uint8)


@_register
def ffm_dequantize(a: SimpleNamespace) -> Tensor:
    return a.packed.new_empty(a.packed.shape[0], a.num_fields, a.embed_dim, dtype=torch.float32)


@_register
def ffm_forward_int8(a: SimpleNamespace) -> Tensor:
    shape = _output_shape(a, (a.num_fields, a.embed_dim))
    return a.packed.new_empty(shape, dtype=torch.float32)


@_register
def gather_sum(a: SimpleNamespace) -> Tensor:
    return a.weight.new_empty(a.indices.shape[0])


@_register
def ffm_table_ids(a: SimpleNamespace) -> Tensor:
    return torch.empty_like(a.ids, memory_format=torch.contiguous_format)
