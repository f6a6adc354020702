# SPDX-License-Identifier: MIT
"""Tests of what no wheel holds: setup.py, csrc/, tools/. Where the tests of a wheel lie alone, these are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest


def needs_checkout() -> Path:
    """The checkout that the tests are of; skips what asks for it, a test or a module, where there is none."""
    root = Path(__file__).parents[1]
    if not (root / "setup.py").exists():
        pytest.skip("not a checkout: there is no setup.py", allow_module_level=True)
    return root
