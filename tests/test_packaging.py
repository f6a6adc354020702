# SPDX-License-Identifier: MIT
"""What pyproject.toml says in several places, it says alike. The wheel itself: tests/test_wheel.py."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from checkout import needs_checkout

if sys.version_info < (3, 11):
    pytest.skip("tomllib is Python 3.11's", allow_module_level=True)
import tomllib

ROOT = needs_checkout()


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_oldest_torch_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    floor = ".".join(
        re.search(
            r"^TORCH_FLOOR = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text(), re.M
        ).groups()
    )
    assert f"torch>={floor}" in pyproject["build-system"]["requires"]
    assert f"torch>={floor}" in pyproject["project"]["dependencies"]
    # Wheels are tested where they are most likely to fail.
    assert pyproject["tool"]["cibuildwheel"]["before-test"] == f"pip install torch=={floor}.*"


def test_wheels_are_built_for_the_pythons_of_the_classifiers(pyproject: dict[str, Any]) -> None:
    classifiers = pyproject["project"]["classifiers"]
    pythons = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    built = pyproject["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{python.replace('.', '')}-*" for python in pythons]
    assert pyproject["project"]["requires-python"] == f">={pythons[0]}"


def test_all_has_every_extra_that_goes_with_any_torch(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    listed = re.fullmatch(r"ffm-ext\[(.*)\]", everything)[1].split(",")
    assert sorted(listed) == sorted(set(extras) - {"all", "distributed"})


def test_what_torchrec_needs_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    pins = (ROOT / "requirements" / "distributed.txt").read_text().splitlines()
    extra = pyproject["project"]["optional-dependencies"]["distributed"]
    assert {package for package in extra if "==" in package} < set(pins)
    (torchrec,) = [pin for pin in pins if pin.startswith("torchrec==")]
    for place in ("docs/distributed.md", "ffm_ext/distributed/_torchrec.py", "pyproject.toml"):
        told = re.findall(r"\btorchrec==[\w.]*\w", (ROOT / place).read_text())
        assert set(told) == {torchrec}, place
