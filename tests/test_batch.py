# SPDX-License-Identifier: MIT
"""``SparseBatch``: its constructors agree, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffm_ext import SparseBatch

FIELDS = [0, 0, 1, 2, 2, 2]
DENSE = np.array([[1, 0, 2, 0, 3, 0], [0, 0, 0, 0, 0, 0], [0, 4, 0, 5, 0, 6]], dtype=np.float32)


def lists(batch: SparseBatch) -> list[list[tuple[int, int, float]]]:
    """Every sample's entries, in order."""
    values = torch.ones(batch.nnz) if batch.values is None else batch.values
    entries = list(zip(batch.fields.tolist(), batch.indices.tolist(), values.tolist(), strict=True))
    ends = batch.offsets.tolist()
    return [entries[a:b] for a, b in itertools.pairwise(ends)]


EXPECTED = [[(0, 0, 1.0), (1, 2, 2.0), (2, 4, 3.0)], [], [(0, 1, 4.0), (2, 3, 5.0), (2, 5, 6.0)]]


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_from_scipy(layout: str) -> None:
    batch = SparseBatch.from_scipy(sp.csr_matrix(DENSE).asformat(layout), FIELDS)
    assert lists(batch) == EXPECTED
    assert batch.values is not None
    assert batch.values.dtype == torch.float32


def test_from_scipy_of_integers() -> None:
    batch = SparseBatch.from_scipy(sp.csr_array(DENSE.astype(np.int64)), np.array(FIELDS))
    assert lists(batch) == EXPECTED


@pytest.mark.parametrize(
    "matrix", [DENSE, torch.from_numpy(DENSE), DENSE.astype(int), DENSE.tolist()]
)
def test_from_dense(matrix: object) -> None:
    assert lists(SparseBatch.from_dense(matrix, FIELDS)) == EXPECTED


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_from_torch_csr(ids: torch.dtype) -> None:
    csr = torch.from_numpy(DENSE).to_sparse_csr()
    csr = torch.sparse_csr_tensor(
        csr.crow_indices().to(ids), csr.col_indices().to(ids), csr.values(), csr.shape
    )
    batch = SparseBatch.from_torch_csr(csr, torch.tensor(FIELDS))
    assert lists(batch) == EXPECTED
    assert batch.indices.dtype == batch.fields.dtype == batch.offsets.dtype == ids


def test_from_lists() -> None:
    assert lists(SparseBatch.from_lists(EXPECTED)) == EXPECTED
    assert len(SparseBatch.from_lists([])) == 0
    assert lists(SparseBatch.from_lists([[], []])) == [[], []]


@pytest.mark.parametrize(
    ("which", "picked"),
    [
        (slice(1, 3), [1, 2]),
        (slice(2, 1), []),
        (slice(None, None, 2), [0, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0, 2], [2, 0, 2]),
        (torch.tensor([-1]), [2]),
        (np.array([True, False, True]), [0, 2]),
    ],
    ids=str,
)
def test_some_of_the_samples(which: object, picked: list[int]) -> None:
    batch = SparseBatch.from_lists(EXPECTED)[which]  # type: ignore[index]
    assert lists(batch) == [EXPECTED[b] for b in picked]


def test_sample_out_of_range() -> None:
    batch = SparseBatch.from_lists(EXPECTED)
    with pytest.raises(IndexError, match=r"sample \[1\] = 3 is out of range for 3 samples"):
        batch[[0, 3]]
    with pytest.raises(IndexError, match=r"the mask has shape \[2\], the batch has 3 samples"):
        batch[torch.tensor([True, False])]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(-3, 3))), max_size=6
    )
)
def test_lists_survive_the_round_trip(samples: list[list[tuple[int, int, float]]]) -> None:
    batch = SparseBatch.from_lists(samples)
    assert len(batch) == len(samples)
    assert lists(batch) == samples
    order = list(range(len(samples)))[::-1]
    assert lists(batch[order]) == samples[::-1]


def test_to() -> None:
    batch = SparseBatch.from_lists(EXPECTED)
    double = batch.to(torch.float64)
    assert double.values is not None
    assert double.values.dtype == torch.float64
    assert double.indices.dtype == torch.int64
    assert batch.to("meta").device.type == "meta"
    with pytest.raises(TypeError, match=r"SparseBatch\.to: dtype must be floating point"):
        batch.to(torch.int32)


INDICES, FIELD, VALUES, OFFSETS = (
    torch.tensor([0, 1]),
    torch.tensor([0, 1]),
    torch.ones(2),
    torch.tensor([0, 2]),
)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1], FIELD, VALUES, OFFSETS), TypeError, "indices must be a tensor, got list"),
        (
            (INDICES.float(), FIELD, VALUES, OFFSETS),
            TypeError,
            "indices must be int32 or int64, got torch.float32",
        ),
        (
            (INDICES, FIELD[None], VALUES, OFFSETS),
            ValueError,
            r"fields must have one dimension, got shape \[1, 2\]",
        ),
        (
            (INDICES, FIELD[:1], VALUES, OFFSETS),
            ValueError,
            r"fields has shape \[1\], indices has \[2\]",
        ),
        (
            (INDICES, FIELD, VALUES[:1], OFFSETS),
            ValueError,
            r"values has shape \[1\], indices has \[2\]",
        ),
        (
            (INDICES, FIELD, VALUES.long(), OFFSETS),
            TypeError,
            "values must be floating point, got torch.int64",
        ),
        ((INDICES, FIELD, VALUES, OFFSETS[:0]), ValueError, "offsets is empty"),
        (
            (INDICES, FIELD, VALUES.to("meta"), OFFSETS),
            ValueError,
            "values is on meta, indices is on cpu",
        ),
    ],
)
def test_refuses(arguments: tuple[torch.Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"SparseBatch: {message}"):
        SparseBatch(*arguments)


def test_constructors_refuse() -> None:
    with pytest.raises(
        ValueError, match=r"feature_fields has shape \[2\], expected one field .* 6 columns"
    ):
        SparseBatch.from_dense(DENSE, [0, 1])
    with pytest.raises(TypeError, match="feature_fields must be integers"):
        SparseBatch.from_dense(DENSE, [0.0] * 6)
    with pytest.raises(
        ValueError, match=r"from_dense: X must have two dimensions, got shape \[3\]"
    ):
        SparseBatch.from_dense([1.0, 2.0, 3.0], [0])
    with pytest.raises(
        TypeError, match=r"from_torch_csr: t must be sparse_csr, got torch\.strided"
    ):
        SparseBatch.from_torch_csr(torch.ones(2, 6), FIELDS)
    with pytest.raises(
        ValueError,
        match=r"from_lists: samples\[1\]\[0\] = \(0, 1\) is not \(field, feature, value\)",
    ):
        SparseBatch.from_lists([[], [(0, 1)]])  # type: ignore[list-item]
