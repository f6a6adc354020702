# SPDX-License-Identifier: MIT
"""``torch.func.vmap`` of the operators: V batches become one of V times as many samples.

V tables become one of V times as many rows, and ids move up to those of their table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_ids, check_offsets, checks_contents

_ops = torch.ops.ffm_ext


def _unfolded(V: int, tensor: Tensor, dim: int | None) -> Tensor:
    """``[V, …]``, by a view."""
    return tensor.expand(V, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _check(
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
    offsets: Tensor | None,
    fold_table: bool,
) -> None:
    """What an operator cannot see any more once calls are one: whose ids and entries they are."""
    weight, indices = arguments[:2]
    if not checks_contents(indices):
        return
    if in_dims[0] is not None or fold_table:
        N = _unfolded(1, weight, in_dims[0]).shape[1]
        check_ids("ffm_ext.vmap", "indices", indices, N, f"a table of {N} features")
    if offsets is not None:
        entries = indices.numel() // (1 if in_dims[1] is None else len(offsets))
        for each in offsets[:1] if in_dims[4] is None else offsets:
            check_offsets("ffm_ext.vmap", each, entries)


def _fold(
    V: int, in_dims: Sequence[int | None], arguments: Sequence[Any], fold_table: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``weight, indices, fields, values, offsets`` of all V calls in one."""

    def unfold(i: int) -> Tensor | None:
        return None if arguments[i] is None else _unfolded(V, arguments[i], in_dims[i])

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten(0, 1).contiguous()

    weight = arguments[0]
    indices, fields, values, offsets = (unfold(i) for i in range(1, 5))
    assert indices is not None
    _check(in_dims, arguments, offsets, fold_table)
    step = torch.arange(V, device=weight.device)
    if fold_table or in_dims[0] is not None:
        tables = _unfolded(V, weight, in_dims[0])
        indices = indices + (step * tables.shape[1]).view(V, *[1] * (indices.dim() - 1))
        weight = tables.flatten(0, 1).contiguous()
    if offsets is not None:
        entries = indices.shape[1]
        starts = offsets[:, :-1] + (step * entries)[:, None]
        offsets = torch.cat([starts.flatten(), starts.new_full((1,), V * entries)])
        offsets = offsets.to(indices.dtype)
        fields = None if fields is None else fields.to(indices.dtype)
    folded_indices = flat(indices)
    assert folded_indices is not None
    return weight, folded_indices, flat(fields), flat(values), offsets


@torch.library.register_vmap("ffm_ext::ffm_forward")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    V = info.batch_size
    out = _ops.ffm_forward(*_fold(V, in_dims, arguments, False), *arguments[5:])
    return out.unflatten(0, (V, -1)), 0


@torch.library.register_vmap("ffm_ext::ffm_forward_int8")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    V = info.batch_size
    out = _ops.ffm_forward_int8(*_fold(V, in_dims, arguments, False), *arguments[5:])
    return out.unflatten(0, (V, -1)), 0


@torch.library.register_vmap("ffm_ext::ffm_backward")
def _(
    info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    V = info.batch_size
    seed = _unfolded(V, grad_output, in_dims[0]).flatten(0, 1)
    folded = _fold(V, in_dims[1:], arguments, True)
    grad_weight, grad_values = _ops.ffm_backward(seed, *folded, *arguments[5:])
    values_grad = arguments[7]  # ``deterministic`` may follow
    if values_grad:
        grad_values = grad_values.unflatten(0, (V, -1))
    return (grad_weight.unflatten(0, (V, -1)), grad_values), (0, 0 if values_grad else None)


@torch.library.register_vmap("ffm_ext::ffm_backward_values")
def _(
    info: Any, in_dims: tuple[Any, ...], grad_output: Tensor, *arguments: Any
) -> tuple[Tensor, int]:
    V = info.batch_size
    seed = _unfolded(V, grad_output, in_dims[0]).flatten(0, 1)
    folded = _fold(V, in_dims[1:], arguments, False)
    grad_values = _ops.ffm_backward_values(seed, *folded, *arguments[5:])
    return grad_values.unflatten(0, (V, -1)), 0


@torch.library.register_vmap("ffm_ext::ffm_table_ids")
def _(
    info: Any, in_dims: tuple[Any, ...], ids: Tensor, starts: Tensor, where: str
) -> tuple[Tensor, int]:
    V = info.batch_size
    unfolded = _unfolded(V, ids, in_dims[0])
    if in_dims[1] is not None:  # as torch.func.stack_module_state has it
        each = zip(unfolded, starts.movedim(in_dims[1], 0), strict=True)
        return torch.stack([_ops.ffm_table_ids(*one, where) for one in each]), 0
    moved = _ops.ffm_table_ids(unfolded.flatten(0, 1), starts, where)
    return moved.unflatten(0, (V, -1)), 0
