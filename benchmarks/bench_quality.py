# SPDX-License-Identifier: MIT
"""How well, and how fast, FM and FFM learn beside fastFM: one fit of each model on each data set, on one thread."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import quality
from .conftest import not_timed, suite_of

CASES = [
    pytest.param((data, learner), id=f"{data}-{learner.name}".replace(" ", "-"))
    for data in quality.DATA
    for learner in quality.LEARNERS
]


@functools.cache
def load(name: str) -> quality.Data | str:
    """The data, or why there is none."""
    try:
        return quality.DATA[name]()
    except FileNotFoundError:
        return "missing: no files of it here; FFM_EXT_DATA names the folder that has them"


@pytest.mark.parametrize("case", CASES)
def test_quality(
    case: tuple[str, type[quality.Learner]],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    name, learner = case
    what: dict[str, Any] = {"data": name, "learner": learner.name}
    data = load(name)
    reason = data if isinstance(data, str) else learner.missing()
    if reason or isinstance(data, str):
        not_timed(request.config, what, str(reason))
    torch.set_num_threads(1)
    effort = suite_of(request.config).effort
    predicted = benchmark.pedantic(  # type: ignore[no-untyped-call]
        learner().fit_predict, args=(data, effort), rounds=1
    )
    what["effort"] = effort
    benchmark.extra_info.update({**what, **quality.scores(data, predicted)})
