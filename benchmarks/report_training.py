# SPDX-License-Identifier: MIT
"""The engines beside libffm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .tables import Record, Section, Table, reasons
from .workloads import short

BASELINE = "libffm"


def collect(runs: Sequence[Record], not_timed: Sequence[Record]) -> list[Record]:
    """A record for every engine, with samples a second (median over epochs) where it ran."""
    records = []
    for run in runs:
        info = dict(run["extra_info"])
        seconds = max(statistics.median(info["epoch_seconds"]), 1e-9)
        records.append({**info, "samples_per_second": info["samples"] / seconds})
    return records + list(not_timed)


def sections(records: Sequence[Record]) -> list[Section]:
    """One table; none where nothing was trained."""
    if not records:
        return []
    baseline = {
        (r["threads"], r["table"]): r["samples_per_second"]
        for r in records
        if r["engine"] == BASELINE and "reason" not in r
    }
    body = []
    for r in sorted(records, key=lambda r: (r["threads"], r["table"])):
        cells = [str(r["threads"]), r["table"], r["engine"]]
        if "reason" in r:
            body.append([*cells, r["reason"].partition(":")[0], "–", "–", "–"])
            continue
        other = baseline.get((r["threads"], r["table"]))
        body.append(
            [
                *cells,
                short(r["samples_per_second"]),
                f"{r['samples_per_second'] / other:.2f}" if other else "–",
                str(len(r["valid_logloss"])),
                "–" if r["valid_logloss"][-1] is None else f"{r['valid_logloss'][-1]:.5f}",
            ]
        )
    header = ["threads", "table", "engine", "samples/s", "× libffm", "epochs", "valid logloss"]
    table = Table(header, body, left=("table", "engine"), section=2)
    notes = [
        "Training: seconds of training alone, as each engine counts them, median over the epochs; AdaGrad, lr 0.2, "
        "λ 2e-5, normalised samples, one feature a field. libffm prints tenths of a second. With two threads ffm_ext "
        "is in its hogwild mode, as libffm always is. modern-fm: one pass over a tenth of the samples.",
        *reasons((f"{r['table']}, {r['engine']}", r) for r in records),
    ]
    return [Section("Training a sample at a time", [table], notes)]
