# SPDX-License-Identifier: MIT
"""``ffm-ext train``."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .. import interop
from .._arguments import Loss
from .._files import check_writable
from ..data import SparseDataset
from ..data._dataset import weights_of
from ..memory import fits
from ..modules import FFM
from ..optim import OPTIMIZERS, Optimizer
from ..training import Mode, Progress, Trainer
from ._command import Command, check_apart, flag, seed, summary_text, threads, to_json
from ._data import check_data, load_data, report_skipped
from ._models import (
    copy_weights,
    is_checkpoint_folder,
    knows,
    load_as_told,
    of_training,
    quality,
    report_unknown,
    resized,
    scores,
)
from ._progress import epoch_text, print_line, progress_bar, table_head


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    more.add_argument("--loss", choices=get_args(Loss), help="default: logistic")
    more.add_argument(
        "--mode",
        choices=get_args(Mode),
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
                f"{flag(name)} is for a new run, and --resume goes on with the settings of {args.resume}"
            )


def run(args: argparse.Namespace) -> None:
    if args.resume is not None and args.init_model is not None:
        raise ValueError("--init-model is where a new run starts, --resume goes on with an old one")
    if args.patience is not None and not args.auto_stop:
        raise ValueError("--patience is for --auto-stop")
    if args.auto_stop and args.valid is None:
        raise ValueError("--auto-stop needs -p, the samples whose loss it watches")
    for name, number in (("-t", args.epochs), ("--patience", args.patience)):
        if number is not None and number < 1:
            raise ValueError(f"{name} {number} must be positive")
    if args.checkpoint_every is not None and args.checkpoint is None:
        raise ValueError("--checkpoint-every is for --checkpoint")
    _settle(args)
    check_data(args.lenient, args.train, args.valid)
    # torchrun has started this process, and others; these write nothing on Ctrl-C.
    together = "TORCHELASTIC_RUN_ID" in os.environ
    target, checkpoint, written = _target(args), args.checkpoint, "--checkpoint"
    if checkpoint is None and not together:
        checkpoint, written = Path(f"{target}.checkpoint"), "on Ctrl-C, the file"
    data_read = {"TRAIN": args.train, "-p": args.valid}
    # A checkpoint may be that of --resume, and a model may take the place of the one that it starts from. A folder of
    # checkpoints may hold the model, too.
    check_apart(
        {"MODEL": target}, {"--checkpoint": args.checkpoint, "--resume": args.resume}, inside=False
    )
    check_apart({"MODEL": target}, data_read)
    check_apart({written: checkpoint}, {**data_read, "--init-model": args.init_model})
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
    if args.resume is not None and is_checkpoint_folder(args.resume):
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
        flags += [] if value is None else [flag(name), str(value)]
    return shlex.join(flags)


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
            unknown = sum(int((~knows(model, shard.batch)).sum()) for shard in valid.shards)
            report_unknown(unknown, valid.nnz, args.valid)
        N, F = model.interaction.num_features, model.interaction.num_fields
        model = resized(model, max(N, valid.num_features), max(F, valid.num_fields))
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
) -> tuple[FFM, Loss]:
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
        copy_weights(old, model)
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
            report_skipped(found.data.metadata.get("skipped", 0), path)
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
    with progress_bar(args) as (show, line):
        if not args.json:
            line(table_head(trainer.loss, valid is not None))
        elapsed = [sum(epoch.seconds for epoch in trainer.history)]

        def callback(progress: Progress) -> None:
            show(progress)
            if progress.finished is not None:
                elapsed[0] += progress.finished.seconds
                line(epoch_text(progress.finished, elapsed[0], args.json))

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
        interop.save_model(of_training(trainer.model, samples), target, loss=trainer.loss)
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
    print_line(args, to_json(summary) if args.json else summary_text(summary))


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


COMMAND = Command(
    help="train a model on libffm text, with libffm's flags",
    add_arguments=add_arguments,
    run=run,
)
