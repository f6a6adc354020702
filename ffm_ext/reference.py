# SPDX-License-Identifier: MIT
"""The field-aware interaction in plain PyTorch: the specification that the kernels are checked against.

It is differentiable any number of times and runs on any device; it builds the ``[B, F, F, K]`` field sums that
the fused operators never materialise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import GradMode, Output, check_modes, table_shape

__all__ = ["ffm_interaction"]


class _GatherRows(torch.autograd.Function):
    """``weight[indices]`` whose gradient is a coalesced sparse tensor over the touched rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = weight.shape
        return weight[indices]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        rows = grad_rows.reshape(indices.numel(), *ctx.shape[1:])
        grad = torch.sparse_coo_tensor(
            indices.reshape(1, -1), rows, ctx.shape, check_invariants=True
        )
        return grad.coalesce(), None


def ffm_interaction(
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None = None,
    values: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    num_fields: int | None = None,
    output: Output = "sum",
    within_field: bool = False,
    grad: GradMode = "sparse",
) -> Tensor:
    """Same arguments but for ``dtype``, same shapes and meaning as :func:`ffm_ext.functional.ffm_interaction`.

    The formula, with ``S[f, g] = Σ x_a · weight[a, g]`` over the entries ``a`` of field ``f``::

        y = Σ_{f<g} <S[f, g], S[g, f]>  (+ Σ_f ½ (|S[f, f]|² - Σ_a x_a² |weight[a, f]|²) within fields)

    (Juan et al., "Field-aware Factorization Machines for CTR Prediction", RecSys 2016, regrouped by field.)
    The values of ids, fields and offsets are not checked beyond what PyTorch's indexing does.

    Raises:
        ValueError: there is no such mode, ``weight`` is no table, or ``fields`` or ``offsets`` are missing.
    """
    check_modes("reference.ffm_interaction", output, grad)
    N, F, K = table_shape("reference.ffm_interaction", weight, indices, num_fields)
    gather = _GatherRows.apply if grad == "sparse" else Tensor.__getitem__
    gathered = gather(weight, indices)

    if indices.dim() == 2:
        B, nnz = indices.shape[0], indices.numel()
        entry_fields = torch.arange(F, device=indices.device).repeat(B)
        entry_samples = torch.arange(B, device=indices.device).repeat_interleave(F)
    else:
        if fields is None or offsets is None:
            missing = "fields" if fields is None else "offsets"
            raise ValueError(
                f"reference.ffm_interaction: indices is [nnz], so {missing} is needed too"
            )
        B, nnz = offsets.numel() - 1, indices.numel()
        entry_fields = fields.long()
        counts = offsets.diff().long()
        entry_samples = torch.arange(B, device=indices.device).repeat_interleave(counts)

    rows = gathered.reshape(nnz, F, K)
    if values is not None:
        rows = rows * values.reshape(nnz, 1, 1)
    sums = rows.new_zeros(B * F, F, K).index_add(0, entry_samples * F + entry_fields, rows)
    sums = sums.view(B, F, F, K)

    f, g = torch.triu_indices(F, F, offset=1, device=weight.device)
    hadamard = sums[:, f, g] * sums[:, g, f]
    if within_field:
        own = rows[torch.arange(nnz, device=weight.device), entry_fields]
        squares = rows.new_zeros(B * F, K).index_add(0, entry_samples * F + entry_fields, own**2)
        diagonal = sums.diagonal(dim1=1, dim2=2).transpose(1, 2)
        hadamard = torch.cat([hadamard, (diagonal**2 - squares.view(B, F, K)) / 2], dim=1)
    if output == "hadamard":
        return hadamard
    return hadamard.sum(2) if output == "dot" else hadamard.sum((1, 2))
