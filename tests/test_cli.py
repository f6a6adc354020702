# SPDX-License-Identifier: MIT
"""``ffm-ext``: its subcommands, its output with and without a terminal, and its errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
import torch
from checkout import needs_checkout

import ffm_ext
from ffm_ext import cli

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def ffm_ext_process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m ffm_ext …`` with the package of this process."""
    path = str(Path(ffm_ext.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "ffm_ext", *argv],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def needs_demo() -> None:
    for package in cli.COMMANDS["demo"].packages:
        pytest.importorskip(package)


@pytest.fixture
def _short_timings(needs_demo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffm_ext.demo import _timing

    monkeypatch.setattr(_timing, "_median_seconds", lambda call: timeit.timeit(call, number=1))


def test_info_prints_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    info = ffm_ext.build_info()
    assert list(lines) == [*info, "library"]
    assert lines["isa"] == info["isa"]
    assert lines["threads"] == str(info["threads"])


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    expected = {**ffm_ext.build_info(), "library": str(ffm_ext.library_path())}
    assert json.loads(capsys.readouterr().out) == expected


def test_python_dash_m() -> None:
    done = ffm_ext_process("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ffm-ext {ffm_ext.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, command in cli.COMMANDS.items():
        assert f"{name} {command.help}" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_is_documented(name: str) -> None:
    """In the section of its command; and what that section calls a flag is one, of some command."""
    page = (needs_checkout() / "docs" / "cli.md").read_text()
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{name}\n"))
    flags = {name: flags_of(name) for name in cli.COMMANDS}
    documented = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*(?=[^`\n]*`)", text))
    assert flags[name] - documented == set()
    assert {flag for flag in documented if flag.startswith("--")} <= set.union(*flags.values())


def flags_of(name: str) -> set[str]:
    (commands,) = (a for a in cli.make_parser()._actions if isinstance(a.choices, dict))
    assert isinstance(commands.choices, dict)
    actions = commands.choices[name]._actions
    return {flag for action in actions for flag in action.option_strings} - {"-h", "--help"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["no-such"], "invalid choice: 'no-such'"),
        (["demo", "--threads", "0"], "--threads: 0 is not from 1 to 1024"),
        (["demo", "--threads", "50000"], "--threads: 50000 is not from 1 to 1024"),
        (["demo", "--threads", "two"], "--threads: invalid threads value: 'two'"),
        (["demo", "--seed", str(2**63)], f"--seed: {2**63} is not from 0 to {2**63 - 1}"),
        (["train", "x", "--seed", "-1"], f"--seed: -1 is not from 0 to {2**63 - 1}"),
        (["train", "x", "-s", "50000"], "-s: 50000 is not from 1 to 1024"),
        (["train", "x", "-s", "0"], "-s: 0 is not from 1 to 1024"),
        (["train", "x", "--rounding-seed", str(2**70)], "--rounding-seed: 1180591620717411303424"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_cannot_be_encoded() -> None:
    done = ffm_ext_process("train", "--help", PYTHONIOENCODING="latin1")
    assert done.returncode == 0, done.stderr
    assert "U(0, 1/\\u221ak)" in done.stdout


def test_output_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):  # as Python has them after `>&- 2>&-`
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["info"]) == 0
    assert cli.main(["info", "nowhere"]) == 1


def gone(*argv: str) -> tuple[int, str]:
    """Exit status and stderr of ``python -m ffm_ext …`` whose reader has gone before it begins."""
    reader, writer = os.pipe()
    os.close(reader)
    path = str(Path(ffm_ext.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "ffm_ext", *argv],
        env={**os.environ, "PYTHONPATH": path},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    return done.returncode, done.stderr


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    """It is no error where nothing else is written; a run goes on to its model."""
    text, model = tmp_path / "text", tmp_path / "model"
    text.write_text("1 0:1:1 1:2:1\n0 0:0:1 1:3:1\n" * 50)
    assert gone("train", "-t", "3", str(text), str(model)) == (0, "")
    assert ffm_ext.interop.load_model(model).interaction.num_features == 4
    for argv in (["info"], ["check", str(text)], ["predict", str(text), str(model)]):
        status, err = gone(*argv)
        assert status == 0 and "Broken pipe" not in err
    for command, *argv in (
        ["convert", "--json", str(model), str(tmp_path / "m2"), "--to", "model"],
        ["predict", str(text), str(model), str(tmp_path / "out")],
    ):
        assert gone(command, *argv) == (1, f"ffm-ext {command}: [Errno 32] Broken pipe\n")


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "ffm_ext.cli._command.find_spec", lambda module: None if module != "rich" else object()
    )
    assert cli.main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("ffm-ext demo: needs scikit-learn and matplotlib.")
    assert "python -m pip install 'ffm-ext[bench,cli,sklearn]'" in err


def test_extras_bring_the_packages() -> None:
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for command in cli.COMMANDS.values():
        if not command.packages:
            continue
        required = " ".join(line for extra in command.extras.split(",") for line in extras[extra])
        for name in command.packages.values():
            assert name in required


def test_output_folder_that_is_a_file(
    needs_demo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "taken")]) == 1
    assert re.fullmatch(r"ffm-ext demo: .*File exists: '.*taken'\n", capsys.readouterr().err)


@pytest.mark.usefixtures("_short_timings")
def test_demo_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ffm_ext.demo import run_demo
    from ffm_ext.demo._timing import Workload

    out = tmp_path / "new" / "folder"
    run_demo(out, epochs=1, threads=1, workload=Workload(500, 5, 3, 64))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80 or str(tmp_path) in text
    for word in ("1 thread", ffm_ext.build_info()["isa"], "F = 5, K = 3, N = 500", "as torchfm"):
        assert word in text
    (ffm,), (logistic,) = (
        re.findall(rf"^ *{name} .* (0\.\d{{4}}) +(0\.\d{{4}}) *$", text, re.MULTILINE)
        for name in ("FFM", "logistic regression")
    )
    assert float(ffm[0]) > 0.92
    assert float(logistic[0]) > 0.92
    assert float(ffm[1]) < 0.285
    for name in ("quality.png", "speed.png"):
        assert str(out / name) in text
        assert (out / name).read_bytes().startswith(PNG)


def test_training_on_a_terminal_without_colour(needs_demo: None) -> None:
    from rich.console import Console

    from ffm_ext.demo._training import train_ffm

    written = io.StringIO()
    console = Console(file=written, force_terminal=True, no_color=True, width=100)
    fit, history = train_ffm(ffm_ext.datasets.load_adult(), console, epochs=1, seed=0)
    assert history.best == 0
    assert fit.probability.shape == fit.target.shape == (16281,)
    text = written.getvalue()
    assert re.search(r"epoch 1/1 .* loss 0\.\d{4} .* samples/s .* left", text)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)


@pytest.mark.usefixtures("needs_demo")
def test_every_timed_form_has_the_reference_gradient() -> None:
    from ffm_ext.demo._timing import PairLoop, Vectorised

    N, F, K, B = 60, 6, 3, 300  # more than two chunks of Vectorised
    torch.manual_seed(0)
    weight = torch.randn(N, F, K, dtype=torch.float64)
    x = torch.randint(N, (B, F))
    upstream = torch.randn(B, dtype=torch.float64)

    leaf = weight.clone().requires_grad_()
    expected = ffm_ext.reference.ffm_interaction(leaf, x, grad="dense")
    expected.backward(upstream)
    assert leaf.grad is not None

    loop, vectorised = PairLoop(weight), Vectorised(weight)
    for layer in (loop, vectorised):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected.detach())
        y = layer(x)
        torch.testing.assert_close(y, expected)
        y.backward(upstream)
    looped = torch.stack([table.weight.grad for table in loop.tables], dim=1)
    torch.testing.assert_close(looped, leaf.grad)
    grad = vectorised.table.weight.grad
    assert grad is not None
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense().view_as(weight), leaf.grad)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_demo")
def test_whole_demo(tmp_path: Path) -> None:
    done = ffm_ext_process("demo", "--out", str(tmp_path), NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"quality.png", "speed.png"}
