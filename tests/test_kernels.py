# SPDX-License-Identifier: MIT
"""Runs ``kernels/test_kernels.cpp``, which needs no torch: with the kernels of the build on each ISA of this CPU, with
sanitizers, and for AArch64 under an emulator. Flags are those of ``setup.py``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkout import needs_checkout

pytest.importorskip("setuptools")

ROOT = needs_checkout()
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402

ISAS = setup.ISAS.get(platform.machine(), setup.OTHER_ISAS)
# -O0: the code as it was written, which also compiles fastest.
SANITIZED = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def built_objects(steps: list[setup.Step]) -> list[str]:
    """Those that the package was linked from."""
    objects = [step.target(setup.build_folder()) for step in steps]
    if missing := [str(path) for path in objects if not (ROOT / path).exists()]:
        pytest.skip(f"`make build` makes what is not there: {', '.join(missing)}")
    return list(map(str, objects))


def make_program(folder: Path, flags: list[str] | None, cxx: str | None = None) -> Path:
    """The test program, with every ISA of an architecture: that of ``cxx``, or of $CXX and this machine.

    Without ``flags``, kernels are those of the build; else they are compiled with the build's flags and these.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        if cxx:
            patch.setenv("CXX", cxx)
        try:
            compiler = setup.find_compiler()
        except SystemExit as missing:
            pytest.skip(str(missing).strip())
        tested = [*setup.kernel_steps(compiler), setup.Step(Path("csrc/cpu/isa.cpp"), "", [])]
        test = setup.Step(Path("tests/kernels/test_kernels.cpp"), "", ["-O1"])

    def compile_step(step: setup.Step) -> str:
        target = step.target(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        options = [*setup.CXXFLAGS, "-Icsrc", *(flags or []), *step.flags]
        run(*compiler.command, *options, "-c", str(step.source), "-o", str(target))
        return str(target)

    objects = built_objects(tested) if flags is None else []
    to_compile = [test] if flags is None else [test, *tested]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects += pool.map(compile_step, to_compile)
    program = folder / "test_kernels"
    run(*compiler.command, *(flags or []), *objects, "-o", str(program))
    return program


def run_program(command: Sequence[str | Path], isa: str) -> None:
    environment = {**os.environ, "FFM_EXT_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "this CPU lacks it" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"kernels: {isa}\n")
    assert done.stdout.endswith(" passed, 0 failed\n")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((None, "7"), id="every 7th problem"),
        pytest.param((None, "1"), id="every problem", marks=pytest.mark.slow),
        pytest.param((SANITIZED, "1"), id="sanitized", marks=pytest.mark.slow),
    ],
)
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    flags, stride = request.param
    return make_program(tmp_path_factory.mktemp("kernels"), flags), stride


@pytest.mark.parametrize("isa", ISAS)
def test_kernels(program: tuple[Path, str], isa: str) -> None:
    run_program(program, isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", setup.ISAS["aarch64"])
def test_kernels_of_aarch64(tmp_path: Path, isa: str) -> None:
    for tool in (CROSS_COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            packages = "g++-aarch64-linux-gnu and qemu-user on Debian and Ubuntu"
            pytest.skip(f"{tool} is not installed ({packages})")
    run_program([EMULATOR, make_program(tmp_path, ["-static"], CROSS_COMPILER)], isa)
