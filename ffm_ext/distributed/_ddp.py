# SPDX-License-Identifier: MIT
"""Data parallelism by torch's DDP, for sparse gradients too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ffm_ext.modules import FM, FFMInteraction, _Linear, check_replicas


def _layers(module: nn.Module) -> list[Any]:
    """Those whose gradient may be sparse."""
    return [layer for layer in module.modules() if isinstance(layer, FFMInteraction | FM | _Linear)]


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """``torch.nn.parallel.DistributedDataParallel``, which also averages the sparse gradients of this package's layers.

    torch's own expects a sparse gradient of ``nn.Embedding`` and ``nn.EmbeddingBag`` alone. With ``grad="dense"`` both
    do the same.

    Args:
        module: a module that holds layers of this package.
        args, kwargs: those of torch's.

    Raises:
        RuntimeError: a layer has a fused optimizer, whose updates the other processes would not see.
    """

    sums_sparse_gradients = True

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        for layer in module.modules():
            check_replicas(layer, self)
        super().__init__(module, *args, **kwargs)
        self._grad_modes = {id(layer): layer.grad for layer in _layers(module)}

    def check_mode(self, layer: nn.Module) -> None:
        """Raise RuntimeError where a layer's gradient has become of another kind than the processes expect."""
        expected = self._grad_modes.get(id(layer), layer.grad)
        if (expected == "sparse") != (layer.grad == "sparse"):
            raise RuntimeError(
                f"{type(layer).__name__}: grad = {layer.grad!r}, and it was {expected!r} when DistributedDataParallel "
                "was made, which learns then what to expect: wrap the model anew"
            )

    def _build_params_for_reducer(self) -> tuple[list[torch.Tensor], list[bool]]:
        parameters, expect_sparse = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        # A layer says of its weight what nn.Embedding says by its attribute sparse; a bias beside it is dense.
        sparse = {id(layer.weight) for layer in _layers(self.module) if layer.grad == "sparse"}
        return parameters, [
            expected or id(parameter) in sparse
            for parameter, expected in zip(parameters, expect_sparse, strict=True)
        ]
