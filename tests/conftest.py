# SPDX-License-Identifier: MIT
"""Fixtures. The tolerance rule is ``problems.assert_accurate``."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings
from problems import num_threads, on_device, python, refusal

import ffm_ext

# The same examples in every run, and none stored: a test fails for a change in the code, not by luck.
settings.register_profile("ffm_ext", derandomize=True, deadline=None, database=None)
settings.load_profile("ffm_ext")

ISAS = ("baseline", "avx2", "avx512")


def devices() -> list[str]:
    """Where the operators can run here: the devices that have kernels, and hardware."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    cuda = torch.cuda.is_available() and has_kernel("ffm_ext::ffm_forward", "CUDA")
    return ["cpu", "cuda"] if cuda else ["cpu"]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the problems of a test lie; on CUDA, what lists hold is checked as on the CPU."""
    found = torch.device(request.param)
    before = ffm_ext.check_contents(True)
    with on_device(found):
        yield found
    ffm_ext.check_contents(before)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each CPU path, by the name that ``FFM_EXT_ISA`` takes in a fresh process (:func:`python`)."""
    found = python("-c", "import ffm_ext; ffm_ext.build_info()", FFM_EXT_ISA=request.param)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        if "this CPU lacks it" in reason or "is not one of" in reason:
            pytest.skip(reason)
        pytest.fail(found.stderr)
    return request.param


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with num_threads(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more: small tensors gain nothing, and a shared machine loses."""
    with num_threads(1):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test marked ``compatibility(…, refuses=text)`` has to end in an error with that text.

    tools/make_compatibility.py reads the same marks, so that docs/compatibility.md says what is tested.
    """
    marks = list(pyfuncitem.iter_markers("compatibility"))
    texts = [mark.kwargs["refuses"] for mark in marks if "refuses" in mark.kwargs]
    if not texts:
        return (yield)
    assert len(marks) == 1, "a refusal is the only mark of its test"
    with refusal(texts[0]):
        yield
    return True


def _is_cited(item: pytest.Item) -> bool:
    return any("on" not in mark.kwargs for mark in item.iter_markers("compatibility"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a deadline, begin with what has to run anyhow."""
    if "FFM_EXT_DEADLINE" in os.environ:
        items.sort(key=lambda item: not _is_cited(item))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """From ``FFM_EXT_DEADLINE`` on, in seconds of the system's clock, no slow test begins, but those of the page."""
    deadline = float(os.environ.get("FFM_EXT_DEADLINE", "inf"))
    if time.time() >= deadline and item.get_closest_marker("slow") and not _is_cited(item):
        pytest.skip("it is slow, and no time is left (FFM_EXT_DEADLINE)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With ``FFM_EXT_STRICT=1`` a test that docs/compatibility.md cites has to run, unless its mark says ``on=…``.

    So the page is of what passed; elsewhere a machine may lack TorchRec or CMake.
    """
    report = yield
    if report.skipped and _is_cited(item) and os.environ.get("FFM_EXT_STRICT") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
        report.outcome = "failed"
        report.longrepr = f"docs/compatibility.md cites this test, and it did not run: {reason}"
    return report
