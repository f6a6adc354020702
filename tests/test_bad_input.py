# SPDX-License-Identifier: MIT
"""What every bad argument is answered with, and what the edges of the good ones give."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    FORMS,
    OUTPUTS,
    Problem,
    by_definition,
    evaluate,
    grad_output,
    here,
    make_problem,
    output_shape,
    with_entry,
)

import ffm_ext
from ffm_ext import FFM, FM, FFMInteraction, FieldAwareFactorizationMachine, SparseBatch
from ffm_ext.functional import ffm_interaction

ops = torch.ops.ffm_ext

OPERATORS = ("ffm_forward", "ffm_backward", "ffm_backward_sparse", "ffm_backward_values")

# 11 features, 3 fields, 4 factors; 7 samples, 20 entries in the CSR form, which begin at 0, 3, 3, 4, 7, 12, 15, 21.
ONE_HOT = make_problem("one-hot values", 3, 4)
CSR = make_problem("csr values", 3, 4)
NNZ = CSR.indices.numel()


def call(name: str, problem: Problem, output: str = "sum", seed: torch.Tensor | None = None) -> Any:
    """An operator on a problem that may be anything."""
    if not problem.weight.is_meta and problem.weight.device != here():
        problem = problem.to(device=here())
        seed = None if seed is None or seed.is_meta else seed.to(here())
    if name == "ffm_forward":
        return ops.ffm_forward(*problem.args, output, False)
    if seed is None:
        seed = torch.ones(7, dtype=problem.weight.dtype, device=problem.weight.device)
    flags = () if name == "ffm_backward_values" else (problem.values is not None,)
    return getattr(ops, name)(seed, *problem.args, output, False, *flags)


def raises(error: type[Exception], message: str) -> Any:
    """The text, up to the note on the call that C++ may add to it."""
    return pytest.raises(error, match="^" + re.escape(message) + "(\n|$)")


Case = tuple[str, Problem, type[Exception], str]


def cases() -> list[Case]:
    out_of_table = "is out of range for a table of 11 features"
    out_of_fields = "is out of range for 3 fields"
    found: list[Case] = []
    for ids, big in ((torch.int64, 2**62), (torch.int32, 2**31 - 1)):
        one_hot, csr, of = ONE_HOT.to(ids=ids), CSR.to(ids=ids), f"{ids}".removeprefix("torch.")
        for bad in (-1, 11, big, -big - 1):
            at = f"indices[2, 1] = {bad}"
            found += [
                (f"one-hot {of} id {bad}", with_entry(one_hot, "indices", 7, bad), IndexError,
                 f"{at} {out_of_table}"),
                (f"csr {of} id {bad}", with_entry(csr, "indices", 7, bad), IndexError,
                 f"indices[7] = {bad} {out_of_table}"),
            ]  # fmt: skip
        for bad in (-1, 3, big, -big - 1):
            found.append(
                (f"csr {of} field {bad}", with_entry(csr, "fields", 5, bad), IndexError,
                 f"fields[5] = {bad} {out_of_fields}")
            )  # fmt: skip
        for position, bad, text in (
            (0, 1, "offsets[0] = 1 must be 0"),
            (0, -1, "offsets[0] = -1 must be 0"),
            (4, 2, "offsets[4] = 2 is less than offsets[3] = 4"),
            (4, -7, "offsets[4] = -7 is less than offsets[3] = 4"),
            (4, big, f"offsets[5] = 12 is less than offsets[4] = {big}"),
            (7, NNZ - 1, f"offsets[7] = {NNZ - 1} must be the number of entries, {NNZ}"),
            (7, NNZ + 1, f"offsets[7] = {NNZ + 1} must be the number of entries, {NNZ}"),
        ):
            problem = with_entry(csr, "offsets", position, bad)
            found.append((f"csr {of} offsets[{position}] {bad}", problem, ValueError, text))
    last = with_entry(ONE_HOT, "indices", 20, 11)
    found.append(("last id", last, IndexError, f"indices[6, 2] = 11 {out_of_table}"))
    last = with_entry(CSR, "indices", NNZ - 1, 11)
    found.append(("last csr id", last, IndexError, f"indices[{NNZ - 1}] = 11 {out_of_table}"))

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for bad in (math.nan, math.inf, -math.inf):
            one_hot, csr, of = ONE_HOT.to(dtype), CSR.to(dtype), f"{dtype}".removeprefix("torch.")
            found += [
                (f"one-hot {of} value {bad}", with_entry(one_hot, "values", 7, bad), ValueError,
                 f"values[2, 1] = {bad} is not finite"),
                (f"csr {of} value {bad}", with_entry(csr, "values", NNZ - 1, bad), ValueError,
                 f"values[{NNZ - 1}] = {bad} is not finite"),
            ]  # fmt: skip

    for form, problem in (("one-hot", ONE_HOT), ("csr", CSR)):
        weight, indices, values = problem.weight, problem.indices, problem.values
        assert values is not None
        shape = f"{list(indices.shape)}"
        wide = weight.transpose(1, 2).contiguous().transpose(1, 2)
        for what, changed, text in (
            ("weight int", {"weight": weight.long()},
             "weight must be float32, float64, bfloat16 or float16, got int64"),
            ("weight 2-D", {"weight": weight.flatten(1)},
             "weight must be [N, F, K], got shape [11, 12]"),
            ("weight 4-D", {"weight": weight[None]},
             "weight must be [N, F, K], got shape [1, 11, 3, 4]"),
            ("weight F 0", {"weight": weight[:, :0].contiguous()},
             "weight has shape [11, 0, 4]: F and K must be positive"),
            ("weight K 0", {"weight": weight[:, :, :0].contiguous()},
             "weight has shape [11, 3, 0]: F and K must be positive"),
            ("weight strided", {"weight": wide},
             "weight is not contiguous (strides 12, 1, 3); call .contiguous() once where it is made"),
            ("indices float", {"indices": indices.float()},
             "indices must be int32 or int64, got float32"),
            ("indices int16", {"indices": indices.short()},
             "indices must be int32 or int64, got int16"),
            ("indices bool", {"indices": indices.bool()},
             "indices must be int32 or int64, got bool"),
            ("indices 3-D", {"indices": indices.view(1, 1, -1)},
             f"indices must be [B, F] or [nnz], got shape [1, 1, {indices.numel()}]"),
            ("indices 0-D", {"indices": indices.flatten()[0]},
             "indices must be [B, F] or [nnz], got shape []"),
            ("values float64", {"values": values.double()},
             "values is float64, weight is float32"),
            ("values int", {"values": values.long()}, "values is int64, weight is float32"),
            ("values short", {"values": values[:-1]},
             f"values has shape {list(values[:-1].shape)}, indices has {shape}"),
            ("values of another form", {"values": values[None]},
             f"values has shape {list(values[None].shape)}, indices has {shape}"),
        ):  # fmt: skip
            found.append((f"{form} {what}", replace(problem, **changed), ValueError, text))

    assert CSR.fields is not None and CSR.offsets is not None
    for what, problem, changed, text in (
        ("F", ONE_HOT, {"indices": ONE_HOT.indices[:, :2], "values": None},
         "indices has shape [7, 2], but weight has 3 fields"),
        ("fields with [B, F]", ONE_HOT, {"fields": ONE_HOT.indices},
         "indices is [B, F], so fields must be None"),
        ("offsets with [B, F]", ONE_HOT, {"offsets": CSR.offsets},
         "indices is [B, F], so offsets must be None"),
        ("no fields", CSR, {"fields": None}, "indices is [nnz], so fields is needed too"),
        ("no offsets", CSR, {"offsets": None}, "indices is [nnz], so offsets is needed too"),
        ("fields float", CSR, {"fields": CSR.fields.float()},
         "fields must be int32 or int64, got float32"),
        ("offsets float", CSR, {"offsets": CSR.offsets.double()},
         "offsets must be int32 or int64, got float64"),
        ("fields short", CSR, {"fields": CSR.fields[:-1]},
         f"fields has shape [{NNZ - 1}], indices has [{NNZ}]"),
        ("fields 2-D", CSR, {"fields": CSR.fields[None]},
         f"fields must have one dimension, got shape [1, {NNZ}]"),
        ("offsets 2-D", CSR, {"offsets": CSR.offsets[None]},
         "offsets must have one dimension, got shape [1, 8]"),
        ("offsets 0-D", CSR, {"offsets": CSR.offsets[0]},
         "offsets must have one dimension, got shape []"),
        ("offsets empty", CSR, {"offsets": CSR.offsets[:0]},
         "offsets is empty; it needs a sample count plus one entries"),
    ):  # fmt: skip
        found.append((what, replace(problem, **changed), ValueError, text))
    return found


CASES = cases()
case = pytest.mark.parametrize(
    ("problem", "error", "text"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tensor", "position", "bad", "error", "text"),
    [
        (
            "indices",
            7,
            11,
            IndexError,
            "indices[7] = 11 is out of range for a table of 11 features",
        ),
        ("fields", 20, 3, IndexError, "fields[20] = 3 is out of range for 3 fields"),
        ("offsets", 7, 20, ValueError, "offsets[7] = 20 must be the number of entries, 21"),
    ],
)
def test_a_list_that_is_nearly_a_matrix(
    ids: torch.dtype, tensor: str, position: int, bad: int, error: type[Exception], text: str
) -> None:
    fields, offsets = torch.arange(3).repeat(7), torch.arange(8) * 3
    listed = Problem(ONE_HOT.weight, ONE_HOT.indices.flatten(), fields, None, offsets).to(ids=ids)
    assert torch.equal(
        call("ffm_forward", listed), call("ffm_forward", replace(ONE_HOT, values=None))
    )
    with raises(error, f"ffm_forward: {text}"):
        call("ffm_forward", with_entry(listed, tensor, position, bad))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", ["matrix", "list", "list of a matrix"])
def test_many_entries(form: str, ids: torch.dtype, threads: int) -> None:
    """So many that threads share the look at them: wherever something is wrong, it is found and named."""
    B, F, N = 40_000, 3, 11
    indices, values = torch.randint(N, (B, F), dtype=ids), torch.ones(B, F)
    good = Problem(torch.ones(N, F, 4), indices, None, values, None)
    if form != "matrix":
        fields = torch.arange(F, dtype=ids).repeat(B)
        if form == "list":
            fields[:2] = torch.tensor([1, 0])
        offsets = torch.arange(B + 1, dtype=ids) * F
        good = Problem(good.weight, indices.flatten(), fields, values.flatten(), offsets)
    call("ffm_forward", good)
    for position in (0, B * F // 2 - 1, B * F // 2, B * F - 1):
        where = f"[{position // F}, {position % F}]" if form == "matrix" else f"[{position}]"
        for bad in (-1, N, torch.iinfo(ids).min, torch.iinfo(ids).max):
            text = f"indices{where} = {bad} is out of range for a table of 11 features"
            with raises(IndexError, f"ffm_forward: {text}"):
                call("ffm_forward", with_entry(good, "indices", position, bad))
        with raises(ValueError, f"ffm_forward: values{where} = nan is not finite"):
            call("ffm_forward", with_entry(good, "values", position, math.nan))
        if form != "matrix":
            with raises(
                IndexError, f"ffm_forward: fields[{position}] = 3 is out of range for 3 fields"
            ):
                call("ffm_forward", with_entry(good, "fields", position, 3))


@case
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(
    name: str, problem: Problem, error: type[Exception], text: str, device: torch.device
) -> None:
    if name == "ffm_backward_values" and problem.values is None:
        problem = replace(problem, values=torch.ones_like(problem.indices, dtype=torch.float32))
    with raises(error, f"{name}: {text}"):
        call(name, problem)


@case
def test_function(problem: Problem, error: type[Exception], text: str) -> None:
    """The function says the same, or says it before the operator does."""
    if problem.weight.dim() == problem.indices.dim() == 2:
        assert ffm_interaction(*problem.args).shape == (7,)  # [N, F·K] is good here
        return
    for requires_grad in (False, problem.weight.is_floating_point()):
        weight = problem.weight.detach().requires_grad_(requires_grad)
        with pytest.raises(error) as caught:
            ffm_interaction(weight, *problem.args[1:])
        message = str(caught.value)
        assert message.startswith((f"ffm_forward: {text}", "ffm_interaction: ")), message


@pytest.mark.parametrize("form", FORMS)
def test_output_and_grad_modes(form: str) -> None:
    problem = make_problem(form, 3, 4)
    for name in OPERATORS:
        if name == "ffm_backward_values" and problem.values is None:
            continue
        with raises(ValueError, f"{name}: output = 'max' is not one of sum, dot, hadamard"):
            call(name, problem, output="max")
    for interaction, where in (
        (ffm_interaction, "ffm_interaction"),
        (ffm_ext.reference.ffm_interaction, "reference.ffm_interaction"),
    ):
        with raises(ValueError, f"{where}: output = 'max' is not one of sum, dot, hadamard"):
            interaction(*problem.args, output="max")  # type: ignore[arg-type]
        with raises(ValueError, f"{where}: grad = 'fast' is not one of dense, sparse, atomic"):
            interaction(*problem.args, grad="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("problem", [ONE_HOT, CSR], ids=["one-hot", "csr"])
@pytest.mark.parametrize("name", OPERATORS[1:])
def test_grad_output(name: str, problem: Problem, device: torch.device) -> None:
    for seed, text in (
        (torch.ones(6), "grad_output has shape [6], which is not that of the output"),
        (torch.ones(7, 1), "grad_output has shape [7, 1], which is not that of the output"),
        (torch.ones(()), "grad_output has shape [], which is not that of the output"),
        (torch.ones(7).double(), "grad_output is float64, weight is float32"),
    ):
        with raises(ValueError, f"{name}: {text}"):
            call(name, problem, seed=seed)
    for output, shape in (("dot", (7, 2)), ("hadamard", (7, 3, 3))):
        text = f"grad_output has shape {list(shape)}, which is not that of the output"
        with raises(ValueError, f"{name}: {text}"):
            call(name, problem, output, seed=torch.ones(shape))


@pytest.mark.parametrize("form", ["one-hot", "csr"])
@pytest.mark.parametrize("name", ["ffm_backward", "ffm_backward_sparse"])
def test_values_grad_without_values(name: str, form: str) -> None:
    problem = make_problem(form, 3, 4)
    with raises(ValueError, f"{name}: values_grad is set, but values is None"):
        getattr(ops, name)(torch.ones(7), *problem.args, "sum", False, True)


@pytest.mark.parametrize("name", OPERATORS)
def test_devices_that_differ(name: str) -> None:
    """One tensor without data among others that have it: never memory that nobody wrote."""
    for problem in (ONE_HOT, CSR):
        seed = torch.ones(problem.batch_size)
        for argument in ("weight", "indices", "fields", "values", "offsets"):
            tensor = getattr(problem, argument)
            if tensor is None:
                continue
            wrong = replace(problem, **{argument: tensor.to("meta")})
            # Any argument may be named where it is the table that differs from the rest.
            named = "" if argument == "weight" else f"{argument} is on "
            with pytest.raises((ValueError, RuntimeError), match=f"{name}: {named}"):
                call(name, wrong, seed=seed)
        if name != "ffm_forward":
            with pytest.raises((ValueError, RuntimeError), match=f"{name}: grad_output is on "):
                call(name, problem, seed=seed.to("meta"))


def test_gather_sum() -> None:
    weight, indices = ONE_HOT.weight, ONE_HOT.indices
    bad = with_entry(ONE_HOT, "indices", 7, 11).indices
    with raises(
        IndexError, "gather_sum: indices[2, 1] = 11 is out of range for a table of 11 features"
    ):
        ops.gather_sum(weight, bad)
    with raises(ValueError, "gather_sum: indices is [nnz], so fields is needed too"):
        ops.gather_sum(weight, indices.flatten())
    with pytest.raises((ValueError, RuntimeError), match="gather_sum: indices is on "):
        ops.gather_sum(weight, indices.to("meta"))


@pytest.mark.parametrize("interaction", [ffm_interaction, ffm_ext.reference.ffm_interaction])
def test_shape_of_the_table(interaction: Callable[..., torch.Tensor]) -> None:
    where = "ffm_interaction"
    if interaction is not ffm_interaction:
        where = "reference.ffm_interaction"
    matrix = CSR.weight.flatten(1)
    lists = CSR.args[1:]
    with raises(
        ValueError, f"{where}: num_fields is needed where weight is [N, F·K] and indices is [nnz]"
    ):
        interaction(matrix, *lists)
    for num_fields in (5, 0, -3):
        with raises(
            ValueError,
            f"{where}: weight has 12 columns, which is no multiple of num_fields = {num_fields}",
        ):
            interaction(matrix, *lists, num_fields=num_fields)
    with raises(ValueError, f"{where}: num_fields = 4, but weight has shape [11, 3, 4]"):
        interaction(CSR.weight, *lists, num_fields=4)
    with raises(
        ValueError, f"{where}: weight must be [N, F, K] or [N, F·K], got shape [11, 3, 4, 1]"
    ):
        interaction(CSR.weight[..., None], *lists)


@pytest.mark.parametrize("name", ["fields", "offsets"])
def test_lists_that_are_not_whole(name: str) -> None:
    for where, interaction in (
        ("ffm_forward", ffm_interaction),
        ("reference.ffm_interaction", ffm_ext.reference.ffm_interaction),
    ):
        with raises(ValueError, f"{where}: indices is [nnz], so {name} is needed too"):
            interaction(*replace(CSR, **{name: None}).args)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- modules


def interactions() -> list[torch.nn.Module]:
    return [FFMInteraction(11, 3, 4), FFM(4, num_features=11, num_fields=3)]


@pytest.mark.parametrize("module", interactions(), ids=lambda m: type(m).__name__)
def test_modules(module: torch.nn.Module) -> None:
    name = type(module).__name__
    with raises(
        IndexError, "ffm_forward: indices[2, 1] = 11 is out of range for a table of 11 features"
    ):
        module(with_entry(ONE_HOT, "indices", 7, 11).indices)
    with raises(ValueError, "ffm_forward: indices has shape [7, 2], but weight has 3 fields"):
        module(ONE_HOT.indices[:, :2])
    with raises(ValueError, "ffm_forward: values[2, 1] = nan is not finite"):
        module(ONE_HOT.indices, with_entry(ONE_HOT, "values", 7, math.nan).values)
    with raises(ValueError, f"{name}: ids must be [B, F], got shape [21]"):
        module(ONE_HOT.indices.flatten())
    with raises(ValueError, f"{name}: values has shape [7, 2], ids have [7, 3]"):
        module(ONE_HOT.indices, torch.ones(7, 2))
    batch = SparseBatch(*CSR.args[1:3], CSR.values, CSR.offsets)  # type: ignore[arg-type]
    with raises(ValueError, f"{name}: values belong inside the SparseBatch"):
        module(batch, batch.values)
    with raises(TypeError, f"{name}: x must be a tensor or a SparseBatch, got list"):
        module([[0, 1, 2]])
    for problem, error, text in CASES_OF_BATCHES:
        bad = SparseBatch(problem.indices, problem.fields, problem.values, problem.offsets)  # type: ignore[arg-type]
        with raises(error, f"ffm_forward: {text}"):
            module(bad)


# What a SparseBatch lets through because only the operator can see it.
CASES_OF_BATCHES = [
    (problem, error, text)
    for name, problem, error, text in CASES
    if re.match(r"csr int64 (id|field|offsets)|csr float32 value", name)
]


@pytest.mark.parametrize(
    ("problem", "text"),
    [(c[0], c[2]) for c in CASES_OF_BATCHES if not c[2].startswith("fields")],
    ids=lambda case: case.split(" is ")[0] if isinstance(case, str) else "",
)
def test_fm(problem: Problem, text: str) -> None:
    """``FM`` uses no operator of ours, but is held to the same: it raises, and names what was wrong."""
    assert problem.fields is not None and problem.offsets is not None
    batch = SparseBatch(problem.indices, problem.fields, problem.values, problem.offsets)
    argument = re.split(r"\W", text)[0]
    with pytest.raises((ValueError, IndexError), match=argument):
        FM(11, 4)(batch)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_table_ids(ids: torch.dtype, threads: int) -> None:
    B, starts = 40_000, torch.tensor([0, 5, 5, 12])
    good = torch.stack([torch.randint(5, (B,)), torch.zeros(B), torch.randint(7, (B,))], 1).to(ids)
    starts_of_two = starts[[0, 1, 3]]
    found = ops.ffm_table_ids(good[:, ::2], starts_of_two, "here")
    assert found.dtype == ids
    assert torch.equal(found, good[:, ::2] + starts_of_two[:-1].to(ids))
    with raises(IndexError, "here: indices[0, 1] = 0 is out of range for field 1 of 0 features"):
        ops.ffm_table_ids(good, starts, "here")
    for b in (0, B // 2, B - 1):
        for bad in (-1, 5, torch.iinfo(ids).min, torch.iinfo(ids).max):
            wrong = good[:, ::2].clone()
            wrong[b, 0] = bad
            text = f"here: indices[{b}, 0] = {bad} is out of range for field 0 of 5 features"
            with raises(IndexError, text):
                ops.ffm_table_ids(wrong, starts_of_two, "here")
    with raises(ValueError, "here: ids must be [B, 3], one column a field, got [40000, 2]"):
        ops.ffm_table_ids(good[:, :2], starts, "here")
    with raises(ValueError, "here: starts must be int64 [F + 1], got int32 [4]"):
        ops.ffm_table_ids(good, starts.int(), "here")
    with raises(ValueError, "here: indices must be int32 or int64, got float32"):
        ops.ffm_table_ids(good.float(), starts, "here")
    large = torch.tensor([0, 5, 2**31 + 1])
    if ids == torch.int64:
        assert ops.ffm_table_ids(torch.tensor([[4, 2**31 - 5]]), large, "here")[0, 1] == 2**31
    else:
        text = (
            "here: indices are int32, which cannot hold the ids of a table of 2147483649 features"
        )
        with pytest.raises(ValueError, match=re.escape(text)):
            ops.ffm_table_ids(good[:, ::2], large, "here")


def test_local_ids() -> None:
    """An id past the end of its field is not one of the next field."""
    for module, name in (
        (FFM(4, field_dims=[4, 5, 2]), "FFM"),
        (FFM(4, fields={"a": 4, "b": 5, "c": 2}), "FFM"),
        (FieldAwareFactorizationMachine([4, 5, 2], 4), "FieldAwareFactorizationMachine"),
    ):
        good = torch.tensor([[0, 0, 0], [3, 4, 1]])
        assert module(good).shape[0] == 2
        for bad in (5, -1):
            ids = good.clone()
            ids[1, 1] = bad
            message = f"{name}: indices[1, 1] = {bad} is out of range for field 1 of 5 features"
            with raises(IndexError, message):
                module(ids)
        with raises(ValueError, f"{name}: ids must be [B, 3], one column a field, got [2, 2]"):
            module(good[:, :2])
        with raises(ValueError, f"{name}: ids must be [B, 3], one column a field, got [3]"):
            module(good[0])


def test_sizes_of_modules() -> None:
    for sizes, text in (
        ((0, 3, 4), "num_features = 0 must be positive"),
        ((11, -1, 4), "num_fields = -1 must be positive"),
        ((11, 3, 0), "embed_dim = 0 must be positive"),
    ):
        with raises(ValueError, f"FFMInteraction: {text}"):
            FFMInteraction(*sizes)
        with raises(ValueError, f"FFM: {text}"):
            FFM(sizes[2], num_features=sizes[0], num_fields=sizes[1])
    described: dict[str, Callable[[Any], torch.nn.Module]] = {
        "FFM": lambda dims: FFM(4, field_dims=dims),
        "FieldAwareFactorizationMachine": lambda dims: FieldAwareFactorizationMachine(dims, 4),
    }
    for name, make in described.items():
        with raises(ValueError, f"{name}: num_fields = 0 must be positive"):
            make([])
        with raises(ValueError, f"{name}: field_dims[1] = -2 must be positive"):
            make([5, -2])
        with raises(TypeError, f"{name}: field_dims[1] = 2.5 must be an integer"):
            make([5, 2.5])
    with raises(ValueError, "FFMInteraction: output = 'max' is not one of sum, dot, hadamard"):
        FFMInteraction(11, 3, 4, output="max")  # type: ignore[arg-type]
    with raises(ValueError, "FFMInteraction: grad = 'fast' is not one of dense, sparse, atomic"):
        FFMInteraction(11, 3, 4, grad="fast")  # type: ignore[arg-type]
    with raises(ValueError, "FM: num_features = 0 must be positive"):
        FM(0, 4)
    with raises(ValueError, "FM: grad = 'fast' is not one of dense, sparse, atomic"):
        FM(11, 4, grad="fast")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ edges


def empty_problems() -> dict[str, Problem]:
    weight, none = CSR.weight, torch.empty(0, dtype=torch.int64)
    values = torch.empty(0)
    return {
        "one-hot B=0": Problem(weight, none.view(0, 3)),
        "one-hot values B=0": Problem(weight, none.view(0, 3), values=values.view(0, 3)),
        "csr B=0": Problem(weight, none, none, None, torch.zeros(1, dtype=torch.int64)),
        "csr values B=0": Problem(weight, none, none, values, torch.zeros(1, dtype=torch.int64)),
        "csr nnz=0": Problem(weight, none, none, None, torch.zeros(5, dtype=torch.int64)),
        "csr values nnz=0": Problem(weight, none, none, values, torch.zeros(5, dtype=torch.int64)),
        "no features": Problem(weight[:0], none, none, values, torch.zeros(5, dtype=torch.int64)),
        "no features B=0": Problem(weight[:0], none.view(0, 3)),
    }


@pytest.mark.parametrize("within_field", [False, True], ids=["", "within"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", empty_problems())
def test_nothing_gives_zero(
    name: str,
    output: str,
    within_field: bool,
    dtype: torch.dtype,
    threads: int,
    device: torch.device,
) -> None:
    problem = empty_problems()[name].to(dtype, device=device)
    shape = output_shape(problem, output, within_field)
    modes = {"output": output, "within_field": within_field}
    for interaction, grad in itertools.product(
        (ffm_interaction, ffm_ext.reference.ffm_interaction), ("dense", "sparse")
    ):
        seed = torch.ones(shape, dtype=dtype, device=device)
        found = evaluate(interaction, problem, seed, grad=grad, **modes)
        assert found.output.shape == shape
        assert not found.output.any()
        assert found.grad_weight.shape == problem.weight.shape
        assert not found.grad_weight.any()
        if problem.values is not None:
            assert found.grad_values is not None
            assert found.grad_values.shape == problem.values.shape


@pytest.mark.parametrize("form", FORMS)
def test_one_field_one_factor(form: str, device: torch.device) -> None:
    """F = 1: no pairs of fields; P = 0."""
    for embed_dim in (1, 4):
        problem = make_problem(form, 1, embed_dim)
        for output, grad in itertools.product(OUTPUTS, ("dense", "sparse")):
            seed = grad_output(problem, output, False)
            found = evaluate(
                ffm_interaction, problem, seed, output=output, within_field=False, grad=grad
            )
            shape = {"sum": (7,), "dot": (7, 0), "hadamard": (7, 0, embed_dim)}[output]
            assert found.output.shape == shape
            assert not found.output.any()
            assert not found.grad_weight.any()


@pytest.mark.parametrize("module", [*interactions(), FM(11, 4)], ids=lambda m: type(m).__name__)
def test_modules_of_nothing(module: torch.nn.Module) -> None:
    for name, problem in empty_problems().items():
        if name.startswith("no features"):
            continue
        batch: Any = problem.indices
        if problem.fields is not None and problem.offsets is not None:
            batch = SparseBatch(problem.indices, problem.fields, problem.values, problem.offsets)
        out = module(batch)
        assert out.shape == (problem.batch_size,)
        assert not out.any()
        out.sum().backward()


def strided(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same elements, not contiguous."""
    if tensor is None:
        return None
    doubled = torch.stack([tensor, torch.full_like(tensor, -1)], dim=-1)[..., 0]
    assert not doubled.is_contiguous()
    assert torch.equal(doubled, tensor)
    return doubled


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_strided_lists_are_accepted(form: str, output: str, device: torch.device) -> None:
    problem = make_problem(form, 3, 4)
    lists = [strided(tensor) for tensor in problem.args[1:]]
    for name in OPERATORS:
        if name == "ffm_backward_values" and problem.values is None:
            continue
        seed = grad_output(problem, output, False)
        other = Problem(problem.weight, *lists)  # type: ignore[arg-type]
        wanted = call(name, problem, output, seed)
        found = call(name, other, output, strided(seed))
        if isinstance(wanted, torch.Tensor):
            wanted, found = [wanted], [found]
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()
    transposed = problem.indices.t().contiguous().t() if problem.offsets is None else None
    if transposed is not None:
        found = ffm_interaction(problem.weight, transposed, values=problem.values)
        assert torch.equal(found, ffm_interaction(*problem.args))


def test_a_row_slice_of_a_table_is_contiguous() -> None:
    weight = torch.randn(20, 3, 4)
    found = ffm_interaction(weight[5:16], ONE_HOT.indices)
    assert torch.equal(found, ffm_interaction(weight[5:16].clone(), ONE_HOT.indices))


integers = st.integers(-2, 8) | st.sampled_from([-(2**63), -(2**31), 2**31, 2**62])
small = st.integers(0, 3)


@given(
    indices=st.lists(small | integers, max_size=6),
    fields=st.lists(st.integers(0, 1) | integers, max_size=6),
    values=st.none() | st.lists(st.floats(width=32), max_size=6),
    offsets=st.lists(st.integers(0, 6) | integers, max_size=5),
    int32=st.booleans(),
    output=st.sampled_from(OUTPUTS),
    within_field=st.booleans(),
)
def test_malformed_batches_raise(
    indices: list[int],
    fields: list[int],
    values: list[float] | None,
    offsets: list[int],
    int32: bool,
    output: str,
    within_field: bool,
) -> None:
    """Whatever the lists hold: an error, or the right answer."""

    def ids(entries: list[int]) -> torch.Tensor:
        tensor = torch.tensor(entries, dtype=torch.int64)
        return tensor.int() if int32 else tensor

    weight = torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 2, 2)
    reals = None if values is None else torch.tensor(values, dtype=torch.float64)
    problem = Problem(weight, ids(indices), ids(fields), reals, ids(offsets))
    check_or_raise(problem, output, within_field)


@given(data=st.data())
def test_nearly_well_formed_batches(data: st.DataObject) -> None:
    """Batches that are right but for one entry at most: both outcomes come up often."""
    counts = data.draw(st.lists(small, max_size=4))
    nnz = sum(counts)
    indices = data.draw(st.lists(small, min_size=nnz, max_size=nnz))
    fields = data.draw(st.lists(st.integers(0, 1), min_size=nnz, max_size=nnz))
    offsets = [sum(counts[:i]) for i in range(len(counts) + 1)]
    lists = [indices, fields, offsets]
    broken = data.draw(st.none() | st.sampled_from(lists))
    if broken:
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(integers)
    weight = torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 2, 2)
    tensors = [torch.tensor(entries, dtype=torch.int64) for entries in lists]
    problem = Problem(weight, tensors[0], tensors[1], None, tensors[2])
    check_or_raise(problem, data.draw(st.sampled_from(OUTPUTS)), data.draw(st.booleans()))


def is_well_formed(problem: Problem) -> bool:
    fields, offsets, values = problem.fields, problem.offsets, problem.values
    assert fields is not None and offsets is not None
    nnz = len(problem.indices)
    ends = offsets.tolist()
    return (
        len(fields) == nnz
        and (values is None or (len(values) == nnz and bool(values.isfinite().all())))
        and all(0 <= a < len(problem.weight) for a in problem.indices.tolist())
        and all(0 <= f < problem.num_fields for f in fields.tolist())
        and bool(ends)
        and ends == sorted(ends)
        and (ends[0], ends[-1]) == (0, nnz)
    )


def check_or_raise(problem: Problem, output: str, within_field: bool) -> None:
    modes = {"output": output, "within_field": within_field}
    if not is_well_formed(problem):
        for name in OPERATORS:
            if name != "ffm_backward_values" or problem.values is not None:
                with pytest.raises((ValueError, IndexError), match=f"^{name}: "):
                    call(name, problem, output)
        return
    seed = torch.ones(output_shape(problem, output, within_field), dtype=torch.float64)
    wanted = evaluate(by_definition, problem, seed, **modes)
    for grad in ("dense", "sparse"):
        found = evaluate(ffm_interaction, problem, seed, grad=grad, **modes)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
