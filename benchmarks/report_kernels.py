# SPDX-License-Identifier: MIT
"""What the kernels do with the memory: tables and notes, a section for each part of `bench_kernels.py`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from . import plot_kernels
from .tables import STEPS, Record, Section, Table, cell, distinct, measured, reasons, sizes
from .workloads import short

# What identifies a line: who takes part in it is compared.
LINE = (
    *("part", "threads", "num_features", "num_fields", "embed_dim"),
    *("batch_size", "ids", "words", "direction"),
)
WORKLOAD = tuple(name for name in LINE if name not in ("part", "threads", "direction"))
OPERATOR = "operator"
FILLS = {
    "sparse": ("fill_touched", "memset_touched"),
    "dense": ("fill_table", "memset_table"),
}


def collect(runs: list[Record], not_timed: list[Record]) -> list[Record]:
    """A line for each part, workload, thread count and step, with the figures of its subjects."""
    timings: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    lines: dict[tuple[Any, ...], Record] = {}

    def line_of(info: Record) -> Record:
        key = tuple(info[name] for name in LINE)
        return lines.setdefault(key, {**dict(zip(LINE, key, strict=True)), "subjects": {}})

    for run in runs:
        info = run["extra_info"]
        line = line_of(info)
        line |= {name: info[name] for name in ("touched_rows",) if name in info}
        key = (*(info[name] for name in LINE), info["subject"])
        seconds = timings[key]
        seconds += run["stats"]["data"]
        line["subjects"][info["subject"]] = _timing(line, seconds)
    for what in not_timed:  # a result that was wrong in one pass has no time in any
        line_of(what)["subjects"][what["subject"]] = {"reason": what["reason"]}
    found = list(lines.values())
    _add_roofs(found)
    _add_scaling(found)
    _add_dims(found)
    _add_ratios(found)
    return found


def _timing(line: Record, seconds: list[float]) -> Record:
    timing = measured(seconds)
    timing["samples_per_second"] = line["batch_size"] / timing["seconds"]
    if line["part"] == "latency":
        timing["p99"] = statistics.quantiles(seconds, n=100)[-1]
    return timing


def roof_bytes(
    direction: str, entries: float, touched_rows: float, num_features: int, row_bytes: int
) -> tuple[float, float]:
    """Bytes that a step cannot but read and write.

    It reads the row of every entry. Backward writes the gradient once: a row for every one that the batch touches, or
    where it is dense all.
    """
    rows = {"forward": 0.0, "sparse": touched_rows, "dense": float(num_features)}[direction]
    return entries * row_bytes, rows * row_bytes


def moved_bytes(
    direction: str, entries: float, touched_rows: float, num_features: int, row_bytes: int
) -> tuple[float, float]:
    """Bytes that the kernels read and write.

    Those of the roof; and an entry whose row an earlier one has left a gradient in reads that, and writes it again.
    """
    read, written = roof_bytes(direction, entries, touched_rows, num_features, row_bytes)
    again = 0.0 if direction == "forward" else (entries - touched_rows) * row_bytes
    return read + again, written + again


def _seconds(line: Record, name: str) -> float | None:
    return line["subjects"].get(name, {}).get("seconds")


def _of_part(lines: list[Record], part: str) -> list[Record]:
    return [line for line in lines if line["part"] == part]


def _find(lines: list[Record], like: Record, **changed: Any) -> Record:
    """The line that differs from ``like`` in this and nothing else; without subjects, where there is none."""
    wanted = {**like, **changed}
    for line in lines:
        if all(line[name] == wanted[name] for name in LINE):
            return line
    return {"subjects": {}}


def _add_roofs(lines: list[Record]) -> None:
    """Adds the rates of gather and fill to the lines of the roof, and their share of it to the operators."""
    for line in _of_part(lines, "roof"):
        forward = _find(lines, line, direction="forward")
        gathers = {
            name: seconds
            for name in ("embedding_bag", "gather_sum")
            if (seconds := _seconds(forward, name))
        }
        row_bytes = 4 * line["num_fields"] * line["embed_dim"]
        entries = line["batch_size"] * line["num_fields"]
        if not gathers or "touched_rows" not in line:
            continue
        line["gather"] = min(gathers, key=lambda name: gathers[name])
        line["gather_seconds"] = gathers[line["gather"]]
        line["gather_rate"] = entries * row_bytes / line["gather_seconds"]
        of_step = line["direction"], entries, line["touched_rows"], line["num_features"], row_bytes
        roof, moved = roof_bytes(*of_step), moved_bytes(*of_step)
        if line["direction"] in FILLS:
            fills = {name: s for name in FILLS[line["direction"]] if (s := _seconds(line, name))}
            if not fills:
                continue
            line["fill"] = min(fills, key=lambda name: fills[name])
            line["fill_rate"] = roof[1] / fills[line["fill"]]
        for name, (read, written) in (("roof", roof), ("moved", moved)):
            seconds = read / line["gather_rate"]
            if written:
                seconds += written / line["fill_rate"]
            line[f"{name}_bytes"], line[f"{name}_seconds"] = read + written, seconds
            if ours := _seconds(line, OPERATOR):
                line["subjects"][OPERATOR][f"{name}_share"] = seconds / ours


def _add_scaling(lines: list[Record]) -> None:
    """Adds to the lines of the roof how many times faster they are than at the fewest threads."""
    roof = _of_part(lines, "roof")
    fewest = min((line["threads"] for line in roof), default=1)
    for line in roof:
        base = _find(lines, line, threads=fewest)
        if line["threads"] == fewest:
            continue
        before, after = base.get("gather_seconds"), line.get("gather_seconds")
        if before and after:
            line["gather_scaling"] = before / after
        before, after = _seconds(base, OPERATOR), _seconds(line, OPERATOR)
        if before and after:
            line["subjects"][OPERATOR]["scaling"] = before / after


def _add_dims(lines: list[Record]) -> None:
    """Adds the factors a second, as a share of those of the next K that has code of its own."""
    for line in _of_part(lines, "dims"):
        K = line["embed_dim"]
        larger = next((k for k in (4, 8, 16) if k > K), None)
        if K in (4, 8, 16) or larger is None:
            continue
        ours, next_ours = (
            at["subjects"].get("ffm_ext", {}).get("samples_per_second")
            for at in (line, _find(lines, line, embed_dim=larger))
        )
        if ours and next_ours:
            line["next_dim"], line["of_next_dim"] = larger, ours * K / (next_ours * larger)


def _add_ratios(lines: list[Record]) -> None:
    """Adds ratios to float32, and what a call costs beyond the bare operator."""
    for line in _of_part(lines, "dtypes"):
        if base := _seconds(line, "float32"):
            for timing in line["subjects"].values():
                if "seconds" in timing:
                    timing["to_float32"] = base / timing["seconds"]
    for line in _of_part(lines, "latency"):
        if base := _seconds(line, OPERATOR):
            for timing in line["subjects"].values():
                if "seconds" in timing:
                    timing["beyond_operator"] = timing["seconds"] - base


def sections(results: Record) -> list[Section]:
    """What was measured, part by part."""
    found = []
    for part, (heading, make, note) in SECTIONS.items():
        lines = _of_part(results["kernels"], part)
        if not lines:
            continue
        rounds = [t["rounds"] for line in lines for t in line["subjects"].values() if "rounds" in t]
        section = Section(heading, [table for table in make(lines) if table.body], [])
        if rounds:
            counts = f"{min(rounds)} to {max(rounds)}" if min(rounds) < max(rounds) else rounds[0]
            section.notes.append(
                f"{note} {sizes(lines)}; medians of {counts} timings, ± half the interquartile range."
            )
        untimed = [
            (f"{n} ({line['direction']})", t) for line in lines for n, t in line["subjects"].items()
        ]
        section.notes += reasons(untimed)
        has_roof = any("roof_share" in t for line in lines for t in line["subjects"].values())
        drawable = has_roof if part == "roof" else bool(rounds)
        if drawable and (draw := plot_kernels.PLOTS.get(part)):
            section.pictures[f"-{part}"] = partial(draw, results, lines)
        found.append(section)
    return found


def _roof_tables(lines: list[Record]) -> list[Table]:
    header = ["F", "N", "K", "ids", "thr", "touched", "gather, GB/s", "fill, GB/s"]
    for name in ("forward", "backward sparse", "backward dense"):
        header += [f"{name}, ms", "of roof", *(["of moved"] if name != "forward" else [])]
    body, scaling = [], []
    for forward in _forwards(lines):
        steps = {d: _find(lines, forward, direction=d) for d in STEPS}
        ordered = [steps[d] for d in ("forward", "sparse", "dense")]
        touched = next((s["touched_rows"] for s in ordered if "touched_rows" in s), None)
        entries = forward["batch_size"] * forward["num_fields"]
        gather = forward["subjects"].get(forward.get("gather", ""), {})
        name = {"embedding_bag": " (bag)", "gather_sum": " (sum)"}.get(
            forward.get("gather", ""), ""
        )
        cells = [
            str(forward["num_fields"]),
            short(forward["num_features"]),
            str(forward["embed_dim"]),
            forward["ids"],
        ]
        figures = [
            f"{touched / entries:.0%}" if touched else "–",
            _rate(gather, forward.get("gather_rate")) + name,
            " / ".join(
                _rate(s["subjects"].get(s.get("fill", ""), {}), s.get("fill_rate"))
                for s in ordered[1:]
            ),
        ]
        for number, step in enumerate(ordered):
            timing = step["subjects"].get(OPERATOR, {})
            figures += [cell(timing, _milliseconds), _percent(timing.get("roof_share"))]
            if number > 0:
                figures.append(_percent(timing.get("moved_share")))
        body.append([*cells, str(forward["threads"]), *figures])
        if "gather_scaling" in forward or any(
            "scaling" in step["subjects"].get(OPERATOR, {}) for step in ordered
        ):
            ratios = [forward.get("gather_scaling")]
            ratios += [step["subjects"].get(OPERATOR, {}).get("scaling") for step in ordered]
            fewest = min(line["threads"] for line in lines)
            threads = f"{forward['threads']} : {fewest}"
            scaling.append([*cells, threads, *(f"{r:.2f}×" if r else "–" for r in ratios)])
    columns = ["F", "N", "K", "ids", "threads", "gather", "forward", "backward sparse"]
    return [
        Table(header, body, left=("ids",), section=3),
        Table([*columns, "backward dense"], scaling, left=("ids",), section=3),
    ]


def _forwards(lines: list[Record]) -> list[Record]:
    """The forward of every workload and thread count; an empty line, where only a backward was measured."""
    keys = distinct(tuple(line[name] for name in (*WORKLOAD, "threads")) for line in lines)
    found = []
    for key in keys:
        like = {
            **dict(zip((*WORKLOAD, "threads"), key, strict=True)),
            **{"part": lines[0]["part"], "direction": "forward"},
        }
        found.append({**like, **_find(lines, like)})
    return found


def _dims_tables(lines: list[Record]) -> list[Table]:
    body = []
    for line in sorted(lines, key=lambda line: line["embed_dim"]):
        timing = line["subjects"].get("ffm_ext", {})
        rate = timing.get("samples_per_second")
        body.append(
            [
                str(line["embed_dim"]),
                cell(timing, _samples),
                short(rate * line["embed_dim"]) if rate else "–",
                str(line.get("next_dim", "–")),
                _percent(line.get("of_next_dim")),
            ]
        )
    return [Table(["K", "samples/s", "samples/s × K", "next K", "share of it"], body)]


def _dtypes_tables(lines: list[Record]) -> list[Table]:
    names = distinct(name for line in lines for name in line["subjects"])
    body = []
    for line in lines:
        cells = [short(line["num_features"]), str(line["embed_dim"]), STEPS[line["direction"]]]
        for name in names:
            timing = line["subjects"].get(name, {})
            ratio = timing.get("to_float32")
            shown = f" ({ratio:.2f}×)" if ratio and name != "float32" else ""
            cells.append(cell(timing, _samples) + shown)
        body.append(cells)
    return [Table(["N", "K", "step", *names], body, left=("step",), section=2)]


def _latency_tables(lines: list[Record]) -> list[Table]:
    body = []
    for line in lines:
        for name, timing in line["subjects"].items():
            known = "seconds" in timing
            beyond = timing.get("beyond_operator")
            body.append(
                [
                    str(line["batch_size"]),
                    plot_kernels.LATENCY_NAMES.get(name, name),
                    cell(timing, lambda t: f"{1e6 * t['seconds']:.1f}"),
                    f"{1e6 * timing['p99']:.1f}" if known else "–",
                    f"{1e6 * beyond:+.1f}" if beyond is not None and name != OPERATOR else "–",
                ]
            )
    header = ["B", "call", "p50, µs", "p99, µs", "p50 beyond the operator, µs"]
    return [Table(header, body, left=("call",), section=1)]


def _nnz_tables(lines: list[Record]) -> list[Table]:
    body = []
    for words in distinct(line["words"] for line in lines):
        steps = {line["direction"]: line for line in lines if line["words"] == words}
        any_step = next(iter(steps.values()))
        samples = any_step["batch_size"]
        cells = [str(words), str(any_step["num_fields"] - 1 + words), str(samples)]
        for name, direction, _ in plot_kernels.NNZ_CURVES:
            timing = steps.get(direction, {"subjects": {}})["subjects"].get(name, {})
            cells.append(cell(timing, _microseconds))
        body.append(cells)
    curves = [label for _, _, label in plot_kernels.NNZ_CURVES]
    return [Table(["words", "entries a sample", "B", *(f"{c}, µs" for c in curves)], body)]


def _batch_tables(lines: list[Record]) -> list[Table]:
    names = distinct(name for line in lines for name in line["subjects"])
    body = [
        [str(line["batch_size"]), *(cell(line["subjects"].get(n, {}), _samples) for n in names)]
        for line in lines
    ]
    return [Table(["B", *names], body)]


def _samples(timing: Record) -> str:
    return short(timing["samples_per_second"])


def _milliseconds(timing: Record) -> str:
    return f"{1e3 * timing['seconds']:.3g}"


def _rate(timing: Record, rate: float | None) -> str:
    """'11.6 ±2%', GB/s."""
    return cell(timing, lambda _: f"{rate / 1e9:.1f}") if rate else "–"


def _microseconds(timing: Record) -> str:
    """A sample's: '16.7', '2,100'."""
    figure = 1e6 / timing["samples_per_second"]
    return f"{figure:.3g}" if figure < 999.5 else f"{figure:,.0f}"


def _percent(share: float | None) -> str:
    return f"{share:.0%}" if share else "–"


SECTIONS: dict[str, tuple[str, Callable[[list[Record]], list[Table]], str]] = {
    "roof": (
        "Share of the memory's roof",
        _roof_tables,
        "Bare operators, float32. Touched: distinct rows R over entries E = B·F. Gather: the rows of all entries read "
        "and summed, by the faster of embedding_bag (bag) and gather_sum (sum). Fill: a buffer of the size of the "
        "sparse / of the dense gradient, by the faster of Tensor.fill_ and memset. The roof of a forward is the time "
        "of the gather. That of a backward is the rows of all E entries / gather rate + the rows of the gradient, R or "
        "N, / fill rate. Of moved: the same with what the kernels read and write besides, E - R rows of the gradient "
        "each, because an entry adds to them. Rows in cache count too, and a backward asks for more at a time than the "
        "gather and the fill one after the other, so a share can pass 100 %. Second table: how many times as fast with "
        "more threads.",
    ),
    "dims": (
        "Numbers of factors that have no code of their own",
        _dims_tables,
        "Forward. All K take turns. Share: samples/s × K over that of the next larger of 4, 8, 16.",
    ),
    "dtypes": (
        "Types of the table",
        _dtypes_tables,
        "Samples a second; in brackets, over those of float32. Int8 tables have no gradient.",
    ),
    "latency": (
        "Latency of a call",
        _latency_tables,
        "torch.inference_mode. p50 and p99 over all calls. What the layer takes beyond the operator is the cost of the "
        "Python around it.",
    ),
    "nnz": (
        "Time against entries",
        _nnz_tables,
        "Microseconds a sample: ten one-hot fields and a text, with values; pairs of words count too. modern-fm goes "
        "through all pairs of entries.",
    ),
    "batch": (
        "Speed against the batch",
        _batch_tables,
        "Samples a second, forward without autograd.",
    ),
}
