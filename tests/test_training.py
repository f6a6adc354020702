# SPDX-License-Identifier: MIT
"""The single-pass engine against libffm's formulas, against libffm itself, and against interruptions."""

import copy
import ctypes
import dataclasses
import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

import ffm_ext
from ffm_ext import FFM, SparseBatch, optim
from ffm_ext.cli import _models as cli_models
from ffm_ext.data import SparseDataset
from ffm_ext.training import Trainer

N, F, K = 60, 6, 4


def samples(kind, n=200, seed=0):
    """Lists of (field, feature, value)."""
    rng = np.random.RandomState(seed)
    per = N // F
    made = []
    for _ in range(n):
        if kind == "one-hot":
            ids = rng.randint(0, per, F) + np.arange(F) * per
            values = np.ones(F)
        elif kind == "shared rows":
            # Two fields may name one row: what a pair moves is then read by another one.
            ids, values = rng.randint(0, per, F), rng.rand(F) + 0.1
            made.append([(f, int(a), float(x)) for f, (a, x) in enumerate(zip(ids, values))])
            continue
        elif kind == "missing fields":
            fields = np.flatnonzero(rng.rand(F) < 0.6)
            ids = rng.randint(0, per, len(fields)) + fields * per
            values = rng.rand(len(ids)) + 0.1
        else:
            ids = np.sort(rng.choice(N, rng.randint(0, 10), replace=False))
            values = rng.rand(len(ids)) + 0.1
        made.append([(int(a) // per, int(a), float(x)) for a, x in zip(ids, values)])
    return made, (rng.rand(n) < 0.4).astype(np.float32)


def lists(kind, n, dtype=torch.float32):
    """A batch with values of a dtype, and labels."""
    made, labels = samples(kind, n)
    x = SparseBatch.from_lists(made)
    return SparseBatch(x.indices, x.fields, x.values.to(dtype), x.offsets), labels


def model(dtype=torch.float64, embed_dim=K, within_field=True, bias=False, linear=False, **options):
    torch.manual_seed(0)
    made = ffm_ext.FFM(
        embed_dim,
        num_features=N,
        num_fields=F,
        within_field=within_field,
        bias=bias,
        linear=linear,
        **{"normalize": True, **options},
    ).to(dtype)
    if made.linear.weight is not None:
        made.linear.to(torch.float64 if dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            made.linear.weight.normal_(std=0.1)
    with torch.no_grad():
        made.interaction.weight.uniform_(0, 0.5)
    return made


class Reference:
    """One sample after the other, one pair after the other, as peers of libffm do it: float64, AdaGrad from 1."""

    def __init__(self, made, lr, decay, loss):
        self.w = made.interaction.weight.detach().double().numpy().reshape(N, F, -1).copy()
        self.G = np.ones_like(self.w)
        self.linear, self.bias = made.linear.weight, made.linear.bias
        self.v = None if self.linear is None else self.linear.detach().double().numpy()[:, 0].copy()
        self.c = None if self.bias is None else float(self.bias.detach())
        self.Gv, self.Gc = np.ones(N), 1.0
        self.within, self.normalize = made.interaction.within_field, made.normalize
        self.lr, self.decay, self.loss = lr, decay, loss

    def pairs(self, sample):
        for i in range(len(sample)):
            for j in range(i + 1, len(sample)):
                if sample[i][0] != sample[j][0] or self.within:
                    yield sample[i], sample[j]

    def train(self, sample, label, weight=1.0):
        squares = sum(x * x for _, _, x in sample)
        r = (1 / squares if squares else 0) if self.normalize else 1.0
        t = sum(
            self.w[a, g] @ self.w[b, f] * x * y * r for (f, a, x), (g, b, y) in self.pairs(sample)
        )
        if self.v is not None:
            t += np.sqrt(r) * sum(self.v[a] * x for _, a, x in sample)
        t += self.c or 0
        if self.loss == "squared":
            loss, kappa = (t - label) ** 2 / 2, t - label
        else:
            y = 1 if label > 0 else -1
            loss, kappa = np.log1p(np.exp(-y * t)), -y / (1 + np.exp(y * t))
        kappa *= weight
        for (f, a, x), (g, b, y) in self.pairs(sample):
            one = self.decay * self.w[a, g] + kappa * x * y * r * self.w[b, f]
            two = self.decay * self.w[b, f] + kappa * x * y * r * self.w[a, g]
            for row, field, gradient in ((a, g, one), (b, f, two)):
                self.G[row, field] += gradient**2
                self.w[row, field] -= self.lr * gradient / np.sqrt(self.G[row, field])
        if self.v is not None:
            for _, a, x in sample:
                gradient = self.decay * self.v[a] + kappa * np.sqrt(r) * x
                self.Gv[a] += gradient**2
                self.v[a] -= self.lr * gradient / np.sqrt(self.Gv[a])
        if self.c is not None:
            self.Gc += kappa**2
            self.c -= self.lr * kappa / np.sqrt(self.Gc)
        return weight * loss


@pytest.mark.parametrize("kind", ["one-hot", "shared rows", "missing fields", "multi-hot"])
@pytest.mark.parametrize("loss", ["logistic", "squared"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "linear": True}, {"normalize": False}])
@pytest.mark.parametrize("embed_dim", [3, 4, 16])
def test_exact_follows_libffm(kind, loss, options, embed_dim):
    made = model(embed_dim=embed_dim, **options)
    reference = Reference(made, 0.2, 2e-3, loss)
    lists, labels = samples(kind)
    weights = np.random.RandomState(1).rand(len(labels)).astype(np.float32)
    trainer = Trainer(
        made, optimizer=optim.AdaGrad(lr=0.2, weight_decay=2e-3), loss=loss, shuffle=False
    )
    data = (ffm_ext.SparseBatch.from_lists(lists), labels, weights)
    for _ in range(2):
        expected = sum(map(reference.train, lists, labels, weights)) / weights.sum()
        assert trainer.partial_fit(data) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        made.interaction.weight.detach().numpy().reshape(reference.w.shape),
        reference.w,
        rtol=1e-5,
        atol=1e-6,
    )
    if options.get("bias"):
        np.testing.assert_allclose(
            made.linear.weight.detach()[:, 0], reference.v, rtol=1e-5, atol=1e-7
        )
        assert made.linear.bias.item() == pytest.approx(reference.c, rel=1e-5)


def test_pairs_inside_a_field_can_be_left_out():
    made = model(within_field=False)
    reference = Reference(made, 0.2, 2e-5, "logistic")
    lists, labels = samples("multi-hot")
    Trainer(made, shuffle=False).partial_fit((ffm_ext.SparseBatch.from_lists(lists), labels))
    for sample, label in zip(lists, labels):
        reference.train(sample, label)
    np.testing.assert_allclose(
        made.interaction.weight.detach().numpy().reshape(reference.w.shape),
        reference.w,
        rtol=1e-5,
        atol=1e-6,
    )


LIBFFM = """
import ctypes, sys, tempfile
import numpy as np, pylibffm, scipy.sparse
given = np.load(sys.argv[1])
x = scipy.sparse.csr_matrix((given["values"], given["indices"], given["offsets"]), (len(given["labels"]), {N}))
ctypes.CDLL(None).srand(1)
model = pylibffm.train(x, given["labels"], given["fields"], tempfile.mkdtemp(), {{"nr_iters": 5}})
# Its arrays have stride 0 with new releases of numpy; what they point to is right.
model.W = np.lib.stride_tricks.as_strided(model.W, (model.W.size,), (4,)).copy()
np.save(sys.argv[2], model.W.reshape({N}, {F}, 2, {K}))
predicted = model.predict(x, given["fields"].astype(np.int32))
np.save(sys.argv[3], np.lib.stride_tricks.as_strided(predicted, predicted.shape, (4,)))
"""


@pytest.mark.parametrize("kind", ["one-hot", "multi-hot"])
def test_as_libffm_itself(kind, tmp_path):
    pytest.importorskip("pylibffm", reason="pylibffm, which wraps libffm, is not installed")
    lists, labels = samples(kind, n=1500)
    data = ffm_ext.SparseBatch.from_lists(lists)
    np.savez(
        tmp_path / "given.npz",
        values=data.values.double().numpy(),
        indices=data.indices.numpy(),
        offsets=data.offsets.numpy(),
        labels=labels.astype(int),
        fields=np.arange(N) // (N // F),
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LIBFFM.format(N=N, F=F, K=K),
            tmp_path / "given.npz",
            tmp_path / "w.npy",
            tmp_path / "predicted.npy",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    losses = [
        float(line.split()[1]) for line in done.stdout.splitlines() if line.split()[0].isdigit()
    ]

    # std::default_random_engine of libstdc++ and its uniform distribution of float.
    state, draws = 1, []
    for _ in range(N * F * K):
        state = 16807 * state % 2147483647
        draws.append(np.float32(np.float32(state - 1) / np.float32(2147483646)))
    libc = ctypes.CDLL(None)
    libc.srand(1)

    class Libffm(Trainer):
        def _order(self, n, stream):
            if stream == 0:
                libc.rand()  # for the order of its two blocks, of which one is empty
                return np.arange(n)
            order = list(range(n))
            for i in range(1, n):
                j = libc.rand() % (i + 1)
                order[i], order[j] = order[j], order[i]
            return np.array(order)

    made = model(dtype=torch.float32)
    with torch.no_grad():
        made.interaction.weight.copy_(torch.tensor(draws).view(N, F * K) / K**0.5)
    trainer = Libffm(made)
    history = trainer.fit((data, labels), epochs=5)
    assert [epoch.train_loss for epoch in history] == pytest.approx(losses, abs=2e-5)
    predicted = np.load(tmp_path / "predicted.npy")
    np.testing.assert_allclose(trainer.predict(data).numpy(), predicted, rtol=0, atol=1e-4)
    theirs = np.load(tmp_path / "w.npy")[:, :, 0]
    ours = made.interaction.weight.detach().numpy().reshape(N, F, K)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize(
    "optimizer", [optim.AdaGrad(lr=0.1, weight_decay=1e-3), optim.SGD(lr=0.05)]
)
def test_batches_of_one_are_exact(optimizer):
    # Apart from decay, which then is that of whole rows.
    lists, labels = samples("one-hot")
    optimizer = type(optimizer)(lr=optimizer.lr)
    weights = np.random.RandomState(1).rand(len(labels)).astype(np.float32)
    data = (ffm_ext.SparseBatch.from_lists(lists), labels, weights)
    made = [model(bias=True, linear=True) for _ in range(2)]
    losses = [
        Trainer(m, optimizer=optimizer, mode=mode, batch_size=1).partial_fit(data)
        for m, mode in zip(made, ("exact", "deterministic"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, two in zip(made[0].parameters(), made[1].parameters()):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", list(optim.OPTIMIZERS.values()))
@pytest.mark.parametrize("mode", ["exact", "hogwild", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_optimizer_learns(optimizer, mode, dtype):
    rng = np.random.RandomState(0)
    ids = rng.randint(0, N // F, (4000, F)) + np.arange(F) * (N // F)
    strength = rng.randn(N // F)
    labels = (strength[ids[:, 0] % 10] * strength[ids[:, 1] % 10] > 0).astype(np.float32)
    made = model(dtype=dtype, bias=True, linear=True)
    rates = {"sgd": 0.3, "adam": 0.01, "ftrl": 0.3}
    trainer = Trainer(
        made,
        optimizer=optimizer(lr=rates.get(optimizer.name, 0.2)),
        mode=mode,
        batch_size=64,
        num_threads=2,
    )
    history = trainer.fit((torch.from_numpy(ids), labels), epochs=6)
    assert history[-1].train_loss < 0.75 * history[0].train_loss
    assert [epoch.samples for epoch in history] == [4000] * 6


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.AdaGrad, optim.VectorAdaGrad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [2, 3, 40])
@pytest.mark.parametrize("form", ["matrix", "lists"])
def test_threads_lose_no_update_of_frequent_rows(optimizer, dtype, threads, form):
    """Every row here is frequent. With steps of next to nothing, the order of the samples makes no difference."""
    rng = np.random.RandomState(0)
    num_fields, size, samples = 7, 5, 9000
    ids = rng.randint(0, size, (samples, num_fields)) + size * np.arange(num_fields)
    x = torch.from_numpy(ids.astype(np.int32 if form == "matrix" else np.int64))
    if form == "lists":
        fields = np.tile(np.arange(num_fields), (samples, 1))
        has = rng.rand(*ids.shape) < 0.9
        offsets = np.append(0, has.sum(1).cumsum())
        values = torch.from_numpy(rng.rand(int(has.sum())) + 0.5).to(dtype)
        indices, fields, offsets = map(torch.from_numpy, (ids[has], fields[has], offsets))
        x = SparseBatch(indices, fields, values, offsets)
    labels = (rng.rand(samples) < 0.5).astype(np.float32)
    lr = 1e-9 if dtype == torch.float64 else 1e-30

    def trained(mode):
        torch.manual_seed(0)
        sizes = {"num_features": num_fields * size, "num_fields": num_fields}
        made = FFM(4, **sizes, bias=False, linear=False, dtype=dtype)
        before = made.interaction.weight.detach().clone()
        trainer = Trainer(made, optimizer=optimizer(lr=lr), mode=mode, num_threads=threads)
        loss = trainer.partial_fit((x, labels))
        state = trainer._states["table"]
        return loss, made.interaction.weight.detach() - before, state[0] if state else None

    (loss, moved, state), (exact_loss, exact_moved, exact_state) = map(
        trained, ("hogwild", "exact")
    )
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    if dtype == torch.float64:
        assert exact_moved.count_nonzero() == moved.numel() * (1 - 1 / num_fields)
    else:
        # What is added to a number is lost in it, but for a weight of zero: torch draws some in bfloat16.
        assert max(exact_moved.double().abs().max(), moved.double().abs().max()) < 1e-20
    if state is None:
        torch.testing.assert_close(moved, exact_moved, rtol=1e-5, atol=1e-13)
    else:
        assert (exact_state > 1).double().mean() == pytest.approx(1 - 1 / num_fields)
        torch.testing.assert_close(state, exact_state, rtol=2e-4, atol=0)


@pytest.mark.parametrize("optimizer", list(optim.OPTIMIZERS.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("embed_dim", [3, 4, 8, 16])
@pytest.mark.parametrize("kind", ["one-hot", "weighted samples", "values", "missing fields"])
def test_a_sample_moves_what_its_pairs_share(optimizer, dtype, embed_dim, kind):
    # Pairs are met many at a time, in squares of up to 16 fields that overlap at the end. Here: each vector that is in
    # a pair, one after the other, by the operator that updates rows. All others keep their bits, and reach nothing:
    # an entry's vector for its own field, which nobody has, is no number.
    # Adam's step does not shrink with the gradient: of a gradient of rounding errors it would make a whole step.
    rates = optimizer(
        lr=0.02, weight_decay=1e-2, **({"eps": 0.05} if optimizer is optim.Adam else {})
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for num_fields in (1, 2, 5, 8, 13, 16, 19, 39):
        rng = np.random.RandomState(num_fields)
        n, samples = 3 * num_fields, 4
        ids = rng.randint(0, 3, (samples, num_fields)) + 3 * np.arange(num_fields)
        fields = np.tile(np.arange(num_fields), (samples, 1))
        has = rng.rand(*ids.shape) < (0.6 if kind == "missing fields" else 2)
        values = (
            None
            if kind in ("one-hot", "weighted samples")
            else torch.from_numpy(rng.rand(*ids.shape)[has] + 0.5).to(dtype)
        )
        # Next to nothing but the decay moves a sample that weighs nothing.
        weights = torch.tensor([0.0, 2.0, 1e-25, 0.5]) if kind == "weighted samples" else None
        offsets = torch.from_numpy(np.append(0, has.sum(1).cumsum()))
        labels = torch.from_numpy((rng.rand(samples) < 0.5).astype(np.float32))

        # Rows of single vectors, a table as large as the one that is trained.
        vectors = torch.from_numpy(rng.uniform(-0.5, 0.5, (n * num_fields, 1, embed_dim))).to(dtype)
        vectors[np.arange(n) * num_fields + np.arange(n) // 3] = float("nan")
        states = list(rates.new_state(vectors.flatten(1), embed_dim).values())
        states = [
            s.unflatten(1, (1, -1)) if s.shape[1] > 1 or embed_dim == 1 else s for s in states
        ]
        table = vectors.clone().view(n, num_fields, embed_dim)
        before = table.clone()
        table_states = [s.clone().reshape(n, num_fields, *s.shape[2:]) for s in states]

        for b in range(samples):
            row = ids[b][has[b]], fields[b][has[b]]
            x = np.ones(len(row[0]))
            if values is not None:
                x = values[int(offsets[b]) : int(offsets[b + 1])].double().numpy()
            pairs = list(itertools.combinations(range(len(x)), 2))
            one = np.array([row[0][i] * num_fields + row[1][j] for i, j in pairs], dtype=np.int64)
            two = np.array([row[0][j] * num_fields + row[1][i] for i, j in pairs], dtype=np.int64)
            product = np.array([x[i] * x[j] for i, j in pairs]).reshape(-1, 1, 1)
            w = vectors.double().numpy()
            score = float((w[one] * w[two] * product).sum())
            sign = 1 if labels[b] > 0 else -1
            slope = -sign / (1 + np.exp(sign * score))
            if weights is not None:
                slope *= float(weights[b])
            moved = np.concatenate([one, two])
            order = np.argsort(moved)
            gradient = slope * np.concatenate([w[two], w[one]]) * np.concatenate([product, product])
            torch.ops.ffm_ext.ffm_update_(
                vectors,
                states,
                torch.from_numpy(moved[order]),
                torch.from_numpy(gradient[order]).to(wide).to(dtype),
                rates.name,
                rates.settings(),
                b + 1,
                None,
            )
        torch.ops.ffm_ext.ffm_train_(
            *(table, table_states, None, [], None, []),
            torch.from_numpy(ids[has]),
            torch.from_numpy(fields[has]),
            values,
            offsets,
            *(labels, weights, torch.arange(samples), "logistic", False, False),
            *(rates.name, rates.settings(), 1, None, False),
        )
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
        torch.testing.assert_close(
            table.flatten(0, 1), vectors[:, 0], rtol=tolerance, atol=tolerance, equal_nan=True
        )
        for found, wanted in zip(table_states, states):
            torch.testing.assert_close(
                found.flatten(),
                wanted.flatten(),
                rtol=10 * tolerance,
                atol=tolerance,
                equal_nan=True,
            )
        in_a_pair = torch.zeros(len(vectors), dtype=torch.bool)
        for b in range(samples):
            for row, g in itertools.product(range(num_fields), repeat=2):
                if row != g and has[b, row] and has[b, g]:
                    in_a_pair[ids[b, row] * num_fields + fields[b, g]] = True
        torch.testing.assert_close(
            *(kept.flatten(0, 1)[~in_a_pair] for kept in (table, before)),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
        touched = np.unique(ids[has])
        untouched = np.setdiff1d(np.arange(n), touched)
        assert torch.equal(table[untouched].isnan(), vectors.view_as(table)[untouched].isnan())


@pytest.mark.parametrize("embed_dim", [2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["one-hot", "values", "no gradient"])
def test_vectors_are_rounded_at_random(embed_dim, kind):
    num_fields, seeds = 39, 64
    rng = np.random.RandomState(0)
    ids = torch.arange(num_fields)
    start = torch.from_numpy(rng.uniform(-0.5, 0.5, (num_fields, num_fields, embed_dim)))
    start = start.bfloat16()
    own = torch.arange(num_fields)
    start[own, own] = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    x = torch.from_numpy(rng.rand(num_fields) + 0.5).bfloat16() if kind == "values" else None

    def trained(dtype, seed):
        rates = optim.VectorAdaGrad(lr=0.02, weight_decay=1e-2)
        table = start.to(dtype, copy=True)
        states = list(rates.new_state(table.flatten(1), embed_dim).values())
        torch.ops.ffm_ext.ffm_train_(
            *(table, [s.view(num_fields, num_fields, -1) for s in states], None, [], None, []),
            *(ids, own, None if x is None else x.to(dtype), torch.tensor([0, num_fields])),
            *(torch.ones(1), torch.zeros(1) if kind == "no gradient" else None, torch.arange(1)),
            *("logistic", False, False, rates.name, rates.settings(), 1, seed, False),
        )
        return table.double()

    exact = trained(torch.float64, None)
    moved = ~torch.eye(num_fields, dtype=torch.bool)
    assert torch.equal(exact.isnan().all(2), ~moved)
    found = torch.stack([trained(torch.bfloat16, seed) for seed in range(seeds)])
    assert torch.equal(found.isnan(), exact.isnan().expand_as(found))
    step = 2.0 ** (exact[moved].abs().log2().floor() - 7)
    error = (found[:, moved] - exact[moved]) / step
    assert error.abs().max() < 1.02
    # To nearest, an error of up to a half would not go away.
    assert error.mean(0).abs().max() < 5 * 0.5 / seeds**0.5
    assert abs(float(error.mean())) < 0.01


def test_deterministic_has_the_same_bits_for_any_number_of_threads():
    lists, labels = samples("multi-hot", n=3000)
    data = (ffm_ext.SparseBatch.from_lists(lists), labels)
    tables = []
    for threads in (1, 2, 3):
        made = model(dtype=torch.float32, bias=True, linear=True)
        Trainer(made, mode="deterministic", num_threads=threads).fit(data, epochs=2)
        tables.append([p.detach().clone() for p in made.parameters()])
    for table in tables[1:]:
        assert all(map(torch.equal, table, tables[0]))


def test_weights_of_samples_count_as_repetitions_of_a_batch():
    lists, labels = samples("multi-hot", n=100)
    counts = np.random.RandomState(1).randint(0, 4, 100)
    repeated = [sample for sample, n in zip(lists, counts) for _ in range(n)]
    made = [model(bias=True, linear=True) for _ in range(2)]
    losses = [
        Trainer(m, mode="deterministic", batch_size=1000).fit(data, epochs=3)[-1].train_loss
        for m, data in zip(
            made,
            (
                (ffm_ext.SparseBatch.from_lists(lists), labels, counts),
                (ffm_ext.SparseBatch.from_lists(repeated), np.repeat(labels, counts)),
            ),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for one, two in zip(made[0].parameters(), made[1].parameters()):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("mode", ["exact", "deterministic"])
def test_random_rounding_is_replayed_and_resumed(mode, tmp_path):
    lists, labels = samples("multi-hot", n=500)
    data = (ffm_ext.SparseBatch.from_lists(lists), labels)

    def trained(seed, path=None):
        made = model(dtype=torch.bfloat16, bias=True, linear=True)
        trainer = Trainer(
            made, optimizer=optim.VectorAdaGrad(lr=0.1, rounding_seed=seed), mode=mode
        )
        trainer.fit(data, epochs=1, checkpoint=path)
        if path is not None:
            trainer = Trainer.load(path)
        trainer.fit(data, epochs=2)
        return trainer.model.interaction.weight.detach()

    once = trained(1)
    assert torch.equal(once, trained(1, tmp_path / "c"))
    assert not torch.equal(once, trained(2))


def test_auto_stop_takes_the_weights_from_before_the_rise():
    lists, labels = samples("one-hot", n=300)
    valid_lists, valid_labels = samples("one-hot", n=300, seed=1)
    data = (ffm_ext.SparseBatch.from_lists(lists), labels)
    valid = (ffm_ext.SparseBatch.from_lists(valid_lists), valid_labels)
    made = model()
    trainer = Trainer(made, optimizer=optim.AdaGrad(lr=0.5))
    history = trainer.fit(data, valid, epochs=50, auto_stop=True)
    losses = [epoch.valid_loss for epoch in history]
    assert 1 < len(history) < 50
    assert losses[-1] >= losses[-2] == min(losses)
    assert trainer.evaluate(valid) == pytest.approx(losses[-2], rel=1e-6)
    with pytest.warns(UserWarning, match=f"stopped in epoch {len(losses)}.* without auto_stop"):
        trainer.fit(data, valid, epochs=51, auto_stop=True)
    assert len(trainer.fit(data, epochs=51)) == 51


@pytest.mark.parametrize("mode", ["exact", "deterministic"])
def test_the_best_weights_are_taken_where_epochs_run_out(mode, tmp_path):
    data, valid = (
        (ffm_ext.SparseBatch.from_lists(lists), labels)
        for lists, labels in (samples("one-hot", n=300, seed=seed) for seed in (0, 1))
    )
    options = {"auto_stop": True, "patience": 20, "checkpoint": tmp_path / "c"}

    def new_trainer():
        return Trainer(model(), optimizer=optim.AdaGrad(lr=0.5), mode=mode, batch_size=32)

    trainer = new_trainer()
    losses = [epoch.valid_loss for epoch in trainer.fit(data, valid, epochs=6, **options)]
    assert losses[-1] > min(losses)
    assert trainer.evaluate(valid) == pytest.approx(min(losses), rel=1e-6)
    # A run from its checkpoint ends as it has, and goes on as one that never ended.
    again = Trainer.load(tmp_path / "c")
    assert again.evaluate(valid) == pytest.approx(losses[-1], rel=1e-6)
    again.fit(data, valid, epochs=6, **options)
    assert torch.equal(again.model.interaction.weight, trainer.model.interaction.weight)
    again = Trainer.load(tmp_path / "c")
    again.fit(data, valid, epochs=9, **options)
    whole = new_trainer()
    whole.fit(data, valid, epochs=9, **options)
    assert again.history[:6] == trainer.history
    assert [e.valid_loss for e in again.history] == [e.valid_loss for e in whole.history]
    # What was learnt since is not taken back.
    trainer.partial_fit(data)
    before = trainer.model.interaction.weight.detach().clone()
    trainer.fit(data, valid, epochs=7, **options)
    assert torch.equal(trainer.model.interaction.weight, before)


def test_ftrl_goes_on_from_the_weights_that_were_taken(tmp_path):
    """Its states stand for weights, by its numbers: for those that were taken, and by the numbers of now."""
    data, valid = (
        (ffm_ext.SparseBatch.from_lists(lists), labels)
        for lists, labels in (samples("one-hot", n=300, seed=seed) for seed in (0, 1))
    )
    made = model(bias=True, linear=True)
    trainer = Trainer(made, optimizer=optim.FTRL(lr=0.5, weight_decay=0.1))
    losses = [e.valid_loss for e in trainer.fit(data, valid, epochs=9, auto_stop=True, patience=9)]
    assert losses[-1] > min(losses)
    taken = [p.detach().clone() for p in made.parameters()]
    # As good as no gradient.
    still = (*data, np.full(300, 1e-12, np.float32))
    trainer.partial_fit(still)
    torch.testing.assert_close([p.detach() for p in made.parameters()], taken)
    other = Trainer(model(bias=True, linear=True), optimizer=optim.FTRL(lr=0.01, weight_decay=0.2))
    other.load_state_dict(trainer.state_dict())
    other.partial_fit(still)
    torch.testing.assert_close([p.detach() for p in other.model.parameters()], taken)


def test_partial_fit_is_one_pass_of_its_own_data():
    """Also after a call that was interrupted in the middle of its data."""
    lists, labels = samples("one-hot")
    x = ffm_ext.SparseBatch.from_lists(lists)

    def stop(progress):
        raise KeyboardInterrupt

    trainer = Trainer(model(), shuffle=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit((x, labels), callback=stop)
    whole = Trainer(model(), shuffle=False)
    whole.model.load_state_dict(trainer.model.state_dict())
    whole.load_state_dict({**whole.state_dict(), **trainer._tensors()})
    assert trainer.partial_fit((x[:50], 1 - labels[:50])) == pytest.approx(
        whole.partial_fit((x[:50], 1 - labels[:50]))
    )
    assert trainer.history[-1].samples == 50
    assert torch.equal(trainer.model.interaction.weight, whole.model.interaction.weight)


def test_scores_by_several_threads():
    made = ffm_ext.FFM(4, field_dims=[50] * 3)
    trainer = Trainer(made)
    x = torch.randint(50, (64, 3))
    wanted, of_model = trainer.predict(x), made(x).detach()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: trainer.predict(x) if i % 2 else made(x), range(400)))
    for i, scores in enumerate(found):
        assert torch.equal(scores, wanted if i % 2 else of_model)


def test_frozen_parameters_are_refused():
    made = ffm_ext.FFM(4, num_features=10, num_fields=2)
    trainer = Trainer(made)
    made.linear.requires_grad_(False)
    with pytest.raises(ValueError, match=r"linear\.\w+ has requires_grad=False"):
        Trainer(made)
    data = (torch.zeros(3, 2, dtype=torch.int64), torch.ones(3))
    for train in (trainer.fit, trainer.partial_fit):
        with pytest.raises(ValueError, match=r"linear\.weight has requires_grad=False"):
            train(data)


@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_computed_parameters_are_refused(how):
    """What the trainer would change is a tensor that is computed anew, or kept beside the parameter."""
    made = ffm_ext.FFM(4, num_features=10, num_fields=2)
    if how == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(made.interaction, "weight")
    else:
        prune.random_unstructured(made.interaction, "weight", 0.5)
    with pytest.raises(ValueError, match=r"interaction\.weight is computed from another tensor"):
        Trainer(made)


def test_an_int8_model_is_refused():
    made = ffm_ext.quantize(ffm_ext.FFM(4, num_features=10, num_fields=2))
    with pytest.raises(TypeError, match="QuantizedFFMInteraction, which is for inference"):
        Trainer(made)


@pytest.mark.parametrize("mode", ["exact", "hogwild", "deterministic"])
def test_autograd_notices_training(mode):
    made = model(dtype=torch.float32, bias=True, linear=True)
    data, labels = lists("one-hot", 20)
    loss = made(data).square().sum()
    Trainer(made, mode=mode, num_threads=1).fit((data, labels), epochs=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["exact", "deterministic"])
def test_the_bias_of_a_warm_start_does_not_decay(mode):
    made = model(dtype=torch.float32, bias=True)
    made.linear.bias.data.fill_(2.0)
    data, labels = lists("one-hot", 20)
    no_weight = np.full(20, 1e-20, np.float32)
    Trainer(made, optimizer=optim.FTRL(lr=0.1, weight_decay=10.0), mode=mode).fit(
        (data, labels, no_weight), epochs=1
    )
    assert made.linear.bias.item() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "value", "mode", "normalize"),
    [
        *((torch.float32, 1e39, mode, False) for mode in ("exact", "deterministic")),
        *((torch.float16, 1e5, mode, False) for mode in ("exact", "deterministic")),
        (torch.bfloat16, 3.4e38, "exact", False),
        (torch.bfloat16, 3.4e38, "exact", True),
    ],
)
def test_values_beyond_the_table_are_known_before_training(dtype, value, mode, normalize):
    made = model(dtype=dtype, normalize=normalize)
    data, labels = lists("one-hot", 50, torch.float64)
    data.values[-1] = value
    before = made.interaction.weight.detach().clone()
    trainer = Trainer(made, mode=mode, batch_size=7, shuffle=False)
    for train in (trainer.fit, trainer.partial_fit):
        with pytest.raises(ValueError, match=rf"values\[299\] = .* is not finite in {dtype}"):
            train((data, labels))
    assert torch.equal(made.interaction.weight, before)


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_values_are_normalised_before_they_are_float16(size):
    data, labels = lists("values", 100, torch.float64)
    moved = []
    for scale in (1, size):
        scaled = ffm_ext.SparseBatch(data.indices, data.fields, data.values * scale, data.offsets)
        made = model(dtype=torch.float16, normalize=True, linear=True)
        Trainer(made, optimizer=optim.SGD(lr=0.5), shuffle=False).fit((scaled, labels), epochs=1)
        moved.append([p.detach().clone() for p in made.parameters()])
    torch.testing.assert_close(*moved, rtol=2e-3, atol=1e-3)


def test_data_that_requires_grad():
    data, labels = lists("values", 30)
    data.values.requires_grad_()
    y = torch.tensor(labels, requires_grad=True)
    weights = torch.ones(30, requires_grad=True)
    for mode in ("exact", "deterministic"):
        trainer = Trainer(model(dtype=torch.float32), mode=mode)
        trainer.fit((data, y, weights), (data, y, weights), epochs=1)
        assert not trainer.predict(data).requires_grad


def test_a_callback_that_raises_finds_the_epoch_saved(tmp_path):
    data, labels = lists("one-hot", 30)

    def stop(progress):
        if progress.finished:
            raise StopIteration

    with pytest.raises(StopIteration):
        Trainer(model()).fit((data, labels), epochs=3, callback=stop, checkpoint=tmp_path / "c")
    assert Trainer.load(tmp_path / "c").epoch == 1


def test_ctrl_c_ends_a_process_that_has_no_handler(tmp_path):
    program = """
import os, signal, threading, torch
from ffm_ext import FFM
from ffm_ext.training import Trainer
signal.signal(signal.SIGINT, signal.SIG_DFL)
x, y = torch.randint(30, (20000, 3)), torch.ones(20000)
trainer = Trainer(FFM(num_features=30, num_fields=3))
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
while True:
    trainer.partial_fit((x, y))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"history": [[1]]}, "position is not what state_dict makes"),
        ({"step": "x"}, "position is not what state_dict makes"),
        ({"shape": [N, K, F]}, rf"it has N, F, K = \[{N}, {K}, {F}\], the model \[{N}, {F}, {K}\]"),
    ],
)
def test_positions_that_do_not_fit_change_nothing(change, match):
    trainer, other = Trainer(model()), Trainer(model())
    with torch.no_grad():
        other.model.interaction.weight.zero_()
    state = other.state_dict()
    state["position"] |= change
    with pytest.raises(ValueError, match=match):
        trainer.load_state_dict(state)
    assert trainer.model.interaction.weight.all()


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_norms_out_of_the_range_of_sums_are_refused(size):
    values = torch.tensor([1.0, 1.0, size, size, 1.0, size, 0.0, 0.0])
    x = ffm_ext.SparseBatch(
        torch.arange(8), torch.arange(2).repeat(4), values, torch.tensor([0, 2, 4, 6, 8])
    )
    data = (x, torch.tensor([1.0, 0, 1, 0]))
    with pytest.raises(ValueError, match="the values of sample 1 have the squared norm 2e"):
        Trainer(model(dtype=torch.float32)).fit(data)
    trainer = Trainer(model(dtype=torch.float32), mode="deterministic")
    assert math.isfinite(trainer.partial_fit(data))
    trainer = Trainer(model(dtype=torch.float32), mode="exact")
    assert math.isfinite(trainer.evaluate(data))
    if size < 1:
        good = ffm_ext.SparseBatch(x.indices, x.fields, values.clamp(min=1e-15), x.offsets)
        assert math.isfinite(trainer.partial_fit((good, data[1])))
    assert math.isfinite(Trainer(model(dtype=torch.float64)).partial_fit(data))


def test_hogwild_is_not_deterministic():
    lists, labels = samples("one-hot")
    data = (ffm_ext.SparseBatch.from_lists(lists), labels)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="mode='hogwild' adds updates in any order"):
            Trainer(model(), mode="hogwild").fit(data)
        Trainer(model(), mode="exact").partial_fit(data)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_dataset_of_shards_and_its_folder(tmp_path):
    lists, labels = samples("multi-hot")
    whole = SparseDataset.from_arrays(
        ffm_ext.SparseBatch.from_lists(lists), labels, num_features=N, num_fields=F
    )
    shards = SparseDataset([*whole[:70].shards, *whole[70:].shards], num_features=N, num_fields=F)
    shards.save(tmp_path / "data")
    results = []
    for data in (shards, tmp_path / "data"):
        made = model(dtype=torch.float32)
        Trainer(made).fit(data, epochs=2)
        results.append(made.interaction.weight.detach().clone())
    assert torch.equal(*results)
    trainer = Trainer(made)
    torch.testing.assert_close(trainer.predict(shards), trainer.predict(whole))


def test_ids_local_to_their_fields():
    made = ffm_ext.FFM(4, field_dims=[5, 7, 3])
    ids = torch.stack([torch.randint(0, n, (50,)) for n in (5, 7, 3)], 1)
    trainer = Trainer(made)
    trainer.fit((ids, torch.ones(50)), epochs=2)
    torch.testing.assert_close(trainer.predict(ids), torch.sigmoid(made(ids)))


def run(checkpoint, result, data, epochs):
    """Train, or go on, to the end: what the process below is killed in."""
    torch.set_num_threads(1)
    trainer = Trainer.load(checkpoint) if os.path.exists(checkpoint) else new_trainer()
    trainer.fit(
        data,
        data,
        epochs=epochs,
        auto_stop=True,
        patience=9,
        checkpoint=checkpoint,
        checkpoint_every=512,
    )
    torch.save([p.detach() for p in trainer.model.parameters()], f"{result}.tmp")
    os.replace(f"{result}.tmp", result)


def new_trainer():
    return Trainer(
        model(dtype=torch.float32, bias=True, linear=True),
        optimizer=optim.Adam(lr=0.01),
        mode="deterministic",
        batch_size=64,
    )


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    lists, labels = samples("multi-hot", n=4000)
    SparseDataset.from_arrays(
        ffm_ext.SparseBatch.from_lists(lists), labels, num_features=N, num_fields=F
    ).save(tmp_path / "data")
    whole = new_trainer()
    whole.fit(tmp_path / "data", tmp_path / "data", epochs=8, auto_stop=True, patience=9)

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "ffm_ext.training"])
    rng = np.random.RandomState(0)
    killed = attempts = 0
    checkpoint, result = str(tmp_path / "checkpoint"), str(tmp_path / "result")
    while killed < 20:
        attempts += 1
        assert attempts < 200
        process = context.Process(target=run, args=(checkpoint, result, str(tmp_path / "data"), 8))
        process.start()
        before = os.stat(checkpoint).st_mtime_ns if os.path.exists(checkpoint) else 0
        # At a random moment after it has come at least one checkpoint further.
        while process.is_alive() and (
            not os.path.exists(checkpoint) or os.stat(checkpoint).st_mtime_ns == before
        ):
            time.sleep(0.001)
        time.sleep(rng.rand() * 0.02)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:
            assert process.exitcode == 0
            check_result(result, whole)
            os.remove(checkpoint)
            os.remove(result)
    process = context.Process(target=run, args=(checkpoint, result, str(tmp_path / "data"), 8))
    process.start()
    process.join()
    check_result(result, whole)


def check_result(result, whole):
    for ours, expected in zip(torch.load(result), whole.model.parameters()):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("mode", ["exact", "deterministic"])
def test_a_checkpoint_goes_on_in_the_middle_of_an_epoch(mode, tmp_path, monkeypatch):
    monkeypatch.setattr("ffm_ext.training._PIECE", 64)
    lists, labels = samples("multi-hot", n=500)
    data = (ffm_ext.SparseBatch.from_lists(lists), labels)

    def trainer():
        return Trainer(model(dtype=torch.float32, bias=True), mode=mode, batch_size=32)

    whole = trainer()
    whole.fit(data, epochs=3)

    def stop(progress):
        if progress.epoch == 2 and progress.samples > 200:
            raise KeyboardInterrupt

    broken = trainer()
    with pytest.raises(KeyboardInterrupt):
        broken.fit(data, epochs=3, callback=stop, checkpoint=tmp_path / "c")
    again = Trainer.load(tmp_path / "c")
    assert again.epoch == 1
    with pytest.raises(ValueError, match="in the middle of an epoch of 500 samples, train has 400"):
        again.fit((data[0][:400], labels[:400]), epochs=3)
    again.fit(data, epochs=3)
    for one, two in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, two)
    assert [e.train_loss for e in whole.history] == [e.train_loss for e in again.history]


@pytest.mark.parametrize("batch", [1, 5, 9])
def test_ctrl_c_inside_a_piece_waits_for_its_end(batch, tmp_path, monkeypatch):
    lists, labels = samples("multi-hot", n=500)
    data = (ffm_ext.SparseBatch.from_lists(lists), labels)

    def trainer():
        return Trainer(model(dtype=torch.float32, bias=True), mode="deterministic", batch_size=64)

    whole = trainer()
    whole.fit(data, epochs=3)
    train_batch, count = Trainer._train_batch, [0]

    def interrupted(self, part):
        count[0] += 1
        if count[0] == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return train_batch(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer().fit(data, epochs=3, checkpoint=tmp_path / "c")
    again = Trainer.load(tmp_path / "c")
    again.fit(data, epochs=3)
    for one, two in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, two)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(model())
    trainer.save(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


def test_a_checkpoint_that_cannot_be_written_is_known_before_training(tmp_path):
    made = model()
    before = made.interaction.weight.detach().clone()
    lists, labels = samples("one-hot", n=5)
    for path, error in ((tmp_path / "no" / "c", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error, match=f"'{path}'$"):
            Trainer(made).fit((ffm_ext.SparseBatch.from_lists(lists), labels), checkpoint=path)
    assert torch.equal(made.interaction.weight, before)


def test_states_of_another_optimizer_or_without_a_position_change_nothing(tmp_path):
    lists, labels = samples("one-hot", n=20)
    data = (ffm_ext.SparseBatch.from_lists(lists), labels)
    # With one factor the states of these have the same shapes.
    other = Trainer(model(embed_dim=1), optimizer=optim.VectorAdaGrad())
    other.fit(data, data, epochs=1, auto_stop=True)
    trainer = Trainer(model(embed_dim=1))
    before = trainer.model.interaction.weight.detach().clone()
    whole = {**trainer.state_dict(), **{k: v for k, v in other.state_dict().items() if "best" in k}}
    for state, message in (
        (other.state_dict(), r"these do not fit: optimizer\.adagrad\.table\.0, optimizer\.vector"),
        ({k: v for k, v in whole.items() if k != "position"}, "position lacks step, shard"),
        ({**whole, "position": {"step": 1}}, "position lacks shard"),
        ({**whole, "best.interaction.weight": before[:3]}, r"fit: best\.interaction\.weight$"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.load_state_dict(state)
    assert torch.equal(trainer.model.interaction.weight, before)
    assert trainer.state_dict().keys() == Trainer(model(embed_dim=1)).state_dict().keys()

    safetensors = pytest.importorskip("safetensors.torch")
    tensors, metadata = trainer._tensors_and_metadata()
    safetensors.save_file(tensors, tmp_path / "c", {**metadata, "position": "{}"})
    with pytest.raises(ValueError, match=r"Trainer.load: .*c: .*position lacks step"):
        Trainer.load(tmp_path / "c")


def test_numbers_of_numpy_are_kept_as_numbers(tmp_path):
    optimizer = optim.Adam(lr=np.float32(0.1), betas=np.array([0.5, 0.75]), rounding_seed=None)
    trainer = Trainer(
        model(),
        optimizer=optimizer,
        batch_size=np.int32(7),
        num_threads=np.int64(1),
        seed=np.int64(3),
        shuffle=np.True_,
    )
    trainer.save(tmp_path / "c")
    again = Trainer.load(tmp_path / "c")
    assert again.optimizer == optimizer == optim.Adam(lr=float(np.float32(0.1)), betas=(0.5, 0.75))
    assert (again.batch_size, again.num_threads, again.seed, again.shuffle) == (7, 1, 3, True)


def test_corrupt_checkpoints_are_named(tmp_path):
    trainer = Trainer(model())
    path = tmp_path / "c"
    trainer.save(path)
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"\xff" * 100, b"hello"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"Trainer.load: .*c: not a whole safetensors file"):
            Trainer.load(path)
    ffm_ext.interop.save_model(trainer.model, path)
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        Trainer.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Trainer.load(tmp_path / "none")


def test_bad_input():
    made = model()
    lists, labels = samples("one-hot", n=5)
    data = ffm_ext.SparseBatch.from_lists(lists)
    for options, error, match in (
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1)},
            TypeError,
            r"must be one of ffm_ext\.optim",
        ),
        ({"loss": "hinge"}, ValueError, "loss = 'hinge' is not one of logistic, squared"),
        ({"mode": "fast"}, ValueError, "mode = 'fast' is not one of exact, hogwild, deterministic"),
        ({"batch_size": 0}, ValueError, "batch_size = 0 must be positive"),
        ({"num_threads": 1.5}, TypeError, r"num_threads = 1\.5 must be an integer"),
        ({"num_threads": 2**40}, ValueError, "num_threads = 1099511627776 is more than"),
        ({"seed": -1}, ValueError, "seed = -1 is negative"),
    ):
        with pytest.raises(error, match=match):
            Trainer(made, **options)
    trainer = Trainer(made)
    for given, error, match in (
        ((data, labels[:3]), ValueError, r"labels has shape \[3\], but there are 5 samples"),
        (
            (data, labels, labels[:2]),
            ValueError,
            r"weights has shape \[2\], but there are 5 samples",
        ),
        ((data, [float("nan")] * 5), ValueError, r"labels\[0\] = nan is not finite"),
        (data, TypeError, "train must be a SparseDataset"),
        ((torch.full((5, F), N), labels), IndexError, rf"indices\[0, 0\] = {N} is out of range"),
    ):
        with pytest.raises(error, match=match):
            trainer.fit(given)
    with pytest.raises(TypeError, match="epochs = '2' must be an integer"):
        trainer.fit((data, labels), epochs="2")
    with pytest.raises(ValueError, match="auto_stop needs valid"):
        trainer.fit((data, labels), auto_stop=True)
    with pytest.raises(ValueError, match=r"these do not fit: optimizer\.adagrad\.table\.0, "):
        Trainer(made, optimizer=optim.VectorAdaGrad()).load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("mode", ["exact", "hogwild", "deterministic"])
def test_data_is_looked_at_before_the_first_update(mode):
    lists, labels = samples("multi-hot", n=300)
    good = ffm_ext.SparseBatch.from_lists(lists)
    made = model()
    before = made.interaction.weight.detach().clone()
    trainer = Trainer(made, mode=mode, batch_size=10)

    def changed(name, at, number):
        parts = {part: getattr(good, part).clone() for part in good.__slots__}
        parts[name][at] = number
        return ffm_ext.SparseBatch(**parts)

    last, end = good.nnz - 1, good.nnz
    wrong = labels.copy()
    wrong[295] = np.nan
    for data, error, message in (
        ((good, wrong), ValueError, r"labels\[295\] = nan is not finite"),
        ((good, labels, wrong), ValueError, r"weights\[295\] = nan is not finite"),
        (
            (changed("values", last, np.inf), labels),
            ValueError,
            rf"values\[{last}\] = inf is not finite",
        ),
        ((changed("indices", last, N), labels), IndexError, rf"indices\[{last}\] = {N} is out of"),
        ((changed("fields", last, F), labels), IndexError, rf"fields\[{last}\] = {F} is out of"),
        (
            (changed("offsets", 295, end + 1), labels),
            ValueError,
            rf"offsets\[296\] = \d+ is less than offsets\[295\] = {end + 1}",
        ),
        (
            (changed("offsets", 300, end - 1), labels),
            ValueError,
            rf"offsets\[300\] = {end - 1} must be the number of entries, {end}",
        ),
    ):
        with pytest.raises(error, match=f"^Trainer.fit: train: {message}"):
            trainer.fit(data)
        with pytest.raises(error, match=f"^Trainer.fit: valid: {message}"):
            trainer.fit((good, labels), data)
        with pytest.raises(error, match=f"^Trainer.partial_fit: data: {message}"):
            trainer.partial_fit(data)
        with pytest.raises(error, match=f"^Trainer.evaluate: data: {message}"):
            trainer.evaluate(data)
    shard = SparseDataset.from_arrays(good, labels, num_features=N, num_fields=F).shards[0]
    data = SparseDataset(
        [shard, shard._replace(labels=torch.from_numpy(wrong))], num_features=N, num_fields=F
    )
    with pytest.raises(ValueError, match=r"train: shards\[1\]: labels\[295\] = nan"):
        trainer.fit(data)
    assert torch.equal(made.interaction.weight, before)
    assert trainer.predict(data).isfinite().all()


def test_labels_are_numbers_of_any_kind():
    pandas = pytest.importorskip("pandas")
    lists, labels = samples("one-hot", n=20)
    batch = ffm_ext.SparseBatch.from_lists(lists)
    frozen = labels.copy()
    frozen.flags.writeable = False
    series = pandas.Series(labels, index=np.arange(20) + 7)
    kinds = (torch.from_numpy(labels), frozen, labels.tolist(), labels > 0, series)
    assert len({Trainer(model()).evaluate((batch, given, given)) for given in kinds}) == 1
    for wrong in (["yes"] * 20, [None] * 20):
        with pytest.raises(TypeError, match=r"Trainer.evaluate: data: labels must be numbers, got"):
            Trainer(model()).evaluate((batch, wrong))


def test_a_loss_that_is_not_finite_stops():
    made = model(normalize=False)
    data = (torch.arange(F)[None] * (N // F), torch.ones(1))
    trainer = Trainer(made, optimizer=optim.SGD(lr=1e30), loss="squared")
    with pytest.raises(FloatingPointError, match="a smaller learning rate may help"):
        trainer.fit(data, epochs=50)


def test_data_that_say_nothing():
    lists, labels = samples("one-hot", n=20)
    batch = ffm_ext.SparseBatch.from_lists(lists)
    made = model()
    before = made.interaction.weight.detach().clone()
    trainer = Trainer(made)
    for valid in ((batch[:0], labels[:0]), (batch, labels, np.zeros(20))):
        for auto_stop in (False, True):
            with pytest.raises(ValueError, match=r"fit: valid has no samples, or weights whose"):
                trainer.fit((batch, labels), valid, auto_stop=auto_stop)
        with pytest.raises(ValueError, match=r"evaluate: data has no samples, or weights whose"):
            trainer.evaluate(valid)
        with pytest.raises(ValueError, match=r"fit: train has no samples, or weights whose"):
            trainer.fit(valid)
        with pytest.raises(ValueError, match=r"partial_fit: data has no samples, or weights whose"):
            trainer.partial_fit(valid)
    assert trainer.epoch == 0
    assert torch.equal(made.interaction.weight, before)
    other = next(i for i, one in enumerate(lists) if lists[0][0] not in one)
    with torch.no_grad():
        made.interaction.weight[lists[0][0][1]] = float("inf")
    with pytest.raises(FloatingPointError, match=r"the loss of valid is (nan|inf) after epoch 1"):
        trainer.fit(
            (batch[other : other + 1], labels[other : other + 1]), (batch, labels), auto_stop=True
        )
    assert trainer.history == []


@pytest.mark.parametrize("optimizer", [optim.FTRL(lr=0.2), optim.AdaGrad(lr=0.2), optim.Adam()])
def test_another_learning_rate_leaves_the_weights(optimizer: optim.Optimizer) -> None:
    x, y = torch.randint(0, 5, (300, 3)), torch.rand(300).round()
    trainer = Trainer(FFM(4, field_dims=[5, 5, 5]), optimizer=optimizer)
    trainer.fit((x, y), epochs=3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer = dataclasses.replace(optimizer, lr=1e-9)
    trainer.partial_fit((x[:1], y[:1]))
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match=f"must be {type(optimizer).__name__}, .* got SGD"):
        trainer.optimizer = optim.SGD(lr=0.1)
    assert trainer.optimizer.lr == 1e-9


def test_a_dataset_has_ids_of_the_whole_table() -> None:
    x, y = torch.randint(0, 5, (50, 3)), torch.rand(50).round()
    model = FFM(4, field_dims=[5, 5, 5])
    trainer = Trainer(model)
    with pytest.raises(
        ValueError, match=r"indices\[1\] = [0-4] is of field 1, which has the features \[5, 10\)"
    ):
        trainer.fit(SparseDataset.from_arrays(x, y))
    assert model.offsets is not None
    dataset = SparseDataset.from_arrays(x + model.offsets[:-1], y)
    assert trainer.evaluate(dataset) == trainer.evaluate((x, y))


def test_what_is_no_checkpoint_or_dataset_is_named(tmp_path: Path) -> None:
    trainer = Trainer(FFM(4, field_dims=[5, 5, 5]))
    text = tmp_path / "train.ffm"
    text.write_text("1 0:1:1\n")
    with pytest.raises(
        NotADirectoryError, match=r"train.ffm is a file, .* read_libffm reads a text"
    ):
        trainer.fit(text)
    with pytest.raises(IsADirectoryError, match=r"DistributedTrainer.load"):
        Trainer.load(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"model.linear.weight is torch.bfloat16, .*model.interaction.to\(torch.bfloat16\)",
    ):
        Trainer(FFM(4, field_dims=[5, 5, 5], dtype=torch.bfloat16))


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
@pytest.mark.parametrize("parts", [False, True], ids=["table alone", "linear and bias"])
def test_scores_of_bfloat16_tables_are_not_rounded(normalize: bool, parts: bool) -> None:
    torch.manual_seed(0)
    model = FFM(
        4,
        num_features=50,
        num_fields=5,
        normalize=normalize,
        linear=parts,
        bias=parts,
        grad="dense",
    )
    torch.nn.init.normal_(model.interaction.weight)
    model.interaction.bfloat16()
    wide = copy.deepcopy(model).float()
    ids = torch.randint(50, (200, 5))
    data = SparseDataset.from_arrays(ids, torch.arange(200) % 2, num_features=50, num_fields=5)
    wanted = Trainer(wide, loss="squared").predict(ids)
    torch.testing.assert_close(Trainer(model, loss="squared").predict(ids), wanted)
    assert Trainer(model).evaluate(data) == pytest.approx(Trainer(wide).evaluate(data), rel=1e-6)
    torch.testing.assert_close(cli_models.scores(model, data)[0], wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, dtype=torch.float32), wanted)
        rounded = model(ids)
    assert rounded.dtype == (torch.float32 if parts else torch.bfloat16)
    torch.testing.assert_close(rounded, wanted.to(rounded.dtype))


def test_settings_are_checked_whenever_they_are_set():
    trainer = Trainer(FFM(4, num_features=9, num_fields=3))
    for name, value, error in (
        ("mode", "foo", "mode = 'foo' is not one of exact, hogwild, deterministic"),
        ("loss", "hinge", "loss = 'hinge' is not one of logistic, squared"),
        ("batch_size", 0, "batch_size = 0 must be positive"),
        ("batch_size", 1.5, "batch_size = 1.5 must be an integer"),
        ("num_threads", 1 << 30, "num_threads = 1073741824 is more than"),
        ("seed", -1, "seed = -1 is negative"),
    ):
        before = getattr(trainer, name)
        with pytest.raises((TypeError, ValueError), match=f"Trainer: {error}"):
            setattr(trainer, name, value)
        assert getattr(trainer, name) == before
    trainer.mode, trainer.batch_size = "deterministic", np.int64(64)
    assert type(trainer.batch_size) is int


def test_auto_stop_can_begin_anew():
    x, y = torch.randint(9, (256, 3)), torch.randint(2, (256,)).float()
    trainer = Trainer(FFM(4, num_features=9, num_fields=3))
    trainer.fit((x, y), (x, 1 - y), epochs=20, auto_stop=True)
    stopped = trainer.epoch
    assert stopped < 20
    with pytest.warns(UserWarning, match="auto_stop"):
        trainer.fit((x, y), (x, y), epochs=20, auto_stop=True)
    assert trainer.epoch == stopped
    trainer.reset_auto_stop()
    trainer.fit((x, y), (x, y), epochs=20, auto_stop=True)
    assert trainer.epoch > stopped
