# SPDX-License-Identifier: MIT
"""Forward, and forward + backward, of every subject on every workload of a suite.

The subjects of a workload take turns: a pass times each of them for a moment, then the next pass begins, so that
what disturbs the machine disturbs them all. The report joins the timings of all passes.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import suite_of
from .subjects import SUBJECTS, Subject
from .turns import Bench
from .workloads import DIRECTIONS, Direction, Workload

Case = tuple[int, Workload, int, Direction, type[Subject]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        pytest.param(
            (threads, workload, number, direction, subject),
            id=f"t{threads}-{workload.name}-{direction}-{subject.name}-{number}",
        )
        for threads, workload, number in suite_of(metafunc.config).cases()
        for direction in DIRECTIONS
        for subject in SUBJECTS
        if direction in subject.directions
    ]
    metafunc.parametrize("case", cases)


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(suite_of(request.config))


def test_interaction(
    case: Case, bench: Bench, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    threads, workload, number, direction, kind = case
    what, subject = bench.start(request.config, threads, workload, number, direction, kind)
    bench.time(benchmark, subject, direction, what)
