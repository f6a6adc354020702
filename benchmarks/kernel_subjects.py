# SPDX-License-Identifier: MIT
"""What is timed of the kernels themselves: operators without autograd, roofs, dtypes, layers, texts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import scipy.sparse as sp
import torch
from torch import Tensor

import ffm_ext
from ffm_ext.memory import empty_table

from .subjects import Fused, ModernFM, Subject
from .workloads import Direction, Workload


class Operator(Subject):
    """The bare operators. A backward is the operator alone: no forward before it, no autograd around it."""

    name = "operator"
    role = "ours"

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        self.table = weight.view(workload.table_shape)
        # Looked up once: that is not what a call costs.
        self.run_forward = torch.ops.ffm_ext.ffm_forward
        self.run_dense = torch.ops.ffm_ext.ffm_backward
        self.run_sparse = torch.ops.ffm_ext.ffm_backward_sparse
        self.made: tuple[Tensor, ...] = ()

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        return self.run_forward(self.table, batch, None, None, None, "sum", False)

    def backward(self, batch: Tensor, grad_output: Tensor, direction: Direction) -> None:
        run = self.run_dense if direction == "dense" else self.run_sparse
        self.made = run(grad_output, self.table, batch, None, None, None, "sum", False, False)

    def drop_gradient(self) -> None:
        self.made = ()

    def gradient(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        touched, values = (None, self.made[0]) if len(self.made) == 2 else self.made[:2]
        places = rows if touched is None else torch.searchsorted(touched, rows)
        return values[places].flatten(1), torch.linalg.vector_norm(values, 1, dtype=torch.float64)


class Fill(Subject):
    """Memory of a gradient's size written, nothing else, by ``Tensor.fill_``; on huge pages, as gradients are."""

    role = "roof"
    is_checked = False
    copies = 1.0

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        raise NotImplementedError

    def backward(self, batch: Tensor, grad_output: Tensor, direction: Direction) -> None:
        self.fill(batch)

    def fill(self, buffer: Tensor) -> None:
        buffer.fill_(1.0)


class Memset(Fill):
    """The same by the C library, which need not read the lines that it overwrites."""

    def fill(self, buffer: Tensor) -> None:
        size, threads = buffer.numel() * buffer.element_size(), torch.get_num_threads()
        ends = [size * i // threads for i in range(threads + 1)]
        parts = [(buffer.data_ptr() + begin, 1, end - begin) for begin, end in pairwise(ends)]
        if threads == 1:
            ctypes.memset(*parts[0])
        else:
            wait([_pool(threads).submit(ctypes.memset, *part) for part in parts])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


class FillTouched(Fill):
    """As many rows as the batch touches: a sparse gradient."""

    name = "fill_touched"
    directions = ("sparse",)

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        entries = workload.batch_size * workload.num_fields
        self.buffer = empty_table(min(entries, weight.shape[0]), weight.shape[1])

    def prepare(self, indices: Tensor) -> Tensor:
        return self.buffer[: indices.unique().numel()]


class FillTable(Fill):
    """As many rows as the table has: a dense gradient."""

    name = "fill_table"
    directions = ("dense",)

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        self.buffer = empty_table(*weight.shape)

    def prepare(self, indices: Tensor) -> Tensor:
        return self.buffer


class MemsetTouched(Memset, FillTouched):
    name = "memset_touched"


class MemsetTable(Memset, FillTable):
    name = "memset_table"


class Float32(Fused):
    """The table as it is."""

    name = "float32"


class Narrow(Fused):
    """The table rounded to numbers of 16 bits."""

    dtype: ClassVar[torch.dtype]
    copies = 0.5

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, empty_table(*weight.shape, dtype=self.dtype).copy_(weight))


class BFloat16(Narrow):
    name = "bfloat16"
    dtype = torch.bfloat16
    tolerance = 1e-2  # its last bit is 2^-8


class Float16(Narrow):
    name = "float16"
    dtype = torch.float16
    tolerance = 2e-3  # its last bit is 2^-11


class Layer(Subject):
    """`ffm_ext.FFMInteraction` over the table."""

    name = "layer"
    role = "ours"
    directions = ("forward",)

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        N, num_fields, K = workload.table_shape
        self.layer: torch.nn.Module = self.with_table(
            ffm_ext.FFMInteraction(N, num_fields, K, device="meta")
        )

    def with_table(self, layer: ffm_ext.FFMInteraction) -> ffm_ext.FFMInteraction:
        layer.weight = torch.nn.Parameter(self.weight.detach())
        return layer

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        return self.layer(batch)


class Model(Layer):
    """`ffm_ext.FFM`, whose linear term and bias are zero before it is trained."""

    name = "model"

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        N, num_fields, K = workload.table_shape
        with torch.device("meta"):
            model = ffm_ext.FFM(K, num_features=N, num_fields=num_fields)
        model.linear.to_empty(device="cpu")
        torch.nn.init.zeros_(model.linear.weight)
        torch.nn.init.zeros_(model.linear.bias)
        self.with_table(model.interaction)
        self.layer = model


class Int8(Layer):
    """The layer, quantised."""

    name = "int8"
    copies = 0.5

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        self.layer = ffm_ext.quantize(self.layer)

    def table_rows(self, rows: Tensor) -> Tensor:
        _, num_fields, K = self.workload.table_shape
        packed = self.layer.get_buffer("packed")[rows]
        return torch.ops.ffm_ext.ffm_dequantize(packed, num_fields, K).flatten(1)


def _with_pairs_inside_fields(
    function: Callable[..., Tensor], weight: Tensor, batch: ffm_ext.SparseBatch, F: int, grad: str
) -> Tensor:
    """Over all pairs of entries, those inside a field too, as libffm and modern-fm have it."""
    entries = batch.indices, batch.fields, batch.values, batch.offsets
    return function(weight, *entries, num_fields=F, within_field=True, grad=grad)


class Text(Subject):
    """Entries with values, several a field."""

    def expected(self, weight: Tensor, batch: Any) -> Tensor:
        function, F = ffm_ext.reference.ffm_interaction, self.workload.num_fields
        return _with_pairs_inside_fields(function, weight, batch, F, "dense")


class FusedText(Text, Fused):
    """This package on a `SparseBatch`."""

    def forward(self, batch: Any, direction: Direction) -> Tensor:
        function, F = ffm_ext.functional.ffm_interaction, self.workload.num_fields
        return _with_pairs_inside_fields(function, self.weight, batch, F, "sparse")


class ModernFMText(Text, ModernFM):
    """modern-fm on the same entries: a loop over all pairs of a sample."""

    def prepare(self, indices: Any) -> sp.csr_matrix:
        entries = indices.values.double().numpy(), indices.indices.numpy(), indices.offsets.numpy()
        return sp.csr_matrix(entries, shape=(len(indices), self.workload.num_features))
