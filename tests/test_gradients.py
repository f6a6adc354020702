# SPDX-License-Identifier: MIT
"""Gradients against finite differences, and the edges of autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from problems import FORMS, OUTPUTS, Problem, make_problem
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ffm_ext.functional import ffm_interaction

pytestmark = pytest.mark.usefixtures("device")


class Sparse(torch.autograd.Function):
    """The identity, whose gradient arrives sparse and leaves dense: gradcheck takes no sparse gradients."""

    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        assert grad.is_sparse
        return grad.to_dense()


def interaction_of(
    problem: Problem, output: str, within_field: bool, grad: str
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The interaction as a function of what has gradients, the table and the values."""

    def interaction(weight: Tensor, values: Tensor | None) -> Tensor:
        return ffm_interaction(
            Sparse.apply(weight) if grad == "sparse" else weight,
            problem.indices,
            problem.fields,
            values,
            problem.offsets,
            output=output,
            within_field=within_field,
            grad=grad,
        )

    return interaction


@pytest.mark.parametrize(("num_fields", "embed_dim"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("within_field", [False, True], ids=["", "within"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_gradcheck(
    form: str, output: str, within_field: bool, grad: str, num_fields: int, embed_dim: int
) -> None:
    problem = make_problem(form, num_fields, embed_dim, num_features=4, dtype=torch.float64)

    interaction = interaction_of(problem, output, within_field, grad)
    values = problem.values
    if values is not None:
        values = values.clone().requires_grad_()
        assert gradcheck(interaction, (problem.weight, values))
    weight = problem.weight.clone().requires_grad_()
    assert gradcheck(interaction, (weight, values))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_gradients_accumulate(form: str, grad: str) -> None:
    problem = make_problem(form, 3, 4, dtype=torch.float64)
    weight = problem.weight.clone().requires_grad_()
    for _ in range(2):
        ffm_interaction(weight, *problem.args[1:], grad=grad).sum().backward()
    once = problem.weight.clone().requires_grad_()
    ffm_interaction(once, *problem.args[1:], grad=grad).sum().backward()
    assert weight.grad is not None and once.grad is not None
    torch.testing.assert_close(weight.grad.to_dense(), 2 * once.grad.to_dense(), rtol=0, atol=0)


@pytest.mark.parametrize("within_field", [False, True], ids=["", "within"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form: str, output: str, within_field: bool) -> None:
    problem = make_problem(form, 3, 2, batch_size=6, num_features=4, dtype=torch.float64)

    interaction = interaction_of(problem, output, within_field, "dense")
    weight = problem.weight.clone().requires_grad_()
    values = None if problem.values is None else problem.values.clone().requires_grad_()
    assert gradgradcheck(interaction, (weight, values))


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_of_a_sparse_gradient_are_refused(form: str) -> None:
    """A gradient penalty must not lose its own gradient in silence."""
    problem = make_problem(form, 3, 4)
    weight = problem.weight.clone().requires_grad_()
    out = ffm_interaction(weight, *problem.args[1:], grad="sparse")
    with pytest.raises(RuntimeError, match=r"create_graph=True needs grad='dense'"):
        torch.autograd.grad(out.sum(), weight, create_graph=True)


def test_weight_changed_between_forward_and_backward() -> None:
    problem = make_problem("one-hot", 3, 4)
    weight = problem.weight.clone().requires_grad_()
    out = ffm_interaction(weight, problem.indices)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_grad_output_of_any_layout() -> None:
    """Expanded (as ``sum()`` makes it), strided and zero-sized gradients."""
    for form, output in itertools.product(FORMS, OUTPUTS):
        problem = make_problem(form, 3, 4, dtype=torch.float64)
        weight = problem.weight.clone().requires_grad_()
        out = ffm_interaction(weight, *problem.args[1:], output=output, grad="dense")
        seed = torch.randn_like(out)
        strided = torch.stack([seed, seed], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        plain, other = (
            torch.autograd.grad(out, weight, g, retain_graph=True)[0] for g in (seed, strided)
        )
        assert torch.equal(plain, other)
        expanded = torch.autograd.grad(out.sum(), weight, retain_graph=True)[0]
        ones = torch.autograd.grad(out, weight, torch.ones_like(out))[0]
        assert torch.equal(expanded, ones)
