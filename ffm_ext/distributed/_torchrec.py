# SPDX-License-Identifier: MIT
"""An FFM whose tables TorchRec holds: whole in one process, or in parts over many.

::

    KeyedJaggedTensor -> EmbeddingCollection (sharded: ids go to the owners, rows come back)  -> rows [nnz, F·K]
      -> the interaction over those rows, each of which is one entry                          -> scores [B]
      backward: gradient [nnz, F·K] of the rows -> to the owners -> their fused optimizer
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ffm_ext._arguments import check_positive
from ffm_ext.functional import ffm_interaction
from ffm_ext.modules import initial_std

if TYPE_CHECKING:
    from torchrec import KeyedJaggedTensor

Sharding = Literal["row_wise", "column_wise", "table_wise"]

INSTALL = "python -m pip install 'ffm-ext[distributed]' && python -m pip install --no-deps torchrec==1.8.0"


def _torchrec(where: str) -> Any:
    missing = [name for name in ("torchrec", "fbgemm_gpu") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{where} needs {' and '.join(missing)}. Install with\n    {INSTALL}", name=missing[0]
        )
    import torchrec

    return torchrec


class EmbeddingFFM(nn.Module):
    """A field-aware factorization machine over TorchRec tables: bias + interaction, as logits or predictions ``[B]``.

    Each field is a key of the ``KeyedJaggedTensor`` and has a table of its own, whose rows are F·K long: one K-vector
    for every field that a feature can meet, as in :class:`~ffm_ext.FFM`. There is no linear term.

    Args:
        fields: the fields, by name, with the number of features of each.
        embed_dim: K. F·K must be a multiple of 4, as the kernels of FBGEMM want it.
        within_field: also count the pairs inside one field.
        device: of the tables; ``"meta"`` makes none, for :func:`shard` to make each where it belongs.

    Attributes:
        embeddings: the ``EmbeddingCollection``, with a table ``field_<name>`` for each field.
        bias: a scalar.

    Raises:
        ModuleNotFoundError: TorchRec is not installed; the text says how it is.
        TypeError: a size is not an integer.
        ValueError: there is no field, a size is not positive, or F·K is not a multiple of 4.
    """

    def __init__(
        self,
        fields: Mapping[str, int],
        embed_dim: int,
        *,
        within_field: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        torchrec = _torchrec("EmbeddingFFM")
        super().__init__()
        embed_dim, *sizes = check_positive(
            "EmbeddingFFM",
            embed_dim=embed_dim,
            **{f"fields[{name!r}]": size for name, size in fields.items()},
        )
        width = len(fields) * embed_dim
        if width < 1 or width % 4:
            raise ValueError(
                f"EmbeddingFFM: {len(fields)} fields of embed_dim = {embed_dim} make rows of {width} numbers; "
                "FBGEMM wants a positive multiple of 4"
            )
        self.fields = list(fields)
        self.embed_dim = embed_dim
        self.within_field = within_field
        device = torch.device("cpu" if device is None else device)
        bound = math.sqrt(3) * initial_std(len(fields), embed_dim)  # uniform, the same deviation
        self.embeddings = torchrec.EmbeddingCollection(
            tables=[
                torchrec.EmbeddingConfig(
                    name=f"field_{name}",
                    embedding_dim=width,
                    num_embeddings=size,
                    feature_names=[name],
                    weight_init_min=-bound,
                    weight_init_max=bound,
                )
                for name, size in zip(fields, sizes, strict=True)
            ],
            device=device,
        )
        self.bias = nn.Parameter(torch.zeros((), device=None if device.type == "meta" else device))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Scores of a batch.

        Args:
            features: for each field the ids of each sample, which count from 0 in every field; its weights, if it has
                any, are the values of the entries.
        """
        found = self.embeddings(features)
        parts = [found[name] for name in self.fields]
        rows = torch.cat([part.values() for part in parts])  # [nnz, F·K], one field after the other
        lengths = torch.stack([part.lengths() for part in parts]).long()  # [F, B]
        F, B = lengths.shape
        counts = lengths.flatten()
        at = torch.arange(F * B, device=rows.device)
        cell = at.repeat_interleave(counts, output_size=len(rows))  # field · B + sample of each row
        # The operator wants the entries of a sample side by side: it is told where they are, the rows stay in place.
        indices = ((cell % B) * F + cell // B).argsort(stable=True)
        values = None
        if features.weights_or_none() is not None:
            order = [features.keys().index(name) for name in self.fields]
            values = features.permute(order).weights().to(rows.dtype)[indices]
        score = ffm_interaction(
            rows,
            indices,
            cell[indices] // B,
            values,
            nn.functional.pad(lengths.sum(0).cumsum(0), (1, 0)),
            num_fields=F,
            within_field=self.within_field,
            grad="dense",  # every row is one entry, so all of them are touched
        )
        return score + self.bias


def shard(
    model: nn.Module,
    sharding: Sharding,
    *,
    optimizer: type[torch.optim.Optimizer] | None = None,
    optimizer_args: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Spread the tables of a model over the processes of the default group, by TorchRec.

    Args:
        model: a module that holds :class:`EmbeddingFFM` or other ``EmbeddingCollection``.
        sharding: ``"row_wise"``: each table by rows over all processes. ``"column_wise"``: by columns, in parts that
            are a multiple of 4 wide. ``"table_wise"``: each table whole in one process, in turn.
        optimizer: fused into the backward pass of the tables: ``torch.optim.SGD``, ``torch.optim.Adagrad`` or
            ``torchrec.optim.RowWiseAdagrad``; on CUDA also ``torch.optim.Adam`` and others of FBGEMM. ``None``: the
            tables have gradients.
        optimizer_args: its arguments, ``{"lr": 0.1}``.
        device: of the tables.

    Returns:
        A ``DistributedModelParallel``: a module as before, whose other parameters are replicated by DDP and have an
        optimizer of their own. ``named_parameters()`` leaves out tables with a fused optimizer.

    Raises:
        ModuleNotFoundError: TorchRec is not installed; the text says how it is.
        RuntimeError: there is no process group.
        ValueError: there is no such sharding, or no table.
    """
    _torchrec("shard")
    import torch.distributed as dist
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.sharding_plan import (
        column_wise,
        construct_module_sharding_plan,
        row_wise,
        table_wise,
    )
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    if sharding not in get_args(Sharding):
        raise ValueError(
            f"shard: sharding = {sharding!r} is not one of {', '.join(get_args(Sharding))}"
        )
    if not dist.is_initialized():
        raise RuntimeError(
            "shard: there is no process group; call torch.distributed.init_process_group"
        )
    size, device = dist.get_world_size(), torch.device(device)
    sharder = EmbeddingCollectionSharder()
    plans: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not isinstance(module, sharder.module_type):
            continue
        if optimizer is not None:
            apply_optimizer_in_backward(optimizer, module.parameters(), dict(optimizer_args or {}))
        layouts: dict[str, Any] = {}
        for number, config in enumerate(module.embedding_configs()):
            if sharding == "row_wise":
                layout = row_wise()
            elif sharding == "column_wise":
                layout = column_wise(ranks=_columns(config.embedding_dim, size))
            else:
                layout = table_wise(rank=number % size)
            layouts[config.name] = layout
        plans[path] = construct_module_sharding_plan(
            module,
            per_param_sharding=layouts,
            sharder=sharder,
            local_size=size,
            world_size=size,
            device_type=device.type,
        )
    if not plans:
        raise ValueError("shard: model holds no EmbeddingCollection")
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=device,
        plan=ShardingPlan(plans),
        sharders=[sharder],
    )


def _columns(width: int, size: int) -> list[int]:
    """The processes that have a part of the columns: as many as the width can be divided by, in parts of 4 and more."""
    parts = max(n for n in range(1, size + 1) if width % (4 * n) == 0)
    return list(range(parts))
