# SPDX-License-Identifier: MIT
"""Models in any kind of file, and their scores."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from .. import interop
from .._arguments import Loss
from .._files import is_stream
from ..batch import SparseBatch, keep_entries
from ..data import SparseDataset
from ..modules import FFM, unit_norm
from ..training import Trainer


class Loaded(NamedTuple):
    """A model from a file.

    Attributes:
        kind: what kind of file it was in.
        loss: ``"logistic"`` or ``"squared"``; ``None`` where the file does not say.
        trainer: whose it is, where the file is a checkpoint.
    """

    model: FFM
    kind: str
    loss: Loss | None
    trainer: Trainer | None = None


_XLEARN = "xLearn text model"


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a run under torchrun has written checkpoints there."""
    if not path.is_dir():
        return False
    from ..distributed._training import newest_checkpoint

    return newest_checkpoint(path) is not None


def load_any_model(path: Path) -> Loaded:
    """A model, what kind of file it was in, and its loss; found by content."""
    if is_checkpoint_folder(path):
        from ..distributed import DistributedTrainer

        with warnings.catch_warnings():
            # That a single process reads it is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is .* uninitialized")
            trainer = DistributedTrainer.load(path)
        return Loaded(trainer.model, "ffm_ext checkpoint folder", trainer.loss, trainer)
    failures = []
    kinds: tuple[tuple[str, Callable[[Path], FFM | Trainer]], ...] = (
        ("ffm_ext model", partial(interop.load_model, mmap=True)),
        ("ffm_ext checkpoint", Trainer.load),
        ("libffm model", interop.load_libffm),
        (_XLEARN, interop.load_xlearn_text),
        ("torchfm state_dict", interop.load_torchfm),
    )
    if is_stream(path):
        raise ValueError(f"{path}: a model is read from a file, not from a pipe or a device")
    if path.is_dir():
        raise ValueError(f"{path}: a folder without checkpoints, and a model is a file")
    with open(path, "rb"):
        pass  # a file that cannot be read is no matter of its format
    for kind, load in kinds:
        try:
            found = load(path)
        except ValueError as error:
            failures.append(f"as {kind}: {error}")
            continue
        if isinstance(found, Trainer):
            return Loaded(found.model, kind, found.loss, found)
        loss = interop.model_loss(path) if kind == "ffm_ext model" else None
        return Loaded(found, kind, loss)
    raise ValueError(f"{path}: no model that is known here\n  " + "\n  ".join(failures))


def unsaid_arguments(parser: argparse.ArgumentParser) -> None:
    """For what some kinds of model files leave out."""
    parser.add_argument(
        "--loss",
        choices=get_args(Loss),
        help="what the model was trained with, where its file does not say (logistic)",
    )
    parser.add_argument(
        "--no-norm",
        action="store_true",
        help="it was trained without normalisation; xLearn's text does not say",
    )


def load_as_told(path: Path, args: argparse.Namespace) -> Loaded:
    """:func:`load_any_model`, with what its file leaves out and ``args`` says.

    Raises:
        ValueError: the file says something else.
    """
    model, kind, loss, _ = load_any_model(path)
    if args.loss is not None and loss not in (None, args.loss):
        raise ValueError(f"--loss {args.loss}: {path} was trained with {loss} loss, as it says")
    if args.no_norm and kind == _XLEARN:
        model.normalize = False
    if args.no_norm and model.normalize:
        raise ValueError(f"--no-norm: {path} was trained with normalisation, as it says")
    return Loaded(model, kind, loss or args.loss)


def report_unknown(missing: int, entries: int, path: Path) -> None:
    if missing:
        print(
            f"{path}: {missing} of {entries} entries have features or fields that the model does not know; "
            "their pairs are left out",
            file=sys.stderr,
        )


def knows(model: FFM, data: SparseBatch) -> Tensor:
    """Whether a model has the feature and the field of each entry, ``[nnz]``."""
    layer = model.interaction
    return (data.indices < layer.num_features) & (data.fields < layer.num_fields)


def known_part(data: SparseBatch, model: FFM) -> tuple[SparseBatch, int]:
    """The entries whose feature and field the model has, and how many it has not.

    As in libffm, pairs with an entry left out do not count, but its value does in the norm of its sample: with
    normalisation, the values that stay are divided by that norm here already.
    """
    known = knows(model, data)
    missing = int((~known).sum())
    if not missing:
        return data, 0
    values = torch.ones(data.nnz) if data.values is None else data.values
    if model.normalize:
        values = unit_norm(data.indices, values.double(), data.offsets).float()
    whole = SparseBatch(data.indices, data.fields, values, data.offsets)
    return keep_entries(whole, known), missing


@contextmanager
def _without_normalizing(model: FFM, off: bool) -> Iterator[None]:
    before, model.normalize = model.normalize, model.normalize and not off
    try:
        yield
    finally:
        model.normalize = before


def scores(model: FFM, data: SparseDataset, piece: int = 1 << 16) -> tuple[Tensor, int]:
    """Logits (or values) ``[n]`` of all samples, and how many entries the model does not know."""
    parts, missing = [torch.zeros(0)], 0
    with torch.inference_mode():
        for shard in data.shards:
            for i in range(0, len(shard.labels), piece):
                batch, unknown = known_part(shard.batch[i : i + piece], model)
                missing += unknown
                with _without_normalizing(model, unknown > 0):
                    parts.append(model(batch, dtype=torch.float32))
    return torch.cat(parts), missing


def quality(score: Tensor, labels: Tensor, weights: Tensor, loss: str) -> dict[str, float]:
    """Logloss, and AUC where scikit-learn is there and both classes are; or RMSE: means over ``weights [n]``."""
    share = weights.double() / weights.double().sum()
    if not share.isfinite().all() or len(share) == 0:  # no weights, or none but 0
        return {}
    if loss == "squared":
        return {"rmse": math.sqrt(float((share * (score - labels).double() ** 2).sum()))}
    positive = (labels > 0).double()
    losses = nn.functional.binary_cross_entropy_with_logits(
        score.double(), positive, reduction="none"
    )
    found = {"logloss": float((share * losses).sum())}
    if 0 < positive[share != 0].mean() < 1 and find_spec("sklearn"):
        from sklearn.metrics import roc_auc_score

        area = roc_auc_score(positive.numpy(), score.numpy(), sample_weight=share.numpy())
        found["auc"] = float(area)
    return found


@torch.no_grad()
def copy_weights(old: FFM, new: FFM) -> None:
    """The weights of a model into one that has its parts, as far as both have the features and fields."""
    K = old.interaction.embed_dim
    N, F = (
        min(getattr(model.interaction, name) for model in (old, new))
        for name in ("num_features", "num_fields")
    )
    before, after = (
        model.interaction.weight.view(-1, model.interaction.num_fields, K) for model in (old, new)
    )
    after[:N, :F] = before[:N, :F]
    if old.linear.weight is not None:
        new.linear.weight[:N] = old.linear.weight[:N]
    if old.linear.bias is not None:
        new.linear.bias.copy_(old.linear.bias)


@torch.no_grad()
def resized(model: FFM, num_features: int, num_fields: int) -> FFM:
    """The same model for so many features and fields; weights of new ones are 0."""
    layer = model.interaction
    if (num_features, num_fields) == (layer.num_features, layer.num_fields):
        return model
    sizes = {"num_features": num_features, "num_fields": num_fields}
    names = [str(f) for f in range(num_fields)]
    new = interop.model_from_arguments(
        {**interop.model_arguments("train", model), **sizes, "field_names": names}
    )
    new.interaction.to(layer.weight.dtype)
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    copy_weights(model, new)
    return new


def of_training(model: FFM, train: SparseDataset) -> FFM:
    """A model without last features and fields that ``train`` has not and whose weights are all 0: they say nothing."""
    if model.feature_fields is not None:  # it says itself which it has
        return model
    layer = model.interaction
    table = layer.weight.detach().view(-1, layer.num_fields, layer.embed_dim)
    N, F = max(1, train.num_features), max(1, train.num_fields)
    rows = table[N:].flatten(1).any(1)
    if model.linear.weight is not None:
        rows |= model.linear.weight.detach()[N:].any(1)
    columns = table[:, F:].any(2).any(0)
    kept = (
        least + (int(used.nonzero()[-1]) + 1 if used.any() else 0)
        for least, used in ((min(N, len(table)), rows), (min(F, layer.num_fields), columns))
    )
    return resized(model, *kept)
