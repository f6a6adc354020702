# SPDX-License-Identifier: MIT
"""The benchmark harness: it runs to its end without peers, says what is missing, and times nothing that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    kernel_subjects,
    memory,
    report,
    report_interaction,
    report_kernels,
    report_training,
    subjects,
    workloads,
)
from benchmarks.__main__ import main as benchmarks_main  # noqa: E402
from benchmarks.machine import describe, slug  # noqa: E402

TINY = workloads.Workload(500, 4, "uniform", num_fields=5, batch_size=70)
RUN = """
import os, sys
os.environ.pop("PYTEST_XDIST_WORKER", None)  # one of several workers must not time anything
sys.modules.update(dict.fromkeys(("torchfm", "modern_fm", "fastFM")))  # None: importing them fails
from benchmarks.__main__ import main
sys.exit(main(["--smoke", "--only", "not compiled", "--results", sys.argv[1]]))
"""


def test_harness_runs_without_peers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    # Before the run, too.
    assert "benchmarks: torchfm will not be compared: missing: " in run.stderr
    assert "benchmarks: `make peers` installs what can be compared" in run.stderr

    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "smoke-part.json",
        "smoke-part.md",
        "smoke-part.png",
        *(f"smoke-part-{part}.png" for part in ("roof", "latency", "nnz", "batch")),
    }
    results = json.loads((folder / "smoke-part.json").read_text())
    assert [line["direction"] for line in results["lines"]] == ["forward", "dense", "sparse"]
    for line in results["lines"]:
        assert line["subjects"]["ffm_ext"]["rounds"] >= 7
        assert line["subjects"]["vectorised"]["samples_per_second"] > 0
    assert results["lines"][0]["subjects"]["torchfm"]["reason"].startswith("missing: ")
    learners = {r["learner"]: r for r in results["quality"] if r["data"] == "user-item"}
    assert learners["fastFM ALS"]["reason"].startswith("missing: ")
    assert learners["ffm_ext FFM"]["rmse"] > 0
    _check_kernels(results["kernels"])
    # Said where a person looks, too.
    assert "torchfm: missing: " in run.stdout
    text = (folder / "smoke-part.md").read_text()
    assert "| missing |" in text
    for heading, *_ in report_kernels.SECTIONS.values():
        assert heading in run.stdout
        assert f"\n## {heading}\n" in text
    for path in folder.glob("*.png"):
        assert f"]({path.name})" in text


INTERRUPTED = """
import os, sys
os.environ.pop("PYTEST_XDIST_WORKER", None)
sys.modules["matplotlib"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "matplotlib" else find(name, *more)
from benchmarks import subjects
from benchmarks.__main__ import main
calls = 0
def step(self, *arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        raise KeyboardInterrupt
    return subjects.Subject.step(self, *arguments)
subjects.Fused.step = step
sys.exit(main(["--smoke", "--only", "interaction and ffm_ext", "--results", sys.argv[1]]))
"""


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    """In the first timed round of the second case. And without plots: there is no matplotlib."""
    calls = 3 + 3  # a case takes two steps to warm up, and one
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(calls)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2, run.stdout + run.stderr
    assert "benchmarks: no plots, for matplotlib is missing" in run.stderr
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"smoke-part.json", "smoke-part.md"}
    (line,) = json.loads((folder / "smoke-part.json").read_text())["lines"]
    assert line["direction"] == "forward" and line["subjects"]["ffm_ext"]["rounds"] >= 1

    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--show", str(folder / "smoke-part.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ffm_ext" in shown.stdout and "smoke" not in shown.stderr


def test_every_published_result_can_be_shown() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        results = json.loads(path.read_text())
        if "kernels" in results:  # those of a GPU have a report of their own
            assert report.markdown(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "{file}"], "the results cannot be saved: "),
        (["--name", "sub/folder"], "'sub/folder' is no name of a file"),
        (["--threads", "two"], "argument --threads: invalid list of thread counts value: 'two'"),
        (["--threads", "0"], "argument --threads: invalid list of thread counts value: '0'"),
    ],
)
def test_what_cannot_be_measured_is_said_before(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    defaults = ["--smoke", "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as stopped:
        benchmarks_main([*defaults, *(argument.format(file=file) for argument in arguments)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def _check_kernels(lines: list[dict[str, Any]]) -> None:
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        parts.setdefault(line["part"], []).append(line)
        for timing in line["subjects"].values():
            assert timing.get("reason", "").startswith("missing: ") or timing["rounds"] >= 7
    assert list(parts) == list(report_kernels.SECTIONS)
    assert [line["direction"] for line in parts["roof"]] == ["forward", "dense", "sparse"]
    for line in parts["roof"]:
        assert line["subjects"]["operator"]["roof_share"] > 0
    assert parts["dims"][0]["of_next_dim"] > 0
    assert parts["dtypes"][0]["subjects"].keys() == {"float32", "bfloat16", "float16", "int8"}
    assert "reason" in parts["nnz"][0]["subjects"]["modern-fm"]
    latency = parts["latency"][0]["subjects"]
    assert latency["layer"]["rounds"] >= 30
    assert latency["layer"]["p99"] >= latency["layer"]["seconds"]


@pytest.mark.parametrize("ids", ["uniform", "zipf"])
def test_batches_keep_to_their_fields(ids: workloads.Ids) -> None:
    workload = workloads.Workload(503, 4, ids, num_fields=5, batch_size=70)
    starts = torch.tensor(workload.field_starts)
    dims = torch.tensor(workload.field_dims)
    assert dims.sum() == 503
    for indices in workloads.make_batches(workload):
        assert indices.shape == (70, 5)
        assert ((indices >= starts) & (indices < starts + dims)).all()


def test_texts_hold_no_word_twice() -> None:
    workload = workloads.TextWorkload(1_000, 4, "uniform", batch_size=7, words=100)
    assert sum(workload.field_dims) == 1_000
    fields = torch.arange(11).repeat_interleave(torch.tensor(workload.field_dims))
    for batch in workloads.make_batches(workload):
        assert len(batch) == 7
        assert (fields[batch.indices] == batch.fields).all()
        for sample in batch.indices.view(7, 110):
            assert sample.unique().numel() == 110


class _Doubled(subjects.Vectorised):
    def forward(self, batch: Tensor, direction: workloads.Direction) -> Tensor:
        return 2 * super().forward(batch, direction)


class _LeakyGradient(subjects.Vectorised):
    """Right on the rows that are touched, but not nothing elsewhere."""

    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, total = super().gradient(rows)
        return values, 1.1 * total


class _ShiftedOperator(kernel_subjects.Operator):
    """The gradient of every row on the row before it."""

    def backward(self, batch: Tensor, grad_output: Tensor, direction: workloads.Direction) -> None:
        super().backward(batch, grad_output, direction)
        self.made = *self.made[:-2], self.made[-2].roll(-1, 0), self.made[-1]


@pytest.mark.parametrize(
    ("kind", "direction", "wrong"),
    [
        *(
            (kind, d, False)
            for kind in (subjects.Fused, subjects.Vectorised, kernel_subjects.Operator)
            for d in ("forward", "dense", "sparse")
        ),
        *(
            (kind, d, False)
            for kind in (kernel_subjects.BFloat16, kernel_subjects.Float16)
            for d in ("forward", "sparse")
        ),
        *(
            (kind, "forward", False)
            for kind in (kernel_subjects.Layer, kernel_subjects.Model, kernel_subjects.Int8)
        ),
        (_ShiftedOperator, "dense", True),
        (_ShiftedOperator, "sparse", True),
        (subjects.GatherBag, "forward", False),
        (_Doubled, "forward", True),
        (_Doubled, "sparse", True),
        (_LeakyGradient, "dense", True),
    ],
)
def test_check_finds_what_is_wrong(
    kind: type[subjects.Subject], direction: workloads.Direction, wrong: bool
) -> None:
    subject = kind(TINY, workloads.make_weight(TINY))
    indices = workloads.make_batches(TINY)[0]
    verdict = subjects.check(subject, indices, torch.randn(len(indices)), direction)
    assert verdict is None if not wrong else verdict and verdict.startswith("wrong: ")
    assert subject.weight.grad is None


@pytest.mark.parametrize("direction", ["forward", "sparse"])
def test_check_of_texts(direction: workloads.Direction) -> None:
    workload = workloads.TextWorkload(1_000, 4, "uniform", batch_size=70, words=9)
    subject = kernel_subjects.FusedText(workload, workloads.make_weight(workload))
    batch = workloads.make_batches(workload)[0]
    assert subjects.check(subject, batch, torch.randn(len(batch)), direction) is None


def _run(subject: str, role: str, direction: str, seconds: float) -> dict[str, Any]:
    info = {**_info(subject, role, direction), "pass": 0}
    data = [seconds * factor for factor in (0.9, 1.0, 1.0, 1.0, 1.1)]
    return {"extra_info": info, "stats": {"data": data, "median": seconds}}


def _info(subject: str, role: str, direction: str) -> dict[str, Any]:
    return {
        "num_features": 100_000,
        "embed_dim": 4,
        "ids": "zipf",
        "num_fields": 10,
        "batch_size": 1000,
        "threads": 1,
        "direction": direction,
        "subject": subject,
        "role": role,
    }


def test_report() -> None:
    machine = {**describe(), "cpu": "Example(R) CPU 9000 @ 2.0GHz", "cores": 2}
    raw = {
        "machine_info": machine,
        "benchmarks": [
            _run("ours", "ours", "forward", 0.001),
            _run("slow", "peer", "forward", 0.010),
            _run("broken", "peer", "forward", 0.0001),
            _run("gather", "roof", "forward", 0.0005),
            _run("ours", "ours", "sparse", 0.002),
            _run("slow", "peer", "dense", 0.050),
        ],
        "not_timed": [
            {**_info("broken", "peer", "forward"), "reason": "wrong: off by one"},
            {**_info("absent", "peer", "forward"), "reason": "missing: No module named 'absent'"},
        ],
    }
    results = report.collect(raw)
    lines = {line["direction"]: line for line in results["lines"]}
    ours = lines["forward"]["subjects"]["ours"]
    assert ours["samples_per_second"] == pytest.approx(1e6)
    assert ours["gigabytes_per_second"] == pytest.approx(1000 * 10 * 10 * 4 * 4 / 0.001 / 1e9)
    assert ours["roof_share"] == pytest.approx(0.5)
    # A peer that is wrong has no time, however fast, and is no one's best peer.
    assert lines["forward"]["subjects"]["broken"] == {"reason": "wrong: off by one"}
    assert (lines["forward"]["best_peer"], ours["to_best_peer"]) == ("slow", pytest.approx(10))
    # A sparse gradient is compared with the dense one of a peer that has no other.
    assert lines["sparse"]["subjects"]["ours"]["to_best_peer"] == pytest.approx(25)

    text = report.markdown(results)
    table = report_interaction.table(results)
    header, body = table.header, table.body
    assert header[:6] == ["thr", "N", "K", "ids", "step", "ours"]
    assert all(len(cells) == len(header) for cells in body)
    assert "1M ±5%" in text
    assert "20k ±5% (dense)" in text
    assert "| wrong |" in text
    assert "absent: missing: No module named 'absent' (1×)" in text
    assert slug(machine) == f"example-9000-{machine['isa']}-2-cores"
    assert machine["isa"] in report.title(results)


def test_report_of_training_compares_turns() -> None:
    def run(engine: str, number: int, epochs: list[float], samples: int = 1_000) -> dict[str, Any]:
        info = {"threads": 1, "table": "T", "engine": engine, "pass": number, "samples": samples}
        return {
            "extra_info": {
                **info,
                "epoch_seconds": epochs,
                "valid_logloss": [0.6, 0.5 - number / 10],
            }
        }

    runs = [
        # The machine is three times as slow in the second turn; libffm has a moment of its own in the third.
        *(run("ours", number, [s, s]) for number, s in enumerate((0.1, 0.3, 0.1))),
        *(run("libffm", number, [s, s]) for number, s in enumerate((0.2, 0.6, 0.5))),
        *(run("slow", number, [s], 100) for number, s in enumerate((0.2, 0.6, 0.2))),
    ]
    absent = {
        "threads": 1,
        "table": "T",
        "engine": "absent",
        "pass": 0,
        "reason": "missing: no absent",
    }
    records = {
        r["engine"]: r for r in report_training.collect(runs, [absent, {**absent, "pass": 1}])
    }
    assert records["ours"]["ratios"] == pytest.approx([2, 2, 5])
    assert records["slow"]["ratios"] == pytest.approx([0.1, 0.1, 0.25])
    assert records["ours"]["samples_per_second"] == pytest.approx(1e4)
    (section,) = report_training.sections(list(records.values()))
    cells = {row[2]: row[3:] for row in section.tables[0].body}
    assert cells["ours"] == ["10k ±100%", "2.00 (2.00 to 5.00)", "6", "0.30000"]
    assert cells["absent"] == ["missing", "–", "–", "–"]
    assert any("absent: missing: no absent" in note for note in section.notes)


def test_roof_counts_reads_and_writes() -> None:
    # 10 entries on 6 rows of a table of 100.
    sizes = 10, 6, 100, 8
    for count in (report_kernels.roof_bytes, report_kernels.moved_bytes):
        assert count("forward", *sizes) == (10 * 8, 0)
    assert report_kernels.roof_bytes("sparse", *sizes) == (10 * 8, 6 * 8)
    assert report_kernels.roof_bytes("dense", *sizes) == (10 * 8, 100 * 8)
    assert report_kernels.moved_bytes("sparse", *sizes) == ((10 + 4) * 8, 10 * 8)
    assert report_kernels.moved_bytes("dense", *sizes) == ((10 + 4) * 8, (10 + 94) * 8)


def _kernel_run(part: str, subject: str, seconds: float, **changed: Any) -> dict[str, Any]:
    info = {**_info(subject, "ours", "forward"), "part": part, "words": None, "pass": 0, **changed}
    return {"extra_info": info, "stats": {"data": [seconds] * 5, "median": seconds}}


def test_report_of_kernels() -> None:
    touched = {"touched_rows": 4_000}
    runs = [
        # E = 10,000 entries; a gather of them takes 1 ms, at two threads 0.5 ms.
        _kernel_run("roof", "embedding_bag", 2e-3, **touched),
        _kernel_run("roof", "gather_sum", 1e-3, **touched),
        _kernel_run("roof", "operator", 1.25e-3, **touched),
        _kernel_run("roof", "fill_touched", 0.6e-3, direction="sparse", **touched),
        _kernel_run("roof", "memset_touched", 0.4e-3, direction="sparse", **touched),
        _kernel_run("roof", "operator", 5.2e-3, direction="sparse", **touched),
        _kernel_run("roof", "fill_table", 20e-3, direction="dense", **touched),
        _kernel_run("roof", "operator", 45.6e-3, direction="dense", **touched),
        _kernel_run("roof", "gather_sum", 0.5e-3, threads=2, **touched),
        _kernel_run("roof", "operator", 1e-3, threads=2, **touched),
        _kernel_run("dims", "ffm_ext", 3e-3, embed_dim=3),
        _kernel_run("dims", "ffm_ext", 2e-3, embed_dim=4),
        _kernel_run("dtypes", "float32", 3e-3),
        _kernel_run("dtypes", "int8", 1e-3),
        _kernel_run("latency", "layer", 12e-6),
        _kernel_run("latency", "operator", 5e-6),
    ]
    absent = {**_kernel_run("latency", "absent", 1.0)["extra_info"], "reason": "missing: no absent"}
    machine = {**describe(), "cpu": "Example", "cores": 2}
    results = report.collect({"machine_info": machine, "benchmarks": runs, "not_timed": [absent]})
    assert results["lines"] == []
    lines = {
        (line["part"], line["threads"], line["direction"], line["embed_dim"]): line
        for line in results["kernels"]
    }
    operators = {key[:3]: line["subjects"].get("operator", {}) for key, line in lines.items()}
    assert lines["roof", 1, "forward", 4]["gather"] == "gather_sum"
    assert operators["roof", 1, "forward"]["roof_share"] == pytest.approx(0.8)
    # Cannot but read 10,000 rows in 1 ms, write 4,000 in 0.4 ms. Reads 16,000 rows in 1.6 ms, writes 10,000 in 1 ms.
    assert operators["roof", 1, "sparse"]["roof_share"] == pytest.approx(1.4 / 5.2)
    assert operators["roof", 1, "sparse"]["moved_share"] == pytest.approx(2.6 / 5.2)
    # Cannot but write 100,000 in 20 ms. Reads as many as before, writes 10,000 + 96,000 in 21.2 ms.
    assert operators["roof", 1, "dense"]["roof_share"] == pytest.approx(21 / 45.6)
    assert operators["roof", 1, "dense"]["moved_share"] == pytest.approx(22.8 / 45.6)
    assert operators["roof", 2, "forward"]["roof_share"] == pytest.approx(0.5)
    assert operators["roof", 2, "forward"]["scaling"] == pytest.approx(1.25)
    assert lines["roof", 2, "forward", 4]["gather_scaling"] == pytest.approx(2)
    # 3 factors in 3 ms, 4 in 2 ms.
    assert lines["dims", 1, "forward", 3]["of_next_dim"] == pytest.approx(0.5)
    assert lines["dtypes", 1, "forward", 4]["subjects"]["int8"]["to_float32"] == pytest.approx(3)
    latency = lines["latency", 1, "forward", 4]["subjects"]
    assert latency["layer"]["beyond_operator"] == pytest.approx(7e-6)
    text = report.markdown(results)
    assert "| 2 : 1 | 2.00× | 1.25× | – | – |" in text
    assert "- absent (forward): missing: no absent (1×)" in text


@pytest.mark.parametrize("num_features", [20_000, 200_000])
@pytest.mark.parametrize("direction", workloads.DIRECTIONS)
def test_peak_of_a_step_is_its_arrays(direction: workloads.Direction, num_features: int) -> None:
    workload = workloads.Workload(num_features, 4, "uniform")
    touched = workloads.make_batches(workload)[0].unique().numel()
    wanted = memory.expected_bytes(workload, direction, touched)
    rise = memory.measure(subjects.Fused, workload, direction)
    assert 0.9 * wanted - 2**21 < rise < 1.05 * wanted + 2**21
