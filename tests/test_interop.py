# SPDX-License-Identifier: MIT
"""Models of other libraries, our own model file, and what damaged files are answered with."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import batch_of, make_problem
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from ffm_ext import FFM, SparseBatch, interop, quantize
from ffm_ext.interop import (
    from_torchfm,
    load_libffm,
    load_model,
    load_torchfm,
    load_xlearn_text,
    model_loss,
    save_libffm,
    save_model,
    save_torchfm,
    save_xlearn_text,
    to_torchfm,
)
from ffm_ext.training import Trainer

N, F = 11, 3

LIBFFM = {"bias": False, "linear": False, "within_field": True, "normalize": True}


def model_of(embed_dim: int = 4, **options: bool) -> FFM:
    torch.manual_seed(0)
    model = FFM(embed_dim, num_features=N, num_fields=F, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def scores(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(batch_of(make_problem("csr values", F, 4)))


def assert_same(found: FFM, expected: FFM) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert_close(found.state_dict()[name], tensor, rtol=0, atol=0)
    assert_close(scores(found), scores(expected), rtol=0, atol=0)


def fails(path: Path, message: str) -> Any:
    return pytest.raises(ValueError, match=rf"^\w+: {re.escape(str(path))}: {message}")


# ------------------------------------------------------------------------------------------ libffm


def libffm_bytes(model: FFM, accumulator: float = 1.0) -> bytes:
    """The binary, number by number."""
    layer = model.interaction
    K = layer.embed_dim
    out = [struct.pack("<iiib", N, F, K, model.normalize)]
    for vector in layer.weight.detach().view(N * F, K).tolist():
        vector += [0.0] * (-K % 4)
        for k in range(0, len(vector), 4):
            out += [struct.pack("<4f", *vector[k : k + 4]), struct.pack("<4f", *[accumulator] * 4)]
    return b"".join(out)


def libffm_text(model: FFM) -> str:
    layer = model.interaction
    table = layer.weight.detach().view(N, F, -1)
    lines = [f"n {N}", f"m {F}", f"k {layer.embed_dim}", f"normalization {int(model.normalize)}"]
    for j in range(N):
        for f in range(F):
            lines.append(f"w{j},{f} " + "".join(f"{x:.9g} " for x in table[j, f].tolist()))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("embed_dim", [1, 3, 4, 6, 8])
def test_libffm_binary(embed_dim: int, normalize: bool, tmp_path: Path) -> None:
    model, path = model_of(embed_dim, **LIBFFM | {"normalize": normalize}), tmp_path / "model"
    path.write_bytes(libffm_bytes(model, accumulator=3.5))
    assert_same(load_libffm(path), model)
    save_libffm(model, path)
    assert path.read_bytes() == libffm_bytes(model)
    save_libffm(model, path, accumulators=torch.full((N, F * embed_dim), 2.0))
    assert_same(load_libffm(path), model)
    accumulators = np.frombuffer(path.read_bytes(), "<f4", offset=13).reshape(N * F, -1, 2, 4)[
        :, :, 1
    ]
    assert (accumulators.reshape(N * F, -1)[:, :embed_dim] == 2).all()
    assert (accumulators.reshape(N * F, -1)[:, embed_dim:] == 1).all()


@pytest.mark.parametrize("embed_dim", [1, 3, 4, 8])
def test_libffm_binary_without_sse(embed_dim: int, tmp_path: Path) -> None:
    """Each weight stands before its own accumulator, and there is no padding: with 4 or 8 the file is as large."""
    model, path = model_of(embed_dim, **LIBFFM), tmp_path / "model"
    weights = model.interaction.weight.detach().numpy().reshape(-1)
    sums = 1 + np.random.default_rng(0).exponential(size=weights.size).astype("<f4")
    body = np.stack([weights, sums], axis=1)
    header = struct.pack("<iiib", N, F, embed_dim, 1)
    path.write_bytes(header + body.tobytes())
    assert_same(load_libffm(path), model)
    entry = (5 * F + 2) * embed_dim
    body[entry, 0] = np.nan
    path.write_bytes(header + body.tobytes())
    with fails(path, f"offset {13 + 8 * entry}: factor 0 of feature 5 for field 2 is nan"):
        load_libffm(path)


def test_large_weights_are_no_accumulators(tmp_path: Path) -> None:
    model = model_of(4, **LIBFFM)
    with torch.no_grad():
        model.interaction.weight.abs_().add_(1)
    save_libffm(model, tmp_path / "model")
    assert_same(load_libffm(tmp_path / "model"), model)


@pytest.mark.parametrize(("number", "which"), [(2.0, "both"), (0.5, "neither")])
def test_a_libffm_binary_of_no_known_order(number: float, which: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    body = np.full(N * F * 8, number, "<f4")
    path.write_bytes(struct.pack("<iiib", N, F, 4, 1) + body.tobytes())
    with fails(path, f"weights and AdaGrad's accumulators, .* told apart: {which} would do"):
        load_libffm(path)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("embed_dim", [1, 4, 6])
def test_libffm_text(embed_dim: int, normalize: bool, tmp_path: Path) -> None:
    model, path = model_of(embed_dim, **LIBFFM | {"normalize": normalize}), tmp_path / "model"
    path.write_text(libffm_text(model))
    assert_same(load_libffm(path), model)
    path.write_bytes(libffm_text(model).replace("\n", "\r\n").encode())
    assert_same(load_libffm(path), model)
    save_libffm(model, path, format="text")
    assert path.read_text().split() == libffm_text(model).split()
    assert_same(load_libffm(path), model)


@pytest.mark.parametrize("save", [save_libffm, save_xlearn_text])
def test_tables_of_many_blocks(
    save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interop, "_BLOCK_BYTES", 2 * F * 4 * 4)
    monkeypatch.setattr(interop, "_BLOCK_LINES", 3)
    model = model_of(**LIBFFM if save is save_libffm else {"within_field": True, "normalize": True})
    save(model, tmp_path / "model")
    load = load_libffm if save is save_libffm else load_xlearn_text
    assert_same(load(tmp_path / "model"), model)
    if save is save_libffm:
        save_libffm(model, tmp_path / "model", format="text")
        assert_same(load_libffm(tmp_path / "model"), model)


def test_a_model_of_any_dtype_can_be_written(tmp_path: Path) -> None:
    model = model_of(**LIBFFM).bfloat16()
    save_libffm(model, tmp_path / "model")
    assert_same(load_libffm(tmp_path / "model"), model.float())


def test_a_model_is_float32_whatever_the_default(tmp_path: Path) -> None:
    model = model_of(**LIBFFM)
    save_libffm(model, tmp_path / "model")
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(load_libffm(tmp_path / "model"), model)
    finally:
        torch.set_default_dtype(torch.float32)


def changed(data: bytes, offset: int, form: str, number: float) -> bytes:
    entry = struct.pack(form, number)
    return data[:offset] + entry + data[offset + len(entry) :]


def test_damaged_libffm_binaries(tmp_path: Path) -> None:
    path, data = tmp_path / "model", libffm_bytes(model_of(6, **LIBFFM))
    for damaged, message in (
        (b"", "0 bytes are too few"),
        (data[:12], "12 bytes are too few"),
        (
            data[:-1],
            f"it has {len(data) - 1} bytes, but a model of .* has {len(data)}; is it truncated",
        ),
        (data[:13], "it has 13 bytes"),
        (data + b"x", "it has .* is it a model of libffm"),
        (changed(data, 0, "<i", -1), r"offset 0: num_features = -1 must be positive"),
        (changed(data, 4, "<i", 0), r"offset 4: num_fields = 0 must be positive"),
        (changed(data, 8, "<i", -7), r"offset 8: embed_dim = -7 must be positive"),
        (changed(data, 0, "<i", 2**31 - 1), "it has .* num_features = 2147483647"),
        (changed(data, 12, "<B", 2), "offset 12: normalization = 2 is neither"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "offset 8: embed_dim = 0 must be positive"),
        (b'{"model": "something else"}', "offset 12: normalization = .* is it a model"),
    ):
        path.write_bytes(damaged)
        with fails(path, message):
            load_libffm(path)
    # Feature 5, field 2, factor 4: the first of its second group.
    offset = 13 + 4 * ((5 * F + 2) * 16 + 8)
    for bad in (float("nan"), float("inf")):
        path.write_bytes(changed(data, offset, "<f", bad))
        with fails(path, f"offset {offset}: factor 4 of feature 5 for field 2 is {bad}"):
            load_libffm(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_libffm(tmp_path / "nowhere")


def replaced(text: str, line: int, new: str) -> str:
    lines = text.splitlines(keepends=True)
    lines[line - 1] = new
    return "".join(lines)


def test_damaged_libffm_texts(tmp_path: Path) -> None:
    path, text = tmp_path / "model", libffm_text(model_of(**LIBFFM))
    for damaged, message in (
        (text[:20], "line 4: expected 'normalization <number>'"),
        (replaced(text, 3, "k 0\n"), "line 3: 'k 0' is no size"),
        (
            replaced(text, 2, "m 99999999\n"),
            "1... bytes are too few for 11 features, 99999999 fields",
        ),
        (replaced(text, 4, "normalization 3\n"), "line 4: normalization = 3 is neither"),
        (replaced(text, 8, "w1,1 1 2 3 4\n"), "line 8: expected 'w1,0 ', found 'w1,1 1 2 3 4'"),
        (replaced(text, 8, "w1,0 1 2 3\n"), "line 8: expected 4 finite numbers, found '1 2 3'"),
        (replaced(text, 8, "w1,0 1 2 3 x\n"), "line 8: expected 4 finite numbers"),
        (replaced(text, 8, "w1,0 1 2 3 nan\n"), "line 8: expected 4 finite numbers"),
        (replaced(text, 37, ""), "line 37: the file ends too early; is it truncated"),
        (text[:-1], "line 38: the file ends too early"),
        (text + "w11,0 1 2 3 4\n", "line 38: expected the end of the file, found 'w11,0"),
    ):
        path.write_text(damaged)
        with fails(path, message):
            load_libffm(path)


def test_what_libffm_has_no_place_for(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for options, message in (
        ({"bias": True}, "bias = True and weights in it, and libffm has no place"),
        ({"linear": True}, "linear = True and weights in it, and libffm has no place"),
        ({"within_field": False}, "within_field = False, and libffm counts"),
    ):
        with pytest.raises(ValueError, match=f"save_libffm: the model has {message}"):
            save_libffm(model_of(**LIBFFM | options), path)
    model = model_of(**LIBFFM)
    with pytest.raises(ValueError, match="save_libffm: format = 'xml' is not one of binary, text"):
        save_libffm(model, path, format="xml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"accumulators has shape \[2\], the table has \[11, 12\]"):
        save_libffm(model, path, accumulators=torch.ones(2))
    with pytest.raises(ValueError, match=r"accumulators has 0\.5; libffm's are 1 or more"):
        save_libffm(model, path, accumulators=torch.full((N, F * 4), 0.5))
    with pytest.raises(ValueError, match="text format has no place for accumulators"):
        save_libffm(model, path, accumulators=torch.ones(11, 12), format="text")
    with pytest.raises(TypeError, match="FFM with a float table, got FFM with a Quantized"):
        save_libffm(quantize(model), path)
    with pytest.raises(TypeError, match="FFM with a float table, got Linear"):
        save_model(nn.Linear(2, 2), path)  # type: ignore[arg-type]
    model.interaction.num_features = 2**31
    with pytest.raises(ValueError, match="num_features = 2147483648 does not fit the 32 bits"):
        save_libffm(model, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["save_libffm", "save_libffm text", "save_xlearn_text"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_a_reader_would_refuse(
    name: str, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interop, "_BLOCK_BYTES", 2 * F * 4 * 4)
    model = model_of(**LIBFFM)
    with torch.no_grad():
        model.interaction.weight[5, 2 * 4 + 1] = bad
    message = f"{name.split()[0]}: factor 1 of feature 5 for field 2 is {bad}"
    with pytest.raises(ValueError, match=f"^{message}"):
        SAVES[name](model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def peer(module: str, code: str, folder: Path) -> None:
    """Run a library of others: in this interpreter, or in the one that ``FFM_EXT_PEERS`` names."""
    interpreter = os.environ.get("FFM_EXT_PEERS")
    environment = {**os.environ, "USER": "someone"}  # xLearn asks who that is.
    if interpreter:
        environment.pop("PYTHONPATH", None)

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [interpreter or sys.executable, "-c", code]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    if run(f"import {module}").returncode:
        pytest.skip(f"{module} is not installed (FFM_EXT_PEERS names an interpreter that has it)")
    done = run(code)
    assert done.returncode == 0, done.stderr


# pylibffm 0.4.1 under NumPy 2 returns arrays with the stride 0: all of the memory is there, and only [0] is seen.
PYLIBFFM = """
import numpy as np, pylibffm, scipy.sparse as sp
whole = lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (4,)).copy()
X = sp.csr_matrix(np.load("X.npy"))
fields = np.array([0] * 4 + [1] * 4 + [2] * 3, np.int32)
"""


def dense_samples() -> tuple[np.ndarray, SparseBatch]:
    rng = np.random.default_rng(0)
    X = (rng.random((40, N)) * (rng.random((40, N)) < 0.5)).astype(np.float32)
    X[0] = 0
    X[0, 3] = 1
    return X, SparseBatch.from_dense(X, [0] * 4 + [1] * 4 + [2] * 3)


@pytest.mark.parametrize("embed_dim", [3, 4, 6])
def test_scores_are_those_of_libffm(embed_dim: int, tmp_path: Path) -> None:
    """Both ways: libffm scores our file, and we score the file that libffm wrote."""
    X, batch = dense_samples()
    np.save(tmp_path / "X.npy", X)
    model = model_of(embed_dim, **LIBFFM)
    save_libffm(model, tmp_path / "ours")
    code = (
        PYLIBFFM
        + f"""
ours = pylibffm.load("ours")
ours.W = whole(ours.W)
np.save("p_ours.npy", whole(ours.predict(X, fields)))
y = np.arange(len(X.toarray())) % 2
trained = pylibffm.train(X, y, fields, ".", {{"k": {embed_dim}, "nr_iters": 5}})
trained.W = whole(trained.W)
trained.save("theirs")
np.save("p_theirs.npy", whole(trained.predict(X, fields)))
"""
    )
    peer("pylibffm", code, tmp_path)
    theirs = load_libffm(tmp_path / "theirs")
    assert (theirs.interaction.embed_dim, theirs.normalize) == (embed_dim, True)
    with torch.inference_mode():
        for name, loaded in (("ours", model), ("theirs", theirs)):
            wanted = torch.from_numpy(np.load(tmp_path / f"p_{name}.npy"))
            assert_close(loaded(batch).sigmoid(), wanted, rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------------------------------ xLearn


def xlearn_text(model: FFM) -> str:
    lines = [f"bias: {model.linear.bias.item():.9g}"]
    lines += [f"i_{a}: {w:.9g}" for a, w in enumerate(model.linear.weight[:, 0].tolist())]
    table = model.interaction.weight.detach().view(N, F, -1)
    for a in range(N):
        for f in range(F):
            lines.append(f"v_{a}_{f}: " + " ".join(f"{x:.9g}" for x in table[a, f].tolist()))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("embed_dim", [1, 4, 5, 8000])
def test_xlearn_text(embed_dim: int, normalize: bool, tmp_path: Path) -> None:
    model = model_of(embed_dim, within_field=True, normalize=normalize)
    path = tmp_path / "model"
    path.write_text(xlearn_text(model))
    assert_same(load_xlearn_text(path, normalize=normalize), model)
    save_xlearn_text(model, path)
    assert path.read_text() == xlearn_text(model)


def test_xlearn_without_bias_and_linear_weights(tmp_path: Path) -> None:
    model, path = model_of(**LIBFFM), tmp_path / "model"
    save_xlearn_text(model, path)
    loaded = load_xlearn_text(path)
    assert not loaded.linear.bias and not loaded.linear.weight.any()
    assert_close(scores(loaded), scores(model))
    with pytest.raises(ValueError, match="save_xlearn_text: the model has within_field = False"):
        save_xlearn_text(model_of(), path)


def test_a_linear_part_that_xlearn_would_refuse(tmp_path: Path) -> None:
    model = model_of(within_field=True, normalize=True)
    with torch.no_grad():
        model.linear.weight[7] = float("inf")
    with pytest.raises(ValueError, match="save_xlearn_text: the linear weight of feature 7 is inf"):
        save_xlearn_text(model, tmp_path / "model")
    with torch.no_grad():
        model.linear.weight[7], model.linear.bias[...] = 0, float("nan")
    with pytest.raises(ValueError, match="save_xlearn_text: the bias is nan"):
        save_xlearn_text(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_damaged_xlearn_texts(tmp_path: Path) -> None:
    path, text = tmp_path / "model", xlearn_text(model_of(within_field=True))
    start = "".join(text.splitlines(keepends=True)[:12])
    for damaged, message in (
        ("", "line 1: expected 'bias: <number>', found ''"),
        ("\x00\x01binary", r"line 1: expected 'bias: <number>', found '\\x00"),
        ("bias: x\n", "line 1: expected"),
        (replaced(text, 3, "i_1:\n"), "line 3: expected 'i_1: <number>', found 'i_1:'"),
        (replaced(text, 3, "i_2: 5\n"), "line 3: expected 'i_1: <number>', found 'i_2: 5'"),
        (replaced(text, 3, "i_1: nan\n"), "line 3: expected 'i_1: <number>'"),
        (start, "line 13: the model has no factors"),
        ("bias: 1\nv_0_0: 1\n", "line 2: the model has no linear weights"),
        (start + "v_0: 1 2\n", "line 13: 'v_0: 1 2' belongs to a factorization machine without"),
        (replaced(text, 14, "v_0_2: 1 2 3 4\n"), "line 14: expected 'v_0_1: ', found 'v_0_2"),
        (replaced(text, 14, "v_0_1: 1 2 3\n"), "line 14: expected 4 finite numbers, found '1 2 3'"),
        (text[:-1], "the last line, 'v_10_2: .*', is no vector of factors; is it truncated"),
        (text + "more\n", "the last line, 'more', is no vector"),
        (
            "".join(text.splitlines(keepends=True)[:-3]),
            "it has 11 linear weights, but ends at 'v_9_2",
        ),
        (replaced(text, 45, ""), "line 15: expected 'v_1_0: '"),
        ("bias: 0\ni_0: 0\nv_0_0: \n", "the last line, 'v_0_0: ', has no factors"),
        (
            "bias: 0\ni_0: 0\nv_0_99999999999: 1 2\n",
            "36 bytes are too few for 1 features, 100000000000 fields and 2 factors",
        ),
    ):
        path.write_text(damaged)
        with fails(path, message):
            load_xlearn_text(path)


@pytest.mark.parametrize(("embed_dim", "normalize"), [(4, True), (3, True), (4, False)])
def test_scores_are_those_of_xlearn(embed_dim: int, normalize: bool, tmp_path: Path) -> None:
    X, batch = dense_samples()
    fields = [0] * 4 + [1] * 4 + [2] * 3
    with open(tmp_path / "data.ffm", "w") as file:
        for i, x in enumerate(X):
            entries = (f"{fields[j]}:{j}:{x[j]:.9g}" for j in np.nonzero(x)[0])
            file.write(f"{i % 2} {' '.join(entries)}\n")
    code = f"""
import xlearn
model = xlearn.create_ffm()
model.setTrain("data.ffm")
model.setTest("data.ffm")
model.setTXTModel("model.txt")
model.disableEarlyStop()
if not {normalize}:
    model.disableNorm()
model.fit({{"task": "binary", "lr": 0.2, "lambda": 0.0, "k": {embed_dim}, "epoch": 5}}, "model.bin")
model.predict("model.bin", "scores.txt")
"""
    peer("xlearn", code, tmp_path)
    model = load_xlearn_text(tmp_path / "model.txt", normalize=normalize)
    wanted = torch.from_numpy(np.loadtxt(tmp_path / "scores.txt", dtype=np.float32))
    with torch.inference_mode():
        # The text has 6 digits.
        assert_close(model(batch), wanted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ torchfm


class TorchfmModel(nn.Module):
    """The names, shapes and score of torchfm's model."""

    def __init__(self, field_dims: list[int], embed_dim: int) -> None:
        super().__init__()
        self.starts = torch.tensor([0, *field_dims[:-1]]).cumsum(0)
        self.linear = nn.Module()
        self.linear.fc = nn.Embedding(sum(field_dims), 1)
        self.linear.bias = nn.Parameter(torch.randn(1))
        self.ffm = nn.Module()
        self.ffm.embeddings = nn.ModuleList(
            nn.Embedding(sum(field_dims), embed_dim) for _ in field_dims
        )
        self.ffm.offsets = self.starts.numpy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.starts
        score = self.linear.fc(x).sum(1) + self.linear.bias
        tables = [embedding(x) for embedding in self.ffm.embeddings]
        for i in range(len(tables)):
            for j in range(i + 1, len(tables)):
                score = score + (tables[j][:, i] * tables[i][:, j]).sum(1, keepdim=True)
        return score.squeeze(1).sigmoid()


def test_torchfm() -> None:
    torch.manual_seed(0)
    dims = [4, 7, 2, 3]
    old = TorchfmModel(dims, 5)
    x = torch.stack([torch.randint(n, (20,)) for n in dims], dim=1)
    expected = old(x)
    # Ids of the whole table, where field_dims is not known.
    for model, ids in (
        (from_torchfm(old), x),
        (from_torchfm(old.state_dict(), field_dims=dims), x),
        (from_torchfm(old.state_dict()), x + old.starts),
    ):
        assert_close(model(ids).sigmoid(), expected)
        assert model.interaction.weight.data_ptr() != old.ffm.embeddings[0].weight.data_ptr()
    assert from_torchfm(old.double()).interaction.weight.dtype == torch.float64


def test_what_is_no_model_of_torchfm() -> None:
    state = TorchfmModel([4, 7], 5).state_dict()

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in state.items() if key != name}

    for bad, message in (
        ({}, "source has no linear.bias"),
        (without("linear.fc.weight"), "source has no linear.fc.weight"),
        (without("ffm.embeddings.0.weight"), "source has no ffm.embeddings.0.weight"),
        (
            {k: v for k, v in state.items() if k.startswith("linear")},
            "source has no ffm.embeddings.0.weight",
        ),
        (state | {"mlp.weight": torch.ones(1)}, "source has mlp.weight, which is no part of"),
        (
            state | {"ffm.embeddings.1.weight": torch.ones(11, 4)},
            r"ffm.embeddings.1.weight has shape \[11, 4\], expected \[11, 5\]",
        ),
        (state | {"linear.bias": torch.ones(2)}, r"linear.bias has shape \[2\], expected \[1\]"),
        (
            {name: tensor.long() for name, tensor in state.items()},
            "linear.bias is torch.int64, expected a floating-point type",
        ),
    ):
        with pytest.raises(ValueError, match=f"^from_torchfm: {message}"):
            from_torchfm(bad)
    with pytest.raises(ValueError, match="field_dims has 3 fields of 11 features, not 2 of 11"):
        from_torchfm(state, field_dims=[4, 4, 3])


@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_torchfm_file(format: str, tmp_path: Path) -> None:
    path, old = tmp_path / "model", TorchfmModel([4, 5, 2], 5)
    model = from_torchfm(old, field_dims=[4, 5, 2])
    save_torchfm(model, path, format=format)  # type: ignore[arg-type]
    state = load_file(path) if format == "safetensors" else torch.load(path, weights_only=True)
    assert state.keys() == old.state_dict().keys()
    new = TorchfmModel([4, 5, 2], 5)
    new.load_state_dict(state)
    x = torch.stack([torch.randint(n, (20,)) for n in [4, 5, 2]], dim=1)
    assert torch.equal(new(x), old(x))
    assert_same(load_torchfm(path, field_dims=[4, 5, 2]), model)
    assert load_torchfm(path).offsets is None
    with fails(path, "field_dims has 1 fields of 11 features, not 3 of 11"):
        load_torchfm(path, field_dims=[11])


def test_to_torchfm() -> None:
    model = model_of(bias=False, linear=False)
    again = from_torchfm(to_torchfm(model))
    assert torch.equal(again.interaction.weight, model.interaction.weight)
    assert again.linear.bias is not None and not again.linear.bias.any()
    assert again.linear.weight is not None and not again.linear.weight.any()
    with pytest.raises(ValueError, match=r"^to_torchfm: the model has normalize = True"):
        to_torchfm(model_of(normalize=True))
    within = model_of(within_field=True)
    with pytest.raises(ValueError, match=r"^to_torchfm: the model has within_field = True, and t"):
        to_torchfm(within)
    within.interaction.within_field = False  # as the message says
    assert_same(from_torchfm(to_torchfm(within)), within)
    with pytest.raises(ValueError, match=r"^save_torchfm: format = 'npz' is not one of pt, safe"):
        save_torchfm(model, "nowhere", format="npz")  # type: ignore[arg-type]


class Malice:
    """Unpickled without care, it leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("ran",)


def test_a_file_of_torchfm_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"linear.bias": Malice()}, "bad.pt")
    with fails(Path("bad.pt"), "torch.load.* refuses it .*mkdir.*; is it truncated, or more"):
        load_torchfm("bad.pt")
    assert not Path("ran").exists()
    torch.load("bad.pt", weights_only=False)
    assert Path("ran").exists()  # it would have


def test_what_is_no_file_of_torchfm(tmp_path: Path) -> None:
    path, good = tmp_path / "model.pt", tmp_path / "good.pt"
    save_torchfm(model_of(), good)
    whole = good.read_bytes()
    for length in [*range(4, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with fails(path, "torch.load.* refuses it .*; is it truncated"):
            load_torchfm(path)
    for held, message in (
        ([torch.ones(1)], "it holds a list, expected a state_dict"),
        ({"linear.bias": 1.0}, "it holds a float as 'linear.bias', expected tensors with names"),
        ({1: torch.ones(1)}, "it holds a Tensor as 1, expected tensors with names"),
        # Shapes that a few bytes of the file claim.
        ({"linear.bias": torch.ones(1).expand(10**13)}, "linear.bias is no dense tensor with all"),
        ({"linear.bias": torch.ones(3).to_sparse()}, "linear.bias is no dense tensor with all"),
        ({"mlp.bias": torch.ones(1)}, "source has no linear.bias"),
        (nn.Linear(2, 2), "torch.load.* refuses it .*torch.nn.modules.linear.Linear"),
    ):
        torch.save(held, path)
        with fails(path, message):
            load_torchfm(path)
    path.write_bytes(b"")
    with fails(path, "neither a file of torch.save nor a whole safetensors file"):
        load_torchfm(path)


def test_scores_are_those_of_torchfm(tmp_path: Path) -> None:
    code = """
import numpy, torch
numpy.long = numpy.int64
from torchfm.model.ffm import FieldAwareFactorizationMachineModel
torch.manual_seed(0)
model = FieldAwareFactorizationMachineModel([4, 7, 2], 4)
torch.save(model.state_dict(), "model.pt")
x = torch.stack([torch.randint(n, (20,)) for n in [4, 7, 2]], dim=1)
torch.save({"x": x, "y": model(x).detach()}, "data.pt")
"""
    peer("torchfm", code, tmp_path)
    model = load_torchfm(tmp_path / "model.pt", field_dims=[4, 7, 2])
    data = torch.load(tmp_path / "data.pt", weights_only=True)
    assert_close(model(data["x"]).sigmoid(), data["y"])


# ------------------------------------------------------------------------------------------ our own


MODELS: dict[str, Callable[[], FFM]] = {
    "sizes": lambda: FFM(3, num_features=13, num_fields=3),
    "field_dims": lambda: FFM(4, field_dims=[4, 7, 2], grad="dense", normalize=True),
    "names": lambda: FFM(4, fields={"user": 4, "item": 7, "b": 2}, within_field=True),
    "ids": lambda: FFM(4, fields={"a": range(4), "b": [10, 9, 8, 7, 6, 5, 4], "c": [12, 11]}),
    "bare": lambda: FFM(4, field_dims=[4, 7, 2], bias=False, linear=False),
    "half": lambda: FFM(4, field_dims=[4, 7, 2], bias=False).bfloat16(),
    "double": lambda: FFM(4, field_dims=[4, 7, 2], linear=False).double(),
    "one field": lambda: FFM(4, field_dims=[13]),
}


@pytest.mark.parametrize("name", MODELS)
def test_our_own_file(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
        assert loaded.state_dict()[key].dtype == tensor.dtype
    for attribute in ("field_names", "normalize"):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    for attribute in ("within_field", "grad", "embed_dim", "num_fields", "num_features"):
        assert getattr(loaded.interaction, attribute) == getattr(model.interaction, attribute)
    for attribute in ("feature_fields", "offsets"):
        a, b = getattr(loaded, attribute), getattr(model, attribute)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    x = torch.zeros(2, model.interaction.num_fields, dtype=torch.int64)
    assert torch.equal(loaded(x), model(x))
    loaded(x).sum().backward()
    grad = loaded.interaction.weight.grad
    assert grad is not None and grad.is_sparse == (model.interaction.grad == "sparse")


def test_a_model_left_in_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FFM(4, num_features=50, num_fields=3, dtype=torch.bfloat16)
    path = tmp_path / "model"
    interop.save_model(model, path)
    before = path.read_bytes()
    ids = torch.randint(50, (7, 3))
    loaded = interop.load_model(path, mmap=True)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    with torch.inference_mode():
        assert torch.equal(loaded(ids), model(ids))
    # It is changed in memory alone, and outlives the file.
    with torch.no_grad():
        loaded.interaction.weight.mul_(2)
        assert torch.equal(loaded.interaction.weight, model.interaction.weight * 2)
    assert path.read_bytes() == before
    path.unlink()
    loaded(ids)


def test_damaged_files_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model(FFM(4, field_dims=[4, 7, 2]), path)
    data, tensors = path.read_bytes(), load_file(path)
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with fails(path, "not a whole safetensors file"):
            load_model(path)
    arguments = interop.model_arguments("here", FFM(4, field_dims=[4, 7, 2]))
    good = {"format": "ffm_ext.FFM", "version": "1"}
    names = ["a", "b"]
    for metadata, message in (
        ({}, "its metadata has format = None, expected 'ffm_ext.FFM'"),
        (good | {"version": "9"}, "its metadata has version = '9', expected '1'"),
        (good, "its metadata describes no model .KeyError"),
        (good | {"arguments": "{"}, "its metadata describes no model .JSONDecodeError"),
        (good | {"arguments": "[]"}, "its metadata describes no model .TypeError"),
        (with_arguments(good, arguments | {"num_features": 10**15}), "it holds tensors of shapes"),
        (with_arguments(good, arguments | {"bias": False}), "it holds tensors of shapes"),
        (
            with_arguments(good, arguments | {"field_dims": [4, 7]}),
            "its metadata describes no model",
        ),
        (
            with_arguments(good, arguments | {"field_names": names}),
            "its metadata describes no model",
        ),
        (with_arguments(good, arguments | {"color": 1}), "its metadata describes no model"),
    ):
        save_file(tensors, path, metadata)
        with fails(path, message):
            load_model(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        load_model(tmp_path)


def with_arguments(metadata: dict[str, str], arguments: dict[str, Any]) -> dict[str, str]:
    return metadata | {"arguments": json.dumps(arguments)}


def test_models_of_numbers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    model = model_of()
    model.feature_fields = torch.arange(N) % F
    save_model(model, path)
    again = load_model(path)
    assert torch.equal(again.feature_fields, model.feature_fields)  # type: ignore[arg-type]
    again.to("meta").to_empty(device="cpu")
    assert torch.equal(again.feature_fields, model.feature_fields)  # type: ignore[arg-type]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, dtype in (("interaction.weight", torch.int32), ("feature_fields", torch.float32)):
        save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata)
        with fails(path, f"{name} is {dtype}"):
            load_model(path)


def test_a_parametrized_model_is_saved_as_what_it_computes(tmp_path: Path) -> None:
    model = model_of()
    model.interaction.grad = "dense"
    nn.utils.parametrizations.weight_norm(model.interaction, "weight")
    nn.init.constant_(model.interaction.parametrizations.weight.original0, 2)
    save_model(model, tmp_path / "model")
    assert_close(scores(load_model(tmp_path / "model")), scores(model))


def test_the_loss_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for loss in ("logistic", "squared", None):
        save_model(model_of(), path, loss=loss)  # type: ignore[arg-type]
        assert model_loss(path) == loss
        assert_same(load_model(path), model_of())
    with pytest.raises(
        ValueError, match=r"^save_model: loss = 'hinge' is not one of logistic, squ"
    ):
        save_model(model_of(), path, loss="hinge")  # type: ignore[arg-type]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"loss": "hinge"})
    with fails(path, "its metadata has loss = 'hinge', expected one of logistic, squared"):
        model_loss(path)
    path.write_bytes(b"no model")
    with fails(path, "not a whole safetensors file"):
        model_loss(path)


# ------------------------------------------------------------------------------------------ files


SAVES: dict[str, Callable[[FFM, Path], None]] = {
    "save_model": save_model,
    "save_libffm": save_libffm,
    "save_libffm text": lambda model, path: save_libffm(model, path, format="text"),
    "save_xlearn_text": save_xlearn_text,
    "save_torchfm": lambda model, path: save_torchfm(model, path),
    "save_torchfm safetensors": lambda model, path: save_torchfm(model, path, format="safetensors"),
    "Trainer.save": lambda model, path: Trainer(model).save(path),
}


def savable(name: str) -> FFM:
    """What the format has a place for."""
    return model_of(**LIBFFM | {"within_field": "torchfm" not in name, "normalize": False})


@pytest.mark.parametrize("name", SAVES)
def test_others_may_read_a_new_file_where_umask_lets_them(name: str, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        SAVES[name](savable(name), tmp_path / "model")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", SAVES)
def test_a_full_disk_leaves_the_old_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        SAVES[name](savable(name), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", SAVES)
def test_a_disk_that_fills_up_while_writing(name: str, tmp_path: Path) -> None:
    """Really: a file of this process may not grow past 64 bytes."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from test_interop import SAVES, savable
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = savable({name!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    SAVES[{name!r}](model, Path("model"))
except OSError as error:
    print("OSError")
"""
    (tmp_path / "model").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "OSError\n", done.stderr
    assert (tmp_path / "model").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_loaded_model_is_not_drawn_first(tmp_path: Path) -> None:
    """A draw costs seconds for a large table, and moves the random numbers of whoever loads a model."""
    torch.manual_seed(0)
    interop.save_model(FFM(3, num_features=20, num_fields=4), tmp_path / "model")
    before = torch.get_rng_state()
    interop.load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "xlearn",
            "bias: 0\ni_0: 1\ni_1: 2\nv_0_0: 1 2 3\nv_0_1: 4\nv_1_0: 5 6\nv_1_1: 7 8\n",
            "line 4: expected 2",
        ),
        ("xlearn", "bias: 0\ni_0: 1\nv_0_0: 1_0 1\n", "line 3: expected 2 finite"),
        ("xlearn", "bias: 1_0\ni_0: 1\nv_0_0: 1 1\n", "line 1: expected 'bias: <number>'"),
        ("xlearn", f"bias: 0\ni_0: 1\nv_0_{'9' * 5000}: 1 1\n", "is no vector of factors"),
        (
            "libffm",
            "n 1\nm 2\nk 4\nnormalization 1\nw0,0 0 1 2 3 77\nw0,1 4 5 6\n",
            "line 5: expected 4",
        ),
        ("libffm", f"n 1\nm 2\nk {'9' * 5000}\nnormalization 1\n", "line 3: expected 'k <number>'"),
    ],
)
def test_every_line_of_a_text_has_its_numbers(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.txt"
    path.write_text(text)
    load = {"xlearn": interop.load_xlearn_text, "libffm": interop.load_libffm}[name]
    with pytest.raises(ValueError, match=f"model.txt: .*{message}"):
        load(path)


def test_a_model_that_could_not_be_read_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.st"
    model = FFM(4, num_features=7, num_fields=2)
    model.feature_fields = (torch.arange(14) // 8)[::2]
    model.field_names = ["a"]
    with pytest.raises(ValueError, match="1 field_names for 2 fields"):
        interop.save_model(model, path)
    model.field_names = ["a", "b"]
    model.interaction.within_field = np.bool_(True)  # type: ignore[assignment]
    nn.utils.parametrizations.orthogonal(model.interaction, "weight")
    interop.save_model(model, path)
    loaded = interop.load_model(path)
    assert loaded.interaction.within_field is True
    assert_close(loaded.interaction.weight.detach(), model.interaction.weight.detach())
    assert loaded.feature_fields is not None
    assert loaded.feature_fields.tolist() == model.feature_fields.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "meta"}, "'device' is no argument that is kept"),
        ({"normalize": "no"}, "normalize = 'no' is neither true nor false"),
        ({"within_field": 1}, "within_field = 1 is neither true nor false"),
        (None, "RecursionError"),
    ],
)
def test_metadata_describes_what_is_kept(
    change: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.st"
    interop.save_model(FFM(2, field_dims=[2, 2]), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    arguments = json.loads(metadata["arguments"])
    metadata["arguments"] = "[" * 200_000 if change is None else json.dumps({**arguments, **change})
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match=f"model.st: its metadata describes no model .*{message}"):
        interop.load_model(path)


def test_tensors_without_elements_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    state = interop.to_torchfm(FFM(4, field_dims=[3, 4]))
    torch.save({name: tensor.to("meta") for name, tensor in state.items()}, path)
    with pytest.raises(ValueError, match=r"c.pt: .* is no dense tensor with all its elements"):
        interop.load_torchfm(path)


@pytest.mark.parametrize(
    ("accumulators", "error"),
    [
        (torch.full((2, 6), math.inf), ValueError),
        (torch.full((2, 6), 1e39, dtype=torch.float64), ValueError),
        (np.ones((2, 6)), TypeError),
    ],
    ids=["inf", "too large", "array"],
)
def test_accumulators_are_finite(accumulators: Any, error: type[Exception], tmp_path: Path) -> None:
    model = FFM(3, num_features=2, num_fields=2, bias=False, linear=False, within_field=True)
    with pytest.raises(error, match="save_libffm: accumulators"):
        interop.save_libffm(model, tmp_path / "m", accumulators=accumulators)
    interop.save_libffm(model, tmp_path / "m", accumulators=torch.ones(2, 6, requires_grad=True))
