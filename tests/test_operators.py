# SPDX-License-Identifier: MIT
"""``torch.library.opcheck`` on every operator of ``torch.ops.ffm_ext``: schema, fake kernel, tracing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from problems import FORMS, grad_output, here, make_problem

import ffm_ext

ops = torch.ops.ffm_ext

OPERATORS = (
    "ffm_forward",
    "ffm_backward",
    "ffm_backward_sparse",
    "ffm_backward_fused_",
    "ffm_backward_values",
    "ffm_update_",
    "ffm_train_",
    "ffm_quantize",
    "ffm_dequantize",
    "ffm_forward_int8",
    "ffm_table_ids",
    "gather_sum",
    "interaction",
    "fused_step_",
)

# fused_step_ asks it for its numbers.
LAYER = ffm_ext.FFMInteraction(11, 3, 4)
FUSED = LAYER.fuse_optimizer(ffm_ext.optim.AdaGrad())

# Each output once: opcheck traces every call anew.
MODES = (("sum", False), ("dot", True), ("hadamard", False))


def operator_calls(name: str) -> list[tuple[Any, ...]]:
    """Arguments of an operator, in every form and mode that it takes."""
    if name == "gather_sum":
        problem = make_problem("one-hot", 3, 4)
        return [(problem.weight, ids) for ids in (problem.indices, problem.indices.int())]
    if name == "ffm_table_ids":
        ids = torch.tensor([[0, 3], [1, 4]])
        return [(these, torch.tensor([0, 2, 7]), "here") for these in (ids, ids.int(), ids[:0])]
    if name in ("ffm_quantize", "ffm_dequantize"):
        weight = make_problem("one-hot", 3, 5).weight
        return [(weight,)] if name == "ffm_quantize" else [(ops.ffm_quantize(weight), 3, 5)]
    calls: list[tuple[Any, ...]] = []
    update = ("adagrad", [0.1, 0.0, 0.0, 0.0, 0.0, 0.0], 1, None)
    if name == "ffm_update_":
        weight = make_problem("one-hot", 3, 4).weight
        rows = torch.tensor([1, 2], device=here())
        state = [torch.ones_like(weight)]
        return [(weight, state, rows, weight[:2], *update), (weight, state, None, weight, *update)]
    for form, (output, within_field) in itertools.product(FORMS, MODES):
        problem = make_problem(form, 3, 4)
        modes = (output, within_field)
        seed = grad_output(problem, *modes)
        if name == "ffm_forward":
            calls.append((*problem.args, *modes))
        elif name == "ffm_forward_int8":
            packed = ops.ffm_quantize(problem.weight)
            calls.append((packed, *problem.args[1:], 3, 4, *modes))
        elif name == "ffm_backward_fused_":
            weight, *lists = problem.args
            state = [torch.ones_like(weight)]
            has_values = problem.values is not None
            calls.append((seed, weight, state, *lists, *modes, has_values, *update))
        elif name == "fused_step_":
            weight, *lists = problem.args
            counted = (torch.zeros((), dtype=torch.int64), [torch.ones_like(weight)])
            has_values = problem.values is not None
            seen = None if output == "dot" else counted[0].clone()
            calls.append((seed, weight, *counted, seen, *lists, *modes, has_values, FUSED.handle))
        elif name == "interaction":
            calls.append((*problem.args, 3, *modes, "dense", 0, None, []))
            weight = problem.weight.clone().requires_grad_()
            values = None if problem.values is None else problem.values.clone().requires_grad_()
            lists = (problem.indices, problem.fields, values, problem.offsets, 3, *modes)
            calls.append((weight, *lists, "dense", 0, None, []))
            if output != "sum":
                continue
            if values is not None:
                calls.append((problem.weight, *lists, "dense", 0, None, []))
            calls += [(weight, *lists, grad, 0, None, []) for grad in ("atomic", "sparse")]
            # Results and gradients are all that opcheck compares: that compiled code makes the same updates is in
            # test_citizenship.py.
            counted = (torch.zeros((), dtype=torch.int64), [torch.ones_like(problem.weight)])
            calls.append((weight, *lists, "fused", FUSED.handle, *counted))
        elif name == "ffm_train_":
            weight, *lists = problem.args
            state = [torch.ones_like(weight)]
            small = torch.ones(len(weight), 1, dtype=weight.dtype)
            labels = torch.ones(problem.batch_size)
            terms = (small, [small.clone()], None, [])
            modes = ("logistic", within_field, True, *update[:3], update[3], False)
            order = torch.arange(problem.batch_size).flip(0)
            calls.append((weight, state, *terms, *lists, labels, None, order, *modes))
        elif name == "ffm_backward_values":
            if problem.values is not None:
                calls.append((seed, *problem.args, *modes))
        else:
            calls += [
                (seed, *problem.args, *modes, values_grad)
                for values_grad in {False, problem.values is not None}
            ]
            if name == "ffm_backward":
                calls += [(*call, False) for call in calls[-1:]]  # not deterministic
    return calls


def test_these_are_all_operators() -> None:
    prefix = "ffm_ext::"
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name.removeprefix(prefix) for s in schemas if s.name.startswith(prefix)}
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, device: torch.device) -> None:
    if name == "ffm_train_" and device.type != "cpu":
        pytest.skip("training with one sample after the other is for the CPU")
    operator = getattr(ops, name).default
    for args in operator_calls(name):
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "ffm_backward_sparse"])
def test_meta_device(name: str) -> None:
    """Shapes and dtypes without data are those with data, where they do not depend on it."""
    operator = getattr(ops, name)
    for args in operator_calls(name):
        meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda a: a.to("meta"), args)
        found, wanted = operator(*meta), operator(*args)
        if wanted is None:
            continue
        if isinstance(wanted, torch.Tensor):
            found, wanted = [found], [wanted]
        for f, w in zip(found, wanted, strict=True):
            assert f.device.type == "meta"
            assert (f.shape, f.dtype, f.stride()) == (w.shape, w.dtype, w.stride())


@pytest.mark.parametrize("form", FORMS)
def test_compile(form: str, device: torch.device) -> None:
    """``torch.compile`` with the whole graph in one piece, forward and backward."""
    torch.compiler.reset()  # or the forms count as recompilations of one function
    problem = make_problem(form, 3, 4)
    seed = grad_output(problem, "sum", False)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        out = ffm_ext.functional.ffm_interaction(weight, *problem.args[1:], grad="dense")
        return (out * seed).sum()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        weight = problem.weight.clone().requires_grad_()
        function(weight).backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_gather_sum(dtype: torch.dtype, threads: int, device: torch.device) -> None:
    for num_fields, embed_dim in [(1, 1), (2, 3), (7, 5), (39, 16)]:
        problem = make_problem("one-hot", num_fields, embed_dim, batch_size=300, dtype=dtype)
        rows = problem.weight[problem.indices].double()
        found = ops.gather_sum(problem.weight, problem.indices)
        assert found.dtype == dtype
        error = (found.double() - rows.sum((1, 2, 3))).abs()
        terms = rows.abs().sum((1, 2, 3))
        assert (error <= 4 * torch.finfo(dtype).eps * terms).all()
