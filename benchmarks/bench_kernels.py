# SPDX-License-Identifier: MIT
"""What the kernels do with the memory: how near they come to its roof, and what a call of any size costs.

The subjects of a case take turns, as in `bench_interaction.py`; where thread counts or values of K are compared
with each other, these do too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import kernel_subjects as kernels
from .conftest import suite_of
from .subjects import Fused, GatherBag, GatherSum, ModernFM, Subject, Torchfm, Vectorised
from .turns import Bench
from .workloads import DIRECTIONS, Direction, Suite, Workload

FORWARD: tuple[Direction, ...] = ("forward",)


@dataclass(frozen=True)
class Part:
    """One question: who takes turns, in which steps, on workloads that `KernelWorkloads` has under its name."""

    name: str
    subjects: tuple[type[Subject], ...]
    directions: tuple[Direction, ...] = FORWARD
    scales: bool = False  # at every thread count of the suite, else at one thread
    together: bool = False  # the workloads take turns with each other
    by_call: bool = False  # single calls in inference mode
    most: int = 30  # timings of a pass

    def cases(self, suite: Suite) -> Iterator[tuple[int, Workload, int]]:
        """Thread count, workload and number of the pass, in the order of the run."""
        workloads: tuple[Workload, ...] = getattr(suite.kernels, self.name)
        for group in [workloads] if self.together else [(workload,) for workload in workloads]:
            for number in range(suite.passes):
                for threads in suite.threads if self.scales else (1,):
                    for workload in group:
                        yield threads, workload, number


PARTS = (
    Part(
        "roof",
        (
            *(GatherBag, GatherSum),
            *(kernels.FillTouched, kernels.MemsetTouched, kernels.FillTable, kernels.MemsetTable),
            kernels.Operator,
        ),
        DIRECTIONS,
        scales=True,
    ),
    Part("dims", (Fused,), together=True),
    Part(
        "dtypes",
        (kernels.Float32, kernels.BFloat16, kernels.Float16, kernels.Int8),
        ("forward", "sparse"),
    ),
    Part(
        "latency",
        (kernels.Layer, kernels.Model, kernels.Operator, Torchfm, ModernFM),
        by_call=True,
    ),
    Part("nnz", (kernels.FusedText, kernels.ModernFMText), ("forward", "sparse")),
    Part("batch", (Fused, Torchfm, Vectorised), most=300),
)

Case = tuple[Part, int, Workload, int, Direction, type[Subject]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = suite_of(metafunc.config)
    cases = [
        pytest.param(
            (part, threads, workload, number, direction, subject),
            id=f"{part.name}-t{threads}-F{workload.num_fields}-{workload.name}-B{workload.batch_size}-"
            f"{direction}-{subject.name}-{number}",
        )
        for part in PARTS
        for threads, workload, number in part.cases(suite)
        for direction in part.directions
        for subject in part.subjects
        if direction in subject.directions
    ]
    metafunc.parametrize("case", cases)


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Bench:
    """Tables on huge pages, as the modules have them."""
    return Bench(suite_of(request.config), huge_pages=True)


def test_kernels(
    case: Case, bench: Bench, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    part, threads, workload, number, direction, kind = case
    what, subject = bench.start(
        request.config, threads, workload, number, direction, kind, part=part.name, words=None
    )
    if part.name == "roof":
        what["touched_rows"] = bench.touched_rows
    if part.by_call:
        calls = -(-bench.suite.kernels.calls // bench.suite.passes)
        bench.time_calls(benchmark, subject, calls, what)
    else:
        bench.time(benchmark, subject, direction, what, most=part.most)
