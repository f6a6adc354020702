# SPDX-License-Identifier: MIT
"""Forward, and forward + backward, of every subject on every workload of a suite.

The subjects of a workload take turns: a pass times each of them for a moment, then the next pass begins, so that
what disturbs the machine disturbs them all. The report joins the timings of all passes.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .conftest import not_timed, suite_of
from .machine import available_memory
from .subjects import SUBJECTS, Subject, check
from .workloads import DIRECTIONS, Direction, Suite, Workload, make_batches, make_weight

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


def forget_compiled_code(threads: int) -> None:
    """torch.compile bakes shapes and thread count in, and stops compiling anew after a few of them."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.cpp.threads = threads  # also a part of the key of its cache on disk


class Bench:
    """The tensors and subjects of the workload at hand. Moving on to another one frees them."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.threads = 0
        self.workload: Workload | None = None
        self.weight = torch.empty(0)
        self.subjects: dict[type[Subject], Subject] = {}
        self.verdicts: dict[tuple[type[Subject], Direction], str | None] = {}

    def turn_to(self, threads: int, workload: Workload) -> None:
        old = self.workload
        if (threads, workload) == (self.threads, old):
            return
        if old is None or threads != self.threads or workload.table_shape != old.table_shape:
            torch.set_num_threads(threads)
            forget_compiled_code(threads)
            self.subjects.clear()
            self.weight = torch.empty(0)  # free one table before the next is made
            self.weight = make_weight(workload)
        self.threads, self.workload = threads, workload
        self.verdicts.clear()
        self.batches = make_batches(workload)
        self.grad_output = torch.randn(
            workload.batch_size, generator=torch.Generator().manual_seed(1)
        )

    def subject(self, kind: type[Subject], direction: Direction) -> Subject | str:
        """The subject, checked against the reference; or why it cannot be timed."""
        assert self.workload is not None
        if reason := kind.missing():
            return reason
        size = self.workload.table_bytes
        if direction == "dense" and size > self.suite.max_dense_bytes:
            return f"not run: its dense gradient has {size / 1e9:.1f} GB"
        needed = size * (kind.copies * (kind not in self.subjects) + (direction == "dense"))
        if needed > 0.9 * available_memory():
            free = available_memory()
            return f"not run: takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        if kind not in self.subjects:
            self.subjects[kind] = kind(self.workload, self.weight)
        subject = self.subjects[kind]
        subject.workload = self.workload
        if (kind, direction) not in self.verdicts:
            self.verdicts[kind, direction] = check(
                subject, self.batches[0], self.grad_output, direction
            )
        return self.verdicts[kind, direction] or subject


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(suite_of(request.config))


def test_interaction(
    case: Case, bench: Bench, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    threads, workload, number, direction, kind = case
    what = {
        **asdict(workload),
        "threads": threads,
        "direction": direction,
        "subject": kind.name,
        "role": kind.role,
        "pass": number,
    }
    bench.turn_to(threads, workload)
    subject = bench.subject(kind, direction)
    if isinstance(subject, str):
        not_timed(request.config, what, subject)
        return
    batches = itertools.cycle([subject.prepare(indices) for indices in bench.batches])

    def next_batch() -> tuple[tuple[Any, Tensor, Direction], dict[str, Any]]:
        return (next(batches), bench.grad_output, direction), {}

    start = time.perf_counter()
    subject.step(*next_batch()[0])
    seconds = time.perf_counter() - start
    rounds = round(bench.suite.pass_seconds / seconds)
    rounds = max(bench.suite.min_rounds, min(rounds, 30))
    benchmark.extra_info.update(what)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        subject.step, setup=next_batch, rounds=rounds, warmup_rounds=1
    )
