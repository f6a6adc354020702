# SPDX-License-Identifier: MIT
"""What the kernels compute, on the CPU paths that this process does not run: the tests of it, in processes that do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from problems import python

import ffm_ext

FILES = ("interaction", "determinism", "gradients", "modules", "optim", "training", "quantized")

# A part of them, in seconds. Threads and random tables reach nothing in a kernel that these do not.
QUICK = (
    "(test_interaction and matches_reference and not threaded) or rounded_once "
    "or (same_bits and sum and F39) or (moves_what and values) or (frequent_rows and 2) or test_quantized and not loses"
)


@pytest.mark.skipif("FFM_EXT_ISA" in os.environ, reason="FFM_EXT_ISA is set: one ISA was asked for")
@pytest.mark.parametrize(
    "tests", [QUICK, pytest.param("not killed", marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_every_isa(isa: str, tests: str) -> None:
    if isa == ffm_ext.build_info()["isa"]:
        pytest.skip(f"this process runs {isa}")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in FILES]
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", tests)
    run = python("-m", "pytest", *options, *files, FFM_EXT_ISA=isa)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b[1-9]\d* passed", run.stdout), run.stdout
