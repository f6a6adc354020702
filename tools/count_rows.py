# SPDX-License-Identifier: MIT
"""The figures behind docs/distributed.md, "How it grows": ``python -m tools.count_rows``.

How many rows of the table the parts of one global batch touch, which is the same on every machine; and what a step of
``DistributedTrainer`` takes one thread here: the whole batch in one process, and, of more processes, what each of them
has to do with the rows of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.workloads import Workload, make_batches
from ffm_ext import FFM
from ffm_ext.data import SparseDataset
from ffm_ext.distributed import DistributedTrainer
from ffm_ext.optim import AdaGrad

WORKLOAD = Workload(1_000_000, 4, "zipf", batch_size=65_536)
PROCESSES = (1, 8, 64, 512)
LINKS = {"2.5 GB/s": 2.5e9, "50 GB/s": 50e9}
ROUNDS = 7


def seconds(function: Callable[[], object]) -> float:
    """The least of ``ROUNDS``, of this process's own time: one thread, and what else the machine does is left out."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


def print_table(*rows: tuple[str, ...]) -> None:
    for number, row in enumerate(rows):
        print("|", " | ".join(row), "|")
        if number == 0:
            print("|---" * len(row) + "|")
    print()


def count(ids: Tensor) -> list[list[Tensor]]:
    """Of each number of processes, the rows that each of them touches."""
    touched = [[part.unique() for part in ids.chunk(size)] for size in PROCESSES]
    F, K = WORKLOAD.num_fields, WORKLOAD.embed_dim
    rows = []
    for parts in touched:
        total = sum(map(len, parts))
        received = (4 * F * K + 8) * total * (1 - 1 / len(parts))  # a row and its id
        rows.append(
            (
                f"{len(parts)}",
                f"{len(ids) // len(parts):,}",
                f"{total / len(parts):,.0f}",
                f"{total / ids.numel():.0%}",
                f"{total:,}",
                f"{received / 1e6:,.0f} MB",
                *(f"{1e3 * received / speed:.0f} ms" for speed in LINKS.values()),
            )
        )
    names = ("processes", "samples each", "rows each touches", "of its entries", "rows gathered")
    print_table((*names, "received", *(f"at {link}" for link in LINKS)), *rows)
    return touched


def measure(ids: Tensor, touched: list[list[Tensor]]) -> None:
    torch.set_num_threads(1)
    N, F, K = WORKLOAD.table_shape
    model = FFM(K, num_features=N, num_fields=F, bias=False, linear=False)
    optimizer = AdaGrad(lr=0.1)
    labels = torch.rand(len(ids)).round()
    dataset = SparseDataset.from_arrays(ids, labels, num_features=N, num_fields=F)
    trainer = DistributedTrainer(
        model, optimizer=optimizer, batch_size=len(ids), num_threads=1, shuffle=False
    )
    step = seconds(lambda: trainer.fit(dataset, epochs=trainer.epoch + 1))  # an epoch is a step

    rows = ids.unique()
    table = model.interaction.weight.detach().view(N, F, K)
    state, gradient = torch.ones_like(table), torch.zeros(len(rows), F, K)
    settings = optimizer.name, optimizer.settings(), 1, None
    update = seconds(
        lambda: torch.ops.ffm_ext.ffm_update_(table, [state], rows, gradient, *settings)
    )
    print_table(
        ("processes", "own samples", "sum of the rows of all", "update"),
        *(
            (
                f"{len(parts)}",
                f"{1e3 * (step - update) / len(parts):.0f} ms",
                f"{1e3 * seconds_of_sum(torch.cat(parts), F * K):.0f} ms" if len(parts) > 1 else "",
                f"{1e3 * update:.0f} ms",
            )
            for parts in touched
        ),
    )


def seconds_of_sum(rows: Tensor, width: int) -> float:
    """As ``DistributedTrainer`` sums what it has gathered."""
    gradient = torch.zeros(len(rows), width)

    def run() -> None:
        unique, inverse = rows.unique(return_inverse=True)
        torch.zeros(len(unique), width).index_add_(0, inverse, gradient)

    return seconds(run)


def main() -> None:
    ids = make_batches(WORKLOAD)[0]
    measure(ids, count(ids))
    print(", ".join(f"{name}: {value}" for name, value in describe().items()))


if __name__ == "__main__":
    main()
