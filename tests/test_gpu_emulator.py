# SPDX-License-Identifier: MIT
"""Runs the CUDA kernels on the CPU, in the emulator of ``gpu/``: plain, and slow, with sanitizers. See docs/design.md.

The faults are the test of the tests: each is planted into a kernel, and the builds that should see it must.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402

# Kernels read rows of numbers as larger units, which nvcc takes as they are meant.
FLAGS = [
    *("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"),
    "-Itests/gpu",
]
SANITIZED = {
    "plain": [],
    "asan": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-g", "-fsanitize=thread"],
}
KERNELS = [
    *sorted(ROOT.glob("csrc/cuda/*_kernels.cu")),
    ROOT / "csrc/cuda/group_rows.cu",
]
TESTS = [
    path
    for path in sorted(ROOT.glob("tests/gpu/*.cpp"))
    if path.stem not in ("emulator", "test_emulator")
]
EMULATOR = ROOT / "tests/gpu/emulator.cpp"

# What a program ends with where the emulator, or a sanitizer, sees something: the first line tells.
SEEN = {
    "emulator": r"^gpu emulator: .+:\d+: ",
    "deadlock": r"^gpu emulator: deadlock",
    "crash": r"^crash in ",
    "mismatch": r"^FAILED ",
    "overflow": r"AddressSanitizer: |runtime error: ",
    "race": r"WARNING: ThreadSanitizer: data race",
}


def compiler() -> list[str]:
    try:
        found = setup.find_compiler()
    except SystemExit as missing:
        pytest.skip(str(missing).strip())
    if "clang" in found.version:
        pytest.skip("the emulator's sanitized builds are made for GCC")
    return found.command


def compile_step(source: Path, build: str, target: Path, csrc: Path) -> Path:
    # -O0: the code as it was written, which also compiles fastest. The emulator itself is not written to be slow.
    options = [*FLAGS, f"-I{csrc}", *SANITIZED[build], "-O0"]
    if source == EMULATOR:
        # What it does for itself would be seen as races; instead it tells TSan of barriers and copies.
        options += [
            "-O2",
            *(["-fno-sanitize=thread", "-DGPU_EMULATOR_TSAN"] if build == "tsan" else []),
        ]
    elif build == "plain" and source in TESTS:
        options += ["-O1"]
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler(), *options, "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return target


def compile_all(sources: Iterable[Path], build: str, folder: Path, csrc: Path) -> list[Path]:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(
            pool.map(
                lambda source: compile_step(source, build, folder / f"{source.stem}.o", csrc),
                sources,
            )
        )


def link(objects: Iterable[Path], build: str, program: Path) -> Path:
    command = [*compiler(), *SANITIZED[build], *map(str, objects), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return program


def make_program(build: str, folder: Path) -> Path:
    objects = compile_all([*KERNELS, *TESTS, EMULATOR], build, folder, ROOT / "csrc")
    return link(objects, build, folder / "test_gpu_kernels")


def run(program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [str(program), *map(str, args)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=900
    )


def seen(done: subprocess.CompletedProcess[str]) -> str:
    """What was seen: a key of ``SEEN``, "passed", or how the program ended."""
    if done.returncode == 0:
        return "passed"
    for name, pattern in SEEN.items():
        if re.search(pattern, done.stdout + done.stderr, re.MULTILINE):
            return name
    return f"ended with {done.returncode}"
