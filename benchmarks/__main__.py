# SPDX-License-Identifier: MIT
"""`python -m benchmarks`, from the root of the repository: run a suite, print its tables, save tables and plots."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import report

HERE = Path(__file__).parent
FILES = (
    "bench_interaction.py",
    "bench_quality.py",
    "bench_training.py",
    "bench_memory.py",
    "bench_files.py",
    "bench_kernels.py",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suite = parser.add_mutually_exclusive_group()
    suite.add_argument(
        "--quick", action="store_const", const="quick", dest="suite", help="a few minutes"
    )
    suite.add_argument(
        "--smoke",
        action="store_const",
        const="smoke",
        dest="suite",
        help="seconds: shows that everything runs; its figures mean nothing",
    )
    parser.add_argument(
        "--only",
        metavar="EXPR",
        help="pytest's -k over names such as t1-N100k-K4-zipf-forward-torchfm-0: "
        "'interaction and K4', 'ffm_ext or torchfm', 'quality', 'training', 'files', 'memory', "
        "'kernels', 'kernels and roof'",
    )
    parser.add_argument("--threads", metavar="1,2", help="thread counts instead of the suite's")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="default: %(default)s"
    )
    parser.add_argument(
        "--name", help="of the result files; default: full, quick or smoke, or …-part"
    )
    options = parser.parse_args(arguments)
    name = options.suite or "full"

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [
            *(str(HERE / file) for file in FILES),
            *("-q", "--disable-warnings", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="),
            *("--benchmark-quiet", "--benchmark-disable-gc", f"--benchmark-json={raw}"),
            *("--suite", name),
        ]
        if options.threads:
            command += ["--bench-threads", options.threads]
        if options.only:
            command += ["-k", options.only]
        status = pytest.main(command)
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            print(f"benchmarks: --only {options.only!r} leaves nothing to measure", file=sys.stderr)
        if not raw.exists():
            return int(status) or 1
        results = report.collect({"not_timed": [], **json.loads(raw.read_text())})

    report.show(results)
    if options.only or options.threads:
        name += "-part"
    for path in report.save(results, options.results, options.name or name):
        print(f"saved {path}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
