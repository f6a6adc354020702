# SPDX-License-Identifier: MIT
"""What goes wrong in libffm and xLearn, each as a test that it does not here.

libffm 1.2x: a token without its colon, CRLF or a missing file ends the process; a line longer than its buffer becomes
two samples; a negative id is read out of bounds; a sample of zeros has the norm NaN; a binary copy of the data stays
in the current folder and is used again for a file that has changed. xLearn 0.40: a model past 2^32 numbers ends the
process; runs cannot be repeated; an error does not say where.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ffm_ext import FFM, SparseBatch, cli, optim, reference
from ffm_ext.data import read_libffm
from ffm_ext.interop import load_model

TEXT = "".join(f"{i % 2} 0:{i % 7}:1 1:{7 + i % 5}:0.5\n" for i in range(60))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tr.ffm").write_text(TEXT)
    return tmp_path


def run(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


@pytest.mark.parametrize(
    ("line", "column", "what"),
    [
        ("1 0:3 1:8:1", 6, "':' expected after the feature, got a space"),
        ("1 0 1:8:1", 4, "':' expected after the field, got a space"),
        ("1 0:3:1 1:-8:1", 11, "is negative"),
        ("1 -1:3:1", 3, "is negative"),
    ],
)
def test_a_broken_token_is_named(
    line: str, column: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """libffm: a missing colon crashes, a negative id reads out of bounds; xLearn does not say where (its issue 157)."""
    Path("bad.ffm").write_text(TEXT + line + "\n")
    for command in (["train", "bad.ffm", "m"], ["check", "bad.ffm"]):
        assert run(*command) == 1
        captured = capsys.readouterr()
        assert f"bad.ffm:61:{column}: " in captured.out + captured.err
        assert what in captured.out + captured.err
    assert not Path("m").exists()
    assert run("train", "--lenient", "-t", 1, "bad.ffm", "m") == 0
    assert "bad.ffm: 1 broken lines skipped" in capsys.readouterr().err


def test_crlf() -> None:
    Path("crlf.ffm").write_bytes(TEXT.replace("\n", "\r\n").encode())
    one, other = (read_libffm(name).shards[0] for name in ("tr.ffm", "crlf.ffm"))
    for name in ("indices", "fields", "values", "offsets"):
        assert torch.equal(getattr(one.batch, name), getattr(other.batch, name))
    assert torch.equal(one.labels, other.labels)


def test_a_line_longer_than_any_buffer() -> None:
    """libffm's is 1,000,000 bytes: what comes after them is a sample of its own."""
    n = 150_000
    Path("long.ffm").write_text("1 " + " ".join(f"{e % 3}:{e}:0.25" for e in range(n)) + "\n")
    assert Path("long.ffm").stat().st_size > 1_900_000
    data = read_libffm("long.ffm")
    assert (len(data), data.nnz) == (1, n)
    assert data.shards[0].batch.indices[-1] == n - 1


def test_a_sample_of_zeros() -> None:
    """Its norm is 0, and libffm divides by it."""
    Path("zero.ffm").write_text(TEXT + "1 0:1:0 1:8:0\n0 \n")
    assert run("train", "-t", 3, "--json", "zero.ffm", "m") == 0
    assert all(bool(p.isfinite().all()) for p in load_model("m").parameters())
    assert run("predict", "zero.ffm", "m", "out") == 0
    assert np.loadtxt("out")[-2:].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("command", ["train", "predict", "check", "convert"])
def test_a_missing_file(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "-t", 1, "tr.ffm", "m") == 0
    more = {"predict": ["m", "out"], "train": ["m2"], "convert": ["x", "--to", "dataset"]}
    assert run(command, "missing.ffm", *more.get(command, [])) == 1
    assert "missing.ffm" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["m", "tr.ffm"]


def test_nothing_is_left_behind_and_nothing_old_is_used() -> None:
    assert run("train", "-t", 2, "tr.ffm", "m") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["m", "tr.ffm"]
    first = load_model("m").interaction.weight.detach().clone()
    # A file of the same name, size and number of lines, with other labels.
    lines = [f"{1 - int(line[0])}{line[1:]}" for line in TEXT.splitlines()]
    Path("tr.ffm").write_text("\n".join(lines) + "\n")
    assert run("train", "-t", 2, "tr.ffm", "m") == 0
    assert not torch.equal(load_model("m").interaction.weight, first)


def test_runs_can_be_repeated() -> None:
    """xLearn's issues 237, 340, 245."""
    for mode in (["-s", 1], ["-s", 2, "--mode", "deterministic"]):
        made = []
        for name in ("a", "b"):
            assert run("train", *mode, "-t", 3, "tr.ffm", name) == 0
            made.append(load_model(Path(name)).interaction.weight)
        assert torch.equal(*made)


def test_a_table_past_two_to_the_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """xLearn's issue 184. The table's memory is touched only where rows are: most of its 8.6 GB stay promises."""
    F = K = 64
    N = 2**32 // (F * K) + 9
    try:
        weight = torch.empty(N, F * K, dtype=torch.bfloat16)
    except RuntimeError as error:  # a system that promises no more than it has
        pytest.skip(f"no address space for 8.6 GB: {error}")
    with torch.device("meta"):
        layer = FFM(K, num_features=N, num_fields=F, bias=False, linear=False).interaction
    layer.weight = torch.nn.Parameter(weight)
    rows = torch.tensor([0, 5, N - 8, N - 1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight[rows] = torch.randn(4, F * K, generator=generator).bfloat16() / 8
    small = weight[rows].float().view(4, F, K)

    def batch(ids: torch.Tensor, dtype: torch.dtype) -> SparseBatch:
        fields, values = (
            torch.tensor([0, 7, 9, 63]),
            torch.tensor([1.0, 0.5, -1.0, 2.0], dtype=dtype),
        )
        return SparseBatch(ids, fields, values, torch.tensor([0, 4]))

    here = batch(rows, torch.bfloat16)
    alike = batch(torch.arange(4), torch.float32)
    lists = (alike.indices, alike.fields, alike.values, alike.offsets)
    small.requires_grad_()
    expected = reference.ffm_interaction(small, *lists, grad="dense")
    found = layer(here)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.sum().backward()
    expected.sum().backward()
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.coalesce()
    assert torch.equal(gradient.indices()[0], rows)
    assert small.grad is not None
    torch.testing.assert_close(
        gradient.values().float().view(4, F, K), small.grad, rtol=0.02, atol=0.02
    )
    layer.weight.grad = None
    before = weight[rows].float()
    layer.fuse_optimizer(optim.SGD(lr=0.5))
    layer(here).sum().backward()
    moved = before.view(4, F, K) - 0.5 * small.grad
    torch.testing.assert_close(weight[rows].float().view(4, F, K), moved, rtol=0.02, atol=0.02)
