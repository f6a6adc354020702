# SPDX-License-Identifier: MIT
"""The strongest pairs and the strength of fields, against loops over all pairs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ffm_ext import FFM, SparseBatch, inspection, quantize
from ffm_ext.inspection import field_strength, plot_field_strength, top_interactions

FIELDS = [0] * 4 + [1] * 7 + [2] * 2


def model_of(**options: Any) -> FFM:
    torch.manual_seed(0)
    return FFM(4, **{"field_dims": [4, 7, 2]} | options)


def batch_of_samples() -> SparseBatch:
    torch.manual_seed(1)
    X = torch.randn(9, 13) * (torch.rand(9, 13) < 0.4)
    return SparseBatch.from_dense(X, FIELDS)


def dots(model: FFM) -> dict[tuple[int, int], float]:
    """<w[a, f_b], w[b, f_a]> of every pair that the model counts."""
    table = model.interaction.weight.detach().float().view(13, 3, 4)
    return {
        (a, b): float(table[a, FIELDS[b]] @ table[b, FIELDS[a]])
        for a, b in itertools.combinations(range(13), 2)
        if model.interaction.within_field or FIELDS[a] != FIELDS[b]
    }


def pairs_in(batch: SparseBatch) -> set[tuple[int, int]]:
    samples = [
        batch.indices[a:b].sort().values.tolist()
        for a, b in itertools.pairwise(batch.offsets.tolist())
    ]
    return {pair for sample in samples for pair in itertools.combinations(sample, 2)}


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_features_that_stand_in_several_fields(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    model = FFM(1, num_features=2, num_fields=3)
    with torch.no_grad():
        model.interaction.weight.copy_(torch.tensor([[0, 0, 1.0], [0.1, 10, 0]]))
    lists = [[(0, 0, 1.0), (2, 1, 1.0)], [(1, 0, 1.0), (2, 1, 1.0)]]
    for order in (lists, lists[::-1], lists * 3):
        found = top_interactions(model, data=SparseBatch.from_lists(order))
        assert [(i.field_a, i.field_b) for i in found] == [(1, 2), (0, 2)]
        assert [i.weight for i in found] == pytest.approx([10, 0.1])


def test_what_the_model_does_not_take() -> None:
    model = FFM(4, num_features=13, num_fields=3)
    for look in (top_interactions, field_strength):
        with pytest.raises(
            ValueError, match=r"data has shape \[5, 2\], the model takes ids \[B, 3\]"
        ):
            look(model, data=torch.zeros(5, 2, dtype=torch.int64))  # type: ignore[operator]
        with pytest.raises(
            TypeError, match="QuantizedFFMInteraction, whose table holds no weights"
        ):
            look(quantize(model_of()))  # type: ignore[operator]


@pytest.mark.parametrize("block", [1, 10, 1 << 22])
@pytest.mark.parametrize("within_field", [False, True])
@pytest.mark.parametrize("over_data", [False, True])
@pytest.mark.parametrize("n", [1, 5, 1000])
def test_top_interactions(
    n: int, over_data: bool, within_field: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    model, data = model_of(within_field=within_field), batch_of_samples() if over_data else None
    expected = dots(model)
    if data is not None:
        expected = {pair: expected[pair] for pair in pairs_in(data) & expected.keys()}
    wanted = sorted(expected.items(), key=lambda item: -abs(item[1]))[:n]
    found = top_interactions(model, n, data=data)
    assert [(x.feature_a, x.feature_b) for x in found] == [pair for pair, _ in wanted]
    assert [(x.field_a, x.field_b) for x in found] == [
        (FIELDS[a], FIELDS[b]) for (a, b), _ in wanted
    ]
    for x, (_, weight) in zip(found, wanted):
        assert x.weight == pytest.approx(weight, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_top_interactions_of_any_dtype(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    found = top_interactions(model, 3)
    expected = dots(model)
    assert [abs(x.weight) for x in found] == pytest.approx(
        sorted(map(abs, expected.values()))[: -3 - 1 : -1], rel=1e-5
    )


def test_top_interactions_of_ids() -> None:
    """Ids that count from 0 in every field, as the model takes them."""
    ids = torch.tensor([[0, 6, 1], [3, 0, 0]])
    found = top_interactions(model_of(), 100, data=ids)
    assert {(x.feature_a, x.feature_b) for x in found} == {
        (0, 10), (0, 12), (10, 12), (3, 4), (3, 11), (4, 11),
    }  # fmt: skip


def test_what_cannot_be_inspected() -> None:
    model = model_of(field_dims=None, num_features=13, num_fields=3)
    for call in (top_interactions, field_strength):
        with pytest.raises(ValueError, match="does not know the field of a feature: set model"):
            call(model)
    assert top_interactions(model, data=batch_of_samples())
    model.feature_fields = torch.tensor(FIELDS)
    assert top_interactions(model)
    with pytest.raises(ValueError, match="top_interactions: n = 0 must be positive"):
        top_interactions(model, 0)
    with pytest.raises(TypeError, match=r"top_interactions: n = 2\.5 must be an integer"):
        top_interactions(model, 2.5)  # type: ignore[arg-type]
    bad = SparseBatch.from_lists([[(0, 1, 1.0), (1, 13, 1.0)]])
    with pytest.raises(IndexError, match="top_interactions: indices has 13, out of range for 13"):
        top_interactions(model, data=bad)
    with pytest.raises(ValueError, match="field_strength: data has no samples"):
        field_strength(model, batch_of_samples()[:0])


@pytest.mark.parametrize("within_field", [False, True])
def test_field_strength_of_the_table(within_field: bool) -> None:
    model = model_of(within_field=within_field)
    squares: dict[tuple[int, int], list[float]] = {}
    for (a, b), dot in dots(model).items():
        squares.setdefault((FIELDS[a], FIELDS[b]), []).append(dot**2)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for (f, g), values in squares.items():
        expected[f, g] = expected[g, f] = (sum(values) / len(values)) ** 0.5
    assert_close(field_strength(model), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("within_field", [False, True])
def test_field_strength_over_data(
    within_field: bool, normalize: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    model, batch = model_of(within_field=within_field, normalize=normalize), batch_of_samples()
    table = model.interaction.weight.detach().view(13, 3, 4)
    squares = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.pairwise(batch.offsets.tolist()):
        ids, x = batch.indices[a:b], batch.values[a:b].double()  # type: ignore[index]
        r = 1 / x.square().sum() if normalize else 1
        terms = torch.zeros(3, 3, dtype=torch.float64)
        for i, j in itertools.combinations(range(b - a), 2):
            f, g = sorted((FIELDS[ids[i]], FIELDS[ids[j]]))
            if f != g or within_field:
                dot = table[ids[i], FIELDS[ids[j]]] @ table[ids[j], FIELDS[ids[i]]]
                terms[f, g] += dot.double() * x[i] * x[j] * r
        squares += terms.square()
    expected = (squares / len(batch)).sqrt()
    expected = expected + expected.triu(1).T
    assert_close(field_strength(model, batch), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("within_field", [False, True])
def test_features_of_no_field_are_left_out(within_field: bool) -> None:
    """Also where a field is left without any."""
    model = model_of(field_dims=None, num_features=13, num_fields=3, within_field=within_field)
    out = {0, 5, 6, 11, 12}
    model.feature_fields = torch.tensor([-1 if a in out else f for a, f in enumerate(FIELDS)])
    expected = {pair: dot for pair, dot in dots(model).items() if not out & {*pair}}
    found = top_interactions(model, 1000)
    assert {(x.feature_a, x.feature_b) for x in found} == expected.keys()
    strength = field_strength(model)
    squares = [dot**2 for (a, b), dot in expected.items() if (FIELDS[a], FIELDS[b]) == (0, 1)]
    assert float(strength[0, 1]) == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-5)
    assert (strength[2] == 0).all()


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = model_of(field_dims=None, fields={"user": 4, "item": 7, "day": 2})
    axes = plot_field_strength(model)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["user", "item", "day"]
    assert_close(torch.from_numpy(axes.images[0].get_array().data), field_strength(model))
    own = pyplot.figure().add_subplot()
    assert plot_field_strength(model, torch.tensor([[0, 6, 1]]), ax=own) is own
    pyplot.close("all")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install ffm-ext\[plot\]"):
        plot_field_strength(model_of())


def test_pairs_that_are_no_numbers_hide_no_others() -> None:
    model = FFM(4, field_dims=[3, 4])
    with torch.no_grad():
        model.interaction.weight[0] = float("nan")
    data = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    for given in (None, data):
        assert [len(top_interactions(model, n, data=given)) for n in (1, 3, 8, 100)] == [1, 3, 8, 8]


def test_a_long_sample_takes_memory_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FFM(2, num_features=300, num_fields=3, within_field=True)
    ids = torch.randperm(300)[:250]
    data = SparseBatch(ids, ids % 3, None, torch.tensor([0, 100, 100, 250]))
    wanted = top_interactions(model, 40, data=data)
    sizes = []

    def counted(offsets: torch.Tensor) -> Any:
        for left, right in pairs(offsets):
            sizes.append(len(left))
            yield left, right

    pairs = inspection._pairs_of_entries
    monkeypatch.setattr(inspection, "_BLOCK", 500)
    monkeypatch.setattr(inspection, "_pairs_of_entries", counted)
    assert top_interactions(model, 40, data=data) == wanted
    assert sum(sizes) == 100 * 99 // 2 + 150 * 149 // 2
    assert max(sizes) < 500 + 150


@pytest.mark.parametrize("size", [200.0, 1e-4])
def test_strength_over_data_of_half_precision(size: float) -> None:
    model = FFM(4, field_dims=[2, 2], dtype=torch.float16)
    torch.nn.init.constant_(model.interaction.weight, size)
    data = torch.tensor([[0, 1], [1, 1]])
    assert_close(field_strength(model, data)[0, 1], field_strength(model)[0, 1])
