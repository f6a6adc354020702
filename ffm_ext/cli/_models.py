# SPDX-License-Identifier: MIT
"""``train``, ``predict``, ``check`` and ``convert``."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO, get_args

import torch
from torch import Tensor, nn

from .. import interop
from .._files import atomic_write, check_writable, is_same_file, is_stream
from ..batch import SparseBatch
from ..data import (
    SparseDataset,
    convert_libffm,
    iter_libffm,
    open_dataset,
    read_libffm,
    write_libffm,
)
from ..data._dataset import check_shard, weights_of
from ..memory import fits
from ..modules import FFM, _unit_norm
from ..optim import OPTIMIZERS, Optimizer
from ..training import _MOST_THREADS, Epoch, Mode, Progress, Trainer

# ---------------------------------------------------------------- arguments and output


def seed(text: str) -> int:
    """A seed that torch and the operators, which take 64 bits with a sign, can be given."""
    return _in_range(text, 0, (1 << 63) - 1)


def threads(text: str) -> int:
    """A number of threads that a trainer takes."""
    return _in_range(text, 1, _MOST_THREADS)


def _in_range(text: str, least: int, most: int) -> int:
    number = int(text)
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{number} is not from {least} to {most}")
    return number


def _flag(name: str) -> str:
    """What the user calls an argument."""
    letters = {"decay": "-l", "embed_dim": "-k", "lr": "-r", "threads": "-s"}
    return letters.get(name, f"--{name.replace('_', '-')}")


def _check_apart(
    written: Mapping[str, Path | None], read: Mapping[str, Path | None], *, inside: bool = True
) -> None:
    """See whether what is to be written is something else than what is read: name -> path, where it was given.

    Args:
        written, read: see above.
        inside: whether a folder that is read is to stay as it is, too.

    Raises:
        ValueError: it is not.
    """
    for name, path in written.items():
        for other, source in read.items():
            if path is None or source is None:
                continue
            if is_same_file(path, source):
                raise ValueError(f"{name} {path} would take the place of {other} {source}")
            if inside and _is_inside(path, source):
                raise ValueError(f"{name} {path} would be written into {other} {source}")


def _is_inside(path: Path, folder: Path) -> bool:
    return (
        folder.is_dir() and Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
    )


def discard_output() -> None:
    """Send what comes on standard output, now and at the interpreter's exit, nowhere: its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# No NaN or Infinity, which are no JSON: ValueError.
_json = partial(json.dumps, allow_nan=False)


# ---------------------------------------------------------------- data


def _check_data(lenient: bool, *paths: Path | None) -> None:
    """See whether paths, where they are given, can be those of data, before one is opened: a pipe waits for a writer.

    Raises:
        ValueError: one cannot, or ``lenient`` would do nothing.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        if is_stream(path):
            raise ValueError(f"{path}: data is read from a file, not from a pipe or a device")
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(2) == b"\x1f\x8b":
                    raise ValueError(f"{path}: it is compressed by gzip; gunzip it first")
    if lenient and all(path.is_dir() for path in given):
        raise ValueError(f"--lenient is for lines of text, and {given[0]} is a folder")


def load_data(path: Path, lenient: bool = False) -> SparseDataset:
    """A folder that ``convert`` made, or a libffm text. How many lines were skipped is said."""
    data = open_dataset(path) if path.is_dir() else read_libffm(path, lenient=lenient)
    _report_skipped(data.metadata.get("skipped", 0), path)
    return data


def data_in_pieces(path: Path, lenient: bool = False) -> Iterator[SparseDataset]:
    """The same, a piece of a text or a shard of a folder at a time: it may be larger than memory."""
    if not path.is_dir():
        yield from iter_libffm(path, lenient=lenient)
        return
    data = open_dataset(path)
    N, F = data.num_features, data.num_fields
    for number, shard in enumerate(data.shards):
        check_shard(f"{path}: shards[{number}]", shard, N, F)
        yield SparseDataset([shard], num_features=N, num_fields=F)


def _report_skipped(skipped: int, path: Path) -> None:
    if skipped:
        print(f"{path}: {skipped} broken lines skipped", file=sys.stderr)


class Loaded(NamedTuple):
    """A model from a file.

    Attributes:
        kind: what kind of file it was in.
        loss: ``"logistic"`` or ``"squared"``; ``None`` where the file does not say.
        trainer: whose it is, where the file is a checkpoint.
    """

    model: FFM
    kind: str
    loss: interop.Loss | None
    trainer: Trainer | None = None


_XLEARN = "xLearn text model"


def _is_checkpoint_folder(path: Path) -> bool:
    """Whether a run under torchrun has written checkpoints there."""
    if not path.is_dir():
        return False
    from ..distributed._training import newest_checkpoint

    return newest_checkpoint(path) is not None


def load_any_model(path: Path) -> Loaded:
    """A model, what kind of file it was in, and its loss; found by content."""
    if _is_checkpoint_folder(path):
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
        choices=get_args(interop.Loss),
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


def _report_unknown(missing: int, entries: int, path: Path) -> None:
    if missing:
        print(
            f"{path}: {missing} of {entries} entries have features or fields that the model does not know; "
            "their pairs are left out",
            file=sys.stderr,
        )


def _knows(model: FFM, data: SparseBatch) -> Tensor:
    """Whether a model has the feature and the field of each entry, ``[nnz]``."""
    layer = model.interaction
    return (data.indices < layer.num_features) & (data.fields < layer.num_fields)


def known_part(data: SparseBatch, model: FFM) -> tuple[SparseBatch, int]:
    """The entries whose feature and field the model has, and how many it has not.

    As in libffm, pairs with an entry left out do not count, but its value does in the norm of its sample: with
    normalisation, the values that stay are divided by that norm here already.
    """
    known = _knows(model, data)
    missing = int((~known).sum())
    if not missing:
        return data, 0
    counts = data.offsets.diff().long()
    samples = torch.repeat_interleave(torch.arange(len(data)), counts)
    values = torch.ones(data.nnz) if data.values is None else data.values
    if model.normalize:
        values = _unit_norm(data.indices, values.double(), data.offsets).float()
    kept = torch.bincount(samples[known], minlength=len(data))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return SparseBatch(data.indices[known], data.fields[known], values[known], offsets), missing


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


# ---------------------------------------------------------------- train


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train", type=Path, help="libffm text, or a folder that `convert` made")
    parser.add_argument("model", type=Path, nargs="?", help="default: TRAIN.model, here")
    libffm = parser.add_argument_group("as in libffm")
    libffm.add_argument(
        "-l",
        "--l2",
        dest="decay",
        type=float,
        metavar="LAMBDA",
        help="L2 (2e-5)",
    )
    libffm.add_argument(
        "-k", dest="embed_dim", type=int, metavar="FACTOR", help="latent factors (4)"
    )
    libffm.add_argument(
        "-t", dest="epochs", type=int, default=15, metavar="EPOCHS", help="epochs (15)"
    )
    libffm.add_argument("-r", dest="lr", type=float, metavar="ETA", help="learning rate (0.2)")
    libffm.add_argument("-s", dest="threads", type=threads, metavar="N", help="threads (1)")
    libffm.add_argument("-p", dest="valid", type=Path, metavar="PATH", help="validation data")
    libffm.add_argument("--quiet", action="store_true", help="print nothing")
    libffm.add_argument(
        "--no-norm", action="store_true", default=None, help="do not normalise samples"
    )
    libffm.add_argument(
        "--auto-stop", action="store_true", help="stop when the loss of -p does not fall"
    )
    more = parser.add_argument_group("beyond libffm")
    more.add_argument("--loss", choices=get_args(interop.Loss), help="default: logistic")
    more.add_argument(
        "--mode",
        choices=("exact", "hogwild", "deterministic"),
        help="default: exact with one thread, else hogwild",
    )
    more.add_argument("--optimizer", choices=sorted(OPTIMIZERS), help="default: adagrad")
    more.add_argument("--l1", type=float, metavar="L1", help="of ftrl: exact zeros (0)")
    more.add_argument("--beta", type=float, metavar="BETA", help="of ftrl (1)")
    more.add_argument("--bias", action="store_true", default=None, help="have a bias")
    more.add_argument(
        "--linear", action="store_true", default=None, help="have a weight for each feature"
    )
    more.add_argument(
        "--no-within-field", action="store_true", default=None, help="no pairs inside a field"
    )
    more.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the table (float32)")
    more.add_argument("--rounding-seed", type=seed, metavar="N", help="bfloat16: round at random")
    more.add_argument(
        "--init",
        choices=("uniform", "normal"),
        help="U(0, 1/√k) as libffm, the default, or small normal",
    )
    more.add_argument("--batch-size", type=int, metavar="N", help="of --mode deterministic (1024)")
    more.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="--auto-stop: after N epochs in a row without a new lowest loss of -p (1)",
    )
    more.add_argument("--seed", type=seed, metavar="N", help="of initial weights and order (0)")
    more.add_argument(
        "--no-shuffle", action="store_true", default=None, help="samples as they stand"
    )
    more.add_argument("--lenient", action="store_true", help="skip broken lines and count them")
    more.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="written after each epoch and on Ctrl-C, which alone writes MODEL.checkpoint by default; "
        "under torchrun a folder, written after each epoch",
    )
    more.add_argument("--checkpoint-every", type=int, metavar="N", help="and every N samples")
    more.add_argument(
        "--resume",
        type=Path,
        metavar="PATH",
        help="go on from a checkpoint, whose settings hold; what is written is --checkpoint",
    )
    more.add_argument(
        "--init-model",
        type=Path,
        metavar="PATH",
        help="start from the weights of a model, of any kind that predict reads",
    )
    more.add_argument(
        "--json", action="store_true", help="an object a line: epochs, then a summary"
    )
    more.add_argument(
        "--ranges",
        type=int,
        metavar="N",
        help="under torchrun: into how many ranges the data falls; runs with the same N have the same batches (64)",
    )


# What a checkpoint holds, so that only a new run is told it: what holds where it is not given.
_SETTINGS: dict[str, Any] = {
    **{"decay": 2e-5, "embed_dim": None, "lr": 0.2, "threads": 1, "no_norm": False},
    **{"loss": None, "mode": None, "optimizer": "adagrad", "l1": None, "beta": None},
    **{"bias": False, "linear": False, "no_within_field": False, "dtype": "float32"},
    **{"rounding_seed": None, "init": "uniform", "batch_size": None, "seed": 0},
    **{"no_shuffle": False},
}


def _settle(args: argparse.Namespace) -> None:
    """Fill in the settings that are not given.

    Raises:
        ValueError: one is given, and ``--resume`` is.
    """
    for name, default in _SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.resume is not None:
            raise ValueError(
                f"{_flag(name)} is for a new run, and --resume goes on with the settings of {args.resume}"
            )


def _new_trainer(
    args: argparse.Namespace, train: SparseDataset, valid: SparseDataset | None, kind: type[Trainer]
) -> Trainer:
    alone: Mode = "exact" if args.threads == 1 else "hogwild"
    mode: Mode = args.mode or (alone if kind is Trainer else "deterministic")
    if args.batch_size is not None and mode != "deterministic":
        raise ValueError(f"--batch-size is for --mode deterministic, not for {mode}")
    if mode == "exact" and args.threads > 1:
        raise ValueError(f"-s {args.threads}: --mode exact has one thread")
    model, loss = _new_model(args, train, valid)
    if valid is not None:
        # What valid alone has is 0, and stays so: as in libffm it takes no part, and changes nothing that is learnt.
        if kind is Trainer:
            unknown = sum(int((~_knows(model, shard.batch)).sum()) for shard in valid.shards)
            _report_unknown(unknown, valid.nnz, args.valid)
        N, F = model.interaction.num_features, model.interaction.num_fields
        model = _resized(model, max(N, valid.num_features), max(F, valid.num_fields))
    return kind(
        model,
        optimizer=_optimizer(args),
        loss=loss,
        mode=mode,
        batch_size=1024 if args.batch_size is None else args.batch_size,
        num_threads=args.threads,
        shuffle=not args.no_shuffle,
        seed=args.seed,
    )


def _optimizer(args: argparse.Namespace) -> Optimizer:
    kind = OPTIMIZERS[args.optimizer]
    own = {name: getattr(args, name) for name in ("l1", "beta")}
    own = {name: value for name, value in own.items() if value is not None}
    for name in own:
        if name not in kind.__dataclass_fields__:
            raise ValueError(f"--{name} is for --optimizer ftrl, not for {args.optimizer}")
    if args.rounding_seed is not None and args.dtype != "bfloat16":
        raise ValueError(f"--rounding-seed is for --dtype bfloat16, not for {args.dtype}")
    return kind(lr=args.lr, weight_decay=args.decay, rounding_seed=args.rounding_seed, **own)


def _new_model(
    args: argparse.Namespace, train: SparseDataset, valid: SparseDataset | None
) -> tuple[FFM, interop.Loss]:
    """A model for the samples that train it, its weights new or those of ``--init-model``, and its loss.

    Raises:
        ValueError: there is no memory for that, or not with what ``valid`` has besides.
    """
    start = None if args.init_model is None else load_as_told(args.init_model, args)
    old = None if start is None else start.model
    sizes = {args.train: (train.num_features, train.num_fields)}
    bias, linear = args.bias, args.linear
    within_field, normalize = not args.no_within_field, not args.no_norm
    embed_dim = 4 if args.embed_dim is None else args.embed_dim
    if old is not None:
        layer = old.interaction
        sizes[args.init_model] = (layer.num_features, layer.num_fields)
        bias, linear = bias or old.linear.bias is not None, linear or old.linear.weight is not None
        if args.embed_dim not in (None, layer.embed_dim):
            raise ValueError(
                f"-k {args.embed_dim}: {args.init_model} has {layer.embed_dim} factors"
            )
        if args.no_within_field and layer.within_field:
            raise ValueError(f"--no-within-field: {args.init_model} has pairs inside a field")
        embed_dim, within_field, normalize = layer.embed_dim, layer.within_field, old.normalize
    also = {} if valid is None else {args.valid: (valid.num_features, valid.num_fields)}
    _check_memory(sizes | also, embed_dim)
    torch.manual_seed(args.seed)
    model = FFM(
        embed_dim,
        num_features=max(1, *(n for n, _ in sizes.values())),
        num_fields=max(1, *(n for _, n in sizes.values())),
        within_field=within_field,
        bias=bias,
        linear=linear,
        normalize=normalize,
    )
    if args.init == "uniform":
        nn.init.uniform_(model.interaction.weight, 0, embed_dim**-0.5)
    model.interaction.to(getattr(torch, args.dtype))
    if old is not None:
        _copy_weights(old, model)
    return model, (None if start is None else start.loss) or args.loss or "logistic"


def _check_memory(sizes: Mapping[Path, tuple[int, int]], embed_dim: int) -> None:
    """See whether there is memory for a table, of which nothing is touched yet.

    Args:
        sizes: the features and fields of each input.

    Raises:
        ValueError: there is not.
    """
    most_features, (N, _) = max(sizes.items(), key=lambda found: found[1][0])
    most_fields, (_, F) = max(sizes.items(), key=lambda found: found[1][1])
    if not fits(N, F * max(1, embed_dim)):
        raise ValueError(
            f"{embed_dim} factors (-k) for features up to {N - 1} (in {most_features}) and fields up to {F - 1} "
            f"(in {most_fields}) need {4 * N * F * embed_dim} bytes, which are not to be had"
        )


@torch.no_grad()
def _copy_weights(old: FFM, new: FFM) -> None:
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
def _resized(model: FFM, num_features: int, num_fields: int) -> FFM:
    """The same model for so many features and fields; weights of new ones are 0."""
    layer = model.interaction
    if (num_features, num_fields) == (layer.num_features, layer.num_fields):
        return model
    sizes = {"num_features": num_features, "num_fields": num_fields}
    names = [str(f) for f in range(num_fields)]
    new = interop.model_from_arguments(
        {**interop.model_arguments(model), **sizes, "field_names": names}
    )
    new.interaction.to(layer.weight.dtype)
    for parameter in new.parameters():
        nn.init.zeros_(parameter)
    _copy_weights(model, new)
    return new


def _of_training(model: FFM, train: SparseDataset) -> FFM:
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
    return _resized(model, *kept)


def train(args: argparse.Namespace) -> None:
    if args.resume is not None and args.init_model is not None:
        raise ValueError("--init-model is where a new run starts, --resume goes on with an old one")
    if args.patience is not None and not args.auto_stop:
        raise ValueError("--patience is for --auto-stop")
    if args.auto_stop and args.valid is None:
        raise ValueError("--auto-stop needs -p, the samples whose loss it watches")
    for flag, number in (("-t", args.epochs), ("--patience", args.patience)):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number} must be positive")
    if args.checkpoint_every is not None and args.checkpoint is None:
        raise ValueError("--checkpoint-every is for --checkpoint")
    _settle(args)
    _check_data(args.lenient, args.train, args.valid)
    # torchrun has started this process, and others; these write nothing on Ctrl-C.
    together = "TORCHELASTIC_RUN_ID" in os.environ
    target, checkpoint, written = _target(args), args.checkpoint, "--checkpoint"
    if checkpoint is None and not together:
        checkpoint, written = Path(f"{target}.checkpoint"), "on Ctrl-C, the file"
    data_read = {"TRAIN": args.train, "-p": args.valid}
    # A checkpoint may be that of --resume, and a model may take the place of the one that it starts from. A folder of
    # checkpoints may hold the model, too.
    _check_apart(
        {"MODEL": target}, {"--checkpoint": args.checkpoint, "--resume": args.resume}, inside=False
    )
    _check_apart({"MODEL": target}, data_read)
    _check_apart({written: checkpoint}, {**data_read, "--init-model": args.init_model})
    if together:
        if args.resume is not None and args.resume.is_file():
            raise ValueError(
                f"--resume {args.resume}: under torchrun it is a folder, and a file is what one process goes on with; "
                "--init-model starts a new run from its weights"
            )
        _train_together(args)
        return
    if args.ranges is not None:
        raise ValueError("--ranges is for training under torchrun")
    if args.resume is not None and _is_checkpoint_folder(args.resume):
        raise ValueError(
            f"--resume {args.resume}: these checkpoints were written under torchrun, which goes on with them in any "
            "number of processes; --init-model starts a new run from their weights"
        )
    check_writable(target)
    assert checkpoint is not None
    check_writable(checkpoint)
    data = load_data(args.train, args.lenient)
    valid = None if args.valid is None else load_data(args.valid, args.lenient)
    _check_samples(args, len(data), None if valid is None else len(valid))
    trainer = Trainer.load(args.resume) if args.resume else _new_trainer(args, data, valid, Trainer)

    def validate() -> tuple[Tensor, Tensor, Tensor]:
        assert valid is not None
        labels = torch.cat([part.labels for part in valid.shards])
        return scores(trainer.model, valid)[0], labels, weights_of(valid)

    def keep() -> str:
        if args.checkpoint is None:  # fit has written one that it was told of
            trainer.save(checkpoint)
        return f"go on with {_how_to_resume(args, checkpoint)}"

    _fit(args, trainer, data, valid, validate, keep)


def _target(args: argparse.Namespace) -> Path:
    # `.` has a name, too.
    return args.model or Path(f"{os.path.basename(os.path.abspath(args.train))}.model")


def _check_samples(args: argparse.Namespace, train: int, valid: int | None) -> None:
    """See whether there is something to train with, and to validate with where ``valid`` is a number of samples."""
    for path, samples in ((args.train, train), (args.valid, valid)):
        if samples == 0:
            raise ValueError(f"{path}: no samples")


def _how_to_resume(args: argparse.Namespace, checkpoint: Path) -> str:
    """The flags that go on with a checkpoint as the run would have: it holds none of what is for data and ``fit``."""
    flags = ["--resume", str(checkpoint), "-t", str(args.epochs)]
    flags += ["--auto-stop"] * args.auto_stop
    flags += [] if args.patience is None else ["--patience", str(args.patience)]
    flags += [] if args.valid is None else ["-p", str(args.valid)]
    flags += ["--lenient"] * args.lenient
    for name in ("checkpoint", "checkpoint_every", "ranges"):
        value = getattr(args, name)
        flags += [] if value is None else [_flag(name), str(value)]
    return shlex.join(flags)


def _train_together(args: argparse.Namespace) -> None:
    """The same as one of several processes; the first alone prints, and writes the model."""
    import torch.distributed as dist

    from ..distributed import DistributedTrainer, Share, read_share
    from ..distributed._group import Group, join_torchrun
    from ..distributed._training import newest_checkpoint

    join_torchrun()
    members = Group()
    first = members.rank == 0
    args.quiet |= not first
    members.together(lambda: check_writable(_target(args)) if first else None)

    def read(path: Path) -> Share:
        ranges = 64 if args.ranges is None else args.ranges
        found = read_share(path, ranges=ranges, lenient=args.lenient, num_threads=args.threads)
        if first:
            _report_skipped(found.data.metadata.get("skipped", 0), path)
        return found

    data = read(args.train)
    valid = None if args.valid is None else read(args.valid)
    _check_samples(args, data.num_samples, None if valid is None else valid.num_samples)
    resume = args.resume
    # After a failure the agent starts all processes again, with the arguments of the first time.
    if args.checkpoint is not None and newest_checkpoint(args.checkpoint):
        resume = args.checkpoint
    if first and resume is not None:
        print(f"going on from {resume}", file=sys.stderr)
    trainer = (
        DistributedTrainer.load(resume)
        if resume
        else _new_trainer(
            args, data.data, None if valid is None else valid.data, DistributedTrainer
        )
    )

    def validate() -> tuple[Tensor, Tensor, Tensor]:
        assert valid is not None
        labels = torch.cat([torch.zeros(0), *(part.labels for part in valid.data.shards)])
        score = scores(trainer.model, valid.data)[0]
        score, labels, weights = members.cat(score, labels, weights_of(valid.data))
        return score, labels, weights

    def keep() -> str:
        if args.checkpoint is None or newest_checkpoint(args.checkpoint) is None:
            return "no checkpoint was written"
        return f"{_how_to_resume(args, args.checkpoint)} goes on from the last checkpoint there"

    _fit(args, trainer, data, valid, validate, keep, first=first)
    members.barrier()
    dist.destroy_process_group()


def _fit(
    args: argparse.Namespace,
    trainer: Trainer,
    data: Any,
    valid: Any,
    validate: Callable[[], tuple[Tensor, Tensor, Tensor]],
    keep: Callable[[], str],
    *,
    first: bool = True,
) -> None:
    """Train, write the model, and say how good it is: the scores, labels and weights of
    ``validate()``.

    On Ctrl-C ``keep()`` sees to it that a checkpoint is there where one can be, and says how to go on.
    """
    target = _target(args)
    start = time.perf_counter()
    if first and 0 < args.epochs <= trainer.epoch:
        print(
            f"nothing is left to train: the checkpoint has {trainer.epoch} epochs, and -t {args.epochs} means in all",
            file=sys.stderr,
        )
    samples: SparseDataset = data if isinstance(data, SparseDataset) else data.data
    if type(trainer) is Trainer:  # others have a part of the data
        _warn_of_data(args, trainer, samples)
    with _progress(args) as (show, line):
        if not args.json:
            line(_table_head(trainer.loss, valid is not None))
        elapsed = [sum(epoch.seconds for epoch in trainer.history)]

        def callback(progress: Progress) -> None:
            show(progress)
            if progress.finished is not None:
                elapsed[0] += progress.finished.seconds
                line(_epoch_text(progress.finished, elapsed[0], args.json))

        try:
            trainer.fit(
                data,
                valid,
                epochs=args.epochs,
                auto_stop=args.auto_stop,
                patience=1 if args.patience is None else args.patience,
                callback=callback,
                checkpoint=args.checkpoint,
                checkpoint_every=args.checkpoint_every,
            )
        except KeyboardInterrupt:
            if first:
                print(f"\nstopped; {keep()}", file=sys.stderr)
            raise
    if first:
        interop.save_model(_of_training(trainer.model, samples), target, loss=trainer.loss)
    summary: dict[str, Any] = {
        "model": str(target),
        "epochs": trainer.epoch,
        "seconds": round(time.perf_counter() - start, 3),
    }
    if args.auto_stop and trainer.history:
        best = min(
            trainer.history, key=lambda e: math.inf if e.valid_loss is None else e.valid_loss
        )
        summary["best_epoch"] = best.epoch
    if args.json:
        summary["skipped"] = samples.metadata.get("skipped", 0)
    if valid is not None:
        summary |= {f"valid_{k}": v for k, v in quality(*validate(), trainer.loss).items()}
    _print_line(args, _json(summary) if args.json else _summary_text(summary))


def _warn_of_data(args: argparse.Namespace, trainer: Trainer, samples: SparseDataset) -> None:
    """Say what may be a mistake about the data."""
    before = trainer.history[-1].samples if args.resume is not None and trainer.history else None
    if before not in (None, len(samples)):
        print(
            f"{args.train}: {len(samples)} samples, and the last epoch of {args.resume} had {before}; "
            "--init-model starts a new run on other data",
            file=sys.stderr,
        )
    if trainer.loss == "logistic" and all((shard.labels > 0).all() for shard in samples.shards):
        print(
            f"{args.train}: all labels are above 0, which is one class; --loss squared learns numbers",
            file=sys.stderr,
        )


def _summary_text(summary: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.5f}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items()
    )


def _print_line(args: argparse.Namespace, text: str) -> None:
    """A line on standard output. Training is no less wanted where nobody reads it any more."""
    if args.quiet:
        return
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"standard output: {error.strerror}; training goes on", file=sys.stderr)
        discard_output()


def _table_head(loss: str, has_valid: bool) -> str:
    name = "logloss" if loss == "logistic" else "loss"
    columns = [f"tr_{name}", *([f"va_{name}"] if has_valid else []), "tr_time"]
    return "   ".join(["iter", *(f"{column:>10}" for column in columns)])


def _epoch_text(epoch: Epoch, elapsed: float, as_json: bool) -> str:
    if as_json:
        return _json(epoch._asdict())
    valid = "" if epoch.valid_loss is None else f"   {epoch.valid_loss:10.5f}"
    return f"{epoch.epoch:4d}   {epoch.train_loss:10.5f}{valid}   {elapsed:10.1f}"


@contextmanager
def _progress(
    args: argparse.Namespace,
) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """What shows progress, and what prints a line: a live bar where there is a terminal and rich, else lines alone."""
    plain = partial(_print_line, args)
    if args.quiet or args.json or not sys.stderr.isatty() or find_spec("rich") is None:
        yield (lambda progress: None), plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.5f}  {task.fields[rate]:,.0f} samples/s"),
        TimeRemainingColumn(),
    )
    # Lines go above the bar where both are on the terminal, and to where stdout goes where it is redirected.
    console, above = Console(stderr=True), sys.stdout.isatty()
    with Bar(*columns, console=console, transient=True, redirect_stdout=above) as bar:
        task = bar.add_task("train", total=None, epoch="1", loss=math.nan, rate=0.0)

        def show(progress: Progress) -> None:
            bar.update(
                task,
                total=progress.total * progress.epochs,
                completed=progress.total * (progress.epoch - 1) + progress.samples,
                epoch=f"{progress.epoch}/{progress.epochs}",
                loss=progress.loss,
                rate=progress.samples / max(progress.seconds, 1e-9),
            )

        yield show, plain


# ---------------------------------------------------------------- predict


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("test", type=Path, help="libffm text, or a folder that `convert` made")
    parser.add_argument(
        "model", type=Path, help="of ffm_ext, libffm, xLearn or torchfm, or a checkpoint"
    )
    parser.add_argument("output", type=Path, nargs="?", help="a number a line; default: stdout")
    parser.add_argument("--logit", action="store_true", help="scores instead of probabilities")
    unsaid_arguments(parser)
    parser.add_argument("--lenient", action="store_true", help="skip broken lines and count them")
    parser.add_argument("--json", action="store_true", help="the summary as an object")


def predict(args: argparse.Namespace) -> None:
    if args.output is not None:
        check_writable(args.output)
        _check_apart({"OUTPUT": args.output}, {"TEST": args.test, "MODEL": args.model})
    _check_data(args.lenient, args.test)
    model, _, said, _ = load_as_told(args.model, args)
    loss = said or "logistic"
    skipped = missing = entries = 0
    all_scores, all_labels, all_weights = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)]
    with _output(args.output) as file:
        for data in data_in_pieces(args.test, args.lenient):
            score, unknown = scores(model, data)
            wrong = (~score.isfinite()).nonzero()
            if len(wrong):
                number = sum(map(len, all_scores)) + int(wrong[0]) + 1
                raise ValueError(
                    f"{args.test}: the score of sample {number}, counted from 1, is {score[wrong[0]].item()}; "
                    f"{args.model} has weights that are not finite, or the values are too large for it"
                )
            shown = score if args.logit or loss == "squared" else torch.sigmoid(score)
            file.write("".join(map("{:.6g}\n".format, shown.tolist())))
            missing += unknown
            entries += data.nnz
            skipped += int(data.metadata.get("skipped", 0))
            all_scores.append(score)
            all_labels += [shard.labels for shard in data.shards]
            all_weights.append(weights_of(data))
    score = torch.cat(all_scores)
    summary: dict[str, Any] = {
        "samples": len(score),
        **quality(score, torch.cat(all_labels), torch.cat(all_weights), loss),
    }
    if args.json:
        summary |= {"entries": entries, "unknown_entries": missing, "skipped": skipped}
    else:
        _report_skipped(skipped, args.test)
        _report_unknown(missing, entries, args.test)
    # Predictions on stdout stay alone there.
    print(
        _json(summary) if args.json else _summary_text(summary),
        file=sys.stderr if args.output is None else sys.stdout,
    )


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is there only when it is whole."""
    if path is None:
        yield sys.stdout
    elif is_stream(path):
        try:
            with open(path, "w") as file:  # line by line, as they come
                yield file
        except BrokenPipeError as error:
            raise BrokenPipeError(error.errno, error.strerror, str(path)) from error
    else:
        with atomic_write(path) as new, open(new, "w") as file:
            yield file


# ---------------------------------------------------------------- check


def check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="libffm text, or a folder that `convert` made")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def check(args: argparse.Namespace) -> None:
    _check_data(False, args.file)
    problems, skipped = list[str](), 0
    rows = num_entries = positive = 0
    label_sum, low, high = 0.0, math.inf, -math.inf
    pairs = torch.zeros(0, 2, dtype=torch.int64)  # each (field, feature) that occurs, once
    entries = torch.zeros(0, 2, dtype=torch.int64)  # each field that occurs, and how many it has
    for data in data_in_pieces(args.file, lenient=True):
        problems += data.metadata.get("problems", [])
        skipped += int(data.metadata.get("skipped", 0))
        for batch, labels, _ in data.shards:
            rows += len(labels)
            num_entries += batch.nnz
            positive += int((labels > 0).sum())
            label_sum += float(labels.double().sum())
            both = torch.stack([batch.fields.long(), batch.indices.long()], 1)
            pairs = torch.cat([pairs, _unique_pairs(both)])
            entries = _added(entries, torch.stack(both[:, 0].unique(return_counts=True), 1))
            if batch.nnz:
                values = torch.ones(1) if batch.values is None else batch.values
                low, high = min(low, float(values.min())), max(high, float(values.max()))
        pairs = _unique_pairs(pairs)
    found: dict[str, Any] = {
        "broken lines": skipped,
        "rows": rows,
        "entries": num_entries,
        "entries a row": round(num_entries / max(1, rows), 3),
        "features": len(pairs[:, 1].unique()),
        "largest feature": int(pairs[:, 1].max()) if len(pairs) else -1,
        "fields": len(entries),
        "largest field": int(entries[-1, 0]) if len(entries) else -1,
        "labels > 0": round(positive / rows, 6) if rows else None,
        "label mean": round(label_sum / rows, 6) if rows else None,
        "values": [low, high] if num_entries else None,
        "numbers of the fields": entries[:, 0].tolist(),
        "features of each field": pairs[:, 0].unique(return_counts=True)[1].tolist(),
        "entries of each field": entries[:, 1].tolist(),
    }
    if args.json:
        print(_json({"file": str(args.file), "problems": list(problems), **found}))
    else:
        for problem in problems:
            print(problem)
        if skipped > len(problems):
            print(f"… and {skipped - len(problems)} more")
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {value}")
    if skipped:
        raise ValueError(f"{args.file}: {skipped} broken lines")


def _added(counts: Tensor, more: Tensor) -> Tensor:
    """Two lists ``[n, 2]`` of numbers and their counts as one, by number."""
    both = torch.cat([counts, more])
    numbers, places = both[:, 0].unique(return_inverse=True)
    sums = torch.zeros_like(numbers).index_add(0, places, both[:, 1])
    return torch.stack([numbers, sums], 1)


def _unique_pairs(pairs: Tensor) -> Tensor:
    """The rows of ``[n, 2]`` int64 without repetition."""
    if len(pairs) == 0:
        return pairs
    width = int(pairs[:, 1].max()) + 1
    if int(pairs[:, 0].max()) < 2**62 // width:
        keys = (pairs[:, 0] * width + pairs[:, 1]).unique()  # much faster than unique(dim=0)
        return torch.stack([keys // width, keys % width], 1)
    return pairs.unique(dim=0)


# ---------------------------------------------------------------- convert

FORMATS = {
    "model": "a model of ffm_ext",
    "libffm": "libffm's binary model",
    "libffm-text": "libffm's text model",
    "xlearn": "xLearn's text model",
    "torchfm": "torchfm's state_dict, as safetensors where TARGET ends in .safetensors, else as torch.save does",
    "dataset": "a memory-mapped dataset folder, from libffm text",
    "text": "libffm text, from a dataset folder",
}


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a model of any kind that predict reads, or data")
    parser.add_argument("target", type=Path)
    listed = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("--to", choices=sorted(FORMATS), required=True, help=listed)
    unsaid_arguments(parser)
    parser.add_argument("--lenient", action="store_true", help="skip broken lines and count them")
    parser.add_argument("--json", action="store_true", help="what was written, as an object")


def convert(args: argparse.Namespace) -> None:
    _check_apart({"TARGET": args.target}, {"SOURCE": args.source})
    if args.to in ("dataset", "text"):
        for name in ("loss", "no_norm"):
            if getattr(args, name):
                raise ValueError(f"{_flag(name)} is for models, not for --to {args.to}")
        _convert_data(args)
    else:
        if args.lenient:
            raise ValueError(f"--lenient is for data, not for --to {args.to}")
        _convert_model(args)
    if args.json:
        found: dict[str, Any]
        if is_stream(args.target):  # it has gone to a reader
            found = {}
        elif (
            args.to == "text"
        ):  # of which the size is all that one can say without reading it again
            found = {"bytes": args.target.stat().st_size}
        else:
            found = describe(args.target)
        print(_json({"target": str(args.target), "to": args.to, **found}))


def _convert_data(args: argparse.Namespace) -> None:
    _check_data(args.lenient, args.source)
    if args.to == "dataset":
        if _is_inside(args.source, args.target):  # which is replaced with all that is in it
            raise ValueError(
                f"TARGET {args.target} would take the place of SOURCE {args.source}, which is inside"
            )
        if not args.target.is_dir():
            check_writable(args.target)
        if args.source.is_dir():
            raise ValueError(f"{args.source}: --to dataset takes libffm text, and that is a folder")
        data = convert_libffm(args.source, args.target, lenient=args.lenient)
        _report_skipped(data.metadata.get("skipped", 0), args.source)
    else:
        check_writable(args.target)
        write_libffm(load_data(args.source, args.lenient), args.target)


def _convert_model(args: argparse.Namespace) -> None:
    check_writable(args.target)
    model, _, loss, _ = load_as_told(args.source, args)
    if args.to == "model":
        interop.save_model(model, args.target, loss=loss)
        return
    if args.to == "xlearn":
        interop.save_xlearn_text(model, args.target)
        unsaid = ["--no-norm"] * (not model.normalize) + ["--loss squared"] * (loss == "squared")
        if unsaid:
            print(f"{args.target}: the format leaves out {' and '.join(unsaid)}", file=sys.stderr)
        return
    if loss == "squared":
        raise ValueError(
            f"--to {args.to}: {args.source} was trained with squared loss, and there all is logistic"
        )
    if args.to == "torchfm":
        is_safetensors = args.target.suffix == ".safetensors"
        interop.save_torchfm(model, args.target, format="safetensors" if is_safetensors else "pt")
    else:
        interop.save_libffm(model, args.target, format="binary" if args.to == "libffm" else "text")


def describe(path: Path) -> dict[str, Any]:
    """What a model, checkpoint or dataset is."""
    if path.is_dir() and not _is_checkpoint_folder(path):
        data = open_dataset(path)
        return {
            "kind": "ffm_ext dataset",
            "samples": len(data),
            "entries": data.nnz,
            "skipped": data.metadata.get("skipped", 0),
            "num_features": data.num_features,
            "num_fields": data.num_fields,
            "shards": len(data.shards),
        }
    model, kind, loss, trainer = load_any_model(path)
    layer = model.interaction
    return {
        "kind": kind,
        "num_features": layer.num_features,
        "num_fields": layer.num_fields,
        "embed_dim": layer.embed_dim,
        "dtype": str(layer.weight.dtype).removeprefix("torch."),
        "within_field": layer.within_field,
        "normalize": model.normalize,
        "bias": model.linear.bias is not None,
        "linear": model.linear.weight is not None,
        **({} if loss is None else {"loss": loss}),
        **({} if trainer is None else _progress_of(trainer)),
    }


def _progress_of(trainer: Trainer) -> dict[str, Any]:
    """How far a checkpoint is, and the settings that it goes on with."""
    optimizer = trainer.optimizer
    return {
        "epochs": trainer.epoch,
        "samples_of_next_epoch": trainer.state_dict()["position"]["samples"],
        "mode": trainer.mode,
        "batch_size": trainer.batch_size,
        "shuffle": trainer.shuffle,
        "seed": trainer.seed,
        "optimizer": optimizer.name,
        **asdict(optimizer),
    }
