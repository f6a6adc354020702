# SPDX-License-Identifier: MIT
"""What a subcommand is, and what several have in common: arguments, paths, and what is printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._arguments import MOST_THREADS
from .._files import is_same_file


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        help: what it does, in a line.
        add_arguments: tells the parser what it takes.
        run: does it. What a file or an argument is to blame for (OSError, ValueError, IndexError, FloatingPointError)
            is the user's to mend: it is shown without a traceback, unless FFM_EXT_DEBUG is set.
        only_prints: whether standard output is all that comes of it: a reader who goes (`| head`) has had enough.
        packages: the optional packages that ``run`` imports, import name -> name to install.
        extras: the extras of this package that bring them.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    packages: Mapping[str, str] = field(default_factory=dict)
    extras: str = ""
    only_prints: Callable[[argparse.Namespace], bool] = lambda args: False

    def missing(self) -> str | None:
        """What has to be installed first, if anything."""
        names = [name for module, name in self.packages.items() if find_spec(module) is None]
        if not names:
            return None
        return (
            f"needs {' and '.join(names)}. Install with `python -m pip install 'ffm-ext[{self.extras}]'`, "
            f"in a source tree `python -m pip install '.[{self.extras}]'`."
        )


def seed(text: str) -> int:
    """A seed that torch and the operators, which take 64 bits with a sign, can be given."""
    return _in_range(text, 0, (1 << 63) - 1)


def threads(text: str) -> int:
    """A number of threads that a trainer takes."""
    return _in_range(text, 1, MOST_THREADS)


def _in_range(text: str, least: int, most: int) -> int:
    number = int(text)
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{number} is not from {least} to {most}")
    return number


def flag(name: str) -> str:
    """What the user calls an argument."""
    letters = {"decay": "-l", "embed_dim": "-k", "lr": "-r", "threads": "-s"}
    return letters.get(name, f"--{name.replace('_', '-')}")


def check_apart(
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
            if inside and is_inside(path, source):
                raise ValueError(f"{name} {path} would be written into {other} {source}")


def is_inside(path: Path, folder: Path) -> bool:
    return (
        folder.is_dir() and Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
    )


def discard_output() -> None:
    """Send what comes on standard output, now and at the interpreter's exit, nowhere: its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# No NaN or Infinity, which are no JSON: ValueError.
to_json = partial(json.dumps, allow_nan=False)


def summary_text(summary: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.5f}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items()
    )
