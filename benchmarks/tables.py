# SPDX-License-Identifier: MIT
"""What all reports have: figures from timings, and tables and sections that hold them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .workloads import short

Record = dict[str, Any]
STEPS = {"forward": "forward", "dense": "+ dense grad", "sparse": "+ sparse grad"}
# The first is this package, where it has a place.
COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f")


@dataclass
class Table:
    """Cells as text; a line is drawn where the first ``section`` cells change."""

    header: list[str]
    body: list[list[str]]
    left: tuple[str, ...] = ()  # columns of words
    section: int = 0
    bold: str | None = None


@dataclass
class Section:
    """A subject of the report; ``pictures`` maps a file's ending to what draws it."""

    heading: str | None
    tables: list[Table]
    notes: list[str]
    pictures: dict[str, Callable[[Path], None]] = field(default_factory=dict)


def measured(seconds: Sequence[float]) -> Record:
    """Median, spread (half the interquartile range over the median) and number of timings."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"seconds": median, "spread": (high - low) / 2 / median, "rounds": len(seconds)}


def cell(timing: Record, figure: Callable[[Record], str]) -> str:
    """'391k ±2%', or one word for why there is no figure."""
    if not timing:
        return "–"
    if "reason" in timing:
        return str(timing["reason"]).partition(":")[0]
    return figure(timing) + (f" ±{timing['spread']:.0%}" if "spread" in timing else "")


def reasons(found: Iterable[tuple[str, Record]]) -> list[str]:
    """A line for everything that has no time, and how often."""
    counts = Counter(f"{name}: {t['reason']}" for name, t in found if "reason" in t)
    return [f"{reason} ({count}×)" for reason, count in counts.items()]


def distinct(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def setting(results: Record) -> str:
    """The machine in a picture's title."""
    machine = results["machine"]
    return f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}"


def sizes(lines: Iterable[Record]) -> str:
    """'N = 100k; F = 22, 39; K = 4; uniform ids; 1 thread', whatever the lines have."""
    lines = list(lines)

    def values(name: str) -> str:
        return ", ".join(str(value) for value in sorted({line[name] for line in lines}))

    N = ", ".join(short(n) for n in sorted({line["num_features"] for line in lines}))
    threads = values("threads")
    return (
        f"N = {N}; F = {values('num_fields')}; K = {values('embed_dim')}; {values('ids')} ids; "
        f"{threads} thread{'s' * (threads != '1')}"
    )
