# SPDX-License-Identifier: MIT
"""What every form of the interaction asks of its arguments before a kernel sees them."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Output = Literal["sum", "dot", "hadamard"]
GradMode = Literal["dense", "sparse"]


def check_modes(where: str, output: str, grad: str) -> None:
    """Raise ValueError unless ``output`` and ``grad`` are modes that exist."""
    for name, value, allowed in (
        ("output", output, get_args(Output)),
        ("grad", grad, get_args(GradMode)),
    ):
        if value not in allowed:
            raise ValueError(f"{where}: {name} = {value!r} is not one of {', '.join(allowed)}")


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
