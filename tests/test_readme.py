# SPDX-License-Identifier: MIT
"""What the pages show runs: the ``python`` blocks of a page, in order, in one namespace.

A block that is not to run is of another kind (``text``, ``sh``). Those of the measured flags run by themselves.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from ffm_ext import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    "README.md",
    *(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "docs").glob("**/*.md"))
        if "```python" in path.read_text()
    ),
]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # files of a page are its own
    text = (ROOT / page).read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 0
    namespace: dict[str, object] = {}
    for block in blocks:
        # Blank lines in front, so that a traceback names the page's own line.
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(ROOT / page), "exec"), namespace)


def run_shown(heading: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    """Runs the blocks under a heading of docs/cli.md: what each ``predict`` found, which the page says too."""
    page = (ROOT / "docs" / "cli.md").read_text()
    (section,) = (part for part in page.split("\n### ") if part.startswith(f"{heading}\n"))
    found: list[dict[str, float]] = []
    for kind, text in re.findall(r"^```(py|sh)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        if kind == "py":
            exec(compile(text, heading, "exec"), {})
            continue
        for line in text.replace("\\\n", "").splitlines():
            program, *argv = shlex.split(line, comments=True)
            assert program == "ffm-ext"
            capsys.readouterr()
            if argv[0] == "predict":
                argv.insert(1, "--json")
            assert cli.main(argv) == 0
            if argv[0] == "predict":
                found.append(json.loads(capsys.readouterr().out))
                said = re.findall(r"(\w+) (0\.\d+)", line.split("#")[1])
                assert said
                for name, number in said:
                    assert found[-1][name] == pytest.approx(float(number), abs=0.0015)
    return found


def test_flags_for_adult(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (found,) = run_shown("Adult", capsys)
    assert found["samples"] == 16_281 and found["auc"] >= 0.915


@pytest.mark.skipif("FFM_EXT_DATA" not in os.environ, reason="FFM_EXT_DATA names no folder")
def test_flags_for_movielens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    liked, rating = run_shown("MovieLens-100K", capsys)
    assert liked["samples"] == rating["samples"] == 20_000
    assert liked["logloss"] <= 0.558
    assert rating["rmse"] <= 0.91
