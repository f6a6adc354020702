# SPDX-License-Identifier: MIT
"""Runs the steps of ``gpu_check.sh``, each in processes of its own with a time limit; writes one JSON and one table.

Needs Python's standard library alone: what a step needs is missing in that step, and said there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
# Seconds, of TOTAL: what one step leaves, a later one has.
LIMITS = {"build": 240, "tests": 200, "sanitizer": 90, "roofline": 75, "peers": 150}
TOTAL = 585
DEVICE_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("cuda", "interaction", "gradients", "determinism", "bad_input", "optim", "quantized"),
        *("modules", "operators"),
    )
]
# The copies of a kernel's rows: what sm_90 has, and what every GPU has.
COPIES = {"bulk copies": "1", "cp.async": "0"}
MEASURE = [sys.executable, "-m", "benchmarks.gpu_measure"]

started = time.monotonic()


def run(command: Sequence[str], limit: float, **environment: str) -> Record:
    """What a command did: seconds, exit code (None: cut off), and the end of what it printed."""
    limit = max(5.0, min(limit, TOTAL - (time.monotonic() - started)))
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the group that it was started in
            process.wait()
            code = None
        output.seek(0)
        text = output.read()
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "code": code,
        "output": text[-6000:],
        "ok": code == 0,
    }


def build() -> Record:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return run(command, LIMITS["build"], FFM_EXT_CUDA="1")


def tests() -> Record:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-m", "not slow"]
    workers = str(min(14, os.cpu_count() or 1))
    command = [*command, "--maxfail=20", "-p", "no:cacheprovider", "-n", workers, *DEVICE_TESTS]
    found = run(command, LIMITS["tests"])
    last = found["output"].strip().rpartition("\n")[2]
    found["said"] = last
    # No device found is no success.
    found["ok"] = found["ok"] and re.search(r"\b[1-9]\d* passed", last) is not None
    return found


def sanitizer() -> Record:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"ok": None, "said": "compute-sanitizer is not installed"}

    def check(tool: str, copies: str) -> Record:
        options = ["--tool", tool, "--kernel-name", "kns=ffm", "--error-exitcode", "9"]
        if tool == "memcheck":  # PyTorch asks the driver what it may answer with an error
            options += ["--report-api-errors", "no"]
        return run(
            [program, *options, *MEASURE, "small"],
            LIMITS["sanitizer"],
            FFM_EXT_BULK_COPIES=COPIES[copies],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )

    # Side by side: nothing is timed, and most of it is waiting.
    cases = [(tool, copies) for tool in ("memcheck", "racecheck") for copies in COPIES]
    with ThreadPoolExecutor() as pool:
        parts = dict(zip((", ".join(case) for case in cases), pool.map(check, *zip(*cases))))
    return {"ok": all(part["ok"] for part in parts.values()), **parts}


def measured(what: str) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        found = run([*MEASURE, what, str(path)], LIMITS[what])
        # It writes what it has after every figure.
        found["figures"] = json.loads(path.read_text()) if path.exists() else {}
    return found


def roofline() -> Record:
    return measured("roofline")


def peers() -> Record:
    return measured("peers")


STEPS = {step.__name__: step for step in (build, tests, sanitizer, roofline, peers)}


def describe() -> Record:
    """The machine, as far as it says."""
    found = run([*MEASURE, "describe"], 60)
    if found["ok"]:
        machine: Record = json.loads(found["output"].strip().rpartition("\n")[2])
        return machine
    return {"gpu": "no GPU, or no build", "why": found["output"][-1000:]}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def markdown(results: Record) -> str:
    machine = results["machine"]
    lines = [f"# {machine['gpu']}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items() if name != "why"]
    steps = [
        (
            name,
            {True: "passed", False: "FAILED", None: "left out"}[step["ok"]],
            f"{step.get('seconds', '')}",
            str(step.get("said", "")).replace("|", "/"),
        )
        for name, step in results["steps"].items()
    ]
    lines += ["", *table(("step", "result", "seconds", ""), steps)]
    for name, step in results["steps"].items():
        parts = [
            (name, step),
            *((f"{name}: {k}", v) for k, v in step.items() if isinstance(v, dict)),
        ]
        for part, found in parts:
            if found.get("ok") is False and "output" in found:
                lines += ["", f"## {part} failed", "", "```", found["output"][-3000:], "```"]
    for name in ("roofline", "peers"):
        figures = results["steps"].get(name, {}).get("figures", {})
        for title, part in figures.get("tables", {}).items():
            lines += ["", f"## {title}", "", *table(part["header"], part["rows"])]
            lines += ["", *part.get("notes", [])]
    return "\n".join(lines) + "\n"


def without_output(results: Record) -> Record:
    """What passed has said all it has to say."""
    dropped = set() if results.get("ok") is False else {"output"}
    return {
        name: without_output(part) if isinstance(part, dict) else part
        for name, part in results.items()
        if name not in dropped
    }


def save(results: Record) -> None:
    slug = "-".join(re.findall(r"[a-z0-9]+", str(results["machine"]["gpu"]).lower()))
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / slug)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_output(results), indent=1, ensure_ascii=False)
    (out / "gpu_check.json").write_text(text + "\n")
    (out / "gpu_check.md").write_text(markdown(results))


def main(wanted: Sequence[str]) -> int:
    if unknown := [step for step in wanted if step not in STEPS]:
        print(f"gpu_check: {unknown[0]} is not one of {', '.join(STEPS)}")
        return 2
    results: Record = {"steps": {}}
    for name, step in STEPS.items():
        if wanted and name not in wanted:
            continue
        print(f"gpu_check: {name} …", flush=True)
        begin = time.monotonic()
        found = step()
        found.setdefault("seconds", round(time.monotonic() - begin, 1))
        results["steps"][name] = found
        print(f"gpu_check: {name}: ok = {found['ok']}, {found['seconds']} s", flush=True)
        if "machine" not in results or "why" in results["machine"]:
            results["machine"] = describe()
        save(results)  # after every step: whoever waits may run out of time
    print(markdown(results))
    return int(any(step["ok"] is False for step in results["steps"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
