# SPDX-License-Identifier: MIT
"""Tables of int8 numbers for inference: 2.4 to 3.5 times smaller than float32 at F = 39 and K from 4 to 16."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ._arguments import Output, check_modes, check_positive, result_dtype
from ._fake import packed_row_bytes
from .batch import SparseBatch
from .memory import empty_table
from .modules import FFMInteraction, _Table, check_computes_ffm, entry_lists, no_torchscript

__all__ = ["QuantizedFFMInteraction", "quantize"]

_ops = torch.ops.ffm_ext
_Model = TypeVar("_Model", bound=nn.Module)

# What torch.nn.Module calls around forward.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class QuantizedFFMInteraction(_Table):
    """The interaction of :class:`~ffm_ext.FFMInteraction` over a table of int8 numbers. It has no gradient.

    Each K-vector of the table is ``scale · q`` with ``q`` in -127 … 127 and a scale of its own: the largest magnitude
    of the vector / 127, rounded up to bfloat16. So an element is off by half a scale at most, which is 0.4 % of the
    largest of its vector. Sums are float32. A vector takes K + 2 bytes, where float32 takes 4 K; a K other than 4, 8
    and the multiples of 16 takes the bytes of the next of these.

    :meth:`from_float` or :func:`quantize` make one from a trained layer. As it is constructed, the table is zero, for
    ``load_state_dict``.

    Args:
        num_features, num_fields, embed_dim, output, within_field: as :class:`~ffm_ext.FFMInteraction` has them.
        device: of the table; there are kernels for the CPU and for CUDA.

    Attributes:
        packed: buffer ``[N, R]`` uint8. A row is its F scales, its F vectors of numbers, and what fills it up to R
            bytes, so that it touches no more cache lines than it must.

    Raises:
        ValueError: a size is not positive, or a mode does not exist.
    """

    packed: Tensor

    def __init__(
        self,
        num_features: int,
        num_fields: int,
        embed_dim: int,
        *,
        output: Output = "sum",
        within_field: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_features, num_fields, embed_dim = check_positive(
            "QuantizedFFMInteraction",
            num_features=num_features,
            num_fields=num_fields,
            embed_dim=embed_dim,
        )
        check_modes("QuantizedFFMInteraction", output, "dense")
        self.num_features = num_features
        self.num_fields = num_fields
        self.embed_dim = embed_dim
        self.output = output
        self.within_field = within_field
        row_bytes = packed_row_bytes(num_fields, embed_dim)
        packed = empty_table(num_features, row_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("packed", packed.zero_())

    @classmethod
    def from_float(cls, layer: FFMInteraction) -> QuantizedFFMInteraction:
        """The same interaction with its table rounded to int8; ``layer`` stays as it is.

        Raises:
            ValueError: an element of the table is not finite; the text names its position ``[feature, field, factor]``.
        """
        return cls._of_packed(layer, _packed(layer, layer.weight))

    @classmethod
    def _of_packed(cls, layer: FFMInteraction, packed: Tensor) -> QuantizedFFMInteraction:
        """The same interaction with its table in int8, which is at hand."""
        sizes = layer.num_features, layer.num_fields, layer.embed_dim
        quantized = cls(*sizes, output=layer.output, within_field=layer.within_field, device="meta")
        quantized.packed = packed
        for name in _HOOKS:
            setattr(quantized, name, copy.copy(getattr(layer, name)))
        return quantized.train(layer.training)

    def dequantize(self) -> Tensor:
        """The table as float32, ``[N, F·K]``."""
        return _ops.ffm_dequantize(self.packed, self.num_fields, self.embed_dim).flatten(1)

    def forward(
        self,
        x: Tensor | SparseBatch,
        values: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Interaction of a batch.

        Args:
            x: ``[B, F]`` feature ids (int32 or int64; column = field), or a :class:`~ffm_ext.SparseBatch`.
            values: ``[B, F]``, only with ids as a tensor; ``None`` = 1.
            dtype: of the result.

        Raises:
            RuntimeError: a gradient is asked of values.
        """
        indices, fields, values, offsets = entry_lists(
            "QuantizedFFMInteraction", x, values, torch.float32
        )
        if values is not None and values.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "QuantizedFFMInteraction: values require a gradient, and int8 tables are for inference: "
                "call it under torch.inference_mode(), or give values.detach()"
            )
        return _ops.ffm_forward_int8(
            self.packed,
            indices,
            fields,
            values,
            offsets,
            self.num_fields,
            self.embed_dim,
            self.output,
            self.within_field,
        ).to(result_dtype("QuantizedFFMInteraction", self.packed, dtype))

    def __prepare_scriptable__(self) -> None:
        raise no_torchscript("QuantizedFFMInteraction")

    def extra_repr(self) -> str:
        """Sizes and modes, for ``repr``."""
        return (
            f"{self.num_features}, {self.num_fields}, {self.embed_dim}, output={self.output!r}, "
            f"within_field={self.within_field}"
        )


def _packed(layer: FFMInteraction, weight: Tensor) -> Tensor:
    sizes = layer.num_features, layer.num_fields, layer.embed_dim
    return _ops.ffm_quantize(weight.detach().view(sizes))


def quantize(model: _Model) -> _Model:
    """A copy of a model for inference, with every :class:`~ffm_ext.FFMInteraction` replaced by its int8 form.

    Everything else (linear weights, bias, other layers) is copied as it is; the float tables are not copied on the
    way, and layers that share a table share its int8 form. A model that is an ``FFMInteraction`` itself becomes a
    :class:`QuantizedFFMInteraction`.

    To keep it, save the float model and quantize what is loaded, which gives the same bits; or save the copy's
    ``state_dict`` and load that into ``quantize`` of a model of the same arguments.

    Raises:
        ValueError: the model has no ``FFMInteraction``, or a table has an element that is not finite.
        TypeError: a layer is of a class with a ``forward`` of its own.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FFMInteraction)]
    if not layers:
        raise ValueError(f"quantize: {type(model).__name__} has no FFMInteraction")
    for layer in layers:
        check_computes_ffm("quantize", layer)
    # A parametrized table is made anew each time: as long as these live, no two have one id.
    weights = [layer.weight for layer in layers]
    tables: dict[tuple[int, int], Tensor] = {}
    # deepcopy takes what it is told to have copied already.
    memo = {}
    for layer, weight in zip(layers, weights, strict=True):
        table = id(weight), layer.embed_dim
        if table not in tables:
            tables[table] = _packed(layer, weight)
        memo[id(layer)] = QuantizedFFMInteraction._of_packed(layer, tables[table])
    return copy.deepcopy(model, memo)
