# SPDX-License-Identifier: MIT
"""The command line, ``ffm-ext`` or ``python -m ffm_ext``.

A subcommand is one entry of ``COMMANDS``: what it takes, and a function that hands that on to the package.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .._build_info import __version__, build_info, library_path
from . import _models

__all__ = ["main"]


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


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_results"),
        metavar="DIR",
        help="folder of the plots (default: demo_results)",
    )
    parser.add_argument(
        "--seed",
        type=_models.seed,
        default=0,
        help="of the initial weights and the shuffling (default: 0)",
    )
    parser.add_argument(
        "--threads", type=_models.threads, default=1, metavar="N", help="of torch (default: 1)"
    )


def _demo(args: argparse.Namespace) -> None:
    from ..demo import run_demo

    run_demo(args.out, seed=args.seed, threads=args.threads)


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, nargs="?", help="a model, checkpoint or dataset to describe instead"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _info(args: argparse.Namespace) -> None:
    info = dict(build_info()) if args.file is None else _models.describe(args.file)
    if args.file is None:
        info["library"] = str(library_path())
    if args.json:
        print(json.dumps(info, indent=2))
        return
    width = max(map(len, info))
    for name, value in info.items():
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        print(f"{name:<{width}}  {text}")


COMMANDS: dict[str, Command] = {
    "train": Command(
        help="train a model on libffm text, with libffm's flags",
        add_arguments=_models.train_arguments,
        run=_models.train,
    ),
    "predict": Command(
        help="predict libffm text with a model of ffm_ext, libffm, xLearn or torchfm",
        add_arguments=_models.predict_arguments,
        run=_models.predict,
        only_prints=lambda args: args.output is None,
    ),
    "check": Command(
        help="tell what is wrong with a libffm text, where, and what is in it",
        add_arguments=_models.check_arguments,
        run=_models.check,
        only_prints=lambda args: True,
    ),
    "convert": Command(
        help="convert models between ffm_ext, libffm, xLearn and torchfm, and data between text and datasets",
        add_arguments=_models.convert_arguments,
        run=_models.convert,
    ),
    "demo": Command(
        help="train an FFM on data that comes with the package, and time the fused layer here",
        add_arguments=_demo_arguments,
        run=_demo,
        packages={"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"},
        extras="bench,cli,sklearn",
    ),
    "info": Command(
        help="print what was built and what it runs on, or what a file is",
        add_arguments=_info_arguments,
        run=_info,
        only_prints=lambda args: True,
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="ffm-ext", description="Field-aware factorization machines for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"ffm-ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            subparsers.add_parser(name, help=command.help, description=command.help)
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; ``None`` = those of the process.

    Returns:
        The exit status: 0, 1 for an error that is shown on stderr, 130 where the user interrupted. Wrong arguments exit
        with 2, as usual with argparse.
    """
    _prepare_output()
    args = make_parser().parse_args(argv)

    command = COMMANDS[args.command]
    error: object = command.missing()
    if error is None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = partial(_show_warning, args.command)
                command.run(args)
            sys.stdout.flush()
            return 0
        except BrokenPipeError as caught:
            _models.discard_output()
            if command.only_prints(args):
                return 0
            error = caught
        except KeyboardInterrupt:
            return 130
        except (OSError, ValueError, IndexError, FloatingPointError, MemoryError) as caught:
            if os.environ.get("FFM_EXT_DEBUG"):
                raise
            error = caught
    print(f"ffm-ext {args.command}: {error}", file=sys.stderr)
    return 1


def _prepare_output() -> None:
    """Let standard output and error take any text: what is closed is there, and what cannot be encoded is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the caller has closed it (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_warning(command: str, message: Warning | str, *place: object) -> None:
    """A line, without the place in the code that Python names."""
    print(f"ffm-ext {command}: {message}", file=sys.stderr)
