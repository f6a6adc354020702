# SPDX-License-Identifier: MIT
"""Options of the suite, and what it adds to pytest-benchmark's JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import pytest

from . import machine
from .workloads import SUITES, Suite

NOT_TIMED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ffm_ext benchmarks")
    group.addoption("--suite", choices=sorted(SUITES), default="quick")
    group.addoption("--bench-threads", help="thread counts instead of the suite's, such as 1,2")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_TIMED] = []


def suite_of(config: pytest.Config) -> Suite:
    suite = SUITES[config.getoption("--suite")]
    threads = config.getoption("--bench-threads")
    if threads is None:
        return suite
    return dataclasses.replace(suite, threads=tuple(map(int, threads.split(","))))


def not_timed(config: pytest.Config, what: dict[str, Any], reason: str) -> NoReturn:
    """Leaves the reason for the report, and ends the test: a wrong result fails it, all else skips it."""
    config.stash[NOT_TIMED].append({**what, "reason": reason})
    if reason.startswith("wrong"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let what was measured before Ctrl-C be saved: a case that was interrupted in its first round has no figures."""
    found = session.config._benchmarksession  # type: ignore[attr-defined]
    found.benchmarks[:] = [case for case in found.benchmarks if case.stats.data]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.clear()  # it names the host
    machine_info.update(machine.describe())


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    output_json["not_timed"] = config.stash[NOT_TIMED]
