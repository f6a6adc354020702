# SPDX-License-Identifier: MIT
"""The fused interaction and its gradients against the reference, and the reference against the definition."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from problems import (
    FORMS,
    OUTPUTS,
    Expected,
    Interaction,
    Problem,
    by_definition,
    evaluate,
    grad_output,
    make_problem,
    num_threads,
)

import ffm_ext
from ffm_ext.functional import ffm_interaction

SHAPES = list(itertools.product((1, 2, 3, 7, 39), (1, 3, 4, 5, 8, 10, 16, 24)))  # F, K
# Shapes of the tests that take a batch large enough for two threads: csrc/cpu/ffm.cpp wants 2^15 elements of table rows
# for each of them.
THREADED_SHAPES = [(7, 5), (39, 4)]
THREADED_ELEMENTS = 2 * 2**15


within = pytest.mark.parametrize("within_field", [False, True], ids=["", "within"])
outputs = pytest.mark.parametrize("output", OUTPUTS)
forms = pytest.mark.parametrize("form", FORMS)


@within
@outputs
@forms
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_reference_is_the_definition(form: str, output: str, within_field: bool, grad: str) -> None:
    modes = {"output": output, "within_field": within_field}
    for num_fields, embed_dim in SHAPES:
        problem = make_problem(form, num_fields, embed_dim, dtype=torch.float64)
        seed = grad_output(problem, output, within_field)
        wanted = evaluate(by_definition, problem, seed, **modes)
        found = evaluate(ffm_ext.reference.ffm_interaction, problem, seed, grad=grad, **modes)
        # The squares that the reference takes apart are larger than the pairs that stay.
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


@within
@outputs
@forms
def test_fused_matches_reference(
    form: str, output: str, within_field: bool, dtype: torch.dtype, device: torch.device
) -> None:
    modes = {"output": output, "within_field": within_field}
    for num_fields, embed_dim in SHAPES:
        problem = make_problem(form, num_fields, embed_dim, dtype=dtype)
        seed = grad_output(problem, output, within_field)
        expected = Expected.of(problem, seed, **modes)
        for grad in ("dense", "sparse"):
            found = evaluate(ffm_interaction, problem, seed, grad=grad, **modes)
            expected.check(found, dtype, f"F={num_fields} K={embed_dim} {grad}")
            int32 = evaluate(ffm_interaction, problem.to(ids=torch.int32), seed, grad=grad, **modes)
            for a, b in zip(found, int32, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


@within
@outputs
@forms
def test_fused_matches_reference_threaded(
    form: str, output: str, within_field: bool, dtype: torch.dtype
) -> None:
    modes = {"output": output, "within_field": within_field}
    for num_fields, embed_dim in THREADED_SHAPES:
        batch_size = 2 * THREADED_ELEMENTS // (num_fields**2 * embed_dim)
        problem = make_problem(form, num_fields, embed_dim, batch_size=batch_size, dtype=dtype)
        assert problem.indices.numel() * num_fields * embed_dim > THREADED_ELEMENTS
        seed = grad_output(problem, output, within_field)
        expected = Expected.of(problem, seed, **modes)
        for threads, grad in itertools.product((1, 2), ("dense", "sparse")):
            with num_threads(threads):
                found = evaluate(ffm_interaction, problem, seed, grad=grad, **modes)
            note = f"F={num_fields} K={embed_dim} {grad}, {threads} threads"
            expected.check(found, dtype, note)


@within
@outputs
@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_rounded_once(
    form: str, output: str, within_field: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Sums are kept in float32, those of shared rows too: the floor of the tolerance rule is met without the rest."""
    modes = {"output": output, "within_field": within_field}
    for num_fields, embed_dim in [(1, 5), (2, 4), (7, 5), (39, 16)]:
        problem = make_problem(form, num_fields, embed_dim, batch_size=70, dtype=dtype)
        seed = grad_output(problem, output, within_field)
        expected = replace(Expected.of(problem, seed, **modes), plain=None)
        for grad in ("dense", "sparse"):
            found = evaluate(ffm_interaction, problem, seed, grad=grad, **modes)
            expected.check(found, dtype, f"F={num_fields} K={embed_dim} {grad}")


@within
@outputs
@forms
def test_only_what_is_asked_for(
    form: str, output: str, within_field: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """A frozen table, values without a gradient, nothing to differentiate: the same numbers, and no more of them."""
    problem = make_problem(form, 7, 5, dtype=dtype)
    seed = grad_output(problem, output, within_field)
    modes = {"output": output, "within_field": within_field}
    everything = evaluate(ffm_interaction, problem, seed, **modes)

    assert torch.equal(ffm_interaction(*problem.args, **modes), everything.output)
    for grad in ("dense", "sparse"):
        weight = problem.weight.clone().requires_grad_()
        ffm_interaction(weight, *problem.args[1:], grad=grad, **modes).backward(seed)
        assert weight.grad is not None
        assert torch.equal(weight.grad.to_dense(), everything.grad_weight)
        if problem.values is not None:
            values = problem.values.clone().requires_grad_()
            args = (problem.weight, problem.indices, problem.fields, values, problem.offsets)
            ffm_interaction(*args, grad=grad, **modes).backward(seed)
            assert everything.grad_values is not None and values.grad is not None
            assert torch.equal(values.grad, everything.grad_values)


@pytest.mark.parametrize("interaction", [ffm_interaction, ffm_ext.reference.ffm_interaction])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
@forms
def test_table_as_a_matrix(
    interaction: Interaction, form: str, grad: str, device: torch.device
) -> None:
    problem = make_problem(form, 3, 4)
    N, F, K = problem.weight.shape
    weight = problem.weight.clone().requires_grad_()
    matrix = problem.weight.reshape(N, F * K).clone().requires_grad_()
    out = interaction(weight, *problem.args[1:], grad=grad)
    num_fields = F if problem.fields is not None else None
    same = interaction(matrix, *problem.args[1:], grad=grad, num_fields=num_fields)
    # The reference adds in the order in which PyTorch adds: on CUDA, in any.
    near = 0.0 if interaction is ffm_interaction else 1e-5
    torch.testing.assert_close(same, out, rtol=near, atol=near)
    out.sum().backward()
    same.sum().backward()
    assert weight.grad is not None and matrix.grad is not None
    assert matrix.grad.shape == matrix.shape
    found = matrix.grad.to_dense().view(N, F, K)
    torch.testing.assert_close(found, weight.grad.to_dense(), rtol=near, atol=near)


def test_ids_of_different_dtypes(device: torch.device) -> None:
    problem = make_problem("csr values", 7, 4)
    wanted = ffm_interaction(*problem.args)
    int32 = problem.to(ids=torch.int32)
    for mixed in (
        replace(problem, indices=int32.indices),
        replace(problem, fields=int32.fields),
        replace(problem, offsets=int32.offsets),
    ):
        assert torch.equal(ffm_interaction(*mixed.args), wanted)


def test_one_hot_is_a_case_of_csr() -> None:
    for F, K in SHAPES:
        one_hot = make_problem("one-hot values", F, K)
        assert one_hot.values is not None
        B = one_hot.batch_size
        csr = Problem(
            one_hot.weight,
            one_hot.indices.flatten(),
            torch.arange(F).repeat(B),
            one_hot.values.flatten(),
            torch.arange(B + 1) * F,
        )
        for output in OUTPUTS:
            found = ffm_interaction(*csr.args, output=output)
            assert torch.equal(found, ffm_interaction(*one_hot.args, output=output))


def test_outputs_sum_to_each_other(device: torch.device) -> None:
    for form, within_field in itertools.product(FORMS, (False, True)):
        problem = make_problem(form, 7, 8, dtype=torch.float64)
        y, d, h = (
            ffm_interaction(*problem.args, output=output, within_field=within_field)
            for output in OUTPUTS
        )
        torch.testing.assert_close(h.sum(2), d, rtol=0, atol=1e-12)
        torch.testing.assert_close(d.sum(1), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@forms
def test_half_precision_is_not_rounded_for_float32(
    form: str, dtype: torch.dtype, device: torch.device
) -> None:
    problem = make_problem(form, 7, 5, batch_size=70, dtype=dtype)
    weight, *lists = problem.args
    weight = weight.detach().requires_grad_()
    exact = ffm_interaction(*problem.to(torch.float32).args)
    found = ffm_interaction(weight, *lists, grad="dense", dtype=torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(found.to(dtype), ffm_interaction(*problem.args), rtol=0, atol=0)
    seed = torch.randn_like(found)
    (grad_weight,) = torch.autograd.grad(found, weight, seed)
    narrow = ffm_interaction(weight, *lists, grad="dense")
    (wanted,) = torch.autograd.grad(narrow, weight, seed.to(dtype))
    torch.testing.assert_close(grad_weight, wanted, rtol=0, atol=0)
