# SPDX-License-Identifier: MIT
"""From pytest-benchmark's JSON to tables, notes and plots: printed, and saved as .json, .md and .png."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import table as rich_table
from rich.console import Console, Group
from rich.text import Text

from . import (
    files,
    quality,
    report_files,
    report_interaction,
    report_kernels,
    report_memory,
    report_training,
    subjects,
    training,
)
from .machine import slug
from .peer import Peer
from .tables import Record, Section, Table, reasons

SUBJECTS = ("interaction", "quality", "training", "files", "memory", "kernels")


def missing() -> list[str]:
    """What will not be compared, and why."""
    peers: tuple[type[Peer], ...] = (
        *(*subjects.SUBJECTS, *training.ENGINES, *files.ENGINES),
        *quality.LEARNERS,
    )
    found = {peer.name: reason for peer in peers if (reason := peer.missing())}
    hint = ["`make peers` installs what can be compared"] if found else []
    return [f"{name} will not be compared: {reason}" for name, reason in found.items()] + hint


def collect(raw: Record) -> Record:
    """The results of a run: machine, timings, quality, kernels, and what was not timed and why."""
    runs: dict[str, list[Record]] = {subject: [] for subject in SUBJECTS}
    not_timed: dict[str, list[Record]] = {subject: [] for subject in SUBJECTS}
    for run in raw["benchmarks"]:
        runs[_subject(run["extra_info"])].append(run)
    for what in raw["not_timed"]:
        not_timed[_subject(what)].append(what)
    roles, lines = report_interaction.collect(runs["interaction"], not_timed["interaction"])
    quality = [{**run["extra_info"], "seconds": run["stats"]["median"]} for run in runs["quality"]]
    return {
        "machine": raw["machine_info"],
        "commit": raw.get("commit"),
        "roles": roles,
        "lines": lines,
        "quality": quality + not_timed["quality"],
        "training": report_training.collect(runs["training"], not_timed["training"]),
        "files": report_files.collect(runs["files"], not_timed["files"]),
        "memory": report_memory.collect(runs["memory"], not_timed["memory"]),
        "kernels": report_kernels.collect(runs["kernels"], not_timed["kernels"]),
    }


def _subject(info: Record) -> str:
    marks = {
        "learner": "quality",
        "engine": "training",
        "reader": "files",
        "holder": "memory",
        "part": "kernels",
    }
    return next((subject for mark, subject in marks.items() if mark in info), "interaction")


def _quality_table(results: Record) -> Table:
    body = []
    for record in results["quality"]:
        if "reason" in record:
            figures = [record["reason"].partition(":")[0], "–", "–"]
        else:
            figures = [
                f"{record['rmse']:.4f}",
                f"{record['r2']:.4f}",
                f"{record['seconds']:.1f}",
            ]
        body.append([record["data"], record["learner"], *figures])
    header = ["data", "model", "test RMSE", "test R²", "fit + predict, s"]
    return Table(header, body, left=("data", "model"), section=1)


def title(results: Record) -> str:
    machine = results["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['caches']}, {machine['memory']}; "
        f"ISA {machine['isa']}; torch {machine['torch']}; ffm_ext {machine['ffm_ext']}"
        f"{' at ' + results['commit'] if results['commit'] else ''}, compiler {machine['compiler']}; "
        f"Python {machine['python']}, {machine['system']}; {machine['date']}"
    )


def sections(results: Record) -> list[Section]:
    """The interaction beside its peers with quality, and a section for each question about the kernels."""
    lines, quality = results["lines"], results["quality"]
    section = Section(None, [], [])
    if lines:
        section.tables.append(report_interaction.table(results))
        section.notes += report_interaction.notes(results)
    if quality:
        section.tables.append(_quality_table(results))
    section.notes += reasons(item for line in lines for item in line["subjects"].items())
    section.notes += reasons((f"{r['data']}, {r['learner']}", r) for r in quality)
    if any("seconds" in t for line in lines for t in line["subjects"].values()):
        section.pictures[""] = partial(report_interaction.plot, results)
    first = [section] if section.tables else []
    # Older results lack some.
    for subject, make in (
        ("training", report_training),
        ("files", report_files),
        ("memory", report_memory),
    ):
        first += make.sections(results.get(subject, []))
    return first + report_kernels.sections(results)


def render(results: Record) -> Group:
    """The tables for a terminal."""
    parts: list[Any] = [Text(title(results), style="italic")]
    for section in sections(results):
        if section.heading:
            parts.append(Text(f"\n{section.heading}", style="bold"))
        parts += [_rich(table) for table in section.tables]
        parts += [Text(note, style="dim") for note in section.notes]
    return Group(*parts)


def _rich(table: Table) -> rich_table.Table:
    shown = rich_table.Table()
    for name in table.header:
        style = "bold" if name == table.bold else None
        justify: Any = "left" if name in table.left else "right"
        shown.add_column(name, justify=justify, no_wrap=True, style=style)
    for cells, following in zip(table.body, [*table.body[1:], None], strict=True):
        ends = following is None or following[: table.section] != cells[: table.section]
        shown.add_row(*cells, end_section=ends)
    return shown


def markdown(results: Record, pictures: Sequence[str] = ()) -> str:
    """The same for a file; ``pictures`` are the names of those that were drawn, in the order of the sections."""
    parts = [f"# Benchmarks\n\n{title(results)}\n"]
    drawn = iter(pictures)
    for section in sections(results):
        if section.heading:
            parts.append(f"## {section.heading}\n")
        for table in section.tables:
            lines = [table.header, ["---"] * len(table.header), *table.body]
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
        for _, picture in zip(
            section.pictures, drawn
        ):  # takes from drawn no more than the section has
            parts.append(f"![{section.heading or 'samples a second'}]({picture})\n")
        parts.append("\n".join(f"- {note}" for note in section.notes) + "\n")
    return "\n".join(parts)


def check_writable(folder: Path, name: str) -> None:
    """Raise OSError unless :func:`save` could write there, as far as can be known before."""
    if Path(name).name != name:
        raise OSError(f"{name!r} is no name of a file")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def save(results: Record, folder: Path, name: str) -> list[Path]:
    """``name``.json, .md and, where something was timed, its pictures, in the machine's folder."""
    folder = folder / slug(results["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    for ending in ("", *(f"-{part}" for part in report_kernels.SECTIONS)):  # of an older run
        (folder / f"{name}{ending}.png").unlink(missing_ok=True)
    for section in sections(results) if find_spec("matplotlib") else []:
        for ending, draw in section.pictures.items():
            paths.append(folder / f"{name}{ending}.png")
            draw(paths[-1])
    paths[1].write_text(markdown(results, [path.name for path in paths[2:]]))
    return paths


def show(results: Record) -> None:
    """Prints the tables; without a terminal to measure, as wide as they are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(render(results))
