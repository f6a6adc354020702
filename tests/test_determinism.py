# SPDX-License-Identifier: MIT
"""The same bits for any number of threads, in every run, and from the dense and the sparse gradient."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import (
    FORMS,
    Expected,
    Problem,
    Result,
    evaluate,
    grad_output,
    make_problem,
    num_threads,
)

from ffm_ext.functional import ffm_interaction
from ffm_ext.reference import ffm_interaction as reference

THREADS = (1, 2, 3, 5)
# csrc/cpu/ffm.cpp: a thread wants 2^15 elements of table rows, and several threads work on 8 MiB of gradients at a
# time. So this many elements keep five threads busy in two blocks or more, in either dtype.
ELEMENTS = 9 * 2**18
# Few features, so that nearly every row is shared, by samples of one block and of different ones.
NUM_FEATURES = 23

modes = pytest.mark.parametrize(
    ("output", "within_field"),
    [("sum", False), ("sum", True), ("dot", False), ("hadamard", True)],
    ids=["sum", "sum-within", "dot", "hadamard-within"],
)
forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize(
    ("num_fields", "embed_dim"), [(3, 10), (39, 4)], ids=["F3 K10", "F39 K4"]
)


def large_problem(form: str, num_fields: int, embed_dim: int, dtype: torch.dtype) -> Problem:
    row_size = num_fields * embed_dim
    batch_size = ELEMENTS // (num_fields * row_size) + 1
    problem = make_problem(
        form,
        num_fields,
        embed_dim,
        batch_size=batch_size * 3 // 2,  # samples of the CSR forms have fewer entries than fields
        num_features=NUM_FEATURES,
        dtype=dtype,
    )
    assert problem.indices.numel() * row_size > ELEMENTS
    return problem


def assert_same_bits(a: torch.Tensor, b: torch.Tensor, note: str) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert a.shape == b.shape and a.dtype == b.dtype
    different = a.view(integer) != b.view(integer)
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} elements differ: {note}"
    )


@modes
@forms
@shapes
def test_same_bits(
    form: str,
    num_fields: int,
    embed_dim: int,
    output: str,
    within_field: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    problem = large_problem(form, num_fields, embed_dim, dtype)
    seed = grad_output(problem, output, within_field)
    modes = {"output": output, "within_field": within_field}
    first: dict[str, Result] = {}
    # A device has its own threads: there, runs are what is repeated.
    for threads, grad in itertools.product(THREADS, ("dense", "sparse")):
        with num_threads(threads):
            found = evaluate(ffm_interaction, problem, seed, grad=grad, **modes)
        for name, a, b in zip(found._fields, first.setdefault(grad, found), found, strict=True):
            if a is not None:
                assert_same_bits(a, b, f"{name}, {grad}, {threads} threads")
    for name, a, b in zip(found._fields, first["dense"], first["sparse"], strict=True):
        if a is not None:
            assert_same_bits(a, b, f"{name}, dense and sparse")


def test_same_bits_where_gradients_are_streamed() -> None:
    """All of them past the caches: a process reads the limit once."""
    tests = [
        f"{Path(__file__)}::{name}" for name in globals() if name.startswith("test_same_bits_")
    ]
    tests.remove(f"{Path(__file__)}::{test_same_bits_where_gradients_are_streamed.__name__}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *tests],
        env={**os.environ, "FFM_EXT_STREAM_BYTES": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("setting", ["2 MiB", "-1", "1e6", "99999999999999999999"])
def test_a_limit_of_streaming_that_is_no_number(setting: str) -> None:
    program = """
import torch
from ffm_ext.functional import ffm_interaction
weight = torch.ones(3, 2, 4, requires_grad=True)
ffm_interaction(weight, torch.tensor([[0, 1]])).sum().backward()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FFM_EXT_STREAM_BYTES": setting},
        capture_output=True,
        text=True,
    )
    assert f"FFM_EXT_STREAM_BYTES = '{setting}' is no number of bytes" in done.stderr


def test_same_bits_of_long_rows() -> None:
    """Most rows here have one entry, some have several."""
    torch.manual_seed(0)
    num_features, num_fields, embed_dim = 12_000, 39, 16
    weight = torch.randn(num_features, num_fields, embed_dim, requires_grad=True)
    indices = torch.randint(num_features, (300, num_fields))
    seed = torch.randn(300)
    (expected,) = torch.autograd.grad(reference(weight, indices, grad="dense"), weight, seed)
    found = {}
    for threads, grad in itertools.product((1, 2, 3), ("dense", "sparse")):
        with num_threads(threads):
            out = ffm_interaction(weight, indices, grad=grad)
            (gradient,) = torch.autograd.grad(out, weight, seed)
        found[threads, grad] = gradient.to_dense()
        torch.testing.assert_close(found[threads, grad], expected)
        assert_same_bits(found[threads, grad], found[1, "dense"], f"{grad}, {threads} threads")


@modes
@pytest.mark.parametrize("form", ["one-hot", "one-hot values"])
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_same_bits_where_fields_have_ids_of_their_own(
    form: str, order: str, output: str, within_field: bool, dtype: torch.dtype
) -> None:
    """Then threads share out the fields: 2 or 3 of them, or 6 as 3 times 2 that share out the samples."""
    num_fields, embed_dim = 39, 4
    problem = large_problem(form, num_fields, embed_dim, dtype)
    ids = problem.indices % 5 + 5 * torch.arange(num_fields)
    ids = ids if order == "rising" else 5 * num_fields - 1 - ids
    weight = torch.randn(5 * num_fields, num_fields, embed_dim).to(dtype).requires_grad_()
    as_list = (
        ids.flatten(),
        torch.arange(num_fields).repeat(problem.batch_size),
        None if problem.values is None else problem.values.flatten(),
        torch.arange(0, ids.numel() + 1, num_fields),
    )
    seed = grad_output(problem, output, within_field)
    first = None
    for threads, grad in itertools.product((1, 2, 3, 6), ("dense", "sparse")):
        for batch in ((ids, None, problem.values, None), as_list):
            with num_threads(threads):
                out = ffm_interaction(
                    weight, *batch, output=output, within_field=within_field, grad=grad
                )
                (gradient,) = torch.autograd.grad(out, weight, seed)
            first = gradient.to_dense() if first is None else first
            assert_same_bits(gradient.to_dense(), first, f"{grad}, {threads} threads")


@pytest.mark.parametrize("num_features", [3, 1_000, 100_000, 1_000_000])
def test_same_rows_where_threads_group_them(num_features: int, dtype: torch.dtype) -> None:
    """A thread groups the rows of 2^13 entries or more, and of no fewer than the table has words of 64 rows."""
    torch.manual_seed(0)
    weight = torch.randn(num_features, 2, 1).to(dtype).requires_grad_()
    # Few ids come often, and some are only of the last entries.
    indices = (torch.rand(20_480, 2) ** 8 * (num_features - 1)).long()
    indices[-5:] = num_features - 1
    seed = torch.randn(len(indices), dtype=dtype)
    first = None
    for threads in THREADS:
        with num_threads(threads):
            out = ffm_interaction(weight, indices, grad="sparse")
            (gradient,) = torch.autograd.grad(out, weight, seed)
        assert torch.equal(gradient.indices()[0], indices.unique())
        first = gradient if first is None else first
        assert_same_bits(gradient.values(), first.values(), f"{threads} threads")


@forms
def test_gradients_in_any_order(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """On a CPU the dense gradient; on CUDA one that is as accurate, unless determinism is asked for."""
    problem = make_problem(form, 3, 4, dtype=dtype)
    seed = grad_output(problem, "sum", False)
    modes = {"output": "sum", "within_field": False}

    def found(grad: str = "atomic") -> Result:
        return evaluate(ffm_interaction, problem, seed, grad=grad, **modes)

    if device.type == "cpu":
        assert_same_bits(found().grad_weight, found("dense").grad_weight, "atomic and dense")
        return
    if dtype.itemsize < 4:
        with pytest.raises(ValueError, match="deterministic=False needs a float32 or float64"):
            found()
        return
    Expected.of(problem, seed, **modes).check(found(), dtype)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="grad='atomic' adds gradients in any order"):
            found()
    finally:
        torch.use_deterministic_algorithms(False)


@forms
def test_sparse_gradient_is_coalesced(form: str, threads: int, device: torch.device) -> None:
    """Rows rise, none comes twice, each is one that the batch has, and all that it has are there."""
    problem = large_problem(form, 3, 10, torch.float32)
    weight = problem.weight.clone().requires_grad_()
    out = ffm_interaction(weight, *problem.args[1:], grad="sparse")
    (grad,) = torch.autograd.grad(out, weight, grad_output(problem, "sum", False))
    assert grad.is_coalesced()
    (rows,) = grad.indices()
    assert rows.dtype == torch.int64
    assert torch.equal(rows, problem.indices.unique())
    assert grad.values().shape == (len(rows), *weight.shape[1:])
    assert grad.values().is_contiguous()


def test_sparse_gradient_of_a_large_table(threads: int, device: torch.device) -> None:
    """Ids of more than one digit of the radix sort, spread over the whole table."""
    N, B, F, K = 3_000_000, 500, 3, 2
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(N, (B, F), generator=generator)
    indices[B // 2 :] = indices[: B // 2].flip(0)  # every row twice
    indices[0, 0], indices[1, 0] = 0, N - 1
    indices = indices.to(device)
    weight = torch.randn(N, F, K, generator=generator).to(device).requires_grad_()
    out = ffm_interaction(weight, indices, grad="sparse")
    (grad,) = torch.autograd.grad(out.sum(), weight)
    (rows,) = grad.indices()
    assert torch.equal(rows, indices.unique())

    compact = weight.detach()[rows].requires_grad_()
    out = ffm_interaction(compact, torch.searchsorted(rows, indices), grad="sparse")
    (compact_grad,) = torch.autograd.grad(out.sum(), compact)
    assert_same_bits(grad.values(), compact_grad.values(), "of a small table")
