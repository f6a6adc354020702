# SPDX-License-Identifier: MIT
"""What takes turns: the workload at hand, its subjects, checked before they are timed, and one pass of one of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import not_timed
from .machine import available_memory
from .subjects import Subject, check
from .workloads import Direction, Suite, Workload, make_batches, make_weight

Record = dict[str, Any]


def forget_compiled_code(threads: int) -> None:
    """torch.compile bakes shapes and thread count in, and stops compiling anew after a few of them."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.cpp.threads = threads  # also a part of the key of its cache on disk


class Bench:
    """The tensors and subjects of the workload at hand. Moving on to another table frees them."""

    def __init__(self, suite: Suite, *, huge_pages: bool = False) -> None:
        self.suite = suite
        self.huge_pages = huge_pages
        self.threads = 0
        self.workload: Workload | None = None
        self.weight = torch.empty(0)
        self.subjects: dict[type[Subject], Subject] = {}
        self.verdicts: dict[tuple[Any, ...], str | None] = {}

    def turn_to(self, threads: int, workload: Workload) -> None:
        old = self.workload
        if (threads, workload) == (self.threads, old):
            return
        is_new_table = old is None or workload.table_shape != old.table_shape
        if is_new_table or threads != self.threads:
            torch.set_num_threads(threads)
            forget_compiled_code(threads)
            self.subjects.clear()
        if is_new_table:
            self.weight = torch.empty(0)  # free one table before the next is made
            self.weight = make_weight(workload, huge_pages=self.huge_pages)
        if workload != old:
            self.batches = make_batches(workload)
            self.__dict__.pop("touched_rows", None)
        self.threads, self.workload = threads, workload
        self.grad_output = torch.randn(
            workload.batch_size, generator=torch.Generator().manual_seed(1)
        )

    @cached_property
    def touched_rows(self) -> float:
        """Distinct rows of a batch [B, F], the mean over the batches."""
        return sum(batch.unique().numel() for batch in self.batches) / len(self.batches)

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
        key = self.threads, self.workload, kind, direction
        if key not in self.verdicts:
            self.verdicts[key] = check(subject, self.batches[0], self.grad_output, direction)
        return self.verdicts[key] or subject

    def start(
        self,
        config: pytest.Config,
        threads: int,
        workload: Workload,
        number: int,
        direction: Direction,
        kind: type[Subject],
        **more: Any,
    ) -> tuple[Record, Subject]:
        """What a case is, for the report, and its subject; one that cannot be timed ends the test."""
        what = {
            **more,
            **asdict(workload),
            "threads": threads,
            "direction": direction,
            "subject": kind.name,
            "role": kind.role,
            "pass": number,
        }
        self.turn_to(threads, workload)
        subject = self.subject(kind, direction)
        if isinstance(subject, str):
            not_timed(config, what, subject)
        return what, subject

    def time(
        self,
        benchmark: BenchmarkFixture,
        subject: Subject,
        direction: Direction,
        what: Record,
        *,
        most: int = 30,
    ) -> None:
        """One pass of a subject: a step to warm up, then timings for a moment, within ``most`` rounds."""
        next_batch = self.cycle(subject, self.grad_output, direction)
        start = time.perf_counter()
        subject.step(*next_batch()[0])
        seconds = time.perf_counter() - start
        rounds = max(self.suite.min_rounds, min(round(self.suite.pass_seconds / seconds), most))
        benchmark.extra_info.update(what)
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            subject.step, setup=next_batch, rounds=rounds, warmup_rounds=1
        )

    def time_calls(
        self, benchmark: BenchmarkFixture, subject: Subject, calls: int, what: Record
    ) -> None:
        """One pass of ``calls`` forward calls, as a server makes them: in inference mode."""
        benchmark.extra_info.update(what)
        with torch.inference_mode():
            benchmark.pedantic(  # type: ignore[no-untyped-call]
                subject.forward,
                setup=self.cycle(subject, "forward"),
                rounds=calls,
                warmup_rounds=max(1, calls // 20),
            )

    def cycle(
        self, subject: Subject, *rest: Any
    ) -> Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments for pytest-benchmark: the batches in turn, and the rest."""
        batches = itertools.cycle([subject.prepare(batch) for batch in self.batches])
        return lambda: ((next(batches), *rest), {})
