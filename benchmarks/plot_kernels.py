# SPDX-License-Identifier: MIT
"""Pictures of what the kernels do with the memory, a function each; `PLOTS` names them by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tables import COLOURS, Record, distinct, setting, sizes
from .workloads import short

STEPS = {"forward": "forward", "sparse": "backward, sparse", "dense": "backward, dense"}
LATENCY_NAMES = {
    "layer": "ffm_ext.FFMInteraction",
    "model": "ffm_ext.FFM",
    "operator": "ops.ffm_forward",
}
NNZ_CURVES = (
    ("ffm_ext", "forward", "ffm_ext forward"),
    ("ffm_ext", "sparse", "ffm_ext + sparse grad"),
    ("modern-fm", "forward", "modern-fm predict"),
)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(panel: Any, axis: str) -> None:
    panel.grid(axis=axis, alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def roof(results: Record, lines: list[Record], path: Path) -> None:
    """Bars of GB/s under their roofs: a row of panels for each step, a column for each table size and ids.

    The bytes are those of the roof, so that a bar's height over its roof is the share, which stands above it.
    """
    columns = sorted(distinct((line["num_features"], line["ids"]) for line in lines))
    directions = [d for d in STEPS if any(line["direction"] == d for line in lines)]
    threads = sorted(distinct(line["threads"] for line in lines))
    shapes = sorted(distinct((line["num_fields"], line["embed_dim"]) for line in lines))
    groups = len(shapes) * len(columns)
    figure = _figure(max(6.5, 1.5 + 0.28 * groups * len(threads)), 1.5 + 2.4 * len(directions))
    panels = figure.subplots(
        len(directions), len(columns), sharex=True, sharey="row", squeeze=False
    )
    width = 0.84 / len(threads)
    handles: dict[str, Any] = {}
    for i, direction in enumerate(directions):
        highest = 1e-9
        for j, column in enumerate(columns):
            panel = panels[i][j]
            for line in lines:
                if (line["direction"], line["num_features"], line["ids"]) != (direction, *column):
                    continue
                timing = line["subjects"].get("operator", {})
                group = shapes.index((line["num_fields"], line["embed_dim"]))
                place = threads.index(line["threads"])
                x = group + width * (place + 0.5 - len(threads) / 2)
                if "roof_share" not in timing:
                    continue
                rate = line["roof_bytes"] / timing["seconds"] / 1e9
                top = line["roof_bytes"] / line["roof_seconds"] / 1e9
                highest = max(highest, rate, top)
                count = line["threads"]
                handles[f"{count} thread{'s' * (count > 1)}"] = panel.bar(
                    x, rate, 0.94 * width, color=COLOURS[place % len(COLOURS)]
                )
                handles["roof"] = panel.hlines(top, x - width / 2, x + width / 2, "black", lw=1.6)
                panel.annotate(
                    f"{timing['roof_share']:.0%}",
                    (x, max(rate, top)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    **{"ha": "center", "va": "bottom", "fontsize": 7, "rotation": 90},
                )
            _tidy(panel, "y")
            panel.set_xlim(-0.6, len(shapes) - 0.4)
            names = [f"F {F}\nK {K}" for F, K in shapes]
            panel.set_xticks(range(len(shapes)), names, fontsize=8)
            if i == 0:
                panel.set_title(f"N = {short(column[0])}, {column[1]} ids", fontsize=10)
            if j == 0:
                panel.set_ylabel(f"{STEPS[direction]}\nGB/s", fontsize=9)
        panels[i][0].set_ylim(0, 1.25 * highest)  # room for the shares
    figure.suptitle(f"{setting(results)}: GB/s, and share of the roof", fontsize=11)
    order = sorted(handles, key=lambda name: (name == "roof", name))
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=len(order),
        frameon=False,
    )
    figure.savefig(path, dpi=130)


def nnz(results: Record, lines: list[Record], path: Path) -> None:
    """Microseconds a sample against its entries, log-log, beside guides of slope 1 and 2."""
    figure = _figure(7, 5)
    panel = figure.subplots()
    for (name, direction, label), colour in zip(NNZ_CURVES, COLOURS, strict=False):
        points = [
            (line["num_fields"] - 1 + line["words"], 1e6 / timing["samples_per_second"])
            for line in lines
            if line["direction"] == direction
            and "seconds" in (timing := line["subjects"].get(name, {}))
        ]
        if not points:
            continue
        entries, times = zip(*points, strict=True)
        panel.plot(entries, times, "o-", color=colour, label=label)
        # Beside the curve that should follow it: below the forward, above the loop over pairs.
        if direction == "forward":
            slope, aside = (2, 2.0) if name == "modern-fm" else (1, 0.5)
            guide = [aside * times[-1] * (n / entries[-1]) ** slope for n in entries]
            style = {"color": "grey", "lw": 1, "ls": "--" if slope == 2 else ":"}
            panel.plot(entries, guide, label=f"slope {slope}", **style)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("entries a sample")
    panel.set_ylabel("µs a sample")
    _tidy(panel, "both")
    panel.legend(frameon=False)
    panel.set_title(
        f"{setting(results)}\nten one-hot fields and a text: {sizes(lines)}", fontsize=10
    )
    figure.savefig(path, dpi=130)


def batch(results: Record, lines: list[Record], path: Path) -> None:
    """Samples a second against the batch size, log-log."""
    figure = _figure(7, 5)
    panel = figure.subplots()
    names = distinct(name for line in lines for name in line["subjects"])
    for name, colour in zip(names, COLOURS, strict=False):
        points = [
            (line["batch_size"], line["subjects"][name]["samples_per_second"])
            for line in lines
            if "seconds" in line["subjects"].get(name, {})
        ]
        if points:
            panel.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    ticks = sorted(distinct(line["batch_size"] for line in lines))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [f"{size:,}" for size in ticks])
    panel.set_xlabel("samples a batch")
    panel.set_ylabel("samples/s, forward")
    _tidy(panel, "both")
    panel.legend(frameon=False)
    panel.set_title(f"{setting(results)}\n{sizes(lines)}", fontsize=10)
    figure.savefig(path, dpi=130)


def latency(results: Record, lines: list[Record], path: Path) -> None:
    """Bars of p50, with a whisker up to p99; a panel for each batch size."""
    figure = _figure(4.2 * len(lines) + 2, 3.2)
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    names = distinct(name for line in lines for name in line["subjects"])[::-1]
    for panel, line in zip(panels, lines, strict=True):
        for place, name in enumerate(names):
            timing = line["subjects"].get(name, {})
            if "seconds" not in timing:
                continue
            p50, p99 = 1e6 * timing["seconds"], 1e6 * timing["p99"]
            colour = COLOURS[0] if name in LATENCY_NAMES else COLOURS[1]
            panel.barh(place, p50, 0.7, color=colour)
            panel.plot([p50, p99], [place, place], "|-", color="black", lw=1, ms=8)
            panel.annotate(
                f"{p50:,.0f}" if p50 >= 100 else f"{p50:.1f}",
                (max(p50, p99), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        panel.set_yticks(range(len(names)), [LATENCY_NAMES.get(name, name) for name in names])
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.set_xlabel("µs a call: p50, whisker to p99")
        panel.set_title(f"B = {line['batch_size']}", fontsize=10)
        _tidy(panel, "x")
    figure.suptitle(f"{setting(results)}\ninference mode, {sizes(lines)}", fontsize=10)
    figure.savefig(path, dpi=130)


PLOTS: dict[str, Callable[[Record, list[Record], Path], None]] = {
    "roof": roof,
    "latency": latency,
    "nnz": nnz,
    "batch": batch,
}
