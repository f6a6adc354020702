# SPDX-License-Identifier: MIT
"""The interaction as a ``torch.autograd.Function`` over the operators of ``torch.ops.ffm_ext``.

::

    FFMFunction.forward    ->  ffm_forward
    FFMFunction.backward   ->  ffm_backward            grad="dense":  gradient [N, F, K] and that of values
                                                       grad="atomic": the same, in any order
                               ffm_backward_sparse     grad="sparse": touched rows, their gradient, that of values
                               ffm_backward_fused_     grad="fused":  the table is updated, values get a gradient
                               ffm_backward_values     the table is frozen, values are not
                               reference.py            create_graph=True: gradients of gradients
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import reference
from .optim import FusedOptimizer

__all__ = ["FFMFunction"]

_ops = torch.ops.ffm_ext


def _table(weight: Tensor, num_fields: int) -> Tensor:
    """``[N, F, K]`` or ``[N, F·K]`` as ``[N, F, K]``."""
    if weight.dim() == 3:
        return weight
    return weight.view(weight.shape[0], num_fields, weight.shape[1] // num_fields)


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients for ``create_graph=True``: those of the reference, which can be differentiated again."""
    weight, indices, fields, values, offsets = ctx.saved_tensors
    needs_weight, needs_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    if needs_weight and ctx.grad not in ("dense", "atomic"):
        raise RuntimeError(
            f"ffm_interaction: create_graph=True needs grad='dense': with grad={ctx.grad!r} there is "
            "no gradient that could be differentiated again"
        )
    out = reference.ffm_interaction(
        weight,
        indices,
        fields,
        values,
        offsets,
        num_fields=ctx.num_fields,
        output=ctx.output,
        within_field=ctx.within_field,
        grad="dense",
    )
    inputs = [
        tensor for tensor, needed in ((weight, needs_weight), (values, needs_values)) if needed
    ]
    grads = iter(torch.autograd.grad(out, inputs, grad_output, create_graph=True))
    grad_weight = next(grads) if needs_weight else None
    grad_values = next(grads) if needs_values else None
    return grad_weight, None, None, grad_values, *(None,) * 6


def _alert_not_deterministic(table: Tensor) -> None:
    """What ``torch.use_deterministic_algorithms`` says of gradients that CUDA adds atomically."""
    if not table.is_cuda or not torch.are_deterministic_algorithms_enabled():
        return
    text = (
        "ffm_interaction: grad='atomic' adds gradients in any order, which "
        "torch.use_deterministic_algorithms(True) refuses; grad='dense' is deterministic"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)


class FFMFunction(torch.autograd.Function):
    """Arguments as :func:`ffm_ext.functional.ffm_interaction`, all positional, already checked."""

    @staticmethod
    def forward(
        weight: Tensor,
        indices: Tensor,
        fields: Tensor | None,
        values: Tensor | None,
        offsets: Tensor | None,
        num_fields: int,
        output: str,
        within_field: bool,
        grad: str,
        fused: FusedOptimizer | None,
    ) -> Tensor:
        """The interaction, by one operator call."""
        table = _table(weight, num_fields)
        return _ops.ffm_forward(table, indices, fields, values, offsets, output, within_field)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; the field sums are cheaper to read again than to keep."""
        weight, indices, fields, values, offsets, *modes = inputs
        ctx.save_for_backward(weight, indices, fields, values, offsets)
        ctx.num_fields, ctx.output, ctx.within_field, ctx.grad, ctx.fused = modes

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``weight`` and ``values``, whichever are needed."""
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad_output)
        weight, indices, fields, values, offsets = ctx.saved_tensors
        table = _table(weight, ctx.num_fields)
        problem = (
            grad_output,
            table,
            indices,
            fields,
            values,
            offsets,
            ctx.output,
            ctx.within_field,
        )
        needs_weight, needs_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        grad_weight: Tensor | None = None
        grad_values: Tensor | None = None
        if not needs_weight:
            grad_values = _ops.ffm_backward_values(*problem)
        elif ctx.grad == "fused":
            states, update = ctx.fused.next_step()
            grad_output, table, *lists = problem
            grad_values = _ops.ffm_backward_fused_(
                grad_output, table, states, *lists, needs_values, *update
            )
            # Whoever saved the old table for a backward of their own must not go on with the new one.
            torch.autograd.graph.increment_version(weight)
        elif ctx.grad in ("dense", "atomic"):
            is_atomic = ctx.grad == "atomic"
            if is_atomic:
                _alert_not_deterministic(table)
            grad_weight, grad_values = _ops.ffm_backward(
                *problem, needs_values, deterministic=not is_atomic
            )
            grad_weight = grad_weight.view(weight.shape)
        else:
            rows, grad_rows, grad_values = _ops.ffm_backward_sparse(*problem, needs_values)
            grad_weight = torch.sparse_coo_tensor(
                rows[None],
                grad_rows.view(rows.shape[0], *weight.shape[1:]),
                weight.shape,
                is_coalesced=True,
                check_invariants=False,
            )
        return grad_weight, None, None, grad_values if needs_values else None, *(None,) * 6
