# SPDX-License-Identifier: MIT
"""``ffm-ext predict``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from .._files import atomic_write, check_writable, is_stream
from ..data._dataset import weights_of
from ._command import Command, check_apart, summary_text, to_json
from ._data import check_data, data_in_pieces, report_skipped
from ._models import load_as_told, quality, report_unknown, scores, unsaid_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("test", type=Path, help="libffm text, or a folder that `convert` made")
    parser.add_argument(
        "model", type=Path, help="of ffm_ext, libffm, xLearn or torchfm, or a checkpoint"
    )
    parser.add_argument("output", type=Path, nargs="?", help="a number a line; default: stdout")
    parser.add_argument("--logit", action="store_true", help="scores instead of probabilities")
    unsaid_arguments(parser)
    parser.add_argument("--lenient", action="store_true", help="skip broken lines and count them")
    parser.add_argument("--json", action="store_true", help="the summary as an object")


def run(args: argparse.Namespace) -> None:
    if args.output is not None:
        check_writable(args.output)
        check_apart({"OUTPUT": args.output}, {"TEST": args.test, "MODEL": args.model})
    check_data(args.lenient, args.test)
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
        report_skipped(skipped, args.test)
        report_unknown(missing, entries, args.test)
    # Predictions on stdout stay alone there.
    print(
        to_json(summary) if args.json else summary_text(summary),
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


COMMAND = Command(
    help="predict libffm text with a model of ffm_ext, libffm, xLearn or torchfm",
    add_arguments=add_arguments,
    run=run,
    only_prints=lambda args: args.output is None,
)
