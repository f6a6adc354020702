# SPDX-License-Identifier: MIT
"""int8 tables: what is lost when they are made, and the interaction on them against the float one."""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import (
    FORMS,
    OUTPUTS,
    Expected,
    Problem,
    Result,
    assert_accurate,
    batch_of,
    grad_output,
    make_problem,
    num_threads,
    with_entry,
)
from sklearn.metrics import roc_auc_score

import ffm_ext
from ffm_ext.functional import ffm_interaction

ops = torch.ops.ffm_ext

SHAPES = list(itertools.product((1, 3, 4, 7, 17, 39), (1, 3, 4, 5, 8, 16, 24)))  # F, K

within = pytest.mark.parametrize("within_field", [False, True], ids=["", "within"])
outputs = pytest.mark.parametrize("output", OUTPUTS)
forms = pytest.mark.parametrize("form", FORMS)


def make_quantized(form: str, F: int, K: int, batch_size: int = 7) -> tuple[Problem, torch.Tensor]:
    """A problem whose float32 table is exactly what the packed one beside it says."""
    problem = make_problem(form, F, K, batch_size=batch_size)
    packed = ops.ffm_quantize(problem.weight)
    return replace(problem, weight=ops.ffm_dequantize(packed, F, K)), packed


def forward(
    problem: Problem, packed: torch.Tensor, output: str = "sum", within_field: bool = False
) -> torch.Tensor:
    sizes = problem.num_fields, problem.embed_dim
    return ops.ffm_forward_int8(packed, *problem.args[1:], *sizes, output, within_field)


def row_bytes(F: int, K: int) -> int:
    return ops.ffm_quantize(torch.zeros(1, F, K)).shape[1]


# ---- The table.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding(dtype: torch.dtype, device: torch.device) -> None:
    """Within half a scale of each element; the scale is the largest / 127, rounded up to bfloat16."""
    for F, K in SHAPES:
        weight = make_problem("one-hot", F, K, num_features=30, dtype=dtype).weight.float()
        # Vectors of very different sizes, one of zeros, one with a single element that is not.
        if dtype != torch.float16:
            weight *= torch.logspace(-30, 30, 30).to(device)[:, None, None]
        weight[3] = 0
        weight[4, :, 1:] = 0
        weight = weight.to(dtype).float()
        found = ops.ffm_dequantize(ops.ffm_quantize(weight.to(dtype)), F, K)
        largest = weight.abs().amax(2, keepdim=True)
        bound = largest / 127 / 2 * (1 + 2**-7 + 1e-6)
        assert found.dtype == torch.float32
        assert ((found - weight).abs() <= bound).all()
        assert (found[weight == 0] == 0).all()
        # Nothing is clipped: the largest of a vector keeps its relative accuracy, and its sign.
        assert (found.abs().amax(2, keepdim=True) >= largest * (1 - 1 / 250)).all()


def test_extremes() -> None:
    """The largest numbers of float32 do not overflow; scales end where float32 loses accuracy, at 2^-126."""
    most, least = torch.finfo(torch.float32).max, 2.0**-149
    weight = torch.tensor([[[most, -most]], [[least, -least]], [[1e-37, -1e-38]]])
    found = ops.ffm_dequantize(ops.ffm_quantize(weight), 1, 2)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], weight[0], rtol=0.01, atol=0)
    assert (found[1] == 0).all()
    torch.testing.assert_close(found[2], weight[2], rtol=0, atol=2**-127)


def test_quantized_numbers_are_exact() -> None:
    """A table of multiples of a bfloat16, with a 127 in every vector, comes back as it was."""
    q = torch.randint(-127, 128, (50, 7, 5), generator=torch.Generator().manual_seed(0)).float()
    q[..., 2] = 127
    weight = q * 2.0 ** torch.randint(-9, 9, (50, 7, 1))
    assert torch.equal(ops.ffm_dequantize(ops.ffm_quantize(weight), 7, 5), weight)


def test_row_size() -> None:
    """Two bytes more than its numbers a vector, and less than one cache line more a row: the fewest lines touched."""
    for F, K in SHAPES:
        size, padded = F * (2 + {1: 4, 3: 4, 5: 8, 24: 32}.get(K, K)), row_bytes(F, K)
        assert size <= padded < size + 64
        lines = [(begin % 64 + size - 1) // 64 + 1 for begin in range(0, 64 * padded, padded)]
        assert max(lines) == -(-size // 64)
    assert row_bytes(39, 4) == 256
    assert 39 * 16 * 4 / row_bytes(39, 16) > 3.5


def test_same_bytes_for_any_number_of_threads() -> None:
    weight = torch.randn(5000, 7, 5, generator=torch.Generator().manual_seed(0))
    wanted = ops.ffm_quantize(weight)
    for threads in (2, 3, 5):
        with num_threads(threads):
            assert torch.equal(ops.ffm_quantize(weight), wanted)
            table = ops.ffm_dequantize(wanted, 7, 5)
    assert torch.equal(table, ops.ffm_dequantize(wanted, 7, 5))


# ---- The interaction.


@within
@outputs
@forms
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_matches_float(
    form: str, ids: torch.dtype, output: str, within_field: bool, device: torch.device
) -> None:
    """As accurate as plain float32 on the table that the packed one stands for."""
    modes = {"output": output, "within_field": within_field}
    for F, K in SHAPES:
        problem, packed = make_quantized(form, F, K)
        expected = Expected.of(problem, grad_output(problem, output, within_field), **modes)
        found = forward(problem.to(ids=ids), packed, **modes)
        check_output(expected, found, f"F={F} K={K}")


def check_output(expected: Expected, found: torch.Tensor, note: str) -> None:
    wanted: list[Result] = [expected.truth, expected.plain, expected.terms]
    assert_accurate(found.cpu(), *(result.output for result in wanted), note=note)


@within
@outputs
@forms
def test_threads(form: str, output: str, within_field: bool) -> None:
    """The same bits, whichever blocks the samples come in."""
    modes = {"output": output, "within_field": within_field}
    for F, K in [(39, 4), (7, 8), (5, 16), (9, 3)]:
        batch_size = 6 * 2**15 // (F * F * K)
        problem, packed = make_quantized(form, F, K, batch_size)
        wanted = forward(problem, packed, **modes)
        for threads in (2, 3, 5):
            with num_threads(threads):
                assert torch.equal(forward(problem, packed, **modes), wanted)
        plain = ffm_interaction(*problem.args, **modes)
        torch.testing.assert_close(wanted, plain, rtol=1e-4, atol=1e-3)


def test_many_entries_of_one_field(device: torch.device) -> None:
    problem, packed = make_quantized("csr values", 5, 4)
    repeats = 500
    long = replace(
        problem,
        indices=problem.indices.repeat(repeats),
        fields=problem.fields.repeat(repeats),
        values=problem.values.repeat(repeats),
        offsets=torch.tensor([0, problem.indices.numel() * repeats], device=device),
    )
    for output, within_field in itertools.product(OUTPUTS, (False, True)):
        modes = {"output": output, "within_field": within_field}
        wanted = ffm_interaction(long.weight.double(), *long.to(torch.float64).args[1:], **modes)
        found = forward(long, packed, **modes).double()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_nothing_to_do() -> None:
    for problem, packed in (make_quantized("one-hot", 5, 4), make_quantized("csr", 5, 4)):
        if problem.offsets is None:
            empty = replace(problem, indices=problem.indices[:0])
        else:
            none = problem.indices[:0]
            empty = replace(problem, indices=none, fields=none, offsets=torch.zeros(1).long())
        assert forward(empty, packed).shape == (0,)
        assert forward(empty, packed, "dot").shape == (0, 10)
    empty = replace(empty, offsets=torch.zeros(4).long())
    assert torch.equal(forward(empty, packed), torch.zeros(3))
    assert torch.equal(forward(empty, packed, "dot", True), torch.zeros(3, 15))


# ---- Bad input.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_table_is_not_finite(bad: float, dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.zeros(100, 7, 5, dtype=dtype, device=device)
    weight[40, 2, 3] = weight[70, 0, 0] = bad
    text = re.escape(f"ffm_quantize: weight[40, 2, 3] = {bad}".replace("nan", "")) + "(-?nan)?"
    with pytest.raises(ValueError, match=text):
        ops.ffm_quantize(weight)


def test_table_is_too_large_for_float32(device: torch.device) -> None:
    weight = torch.zeros(3, 2, 4, dtype=torch.float64, device=device)
    weight[1, 1, 2] = 1e39
    text = re.escape("ffm_quantize: weight[1, 1, 2] = 1e+39 is not finite in float32")
    with pytest.raises(ValueError, match=text):
        ops.ffm_quantize(weight)


def test_bad_tables(device: torch.device) -> None:
    problem, packed = make_quantized("one-hot values", 7, 4)
    good = {"packed": packed, "indices": problem.indices, "values": problem.values}
    for text, change in {
        "packed must be [N, R], got shape [11, 7, 4]": {"packed": problem.weight},
        "packed must be uint8, got float32": {"packed": problem.weight[:, 0]},
        "packed has shape [11, 42], which are not the rows of num_fields = 7 and embed_dim = 4": {
            "packed": packed[:, :42]
        },
        "packed has shape [11, 64], which are not the rows of num_fields = 7 and embed_dim = 16": {
            "embed_dim": 16
        },
        "num_fields = 0 must be positive": {"num_fields": 0},
        "embed_dim = -4 must be positive": {"embed_dim": -4},
        "packed is not contiguous (strides 128, 1)": {
            "packed": torch.cat([packed, packed], 1)[:, : packed.shape[1]]
        },
        "indices has shape [7, 6], but packed has 7 fields": {"indices": problem.indices[:, :6]},
        "values is float64, packed takes float32": {"values": problem.values.double()},
        "indices[0, 0] = 11 is out of range for a table of 11 features": {
            "indices": with_entry(problem, "indices", 0, 11).indices
        },
        "values[0, 3] = inf is not finite": {
            "values": with_entry(problem, "values", 3, float("inf")).values
        },
        "output = 'mean' is not one of sum, dot, hadamard": {"output": "mean"},
    }.items():
        call = {"num_fields": 7, "embed_dim": 4, "output": "sum", **good, **change}
        with pytest.raises((ValueError, IndexError), match=re.escape(f"ffm_forward_int8: {text}")):
            ops.ffm_forward_int8(**call, fields=None, offsets=None, within_field=False)
    with pytest.raises(ValueError, match="ffm_dequantize: packed has shape"):
        ops.ffm_dequantize(packed, 2**40, 2**40)
    with pytest.raises(ValueError, match=r"ffm_quantize: weight must be \[N, F, K\]"):
        ops.ffm_quantize(problem.weight[0])


# ---- Modules.


@forms
@outputs
@within
def test_module(form: str, output: str, within_field: bool, device: torch.device) -> None:
    problem = make_problem(form, 7, 4)
    sizes = 11, 7, 4
    layer = ffm_ext.FFMInteraction(*sizes, output=output, within_field=within_field, device=device)
    quantized = ffm_ext.QuantizedFFMInteraction.from_float(layer.eval())
    assert not quantized.training
    assert not list(quantized.parameters())
    with torch.no_grad():
        layer.weight.copy_(quantized.dequantize())
    batch = batch_of(problem)
    values = problem.values if isinstance(batch, torch.Tensor) else None
    found = quantized(batch, values)
    torch.testing.assert_close(found, layer(batch, values).detach(), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert f"output='{output}', within_field={within_field}" in repr(quantized)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_module_of_any_dtype(dtype: torch.dtype) -> None:
    layer = ffm_ext.FFMInteraction(11, 7, 4, dtype=dtype)
    quantized = ffm_ext.QuantizedFFMInteraction.from_float(layer)
    ids = make_problem("one-hot", 7, 4).indices
    assert quantized(ids, torch.ones(ids.shape, dtype=dtype)).dtype == torch.float32
    torch.testing.assert_close(quantized(ids), layer(ids).detach().float(), rtol=0.05, atol=0.02)


def test_state_dict(tmp_path: Path) -> None:
    ids = make_problem("one-hot", 7, 4).indices
    quantized = ffm_ext.QuantizedFFMInteraction.from_float(ffm_ext.FFMInteraction(11, 7, 4))
    again = ffm_ext.QuantizedFFMInteraction(11, 7, 4)
    assert torch.equal(again(ids), torch.zeros(len(ids)))
    torch.save(quantized.state_dict(), tmp_path / "table.pt")
    again.load_state_dict(torch.load(tmp_path / "table.pt", weights_only=True))
    for same in (again, copy.deepcopy(quantized), quantized.half()):
        assert torch.equal(same(ids), quantized(ids))
    with pytest.raises(
        RuntimeError, match="what was saved has 7 fields of 4 factors, the layer 7 of 8"
    ):
        ffm_ext.QuantizedFFMInteraction(11, 7, 8).load_state_dict(again.state_dict())


def test_no_gradient() -> None:
    quantized = ffm_ext.QuantizedFFMInteraction.from_float(ffm_ext.FFMInteraction(11, 7, 4))
    problem = make_problem("one-hot values", 7, 4)
    assert problem.values is not None
    values = problem.values.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="values require a gradient, and int8 tables are for"):
        quantized(problem.indices, values)
    wanted = quantized(problem.indices, problem.values)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(quantized(problem.indices, values), wanted)


def test_bad_sizes_and_modes() -> None:
    with pytest.raises(ValueError, match="QuantizedFFMInteraction: embed_dim = 0 must be positive"):
        ffm_ext.QuantizedFFMInteraction(11, 7, 0)
    assert type(ffm_ext.QuantizedFFMInteraction(np.int64(11), 7, 4).num_features) is int
    with pytest.raises(ValueError, match="QuantizedFFMInteraction: output = 'mean' is not one of"):
        ffm_ext.QuantizedFFMInteraction(11, 7, 4, output="mean")  # type: ignore[arg-type]
    layer = ffm_ext.FFMInteraction(11, 7, 4)
    with torch.no_grad():
        layer.weight[3, 9] = float("nan")
    with pytest.raises(ValueError, match=r"ffm_quantize: weight\[3, 2, 1\] = -?nan is not finite"):
        ffm_ext.quantize(layer)


def test_quantize_model() -> None:
    model = ffm_ext.FFM(4, field_dims=[5, 6, 7])
    with torch.no_grad():
        model.linear.weight.normal_()
    state = copy.deepcopy(model.state_dict())
    ids = torch.tensor([[0, 1, 2], [4, 5, 6]])
    small = ffm_ext.quantize(model.eval())
    assert isinstance(small, ffm_ext.FFM) and not small.training
    assert isinstance(small.interaction, ffm_ext.QuantizedFFMInteraction)
    assert isinstance(model.interaction, ffm_ext.FFMInteraction)
    torch.testing.assert_close(small(ids), model(ids), rtol=0.02, atol=2e-3)

    # A copy: neither can change the other.
    with torch.no_grad():
        small.linear.weight.zero_()
        small.interaction.packed.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_layers_that_share_a_table_go_on_sharing_it() -> None:
    layers = torch.nn.ModuleList(
        [ffm_ext.FFMInteraction(9, 3, 4), ffm_ext.FFMInteraction(9, 3, 4, output="dot")]
    )
    layers[1].weight = layers[0].weight
    alone = ffm_ext.FFMInteraction(9, 3, 4)
    small = ffm_ext.quantize(torch.nn.ModuleList([*layers, alone]))
    x = torch.randint(9, (5, 3))
    assert small[0].packed.data_ptr() == small[1].packed.data_ptr() != small[2].packed.data_ptr()
    torch.testing.assert_close(small[1](x).sum(1), small[0](x))


def test_parametrized_layers_keep_their_own_tables() -> None:
    layers = torch.nn.ModuleList(ffm_ext.FFMInteraction(9, 3, 4, grad="dense") for _ in range(8))
    for layer in layers:
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    for layer, small in zip(layers, ffm_ext.quantize(layers), strict=True):
        assert torch.equal(small.packed, ffm_ext.quantize(layer).packed)


def test_quantize_finds_every_layer() -> None:
    shared = ffm_ext.FFMInteraction(11, 7, 4)
    old = ffm_ext.FieldAwareFactorizationMachine([5, 6], 3)
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(shared), "b": shared, "c": old})
    small = ffm_ext.quantize(model)
    kinds = [type(m) for m in small.modules()]
    assert ffm_ext.FFMInteraction not in kinds
    assert kinds.count(ffm_ext.QuantizedFFMInteraction) == 2
    assert small["a"][0] is small["b"]
    assert small["c"](torch.tensor([[4, 5]])).shape == (1, 1, 3)
    assert isinstance(ffm_ext.quantize(shared), ffm_ext.QuantizedFFMInteraction)
    with pytest.raises(ValueError, match="quantize: FM has no FFMInteraction"):
        ffm_ext.quantize(ffm_ext.FM(11, 4))


def test_compile() -> None:
    problem = make_problem("csr values", 7, 4)
    quantized = ffm_ext.QuantizedFFMInteraction.from_float(ffm_ext.FFMInteraction(11, 7, 4))

    def run(*lists: torch.Tensor) -> torch.Tensor:
        return quantized(ffm_ext.SparseBatch(*lists))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    lists = problem.args[1:]
    assert torch.equal(compiled(*lists), run(*lists))


# ---- What a model loses.


def train(
    model: torch.nn.Module,
    data: torch.Tensor | ffm_ext.SparseBatch,
    target: torch.Tensor,
    loss: torch.nn.Module,
    epochs: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(epochs):
        for rows in torch.randperm(len(target), generator=generator).split(1024):
            optimizer.zero_grad()
            loss(model(data[rows]), target[rows]).backward()
            optimizer.step()


@pytest.mark.parametrize("embed_dim", [4, 8, 16])
def test_adult_loses_no_auc(embed_dim: int) -> None:
    adult = ffm_ext.datasets.load_adult()
    torch.manual_seed(0)
    model = ffm_ext.FFM(
        embed_dim, num_features=adult.num_features, num_fields=adult.num_fields, grad="dense"
    )
    train(model, *adult.split("train"), torch.nn.BCEWithLogitsLoss(), epochs=2)
    data, target = adult.split("test")
    with torch.inference_mode():
        auc, small_auc = (roc_auc_score(target, m(data)) for m in (model, ffm_ext.quantize(model)))
    assert auc > 0.9
    assert small_auc > auc * (1 - 1e-3)


@pytest.mark.parametrize("embed_dim", [4, 8, 16])
def test_movielens_loses_no_rmse(embed_dim: int) -> None:
    try:
        movielens = ffm_ext.datasets.fetch_movielens_100k(download_if_missing=False)
    except FileNotFoundError:
        pytest.skip("FFM_EXT_DATA does not name a folder with MovieLens 100K")
    torch.manual_seed(0)
    model = ffm_ext.FFM(
        embed_dim,
        num_features=movielens.num_features,
        num_fields=movielens.num_fields,
        grad="dense",
    )
    data, target = movielens.split("train")
    mean = target.mean()
    train(model, data, target - mean, torch.nn.MSELoss(), epochs=1)
    data, target = movielens.split("test")
    with torch.inference_mode():
        rmse, small_rmse = (
            ((m(data) + mean - target) ** 2).mean().sqrt().item()
            for m in (model, ffm_ext.quantize(model))
        )
    assert rmse < 1.05  # that of the mean is 1.12
    assert small_rmse < rmse * (1 + 1e-3)
