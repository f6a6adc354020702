# SPDX-License-Identifier: MIT
"""``ffm-ext train | predict | check | convert | info FILE``."""

import fcntl
import gzip
import json
import math
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ffm_ext import FFM, cli, data, interop
from ffm_ext.distributed import DistributedTrainer
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
    flags = ("-t", 60, "--auto-stop", "--patience", 2, "-p", va)
    run("train", "--json", "-r", 1.0, *flags, "--checkpoint", "c", tr, "m")
    *epochs, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(epochs) == summary["epochs"] < 60
    best = min(epoch["valid_loss"] for epoch in epochs)
    assert summary["valid_logloss"] == pytest.approx(best, abs=1e-6)
    assert epochs[summary["best_epoch"] - 1]["valid_loss"] == best
    run("train", "--quiet", *flags, "--resume", "c", tr, "m")
    assert re.fullmatch(
        r"ffm-ext train: Trainer.fit: stopped in epoch \d+, .* without auto_stop it trains on\n",
        capsys.readouterr().err,
    )


def test_quiet_prints_nothing(files, capsys):
    run("train", "-t", 1, "--json", "--quiet", files[0], "m")
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_with_nothing_left_to_train(files, capsys):
    tr, _ = files
    run("train", "-t", 3, "--quiet", "--checkpoint", "c", tr, "m")
    run("train", "-t", 2, "--quiet", "--resume", "c", tr, "m2")
    message = "nothing is left to train: the checkpoint has 3 epochs, and -t 2 means in all\n"
    assert capsys.readouterr().err == message


def test_scores_that_are_not_finite(files, capsys):
    """They are neither numbers of JSON nor what a reader of predictions takes."""
    tr, va = files
    run("train", "-t", 1, "--quiet", tr, "m")
    model = interop.load_model("m")
    with torch.no_grad():
        model.interaction.weight[7] = float("nan")
    interop.save_model(model, "bad")
    Path("te.ffm").write_text("1 0:1:1 1:11:1\n0 0:2:1 1:12:1\n1 0:7:1 1:12:1\n")
    for flags in ([], ["--json"], ["--logit"]):
        assert cli.main(["predict", *flags, "te.ffm", "bad", "out"]) == 1
        assert "te.ffm: the score of sample 3, counted from 1, is nan" in capsys.readouterr().err
    assert cli.main(["convert", "bad", "out", "--to", "libffm"]) == 1
    assert "save_libffm: factor 0 of feature 7 for field 0 is nan" in capsys.readouterr().err
    assert not Path("out").exists()


def test_pipes(files, capfd):
    tr, va = files
    run("train", "-t", 1, "--quiet", tr, "m")
    os.mkfifo("pipe")
    both_ends = os.open("pipe", os.O_RDWR)  # to open it takes no waiting then
    assert cli.main(["predict", va, "pipe"]) == 1
    os.close(both_ends)
    assert "pipe: a model is read from a file, not from a pipe" in capfd.readouterr().err
    Path("many.ffm").write_text(Path(va).read_text() * 100)
    with subprocess.Popen(["head", "-n", "1", "pipe"], stdout=subprocess.DEVNULL):
        assert cli.main(["predict", "many.ffm", "m", "pipe"]) == 1
    assert capfd.readouterr().err == "ffm-ext predict: [Errno 32] Broken pipe: 'pipe'\n"


@pytest.mark.parametrize(
    "argv",
    [
        *("train pipe m2", "train -p pipe tr.ffm m2", "predict pipe m", "check pipe"),
        *("convert pipe folder --to dataset", "convert pipe text --to text"),
    ],
)
def test_data_from_a_pipe_is_refused_without_waiting_for_a_writer(argv, files):
    run("train", "-t", 1, "--quiet", files[0], "m")
    os.mkfifo("pipe")
    command = [sys.executable, "-m", "ffm_ext", *argv.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pipe: data is read from a file, not from a pipe or a device" in done.stderr


def test_unknown_features_count_in_the_norm(files, capsys):
    tr, _ = files
    run("train", "-t", 1, tr, "m", "--quiet")
    Path("new.ffm").write_text("1 0:3:1 1:12:1 2:999:1 9:21:1\n")
    run("predict", "new.ffm", "m", "--logit")
    captured = capsys.readouterr()
    assert "2 of 4 entries have features or fields that the model does not know" in captured.err
    table = interop.load_model("m").interaction.weight.detach().view(40, 4, 4)
    assert float(captured.out) == pytest.approx(float(table[3, 1] @ table[12, 0]) / 4, rel=1e-4)


def test_validation_data_changes_nothing_that_is_learnt(files, capsys):
    """What it alone has takes no part, as in libffm, and is no part of the model."""
    tr, va = files
    with open(va, "a") as file:
        file.write("1 0:3:1 1:1000:1\n")
    flags = ("-t", 3, "--linear", "--bias", "--seed", 4)
    run("train", *flags, tr, "alone")
    run("train", *flags, tr, "again")
    capsys.readouterr()
    run("train", *flags, "--checkpoint", "c", "-p", va, "--json", tr, "beside")
    captured = capsys.readouterr()
    assert captured.err == (
        "va.ffm: 1 of 802 entries have features or fields that the model does not know; "
        "their pairs are left out\n"
    ).replace("va.ffm", va)
    alone = Path("alone").read_bytes()
    assert Path("again").read_bytes() == alone == Path("beside").read_bytes()
    summary = json.loads(captured.out.splitlines()[-1])
    run("predict", "--json", va, "beside", "out")
    found = json.loads(capsys.readouterr().out)
    assert found["logloss"] == pytest.approx(summary["valid_logloss"], abs=1e-7)
    assert (found["entries"], found["unknown_entries"], found["skipped"]) == (802, 1, 0)
    # From a checkpoint too, also without -p.
    run("train", "--resume", "c", "-t", 4, tr, "longer")
    run("train", *flags, "-t", 4, tr, "wanted")
    assert Path("longer").read_bytes() == Path("wanted").read_bytes()
    with open(va, "a") as file:
        file.write("1 0:3:1 9:12:1\n")
    run("train", *flags, "-p", va, tr, "beside")
    torch.testing.assert_close(load_file("beside"), load_file("alone"))


def test_a_larger_model_to_start_from_stays_as_large(files):
    tr, va = files
    Path("wide.ffm").write_text("1 0:3:1 5:1000:1\n0 0:4:1 5:900:1\n")
    run("train", "-t", 1, "--quiet", "wide.ffm", "wide")
    run("train", "-t", 1, "--quiet", "--init-model", "wide", "-p", va, tr, "m")
    assert interop.load_model("m").interaction.weight.shape == (1001, 6 * 4)


def test_a_model_that_describes_its_fields_keeps_them(files):
    model = FFM(2, field_dims=[10, 10, 10, 20])
    torch.nn.init.zeros_(model.interaction.weight)
    Trainer(model).save("c")
    run("train", "--resume", "c", "-t", 1, "--quiet", files[0], "m")
    assert interop.load_model("m").offsets.tolist() == [0, 10, 20, 30, 50]


def test_what_a_checkpoint_says(files, capsys):
    tr, _ = files
    run("train", "-t", 2, "--seed", 3, "--optimizer", "ftrl", "--checkpoint", "c", tr, "m")
    capsys.readouterr()
    run("info", "--json", "c")
    found = json.loads(capsys.readouterr().out)
    assert (found["epochs"], found["samples_of_next_epoch"], found["seed"]) == (2, 0, 3)
    assert (found["optimizer"], found["beta"], found["mode"]) == ("ftrl", 1.0, "exact")
    run("train", "--resume", "c", "-t", 3, files[1], "m")
    assert "va.ffm: 200 samples, and the last epoch of c had 800" in capsys.readouterr().err


def test_labels_of_one_class(files, capsys):
    Path("ratings.ffm").write_text("3 0:0:1 1:1:1\n5 0:2:1 1:1:1\n")
    run("train", "ratings.ffm", "m")
    assert "all labels are above 0, which is one class" in capsys.readouterr().err
    run("train", "--loss", "squared", "ratings.ffm", "m")
    assert capsys.readouterr().err == ""


def test_training_goes_on_where_standard_output_is_full(files, capsys, monkeypatch):
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        run("train", "-t", 2, files[0], "m")
    assert capsys.readouterr().err.startswith("standard output: No space left on device")
    assert interop.load_model("m").interaction.num_features == 40


def test_files_of_another_kind(files, capsys):
    tr, _ = files
    Path("tr.gz").write_bytes(gzip.compress(Path(tr).read_bytes()))
    Path("folder").mkdir()
    run("convert", tr, "data", "--to", "dataset")
    for argv, message in (
        (("check", "tr.gz"), "tr.gz: it is compressed by gzip"),
        (("train", "tr.gz"), "tr.gz: it is compressed by gzip"),
        (("info", "folder"), "folder"),
        (("predict", tr, "folder"), "folder: a folder without checkpoints, and a model is a file"),
        (("convert", "data", "more", "--to", "dataset"), "data: --to dataset takes libffm text"),
    ):
        assert cli.main([str(a) for a in argv]) == 1
        assert message in capsys.readouterr().err


def test_parts_of_a_model_that_are_0_need_no_place(files, capsys):
    run("train", "-t", 1, files[0], "m")
    run("convert", "m", "m.xlearn", "--to", "xlearn")
    run("convert", "m.xlearn", "m.libffm", "--to", "libffm")
    run("train", "-t", 1, "--linear", files[0], "m")
    assert cli.main(["convert", "m", "m.libffm", "--to", "libffm"]) == 1
    assert "linear = True and weights in it" in capsys.readouterr().err


def test_check(files, capsys):
    run("check", files[0])
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["features of each field"] == "[10, 10, 10, 10]"
    positive = sum(line.startswith("1") for line in Path(files[0]).read_text().splitlines())
    assert 0 < positive < 800
    assert float(shown["labels > 0"]) == float(shown["label mean"]) == positive / 800
    Path("labels.ffm").write_text("-1 0:1:1\n2.5 0:1:1\n0 0:1:1\n4 0:1:1\n")
    run("check", "labels.ffm", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["labels > 0"], found["label mean"]) == (0.5, 1.375)
    Path("bad.ffm").write_text("1 0:1:1\n0 0:x:1\n1 1:2\n")
    assert cli.main(["check", "bad.ffm", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["broken lines"] == 2 and found["rows"] == 1
    assert found["problems"][0].startswith("bad.ffm:2:5: ")
    assert captured.err == "ffm-ext check: bad.ffm: 2 broken lines\n"


@pytest.mark.parametrize(
    ("name", "place", "number", "message"),
    [
        ("indices", 3, -1, "indices[3] = -1 is out of range for a table of 40 features"),
        ("indices", 3, 40, "indices[3] = 40 is out of range for a table of 40 features"),
        ("fields", 5, 4, "fields[5] = 4 is out of range for 4 fields"),
        ("labels", 2, math.inf, "labels[2] = inf is not finite"),
        ("offsets", 2, 900, "offsets[3] = 12 is less than offsets[2] = 900"),
    ],
)
def test_what_a_folder_holds_is_looked_at(files, capsys, name, place, number, message):
    run("train", "-t", 1, "--quiet", files[0], "m")
    run("convert", files[0], "folder", "--to", "dataset")
    part = Path("folder/part-00000.safetensors")
    tensors = load_file(part)
    tensors[name][place] = number
    save_file(tensors, part)
    capsys.readouterr()
    for argv, where in (
        (["check", "folder"], "folder: shards[0]"),
        (["predict", "folder", "m"], "folder: shards[0]"),
        (["convert", "folder", "text", "--to", "text"], "write_libffm"),
    ):
        assert cli.main(argv) == 1
        assert capsys.readouterr().err == f"ffm-ext {argv[0]}: {where}: {message}\n"
    assert not Path("text").exists()


def test_json_of_what_was_written_to_a_device(files, capsys):
    run("convert", files[0], "folder", "--to", "dataset")
    run("train", "-t", 1, "--quiet", files[0], "m")
    capsys.readouterr()
    for source, to in (("folder", "text"), ("m", "libffm")):
        run("convert", source, "/dev/null", "--to", to, "--json")
        assert json.loads(capsys.readouterr().out) == {"target": "/dev/null", "to": to}


def test_weights_of_samples_count_in_what_is_said_of_them(files, capsys):
    weighted = data.read_libffm(files[1])
    labels = weighted.shards[0].labels
    weights = torch.where(labels > 0, 5.0, 0.5)
    batch = weighted.shards[0].batch
    data.SparseDataset.from_arrays(batch, labels, weights).save("weighted")
    for loss, measure in (("logistic", "logloss"), ("squared", "rmse")):
        model = f"{loss}.model"
        run("train", "-t", 2, "-p", "weighted", "--loss", loss, "--json", files[0], model)
        *epochs, summary = map(json.loads, capsys.readouterr().out.splitlines())
        told = summary[f"valid_{measure}"]
        loss_of_epoch = epochs[-1]["valid_loss"]
        wanted = loss_of_epoch if loss == "logistic" else math.sqrt(2 * loss_of_epoch)
        assert told == pytest.approx(wanted, rel=1e-5)
        run("predict", "weighted", model, "out", "--json")
        assert json.loads(capsys.readouterr().out)[measure] == pytest.approx(told, rel=1e-6)


def test_check_of_fields_far_apart(files, capsys):
    Path("far.ffm").write_text("1 2147483647:1:1 3:2:1 3:2:1\n0 3:4:1\n")
    run("check", "--json", "far.ffm")
    found = json.loads(capsys.readouterr().out)
    assert (found["fields"], found["largest field"]) == (2, 2147483647)
    assert found["numbers of the fields"] == [3, 2147483647]
    assert found["features of each field"] == [2, 1]
    assert found["entries of each field"] == [3, 1]
    Path("none.ffm").write_text("1\n")
    run("check", "--json", "none.ffm")
    found = json.loads(capsys.readouterr().out)
    assert (found["fields"], found["largest field"], found["numbers of the fields"]) == (0, -1, [])


def test_states_that_memory_does_not_hold(files, monkeypatch, capsys):
    def full(*shape, **_):
        raise MemoryError(f"no memory for {shape}")

    monkeypatch.setattr("ffm_ext.memory.empty_table", full)
    assert cli.main(["train", "tr.ffm"]) == 1
    assert capsys.readouterr().err == "ffm-ext train: no memory for (40, 16)\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "none.ffm"], "none.ffm"),
        (["train", "bad.ffm"], "bad.ffm:1:5: "),
        (["train", "empty.ffm"], "empty.ffm: no samples"),
        (["train", "tr.ffm", "-r", "-1"], "AdaGrad: lr = -1.0 is out of range"),
        (["train", "tr.ffm", "-k", "0"], "embed_dim = 0 must be positive"),
        (["train", "tr.ffm", "--auto-stop"], "--auto-stop needs -p"),
        (["train", "tr.ffm", "-t", "0"], "-t 0 must be positive"),
        (
            ["train", "tr.ffm", "-p", "va.ffm", "--auto-stop", "--patience", "0"],
            "--patience 0 must be positive",
        ),
        (["train", "tr.ffm", "--patience", "1"], "--patience is for --auto-stop"),
        (["train", "tr.ffm", "--batch-size", "8"], "--batch-size is for --mode deterministic, not"),
        (["train", "tr.ffm", "--ranges", "8"], "--ranges is for training under torchrun"),
        (["train", "tr.ffm", "--mode", "exact", "-s", "2"], "-s 2: --mode exact has one thread"),
        (["train", "tr.ffm", "--checkpoint-every", "9"], "--checkpoint-every is for --checkpoint"),
        (["train", "tr.ffm", "--rounding-seed", "3"], "--rounding-seed is for --dtype bfloat16"),
        (["train", "tr.ffm", "-p", "empty.ffm"], "empty.ffm: no samples"),
        (["train", "--lenient", "-p", "ds", "ds"], "--lenient is for lines of text, and ds is a"),
        (["predict", "--lenient", "ds", "m"], "--lenient is for lines of text, and ds is a folder"),
        (["convert", "--lenient", "ds", "x", "--to", "text"], "--lenient is for lines of text"),
        (
            ["train", "-k", "1000000000000", "tr.ffm"],
            "1000000000000 factors (-k) for features up to 39 (in tr.ffm) and fields up to 3 (in tr.ffm) "
            "need 640000000000000 bytes, which are not to be had",
        ),
        (
            ["train", "-p", "far.ffm", "tr.ffm"],
            "4 factors (-k) for features up to 4611686018427387904 (in far.ffm) and fields up to 3 (in tr.ffm) ",
        ),
        (["train", "tr.ffm", "--resume", "tr.ffm"], "not a whole safetensors file"),
        (["predict", "tr.ffm", "tr.ffm"], "no model that is known here"),
        (["info", "tr.ffm"], "no model that is known here"),
    ],
)
def test_errors_are_one_message(argv, message, files, capsys):
    Path("bad.ffm").write_text("1 0:x:1\n")
    Path("empty.ffm").write_text("")
    Path("far.ffm").write_text(f"1 0:{2**62}:1\n")
    run("convert", files[1], "ds", "--to", "dataset")
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    "given",
    [
        *("-l 0", "-k 4", "-r 0.2", "-s 1", "--no-norm", "--loss logistic", "--mode exact"),
        *("--optimizer adagrad", "--l1 0", "--beta 1", "--bias", "--linear", "--no-within-field"),
        *("--dtype float32", "--rounding-seed 0", "--init normal", "--batch-size 8", "--seed 0"),
        "--no-shuffle",
    ],
)
def test_settings_are_those_of_the_checkpoint(given, files, capsys):
    argv = ["train", *given.split(), "--resume", "c", files[0], "m"]
    assert cli.main(argv) == 1
    flag = given.split()[0]
    message = f"{flag} is for a new run, and --resume goes on with the settings of c"
    assert capsys.readouterr().err == f"ffm-ext train: {message}\n"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none/out", "No such file or directory: 'none/out'"),
        ("tr.ffm/out", "Not a directory: 'tr.ffm/out'"),
        (".", "Is a directory: '.'"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    target, message, files, capsys, monkeypatch
):
    tr, va = files
    run("train", "-t", 1, "--quiet", tr, "m")
    run("convert", va, "folder", "--to", "dataset")

    def work(*_, **__):
        raise AssertionError

    for name in ("_train.load_data", "_convert.load_data", "_models.load_any_model"):
        monkeypatch.setattr(f"ffm_ext.cli.{name}", work)
    for argv in (
        ["train", tr, target],
        ["train", tr, "fits", "--checkpoint", target],
        ["predict", va, "m", target],
        ["convert", "m", target, "--to", "libffm"],
        *([["convert", va, target, "--to", "dataset"]] if target != "." else []),
        ["convert", "folder", target, "--to", "text"],
    ):
        assert cli.main(argv) == 1
        assert capsys.readouterr().err.endswith(message + "\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train -p va.ffm tr.ffm va.ffm", "MODEL va.ffm would take the place of -p va.ffm"),
        ("train tr.ffm ./tr.ffm", "MODEL tr.ffm would take the place of TRAIN tr.ffm"),
        ("train --checkpoint tr.ffm tr.ffm n", "--checkpoint tr.ffm would take the place of TRAIN"),
        ("train --checkpoint n tr.ffm n", "MODEL n would take the place of --checkpoint n"),
        ("train --resume c tr.ffm c", "MODEL c would take the place of --resume c"),
        (
            "train --init-model m --checkpoint m tr.ffm n",
            "--checkpoint m would take the place of --init-model m",
        ),
        ("predict va.ffm m va.ffm", "OUTPUT va.ffm would take the place of TEST va.ffm"),
        ("predict va.ffm m link", "OUTPUT link would take the place of MODEL m"),
        ("convert m m --to libffm", "TARGET m would take the place of SOURCE m"),
        (
            "train --init-model n.checkpoint tr.ffm n",
            "on Ctrl-C, the file n.checkpoint would take the place of --init-model n.checkpoint",
        ),
        (
            "train -p va.ffm n.checkpoint n",
            "on Ctrl-C, the file n.checkpoint would take the place of TRAIN n.checkpoint",
        ),
        ("train ds ds/part-00000.safetensors", "MODEL ds/part-00000.safetensors would be written"),
        ("train -p ds tr.ffm to_ds/m", "MODEL to_ds/m would be written into -p ds"),
        ("train --checkpoint ds/c ds n", "--checkpoint ds/c would be written into TRAIN ds"),
        ("predict ds m ds/out", "OUTPUT ds/out would be written into TEST ds"),
        ("convert ds ds/out --to text", "TARGET ds/out would be written into SOURCE ds"),
        (
            "convert ds/in.ffm ds --to dataset",
            "TARGET ds would take the place of SOURCE ds/in.ffm, which is inside",
        ),
    ],
)
def test_no_input_is_replaced(argv, message, files, capsys):
    tr, _ = files
    run("train", "-t", 1, "--quiet", "--checkpoint", "c", tr, "m")
    Path("link").symlink_to("m")
    run("convert", tr, "ds", "--to", "dataset")
    Path("to_ds").symlink_to("ds")
    for copy in ("ds/in.ffm", "n.checkpoint"):
        Path(copy).write_bytes(Path(tr).read_bytes())

    def found():
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    before = found()
    assert cli.main(argv.split()) == 1
    assert message in capsys.readouterr().err
    assert found() == before


def test_a_run_may_take_the_place_of_what_it_goes_on_with(files, capsys):
    tr, _ = files
    run("train", "-t", 1, "--checkpoint", "c", tr, "m")
    run("train", "-t", 2, "--resume", "c", "--checkpoint", "c", tr, "m")
    assert Trainer.load("c").epoch == 2
    run("train", "-t", 1, "--init-model", "m", tr, "m")


def test_the_folder_that_one_is_in_has_a_name(files, capsys, monkeypatch):
    run("convert", files[0], "ds", "--to", "dataset")
    before = sorted(Path("ds").iterdir())
    monkeypatch.chdir("ds")
    assert cli.main(["train", "-t", "1", "."]) == 1
    assert "MODEL ds.model would be written into TRAIN ." in capsys.readouterr().err
    monkeypatch.chdir("..")
    assert sorted(Path("ds").iterdir()) == before
    run("train", "-t", 1, "ds/../ds/")
    assert Path("ds.model").is_file()


@pytest.mark.parametrize("stopped", [False, True])
def test_the_checkpoint_of_resume_is_only_read(stopped, files, capsys, monkeypatch):
    tr, _ = files
    run("train", "-t", 1, "--checkpoint", "c", tr, "m")
    before = Path("c").read_bytes()
    if stopped:
        finish = Trainer._finish_epoch

        def interrupt(*args):
            finish(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "_finish_epoch", interrupt)
    assert cli.main(["train", "-t", "3", "--resume", "c", tr, "m"]) == 130 * stopped
    assert Path("c").read_bytes() == before
    assert Path("m.checkpoint").exists() == stopped
    if stopped:
        assert Trainer.load("m.checkpoint").epoch == 2
        assert "go on with --resume m.checkpoint -t 3\n" in capsys.readouterr().err


def test_checkpoints_of_several_processes(files, capsys, monkeypatch):
    """A folder of a run under torchrun, as a model; one process does not go on with it, nor several with a file."""
    tr, va = files
    run("train", "-t", 1, "--checkpoint", "c", "--loss", "squared", tr, "m")
    with pytest.warns(UserWarning, match="in a single process"):
        DistributedTrainer(interop.load_model("m"), loss="squared").save("folder")
    run("predict", va, "m", "expected")
    run("predict", va, "folder", "out")
    assert Path("out").read_text() == Path("expected").read_text()
    assert capsys.readouterr().err == ""
    run("info", "--json", "folder")
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["loss"]) == ("ffm_ext checkpoint folder", "squared")
    run("train", "-t", 1, "--init-model", "folder", tr, "m2")
    assert cli.main(["train", "--resume", "folder", tr, "m2"]) == 1
    message = "--resume folder: these checkpoints were written under torchrun"
    assert message in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert cli.main(["train", "--resume", "c", tr, "m2"]) == 1
    assert "--resume c: under torchrun it is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("together", [False, True])
def test_broken_lines_of_all_data_are_counted(together, files, capfd, monkeypatch):
    for path in files:
        Path(path).write_text(Path(path).read_text() + "1 0:x:1\n")
    argv = ["train", "-t", "1", "--lenient", "--quiet", "-p", "va.ffm", "tr.ffm"]
    if together:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        err = subprocess.run(
            [sys.executable, *launcher, "-m", "ffm_ext", *argv], capture_output=True, text=True
        ).stderr
    else:
        run(*argv)
        err = capfd.readouterr().err
    for name in ("tr.ffm", "va.ffm"):
        assert f"{name}: 1 broken lines skipped" in err.splitlines()


def test_the_loss_of_a_model_is_kept(files, capsys):
    tr, va = files
    run("train", "-t", 2, "--loss", "squared", "--no-norm", "-p", va, "--json", tr, "m")
    rmse = json.loads(capsys.readouterr().out.splitlines()[-1])["valid_rmse"]
    run("convert", "m", "again", "--to", "model")
    for model in ("m", "again"):
        run("predict", "--json", va, model, "out")
        assert json.loads(capsys.readouterr().out)["rmse"] == pytest.approx(rmse, abs=1e-6)
        labels = data.read_libffm(va).shards[0].labels.numpy()
        assert np.mean((np.loadtxt("out") - labels) ** 2) ** 0.5 == pytest.approx(rmse, abs=1e-4)
        run("predict", "--loss", "squared", va, model, "out")
        run("info", model, "--json")
        assert '"loss": "squared"' in capsys.readouterr().out
        assert cli.main(["predict", "--loss", "logistic", va, model]) == 1
        assert f"{model} was trained with squared loss" in capsys.readouterr().err
    for to in ("libffm", "libffm-text", "torchfm"):
        assert cli.main(["convert", "m", "other", "--to", to]) == 1
        assert "trained with squared loss" in capsys.readouterr().err
    assert not Path("other").exists()


def test_what_xlearns_text_does_not_say(files, capsys):
    tr, va = files
    run("train", "-t", 3, "-r", 0.05, "--loss", "squared", "--no-norm", "--bias", tr, "m")
    run("predict", va, "m", "expected")
    capsys.readouterr()
    run("convert", "m", "m.txt", "--to", "xlearn")
    assert capsys.readouterr().err == "m.txt: the format leaves out --no-norm and --loss squared\n"
    told = ["--no-norm", "--loss", "squared"]
    run("predict", *told, va, "m.txt", "out")
    expected = np.loadtxt("expected")
    np.testing.assert_allclose(np.loadtxt("out"), expected, atol=1e-5)
    run("predict", va, "m.txt", "untold")
    assert np.abs(np.loadtxt("untold") - expected).max() > 0.1
    # Ours says both from then on.
    run("convert", *told, "m.txt", "m2", "--to", "model")
    run("predict", va, "m2", "out")
    np.testing.assert_allclose(np.loadtxt("out"), expected, atol=1e-5)


def test_no_norm_for_a_model_that_says_otherwise(files, capsys):
    tr, va = files
    run("train", "-t", 1, tr, "m")
    run("convert", "m", "m.bin", "--to", "libffm")
    for model in ("m", "m.bin"):
        assert cli.main(["predict", "--no-norm", va, model]) == 1
        message = f"ffm-ext predict: --no-norm: {model} was trained with normalisation, as it says"
        assert capsys.readouterr().err == message + "\n"
    assert cli.main(["convert", "--no-norm", tr, "folder", "--to", "dataset"]) == 1
    assert "--no-norm is for models" in capsys.readouterr().err
    assert cli.main(["convert", "--lenient", "m", "m.bin", "--to", "libffm"]) == 1
    assert "--lenient is for data, not for --to libffm" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t.pt", "t.safetensors"])
def test_torchfm_state(name, files, capsys):
    tr, va = files
    state = {f"ffm.embeddings.{g}.weight": torch.randn(40, 4) for g in range(4)}
    state |= {"linear.fc.weight": torch.randn(40, 1), "linear.bias": torch.randn(1)}
    torch.save(state, name) if name == "t.pt" else save_file(state, name)
    run("convert", "--json", name, "m", "--to", "model")
    found = json.loads(capsys.readouterr().out)
    assert (found["target"], found["to"], found["kind"]) == ("m", "model", "ffm_ext model")
    assert (found["num_features"], found["bias"]) == (40, True)
    table = interop.load_model("m").interaction.weight.view(40, 4, 4)
    assert torch.equal(table[:, 1], state["ffm.embeddings.1.weight"])
    # Read as it is, and written again.
    run("predict", "--logit", va, name, "out")
    expected = interop.load_model("m")(data.read_libffm(va).shards[0].batch)
    np.testing.assert_allclose(np.loadtxt("out"), expected.detach(), rtol=1e-4, atol=1e-4)
    run("convert", "m", f"again.{name}", "--to", "torchfm")
    path = f"again.{name}"
    again = torch.load(path, weights_only=True) if name == "t.pt" else load_file(path)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_convert_as_json(files, capsys):
    tr, _ = files
    run("convert", "--json", tr, "folder", "--to", "dataset")
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 800 and found["kind"] == "ffm_ext dataset"
    run("convert", "--json", "folder", "text", "--to", "text")
    found = json.loads(capsys.readouterr().out)
    assert found == {"target": "text", "to": "text", "bytes": Path("text").stat().st_size}


class Malice:
    """Unpickled without care, it leaves a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_hostile_file_is_one_message(files, capsys):
    torch.save({"linear.bias": Malice()}, "bad.pt")
    torch.save({"linear.bias": torch.zeros(1)}, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:-200])
    for name in ("bad.pt", "cut.pt"):
        for argv in (["convert", name, "m", "--to", "model"], ["predict", files[1], name]):
            assert cli.main(argv) == 1
            error = capsys.readouterr().err
            assert f"load_torchfm: {name}: torch.load(weights_only=True) refuses it" in error
    assert not Path("ran").exists() and not Path("m").exists()


def test_ftrl_with_l1_gives_zeros(files, capsys):
    tr, va = files
    flags = ["--optimizer", "ftrl", "-r", 0.1, "--beta", 0.5, "--l2", 1e-3, "--linear"]
    zeros, losses = [], []
    for l1 in (0, 0.3, 5):  # exact zeros only by way of l1, and the more of them the larger it is
        run("train", "-t", 5, "--json", *flags, "--l1", l1, "-p", va, tr, "m")
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["valid_logloss"])
        model = interop.load_model("m")
        zeros.append([int((p == 0).sum()) for p in (model.interaction.weight, model.linear.weight)])
    assert zeros[0] == [0, 0]
    for one, more in pairwise(zeros):
        assert one[0] + 5 < more[0] and one[1] < more[1]
    assert max(losses) < 0.55

    for flag in ("--l1", "--beta"):
        assert cli.main(["train", flag, "0.1", tr, "m"]) == 1
        assert f"{flag} is for --optimizer ftrl, not for adagrad" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["model", "libffm", "libffm-text", "xlearn", "torchfm"])
def test_a_run_starts_from_a_model(kind, files, capsys):
    """Its weights are there before the first update, and new features and fields have weights of their own."""
    tr, va = files
    norm = ["--no-norm", "--no-within-field"] if kind == "torchfm" else []
    run("train", "-t", 5, "-r", 0.1, *norm, "-k", 2, tr, "first")
    run("convert", "first", "start", "--to", kind)
    write_text(Path("more.ffm"), 50, 3, features=60)
    Path("more.ffm").write_text(Path("more.ffm").read_text() + "1 5:70:1\n")
    capsys.readouterr()
    # A step this small changes no digit that is looked at.
    run("train", "-t", 1, "-r", 1e-9, "-l", 0, "--json", "--init-model", "start", "more.ffm", "m")
    old, new = interop.load_model("first"), interop.load_model("m")
    layer = new.interaction
    assert (layer.num_features, layer.num_fields, layer.embed_dim) == (71, 6, 2)
    assert new.normalize == old.normalize
    table = layer.weight.view(71, 6, 2)
    torch.testing.assert_close(table[:40, :4], old.interaction.weight.view(40, 4, 2))
    assert table[40:].all() and table[:, 4:].all()
    assert (new.linear.bias is None) == (kind not in ("xlearn", "torchfm"))
    # Going on is better than beginning anew.
    losses = []
    for start in ([], ["--init-model", "start"]):
        run("train", "-t", 1, "-r", 0.01, *norm[: not start], "-k", 2, "--json", *start, tr, "m")
        losses.append(json.loads(capsys.readouterr().out.splitlines()[0])["train_loss"])
    assert losses[1] < losses[0] - 0.02


def test_what_a_run_cannot_start_from(files, capsys):
    tr, _ = files
    run("train", "-t", 1, tr, "m", "--checkpoint", "c")
    for flags, message in (
        (["-k", "8"], "-k 8: m has 4 factors"),
        (["--no-norm"], "--no-norm: m was trained with normalisation"),
        (["--no-within-field"], "--no-within-field: m has pairs inside a field"),
        (["--loss", "squared"], "--loss squared: m was trained with logistic loss"),
        (["--resume", "c"], "--init-model is where a new run starts"),
    ):
        assert cli.main(["train", "--init-model", "m", *flags, tr, "m2"]) == 1
        assert message in capsys.readouterr().err
    run(
        "train", "-t", 1, "--init-model", "c", "--linear", "--bias", "--dtype", "bfloat16", tr, "m2"
    )
    model = interop.load_model("m2")
    assert model.interaction.weight.dtype == torch.bfloat16 and model.linear.weight is not None


def interrupted(*arguments):
    """Exit status and stderr of a Python whose run of ``train --json`` got Ctrl-C after three epochs."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        assert process.stdout.readline().startswith('{"epoch": ')
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize("asked", [["--checkpoint", "c"], []], ids=["checkpoint", "default"])
def test_interrupted_training_resumes_to_the_same_bits(asked, files):
    tr, va = files
    flags = ["train", "-t", "400", "-p", va, "--mode", "deterministic"]
    status, err = interrupted("-m", "ffm_ext", *flags, *asked, "--json", tr, "broken")
    checkpoint = "c" if asked else "broken.checkpoint"
    assert status == 130
    told = shlex.join(["--resume", checkpoint, "-t", "400", "-p", va, *asked])
    assert err == f"\nstopped; go on with {told}\n"
    assert 0 < Trainer.load(checkpoint).epoch < 400
    assert not Path("broken").exists()
    run("train", "-t", 400, "-p", va, "--resume", checkpoint, "--quiet", tr, "resumed")
    run(*flags, "--quiet", tr, "whole")
    one, two = (interop.load_model(name).interaction.weight for name in ("resumed", "whole"))
    assert torch.equal(one, two)


def test_the_flags_to_go_on_with_are_all_that_it_takes(files, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupt)
    flags = ["-t", "20", "--auto-stop", "--patience", "3", "-p", files[1], "--lenient"]
    flags += ["--checkpoint", "a file", "--checkpoint-every", "9"]
    assert cli.main(["train", *flags, files[0], "m"]) == 130
    told = f"--resume 'a file' {shlex.join(flags)}"
    assert capsys.readouterr().err == f"\nstopped; go on with {told}\n"


def test_a_second_interruption_leaves_no_half_checkpoint(files, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupt)
    monkeypatch.setattr(os, "fsync", interrupt)
    assert cli.main(["train", files[0], "m"]) == 130
    assert "go on" not in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"tr.ffm", "va.ffm"}


@pytest.mark.slow
def test_interrupted_processes_claim_no_checkpoint_that_is_not_there(files):
    for asked, message in (
        ([], "stopped; no checkpoint was written"),
        (
            ["--checkpoint", "c", "--ranges", "8"],
            "stopped; --resume c -t 100000 --checkpoint c --ranges 8 goes on from the last checkpoint there",
        ),
    ):
        command = ["-m", "ffm_ext", "train", "-t", "100000", "--json", *asked, files[0], "m"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        _, err = interrupted(*launcher, *command)
        assert message in err.splitlines()
        assert sorted(path.name for path in Path().iterdir()) == [*asked[1:2], "tr.ffm", "va.ffm"]
    assert DistributedTrainer.load("c").epoch >= 2


def test_a_live_bar_on_a_terminal(files):
    """stderr is a terminal, whose bar is drawn anew while the run goes on; the lines go where stdout does."""
    pytest.importorskip("rich")
    tr, _ = files
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    flags = ["-t", "300", "--mode", "deterministic", "--batch-size", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ffm_ext", "train", *flags, tr, "m"],
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=inner,
        text=True,
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    bars = re.findall(
        r"epoch (\d+)/300 [^\r]* loss (\d\.\d{5})  ([\d,]+) samples/s (\d:\d\d:\d\d)",
        shown.decode(),
    )
    epochs = [int(bar[0]) for bar in bars]
    assert len(set(epochs)) > 3 and epochs == sorted(epochs) and epochs[-1] <= 300
    assert float(bars[-1][1]) < float(bars[0][1]) < 0.8
    assert all(int(bar[2].replace(",", "")) > 100 for bar in bars)
    assert len(out.splitlines()) == 302  # a head, the epochs, a summary


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

    monkeypatch.setattr("ffm_ext.cli._data.iter_libffm", in_pieces)
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
