# SPDX-License-Identifier: MIT
"""Writes docs/compatibility.md from the ``compatibility`` marks of the tests: ``--check`` only compares.

A mark is ``@pytest.mark.compatibility(feature, mode=…, group=…, note=…, refuses=…, on=…)``: ``mode`` is one of the
columns or a tuple of them. The test shows that it works, or, with ``refuses=text``, that it ends in an error with that
text. ``on`` names the hardware that the test needs; any other test with a mark has to run where ``FFM_EXT_STRICT=1``
(tests/conftest.py), which CI sets. So the page says what has been tested, and a cell without a test is empty.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
COLUMNS = ("dense", "atomic", "sparse", "fused", "int8")
FIRST_GROUP = "One machine"
KEYWORDS = {"mode", "group", "note", "refuses", "on"}

INTRODUCTION = """\
# What works with what

Made from the tests by `tools/make_compatibility.py`: a *yes* is a test that passes in every CI run, on a CPU; a *no* is
one that meets an error with the text beneath the table; *on a GPU* is a test that only a machine with a GPU runs
([what has been run on one](cuda.md#what-has-been-run-on-a-gpu)); and – means that there is no test.

`dense`, `atomic`, `sparse` and `fused` are [how the table learns](gradients.md): `grad="dense"`, `grad="atomic"`,
`grad="sparse"`, `fuse_optimizer`. `int8` is `QuantizedFFMInteraction`, which is for inference.
"""


@dataclass
class Cell:
    word: str
    notes: list[str] = field(default_factory=list)


class Collector:
    """A pytest plugin that keeps the marks of what was collected."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            # Marks come from the inside out; a page is read in the order of the files.
            for mark in reversed(list(item.iter_markers("compatibility"))):
                self.marks.append((item.nodeid, mark))


def collect() -> list[tuple[str, Any]]:
    import pytest

    files = [
        str(path)
        for path in sorted(ROOT.joinpath("tests").glob("test_*.py"))
        if "mark.compatibility" in path.read_text()
    ]
    collector = Collector()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = pytest.main(
            ["--collect-only", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *files],
            plugins=[collector],
        )
    if code:
        raise SystemExit(f"the tests cannot be collected:\n{shown.getvalue()}")
    return collector.marks


Groups = dict[str, dict[str, dict[str, Cell]]]


def read(marks: list[tuple[str, Any]]) -> Groups:
    """Group -> feature -> mode -> cell."""
    groups: Groups = {FIRST_GROUP: {}}
    for test, mark in marks:
        (feature,), options = mark.args, mark.kwargs
        if unknown := set(options) - KEYWORDS:
            raise SystemExit(f"{test}: compatibility knows no {', '.join(sorted(unknown))}")
        modes = options["mode"]
        for mode in (modes,) if isinstance(modes, str) else modes:
            if mode not in COLUMNS:
                raise SystemExit(f"{test}: mode = {mode!r} is not one of {', '.join(COLUMNS)}")
            row = groups.setdefault(options.get("group", FIRST_GROUP), {}).setdefault(feature, {})
            word = "**no**" if "refuses" in options else options.get("on", "yes")
            cell = row.setdefault(mode, Cell(word))
            if cell.word != word:
                raise SystemExit(
                    f"{test}: {feature}, {mode}: {word}, but another test says {cell.word}"
                )
            texts = [f"“{options['refuses']}”"] if "refuses" in options else []
            texts += [options["note"]] if "note" in options else []
            cell.notes += [text for text in texts if text not in cell.notes]
    return groups


def table(rows: dict[str, dict[str, Cell]]) -> Iterator[str]:
    numbers: dict[str, int] = {}
    yield f"| | {' | '.join(COLUMNS)} |"
    yield f"|---|{'---|' * len(COLUMNS)}"
    for feature, cells in rows.items():
        shown = []
        for mode in COLUMNS:
            if (cell := cells.get(mode)) is None:
                shown.append("–")
                continue
            notes = [str(numbers.setdefault(note, len(numbers) + 1)) for note in cell.notes]
            shown.append(cell.word + (f" <sup>{', '.join(notes)}</sup>" if notes else ""))
        yield f"| {feature} | {' | '.join(shown)} |"
    if numbers:
        yield ""
    for note, number in numbers.items():
        yield f"{number}. {note}"


def page(groups: Groups) -> str:
    parts = [INTRODUCTION]
    for group, rows in groups.items():
        if rows:
            parts.append("\n".join([f"## {group}", "", *table(rows), ""]))
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is true")
    options = parser.parse_args()
    text = page(read(collect()))
    if options.check:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not what the tests say: run python {sys.argv[0]}")
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
