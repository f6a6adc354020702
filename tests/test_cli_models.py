# SPDX-License-Identifier: MIT
"""``ffm-ext train | predict | check | convert | info FILE``."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ffm_ext import cli, data, interop
from ffm_ext.cli import _models
from ffm_ext.training import Trainer


def write_text(path: Path, n: int, seed: int = 0, features: int = 40) -> Path:
    rng = np.random.RandomState(seed)
    strength = np.random.RandomState(9).randn(10)
    lines = []
    for _ in range(n):
        ids = rng.randint(0, features // 4, 4)
        label = int(strength[ids[0] % 10] * strength[ids[1] % 10] + 0.3 * rng.randn() > 0)
        lines.append(
            " ".join([str(label), *(f"{f}:{f * (features // 4) + a}:1" for f, a in enumerate(ids))])
        )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    return str(write_text(tmp_path / "tr.ffm", 800)), str(write_text(tmp_path / "va.ffm", 200, 1))


def run(*argv: object) -> None:
    assert cli.main([str(a) for a in argv]) == 0


def test_train_predict_convert(files, capsys):
    tr, va = files
    run("train", "-l", 1e-4, "-k", 8, "-t", 4, "-r", 0.3, "-s", 1, "-p", va, tr, "m")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["iter", "tr_logloss", "va_logloss", "tr_time"]
    assert [int(line.split()[0]) for line in lines[1:5]] == [1, 2, 3, 4]
    losses = [float(line.split()[2]) for line in lines[1:5]]
    assert losses[-1] < losses[0]
    run("predict", va, "m", "out")
    summary = capsys.readouterr().out
    assert summary.startswith("samples 200, logloss ")
    assert float(summary.split("logloss ")[1].split(",")[0]) == pytest.approx(losses[-1], abs=2e-5)
    expected = np.loadtxt("out")
    for to in ("libffm", "libffm-text", "xlearn", "model"):
        run("convert", "m", f"m.{to}", "--to", to)
        run("predict", va, f"m.{to}", f"out.{to}")
        np.testing.assert_allclose(np.loadtxt(f"out.{to}"), expected, atol=1e-5)
        capsys.readouterr()
        run("info", f"m.{to}", "--json")
        found = json.loads(capsys.readouterr().out)
        assert (found["num_features"], found["num_fields"], found["embed_dim"]) == (40, 4, 8)
    run("convert", va, "va.data", "--to", "dataset")
    run("predict", "va.data", "m", "out2")
    assert Path("out2").read_text() == Path("out").read_text()
    run("convert", "va.data", "again.ffm", "--to", "text")
    run("predict", "again.ffm", "m", "out3")
    assert Path("out3").read_text() == Path("out").read_text()
    capsys.readouterr()
    run("info", "va.data")
    assert "200" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--quiet"],
        ["--no-norm", "-r", "0.05"],
        ["--mode", "deterministic", "--batch-size", "32", "--optimizer", "adam", "-r", "0.01"],
        ["-s", "2"],
        ["--loss", "squared", "--bias", "--linear", "--init", "normal"],
        ["--dtype", "bfloat16", "--rounding-seed", "3", "--optimizer", "vector_adagrad"],
        ["--no-shuffle", "--no-within-field", "--seed", "5", "--optimizer", "ftrl"],
        ["--optimizer", "sgd", "--lenient"],
    ],
)
def test_flags(flags, files, capsys):
    tr, va = files
    run("train", "-t", 2, *flags, "-p", va, tr)
    out = capsys.readouterr().out
    assert (out == "") == ("--quiet" in flags)
    assert interop.load_model("tr.ffm.model").interaction.num_features == 40


def test_json_and_auto_stop(files, capsys):
    tr, va = files
    run("train", "--json", "-t", 60, "-r", 1.0, "--auto-stop", "--patience", 2, "-p", va, tr, "m")
    *epochs, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(epochs) == summary["epochs"] < 60
    best = min(epoch["valid_loss"] for epoch in epochs)
    assert summary["valid_logloss"] == pytest.approx(best, abs=1e-6)


def test_unknown_features_count_in_the_norm(files, capsys):
    tr, _ = files
    run("train", "-t", 1, tr, "m", "--quiet")
    Path("new.ffm").write_text("1 0:3:1 1:12:1 2:999:1 9:21:1\n")
    run("predict", "new.ffm", "m", "--logit")
    captured = capsys.readouterr()
    assert "2 of 4 entries have features or fields that the model does not know" in captured.err
    table = interop.load_model("m").interaction.weight.detach().view(40, 4, 4)
    assert float(captured.out) == pytest.approx(float(table[3, 1] @ table[12, 0]) / 4, rel=1e-4)


def test_check(files, capsys):
    run("check", files[0])
    assert "features of each field  [10, 10, 10, 10]" in capsys.readouterr().out
    Path("bad.ffm").write_text("1 0:1:1\n0 0:x:1\n1 1:2\n")
    assert cli.main(["check", "bad.ffm", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["broken lines"] == 2 and found["rows"] == 1
    assert found["problems"][0].startswith("bad.ffm:2:5: ")
    assert captured.err == "ffm-ext check: bad.ffm: 2 broken lines\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "none.ffm"], "none.ffm"),
        (["train", "bad.ffm"], "bad.ffm:1:5: "),
        (["train", "empty.ffm"], "empty.ffm: no samples"),
        (["train", "tr.ffm", "-r", "-1"], "AdaGrad: lr = -1.0 is out of range"),
        (["train", "tr.ffm", "--auto-stop"], "auto_stop needs valid"),
        (["train", "tr.ffm", "--resume", "tr.ffm"], "not a whole safetensors file"),
        (["predict", "tr.ffm", "tr.ffm"], "no model that is known here"),
        (["info", "tr.ffm"], "no model that is known here"),
    ],
)
def test_errors_are_one_message(argv, message, files, capsys):
    Path("bad.ffm").write_text("1 0:x:1\n")
    Path("empty.ffm").write_text("")
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_torchfm_state(files):
    state = {f"ffm.embeddings.{g}.weight": torch.randn(7, 4) for g in range(3)}
    state |= {"linear.fc.weight": torch.randn(7, 1), "linear.bias": torch.randn(1)}
    torch.save(state, "t.pt")
    run("convert", "t.pt", "m", "--to", "model")
    table = interop.load_model("m").interaction.weight.view(7, 3, 4)
    assert torch.equal(table[:, 1], state["ffm.embeddings.1.weight"])


def test_interrupted_training_resumes_to_the_same_bits(files):
    tr, va = files
    flags = [
        sys.executable,
        "-m",
        "ffm_ext",
        "train",
        "-t",
        "400",
        "-p",
        va,
        "--mode",
        "deterministic",
    ]
    process = subprocess.Popen(
        [*flags, "--checkpoint", "c", tr, "broken"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not os.path.exists("c"):
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with --resume c" in err
    assert 0 < Trainer.load("c").epoch < 400
    run("train", "-t", 400, "-p", va, "--resume", "c", "--quiet", tr, "resumed")
    run("train", "-t", 400, "-p", va, "--mode", "deterministic", "--quiet", tr, "whole")
    one, two = (interop.load_model(name).interaction.weight for name in ("resumed", "whole"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("command", ["train", "predict", "check", "convert", "info"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0 and "usage: ffm-ext" in capsys.readouterr().out


def test_predict_and_check_in_pieces(files, capsys, monkeypatch):
    """A text larger than memory is read a piece at a time: nothing shows that it was."""
    tr, va = files
    run("train", "-t", 2, tr, "m")

    def shown() -> tuple[list[str], np.ndarray]:
        run("predict", "--json", va, "m", "out")
        summary = json.loads(capsys.readouterr().out)
        numbers = [*summary.values(), *np.loadtxt("out")]
        run("check", va)
        run("convert", va, "folder", "--to", "dataset")
        run("check", "--json", "folder")
        return capsys.readouterr().out.splitlines(), np.array(numbers)

    capsys.readouterr()
    whole = shown()
    pieces = []

    def in_pieces(*args, **kwargs):
        for piece in data.iter_libffm(*args, piece_bytes=700, **kwargs):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(_models, "iter_libffm", in_pieces)
    again = shown()
    assert again[0] == whole[0]
    np.testing.assert_allclose(again[1], whole[1], atol=2e-6)  # a digit more or less of six
    assert len(pieces) > 10
    # A fault in the last piece: no output appears.
    Path("broken").write_text(Path(va).read_text() + "1 0:x:1\n")
    before = Path("out").read_text()
    assert cli.main(["predict", "broken", "m", "out"]) == 1
    assert Path("out").read_text() == before
    assert not list(Path().glob("*.tmp*")) and not list(Path().glob(".*out*"))
