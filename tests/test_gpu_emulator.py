# SPDX-License-Identifier: MIT
"""Runs the CUDA kernels on the CPU, in the emulator of ``gpu/``: plain, and slow, with sanitizers. See docs/design.md.

The faults are the test of the tests: each is planted into a kernel, and the builds that should see it must.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout import needs_checkout

pytest.importorskip("setuptools")

ROOT = needs_checkout()
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
CSRC = ROOT / "csrc"
KERNELS = [
    step
    for name in ("*_kernels.cu", "ffm_kernels.cpp", "group_rows.cu")
    for source in sorted(CSRC.glob(f"cuda/{name}"))
    for step in setup.steps_of(source, "cuda", [])
]
TESTS = [
    setup.Step(source, "", [])
    for source in sorted(ROOT.glob("tests/gpu/*.cpp"))
    if source.stem not in ("emulator", "test_emulator")
]
EMULATOR = setup.Step(ROOT / "tests/gpu/emulator.cpp", "", [])

# What a program ends with where the emulator, or a sanitizer, sees something: the first line tells.
SEEN = {
    "race": r"WARNING: ThreadSanitizer: data race",
    "overflow": r"AddressSanitizer: |runtime error: ",
    "deadlock": r"^gpu emulator: deadlock",
    "emulator": r"^gpu emulator: .+:\d+: ",
    "crash": r"^crash in ",
    "mismatch": r"^FAILED ",
}


def compiler() -> list[str]:
    try:
        found = setup.find_compiler()
    except SystemExit as missing:
        pytest.skip(str(missing).strip())
    if "clang" in found.version:
        pytest.skip("the emulator's sanitized builds are made for GCC")
    return found.command


def object_name(step: setup.Step) -> str:
    return f"{step.source.stem}.{step.variant}.o"


def compile_step(step: setup.Step, build: str, folder: Path, csrc: Path) -> Path:
    """Of a tree ``csrc``; one of another than the repository's has a fault, which may leave variables unused."""
    # -O0: the code as it was written, which also compiles fastest. The emulator itself is not written to be slow.
    options = [*FLAGS, *step.flags, f"-I{csrc}", *SANITIZED[build], "-O0"]
    if csrc != CSRC:
        options += ["-w"]
    if step == EMULATOR:
        # What it does for itself would be seen as races; instead it tells TSan of barriers and copies.
        options += [
            "-O2",
            *(["-fno-sanitize=thread", "-DGPU_EMULATOR_TSAN"] if build == "tsan" else []),
        ]
    elif build == "plain" and step in TESTS:
        options += ["-O1"]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / object_name(step)
    command = [*compiler(), *options, "-x", "c++", "-c", str(step.source), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return target


def compile_all(steps: Iterable[setup.Step], build: str, folder: Path, csrc: Path) -> list[Path]:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda step: compile_step(step, build, folder, csrc), steps))


def link(objects: Iterable[Path], build: str, program: Path) -> Path:
    command = [*compiler(), *SANITIZED[build], *map(str, objects), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return program


def make_program(build: str, folder: Path) -> Path:
    objects = compile_all([*KERNELS, *TESTS, EMULATOR], build, folder, CSRC)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def programs(folder: Path) -> dict[str, Path]:
    """Of every build, made when it is asked for first; its objects lie beside it."""

    class Programs(dict[str, Path]):
        def __missing__(self, build: str) -> Path:
            self[build] = make_program(build, folder / build)
            return self[build]

    return Programs()


def check_passes(program: Path, *args: object) -> None:
    done = run(program, *args)
    assert seen(done) == "passed", (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith(" passed, 0 failed\n")


# ---- The kernels.


def test_kernels(programs: dict[str, Path]) -> None:
    check_passes(programs["plain"], "all", 97, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "stride", "schedules"),
    [
        ("plain", 23, 6),
        ("asan", 47, 2),
        ("tsan", 173, 1),
    ],
)
def test_kernels_more(programs: dict[str, Path], build: str, stride: int, schedules: int) -> None:
    # TSan takes half a millisecond for a thread: no test of thousands of entries.
    last = [4320] if build == "tsan" else []
    check_passes(programs[build], "all", stride, schedules, *last)


# ---- The emulator itself: what small kernels of tests/gpu/test_emulator.cpp end with, in each build.

EMULATED = {
    "swap": ("passed", "passed", "passed"),
    "swap_twice": ("passed", "passed", "passed"),
    "copy": ("passed", "passed", "passed"),
    "bulk": ("passed", "passed", "passed"),
    "sum_by_atomic": ("passed", "passed", "passed"),
    "last_block": ("passed", "passed", "passed"),
    "collectives": ("passed", "passed", "passed"),
    "halves": ("passed", "passed", "passed"),
    "swap_without_barrier": ("NaN", "NaN", "race"),
    "swap_twice_without_barrier": ("mismatch", "mismatch", "race"),
    "copy_without_wait": ("NaN", "NaN", "race"),
    "copy_never_waited_for": ("emulator", "emulator", "emulator"),
    "copy_misaligned": ("emulator", "emulator", "emulator"),
    "copy_past_the_end": ("emulator", "emulator", "emulator"),
    "copy_past_shared": ("emulator", "emulator", "emulator"),
    "bulk_without_wait": ("mismatch", "mismatch", "race"),
    "bulk_without_init": ("emulator", "emulator", "race"),
    "bulk_bytes_that_never_come": ("deadlock", "deadlock", "deadlock"),
    "early_return": ("emulator", "emulator", "emulator"),
    "barriers_of_two_lines": ("emulator", "emulator", "emulator"),
    "barrier_of_some": ("emulator", "emulator", "emulator"),
    "deadlock": ("deadlock", "deadlock", "deadlock"),
    "other_masks": ("emulator", "emulator", "emulator"),
    "other_operations": ("emulator", "emulator", "emulator"),
    "lane_outside": ("emulator", "emulator", "emulator"),
    "own_mask": ("emulator", "emulator", "emulator"),
    "overrun": ("emulator", "overflow", "race"),
    "misaligned": ("", "overflow", ""),
    "sum_without_atomic": ("", "", "race"),
    "last_block_without_fence": ("", "", "race"),
    "too_much_shared": ("emulator", "emulator", "emulator"),
}
NUM_SCHEDULES = 6


@pytest.mark.parametrize(
    "build",
    [
        "plain",
        pytest.param("asan", marks=pytest.mark.slow),
        pytest.param("tsan", marks=pytest.mark.slow),
    ],
)
def test_emulator(tmp_path: Path, build: str) -> None:
    sources = [EMULATOR, setup.Step(ROOT / "tests/gpu/test_emulator.cpp", "", [])]
    objects = compile_all(sources, build, tmp_path, CSRC)
    program = link(objects, build, tmp_path / "test_emulator")
    for kernel, outcomes in EMULATED.items():
        expected = outcomes[list(SANITIZED).index(build)]
        found: set[str] = set()
        sums: set[str] = set()
        for schedule in range(NUM_SCHEDULES):
            done = run(program, kernel, schedule)
            found.add(seen(done))
            sums.add(done.stdout)
        # What a kernel leaves is the same under every schedule, or it is a mismatch, as in the tests of kernels.
        if any("nan" in text for text in sums):
            found.add("NaN")
        if len(sums) > 1:
            found.add("mismatch")
        if expected == "passed":
            assert found == {"passed"}, kernel
        elif expected:
            assert expected in found, f"{kernel}: {found} under the schedules"


# ---- Faults.


@dataclass
class Fault:
    """A change of a kernel: ``old``, which its file has once, becomes ``new``. See the builds that see it, and as what.

    ``test`` is the test that runs, on problems of float32.
    """

    name: str
    file: str
    old: str
    new: str
    kernels: str
    test: str
    builds: dict[str, set[str]]


FORWARD = "ffm_forward_kernels"
BACKWARD = "ffm_backward_kernels"

FAULTS = [
    Fault(
        "copies are waited for, but not by all threads",
        "stage_rows.cuh",
        "default: gpu::copy_async_wait<3>(); break;\n    }\n    __syncthreads();",
        "default: gpu::copy_async_wait<3>(); break;\n    }",
        FORWARD,
        "forward",
        {"plain": {"mismatch"}, "tsan": {"race"}},
    ),
    Fault(
        "one group of copies too few is waited for",
        "stage_rows.cuh",
        "case 2: gpu::copy_async_wait<1>(); break;",
        "case 2: gpu::copy_async_wait<2>(); break;",
        FORWARD,
        "forward",
        {"plain": {"mismatch", "emulator"}, "tsan": {"race", "mismatch", "emulator"}},
    ),
    Fault(
        "no barrier before a slot is used again",
        "one_hot_forward.cuh",
        "    __syncthreads();\n    ring.copy(slot,",
        "    ring.copy(slot,",
        FORWARD,
        "forward",
        {"tsan": {"race"}},
    ),
    Fault(
        "the parity of a barrier stays",
        "stage_rows.cuh",
        "parity_ ^= 1;",
        "parity_ ^= 0;",
        FORWARD,
        "forward",
        {
            "plain": {"mismatch", "deadlock", "emulator"},
            "tsan": {"race", "deadlock", "emulator"},
        },
    ),
    Fault(
        "bytes are announced that no copy brings",
        "stage_rows.cuh",
        "arrive_expect_bytes(num_good * layout_.row_bytes)",
        "arrive_expect_bytes(32 * layout_.row_bytes)",
        FORWARD,
        "forward",
        {"plain": {"deadlock"}, "asan": {"deadlock"}, "tsan": {"deadlock"}},
    ),
    Fault(
        "lanes leave before a shuffle of the whole warp",
        "one_hot_forward.cuh",
        "t < whole; t += step",
        "t < num_pairs_; t += step",
        FORWARD,
        "forward",
        {
            "plain": {"emulator", "deadlock"},
            "asan": {"emulator", "deadlock"},
            "tsan": {"emulator", "deadlock"},
        },
    ),
    Fault(
        "the row after the table's last is taken for one",
        "stage_rows.cuh",
        "is_row && static_cast<uint64_t>(id) < static_cast<uint64_t>(p_.num_features);",
        "is_row && static_cast<uint64_t>(id) <= static_cast<uint64_t>(p_.num_features);",
        FORWARD,
        "contents",
        {"plain": {"emulator"}, "asan": {"emulator"}},
    ),
    Fault(
        "rows are read one further on",
        "field_sums_forward.cuh",
        "table + id * row_bytes + i",
        "table + (id + 1) * row_bytes + i",
        FORWARD,
        "forward",
        {"plain": {"mismatch", "crash"}, "asan": {"overflow", "mismatch"}},
    ),
    Fault(
        "too little shared memory",
        "field_sums_forward.cuh",
        "static_cast<size_t>(layout.chunk) * sizeof(StagedEntry);",
        "static_cast<size_t>(layout.chunk - 1) * sizeof(StagedEntry);",
        FORWARD,
        "forward",
        {"plain": {"emulator"}, "asan": {"overflow"}},
    ),
    Fault(
        "no barrier between reading entries and adding them",
        "field_sums_forward.cuh",
        "read(n, row_units, i0, j0, k0);\n      __syncthreads();",
        "read(n, row_units, i0, j0, k0);",
        FORWARD,
        "forward",
        {"plain": {"mismatch"}, "tsan": {"race"}},
    ),
    Fault(
        "no barrier between a tile and the next",
        "ffm_backward_kernels.cu",
        "if (j > 0) __syncthreads();",
        "",
        BACKWARD,
        "backward",
        {"tsan": {"race"}},
    ),
    Fault(
        "rows move while others still read them",
        "ffm_backward_kernels.cu",
        "if (kRows == Rows::kUpdated) __syncthreads();",
        "",
        BACKWARD,
        "backward",
        {"tsan": {"race"}},
    ),
    Fault(
        "a row that began before is taken for whole",
        "ffm_backward_kernels.cu",
        "    if (begins && ends) {",
        "    if (ends) {",
        BACKWARD,
        "backward",
        {"plain": {"mismatch"}},
    ),
    Fault(
        "entries arrive before their gradients are there",
        "ffm_backward_kernels.cu",
        "          __threadfence();\n          is_last = ",
        "          is_last = ",
        BACKWARD,
        "backward",
        {"tsan": {"race"}},
    ),
    Fault(
        "a row is finished before its last entry arrives",
        "ffm_backward_kernels.cu",
        "atomicAdd(t_.groups.arrivals + place.first, 1) == place.count - 1;",
        "atomicAdd(t_.groups.arrivals + place.first, 1) == place.count - 2;",
        BACKWARD,
        "backward",
        {"plain": {"mismatch"}, "asan": {"mismatch"}},
    ),
    Fault(
        "a row has one entry more than are added up",
        "ffm_backward_kernels.cu",
        "rank < abs(place.count); ++rank) add",
        "rank < abs(place.count) - 1; ++rank) add",
        BACKWARD,
        "backward",
        {"plain": {"mismatch"}, "asan": {"mismatch"}},
    ),
    Fault(
        "an addition that is not atomic",
        "ffm_backward_kernels.cu",
        "atomicAdd(p + k, numbers.x[k]);",
        "p[k] += numbers.x[k];",
        BACKWARD,
        "backward",
        {"tsan": {"race"}},
    ),
]


def plant(fault: Fault, csrc: Path) -> None:
    path = csrc / "cuda" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, (
        f"{fault.file} has changed: {text.count(fault.old)} places are as the fault {fault.name!r} wants one"
    )
    path.write_text(text.replace(fault.old, fault.new))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_fit(fault: Fault, tmp_path: Path) -> None:
    shutil.copytree(CSRC / "cuda", tmp_path / "cuda")
    plant(fault, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("build", SANITIZED)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults(
    programs: dict[str, Path], folder: Path, tmp_path: Path, fault: Fault, build: str
) -> None:
    if build not in fault.builds:
        pytest.skip("a fault that this build need not see")
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    plant(fault, csrc)
    faulty = [
        step._replace(source=csrc / step.source.relative_to(CSRC))
        for step in KERNELS
        if (step.source.stem, step.variant) == (fault.kernels, "cuda.float32")
    ]
    objects = compile_all(faulty, build, tmp_path, csrc)
    _ = programs[build]
    names = [path.name for path in objects]
    others = [path for path in (folder / build).glob("*.o") if path.name not in names]
    program = link([*objects, *others], build, tmp_path / "faulty")
    stride, schedules = (29, 1) if build == "tsan" else (17, 2)
    done = run(program, fault.test, stride, schedules, LAST_FLOAT32)
    assert seen(done) in fault.builds[build], (done.stdout + done.stderr)[-2000:]


# The last of the problems of float32.
LAST_FLOAT32 = 1080
