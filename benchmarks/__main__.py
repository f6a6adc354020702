# SPDX-License-Identifier: MIT
"""`python -m benchmarks`, from the root of the repository: run a suite, print its tables, save tables and plots."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
FILES = (
    "bench_interaction.py",
    "bench_quality.py",
    "bench_training.py",
    "bench_memory.py",
    "bench_files.py",
    "bench_kernels.py",
)


def _counts(text: str) -> list[int]:
    counts = [int(count) for count in text.split(",")]
    if min(counts) <= 0:
        raise ValueError
    return counts


_counts.__name__ = "list of thread counts"  # as argparse calls what it cannot read


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
    parser.add_argument(
        "--threads", type=_counts, metavar="1,2", help="thread counts instead of the suite's"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmark_results"),
        metavar="DIR",
        help="default: %(default)s, here",
    )
    parser.add_argument(
        "--name",
        help="of the result files, which replace older ones; default: full, quick or smoke, or …-part",
    )
    parser.add_argument("--list", action="store_true", help="print the names, measure nothing")
    parser.add_argument(
        "--show", type=Path, metavar="JSON", help="print the tables of a saved result instead"
    )
    options = parser.parse_args(arguments)
    # What takes seconds to import.
    import pytest

    from . import machine, report

    if options.show:
        report.show(json.loads(options.show.read_text()))
        return 0
    chosen = options.suite or "full"
    name = options.name or (f"{chosen}-part" if options.only or options.threads else chosen)
    command = [
        *(str(HERE / file) for file in FILES),
        *("-q", "--disable-warnings", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="),
        *("--suite", chosen),
    ]
    if options.threads:
        command += ["--bench-threads", ",".join(map(str, options.threads))]
    if options.only:
        command += ["-k", options.only]
    if options.list:
        return int(pytest.main([*command, "--collect-only"]))
    # Measuring takes long: what cannot be saved is not begun, and what will be missing is said.
    try:
        report.check_writable(options.results, name)
    except OSError as error:
        parser.error(f"the results cannot be saved: {error}")
    commit = machine.commit()
    for reason in report.missing():
        print(f"benchmarks: {reason}", file=sys.stderr)
    if find_spec("matplotlib") is None:
        print("benchmarks: no plots, for matplotlib is missing", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command += ["--benchmark-quiet", "--benchmark-disable-gc", f"--benchmark-json={raw}"]
        status = pytest.main(command)
        if status == pytest.ExitCode.INTERRUPTED and not name.endswith("-part"):
            name += "-part"  # what is there of the whole stays
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            print(f"benchmarks: --only {options.only!r} leaves nothing to measure", file=sys.stderr)
        elif not raw.exists():
            print("benchmarks: nothing was measured", file=sys.stderr)
        if not raw.exists():
            return int(status) or 1
        results = report.collect({"not_timed": [], **json.loads(raw.read_text()), "commit": commit})

    report.show(results)
    for path in report.save(results, options.results, name):
        print(f"saved {path}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
