# SPDX-License-Identifier: MIT
"""The modules: what they compute, how they train, what they save and load."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from problems import FORMS, Problem, batch_of, by_definition, make_problem, with_entry
from torch import Tensor, nn

import ffm_ext
from ffm_ext import (
    FFM,
    FM,
    FFMInteraction,
    FieldAwareFactorizationMachine,
    QuantizedFFMInteraction,
    SparseBatch,
)
from ffm_ext.autograd import is_from_backward
from ffm_ext.optim import FTRL, AdaGrad, Adam, Optimizer

OPTIMIZERS: dict[str, Callable[[object], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.01),
}


class TorchfmLayer(nn.Module):
    """The layer that the drop-in stands in for: a table a field, a Python loop over pairs."""

    def __init__(self, field_dims: list[int], embed_dim: int) -> None:
        super().__init__()
        self.starts = torch.tensor([0, *itertools.accumulate(field_dims[:-1])])
        self.embeddings = nn.ModuleList(
            nn.Embedding(sum(field_dims), embed_dim) for _ in field_dims
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.starts
        tables = [embedding(x) for embedding in self.embeddings]
        pairs = itertools.combinations(range(len(tables)), 2)
        return torch.stack([tables[j][:, i] * tables[i][:, j] for i, j in pairs], dim=1)


def field_ids(field_dims: list[int], batch_size: int) -> Tensor:
    return torch.stack([torch.randint(n, (batch_size,)) for n in field_dims], dim=1)


@pytest.mark.parametrize("within_field", [False, True])
@pytest.mark.parametrize("form", ["one-hot values", "csr", "csr values"])
@pytest.mark.parametrize("output", ["sum", "dot", "hadamard"])
def test_interaction_layer(
    form: str, output: str, within_field: bool, device: torch.device
) -> None:
    problem = make_problem(form, 3, 4)
    modes = {"output": output, "within_field": within_field}
    layer = FFMInteraction(11, 3, 4, device=device, **modes)  # type: ignore[arg-type]
    values = problem.values if form == "one-hot values" else None
    weight = layer.weight.detach().view(11, 3, 4)
    expected = by_definition(weight, *problem.args[1:], **modes)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(batch_of(problem), values), expected)


def test_values_take_the_dtype_of_the_table() -> None:
    problem = make_problem("csr values", 3, 4)
    layer = FFMInteraction(11, 3, 4, dtype=torch.float64)
    assert layer(batch_of(problem)).dtype == torch.float64


@pytest.mark.parametrize(("F", "K"), [(2, 8), (39, 4), (10, 16)])
def test_initial_interaction_has_a_deviation_of_a_tenth(F: int, K: int) -> None:
    torch.manual_seed(0)
    y = FFMInteraction(2000, F, K)(torch.randint(2000, (4000, F)))
    assert 0.08 < y.std() < 0.12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", ["one-hot", "csr values"])
def test_trains_on_sparse_gradients(optimizer: str, form: str, device: torch.device) -> None:
    torch.manual_seed(0)
    problem = make_problem(form, 3, 4)
    layer = FFMInteraction(11, 3, 4).to(device)
    step = OPTIMIZERS[optimizer](layer.parameters())
    target = torch.randn(7).to(device)
    losses = []
    for _ in range(20):
        step.zero_grad()
        loss = (layer(batch_of(problem)) - target).square().mean()
        loss.backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.is_sparse
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_sparse_step_is_a_dense_step(device: torch.device) -> None:
    problem = make_problem("csr values", 3, 4)
    dense = FFMInteraction(11, 3, 4, grad="dense", device=device)
    sparse = FFMInteraction(11, 3, 4, grad="sparse", device=device)
    sparse.load_state_dict(dense.state_dict())
    for layer in (dense, sparse):
        layer(batch_of(problem)).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    torch.testing.assert_close(sparse.weight, dense.weight, rtol=0, atol=1e-7)


def test_gradients_stay_coalesced(device: torch.device) -> None:
    """Also where two backward passes add up: what the flag promises is what optimizers rely on.

    On CUDA, PyTorch adds sparse gradients by putting them side by side, and says so.
    """
    torch.manual_seed(0)
    sparse = FFMInteraction(40, 3, 4, device=device)
    dense = FFMInteraction(40, 3, 4, grad="dense", device=device)
    dense.load_state_dict(sparse.state_dict())
    for passes in range(1, 4):
        ids = torch.randint(40, (9, 3)).to(device)
        for layer in (sparse, dense):
            layer(ids).square().sum().backward()
        grad = sparse.weight.grad
        assert grad is not None
        if device.type == "cuda" and passes > 1:
            assert not grad.is_coalesced()
            grad = grad.coalesce()
        assert grad.is_coalesced()
        rows = grad.indices()[0]
        assert is_from_backward(rows) == (passes == 1)
        assert (rows[1:] > rows[:-1]).all()
        torch.testing.assert_close(grad.to_dense(), dense.weight.grad)


@pytest.mark.parametrize("field_dims", [[4, 7], [3, 1, 5, 2]])
def test_stands_in_for_torchfm(field_dims: list[int]) -> None:
    old, new = TorchfmLayer(field_dims, 4), FieldAwareFactorizationMachine(field_dims, 4)
    new.load_state_dict(old.state_dict())
    x = field_ids(field_dims, 9)
    expected, found = old(x), new(x)
    assert found.shape == (9, len(field_dims) * (len(field_dims) - 1) // 2, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected.square().sum().backward()
    found.square().sum().backward()
    grads = torch.stack([embedding.weight.grad for embedding in old.embeddings], dim=1)
    torch.testing.assert_close(new.interaction.weight.grad, grads.flatten(1))


def test_loads_torchfm_inside_a_model() -> None:
    old = nn.ModuleDict({"ffm": TorchfmLayer([4, 7], 4), "head": nn.Linear(4, 1)})
    new = nn.ModuleDict({"ffm": FieldAwareFactorizationMachine([4, 7], 4), "head": nn.Linear(4, 1)})
    saved = old.state_dict()
    assert "ffm.embeddings.0.weight" in saved
    new.load_state_dict(saved)
    assert "ffm.embeddings.0.weight" in saved
    x = field_ids([4, 7], 5)
    torch.testing.assert_close(new["ffm"](x), old["ffm"](x))
    new.load_state_dict(new.state_dict())


def test_initial_tables_are_as_wide_as_torchfms() -> None:
    layer = FieldAwareFactorizationMachine([300, 700], 4).interaction
    bound = (6 / (1000 + 4)) ** 0.5
    assert 0.95 * bound < layer.weight.abs().max() <= bound


DESCRIPTIONS = {
    "field_dims": {"field_dims": [4, 7, 2]},
    "fields": {"fields": {"a": 4, "b": 7, "c": 2}},
    "ids": {"fields": {"a": range(4), "b": [10, 9, 8, 7, 6, 5, 4], "c": (11, 12)}},
    "sizes": {"num_features": 13, "num_fields": 3},
}


@pytest.mark.parametrize("within_field", [False, True])
@pytest.mark.parametrize("how", DESCRIPTIONS)
def test_ffm(how: str, within_field: bool) -> None:
    torch.manual_seed(0)
    model = FFM(4, **DESCRIPTIONS[how], within_field=within_field)  # type: ignore[arg-type]
    nn.init.normal_(model.linear.weight)
    nn.init.normal_(model.linear.bias)
    assert model.field_names == (
        ["a", "b", "c"] if "fields" in DESCRIPTIONS[how] else ["0", "1", "2"]
    )
    fields = torch.tensor([0] * 4 + [1] * 7 + [2] * 2)
    if how == "sizes":
        assert model.feature_fields is None
    else:
        assert model.feature_fields is not None
        assert model.feature_fields.tolist() == fields.tolist()
    X = torch.randn(6, 13) * (torch.rand(6, 13) < 0.5)
    table = model.interaction.weight.detach().view(13, 3, 4)
    expected = model.linear.bias + X @ model.linear.weight[:, 0]
    for a, b in itertools.combinations(range(13), 2):
        if within_field or fields[a] != fields[b]:
            expected = expected + X[:, a] * X[:, b] * (table[a, fields[b]] @ table[b, fields[a]])
    for batch in (
        SparseBatch.from_dense(X, fields),
        SparseBatch.from_scipy(sp.csr_matrix(X.numpy()), fields),
    ):
        torch.testing.assert_close(model(batch), expected)


def test_sizes_may_be_numpys(tmp_path: Path) -> None:
    """As ``ids.max() + 1`` is one. A model of such is saved as any other."""
    a, b, c = np.array([4, 7, 2])
    for n, model in enumerate(
        (
            FFM(np.int32(4), num_features=a + b + c, num_fields=np.int64(3)),
            FFM(4, num_features=torch.tensor(13), num_fields=3),  # type: ignore[arg-type]
            FFM(4, field_dims=np.array([4, 7, 2])),  # type: ignore[arg-type]
            FFM(4, fields={"a": a, "b": 7, "c": c}),
        )
    ):
        ffm_ext.interop.save_model(model, tmp_path / f"{n}")
        loaded = ffm_ext.interop.load_model(tmp_path / f"{n}").interaction
        assert (loaded.num_features, loaded.num_fields, loaded.embed_dim) == (13, 3, 4)
    with pytest.raises(ValueError, match=r"fields\['a'\] is a count where"):
        FFM(4, fields={"a": a, "b": [4, 5]})
    with pytest.raises(TypeError, match=r"FFM: fields\['b'\] must list integer ids: 'float'"):
        FFM(4, fields={"a": [0, 1], "b": [2.5, 3.0]})
    assert FM(a, c).weight.shape == (4, 2)
    for layer in (FFMInteraction(a, b, c), FieldAwareFactorizationMachine([a, b], c).interaction):
        sizes = (layer.num_features, layer.num_fields, layer.embed_dim)
        assert {type(size) for size in sizes} == {int}


def test_ffm_takes_ids_that_count_from_zero_in_every_field() -> None:
    model = FFM(4, field_dims=[4, 7, 2])
    nn.init.normal_(model.linear.weight)
    local = field_ids([4, 7, 2], 5)
    samples = [
        [(f, int(i) + start, 1.0) for f, (i, start) in enumerate(zip(row, [0, 4, 11]))]
        for row in local
    ]
    torch.testing.assert_close(model(local), model(SparseBatch.from_lists(samples)))
    values = torch.rand(5, 3)
    scaled = [[(f, i, float(v)) for (f, i, _), v in zip(row, x)] for row, x in zip(samples, values)]
    torch.testing.assert_close(model(local, values), model(SparseBatch.from_lists(scaled)))
    local[2, 0] = 4
    with pytest.raises(
        IndexError, match=r"FFM: indices\[2, 0\] = 4 is out of range for field 0 of 4 features"
    ):
        model(local)
    with pytest.raises(
        ValueError, match=r"FFM: ids must be \[B, 3\], one column a field, got \[5, 2\]"
    ):
        model(local[:, :2])


def libffm_score(problem: Problem) -> Tensor:
    """t = Σ <w[a, g], w[b, f]> x y / Σ x², over every pair of entries, those inside one field included."""
    pairs = by_definition(*problem.args, output="sum", within_field=True)
    return pairs * inverse_squares(problem)


def inverse_squares(problem: Problem) -> Tensor:
    """r = 1 / Σ x² of each sample, [B]; 0 where that is infinite."""
    values = torch.ones(problem.indices.shape) if problem.values is None else problem.values
    if problem.offsets is None:
        parts = list(values)
    else:
        parts = [values[a:b] for a, b in itertools.pairwise(problem.offsets.tolist())]
    squares = [float(part.double().square().sum()) for part in parts]
    inverse = [1 / s if s else 0.0 for s in squares]
    return torch.tensor(inverse, dtype=torch.float64, device=problem.weight.device)


def libffm_model(problem: Problem, **options: bool) -> FFM:
    options = {"bias": False, "linear": False, "within_field": True, "normalize": True} | options
    N, F, K = problem.weight.shape
    model = FFM(K, num_features=N, num_fields=F, **options).to(problem.weight)
    with torch.no_grad():
        model.interaction.weight.copy_(problem.weight.flatten(1))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_normalized_score_is_libffms(form: str, dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem(form, 3, 4, dtype=dtype)
    values = problem.values if problem.offsets is None else None
    found = libffm_model(problem)(batch_of(problem), values)
    assert found.dtype == dtype
    exact = problem.to(torch.float64)
    bound = by_definition(*exact.magnitudes().args, output="sum", within_field=True)
    bound = bound * inverse_squares(exact)
    error = (found.double() - libffm_score(exact)).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * (bound + 1e-30)).all()


@pytest.mark.parametrize("form", FORMS)
def test_normalize_scales_pairs_by_r_and_the_linear_term_by_its_root(form: str) -> None:
    problem = make_problem(form, 3, 4, dtype=torch.float64)
    r = inverse_squares(problem)
    values = problem.values if problem.offsets is None else None
    full = libffm_model(problem, bias=True, linear=True, within_field=False)
    nn.init.normal_(full.linear.weight)
    nn.init.normal_(full.linear.bias)
    plain = libffm_model(problem, linear=True, within_field=False, normalize=False)
    plain.linear.weight = full.linear.weight
    pairs = plain.interaction(batch_of(problem), values)
    linear = plain(batch_of(problem), values) - pairs
    expected = full.linear.bias + linear * r.sqrt() + pairs * r
    torch.testing.assert_close(full(batch_of(problem), values), expected)


@pytest.mark.parametrize("form", ["one-hot values", "csr values"])
def test_gradients_pass_through_the_normalisation(form: str, device: torch.device) -> None:
    problem = make_problem(form, 3, 4, dtype=torch.float64)
    assert problem.values is not None
    model = libffm_model(problem, linear=True, within_field=False)
    nn.init.normal_(model.linear.weight)

    def score(values: Tensor) -> Tensor:
        if problem.fields is None or problem.offsets is None:
            return model(problem.indices, values)
        return model(SparseBatch(problem.indices, problem.fields, values, problem.offsets))

    assert torch.autograd.gradcheck(score, problem.values.clone().requires_grad_())


@pytest.mark.parametrize("form", ["one-hot values", "csr values"])
def test_a_sample_of_zeros_scores_zero(form: str, device: torch.device) -> None:
    problem = make_problem(form, 3, 4)
    assert problem.values is not None
    zeroed = problem.values.clone()
    zeroed[: 1 if problem.offsets is None else int(problem.offsets[1])] = 0
    zeroed.requires_grad_()
    model = libffm_model(problem, linear=True)
    nn.init.normal_(model.linear.weight)
    if problem.fields is None or problem.offsets is None:
        score = model(problem.indices, zeroed)
    else:
        batch = SparseBatch(problem.indices, problem.fields, zeroed, problem.offsets)
        score = model(batch)
    assert score[0] == 0
    score.sum().backward()
    assert zeroed.grad is not None
    assert zeroed.grad.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.to_dense().isfinite().all()


def test_normalisation_neither_overflows_nor_vanishes() -> None:
    """The squares of these values are no numbers of their dtype; their ratios are."""
    for dtype, scale in ((torch.float32, 1e30), (torch.float32, 1e-30), (torch.float16, 3e4)):
        problem = make_problem("one-hot values", 3, 4, dtype=dtype)
        model = libffm_model(problem)
        values = torch.tensor([[1.0, 0.5, 0.25]])
        expected = model(problem.indices[:1], values.to(dtype))
        found = model(problem.indices[:1], (values * scale).to(dtype))
        assert expected != 0
        torch.testing.assert_close(found, expected)


def test_a_normalized_sample_fits_float16_where_its_sum_does_not() -> None:
    model = FFM(4, num_features=1, num_fields=2, bias=False, linear=False, normalize=True).half()
    nn.init.constant_(model.interaction.weight, 4)
    fields = torch.arange(2).repeat_interleave(100)
    batch = SparseBatch(torch.zeros(200).int(), fields, None, torch.tensor([0, 200]))
    assert model.interaction(batch).isinf().all()
    assert model(batch).item() == pytest.approx(100 * 100 * 4 * 4**2 / 200, rel=2e-3)


def test_a_float16_table_beside_float32_weights_fits_too() -> None:
    model = FFM(16, num_features=10, num_fields=10, normalize=True)
    model.interaction.half()
    nn.init.constant_(model.interaction.weight, 20)
    assert model.interaction(torch.arange(10)[None]).isinf().all()
    assert model(torch.arange(10)[None]).item() == pytest.approx(45 * 16 * 400 / 10, rel=2e-3)


def test_tables_of_other_fields_and_factors_are_not_loaded() -> None:
    model = FFM(4, num_features=50, num_fields=6)
    other = FFM(8, num_features=50, num_fields=3)
    assert model.interaction.weight.shape == other.interaction.weight.shape
    with pytest.raises(RuntimeError, match=r"interaction has 6 fields of 4 factors"):
        other.load_state_dict(model.state_dict())
    plain = dict(model.state_dict())  # as a file of tensors alone has it
    other.load_state_dict(plain)
    assert torch.equal(other.interaction.weight, model.interaction.weight)


@pytest.mark.parametrize("kind", [FFM, FieldAwareFactorizationMachine])
def test_ids_of_other_fields_are_not_loaded(kind: type[nn.Module]) -> None:
    model, other = (kind(field_dims=dims, embed_dim=4) for dims in ([10, 20, 5], [20, 10, 5]))
    with pytest.raises(
        RuntimeError, match=r"fields of \[10, 20, 5\] features, the model of \[20, 10, 5\]"
    ):
        other.load_state_dict(model.state_dict())
    model.load_state_dict(copy.deepcopy(model).state_dict())
    other.load_state_dict(dict(model.state_dict()))  # as a file of tensors alone has it


def test_ids_of_the_whole_table_are_those_of_any_fields() -> None:
    by_size = FFM(4, num_features=35, num_fields=3)
    by_fields = FFM(4, field_dims=[10, 20, 5])
    by_fields.load_state_dict(by_size.state_dict())
    by_size.load_state_dict(by_fields.state_dict())


def test_a_generator_of_ones_own() -> None:
    model = FFM(4, num_features=35, num_fields=3)
    torch.manual_seed(3)
    model.reset_parameters()
    wanted = model.interaction.weight.detach().clone()
    state = torch.get_rng_state()
    model.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(model.interaction.weight, wanted)
    assert torch.equal(torch.get_rng_state(), state)


def test_packed_tables_of_other_fields_and_factors_are_not_loaded() -> None:
    layers = [QuantizedFFMInteraction(9, F, K) for F, K in ((4, 8), (6, 8), (4, 5))]
    for one, other in itertools.permutations(layers, 2):
        assert one.packed.shape == other.packed.shape
        F, K = other.num_fields, other.embed_dim
        with pytest.raises(RuntimeError, match=f"what was saved has {F} fields of {K} factors"):
            one.load_state_dict(other.state_dict())
        one.load_state_dict(one.state_dict())


def test_normalize_names_a_bad_value_where_it_is(device: torch.device) -> None:
    problem = make_problem("csr values", 3, 4)
    model = libffm_model(problem)
    with pytest.raises(ValueError, match=r"FFM: values\[4\] = nan is not finite"):
        model(batch_of(with_entry(problem, "values", 4, float("nan"))))
    with pytest.raises(ValueError, match=r"FFM: offsets\[2\] = 3 is less than offsets\[1\] = 9"):
        model(batch_of(with_entry(problem, "offsets", 1, 9)))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_parts_can_be_left_out(bias: bool, linear: bool, grad: str) -> None:
    full = FFM(4, field_dims=[4, 7, 2], grad=grad)  # type: ignore[arg-type]
    model = FFM(4, field_dims=[4, 7, 2], grad=grad, bias=bias, linear=linear)  # type: ignore[arg-type]
    nn.init.normal_(full.linear.weight)
    nn.init.normal_(full.linear.bias)
    kept = {"interaction.weight"}
    kept |= {"linear.bias"} if bias else set()
    kept |= {"linear.weight"} if linear else set()
    assert model.state_dict().keys() == kept
    assert (model.linear.bias is not None, model.linear.weight is not None) == (bias, linear)
    model.load_state_dict({name: full.state_dict()[name] for name in kept})
    with torch.no_grad():
        if not bias:
            full.linear.bias.zero_()
        if not linear:
            full.linear.weight.zero_()
    x = field_ids([4, 7, 2], 5)
    torch.testing.assert_close(model(x), full(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "normalize=False" in repr(model)


def test_a_quantized_model_normalizes_too() -> None:
    problem = make_problem("csr values", 3, 4)
    model = libffm_model(problem)
    found = ffm_ext.quantize(model)(batch_of(problem))
    torch.testing.assert_close(found, model(batch_of(problem)), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "exactly one of field_dims, fields, or num_features with num_fields"),
        ({"field_dims": [2], "fields": {"a": 2}}, "exactly one of"),
        ({"num_features": 5}, "num_features and num_fields go together"),
        ({"field_dims": [2, 0]}, r"field_dims\[1\] = 0 must be positive"),
        (
            {"fields": {"a": 2, "b": [2, 3]}},
            "fields\\['a'\\] is a count where other fields list their ids",
        ),
        (
            {"fields": {"a": [0, 1], "b": [1, 2]}},
            r"must cover 0 … 3 once each; fields\['b'\] has 1",
        ),
    ],
)
def test_ffm_refuses(description: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"FFM: .*{message}"):
        FFM(4, **description)  # type: ignore[arg-type]


@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_fm(grad: str) -> None:
    torch.manual_seed(0)
    model = FM(13, 4, grad=grad)  # type: ignore[arg-type]
    nn.init.normal_(model.linear.weight)
    X = torch.randn(6, 13) * (torch.rand(6, 13) < 0.5)
    expected = model.linear.bias + X @ model.linear.weight[:, 0]
    for a, b in itertools.combinations(range(13), 2):
        expected = expected + X[:, a] * X[:, b] * (model.weight[a] @ model.weight[b])
    found = model(SparseBatch.from_dense(X, [0] * 13))
    torch.testing.assert_close(found, expected)
    expected_grad = torch.autograd.grad(expected.square().sum(), model.weight)[0]
    found.square().sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.is_sparse == (grad == "sparse")
    torch.testing.assert_close(model.weight.grad.to_dense(), expected_grad)
    ids, values = torch.randint(13, (5, 3)), torch.rand(5, 3)
    samples = [[(0, int(i), float(x)) for i, x in zip(*row)] for row in zip(ids, values)]
    torch.testing.assert_close(model(ids, values), model(SparseBatch.from_lists(samples)))
    torch.testing.assert_close(model(ids), model(ids, torch.ones(5, 3)))


@pytest.mark.parametrize(
    "model",
    [FFMInteraction(13, 3, 4), FFM(4, fields={"a": 4, "b": 7, "c": 2}), FM(13, 4),
     FieldAwareFactorizationMachine([4, 7, 2], 4)],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
def test_copies_and_saves(model: nn.Module) -> None:
    x = field_ids([4, 7, 2], 5)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        copy.deepcopy(model).double()(x), expected.double(), rtol=1e-4, atol=1e-6
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected.detach(), rtol=0, atol=0)


def test_large_tables_lie_on_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr(ffm_ext.memory, "advise_huge_pages", lambda table: asked.append(table) or 0)
    ffm_ext.memory.empty_table(1 << 20, 8)
    assert len(asked) == 1
    ffm_ext.memory.empty_table(1 << 10, 8)
    ffm_ext.memory.empty_table(1 << 20, 8, device="meta")
    monkeypatch.setenv("FFM_EXT_HUGE_PAGES", "0")
    ffm_ext.memory.empty_table(1 << 20, 8)
    assert len(asked) == 1


def test_converted_tables_lie_on_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    monkeypatch.setattr(ffm_ext.memory, "advise_huge_pages", lambda table: asked.append(table) or 0)
    layer = FFMInteraction(1 << 19, 4, 8)
    wanted = layer.weight.detach().bfloat16()
    asked.clear()
    layer.to(torch.bfloat16)
    assert [tensor.data_ptr() for tensor in asked] == [layer.weight.data_ptr()]
    assert torch.equal(layer.weight, wanted)
    for moved in (layer.bfloat16, layer.cpu, layer.share_memory):
        moved()
    assert layer.weight.is_shared()
    FFMInteraction(1 << 10, 4, 8).to(torch.bfloat16)
    layer.to("meta").to_empty(device="cpu")
    assert len(asked) == 2


@pytest.mark.parametrize("optimizer", [AdaGrad(lr=0.1), Adam(), FTRL()], ids=lambda o: o.name)
def test_a_fused_optimizer_goes_on_when_its_table_is_converted(
    optimizer: Optimizer, device: torch.device
) -> None:
    torch.manual_seed(0)
    layer = FFMInteraction(11, 3, 4, device=device)
    layer.fuse_optimizer(optimizer)
    x = torch.randint(11, (9, 3)).to(device)
    layer(x).square().sum().backward()
    names = [name for name in layer.state_dict() if name not in ("weight", "optimizer_step")]
    states = {name: layer.get_buffer(name).clone() for name in names}
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
        layer.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, state in states.items():
            assert torch.equal(layer.get_buffer(name), state.to(wide))
            assert layer.get_buffer(name).dtype == wide
        before = layer.weight.clone()
        other = copy.deepcopy(layer)
        other(x).square().sum().backward()
        assert not torch.equal(other.weight, before)
        assert torch.equal(layer.weight, before)
    layer(x).square().sum().backward()
    assert int(layer.get_buffer("optimizer_step")) == 2
    layer.to("meta")
    assert all(layer.get_buffer(name).is_meta for name in names)


def test_advice_for_huge_pages() -> None:
    table = torch.zeros(1 << 20, 8)
    asked = ffm_ext.memory.advise_huge_pages(table)
    assert asked % (2 << 20) == 0
    assert (30 << 20) <= asked <= (32 << 20)
    assert (table == 0).all()
    with pytest.raises(ValueError, match="advise_huge_pages: tensor must be contiguous on the CPU"):
        ffm_ext.memory.advise_huge_pages(table.t())


@pytest.mark.parametrize("model", [FFM(2, field_dims=[3, 3]), ffm_ext.FM(6, 2)], ids=["FFM", "FM"])
def test_the_mode_of_a_model_is_that_of_all_its_weights(model: nn.Module) -> None:
    x = torch.tensor([[0, 1], [2, 2]])
    for mode, layout in (("dense", torch.strided), ("sparse", torch.sparse_coo)):
        model.zero_grad()
        model.grad = mode  # type: ignore[assignment]
        assert model.grad == mode
        model(x).sum().backward()
        found = [p.grad.layout for p in model.parameters() if p.dim() > 1 and p.grad is not None]
        assert found == [layout] * 2
    with pytest.raises(ValueError, match="grad = 'both'"):
        model.grad = "both"  # type: ignore[assignment]


def test_ids_that_are_no_tensor_are_refused() -> None:
    model = ffm_ext.FieldAwareFactorizationMachine([3, 3], 2)
    with pytest.raises(TypeError, match="ids must be a tensor, got ndarray"):
        model(np.zeros((2, 2), np.int64))


def test_a_model_that_memory_does_not_hold() -> None:
    for sizes in (
        {"num_features": 3, "num_fields": 1 << 40},
        {"num_features": 1 << 44, "num_fields": 1},
    ):
        with pytest.raises(MemoryError, match="no memory for a table of shape"):
            FFM(4, **sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["FFM", "normalized FFM", "FM"])
def test_models_of_half_precision_are_rounded_once(
    kind: str, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    problem = make_problem(form, 7, 4, batch_size=70, dtype=dtype)
    N = problem.weight.shape[0]
    model: FFM | FM = FM(N, 4, dtype=dtype, device=device)
    if kind != "FM":
        normalize = kind != "FFM"
        sizes = {"num_features": N, "num_fields": 7}
        model = FFM(4, **sizes, normalize=normalize, dtype=dtype, device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    exact = copy.deepcopy(model).double()
    batch = batch_of(problem)
    values = problem.values if isinstance(batch, Tensor) else None
    found, wanted = model(batch, values), exact(batch, values).detach()
    assert found.dtype == dtype
    # Normalised values are rounded to the type of the table; float16 has them always.
    rounds = kind == "normalized FFM" and (problem.values is not None or dtype == torch.float16)
    eps = torch.finfo(dtype).eps
    atol = 2 * eps * float(wanted.abs().max()) if rounds else 1e-5
    torch.testing.assert_close(found, wanted.to(dtype), rtol=eps, atol=atol)
    if isinstance(model, FFM) and not rounds:
        score = model(batch, values, dtype=torch.float32)
        torch.testing.assert_close(score, wanted.float(), rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ids_that_an_fm_cannot_take() -> None:
    model = FM(10, 4)
    with pytest.raises(ValueError, match=r"FM: x must be int32 or int64, got torch\.float32"):
        model(torch.rand(2, 3))
    with pytest.raises(ValueError, match="FM: x is on meta, weight is on cpu"):
        model(torch.zeros(1, 2, dtype=torch.int64, device="meta"))


def test_results_are_real_numbers() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    model = FFM(4, num_features=3, num_fields=2)
    for call in (model, model.interaction, ffm_ext.quantize(model.interaction)):
        with pytest.raises(ValueError, match=r"dtype = torch\.int32 is not a floating-point type"):
            call(ids, dtype=torch.int32)


def test_the_fields_of_features_can_be_set() -> None:
    model = FFM(4, num_features=7, num_fields=2)
    for fields, error in (
        (torch.tensor([0, 1]), "must be \\[7\\], got shape \\[2\\]"),
        (torch.tensor([0.0] * 7), "is torch.float32, not integers"),
        ([0, 1, 0, 1, 0, 1, 2], "\\[6\\] = 2 is out of range for 2 fields"),
        ([0, 1, -2, 1, 0, 1, 1], "\\[2\\] = -2 is out of range for 2 fields"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"FFM: feature_fields{error}|{error}"):
            model.feature_fields = fields
        assert model.feature_fields is None
    owners = [0, 0, 1, -1, 1, 0, 1]
    for given in (owners, torch.tensor(owners).repeat_interleave(2)[::2], np.int8(owners)):
        model.feature_fields = given
        for moved in (
            model.double(),
            copy.deepcopy(model),
            model.to("meta").to_empty(device="cpu"),
        ):
            assert moved.feature_fields.tolist() == owners  # type: ignore[union-attr]
    assert model.to("meta").feature_fields.is_meta  # type: ignore[union-attr]
    model.feature_fields = None
    assert model.feature_fields is None
    sized = FFM(4, field_dims=[2, 1])
    sized.feature_fields = [0, 0, 1]
    with pytest.raises(ValueError, match="FFM: feature_fields cannot be others than those of"):
        sized.feature_fields = [0, 1, 1]
