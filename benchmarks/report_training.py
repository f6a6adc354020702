# SPDX-License-Identifier: MIT
"""The engines beside libffm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .tables import Record, Section, Table, cell, measured, reasons
from .workloads import short

LINE = ("threads", "table", "engine")
BASELINE = "libffm"


def collect(runs: Sequence[Record], not_timed: Sequence[Record]) -> list[Record]:
    """A record for every engine: samples a second, and how many times libffm's in each pass."""
    lines: dict[tuple[object, ...], Record] = {}
    for run in runs:
        info = run["extra_info"]
        line = lines.setdefault(
            tuple(info[name] for name in LINE),
            {name: info[name] for name in (*LINE, "samples")} | {"passes": {}},
        )
        # Tenths of a second may be none, where little is trained.
        line["passes"][info["pass"]] = [max(seconds, 1e-9) for seconds in info["epoch_seconds"]]
        line["valid_logloss"] = info["valid_logloss"]
    for line in lines.values():
        line |= measured([seconds for epochs in line["passes"].values() for seconds in epochs])
        line["samples_per_second"] = line["samples"] / line["seconds"]
        other = lines.get((line["threads"], line["table"], BASELINE))
        line["ratios"] = [
            _speed(line, number) / _speed(other, number)
            for number in line["passes"]
            if other and number in other["passes"]
        ]
    for what in not_timed:
        lines[tuple(what[name] for name in LINE)] = dict(what)
    return list(lines.values())


def _speed(line: Record, number: int) -> float:
    """Samples a second of one pass."""
    seconds = line["passes"][number]
    return float(line["samples"]) * len(seconds) / sum(seconds)


def sections(records: Sequence[Record]) -> list[Section]:
    """One table; none where nothing was trained."""
    if not records:
        return []
    body = []
    for r in sorted(records, key=lambda r: (r["threads"], r["table"])):
        speed = cell(r, lambda r: short(r["samples_per_second"]))
        cells = [str(r["threads"]), r["table"], r["engine"], speed]
        if "reason" in r:
            body.append([*cells, "–", "–", "–"])
            continue
        # Older results are of one pass.
        ratios, losses = r.get("ratios", []), r["valid_logloss"]
        passes = r["passes"].values() if "passes" in r else [r["epoch_seconds"]]
        times = "–"
        if ratios:
            times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        body.append(
            [
                *cells,
                times,
                str(sum(map(len, passes))),
                "–" if losses[-1] is None else f"{losses[-1]:.5f}",
            ]
        )
    header = ["threads", "table", "engine", "samples/s", "× libffm", "epochs", "valid logloss"]
    table = Table(header, body, left=("table", "engine"), section=2)
    notes = [
        "Training: seconds of training alone, as each engine counts them; AdaGrad, lr 0.2, λ 2e-5, normalised samples, "
        "one feature a field. The engines take turns, a few epochs from the first table each: samples/s is the median "
        "over the epochs of all turns, ± half the interquartile range; × libffm compares the sums of a turn, for "
        "libffm prints tenths of a second, and is the median over turns, with the least and the most; valid logloss "
        "is that after a turn. With two threads ffm_ext is in its hogwild mode, as libffm always is. modern-fm: one "
        "pass over a tenth of the samples a turn.",
        *reasons((f"{r['table']}, {r['engine']}", r) for r in records),
    ]
    return [Section("Training a sample at a time", [table], notes)]
