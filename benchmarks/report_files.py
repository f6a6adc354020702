# SPDX-License-Identifier: MIT
"""Reading and predicting texts beside libffm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .tables import Record, Section, Table, cell, measured, reasons
from .workloads import short

LINE = ("reader", "threads", "table", "step")
BASELINE = "libffm"
STEPS = {"read": "read the text", "predict file": "predict a file", "predict": "predict in memory"}


def collect(runs: Sequence[Record], not_timed: Sequence[Record]) -> list[Record]:
    """A record for every reader and step, with samples a second where it ran."""
    timings: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    infos: dict[tuple[Any, ...], Record] = {}
    for run in runs:
        key = tuple(run["extra_info"][name] for name in LINE)
        timings[key] += run["stats"]["data"]
        infos[key] = run["extra_info"]
    records = []
    for key, info in infos.items():
        timing = measured(timings[key])
        records.append(
            {
                **{name: info[name] for name in (*LINE, "samples", "bytes")},
                **timing,
                "samples_per_second": info["samples"] / timing["seconds"],
                "bytes_per_second": info["bytes"] / timing["seconds"],
            }
        )
    untimed = {tuple(what[name] for name in LINE): what for what in not_timed}
    return records + list(untimed.values())


def sections(records: Sequence[Record]) -> list[Section]:
    """One table; none where nothing was read."""
    if not records:
        return []
    baseline = {
        r["step"]: r["samples_per_second"]
        for r in records
        if r["reader"] == BASELINE and "reason" not in r
    }
    body = []
    for r in sorted(records, key=lambda r: [*STEPS].index(r["step"])):
        cells = [STEPS[r["step"]], r["reader"], str(r["threads"])]
        if "reason" in r:
            body.append([*cells, r["reason"].partition(":")[0], "–", "–"])
            continue
        other = baseline.get(r["step"])
        speed = r["bytes_per_second"] / 1e6
        body.append(
            [
                *cells,
                cell(r, lambda r: short(r["samples_per_second"])),
                f"{speed:,.0f}" if r["step"] != "predict" else "–",
                f"{r['samples_per_second'] / other:.1f}" if other else "–",
            ]
        )
    header = ["", "library", "threads", "samples/s", "MB/s of text", "× libffm"]
    table = Table(header, body, left=("", "library"), section=1)
    first = records[0]
    notes = [
        f"Texts: {first['table']}, one feature a field, {first.get('samples', '–')} samples; medians of "
        f"{first.get('rounds', 7)} timings in turns, ± half the interquartile range, files in the page cache. Reading: "
        "libffm converts the text to its binary form on disk, the others make a matrix in memory. Predicting a file: "
        "the model is loaded (not by modern-fm, which has no files of its own), the text read, a probability a line "
        "written; libffm's loop is that of its ffm-predict around its own predictor. "
        "libffm and modern-fm predict with one thread.",
        *reasons((f"{r['step']}, {r['reader']}", r) for r in records),
    ]
    return [Section("Texts: reading and predicting", [table], notes)]
