# SPDX-License-Identifier: MIT
"""``ffm-ext convert``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import interop
from .._files import check_writable, is_stream
from ..data import convert_libffm, write_libffm
from ._command import Command, check_apart, flag, is_inside, to_json
from ._data import check_data, load_data, report_skipped
from ._info import describe
from ._models import load_as_told, unsaid_arguments

FORMATS = {
    "model": "a model of ffm_ext",
    "libffm": "libffm's binary model",
    "libffm-text": "libffm's text model",
    "xlearn": "xLearn's text model",
    "torchfm": "torchfm's state_dict, as safetensors where TARGET ends in .safetensors, else as torch.save does",
    "dataset": "a memory-mapped dataset folder, from libffm text",
    "text": "libffm text, from a dataset folder",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a model of any kind that predict reads, or data")
    parser.add_argument("target", type=Path)
    listed = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("--to", choices=sorted(FORMATS), required=True, help=listed)
    unsaid_arguments(parser)
    parser.add_argument("--lenient", action="store_true", help="skip broken lines and count them")
    parser.add_argument("--json", action="store_true", help="what was written, as an object")


def run(args: argparse.Namespace) -> None:
    check_apart({"TARGET": args.target}, {"SOURCE": args.source})
    if args.to in ("dataset", "text"):
        for name in ("loss", "no_norm"):
            if getattr(args, name):
                raise ValueError(f"{flag(name)} is for models, not for --to {args.to}")
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
        print(to_json({"target": str(args.target), "to": args.to, **found}))


def _convert_data(args: argparse.Namespace) -> None:
    check_data(args.lenient, args.source)
    if args.to == "dataset":
        if is_inside(args.source, args.target):  # which is replaced with all that is in it
            raise ValueError(
                f"TARGET {args.target} would take the place of SOURCE {args.source}, which is inside"
            )
        if not args.target.is_dir():
            check_writable(args.target)
        if args.source.is_dir():
            raise ValueError(f"{args.source}: --to dataset takes libffm text, and that is a folder")
        data = convert_libffm(args.source, args.target, lenient=args.lenient)
        report_skipped(data.metadata.get("skipped", 0), args.source)
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


COMMAND = Command(
    help="convert models between ffm_ext, libffm, xLearn and torchfm, and data between text and datasets",
    add_arguments=add_arguments,
    run=run,
)
