# SPDX-License-Identifier: MIT
"""Everything that is timed, behind one interface. A new peer is a class here and a place in `SUBJECTS`.

subject = Torchfm(workload, weight)          may copy the table into a form of its own
batch = subject.prepare(indices)             ids in the form it wants; never timed
subject.step(batch, grad_output, "dense")    what is timed
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

import ffm_ext

from .peer import Peer
from .workloads import DIRECTIONS, Direction, Workload

Role = Literal["ours", "peer", "roof"]


class Subject(Peer, ABC):
    """One way to compute the interaction of a batch, and its gradient with respect to the table."""

    name: ClassVar[str]
    role: ClassVar[Role] = "peer"
    directions: ClassVar[tuple[Direction, ...]] = DIRECTIONS
    copies: ClassVar[float] = 0.0  # memory that it keeps, in sizes of the float32 table
    is_checked: ClassVar[bool] = True  # it has a result
    tolerance: ClassVar[float] = 1e-4  # of that, relative and absolute

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        self.workload = workload
        # [N, F·K], a leaf of its own over the same memory
        self.weight = weight.detach().requires_grad_()

    def prepare(self, indices: Any) -> Any:
        """What `forward` takes for a batch of the workload: global ids ``indices`` [B, F], or a `SparseBatch`."""
        return indices

    @abstractmethod
    def forward(self, batch: Any, direction: Direction) -> Tensor:
        """The interaction [B]. ``direction`` says which gradient is going to be asked for."""

    def step(self, batch: Any, grad_output: Tensor, direction: Direction) -> None:
        """What is timed: forward, or forward, backward and dropping the gradient, as a training step does."""
        if direction == "forward":
            with torch.no_grad():
                self.forward(batch, direction)
        else:
            self.backward(batch, grad_output, direction)
            self.drop_gradient()

    def backward(self, batch: Any, grad_output: Tensor, direction: Direction) -> Tensor | None:
        """Leaves the gradient behind for `gradient`; returns the output, where one is made on the way."""
        output = self.forward(batch, direction)
        output.backward(grad_output)
        return output

    def drop_gradient(self) -> None:
        self.weight.grad = None

    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """After a backward: the gradient of ``rows`` [R, F·K], and the sum of all its magnitudes."""
        assert self.weight.grad is not None
        return rows_of(self.weight.grad, rows)

    def table_rows(self, rows: Tensor) -> Tensor:
        """The rows [R, F·K] of the table as it has them."""
        return self.weight.detach()[rows]

    def expected(self, weight: Tensor, batch: Any) -> Tensor:
        """What `forward` returns, by the reference. weight [R, F·K] float64, batch as `prepare` takes it."""
        return ffm_ext.reference.ffm_interaction(weight, batch, grad="dense")


def rows_of(grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` [R, …] of a gradient, dense or sparse, and the sum of all its magnitudes."""
    if not grad.is_sparse:
        return grad[rows], torch.linalg.vector_norm(grad, 1)
    grad = grad.coalesce()
    total = torch.linalg.vector_norm(grad.values(), 1, dtype=torch.float64)
    return grad.index_select(0, rows).to_dense(), total


class Fused(Subject):
    """This package."""

    name = "ffm_ext"
    role = "ours"

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        grad: Literal["dense", "sparse"] = "dense" if direction == "dense" else "sparse"
        return ffm_ext.functional.ffm_interaction(self.weight, batch, grad=grad)


class Torchfm(Subject):
    """torchfm's layer, and the two sums that its FFM model puts behind it.

    Its own gradients are dense. For sparse ones its embeddings are told to make them, which is a line of the user's.
    """

    name = "torchfm"
    module = "torchfm.layer"
    copies = 1.0

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        layer = importlib.import_module(self.module).FieldAwareFactorizationMachine
        # Its own initialisation of F tables is thrown away: make it on no device.
        with torch.device("meta"):
            self.layer = layer(workload.field_dims, workload.embed_dim)
        tables = weight.view(workload.table_shape)
        for g, embedding in enumerate(self.layer.embeddings):
            embedding.weight = torch.nn.Parameter(tables[:, g].contiguous())

    @classmethod
    def missing(cls) -> str | None:
        if not hasattr(np, "long"):  # NumPy 1.24 to 1.26
            np.long = np.int64  # type: ignore[attr-defined, unused-ignore]
        return super().missing()

    def prepare(self, indices: Tensor) -> Tensor:
        return indices - torch.tensor(self.workload.field_starts)

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        for embedding in self.layer.embeddings:
            embedding.sparse = direction == "sparse"
        return self.layer(batch).sum(dim=1).sum(dim=1)

    def drop_gradient(self) -> None:
        self.layer.zero_grad(set_to_none=True)

    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = [rows_of(embedding.weight.grad, rows) for embedding in self.layer.embeddings]
        parts, totals = zip(*found, strict=True)
        return torch.stack(parts, dim=1).flatten(1), torch.stack(totals).sum()


def interaction_by_difference(rows: Tensor, num_fields: int) -> Tensor:
    """[b, F, F·K] -> [b]: every ordered pair and the diagonal, less the diagonal, halved."""
    rows = rows.view(rows.shape[0], num_fields, num_fields, -1)
    everything = (rows * rows.transpose(1, 2)).sum((1, 2, 3))
    return (everything - rows.diagonal(dim1=1, dim2=2).square().sum((1, 2))) / 2


def interaction_by_triangle(rows: Tensor, num_fields: int) -> Tensor:
    """[b, F, F·K] -> [b]: all dot products, of which the upper triangle is kept."""
    rows = rows.view(rows.shape[0], num_fields, num_fields, -1)
    return (rows * rows.transpose(1, 2)).sum(3).triu(1).sum((1, 2))


def interaction_by_pairs(rows: Tensor, num_fields: int) -> Tensor:
    """[b, F, F·K] -> [b]: the pairs f < g by index."""
    rows = rows.view(rows.shape[0], num_fields, num_fields, -1)
    f, g = torch.triu_indices(num_fields, num_fields, offset=1, device=rows.device)
    return (rows[:, f, g] * rows[:, g, f]).sum((1, 2))


class Vectorised(Subject):
    """The best we found in plain PyTorch: gather [b, F, F, K], multiply by its transpose.

    A batch goes through in chunks whose temporaries stay in cache, which makes it several times faster.
    """

    name = "vectorised"
    chunk = 128

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        # Backward wants the gradient of the table in one piece: gather once, then cut.
        if direction == "forward":
            parts = [F.embedding(part, self.weight) for part in batch.split(self.chunk)]
        else:
            sparse = direction == "sparse"
            parts = list(F.embedding(batch, self.weight, sparse=sparse).split(self.chunk))
        num_fields = self.workload.num_fields
        return torch.cat([interaction_by_difference(part, num_fields) for part in parts])


class Compiled(Subject):
    """The vectorised form under torch.compile, the forms that it compiles best.

    For a sparse gradient the gather stays outside: traced with the rest it is no faster, and fixes N.
    """

    name = "compiled"

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        torch._dynamo.mark_dynamic(self.weight, 0)
        num_fields = workload.num_fields

        def whole(form: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            return torch.compile(lambda weight, ids: form(F.embedding(ids, weight), num_fields))

        rest = torch.compile(lambda rows: interaction_by_triangle(rows, num_fields))
        self.functions: dict[Direction, Callable[[Tensor, Tensor], Tensor]] = {
            "forward": whole(interaction_by_pairs),
            "dense": whole(interaction_by_triangle),
            "sparse": lambda weight, ids: rest(F.embedding(ids, weight, sparse=True)),
        }

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        return self.functions[direction](self.weight, batch)


def modern_ffm(workload: Workload, weight: Tensor) -> Any:
    """modern-fm's regressor with a table, in float64."""
    N, F, K = workload.table_shape
    model = importlib.import_module("modern_fm").FFMRegressor(n_factors=K, dtype="float64")
    # What fit would have left behind.
    model.n_features_in_, model.n_iter_, model.n_fields_ = N, 1, F
    model.field_ids_ = workload.feature_fields
    model.w0_, model.w_ = 0.0, np.zeros(N)
    model.V_ = weight.view(N, F, K).double().numpy()
    return model


class ModernFM(Subject):
    """modern-fm's regressor, whose predict is the raw score; float64, one thread."""

    name = "modern-fm"
    module = "modern_fm"
    directions = ("forward",)
    copies = 2.0

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        self.model = modern_ffm(workload, weight)

    def prepare(self, indices: Tensor) -> sp.csr_matrix:
        return self.workload.matrix(indices)

    def forward(self, batch: sp.csr_matrix, direction: Direction) -> Tensor:
        return torch.from_numpy(self.model.predict(batch))


class GatherBag(Subject):
    """The rows of a sample gathered and summed, nothing else, by PyTorch's kernel: [B, F·K]."""

    name = "embedding_bag"
    role = "roof"
    directions = ("forward",)

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        return F.embedding_bag(batch, self.weight, mode="sum")

    def expected(self, weight: Tensor, batch: Tensor) -> Tensor:
        return weight[batch].sum(1)


class GatherSum(Subject):
    """The same by this package's kernel, which writes one number a sample: [B]."""

    name = "gather_sum"
    role = "roof"
    directions = ("forward",)

    @classmethod
    def missing(cls) -> str | None:
        has_op = hasattr(torch.ops.ffm_ext, "gather_sum")
        return None if has_op else "missing: this build has no torch.ops.ffm_ext.gather_sum"

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        table = self.weight.view(self.workload.table_shape)
        return torch.ops.ffm_ext.gather_sum(table, batch)

    def expected(self, weight: Tensor, batch: Tensor) -> Tensor:
        return weight[batch].sum((1, 2))


SUBJECTS: tuple[type[Subject], ...] = (
    Fused,
    Torchfm,
    Vectorised,
    Compiled,
    ModernFM,
    GatherBag,
    GatherSum,
)


def check(subject: Subject, batch: Any, grad_output: Tensor, direction: Direction) -> str | None:
    """How the subject's output or gradient differs from the float64 reference; None if it does not.

    The subject sees its whole batch and table; the reference computes the first 64 samples over the rows that
    they touch, and upstream gradients of the other samples are zero.
    """
    if not subject.is_checked:
        return None
    rows, head = _over_its_rows(batch[:64])
    weight = subject.table_rows(rows).double().requires_grad_()
    expected = subject.expected(weight, head)
    upstream = torch.zeros_like(grad_output)
    upstream[:64] = grad_output[:64].to(subject.weight.dtype)  # as autograd rounds it
    close, tolerance = torch.testing.assert_close, subject.tolerance
    output: Tensor | None
    try:
        if direction == "forward":
            with torch.no_grad():
                output = subject.forward(subject.prepare(batch), direction)
        else:
            output = subject.backward(subject.prepare(batch), upstream, direction)
            expected.backward(upstream[:64].double())
        if output is not None:
            close(output.detach()[:64].double(), expected.detach(), rtol=tolerance, atol=tolerance)
        if direction != "forward":
            gradient, total = subject.gradient(rows)
            assert weight.grad is not None
            # Sums of many terms end near zero by chance, with the error of their largest.
            size = max(1.0, float(weight.grad.abs().max()))
            close(gradient.double(), weight.grad, rtol=tolerance, atol=tolerance / 10 * size)
            # Nothing anywhere else.
            close(total.double(), weight.grad.abs().sum(), rtol=max(1e-3, tolerance), atol=0.0)
    except AssertionError as error:
        return f"wrong: {' '.join(str(error).split())}"
    finally:
        subject.drop_gradient()
    return None


def _over_its_rows(batch: Any) -> tuple[Tensor, Any]:
    """The rows [R] that a batch touches, and the batch with ids that count through them."""
    if isinstance(batch, Tensor):
        return batch.unique(return_inverse=True)
    rows, positions = batch.indices.unique(return_inverse=True)
    return rows, ffm_ext.SparseBatch(positions, batch.fields, batch.values, batch.offsets)
