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

from benchmarks import report, subjects, workloads  # noqa: E402
from benchmarks.machine import describe, slug  # noqa: E402

TINY = workloads.Workload(500, 4, "uniform", num_fields=5, batch_size=70)
RUN = """
import sys
sys.modules.update(dict.fromkeys(("torchfm", "modern_fm", "fastFM")))  # None: importing them fails
from benchmarks.__main__ import main
sys.exit(main(["--smoke", "--only", "not compiled", "--results", sys.argv[1]]))
"""


def test_harness_runs_without_peers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "smoke-part.json",
        "smoke-part.md",
        "smoke-part.png",
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
    # Said where a person looks, too.
    assert "torchfm: missing: " in run.stdout
    assert "| missing |" in (folder / "smoke-part.md").read_text()


@pytest.mark.parametrize("ids", ["uniform", "zipf"])
def test_batches_keep_to_their_fields(ids: workloads.Ids) -> None:
    workload = workloads.Workload(503, 4, ids, num_fields=5, batch_size=70)
    starts = torch.tensor(workload.field_starts)
    dims = torch.tensor(workload.field_dims)
    assert dims.sum() == 503
    for indices in workloads.make_batches(workload):
        assert indices.shape == (70, 5)
        assert ((indices >= starts) & (indices < starts + dims)).all()


class _Doubled(subjects.Vectorised):
    def forward(self, batch: Tensor, direction: workloads.Direction) -> Tensor:
        return 2 * super().forward(batch, direction)


class _LeakyGradient(subjects.Vectorised):
    """Right on the rows that are touched, but not nothing elsewhere."""

    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, total = super().gradient(rows)
        return values, 1.1 * total


@pytest.mark.parametrize(
    ("kind", "direction", "wrong"),
    [
        *(
            (kind, d, False)
            for kind in (subjects.Fused, subjects.Vectorised)
            for d in ("forward", "dense", "sparse")
        ),
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

    text = report.markdown(results, None)
    header, body = report.rows(results)
    assert header[:6] == ["thr", "N", "K", "ids", "step", "ours"]
    assert all(len(cells) == len(header) for cells in body)
    assert "1M ±5%" in text
    assert "20k ±5% (dense)" in text
    assert "| wrong |" in text
    assert "absent: missing: No module named 'absent' (1×)" in text
    assert slug(machine) == "example-9000-2-cores"
    assert machine["isa"] in report.title(results)
