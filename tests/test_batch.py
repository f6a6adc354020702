# SPDX-License-Identifier: MIT
from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffm_ext import FFMInteraction, SparseBatch

Samples = list[list[tuple[int, int, float]]]

# Samples as lists of (field, feature, value): ragged, unsorted, features twice, an empty sample in the middle.
SAMPLES: Samples = [
    [(0, 1, 1.0), (1, 4, 0.5)],
    [],
    [(1, 3, -2.0), (0, 0, 0.25), (1, 3, 4.0)],
    [(1, 4, 1.0)],
]
FEATURE_FIELDS = [0, 0, 0, 1, 1]


def entries(batch: SparseBatch) -> Samples:
    """Back to lists."""
    values = torch.ones(batch.nnz) if batch.values is None else batch.values
    flat = list(zip(batch.fields.tolist(), batch.indices.tolist(), values.tolist(), strict=True))
    ends = batch.offsets.tolist()
    assert ends[0] == 0 and ends[-1] == len(flat)
    return [flat[begin:end] for begin, end in itertools.pairwise(ends)]


def raises(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match="^" + re.escape(message))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Small dense matrices ``[B, 5]`` with many zeros."""
    B = draw(st.integers(0, 6))
    numbers = st.one_of(st.just(0.0), st.sampled_from([1.0, -0.5, 3.0, 0.125]))
    rows = draw(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=B, max_size=B))
    return np.array(rows, dtype=np.float32).reshape(B, 5)


def of_matrix(X: np.ndarray) -> Samples:
    return [[(FEATURE_FIELDS[a], a, float(row[a])) for a in range(row.size) if row[a]] for row in X]


@st.composite
def sample_lists(draw: st.DrawFn) -> Samples:
    entry = st.tuples(st.integers(0, 3), st.integers(0, 99), st.sampled_from([1.0, -2.0, 0.5]))
    return draw(st.lists(st.lists(entry, max_size=4), max_size=6))


# ----------------------------------------------------------------------------------- constructors


def test_from_lists() -> None:
    batch = SparseBatch.from_lists(SAMPLES)
    assert len(batch) == 4
    assert batch.nnz == 6
    assert batch.device == torch.device("cpu")
    assert batch.indices.tolist() == [1, 4, 3, 0, 3, 4]
    assert batch.fields.tolist() == [0, 1, 1, 0, 1, 1]
    assert batch.offsets.tolist() == [0, 2, 2, 5, 6]
    assert batch.values is not None
    assert batch.values.tolist() == [1.0, 0.5, -2.0, 0.25, 4.0, 1.0]
    assert batch.values.dtype == torch.float32
    assert (batch.indices.dtype, batch.fields.dtype, batch.offsets.dtype) == (torch.int64,) * 3
    assert repr(batch) == (
        "SparseBatch(4 samples, 6 entries, ids=torch.int64, values=torch.float32, device=cpu)"
    )


@given(samples=sample_lists())
def test_from_lists_round_trip(samples: Samples) -> None:
    batch = SparseBatch.from_lists(samples)
    assert len(batch) == len(samples)
    assert batch.nnz == sum(map(len, samples))
    assert entries(batch) == samples
    assert entries(SparseBatch.from_lists(iter(samples))) == samples


@given(X=matrices())
def test_constructors_agree(X: np.ndarray) -> None:
    wanted = of_matrix(X)
    for build in (
        lambda: SparseBatch.from_dense(X, FEATURE_FIELDS),
        lambda: SparseBatch.from_dense(torch.from_numpy(X), torch.tensor(FEATURE_FIELDS)),
        lambda: SparseBatch.from_dense(torch.from_numpy(X.T.copy()).t(), FEATURE_FIELDS),
        lambda: SparseBatch.from_scipy(sp.csr_matrix(X), FEATURE_FIELDS),
        lambda: SparseBatch.from_scipy(sp.csr_array(X), np.array(FEATURE_FIELDS)),
        lambda: SparseBatch.from_scipy(sp.coo_matrix(X), FEATURE_FIELDS),
        lambda: SparseBatch.from_scipy(sp.csc_matrix(X), FEATURE_FIELDS),
        lambda: SparseBatch.from_torch_csr(torch.from_numpy(X).to_sparse_csr(), FEATURE_FIELDS),
        lambda: SparseBatch.from_lists(wanted),
    ):
        batch = build()
        assert entries(batch) == wanted
        assert batch.values is not None
        assert batch.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (np.float64, torch.float64),
        (np.float32, torch.float32),
        (np.float16, torch.float16),
        (np.int64, torch.float32),
        (np.uint8, torch.float32),
        (np.bool_, torch.float32),
    ],
)
def test_dtype_of_values(given_dtype: type, dtype: torch.dtype) -> None:
    X = np.array([[0, 1, 0, 1, 0]]).astype(given_dtype)
    batches = [SparseBatch.from_dense(X, FEATURE_FIELDS)]
    batches.append(SparseBatch.from_dense(torch.from_numpy(X), FEATURE_FIELDS))
    if given_dtype is not np.float16:  # scipy has no half precision
        batches.append(SparseBatch.from_scipy(sp.csr_matrix(X), FEATURE_FIELDS))
    csr = torch.from_numpy(X).to_sparse_csr()
    batches.append(SparseBatch.from_torch_csr(csr, FEATURE_FIELDS))
    for batch in batches:
        assert batch.values is not None
        assert batch.values.dtype == dtype
        assert entries(batch) == [[(0, 1, 1.0), (1, 3, 1.0)]]


def test_explicit_zeros_of_scipy_stay() -> None:
    csr = sp.csr_matrix((np.array([0.0, 2.0]), np.array([1, 3]), np.array([0, 2])), shape=(1, 5))
    assert entries(SparseBatch.from_scipy(csr, FEATURE_FIELDS)) == [[(0, 1, 0.0), (1, 3, 2.0)]]


def test_batch_does_not_share_memory_with_scipy_ids() -> None:
    """int32 ids of scipy become int64: the fields of a table with more than 2^31 columns would not fit."""
    csr = sp.csr_matrix(np.eye(5, dtype=np.float32))
    batch = SparseBatch.from_scipy(csr, FEATURE_FIELDS)
    assert batch.indices.dtype == batch.offsets.dtype == torch.int64


def test_values_may_be_none() -> None:
    ids, offsets = torch.tensor([3, 1]), torch.tensor([0, 1, 2])
    batch = SparseBatch(ids, ids, None, offsets)
    assert batch.values is None
    assert "values=1," in repr(batch)
    assert batch[1:].values is None
    assert batch[[1]].values is None
    assert batch.to(torch.float64).values is None


def test_ids_take_the_dtype_of_indices() -> None:
    long, short = torch.tensor([0]), torch.tensor([0], dtype=torch.int32)
    offsets = torch.tensor([0, 1])
    batch = SparseBatch(short, long, None, offsets)
    assert batch.fields.dtype == batch.offsets.dtype == torch.int32
    batch = SparseBatch(long, short, None, offsets.int())
    assert batch.fields.dtype == batch.offsets.dtype == torch.int64


# ----------------------------------------------------------------------------------------- errors


def test_errors_of_the_constructor() -> None:
    ids, offsets, values = torch.tensor([0, 1]), torch.tensor([0, 2]), torch.ones(2)
    for args, error, message in (
        (([0, 1], ids, None, offsets), TypeError, "indices must be a tensor, got list"),
        ((ids, None, None, offsets), TypeError, "fields must be a tensor, got NoneType"),
        ((ids, ids, None, [0, 2]), TypeError, "offsets must be a tensor, got list"),
        ((ids, ids, [1.0, 1.0], offsets), TypeError, "values must be a tensor, got list"),
        (
            (ids.float(), ids, None, offsets),
            TypeError,
            "indices must be int32 or int64, got torch.float32",
        ),
        (
            (ids, ids.short(), None, offsets),
            TypeError,
            "fields must be int32 or int64, got torch.int16",
        ),
        (
            (ids, ids, None, offsets.bool()),
            TypeError,
            "offsets must be int32 or int64, got torch.bool",
        ),
        (
            (ids, ids, ids, offsets),
            TypeError,
            "values must be floating point, got torch.int64",
        ),
        (
            (ids[None], ids, None, offsets),
            ValueError,
            "indices must have one dimension, got shape [1, 2]",
        ),
        (
            (ids, ids, None, offsets[0]),
            ValueError,
            "offsets must have one dimension, got shape []",
        ),
        ((ids, ids[:1], None, offsets), ValueError, "fields has shape [1], indices has [2]"),
        ((ids, ids, values[:1], offsets), ValueError, "values has shape [1], indices has [2]"),
        (
            (ids, ids, None, offsets[:0]),
            ValueError,
            "offsets is empty; it needs a sample count plus one entries",
        ),
        (
            (ids, ids.to("meta"), None, offsets),
            ValueError,
            "fields is on meta, indices is on cpu",
        ),
        (
            (ids, ids, values.to("meta"), offsets),
            ValueError,
            "values is on meta, indices is on cpu",
        ),
        (
            (ids, ids, values, offsets.to("meta")),
            ValueError,
            "offsets is on meta, indices is on cpu",
        ),
    ):
        with raises(error, f"SparseBatch: {message}"):
            SparseBatch(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "build",
    [
        lambda X, f: SparseBatch.from_dense(X, f),
        lambda X, f: SparseBatch.from_scipy(sp.csr_matrix(X), f),
        lambda X, f: SparseBatch.from_torch_csr(torch.from_numpy(X).to_sparse_csr(), f),
    ],
    ids=["dense", "scipy", "torch csr"],
)
def test_errors_of_feature_fields(build: Callable[[np.ndarray, Any], SparseBatch]) -> None:
    X = np.eye(5, dtype=np.float32)
    message = (
        "SparseBatch: feature_fields has shape [3], expected one field for each of the 5 columns"
    )
    with raises(ValueError, message):
        build(X, [0, 0, 1])
    with raises(TypeError, "SparseBatch: feature_fields must be integers, got torch.float64"):
        build(X, [0.0, 0.0, 1.0, 1.0, 1.0])
    with raises(TypeError, "SparseBatch: feature_fields must be integers, got torch.bool"):
        build(X, [True, False, True, True, True])


def test_errors_of_the_other_constructors() -> None:
    with raises(ValueError, "SparseBatch.from_dense: X must have two dimensions, got shape [5]"):
        SparseBatch.from_dense(np.ones(5), FEATURE_FIELDS)
    with raises(
        TypeError, "SparseBatch.from_torch_csr: t must be sparse_csr, got torch.sparse_coo"
    ):
        SparseBatch.from_torch_csr(torch.eye(5).to_sparse(), FEATURE_FIELDS)
    wrong: tuple[Any, ...] = ((0, 1), 7, None, (0.7, 3, 1.0), (0, 3.9, 1.0), (0, "a", 1.0),
                              (0, 1, "1.0"), (None, 1, 1.0), (0, 2**63, 1.0))  # fmt: skip
    for entry in wrong:
        message = (
            f"SparseBatch.from_lists: samples[1][1] = {entry!r} is not (field, feature, value), "
            "two int64 and a number"
        )
        with raises(ValueError, message):
            SparseBatch.from_lists([[], [(0, 1, 1.0), entry]])
    with raises(ValueError, "SparseBatch.from_lists: samples[1] = None is not a sequence"):
        SparseBatch.from_lists([[], None])  # type: ignore[list-item]


# --------------------------------------------------------------------------------------- indexing


@given(samples=sample_lists(), data=st.data())
def test_slices(samples: Samples, data: st.DataObject) -> None:
    which = data.draw(st.slices(len(samples)))
    batch = SparseBatch.from_lists(samples)
    part = batch[which]
    assert entries(part) == samples[which]
    assert part.indices.dtype == batch.indices.dtype


@given(samples=sample_lists(), data=st.data())
def test_sample_numbers(samples: Samples, data: st.DataObject) -> None:
    n = len(samples)
    which = data.draw(st.lists(st.integers(-n, n - 1), max_size=8) if n else st.just([]))
    batch = SparseBatch.from_lists(samples)
    wanted = [samples[b] for b in which]
    index = np.array(which, dtype=np.int64)
    for form in (which, index, torch.from_numpy(index), torch.from_numpy(index).int()):
        assert entries(batch[form]) == wanted
        assert entries(batch[form, ...]) == wanted
    assert batch.shape == (n,)


@given(samples=sample_lists(), data=st.data())
def test_masks(samples: Samples, data: st.DataObject) -> None:
    n = len(samples)
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    batch = SparseBatch.from_lists(samples)
    wanted = [sample for sample, keep in zip(samples, mask, strict=True) if keep]
    assert entries(batch[torch.tensor(mask, dtype=torch.bool)]) == wanted
    assert entries(batch[np.array(mask, dtype=bool)]) == wanted


def test_ids_keep_their_dtype_when_indexed() -> None:
    ids = torch.tensor([3, 1, 2], dtype=torch.int32)
    batch = SparseBatch(ids, ids, torch.ones(3, dtype=torch.float64), torch.tensor([0, 1, 3]))
    for part in (batch[1:], batch[[1]], batch[::-1], batch[torch.tensor([False, True])]):
        assert part.indices.dtype == part.fields.dtype == part.offsets.dtype == torch.int32
        assert part.values is not None
        assert part.values.dtype == torch.float64


def test_errors_of_indexing() -> None:
    batch = SparseBatch.from_lists(SAMPLES)
    with raises(IndexError, "SparseBatch: sample [1] = 4 is out of range for 4 samples"):
        batch[[0, 4]]
    with raises(IndexError, "SparseBatch: sample [0] = -5 is out of range for 4 samples"):
        batch[torch.tensor([-5])]
    with raises(IndexError, "SparseBatch: the mask has shape [3], the batch has 4 samples"):
        batch[torch.tensor([True, False, True])]
    with raises(IndexError, "SparseBatch: sample [0] = 9223372036854775807 is out of range"):
        batch[np.array([2**64 - 1], dtype=np.uint64)]
    # One sample is a batch of one: batch[b : b + 1] or batch[[b]].
    for which in (1, 9, torch.tensor(1), 1.5, [0.5], [[0, 1]], (1, ...), None):
        with pytest.raises((TypeError, IndexError), match="SparseBatch"):
            batch[which]  # type: ignore[index]


def test_iteration_ends() -> None:
    """Python iterates over anything with ``__getitem__``; that must not give nonsense."""
    with pytest.raises((TypeError, IndexError), match="SparseBatch"):
        list(SparseBatch.from_lists(SAMPLES))  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------- moving


def test_to() -> None:
    batch = SparseBatch.from_lists(SAMPLES)
    double = batch.to(torch.float64)
    assert double.values is not None
    assert double.values.dtype == torch.float64
    assert double.indices.dtype == torch.int64
    assert entries(double) == SAMPLES
    meta = batch.to("meta")
    assert meta.device == meta.offsets.device == torch.device("meta")
    assert meta.fields.device == meta.values.device == torch.device("meta")  # type: ignore[union-attr]
    both = batch.to("meta", torch.float16, non_blocking=True)
    assert both.values is not None
    assert (both.device.type, both.values.dtype) == ("meta", torch.float16)
    assert len(both) == 4
    assert batch.to(device="cpu").device.type == "cpu"
    with raises(TypeError, "SparseBatch.to: dtype must be floating point, got torch.int32"):
        batch.to(torch.int32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs an accelerator")
def test_pin_memory() -> None:
    pinned = SparseBatch.from_lists(SAMPLES).pin_memory()
    assert entries(pinned) == SAMPLES
    tensors = (pinned.indices, pinned.fields, pinned.values, pinned.offsets)
    assert all(tensor is not None and tensor.is_pinned() for tensor in tensors)


def test_copies() -> None:
    batch = SparseBatch.from_lists(SAMPLES)
    for other in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert entries(other) == SAMPLES
    copy.deepcopy(batch).indices[0] = 77
    assert entries(batch) == SAMPLES


def test_data_loader() -> None:
    """A batch is a map-style data set whose ``__getitem__`` takes the sampler's whole list."""
    batch = SparseBatch.from_lists(SAMPLES)
    sampler = torch.utils.data.BatchSampler(
        torch.utils.data.SequentialSampler(range(len(batch))), batch_size=3, drop_last=False
    )
    loader = torch.utils.data.DataLoader(batch, sampler=sampler, batch_size=None)  # type: ignore[arg-type]
    assert [entries(part) for part in loader] == [SAMPLES[:3], SAMPLES[3:]]


@given(samples=sample_lists(), cuts=st.lists(st.integers(0, 9), max_size=4))
def test_cat(samples: Samples, cuts: list[int]) -> None:
    whole = SparseBatch.from_lists(samples)
    ends = sorted(min(cut, len(samples)) for cut in cuts)
    parts = [whole[a:b] for a, b in itertools.pairwise([0, *ends, len(samples)])]
    joined = SparseBatch.cat(parts)
    assert entries(joined) == entries(whole)
    assert joined.indices.dtype == torch.int64


def test_cat_of_batches_that_differ() -> None:
    batch = SparseBatch.from_lists(SAMPLES)
    short = SparseBatch(batch.indices.int(), batch.fields, None, batch.offsets)
    both = SparseBatch.cat([short, batch])
    ones = [[(field, index, 1.0) for field, index, _ in sample] for sample in SAMPLES]
    assert entries(both) == ones + SAMPLES
    assert both.indices.dtype == torch.int64
    assert SparseBatch.cat([short, short]).indices.dtype == torch.int32
    assert SparseBatch.cat([short, short]).values is None
    with raises(ValueError, "SparseBatch.cat: there is no batch"):
        SparseBatch.cat([])
    with raises(TypeError, "SparseBatch.cat: batches[1] is a list, not a SparseBatch"):
        SparseBatch.cat([batch, SAMPLES])  # type: ignore[list-item]
    with raises(ValueError, "SparseBatch.cat: batches[1] is on meta, batches[0] on cpu"):
        SparseBatch.cat([batch, batch.to("meta")])


def test_data_loader_of_samples_with_several_labels() -> None:
    batch = SparseBatch.from_lists(SAMPLES)
    samples = [(batch[b : b + 1], float(b), {"clicks": b}) for b in range(len(batch))]
    loader = torch.utils.data.DataLoader(samples, batch_size=3, num_workers=1)  # type: ignore[arg-type]
    parts = list(loader)
    assert [entries(part) for part, _, _ in parts] == [SAMPLES[:3], SAMPLES[3:]]
    assert [more["clicks"].tolist() for _, _, more in parts] == [[0, 1, 2], [3]]


def test_the_order_of_entries_does_not_matter() -> None:
    layer = FFMInteraction(5, 2, 3, within_field=True, dtype=torch.float64)
    forward = SparseBatch.from_lists(SAMPLES)
    backward = SparseBatch.from_lists([sample[::-1] for sample in SAMPLES])
    with torch.no_grad():
        torch.testing.assert_close(layer(forward), layer(backward), rtol=0, atol=1e-14)


def test_numbers_that_are_not_real_are_refused() -> None:
    fields = [0, 1, 2]
    complex_ = np.ones((2, 3)) * 1j
    for make in (
        lambda: SparseBatch.from_dense(complex_, fields),
        lambda: SparseBatch.from_dense(torch.from_numpy(complex_), fields),
        lambda: SparseBatch.from_dense(complex_.real.astype("datetime64[D]"), fields),
        lambda: SparseBatch.from_scipy(sp.csr_matrix(complex_), fields),
        lambda: SparseBatch.from_torch_csr(torch.from_numpy(complex_).to_sparse_csr(), fields),
    ):
        with pytest.raises(TypeError, match="values must be real numbers, got"):
            make()


def test_matrices_have_two_dimensions() -> None:
    batched = torch.ones(2, 3, 4).to_sparse_csr()
    with pytest.raises(ValueError, match=r"two dimensions, got shape \[2, 3, 4\]"):
        SparseBatch.from_torch_csr(batched, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"two dimensions, got shape \[3\]"):
        SparseBatch.from_scipy(sp.coo_array(np.ones(3)), [0, 1, 2])
