# SPDX-License-Identifier: MIT
"""What ``train`` shows: a line an epoch, and a live bar."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

from ..training import Epoch, Progress
from ._command import discard_output, to_json


def print_line(args: argparse.Namespace, text: str) -> None:
    """A line on standard output. Training is no less wanted where nobody reads it any more."""
    if args.quiet:
        return
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"standard output: {error.strerror}; training goes on", file=sys.stderr)
        discard_output()


def table_head(loss: str, has_valid: bool) -> str:
    name = "logloss" if loss == "logistic" else "loss"
    columns = [f"tr_{name}", *([f"va_{name}"] if has_valid else []), "tr_time"]
    return "   ".join(["iter", *(f"{column:>10}" for column in columns)])


def epoch_text(epoch: Epoch, elapsed: float, as_json: bool) -> str:
    if as_json:
        return to_json(epoch._asdict())
    valid = "" if epoch.valid_loss is None else f"   {epoch.valid_loss:10.5f}"
    return f"{epoch.epoch:4d}   {epoch.train_loss:10.5f}{valid}   {elapsed:10.1f}"


@contextmanager
def progress_bar(
    args: argparse.Namespace,
) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """What shows progress, and what prints a line: a live bar where there is a terminal and rich, else lines alone."""
    plain = partial(print_line, args)
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
