# SPDX-License-Identifier: MIT
"""What ``gpu_check.py`` measures on a GPU, by CUDA events: ``python -m benchmarks.gpu_measure roofline figures.json``.

small       every operator once, on small problems: for compute-sanitizer
roofline    our steps as shares of a device copy, which is measured in the same process
peers       our steps beside what else computes them
describe    the GPU and its software, one line of JSON
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ffm_ext
from ffm_ext import FFMInteraction, QuantizedFFMInteraction, SparseBatch, optim

from .subjects import Compiled, Fused, Subject, Torchfm, Vectorised
from .workloads import Direction, Workload, make_batches, short

Record = dict[str, Any]

B, N, F = 65536, 2_000_000, 39
DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
WARMUPS, ROUNDS = 3, 20


def describe() -> Record:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "ffm_ext": ffm_ext.__version__,
        "built for": ", ".join(ffm_ext.build_info()["cuda_archs"]),
        "date": datetime.date.today().isoformat(),
    }


def timed(step: Callable[[int], object]) -> tuple[float, float]:
    """Median seconds of ``step(i)`` and half their interquartile range over it."""
    for i in range(WARMUPS):
        step(i)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(ROUNDS)
    ]
    torch.cuda.synchronize()
    for i, (begin, end) in enumerate(events):
        begin.record()
        step(i)
        end.record()
    torch.cuda.synchronize()
    seconds = [begin.elapsed_time(end) / 1000 for begin, end in events]
    low, median, high = statistics.quantiles(seconds, n=4)
    return median, (high - low) / 2 / median


def copy_bandwidth() -> float:
    """Bytes read and written a second, by a copy within the device that no cache holds."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").fill_(1.0)
    target = torch.empty_like(source)
    seconds, _ = timed(lambda i: target.copy_(source))
    return 2 * source.numel() * 4 / seconds


def make_ids(num_features: int, num_fields: int, batch_size: int, batches: int) -> list[Tensor]:
    """Uniform global ids [B, F] within each field."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = num_features // num_fields
    starts = torch.arange(num_fields, device="cuda") * size
    shape = batch_size, num_fields
    return [
        starts + torch.randint(size, shape, generator=generator, device="cuda")
        for _ in range(batches)
    ]


class Output:
    """Tables, written after every row: whoever waits may run out of time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tables: dict[str, Record] = {}
        self.figures: list[Record] = []

    def table(self, title: str, header: list[str], *notes: str) -> None:
        self.tables[title] = {"header": header, "rows": [], "notes": list(notes)}

    def row(self, title: str, cells: list[str], **figures: Any) -> None:
        self.tables[title]["rows"].append(cells)
        self.figures.append({"table": title, **figures})
        print(title, *cells, sep=" | ", flush=True)
        text = json.dumps({"tables": self.tables, "figures": self.figures}, ensure_ascii=False)
        self.path.write_text(text)


# ------------------------------------------------------------------------------------------------ roofline


def steps_of(
    embed_dim: int, dtype: torch.dtype, ids: list[Tensor]
) -> Iterator[tuple[str, float, Callable[[int], object]]]:
    """Name, bytes that cannot be saved, and what is timed."""
    item = DTYPES[dtype]
    row = F * embed_dim * item
    rows = B * F
    updated = [batch.unique() for batch in ids]
    touched = statistics.mean(rows.numel() for rows in updated)
    lists, out = rows * 8, B * item

    layer = FFMInteraction(N, F, embed_dim, dtype=dtype, device="cuda")
    weight = layer.weight.detach()
    table = weight.view(N, F, embed_dim)
    upstream = torch.rand(B, device="cuda").to(dtype)

    yield (
        "gather_sum",
        rows * row + lists + out,
        lambda i: torch.ops.ffm_ext.gather_sum(table, ids[i % len(ids)]),
    )
    yield (
        "forward",
        rows * row + lists + out,
        lambda i: torch.ops.ffm_ext.ffm_forward(
            table, ids[i % len(ids)], None, None, None, "sum", False
        ),
    )

    from .gpu_roofs import RandomUpdate

    updated = [rows[torch.randperm(rows.numel(), device="cuda")] for rows in updated]
    update = RandomUpdate(weight)
    count = touched * (2 * (row + F * embed_dim * 4) + 8)
    yield "rows and states updated", count, lambda i: update(updated[i % len(ids)])

    def with_gradient(i: int) -> None:
        layer(ids[i % len(ids)]).backward(upstream)
        layer.weight.grad = None

    # Rows are read by forward and by backward.
    twice = 2 * (rows * row + lists + out)
    yield "forward + sparse gradient", twice + touched * (row + 8), with_gradient
    for optimizer in (optim.SGD(lr=1e-3), optim.AdaGrad(lr=1e-3)):
        layer.fuse_optimizer(optimizer)
        state = len(optimizer.state_names) * F * embed_dim * 4
        name = f"forward + fused {type(optimizer).__name__}"
        yield name, twice + touched * 2 * (row + state), with_gradient
    if dtype == torch.float32:
        quantized = QuantizedFFMInteraction.from_float(layer)
        packed = quantized.packed.shape[1]
        yield "int8 forward", rows * packed + lists + B * 4, lambda i: quantized(ids[i % len(ids)])


def roofline(path: Path) -> None:
    output = Output(path)
    copy = copy_bandwidth()
    title = "Share of a device copy"
    output.table(
        title,
        ["dtype", "K", "step", "samples/s", "ms", "GB/s", "share"],
        f"B = {B}, N = {short(N)}, F = {F}, uniform ids. The copy moves {copy / 1e9:.0f} GB/s, read and written.",
        "Bytes: rows as often as they are named, once by forward and once by backward; a touched row and its state",
        "written, and read again where it is updated. The roofs do nothing else: gather_sum reads the batch's rows,",
        "'rows and states updated' reads and writes each that it names, and a state of it, in any order.",
    )
    ids = make_ids(N, F, B, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for embed_dim in (4, 8, 16):
            for name, count, step in steps_of(embed_dim, dtype, ids):
                of = str(dtype).removeprefix("torch.")
                figures: Record = {"dtype": of, "embed_dim": embed_dim, "step": name}
                try:
                    seconds, spread = timed(step)
                except RuntimeError as error:
                    text = " ".join(str(error).split())[:200]
                    output.row(title, [of, f"{embed_dim}", name, text, "", "", ""], **figures)
                    continue
                cells = [of, f"{embed_dim}", name, short(B / seconds), f"{seconds * 1e3:.3f}"]
                cells += [
                    f"{count / seconds / 1e9:.0f}",
                    f"{count / seconds / copy:.0%} ±{spread:.0%}",
                ]
                figures |= {"seconds": seconds, "spread": spread, "bytes": count, "copy": copy}
                output.row(title, cells, **figures)
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------- peers


class TorchfmLoop(Subject):
    """What torchfm's layer does: F tables of embeddings, and a Python loop over all pairs of fields."""

    name = "torchfm's loop"
    directions = ("forward", "dense")

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        tables = weight.view(workload.table_shape).unbind(1)
        self.tables = [table.contiguous().requires_grad_() for table in tables]

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        rows = [torch.nn.functional.embedding(batch, table) for table in self.tables]
        n = self.workload.num_fields
        pairs = [rows[g][:, f] * rows[f][:, g] for f in range(n - 1) for g in range(f + 1, n)]
        return torch.stack(pairs, dim=1).sum((1, 2))

    def drop_gradient(self) -> None:
        for table in self.tables:
            table.grad = None


class Tbe(Subject):
    """FBGEMM's table-batched embeddings with their fused AdaGrad, and the pairs by torch.compile."""

    name = "FBGEMM TBE, fused"
    module = "fbgemm_gpu.split_table_batched_embeddings_ops_training"
    directions = ("forward", "sparse")

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        from fbgemm_gpu import split_table_batched_embeddings_ops_common as common  # type: ignore
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as training

        size, width = weight.shape
        place = common.EmbeddingLocation.DEVICE, training.ComputeDevice.CUDA
        self.tables = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(size, width, *place)],
            optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=1e-3,
            pooling_mode=common.PoolingMode.NONE,
            output_dtype=common.SparseType.FP32,
        )
        self.tables.split_embedding_weights()[0].copy_(weight)
        n = workload.num_fields

        def pairs(rows: Tensor) -> Tensor:
            rows = rows.view(-1, n, n, workload.embed_dim)
            return (rows * rows.transpose(1, 2)).sum(3).triu(1).sum((1, 2))

        self.pairs = torch.compile(pairs)

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        entries = batch.flatten()
        offsets = torch.arange(entries.numel() + 1, device=batch.device)
        return self.pairs(self.tables(entries, offsets))

    def drop_gradient(self) -> None:
        pass


class FusedStep(Subject):
    """This package, the table updated in backward."""

    name = "ffm_ext, fused AdaGrad"
    role = "ours"
    directions = ("sparse",)

    def __init__(self, workload: Workload, weight: Tensor) -> None:
        super().__init__(workload, weight)
        self.layer = FFMInteraction(*workload.table_shape, device="meta").to_empty(device="cuda")
        with torch.no_grad():
            self.layer.weight.copy_(weight)
        self.layer.fuse_optimizer(optim.AdaGrad(lr=1e-3))

    def forward(self, batch: Tensor, direction: Direction) -> Tensor:
        return self.layer(batch)

    def drop_gradient(self) -> None:
        pass


def step_of(
    subject: Subject, batches: list[Tensor], upstream: Tensor, direction: Direction
) -> Callable[[int], object]:
    return lambda i: subject.step(batches[i % len(batches)], upstream, direction)


def peers(path: Path) -> None:
    output = Output(path)
    title = "Peers, samples/s"
    directions: tuple[Direction, ...] = ("forward", "dense", "sparse")
    output.table(
        title,
        ["K", "who", "forward", "forward + dense gradient", "forward + sparse gradient or update"],
        f"B = {B}, N = {short(N)}, F = {F}, float32, uniform ids. The dense gradient has the size of the table.",
    )
    Vectorised.chunk = 1 << 14  # no cache to stay in
    for embed_dim in (4, 8, 16):
        workload = Workload(N, embed_dim, "uniform", num_fields=F, batch_size=B)
        on_cpu = make_batches(workload)
        size = (F * (F - 1) / 2 * embed_dim) ** -0.25
        weight = torch.empty(N, F * embed_dim, device="cuda").normal_(0.0, size)
        upstream = torch.rand(B, device="cuda")
        loop = TorchfmLoop if Torchfm.missing() else Torchfm
        for kind in (Fused, FusedStep, Vectorised, Compiled, loop, Tbe):
            cells = [f"{embed_dim}", kind.name]
            figures: Record = {"embed_dim": embed_dim, "who": kind.name}
            subject: Subject | None = None
            try:
                if reason := kind.missing():
                    output.row(title, [*cells, reason.partition("\n")[0], "", ""], **figures)
                    continue
                subject = kind(workload, weight)
                batches = [subject.prepare(batch).cuda() for batch in on_cpu]
                for direction in directions:
                    if direction not in kind.directions:
                        cells.append("–")
                        continue
                    seconds, spread = timed(step_of(subject, batches, upstream, direction))
                    cells.append(f"{short(B / seconds)} ±{spread:.0%}")
                    figures[direction] = seconds
            except Exception as error:  # a peer that does not run here is a line of the table
                cells.append(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
            output.row(title, [*cells, "", "", ""][:5], **figures)
            del subject
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------- small


def small() -> None:
    """Kernels of every kind: few samples, so that a tool which looks at each access ends in seconds."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for num_fields, embed_dim in ((3, 1), (5, 3), (7, 4), (9, 8), (5, 16), (2, 10)):
            weight = torch.randn(50, num_fields, embed_dim, device="cuda").to(dtype)
            ids = torch.randint(50, (300, num_fields), device="cuda")
            fields = torch.randint(num_fields, (700,), device="cuda")
            ends = torch.randint(700, (199,), device="cuda").sort().values
            offsets = torch.cat([ends.new_tensor([0]), ends, ends.new_tensor([700])])
            entries = torch.randint(50, (700,), device="cuda")
            x = torch.rand(700, device="cuda").to(dtype)
            for lists in ((ids, None, None, None), (entries, fields, x, offsets)):
                for mode in ("sum", "dot", "hadamard"):
                    out = torch.ops.ffm_ext.ffm_forward(weight, *lists, mode, True)
                    seed, has_values = torch.rand_like(out), lists[2] is not None
                    torch.ops.ffm_ext.ffm_backward(seed, weight, *lists, mode, True, has_values)
                    torch.ops.ffm_ext.ffm_backward_sparse(
                        seed, weight, *lists, mode, True, has_values
                    )
                layer = FFMInteraction(50, num_fields, embed_dim, dtype=dtype, device="cuda")
                batch = lists[0] if lists[1] is None else SparseBatch(entries, fields, x, offsets)
                for optimizer in (optim.SGD(lr=0.1), optim.AdaGrad(lr=0.1), optim.Adam(lr=0.1)):
                    layer.fuse_optimizer(optimizer)
                    layer(batch).sum().backward()
                with torch.inference_mode():
                    ffm_ext.quantize(layer)(batch)
    # Samples that do not fit into shared memory.
    wide = torch.randn(20, 100, 16, device="cuda")
    torch.ops.ffm_ext.ffm_forward(
        wide, torch.randint(20, (3, 100), device="cuda"), None, None, None, "sum", False
    )
    torch.cuda.synchronize()
    print("every kernel ran")


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("gpu_measure: no CUDA device")
        return 2
    what, *path = arguments
    if what == "describe":
        print(json.dumps(describe()))
    elif what == "small":
        small()
    else:
        {"roofline": roofline, "peers": peers}[what](Path(path[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
