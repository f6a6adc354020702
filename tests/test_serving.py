# SPDX-License-Identifier: MIT
"""A package of AOTInductor, run from Python and by the program in examples/cpp_serving, which has no Python in it."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import python
from torch import Tensor, nn

import ffm_ext
from ffm_ext import FFM, SparseBatch, interop

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp_serving"
N, F = 50, 3
LINES = [
    *("1 0:3:1 1:7:0.5 2:9:1", "0", "", "1\t2:49:-1e-1  0:1:2 ", "0 1:0:3 1:1:1\r"),
    *("+1 0:3:+1 1:7:+.5e+0", "1e400 0:3:1 2:9:1e-50", "? 1:7:-1e-400 2:9:1"),
]


def text_of(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def in_bulk(lines: list[str]) -> SparseBatch:
    samples = [
        [(int(f), int(i), float(x)) for f, i, x in (entry.split(":") for entry in line.split()[1:])]
        for line in lines
    ]
    return SparseBatch.from_lists(samples)


def model(form: str) -> FFM:
    torch.manual_seed(0)
    options = {"within_field": True, "normalize": True} if form == "int8" else {}
    found = FFM(
        4, num_features=N, num_fields=F, grad="dense" if form == "dense" else "sparse", **options
    )
    for parameter in found.linear.parameters():
        nn.init.normal_(parameter)
    if form == "fused":
        found.interaction.fuse_optimizer(ffm_ext.optim.SGD(lr=0.1))
    return found.eval()


def serve(program: Path, *args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    # Nothing of Python's: what is found is found by the program itself.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
    return subprocess.run(
        [program, *map(str, args)], input=stdin, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    build = tmp_path_factory.mktemp("serve")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", EXAMPLE, "-B", build, prefix], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "serve"


@pytest.mark.slow
@pytest.mark.compatibility(
    "AOTInductor package, from Python and from C++", mode=("dense", "sparse", "fused", "int8")
)
def test_packages(program: Path, tmp_path: Path) -> None:
    """The modes share a package: their programs are the same, which test_programs_of_all_modes_are_one checks."""
    assert (
        "libpython" not in subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    )
    losses: dict[str, interop.Loss] = {"sparse": "logistic", "int8": "squared"}
    for form, loss in losses.items():
        trained = model(form)
        package, saved = tmp_path / f"{form}.pt2", tmp_path / "model.safetensors"
        interop.save_model(trained, saved, loss=loss)
        int8 = ["--int8"] if form == "int8" else []
        done = python(str(EXAMPLE / "export.py"), str(saved), str(package), *int8)
        assert done.returncode == 0, done.stderr
        library = done.stdout.split()[-1]
        assert library == str(ffm_ext.library_path())
        if int8:
            trained = ffm_ext.quantize(trained)

        loaded = torch._inductor.aoti_load_package(str(package))
        wanted = trained(in_bulk(LINES)).detach()
        wanted = torch.sigmoid(wanted) if loss == "logistic" else wanted
        torch.testing.assert_close(loaded(in_bulk(LINES)), wanted)

        for batch_size in (1, 2, 1024):
            served = serve(program, package, library, batch_size, stdin=text_of(LINES))
            assert served.returncode == 0, served.stderr
            torch.testing.assert_close(Tensor(list(map(float, served.stdout.split()))), wanted)

    for text, message in (
        ("1 0:3:1\n1 0:3:x\n", "line 2, column 7: the value is not a number"),
        ("1 0:3\n", "line 1, column 5: the feature is not a number in field:feature:value"),
        ("1 0:-3:1\n", "line 1, column 3: field and feature must not be negative"),
        (
            "1 0:3:nan\n",
            "line 1, column 3: field and feature must not be negative, the value must be finite",
        ),
        (
            "1 0:3:1e400\n",
            "line 1, column 3: field and feature must not be negative, the value must",
        ),
        ("1 0:3:+-1\n", "line 1, column 7: the value is not a number"),
        ("1 0:3:+\n", "line 1, column 7: the value is not a number"),
        (f"0\n1 0:{N}:1\n", "lines 1 to 2: "),
        (f"1 {F}:3:1\n", "fields[0] = 3 is out of range for 3 fields"),
    ):
        served = serve(program, tmp_path / "sparse.pt2", library, stdin=text)
        assert served.returncode == 1
        assert message in served.stderr, served.stderr
    with open("/dev/full", "w") as full:
        command = [program, tmp_path / "sparse.pt2", library]
        done = subprocess.run(
            command, input=text_of(LINES), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and "standard output cannot be written" in done.stderr
    nowhere = tmp_path / "nowhere"
    for args in ((nowhere, library), (tmp_path / "sparse.pt2", nowhere)):
        served = serve(program, *args)
        assert served.returncode == 1
        assert str(nowhere) in served.stderr
    assert serve(program, tmp_path / "sparse.pt2").returncode == 2


@pytest.mark.parametrize("form", ["sparse", "int8"])
def test_the_program_is_for_any_batch(form: str) -> None:
    exported = model(form)
    if form == "int8":
        exported = ffm_ext.quantize(exported)
    program = runpy.run_path(str(EXAMPLE / "export.py"))["program"](exported, "squared").module()
    for lines in (LINES, LINES[:1], LINES[1:2], LINES[:2]):
        batch = in_bulk(lines)
        torch.testing.assert_close(program(batch), exported(batch))


def test_programs_of_all_modes_are_one() -> None:
    programs = []
    for form in ("dense", "sparse", "fused"):
        program = torch.export.export(model(form), (in_bulk(LINES),))
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        programs.append(str([(node.name, node.target, node.args, node.kwargs) for node in calls]))
    assert len(set(programs)) == 1


def test_the_library_needs_no_python() -> None:
    """A process without Python is the test above; here, what the linker would ask for."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    library = str(ffm_ext.library_path())
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True
    )
    assert wanted.returncode == 0
    assert not [name for name in wanted.stdout.split() if name.startswith(("Py", "_Py"))]


def test_the_library_is_the_one_that_is_loaded() -> None:
    maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else ""
    assert str(ffm_ext.library_path()) in maps
    torch.ops.load_library(ffm_ext.library_path())  # again: the same operators, not a second time
