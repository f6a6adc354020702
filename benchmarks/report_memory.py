# SPDX-License-Identifier: MIT
"""Peak memory of a step, beside the formula."""

from __future__ import annotations

from collections.abc import Sequence

from .memory import MEASURED
from .tables import Record, Section, Table, reasons


def collect(runs: Sequence[Record], not_timed: Sequence[Record]) -> list[Record]:
    """A record for every step that was measured, or the reason why it was not."""
    return [dict(run["extra_info"]) for run in runs] + list(not_timed)


def sections(records: Sequence[Record]) -> list[Section]:
    """One table, a line a step."""
    if not records:
        return []
    lines: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        lines.setdefault((r["table"], r["step"]), {})[r["holder"]] = r
    names = [kind.name for kind in MEASURED]
    body = []
    for (table, step), holders in lines.items():
        expected = next(
            (r["expected_bytes"] for r in holders.values() if "expected_bytes" in r), None
        )
        cells = [
            _megabytes(holders[name].get("bytes")) if name in holders else "–" for name in names
        ]
        body.append([table, step, _megabytes(expected), *cells])
    header = ["table", "step", "its arrays, MB", *(f"{name}, MB" for name in names)]
    notes = [
        "Memory: how far the resident memory of a fresh process rises during one step of a batch of "
        f"{records[0]['batch_size']}, beside the table; 1 thread. Its arrays: the output, the gradient, and lists that "
        "group the entries by row "
        "(expected_bytes in benchmarks/memory.py). torchfm has no sparse gradient.",
        *reasons((f"{r['table']}, {r['holder']}, {r['step']}", r) for r in records),
    ]
    return [
        Section("Memory of a step", [Table(header, body, left=("table", "step"), section=1)], notes)
    ]


def _megabytes(number: int | None) -> str:
    return "–" if number is None else f"{number / 1e6:.1f}"
