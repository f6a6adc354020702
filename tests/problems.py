# SPDX-License-Identifier: MIT
"""Problems, their exact answers, and the rule by which an answer is accurate. Shared by the tests.

The tolerance rule (:func:`assert_accurate`) compares three computations of the same number: ``truth``, the definition
in float64, ``plain``, which is :mod:`ffm_ext.reference` in the dtype under test, and ``fused``. An element is
accurate where ::

    |fused - truth| <= 2 max |plain - truth| + FLOOR · eps(sum) · terms + eps(dtype) · |truth|

where ``terms`` is the sum of the magnitudes of the terms that the element is the sum of, and eps(sum) that of the dtype
that sums are kept in: float32 for half precision, else the dtype itself. The last two are the floor: the plain result
may be exact by luck.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ffm_ext

FLOOR = 4.0

FORMS = ("one-hot", "one-hot values", "csr", "csr values")
OUTPUTS = ("sum", "dot", "hadamard")

Interaction = Callable[..., Tensor]

_devices = [torch.device("cpu")]


def here() -> torch.device:
    """Where the tensors of a test belong: the CPU, unless it has the ``device`` fixture."""
    return _devices[-1]


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Where :func:`make_problem` and :func:`grad_output` make their tensors: the ``device`` fixture sets it."""
    _devices.append(device)
    try:
        yield
    finally:
        _devices.pop()


@dataclass(frozen=True, eq=False)
class Problem:
    """A table and a batch of either form, as the arguments of ``ffm_interaction``."""

    weight: Tensor  # [N, F, K]
    indices: Tensor
    fields: Tensor | None = None
    values: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.indices.shape[0] if self.offsets is None else self.offsets.numel() - 1

    @property
    def num_fields(self) -> int:
        return self.weight.shape[1]

    @property
    def embed_dim(self) -> int:
        return self.weight.shape[2]

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The tensors in the order of every operator of ``torch.ops.ffm_ext``."""
        return self.weight, self.indices, self.fields, self.values, self.offsets

    def map(self, real: Callable[[Tensor], Tensor], ids: Callable[[Tensor], Tensor]) -> Problem:
        def apply(function: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return Problem(
            real(self.weight),
            ids(self.indices),
            apply(ids, self.fields),
            apply(real, self.values),
            apply(ids, self.offsets),
        )

    def to(
        self,
        dtype: torch.dtype | None = None,
        ids: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Problem:
        return self.map(
            lambda real: real.to(device=device, dtype=dtype),
            lambda index: index.to(device=device, dtype=ids),
        )

    def magnitudes(self) -> Problem:
        """The problem in float64 whose every term is the magnitude of this one's."""
        return self.map(lambda real: real.double().abs(), lambda index: index)


def make_problem(
    form: str,
    num_fields: int,
    embed_dim: int,
    *,
    batch_size: int = 7,
    num_features: int = 11,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """A problem of one of the ``FORMS``, with features that many entries share.

    The CSR forms go round seven kinds of samples: every field once, in order; no entry; one entry; every field once,
    in another order; some fields missing, others with several entries, unsorted; one field alone with a feature twice;
    every field, all mixed, and some of them again.
    """
    with torch.inference_mode(False):  # what is kept for the next test can be differentiated there
        problem = _make_problem(form, num_fields, embed_dim, batch_size, num_features)
        return problem.to(dtype, device=here())


@cache
def _make_problem(form: str, F: int, K: int, batch_size: int, num_features: int) -> Problem:
    rng = np.random.default_rng([F, K, batch_size])

    def reals(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    weight = reals(num_features, F, K)

    if form.startswith("one-hot"):
        indices = torch.from_numpy(rng.integers(num_features, size=(batch_size, F)))
        return Problem(weight, indices, values=reals(batch_size, F) if "values" in form else None)

    kinds: list[Callable[[], np.ndarray]] = [
        lambda: np.arange(F),
        lambda: np.arange(0),
        lambda: rng.integers(F, size=1),
        lambda: rng.permutation(F),
        lambda: rng.choice(rng.permutation(F)[: max(1, 2 * F // 3)], size=F + 2),
        lambda: rng.integers(F, size=1).repeat(3),
        lambda: rng.permutation(np.concatenate([np.arange(F), rng.integers(F, size=F)])),
    ]
    samples = [kinds[b % len(kinds)]() for b in range(batch_size)]
    ids = [rng.integers(num_features, size=len(sample)) for sample in samples]
    for b in range(5, batch_size, len(kinds)):
        ids[b][2] = ids[b][0]
    offsets = np.cumsum([0, *map(len, samples)])
    return Problem(
        weight,
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.concatenate(samples)),
        reals(int(offsets[-1])) if "values" in form else None,
        torch.from_numpy(offsets),
    )


def output_shape(problem: Problem, output: str, within_field: bool) -> tuple[int, ...]:
    B, F, K = problem.batch_size, problem.num_fields, problem.embed_dim
    terms = F * (F - 1) // 2 + (F if within_field else 0)
    return {"sum": (B,), "dot": (B, terms), "hadamard": (B, terms, K)}[output]


def grad_output(problem: Problem, output: str, within_field: bool) -> Tensor:
    """What flows back into the output: random, so that no two elements can be mistaken for each other."""
    shape = output_shape(problem, output, within_field)
    generator = torch.Generator().manual_seed(len(shape) + 2 * within_field)
    seed = torch.randn(shape, generator=generator, dtype=problem.weight.dtype)
    return seed.to(problem.weight.device)


class Result(NamedTuple):
    output: Tensor
    grad_weight: Tensor  # [N, F, K]
    grad_values: Tensor | None

    def cpu(self) -> Result:
        return Result(*(None if tensor is None else tensor.cpu() for tensor in self))


def evaluate(
    interaction: Interaction,
    problem: Problem,
    grad_out: Tensor,
    *,
    output: str,
    within_field: bool,
    grad: str = "dense",
) -> Result:
    """Output and gradients; a sparse gradient made dense."""
    weight = problem.weight.clone().requires_grad_()
    values = None if problem.values is None else problem.values.clone().requires_grad_()
    out = interaction(
        weight,
        problem.indices,
        problem.fields,
        values,
        problem.offsets,
        output=output,
        within_field=within_field,
        grad=grad,
    )
    out.backward(grad_out)
    assert weight.grad is not None
    assert weight.grad.is_sparse == (grad == "sparse")
    grad_weight = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
    return Result(out.detach(), grad_weight, None if values is None else values.grad)


@cache
def entry_pairs(
    fields: Tensor | None, offsets: Tensor | None, shape: torch.Size, num_fields: int, within: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of entries of a sample: positions of the one and of the other, and the term that they belong to."""
    if fields is None or offsets is None:
        ends = range(0, shape.numel() + 1, shape[1])
        owners = list(range(num_fields)) * shape[0]
    else:
        ends, owners = offsets.tolist(), fields.tolist()
    terms = list(itertools.combinations(range(num_fields), 2))
    if within:
        terms += [(f, f) for f in range(num_fields)]
    term_of = {pair: t for t, pair in enumerate(terms)}
    term_of |= {(g, f): t for (f, g), t in term_of.items()}
    pairs = [
        (i, j, sample * len(terms) + term_of[owners[i], owners[j]])
        for sample, (begin, end) in enumerate(itertools.pairwise(ends))
        for i in range(begin, end)
        for j in range(i + 1, end)
        if within or owners[i] != owners[j]
    ]
    left, right, term = torch.tensor(pairs, dtype=torch.int64).view(-1, 3).unbind(1)
    return left, right, term


def by_definition(
    weight: Tensor,
    indices: Tensor,
    fields: Tensor | None,
    values: Tensor | None,
    offsets: Tensor | None,
    *,
    output: str,
    within_field: bool,
    grad: str = "dense",
) -> Tensor:
    """The interaction as libffm defines it: a loop over all pairs of entries of a sample, quadratic in their number.

    The entries *(a, f, x)* and *(b, g, y)* add ``x y weight[a, g] ∘ weight[b, f]`` to the term of the fields *f, g*;
    two entries of one field do so only with ``within_field``. Nothing is regrouped by field, so this shares no step
    with the kernels or with :mod:`ffm_ext.reference`.
    """
    device, lists = weight.device, (indices, fields, values, offsets)
    if device.type != "cpu":
        on_cpu = [None if tensor is None else tensor.cpu() for tensor in lists]
        modes = {"output": output, "within_field": within_field}
        return by_definition(weight.cpu(), *on_cpu, **modes).to(device)  # type: ignore[arg-type]
    N, F, K = weight.shape
    left, right, term = entry_pairs(fields, offsets, indices.shape, F, within_field)
    ids = indices.flatten().long()
    owners = torch.arange(F).repeat(len(indices)) if fields is None else fields.long()
    products = weight[ids[left], owners[right]] * weight[ids[right], owners[left]]
    if values is not None:
        products = products * (values.flatten()[left] * values.flatten()[right])[:, None]
    B = len(indices) if offsets is None else len(offsets) - 1
    num_terms = F * (F - 1) // 2 + (F if within_field else 0)
    hadamard = products.new_zeros(B * num_terms, K).index_add(0, term, products)
    hadamard = hadamard.view(B, num_terms, K)
    if output == "hadamard":
        return hadamard
    return hadamard.sum(2) if output == "dot" else hadamard.sum((1, 2))


@dataclass(frozen=True)
class Expected:
    """What every way to compute a problem is measured against."""

    truth: Result
    plain: Result | None
    terms: Result

    @classmethod
    def of(cls, problem: Problem, grad_out: Tensor, *, output: str, within_field: bool) -> Expected:
        modes = {"output": output, "within_field": within_field}
        problem, grad_out = problem.to(device="cpu"), grad_out.cpu()
        plain = evaluate(ffm_ext.reference.ffm_interaction, problem, grad_out, **modes)
        problem, grad_out = problem.to(torch.float64), grad_out.double()
        truth = evaluate(by_definition, problem, grad_out, **modes)
        return cls(
            truth, plain, evaluate(by_definition, problem.magnitudes(), grad_out.abs(), **modes)
        )

    def check(self, fused: Result, dtype: torch.dtype, note: str = "") -> None:
        fused = fused.cpu()
        for name in Result._fields:
            found = getattr(fused, name)
            truth, plain, terms = (
                getattr(result, name, None) for result in (self.truth, self.plain, self.terms)
            )
            assert (found is None) == (truth is None), name
            if found is not None:
                assert found.dtype == dtype, f"{name} {note}: {found.dtype} instead of {dtype}"
                assert_accurate(found, truth, plain, terms, note=f"{name} {note}")


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_accurate(
    fused: Tensor, truth: Tensor, plain: Tensor | None, terms: Tensor, *, note: str = ""
) -> None:
    """The tolerance rule: see the top of this file. Without ``plain``, the floor is all that is allowed."""
    assert fused.shape == truth.shape, f"{note}: {fused.shape} instead of {truth.shape}"
    error = (fused.double() - truth).abs()
    allowed = FLOOR * eps(sum_dtype(fused.dtype)) * terms.abs()
    # One rounding, to a normal or a subnormal number.
    allowed += eps(fused.dtype) * truth.abs().clamp(min=torch.finfo(fused.dtype).tiny)
    if plain is not None and plain.numel():
        allowed += 2 * (plain.double() - truth).abs().max()
    wrong = ~(error <= allowed)  # a NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{note}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at {at}: "
            f"{fused[at].item()!r}, truth {truth[at].item()!r}, error {error[at].item():.3g}, "
            f"allowed {allowed[at].item():.3g}"
        )


def batch_of(problem: Problem) -> Tensor | ffm_ext.SparseBatch:
    """The batch as the modules take it; values of the one-hot form stay apart."""
    if problem.fields is None or problem.offsets is None:
        return problem.indices
    return ffm_ext.SparseBatch(problem.indices, problem.fields, problem.values, problem.offsets)


def with_entry(problem: Problem, name: str, position: int, entry: float) -> Problem:
    """The problem with one element of ``indices``, ``fields``, ``values`` or ``offsets`` changed."""
    tensor = getattr(problem, name).clone()
    tensor.view(-1)[position] = entry
    return replace(problem, **{name: tensor})


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Threads of torch's pool, which the operators use."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def refusal(text: str) -> Iterator[None]:
    """What is inside has to end in an error with that text."""
    said: str | None = None
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        said = str(error)
    assert said is not None, f"nothing was refused, expected: {text}"
    assert text in said


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the ``ffm_ext`` of this one."""
    path = str(Path(ffm_ext.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
