# SPDX-License-Identifier: MIT
"""docs/compatibility.md is what the marks of the tests say, and a refusal has to come."""

from __future__ import annotations

import pytest
from checkout import needs_checkout
from problems import python, refusal


def test_the_page_is_what_the_tests_say() -> None:
    needs_checkout()
    found = python("tools/make_compatibility.py", "--check")
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_refusal_is_an_error_with_its_text() -> None:
    with refusal("not this"):
        raise ValueError("no, not this")


@pytest.mark.parametrize("error", [None, ValueError("something else"), AssertionError("not this")])
def test_all_else_is_no_refusal(error: Exception | None) -> None:
    def run() -> None:
        with refusal("not this"):
            if error is not None:
                raise error

    with pytest.raises(AssertionError):
        run()
