# SPDX-License-Identifier: MIT
"""What is refused, and in which words; what is empty or minimal and has a result. Nothing is read out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, make_problem, with_entry
from torch import Tensor

import ffm_ext
from ffm_ext.functional import ffm_interaction

ops = torch.ops.ffm_ext

# 7 samples of 3 fields, K = 4, a table of 11 features.
ONE_HOT = make_problem("one-hot values", 3, 4)
CSR = make_problem("csr values", 3, 4)
NNZ = CSR.indices.numel()

Operator = Callable[..., object]


def forward(p: Problem, output: str = "sum") -> object:
    return ops.ffm_forward(*p.args, output, False)


def backward(p: Problem, output: str = "sum") -> object:
    return ops.ffm_backward(torch.ones(7), *p.args, output, False, True)


def backward_sparse(p: Problem, output: str = "sum") -> object:
    return ops.ffm_backward_sparse(torch.ones(7), *p.args, output, False, True)


def backward_values(p: Problem, output: str = "sum") -> object:
    return ops.ffm_backward_values(torch.ones(7), *p.args, output, False)


OPERATORS = (forward, backward, backward_sparse, backward_values)


@pytest.fixture(params=OPERATORS, ids=lambda operator: f"ffm_{operator.__name__}")
def operator(request: pytest.FixtureRequest) -> Operator:
    return request.param


def replaced(problem: Problem, **tensors: Tensor | None) -> Problem:
    return Problem(**{**vars(problem), **tensors})


CASES = {
    "id too large": (with_entry(ONE_HOT, "indices", 17, 11), IndexError,
                     "indices[5, 2] = 11 is out of range for a table of 11 features"),
    "id negative": (with_entry(ONE_HOT, "indices", 4, -1), IndexError,
                    "indices[1, 1] = -1 is out of range for a table of 11 features"),
    "id far away": (with_entry(ONE_HOT, "indices", 0, 2**62), IndexError,
                    f"indices[0, 0] = {2**62} is out of range for a table of 11 features"),
    "id negative, int32": (with_entry(ONE_HOT.to(ids=torch.int32), "indices", 4, -(2**31)), IndexError,
                           f"indices[1, 1] = {-(2**31)} is out of range for a table of 11 features"),
    "id too large, csr": (with_entry(CSR, "indices", 5, 11), IndexError,
                          "indices[5] = 11 is out of range for a table of 11 features"),
    "field too large": (with_entry(CSR, "fields", 2, 3), IndexError, "fields[2] = 3 is out of range for 3 fields"),
    "field negative": (with_entry(CSR, "fields", 0, -1), IndexError, "fields[0] = -1 is out of range for 3 fields"),
    "value NaN": (with_entry(ONE_HOT, "values", 20, float("nan")), ValueError, "values[6, 2] = nan is not finite"),
    "value infinite": (with_entry(CSR, "values", 3, float("-inf")), ValueError, "values[3] = -inf is not finite"),
    "value infinite, float64": (with_entry(CSR.to(torch.float64), "values", 3, float("inf")), ValueError,
                                "values[3] = inf is not finite"),
    "value NaN, bfloat16": (with_entry(CSR.to(torch.bfloat16), "values", 3, float("nan")), ValueError,
                            "values[3] = nan is not finite"),
    "value infinite, float16": (with_entry(CSR.to(torch.float16), "values", 1, float("inf")), ValueError,
                                "values[1] = inf is not finite"),
    "offsets do not start at 0": (with_entry(CSR, "offsets", 0, 1), ValueError, "offsets[0] = 1 must be 0"),
    "offsets decrease": (with_entry(CSR, "offsets", 3, 2), ValueError, "offsets[3] = 2 is less than offsets[2] = 3"),
    "offsets negative": (with_entry(CSR, "offsets", 1, -4), ValueError, "offsets[1] = -4 is less than offsets[0] = 0"),
    "offsets fall short": (with_entry(CSR, "offsets", 7, NNZ - 1), ValueError,
                           f"offsets[7] = {NNZ - 1} must be the number of entries, {NNZ}"),
    "offsets reach too far": (with_entry(CSR, "offsets", 7, NNZ + 1), ValueError,
                              f"offsets[7] = {NNZ + 1} must be the number of entries, {NNZ}"),
    "offsets empty": (replaced(CSR, offsets=CSR.offsets[:0]), ValueError, "offsets is empty"),
    "offsets [B, 1]": (replaced(CSR, offsets=CSR.offsets[:, None]), ValueError,
                       "offsets must have one dimension, got shape [8, 1]"),
    "no offsets": (replaced(CSR, offsets=None), ValueError, "indices is [nnz], so offsets is needed too"),
    "no fields": (replaced(CSR, fields=None), ValueError, "indices is [nnz], so fields is needed too"),
    "fields too many": (replaced(ONE_HOT, fields=ONE_HOT.indices), ValueError,
                        "indices is [B, F], so fields must be None"),
    "fields short": (replaced(CSR, fields=CSR.fields[1:]), ValueError,
                     f"fields has shape [{NNZ - 1}], indices has [{NNZ}]"),
    "values short": (replaced(CSR, values=CSR.values[1:]), ValueError,
                     f"values has shape [{NNZ - 1}], indices has [{NNZ}]"),
    "columns": (replaced(ONE_HOT, indices=ONE_HOT.indices[:, :2]), ValueError,
                "indices has shape [7, 2], but weight has 3 fields"),
    "indices [B, F, 1]": (replaced(ONE_HOT, indices=ONE_HOT.indices[..., None]), ValueError,
                          "indices must be [B, F] or [nnz], got shape [7, 3, 1]"),
    "indices float": (replaced(ONE_HOT, indices=ONE_HOT.indices.float()), ValueError,
                      "indices must be int32 or int64, got float32"),
    "fields int16": (replaced(CSR, fields=CSR.fields.short()), ValueError, "fields must be int32 or int64, got int16"),
    "offsets int16": (replaced(CSR, offsets=CSR.offsets.short()), ValueError,
                      "offsets must be int32 or int64, got int16"),
    "values float64": (replaced(CSR, values=CSR.values.double()), ValueError, "values is float64, weight is float32"),
    "weight int8": (replaced(CSR, weight=CSR.weight.char(), values=None), ValueError,
                    "weight must be float32, float64, bfloat16 or float16, got int8"),
    "weight [N, F·K]": (replaced(ONE_HOT, weight=ONE_HOT.weight.flatten(1)), ValueError,
                        "weight must be [N, F, K], got shape [11, 12]"),
    "weight of no factors": (replaced(ONE_HOT, weight=ONE_HOT.weight[..., :0]), ValueError,
                             "weight has shape [11, 3, 0]: F and K must be positive"),
    "weight strided": (replaced(ONE_HOT, weight=ONE_HOT.weight.transpose(1, 2).contiguous().transpose(1, 2)),
                       ValueError, "weight is not contiguous (strides 12, 1, 3)"),
    "table of no rows": (replaced(ONE_HOT, weight=ONE_HOT.weight[:0]), IndexError,
                         "is out of range for a table of 0 features"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, operator: Operator) -> None:
    problem, error, message = CASES[case]
    if problem.values is None and operator is not forward:
        pytest.skip("asks for the gradient of values")
    if "[5, 2]" in message:
        assert problem.indices[5, 2] == 11  # the place that the message names
    with pytest.raises(error) as caught:
        operator(problem)
    assert str(caught.value).startswith(f"ffm_{operator.__name__}: ")
    assert message in str(caught.value)


def test_unknown_output(operator: Operator) -> None:
    with pytest.raises(ValueError, match="output = 'mean' is not one of sum, dot, hadamard"):
        operator(ONE_HOT, "mean")


@pytest.mark.parametrize("name", ["indices", "fields", "values", "offsets"])
def test_wrong_device(name: str) -> None:
    problem = replaced(CSR, **{name: getattr(CSR, name).to("meta")})
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"meta|ffm_forward: .* is on"):
        ffm_interaction(*problem.args)


@pytest.mark.parametrize("name", ["backward", "backward_sparse", "backward_values"])
def test_gradient_of_the_output(name: str) -> None:
    operator, flags = getattr(ops, f"ffm_{name}"), () if name == "backward_values" else (True,)
    with pytest.raises(ValueError, match=rf"ffm_{name}: grad_output has shape \[6\], which is not that of the output"):
        operator(torch.ones(6), *ONE_HOT.args, "sum", False, *flags)
    with pytest.raises(ValueError, match=rf"ffm_{name}: grad_output is float64, weight is float32"):
        operator(torch.ones(7, dtype=torch.float64), *ONE_HOT.args, "sum", False, *flags)


def test_gradient_of_no_values() -> None:
    for name in ("backward", "backward_sparse"):
        problem = replaced(ONE_HOT, values=None)
        with pytest.raises(ValueError, match=f"ffm_{name}: values_grad is set, but values is None"):
            getattr(ops, f"ffm_{name}")(torch.ones(7), *problem.args, "sum", False, True)


def test_functions_and_modules_name_their_arguments() -> None:
    weight, indices = ONE_HOT.weight, ONE_HOT.indices
    with pytest.raises(ValueError, match="ffm_interaction: output = 'max' is not one of sum, dot, hadamard"):
        ffm_interaction(weight, indices, output="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ffm_interaction: grad = 'none' is not one of dense, sparse"):
        ffm_interaction(weight, indices, grad="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_fields is needed where weight is"):
        ffm_interaction(weight.flatten(1), CSR.indices, CSR.fields, None, CSR.offsets)
    with pytest.raises(ValueError, match="weight has 12 columns, which is no multiple of num_fields = 5"):
        ffm_interaction(weight.flatten(1), CSR.indices, CSR.fields, None, CSR.offsets, num_fields=5)
    with pytest.raises(ValueError, match=r"weight must be \[N, F, K\] or \[N, F·K\], got shape \[132\]"):
        ffm_interaction(weight.flatten(), indices)
    with pytest.raises(ValueError, match="FFMInteraction: num_features = 0 must be positive"):
        ffm_ext.FFMInteraction(0, 3, 4)
    layer = ffm_ext.FFMInteraction(11, 3, 4)
    with pytest.raises(TypeError, match="FFMInteraction: x must be a tensor or a SparseBatch, got list"):
        layer([[0, 1, 2]])
    with pytest.raises(ValueError, match="FFMInteraction: values belong inside the SparseBatch"):
        layer(ffm_ext.SparseBatch.from_lists([[(0, 0, 1.0)]]), torch.ones(1))
    with pytest.raises(IndexError, match=r"ffm_forward: indices\[0, 1\] = 11 is out of range"):
        layer(torch.tensor([[0, 11, 2]]))


def test_lists_need_not_be_contiguous() -> None:
    wide = replaced(ONE_HOT, indices=ONE_HOT.indices.t().contiguous().t(), values=ONE_HOT.values.t().contiguous().t())
    assert not wide.indices.is_contiguous()
    torch.testing.assert_close(forward(wide), forward(ONE_HOT), rtol=0, atol=0)
    gradient = torch.ones(7, 2)[:, 0]
    for found, expected in zip(ops.ffm_backward(gradient, *wide.args, "sum", False, True), backward(ONE_HOT)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("within_field", [False, True])
@pytest.mark.parametrize("output", ["sum", "dot", "hadamard"])
@pytest.mark.parametrize("F", [1, 3])
def test_nothing_in(output: str, within_field: bool, F: int) -> None:
    terms = F * (F - 1) // 2 + (F if within_field else 0)
    tail = {"sum": (), "dot": (terms,), "hadamard": (terms, 1)}[output]
    weight = torch.ones(4, F, 1, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    cases = {
        0: [(torch.zeros(0, F, dtype=torch.int64),), (none, none, None, torch.zeros(1, dtype=torch.int64))],
        5: [(none, none, None, torch.zeros(6, dtype=torch.int64))],
    }
    for B, batches in cases.items():
        for batch in batches:
            for grad in ("dense", "sparse"):
                weight.grad = None
                out = ffm_interaction(
                    weight, *batch, output=output, within_field=within_field, grad=grad  # type: ignore[arg-type]
                )
                assert out.shape == (B, *tail)
                assert (out == 0).all()
                out.sum().backward()
                assert weight.grad is not None
                assert weight.grad.is_sparse == (grad == "sparse")
                assert (weight.grad.to_dense() == 0).all()


@settings(max_examples=200)
@given(st.data())
def test_no_input_crashes(data: st.DataObject) -> None:
    """Random lists, mostly malformed: they raise, or give what the reference gives."""
    small = st.integers(-1, 4)
    nnz = data.draw(st.integers(0, 6))
    indices = torch.tensor(data.draw(st.lists(small, min_size=nnz, max_size=nnz)), dtype=torch.int64)
    fields = torch.tensor(data.draw(st.lists(small, min_size=nnz, max_size=nnz)), dtype=torch.int64)
    offsets = torch.tensor(data.draw(st.lists(st.integers(-1, 7), max_size=5)), dtype=torch.int64)
    weight = torch.arange(5 * 3 * 2, dtype=torch.float64).view(5, 3, 2)
    ends = offsets.tolist()
    valid = (
        len(ends) > 0
        and ends[0] == 0
        and ends[-1] == nnz
        and ends == sorted(ends)
        and bool(((indices >= 0) & (fields >= 0) & (fields < 3)).all())
    )
    if not valid:
        with pytest.raises((ValueError, IndexError), match="^ffm_forward: "):
            ffm_interaction(weight, indices, fields, None, offsets)
        return
    found = ffm_interaction(weight, indices, fields, None, offsets)
    expected = ffm_ext.reference.ffm_interaction(weight, indices, fields, None, offsets, grad="dense")
    torch.testing.assert_close(found, expected)
