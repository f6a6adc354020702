# SPDX-License-Identifier: MIT
"""The memory that a step takes beside the table, against what its arrays add up to."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import not_timed, suite_of
from .memory import MEASURED, expected_bytes, measure
from .subjects import Fused, Subject
from .workloads import DIRECTIONS, Direction, Workload, make_batches


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        pytest.param((table, direction, kind), id=f"{table.name}-{direction}-{kind.name}")
        for table in suite_of(metafunc.config).memory
        for direction in DIRECTIONS
        for kind in MEASURED
        if direction in kind.directions
    ]
    metafunc.parametrize("case", cases)


def test_memory(
    case: tuple[Workload, Direction, type[Subject]],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    table, direction, kind = case
    what = {**asdict(table), "table": table.name, "step": direction, "holder": kind.name}
    if reason := kind.missing():
        not_timed(request.config, what, reason)
    rise = benchmark.pedantic(measure, (kind, table, direction), rounds=1)  # type: ignore[no-untyped-call]
    if kind is Fused:
        touched = make_batches(table)[0].unique().numel()
        what["expected_bytes"] = expected_bytes(table, direction, touched)
    benchmark.extra_info.update({**what, "bytes": rise})
