# SPDX-License-Identifier: MIT
"""How fast, and how well, a sample at a time trains: a few epochs of each engine on the same data.

The engines take turns, in several passes: what disturbs the machine disturbs them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import not_timed, suite_of
from .training import ENGINES, Engine, TrainingWorkload
from .workloads import Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suite_of(metafunc.config)
    cases = [
        pytest.param(
            (threads, table, number, engine),
            id=f"t{threads}-{table.name}-{number}-{engine.name}".replace(" ", "-").replace(",", ""),
        )
        for threads in suite.threads
        for table in suite.training
        for number in range(suite.passes)
        for engine in ENGINES
    ]
    metafunc.parametrize("case", cases)


@cache
def load(table: Workload, effort: float) -> TrainingWorkload:
    """Seconds of work at least, for libffm prints tenths of them."""
    return TrainingWorkload(table, max(200, int(200_000 * min(1.0, effort * 2))), 20_000)


def test_training(
    case: tuple[int, Workload, int, type[Engine]],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    threads, table, number, engine = case
    what = {"engine": engine.name, "threads": threads, "table": table.name, "pass": number}
    reason = engine.missing()
    if reason:
        not_timed(request.config, what, reason)
    workload = load(table, suite_of(request.config).effort)
    _ = workload.data

    def train() -> list[tuple[float, float]]:
        epochs: Iterator[tuple[float, float]] = engine().epochs(workload, threads)
        return list(epochs)

    epochs = benchmark.pedantic(train, rounds=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(
        {
            **what,
            "samples": workload.samples // engine.part,
            "epoch_seconds": [seconds for seconds, _ in epochs],
            "valid_logloss": [None if math.isnan(loss) else loss for _, loss in epochs],
        }
    )
