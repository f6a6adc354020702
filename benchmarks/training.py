# SPDX-License-Identifier: MIT
"""Engines that train an FFM a sample at a time, and the data that they train on."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ffm_ext import FFM
from ffm_ext.optim import AdaGrad, Optimizer, VectorAdaGrad
from ffm_ext.training import Mode, Trainer

from .peer import Peer
from .workloads import NUM_BATCHES, Workload, make_batches


@dataclass(frozen=True)
class TrainingWorkload:
    """One-hot samples of a workload's table, with labels that depend on pairs of them."""

    table: Workload
    samples: int = 200_000
    valid_samples: int = 20_000
    epochs: int = 4

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Ids ``[n, F]`` int32 and labels ``[n]`` float32, those for validation last."""
        n = self.samples + self.valid_samples
        generator = torch.Generator().manual_seed(0)
        size = -(-n // NUM_BATCHES)
        ids = torch.cat(make_batches(replace(self.table, batch_size=size)))[:n].int()
        # What a sample's label depends on: four numbers a feature, of which neighbouring fields multiply one.
        hidden = torch.randn(self.table.num_features, 4, generator=generator)
        rows = hidden[ids.long()]
        score = (rows[:, :-1, 0] * rows[:, 1:, 1]).sum(1) / 4 - 0.7
        labels = (torch.rand(n, generator=generator) < torch.sigmoid(score)).float()
        return ids, labels


def libffm_model(table: Workload) -> FFM:
    """What libffm has."""
    return FFM(
        table.embed_dim,
        num_features=table.num_features,
        num_fields=table.num_fields,
        within_field=True,
        bias=False,
        linear=False,
        normalize=True,
    )


@lru_cache(1)
def libffm_draws(n: int) -> Tensor:
    """What libffm's initial table is made of: ``n`` numbers of C++'s ``std::minstd_rand0`` from seed 1, in [0, 1).

    Engines that start from one table differ in what they do with it, not in their luck.
    """
    modulus, filled = 2**31 - 1, 1
    states = np.empty(n, np.uint64)
    states[0] = 16807
    while filled < n:
        # The k-th state is 16807^k, so those that follow k states are the same times the last of the k.
        more = min(filled, n - filled)
        states[filled : filled + more] = states[:more] * states[filled - 1] % modulus
        filled += more
    return torch.from_numpy((states - 1).astype(np.float32) / np.float32(modulus - 1))


class Engine(Peer):
    """Trains with AdaGrad as libffm does by default: lr 0.2, lambda 2e-5, normalised samples."""

    name: ClassVar[str]
    part: ClassVar[int] = 1  # trains on the first 1/part of the samples

    def epochs(self, workload: TrainingWorkload, threads: int) -> Iterator[tuple[float, float]]:
        """Seconds of training and validation logloss of each epoch; NaN where it was not asked for."""
        raise NotImplementedError


class Ours(Engine):
    mode: ClassVar[Mode] = "exact"
    dtype: ClassVar[torch.dtype] = torch.float32
    optimizer: ClassVar[Optimizer] = AdaGrad(lr=0.2, weight_decay=2e-5)

    def epochs(self, workload: TrainingWorkload, threads: int) -> Iterator[tuple[float, float]]:
        model = libffm_model(workload.table).to(self.dtype)
        weight = model.interaction.weight
        with torch.no_grad():
            weight.copy_(
                libffm_draws(weight.numel()).view_as(weight) * workload.table.embed_dim**-0.5
            )
        mode: Mode = self.mode if threads == 1 else "hogwild"
        trainer = Trainer(model, optimizer=self.optimizer, mode=mode, num_threads=threads)
        ids, labels = workload.data
        n = workload.samples
        for epoch in range(workload.epochs):
            history = trainer.fit((ids[:n], labels[:n]), (ids[n:], labels[n:]), epochs=epoch + 1)
            assert history[-1].valid_loss is not None
            yield history[-1].seconds, history[-1].valid_loss


class Exact(Ours):
    name = "ffm_ext"


class Narrow(Ours):
    name = "ffm_ext, bfloat16, a sum a vector"
    dtype = torch.bfloat16
    optimizer = VectorAdaGrad(lr=0.2, weight_decay=2e-5, rounding_seed=0)


# It prints a line an epoch: number, training and validation logloss, seconds since the start. It validates only where
# it may stop early. In a process of its own, since its number of threads is read from the environment.
LIBFFM = """
import sys, tempfile
import numpy as np, pylibffm, scipy.sparse
given = np.load(sys.argv[1])
ids, labels, fields = given["ids"], given["labels"].astype(int), given["fields"]
n, k, epochs = (int(argument) for argument in sys.argv[2:])
def rows(ids):
    offsets = np.arange(len(ids) + 1) * ids.shape[1]
    return scipy.sparse.csr_matrix((np.ones(ids.size), ids.ravel(), offsets), (len(ids), len(fields)))
with tempfile.TemporaryDirectory() as folder:
    options = {"nr_iters": epochs, "k": k, "auto_stop": True}
    pylibffm.train(rows(ids[:n]), labels[:n], fields, folder, options, rows(ids[n:]), labels[n:])
"""


class Libffm(Engine):
    name = "libffm"
    module = "pylibffm"

    def epochs(self, workload: TrainingWorkload, threads: int) -> Iterator[tuple[float, float]]:
        ids, labels = workload.data
        table = workload.table
        fields = table.feature_fields
        with tempfile.TemporaryDirectory() as folder:
            given = Path(folder, "given.npz")
            np.savez(given, ids=ids.numpy(), labels=labels.numpy(), fields=fields)
            sizes = [str(workload.samples), str(table.embed_dim), str(workload.epochs)]
            done = subprocess.run(
                [sys.executable, "-c", LIBFFM, str(given), *sizes],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                text=True,
                check=True,
            )
        before = 0.0
        for line in done.stdout.splitlines():
            columns = line.split()
            if len(columns) == 4 and columns[0].isdigit():
                yield float(columns[3]) - before, float(columns[2])
                before = float(columns[3])


class ModernFM(Engine):
    """Too slow for all of the samples; it has no normalisation, and a thread."""

    name = "modern-fm"
    module = "modern_fm"
    part = 10

    def epochs(self, workload: TrainingWorkload, threads: int) -> Iterator[tuple[float, float]]:
        ids, labels = workload.data
        table, n = workload.table, workload.samples // self.part
        x = table.matrix(ids[:n])
        model = importlib.import_module(self.module).FFMClassifier(
            n_factors=table.embed_dim,
            learning_rate=0.2,
            l2_factors=2e-5,
            dtype="float32",
            n_jobs=threads,
        )
        # The first call makes the tables, too: it does not count.
        model.partial_fit(
            x[:10], labels[:10].numpy(), field_ids=table.feature_fields, classes=[0, 1]
        )
        start = time.perf_counter()
        model.partial_fit(x, labels[:n].numpy())
        yield time.perf_counter() - start, math.nan


ENGINES: tuple[type[Engine], ...] = (Exact, Narrow, Libffm, ModernFM)
