# SPDX-License-Identifier: MIT
"""How fast libffm's text is read, and predicted. The libraries take turns, in several passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import not_timed, suite_of
from .files import ENGINES, FileEngine, Files
from .workloads import Workload

STEPS = ("read", "predict file", "predict")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suite_of(metafunc.config)
    cases = [
        pytest.param(
            (threads, table, number, engine, step),
            id=f"t{threads}-{table.name}-{engine.name}-{step}-{number}",
        )
        for table in suite.training[:1]
        for step in STEPS
        for number in range(suite.passes)
        for engine in ENGINES
        for threads in suite.threads
        if threads == 1 or engine.has_threads
    ]
    metafunc.parametrize("case", cases)


Engines = Callable[[type[FileEngine], Workload, int], FileEngine]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """One of a kind for all steps and passes, with the files and models that it has made."""
    folder: Path = tmp_path_factory.mktemp("files")
    files: dict[tuple[Workload, int], Files] = {}
    made: dict[tuple[str, Workload, int], FileEngine] = {}

    def get(kind: type[FileEngine], table: Workload, samples: int) -> FileEngine:
        key = kind.name, table, samples
        if key not in made:
            made[key] = kind(files.setdefault(key[1:], Files(folder, table, samples)))
        return made[key]

    return get


def test_files(
    case: tuple[int, Workload, int, type[FileEngine], str],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    engines: Engines,
) -> None:
    threads, table, number, kind, step = case
    what: dict[str, Any] = {
        "reader": kind.name,
        "threads": threads,
        "table": table.name,
        "step": step,
        "pass": number,
    }
    reason = kind.missing()
    if reason:
        not_timed(request.config, what, reason)
    effort = suite_of(request.config).effort
    engine = engines(kind, table, max(200, int(100_000 * min(1.0, effort * 2))))
    given = engine.files
    torch.set_num_threads(threads)
    data = engine.data if step != "read" else None
    call: Callable[[], Any] = {
        "read": engine.read,
        "predict file": engine.predict_file,
        "predict": lambda: engine.predict(data),
    }[step]
    found = call()  # which makes and warms the files, too
    if step == "read":
        if (entries := engine.entries(found)) != given.num_entries:
            not_timed(
                request.config, what, f"wrong: {entries} of {given.num_entries} entries were read"
            )
    else:
        found = np.loadtxt(engine.output) if step == "predict file" else found
        error = float(np.abs(found - given.expected).max())
        if not error < 1e-4:
            not_timed(request.config, what, f"wrong: off by {error:.2g}")
    benchmark.pedantic(call, rounds=3)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(
        {**what, "samples": given.samples, "bytes": given.text.stat().st_size}
    )
