# SPDX-License-Identifier: MIT
"""The fused field-aware interaction as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import GradMode, Output, check_modes, result_dtype, table_shape
from .autograd import interaction

__all__ = ["ffm_interaction"]


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Field-aware interaction of sparse samples, fused, with gradients for ``weight`` and ``values``.

    With ``S[f, g] = Σ x_a · weight[a, g]`` over the entries ``a`` of field ``f`` in a sample::

        h[f, g] = S[f, g] ∘ S[g, f]   for f < g      [P, K],  P = F(F-1)/2, in the order (0,1), (0,2), … (F-2,F-1)
        d[f, g] = Σ_k h[f, g, k]                     [P]
        y       = Σ_{f<g} d[f, g]                    scalar

    This is the interaction of Juan et al., "Field-aware Factorization Machines for CTR Prediction", RecSys 2016,
    regrouped by field, which makes it linear in the number of entries.

    Args:
        weight: the table, ``[N, F, K]``, or ``[N, F·K]`` (row-major); float32, float64, bfloat16
            or float16, summed in float32 (float64 in itself); contiguous.
        indices: feature ids, int32 or int64. Either ``[B, F]``: column = field, one feature a field; or ``[nnz]``
            with ``fields`` and ``offsets``: any number of features a field.
        fields: the field of each entry, ``[nnz]``.
        values: the value ``x`` of each entry, the shape of ``indices``, the dtype of ``weight``; ``None`` = 1.
        offsets: ``[B + 1]``; sample ``b`` owns the entries ``offsets[b]:offsets[b + 1]``.
        num_fields: F, needed only where ``weight`` is ``[N, F·K]`` and ``indices`` is ``[nnz]``.
        output: ``"sum"`` -> y ``[B]``; ``"dot"`` -> d ``[B, P]``; ``"hadamard"`` -> h ``[B, P, K]``.
        within_field: also count the pairs inside one field, ``½ (|S[f,f]|² - Σ_a x_a² |weight[a,f]|²)``. ``"sum"`` adds
            them; ``"dot"`` and ``"hadamard"`` append F terms after the P pairs.
        grad: the gradient of ``weight``: ``"sparse"`` a coalesced ``torch.sparse_coo`` tensor over the touched
            rows, ``"dense"`` a plain tensor. What ``weight`` is computed by has to take it: views, slices and
            conversions of torch take no sparse one. Both are the same bits for any number of threads, and in every run.
            ``"atomic"``: as ``"dense"``, but CUDA adds the entries of a row in any order, which saves sorting them;
            float32 and float64; ``torch.use_deterministic_algorithms(True)`` refuses it.
        dtype: of the result; ``None``: that of ``weight``. With float32, ``"sum"`` of a bfloat16 or float16 table is
            not rounded.

    Returns:
        The interaction, in ``dtype``.

    Raises:
        ValueError: a shape, dtype, device, mode, offset or value is wrong; the text names argument, value, position.
        IndexError: an id is outside ``[0, N)`` or a field outside ``[0, F)``; the text names it and its position.
    """
    check_modes("ffm_interaction", output, grad)
    _, F, _ = table_shape("ffm_interaction", weight, indices, num_fields)
    out = interaction(weight, indices, fields, values, offsets, F, output, within_field, grad)
    return out.to(result_dtype("ffm_interaction", weight, dtype))
