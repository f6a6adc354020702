# SPDX-License-Identifier: MIT
"""The command line, ``ffm-ext`` or ``python -m ffm_ext``.

A subcommand is a file, and an entry of ``COMMANDS``: what it takes, and a function that hands that on to the package.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial

from .._build_info import __version__
from . import _check, _convert, _demo, _info, _predict, _train
from ._command import Command, discard_output

__all__ = ["main"]

COMMANDS: dict[str, Command] = {
    "train": _train.COMMAND,
    "predict": _predict.COMMAND,
    "check": _check.COMMAND,
    "convert": _convert.COMMAND,
    "demo": _demo.COMMAND,
    "info": _info.COMMAND,
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
            discard_output()
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
