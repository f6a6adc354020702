# SPDX-License-Identifier: MIT
"""How setup.py decides about CUDA: by what is there and what is asked for, never by a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from checkout import needs_checkout

SETUP = needs_checkout() / "setup.py"


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ffm_ext_setup", SETUP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, on a machine whose only toolkit may be in ``tmp_path``."""
    module = load_setup()
    for name in ("FFM_EXT_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "cuda_homes", lambda: iter([tmp_path / "none", tmp_path / "cuda"]))
    return module


def make_toolkit(folder: Path, version: str) -> None:
    for part, text in (
        ("include/cuda_runtime.h", ""),
        (
            "bin/nvcc",
            f'#!/bin/sh\necho "Cuda compilation tools, release {version}, V{version}.48"\n',
        ),
    ):
        path = folder / "cuda" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def test_a_toolkit_is_used_where_it_is(setup: ModuleType, tmp_path: Path) -> None:
    make_toolkit(tmp_path, "13.0")
    assert setup.find_cuda("") == setup.Cuda(tmp_path / "cuda", "13.0")
    assert setup.find_cuda("address") == "sanitizers are for the CPU"


@pytest.mark.parametrize(
    "found", ["nothing", "no headers", "an old one", "no program", "no number"]
)
def test_without_one_it_is_left_out_or_an_error(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    if found != "nothing":
        versions = {"an old one": "11.8", "no number": "x.4,"}
        make_toolkit(tmp_path, versions.get(found, "13.0"))
    if found == "no program":
        (tmp_path / "cuda/bin/nvcc").chmod(0o644)
    if found == "no headers":  # as where nvcc is a script that calls one elsewhere
        (tmp_path / "cuda/include/cuda_runtime.h").unlink()
    assert setup.find_cuda("").startswith("no toolkit with include/cuda_runtime.h")
    monkeypatch.setenv("FFM_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match="FFM_EXT_CUDA=1, and there is no toolkit"):
        setup.find_cuda("")
    monkeypatch.delenv("FFM_EXT_CUDA")
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    with pytest.raises(SystemExit, match="CUDA_HOME is set, and there is no toolkit"):
        setup.find_cuda("")
    monkeypatch.setenv("FFM_EXT_CUDA", "0")
    assert setup.find_cuda("") == "FFM_EXT_CUDA=0"


def test_it_can_be_left_out(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_toolkit(tmp_path, "13.0")
    monkeypatch.setenv("FFM_EXT_CUDA", "0")
    assert setup.find_cuda("") == "FFM_EXT_CUDA=0"
    monkeypatch.setenv("FFM_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="FFM_EXT_CUDA = 'yes' is not one of auto, 0, 1"):
        setup.find_cuda("")


def test_cuda_home_is_the_only_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert list(load_setup().cuda_homes()) == [tmp_path]


def test_sanitizers(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    for given, found in (("", ""), (" address, undefined ", "address,undefined"), ("leak", "leak")):
        monkeypatch.setenv("FFM_EXT_SANITIZE", given)
        assert setup.find_sanitizers() == found
    for given in ("foo", "ADDRESS", "address;undefined", "../../x"):
        monkeypatch.setenv("FFM_EXT_SANITIZE", given)
        with pytest.raises(SystemExit, match=r"FFM_EXT_SANITIZE = .* is not a list of address,"):
            setup.find_sanitizers()


def test_flags_that_the_shell_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.setenv("CXXFLAGS", "-DA='b c' -O1")
    assert setup.flags_of("CXXFLAGS") == ["-DA=b c", "-O1"]
    monkeypatch.setenv("CXXFLAGS", "-DA='b")
    with pytest.raises(SystemExit, match=r"CXXFLAGS = .* is no list of flags"):
        setup.flags_of("CXXFLAGS")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no Clang")
def test_clang_takes_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for code generation, of which the tests of the build have enough with one compiler."""
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setenv("FFM_EXT_CUDA", "0")
    monkeypatch.chdir(SETUP.parent)
    setup = load_setup()
    found, torch = setup.find_compiler(), setup.find_torch()
    # Of types, one as wide as its sums and one narrower.
    steps = [
        step
        for step in setup.compile_steps(found, torch, "FFM_EXT_CUDA=0", "0")
        if not step.variant.endswith((".float64", ".float16"))
    ]
    assert {step.source.name for step in steps} >= {"isa.cpp", "ffm_train_kernels.cpp"}
    flags = [*setup.CXXFLAGS, "-Icsrc", "-Werror", "-fsyntax-only"]

    def check(step: tuple[Path, str, list[str]]) -> str:
        source, variant, own = step
        command = [*found.command, *own, *flags, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        return "" if done.returncode == 0 else f"{source} {variant}\n{done.stderr}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert not "".join(pool.map(check, steps))


@pytest.mark.parametrize("jobs", ["abc", "-3", "0", "1.5"])
def test_bad_numbers_of_jobs(jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(SystemExit, match=f"MAX_JOBS = '{jobs}' is no number of compilations"):
        load_setup().jobs_option()


def test_numbers_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert load_setup().jobs_option() == []
    monkeypatch.setenv("MAX_JOBS", "3")
    assert load_setup().jobs_option() == ["-j", "3"]


def test_words_come_through_ninja_and_the_shell(tmp_path: Path) -> None:
    words = ["a b", "-Wl,-rpath,$ORIGIN/../lib", "it's", "c$u:d"]
    rule = load_setup().ninja_words(["printf", "%s\\n", *words])
    text = f"rule print\n  command = {rule} > $out\nbuild out: print\n"
    (tmp_path / "build.ninja").write_text(text)
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(tmp_path)], check=True)
    assert (tmp_path / "out").read_text().splitlines() == words


def test_setup_works_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(SETUP), "--quiet", "build_ext", "--help"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert not list(tmp_path.iterdir())
