# SPDX-License-Identifier: MIT
"""``ffm-ext demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._command import Command, seed, threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_results"),
        metavar="DIR",
        help="folder of the plots (default: demo_results)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="of the initial weights and the shuffling (default: 0)",
    )
    parser.add_argument(
        "--threads", type=threads, default=1, metavar="N", help="of torch (default: 1)"
    )


def run(args: argparse.Namespace) -> None:
    from ..demo import run_demo

    run_demo(args.out, seed=args.seed, threads=args.threads)


COMMAND = Command(
    help="train an FFM on data that comes with the package, and time the fused layer here",
    add_arguments=add_arguments,
    run=run,
    packages={"rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"},
    extras="bench,cli,sklearn",
)
