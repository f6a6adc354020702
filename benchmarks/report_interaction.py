# SPDX-License-Identifier: MIT
"""The interaction beside its peers: table, notes and plot.

The table has a line for each workload, thread count and kind of step, and a column for each subject.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .tables import COLOURS, STEPS, Record, Table, cell, distinct, measured, setting
from .workloads import short

# What identifies a line of the table.
LINE = ("threads", "num_features", "num_fields", "embed_dim", "batch_size", "ids", "direction")


def collect(runs: list[Record], not_timed: list[Record]) -> tuple[dict[str, str], list[Record]]:
    """The role of each subject, and the lines: timings, and what was not timed and why."""
    timings: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    roles: dict[str, str] = {}
    for run in runs:
        info = run["extra_info"]
        roles[info["subject"]] = info["role"]
        timings[_key(info)] += run["stats"]["data"]
    untimed: dict[tuple[Any, ...], str] = {}
    for what in not_timed:
        roles[what["subject"]] = what["role"]
        untimed[_key(what)] = what["reason"]

    lines: dict[tuple[Any, ...], Record] = {}
    for key in dict.fromkeys([*timings, *untimed]):
        line = lines.setdefault(key[:-1], {**dict(zip(LINE, key, strict=False)), "subjects": {}})
        # A result that was wrong in one pass has no time in any.
        if key in untimed:
            line["subjects"][key[-1]] = {"reason": untimed[key]}
        else:
            line["subjects"][key[-1]] = _timing(line, timings[key])
    for line in lines.values():
        _compare(line, lines, roles)
    return roles, sorted(lines.values(), key=_order)


def _key(info: Record) -> tuple[Any, ...]:
    return *(info[name] for name in LINE), info["subject"]


def _order(line: Record) -> tuple[Any, ...]:
    step = list(STEPS).index(line["direction"])
    return *(line[key] for key in ("threads", "embed_dim", "num_features", "ids")), step


def _timing(line: Record, seconds: list[float]) -> Record:
    timing = measured(seconds)
    table_bytes = 4 * line["batch_size"] * line["num_fields"] ** 2 * line["embed_dim"]
    return {
        **timing,
        "samples_per_second": line["batch_size"] / timing["seconds"],
        "gigabytes_per_second": table_bytes / timing["seconds"] / 1e9,
    }


def _compare(line: Record, lines: dict[tuple[Any, ...], Record], roles: dict[str, str]) -> None:
    """Adds to each timing its share of the roof and its ratio to the best peer.

    The roof is the fastest gather. A step with a sparse gradient competes with the dense ones too: whoever trains
    takes the faster.
    """
    key = [line[name] for name in LINE]

    def rates(direction: str, role: str) -> dict[str, float]:
        other = lines.get((*key[:-1], direction), {"subjects": {}})
        return {
            name: timing["samples_per_second"]
            for name, timing in other["subjects"].items()
            if roles[name] == role and "samples_per_second" in timing
        }

    roof = max(rates("forward", "roof").values(), default=None)
    peers = rates(line["direction"], "peer")
    if line["direction"] == "sparse":
        dense = rates("dense", "peer")
        peers = {name: max(peers.get(name, 0), dense.get(name, 0)) for name in {**dense, **peers}}
    best = max(peers, key=lambda name: peers[name], default=None)
    line["best_peer"] = best
    for timing in line["subjects"].values():
        if rate := timing.get("samples_per_second"):
            timing["roof_share"] = rate / roof if roof else None
            timing["to_best_peer"] = rate / peers[best] if best else None


def table(results: Record) -> Table:
    names = [name for name, role in results["roles"].items() if role == "peer"]
    ours = next((name for name, role in results["roles"].items() if role == "ours"), "ffm_ext")
    header = ["thr", "N", "K", "ids", "step", ours, "GB/s", "of roof", "× best peer", *names]
    body = []
    for line in results["lines"]:
        mine = line["subjects"].get(ours, {})
        share, ratio = mine.get("roof_share"), mine.get("to_best_peer")
        cells = [
            str(line["threads"]),
            short(line["num_features"]),
            str(line["embed_dim"]),
            line["ids"],
            STEPS[line["direction"]],
            _cell(mine),
            f"{mine['gigabytes_per_second']:.1f}" if "seconds" in mine else "–",
            f"{share:.0%}" if share else "–",
            f"{ratio:.1f} ({line['best_peer']})" if ratio else "–",
        ]
        for name in names:
            timing, is_dense = _figure(line, results["lines"], name)
            cells.append(_cell(timing) + (" (dense)" if is_dense and "seconds" in timing else ""))
        body.append(cells)
    return Table(header, body, left=("ids", "step"), section=4, bold=ours)


def _figure(line: Record, lines: list[Record], name: str) -> tuple[Record, bool]:
    """A subject's timing on a line, and whether it is that of a dense gradient in place of a sparse one."""
    if name not in line["subjects"] and line["direction"] == "sparse":
        wanted = {**line, "direction": "dense"}
        for other in lines:
            if all(other[key] == wanted[key] for key in LINE) and name in other["subjects"]:
                return other["subjects"][name], True
    return line["subjects"].get(name, {}), False


def _cell(timing: Record) -> str:
    return cell(timing, lambda t: short(t["samples_per_second"]))


def notes(results: Record) -> list[str]:
    """How to read the table."""
    lines = results["lines"]
    rounds = [t["rounds"] for line in lines for t in line["subjects"].values() if "rounds" in t]
    sizes = sorted({(line["num_fields"], line["batch_size"]) for line in lines})
    roofs = ", ".join(name for name, role in results["roles"].items() if role == "roof")
    gathers = f" ({roofs})" if roofs else ""
    return [
        "Samples a second: batch size over the median time of a step, "
        f"{min(rounds, default=0)} to {max(rounds, default=0)} timings; ± half the interquartile "
        f"range. {', '.join(f'F = {f}, B = {b}' for f, b in sizes)}, float32. "
        "'+ … grad' is forward and backward.",
        "GB/s: bytes of table rows that a forward reads, over the time of the whole step. Of roof: "
        f"share of the samples a second of the faster gather of those rows{gathers}. "
        "(dense): it has no sparse gradient; the figure is that of its dense one.",
    ]


def plot(results: Record, path: Path) -> None:
    """Bars of samples a second: a row of panels for each kind of step, a column for each table size and ids.

    Hatched: a dense gradient, where the step asks for a sparse one.
    """
    from matplotlib.figure import Figure

    fewest = min(line["threads"] for line in results["lines"])
    lines = [line for line in results["lines"] if line["threads"] == fewest]
    columns = distinct((line["num_features"], line["ids"]) for line in lines)
    directions = [d for d in STEPS if any(line["direction"] == d for line in lines)]
    names = [name for name, role in results["roles"].items() if role != "roof"]
    colours = dict(zip(names, COLOURS, strict=False))
    size = max(7.5, 1.6 + 2.9 * len(columns)), 1.3 + 2.2 * len(directions)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(directions), len(columns), sharey=True, squeeze=False)
    for i, direction in enumerate(directions):
        for j, (num_features, ids) in enumerate(columns):
            panel = panels[i][j]
            here = [
                line
                for line in lines
                if (line["direction"], line["num_features"], line["ids"])
                == (direction, num_features, ids)
            ]
            for number, name in enumerate(names):
                for place, line in enumerate(here):
                    timing, is_dense = _figure(line, lines, name)
                    panel.bar(
                        place + 0.8 * ((number + 0.5) / len(names) - 0.5),
                        timing.get("samples_per_second", 0),
                        width=0.8 / len(names),
                        color=colours.get(name),
                        hatch="////" if is_dense else None,
                        edgecolor="white",
                        linewidth=0,
                        label=name if (i, j, place) == (0, 0, 0) else None,
                    )
            for place, line in enumerate(here):
                gathers = [
                    timing["samples_per_second"]
                    for name, timing in line["subjects"].items()
                    if results["roles"][name] == "roof" and "seconds" in timing
                ]
                if gathers:
                    label = "gather roof" if (i, j, place) == (0, 0, 0) else None
                    panel.hlines(max(gathers), place - 0.45, place + 0.45, "black", label=label)
            panel.set_xticks(range(len(here)), [f"K = {line['embed_dim']}" for line in here])
            panel.set_xlim(-0.6, len(here) - 0.4)
            panel.set_yscale("log")
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
            if i == 0:
                panel.set_title(f"N = {short(num_features)}, {ids} ids", fontsize=10)
            if j == 0:
                step = direction if direction == "forward" else f"forward {STEPS[direction]}"
                panel.set_ylabel(f"{step}\nsamples/s", fontsize=9)
    figure.suptitle(
        f"{setting(results)}, {fewest} thread{'s' * (fewest > 1)}: "
        f"F = {lines[0]['num_fields']}, B = {lines[0]['batch_size']}",
        fontsize=11,
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)
