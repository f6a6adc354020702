# SPDX-License-Identifier: MIT
"""Frames to features: the same for pandas, polars, pyarrow and dicts."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffm_ext import SparseBatch
from ffm_ext.data import Bins, FieldEncoder, Hash, Numeric, SparseDataset, Vocabulary
from ffm_ext.data._frames import columns_of


def pandas_frame(data: dict[str, Any]) -> Any:
    return pytest.importorskip("pandas").DataFrame(data)


def polars_frame(data: dict[str, Any]) -> Any:
    return pytest.importorskip("polars").DataFrame(data, strict=False)


def arrow_table(data: dict[str, Any]) -> Any:
    return pytest.importorskip("pyarrow").table(data)


def arrow_batch(data: dict[str, Any]) -> Any:
    return pytest.importorskip("pyarrow").RecordBatch.from_pydict(data)


Make = Callable[[dict[str, Any]], Any]


@pytest.fixture(
    params=[pandas_frame, polars_frame, arrow_table, arrow_batch, dict], ids=lambda f: f.__name__
)
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


Entry = tuple[str, float]


def rows(encoder: FieldEncoder, batch: SparseBatch) -> list[list[Entry]]:
    """Every sample by the names of its features."""
    names, fields = encoder.feature_names, encoder.feature_fields
    assert len(names) == len(fields) == encoder.num_features == sum(encoder.field_dims)
    assert torch.equal(fields[batch.indices], batch.fields)
    values = torch.ones(batch.nnz) if batch.values is None else batch.values
    found = [(names[i], v) for i, v in zip(batch.indices.tolist(), values.tolist(), strict=True)]
    ends = batch.offsets.tolist()
    for start, end in pairwise(ends):
        assert batch.fields[start:end].tolist() == sorted(batch.fields[start:end].tolist())
    return [found[start:end] for start, end in pairwise(ends)]


TRAIN = {
    "user": ["ann", "bob", None, "ann"],
    "site": ["x", None, "y", "x"],
    "age": [20.5, None, 41.0, 30.0],
    "price": [0.5, 2.0, None, 1.0],
    "genres": [["a", "b"], [], None, ["b", None]],
    "item": [3, 1, 2, 3],
}
TEST = {
    "user": ["eve", "bob", None],
    "site": ["z", "x", None],
    "age": [-1.0, 99.0, None],
    "price": [-3.0, None, 0.0],
    "genres": [["c", "a"], None, []],
    "item": [7, 3, 1],
}
COLUMNS: Any = {
    "user": "vocabulary",
    "site": Hash(8, seed=1),
    "age": Bins(2),
    "price": "numeric",
    "genres": "vocabulary",
    "item": "vocabulary",
}


def test_every_kind_of_column(make: Make) -> None:
    encoder = FieldEncoder(COLUMNS)
    batch = encoder.fit_transform(make(TRAIN))
    one = 1.0
    x, y, z = (f"site#{Hash(8, 1).encode(np.array([t]))[0][0] - 1}" for t in "xyz")
    low, high = "age in [-inf, 30)", "age in [30, inf)"
    assert rows(encoder, batch) == [
        [("user=ann", one), (x, one), (low, one), ("price", 0.5), ("genres=a", one),
         ("genres=b", one), ("item=3", one)],
        [("user=bob", one), ("site=<missing>", one), ("age=<missing>", one), ("price", 2.0),
         ("item=1", one)],
        [("user=<missing>", one), (y, one), (high, one), ("genres=<missing>", one),
         ("item=2", one)],
        [("user=ann", one), (x, one), (high, one), ("price", 1.0), ("genres=b", one),
         ("item=3", one)],
    ]  # fmt: skip
    assert rows(encoder, encoder.transform(make(TEST))) == [
        [("user=<unknown>", one), (z, one), (low, one), ("price", -3.0), ("genres=<unknown>", one),
         ("genres=a", one), ("item=<unknown>", one)],
        [("user=bob", one), (x, one), (high, one), ("genres=<missing>", one), ("item=3", one)],
        [("user=<missing>", one), ("site=<missing>", one), ("age=<missing>", one), ("price", 0.0),
         ("item=1", one)],
    ]  # fmt: skip
    assert batch.indices.dtype == torch.int32
    assert encoder.field_names == tuple(COLUMNS)
    assert encoder.field_dims == (4, 9, 3, 1, 4, 5)
    assert (encoder.num_features, encoder.num_fields) == (26, 6)
    assert encoder.feature_fields.tolist() == [0] * 4 + [1] * 9 + [2] * 3 + [3] + [4] * 4 + [5] * 5


def test_columns_are_found_by_name(make: Make) -> None:
    encoder = FieldEncoder(COLUMNS).fit(make(TRAIN))
    shuffled = {"more": [1, 2, 3], **dict(reversed(TEST.items()))}
    wanted, found = encoder.transform(make(TEST)), encoder.transform(make(shuffled))
    assert torch.equal(wanted.indices, found.indices)
    with pytest.raises(KeyError, match="the frame has no column 'age'"):
        encoder.transform(make({k: v for k, v in TEST.items() if k != "age"}))


def test_inferred_kinds(make: Make) -> None:
    encoder = FieldEncoder().fit(make(TRAIN))
    assert {name: encoding.kind for name, encoding in encoder.columns.items()} == {
        "user": "vocabulary",
        "site": "vocabulary",
        "age": "bins",
        "price": "bins",
        "genres": "vocabulary",
        "item": "vocabulary",
    }


def test_no_rows(make: Make) -> None:
    encoder = FieldEncoder({"a": "vocabulary", "b": Bins(3)})
    for batch in (encoder.fit_transform(make({"a": [], "b": []})),):
        assert (len(batch), batch.nnz) == (0, 0)
    assert encoder.feature_names == (
        *("a=<missing>", "a=<unknown>", "b=<missing>"),
        "b in [-inf, inf)",
    )


def test_one_hot_columns_have_no_values() -> None:
    batch = FieldEncoder({"a": "vocabulary"}).fit_transform({"a": ["x", "y"]})
    assert batch.values is None


def test_frames_agree_on_what_a_category_is() -> None:
    """Integers that are floats for a missing value beside them, in another frame texts."""
    encoder = FieldEncoder({"a": "vocabulary", "b": Hash(10**6)})
    wanted = encoder.fit_transform({"a": [1, 2, 3], "b": [1, 2, 3]}).indices.tolist()
    for column in (
        np.array([1.0, 2.0, 3.0]),
        np.array([1, 2, 3], dtype=np.uint8),
        np.array([1, 2, 3], dtype=np.float32),
        ["1", "2", "3"],
        [1, "2", 3.0],
        [True, 2, 3],
        (b"1", b"2", b"3"),
        torch.tensor([1, 2, 3]),
    ):
        assert encoder.transform({"a": column, "b": column}).indices.tolist() == wanted
    found = encoder.transform({"a": [1.0, math.nan], "b": [None, 2]}).indices.tolist()
    assert found == [wanted[0], encoder.field_dims[0], 0, wanted[3]]


UTC = datetime.timezone.utc
EAST = datetime.timezone(datetime.timedelta(hours=1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.date(2020, 1, 1), "2020-01-01T00:00:00"),
        (datetime.datetime(2020, 1, 1, 12, 0, 0, 500_000), "2020-01-01T12:00:00.500000"),
        (datetime.datetime(2020, 1, 1, tzinfo=UTC), "2020-01-01T00:00:00"),
        (datetime.datetime(2020, 1, 1, 1, tzinfo=EAST), "2020-01-01T00:00:00"),
        (datetime.timedelta(days=-1, microseconds=7), "-1 day, 0:00:00.000007"),
        (datetime.timedelta(days=1), "1 day, 0:00:00"),
        (Decimal("1.00"), "1"),
        (Decimal("0.10"), "0.1"),
    ],
    ids=str,
)
def test_a_value_has_one_text_in_every_frame(value: Any, text: str) -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    polars = pytest.importorskip("polars")
    column = arrow.array([value])
    of_arrow = pandas.ArrowDtype(column.type)
    as_object = np.array([value], dtype=object)
    frames = [
        {"a": [value]},
        pandas.DataFrame({"a": [value]}),
        pandas.DataFrame({"a": as_object}),
        pandas.DataFrame({"a": pandas.Series(pandas.Series([value]).tolist(), dtype=object)}),
        pandas.DataFrame({"a": pandas.Series([value], dtype=of_arrow)}),
        polars.DataFrame({"a": [value]}),
        polars.DataFrame({"a": [[value]]}),
        arrow.table({"a": column}),
        arrow.table({"a": [[value]]}),
        arrow.RecordBatch.from_pydict({"a": column}),
        arrow.RecordBatch.from_pydict({"a": column.dictionary_encode()}),
    ]
    if isinstance(value, datetime.timedelta):
        frames += [{"a": np.array([value], dtype=f"m8[{unit}]")} for unit in ("us", "ns")]
    elif isinstance(value, datetime.date) and getattr(value, "tzinfo", None) is None:
        frames += [{"a": np.array([value], dtype=f"M8[{unit}]")} for unit in ("us", "ns")]
    for frame in frames:
        assert FieldEncoder({"a": "vocabulary"}).fit(frame).feature_names[2:] == (f"a={text}",)


@pytest.mark.parametrize("of", [list, np.array], ids=["objects", "array"])
def test_nanoseconds_are_kept(of: Any) -> None:
    def texts(kind: str) -> tuple[str, ...]:
        values = np.array([-1, 0, 1, 1000], dtype=f"{kind}8[ns]")
        column = [*values, None] if of is list else values
        return FieldEncoder({"a": "vocabulary"}).fit({"a": column}).feature_names[2:]

    assert set(texts("M")) == {
        *("a=1969-12-31T23:59:59.999999999", "a=1970-01-01T00:00:00"),
        *("a=1970-01-01T00:00:00.000000001", "a=1970-01-01T00:00:00.000001"),
    }
    assert set(texts("m")) == {
        *("a=-1 day, 23:59:59.999999999", "a=0:00:00"),
        *("a=0:00:00.000000001", "a=0:00:00.000001"),
    }


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([1, 1.0, Decimal("1"), Decimal("1.0"), Decimal("1.00"), "1"], "1"),
        ([0, -0.0, Decimal("-0.00")], "0"),
        ([100000, Decimal("1E+5")], "100000"),
        ([10**300, Decimal("1E+300")], "1" + "0" * 300),
        ([0.1, Decimal("0.1"), Decimal("0.100"), Decimal.from_float(0.1)], "0.1"),
        ([1e-7, Decimal("0.00000010")], "1e-07"),
        ([2**63 + 1, Decimal(2**63 + 1)], str(2**63 + 1)),
        ([Decimal("0." + "1" * 40), Decimal("0." + "1" * 40 + "0")], "0." + "1" * 40),
        ([math.inf, Decimal("Infinity")], "inf"),
    ],
)
def test_numbers_are_told_apart_by_value(numbers: list[Any], text: str) -> None:
    for number in numbers:
        encoder = FieldEncoder({"a": "vocabulary"}).fit({"a": np.array([number], dtype=object)})
        assert encoder.feature_names[2:] == (f"a={text}",)


@pytest.mark.parametrize("dtype", ["double[pyarrow]", "float[pyarrow]", "Float64"])
def test_nan_is_missing_in_every_dtype_of_pandas(dtype: str) -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    column = pandas.Series([2.5, 0.0, None, 1.0, 0.0], dtype=dtype)
    if dtype != "Float64":
        numbers = arrow.array(
            [2.5, math.nan, None, 1.0, math.nan], column.array.dtype.pyarrow_dtype
        )
        column = pandas.Series(pandas.arrays.ArrowExtensionArray(numbers))
    else:
        column = column / (column != 0).astype("Int64") ** 2  # 0 / 0
    frame = pandas.DataFrame(dict.fromkeys("abc", column))
    encoder = FieldEncoder({"a": "vocabulary", "b": Bins(2), "c": "numeric"})
    found = rows(encoder, encoder.fit_transform(frame))
    missing = [("a=<missing>", 1.0), ("b=<missing>", 1.0)]
    assert [row == missing for row in found] == [False, True, True, False, True]
    assert encoder.feature_names[2:4] == ("a=1", "a=2.5")


def test_special_columns_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "category": pandas.Categorical(["b", None, "a"], categories=["c", "b", "a"]),
            "large": pandas.array([2**62 + 1, None, 3], dtype="Int64"),
            "real": pandas.array([0.5, None, 1.5], dtype="Float64"),
            "flag": pandas.array([True, None, False], dtype="boolean"),
            "text": pandas.array(["é", None, ""], dtype="string"),
            "day": pandas.to_datetime(["2024-02-29", None, "2024-03-01"]),
        },
        index=[5, 5, 0],
    )
    kinds: Any = {"real": "numeric"}
    encoder = FieldEncoder({name: kinds.get(name, "vocabulary") for name in frame.columns})
    found = rows(encoder, encoder.fit_transform(frame))
    assert [name for name, _ in found[0]] == [
        *("category=b", "large=4611686018427387905", "real", "flag=1", "text=é"),
        "day=2024-02-29T00:00:00",
    ]
    assert [name for name, _ in found[1]] == [
        f"{name}=<missing>" for name in frame.columns if name != "real"
    ]
    assert [name for name, _ in found[2]] == [
        *("category=a", "large=3", "real", "flag=0", "text="),
        "day=2024-03-01T00:00:00",
    ]


def test_special_columns_of_polars_and_pyarrow() -> None:
    polars, arrow = pytest.importorskip("polars"), pytest.importorskip("pyarrow")
    day = datetime.datetime(2024, 2, 29)
    frame = polars.DataFrame(
        {
            "category": polars.Series(["b", None, "a"], dtype=polars.Categorical),
            "kind": polars.Series(["b", None, "a"], dtype=polars.Enum(["a", "b"])),
            "large": [2**62 + 1, None, 3],
            "real": [0.5, math.nan, None],
            "flag": [True, None, False],
            "day": [day, None, day],
            "pair": polars.Series([[1, 2], None, [2, 2]], dtype=polars.Array(polars.Int64, 2)),
        }
    )
    table = arrow.table(
        {
            "category": arrow.array(["b", None, "a"]).dictionary_encode(),
            "kind": arrow.array(["b", None, "a"], type=arrow.large_string()),
            "large": arrow.chunked_array([[2**62 + 1, None], [3]]),
            "real": arrow.array([0.5, math.nan, None]),
            "flag": arrow.array([True, None, False]),
            "day": arrow.array([day, None, day]),
            "pair": arrow.array([[1, 2], None, [2, 2]], type=arrow.list_(arrow.int64(), 2)),
        }
    )
    plain = {
        "category": ["b", None, "a"],
        "kind": ["b", None, "a"],
        "large": [2**62 + 1, None, 3],
        "real": [0.5, math.nan, None],
        "flag": [True, None, False],
        "day": np.array(["2024-02-29", "NaT", "2024-02-29"], dtype="datetime64[ns]"),
        "pair": [[1, 2], None, [2, 2]],
    }
    encoder = FieldEncoder(dict.fromkeys(plain, "vocabulary"))
    wanted = rows(encoder, encoder.fit_transform(plain))
    assert [name for name, _ in wanted[0]] == [
        *("category=b", "kind=b", "large=4611686018427387905", "real=0.5", "flag=1"),
        *("day=2024-02-29T00:00:00", "pair=1", "pair=2"),
    ]
    assert [name for name, _ in wanted[1]] == [f"{name}=<missing>" for name in plain]
    for other in (frame, table):
        assert rows(encoder, encoder.transform(other)) == wanted
        assert rows(encoder, encoder.fit_transform(other)) == wanted


def test_lists_in_arrays() -> None:
    wanted = [[("a=1", 1), ("a=2", 1)], [("a=2", 1), ("a=2", 1)]]
    for column in (np.array([[1, 2], [2, 2]]), [[1, 2], (2, 2)], torch.tensor([[1, 2], [2, 2]])):
        encoder = FieldEncoder({"a": "vocabulary"})
        assert rows(encoder, encoder.fit_transform({"a": column})) == wanted


@pytest.mark.parametrize("frame", [dict, pandas_frame])
def test_values_among_lists(frame: Make) -> None:
    for column, wanted in (
        ([["drama", "war"], "war", None], [["drama", "war"], ["war"], ["<missing>"]]),
        ([None, ["a"], "bc"], [["<missing>"], ["a"], ["bc"]]),
        (["war", ("drama", "war"), []], [["war"], ["drama", "war"], []]),
        ([7, np.array([8, 7]), math.nan], [["7"], ["8", "7"], ["<missing>"]]),
    ):
        encoder = FieldEncoder({"g": "vocabulary"})
        found = rows(encoder, encoder.fit_transform(frame({"g": column})))
        assert [[name.removeprefix("g=") for name, _ in row] for row in found] == wanted


def test_missing_values_in_lists_and_arrays() -> None:
    def found(column: Any) -> list[list[str]]:
        encoder = FieldEncoder({"t": "vocabulary"})
        batch = rows(encoder, encoder.fit_transform({"t": column}))
        return [[name.removeprefix("t=") for name, _ in row] for row in batch]

    pandas = pytest.importorskip("pandas")
    day = pandas.Timestamp("2020-01-01")
    one, none = [["2020-01-01T00:00:00"]], [["<missing>"]]
    assert found([day, pandas.NaT, pandas.NA, None, Decimal("NaN")]) == one + 4 * none
    assert found([pandas.NaT, np.datetime64("NaT"), day]) == 2 * none + one
    assert found([["a", pandas.NA], ["b"], pandas.NA]) == [["a"], ["b"], *none]
    assert found([b"a", math.nan]) == [["a"], *none]
    assert found(np.ma.array([1, 2, 3], mask=[0, 1, 0])) == [["1"], *none, ["3"]]
    assert found(np.ma.array(["x", None], mask=[1, 0])) == 2 * none
    assert found(np.ma.array([[1, 2], [3, 4]], mask=[[0, 1], [0, 0]])) == [["1"], ["3", "4"]]
    assert FieldEncoder().fit({"t": np.ma.array([0.5, 2], mask=[1, 0])}).columns["t"].kind == "bins"


def test_large_integers_beside_other_numbers() -> None:
    for column in ([2**63 + 1, 2**63 + 2, -1], [2**53 + 1, 2**53, 0.5]):
        for numbers in (column, [[number, column[0]] for number in column]):
            encoder = FieldEncoder({"t": "vocabulary"}).fit({"t": numbers})
            assert set(encoder.feature_names[2:]) == {f"t={number}" for number in column}
    assert FieldEncoder().fit({"t": [2**60, 1, 0.5, math.inf]}).columns["t"].kind == "bins"


def test_vocabulary() -> None:
    encoder = FieldEncoder({"a": Vocabulary(min_count=2)})
    batch = encoder.fit_transform({"a": ["x", "y", "x", "z", "z", "1", 1]})
    assert encoder.feature_names == ("a=<missing>", "a=<unknown>", "a=1", "a=x", "a=z")
    assert batch.indices.tolist() == [3, 1, 3, 4, 4, 2, 2]
    reordered = FieldEncoder({"a": "vocabulary"}).fit({"a": ["z", "x", "y"]})
    assert reordered.feature_names[2:] == ("a=x", "a=y", "a=z")


def test_an_encoding_may_be_that_of_several_columns() -> None:
    shared = Vocabulary(min_count=1)
    encoder = FieldEncoder(dict.fromkeys("ab", shared)).fit({"a": ["x", "y"], "b": ["z", "z"]})
    assert encoder.field_dims == (4, 3)
    assert encoder.feature_names[2:4] == ("a=x", "a=y")
    assert encoder.feature_names[6:] == ("b=z",)
    assert shared.categories == []


def test_columns_with_numbers_for_names() -> None:
    frame = pytest.importorskip("pandas").DataFrame(np.array([[1, 2], [3, 2]]))
    encoder = FieldEncoder().fit(frame)
    assert encoder.feature_names == (
        *("0=<missing>", "0=<unknown>", "0=1", "0=3"),
        *("1=<missing>", "1=<unknown>", "1=2"),
    )


def test_hashes_stay_the_same() -> None:
    """Models that people have trained depend on these numbers."""
    texts = np.array(["a", "b", "ä", "", "1"], dtype=object)
    assert Hash(1000).encode(texts)[0].tolist() == [474, 754, 759, 44, 763]
    assert Hash(1000, seed=7).encode(texts)[0].tolist() == [875, 549, 79, 745, 282]
    assert Hash(1000).encode(np.array([1]))[0].tolist() == [763]


def test_hash_spreads() -> None:
    batch = FieldEncoder({"a": Hash(10)}).fit_transform({"a": np.arange(10_000)})
    counts = torch.bincount(batch.indices)
    assert counts[0] == 0
    assert counts[1:].min() > 900


def test_bins() -> None:
    numbers = np.random.default_rng(0).normal(size=1000)
    encoder = FieldEncoder({"a": Bins(4)})
    batch = encoder.fit_transform({"a": numbers})
    assert torch.bincount(batch.indices).tolist() == [0, 250, 250, 250, 250]
    assert encoder.transform({"a": [-math.inf, math.inf, None]}).indices.tolist() == [1, 4, 0]
    constant = FieldEncoder({"a": Bins(4)}).fit({"a": [3.0, 3.0]})
    assert constant.num_features == 2


def test_bins_without_frequent_numbers_are_quantiles() -> None:
    numbers = np.random.default_rng(0).normal(size=10_000)
    bins = Bins(20)
    bins.fit(numbers)
    np.testing.assert_allclose(bins.edges, np.quantile(numbers, np.arange(1, 20) / 20), atol=2e-3)


@pytest.mark.parametrize(
    ("numbers", "bins", "counts"),
    [
        ([0] * 50 + list(range(1, 51)), 4, [50, 17, 16, 17]),
        ([0] * 95 + [1, 2, 3, 4, 5], 10, [95, 1, 1, 1, 1, 1]),
        ([0] * 89 + list(range(1, 12)), 10, [89, 1, 1, 2, 1, 1, 1, 2, 1, 1]),
        ([*range(-10, 0), *[0] * 80, *range(1, 11)], 5, [5, 5, 80, 5, 5]),
        ([*range(-10, 0), *[0] * 80, 9], 3, [10, 80, 1]),
        ([-1, *[0] * 8, 1, 1], 2, [9, 2]),
        ([1] * 40 + [2] * 40 + list(range(3, 23)), 4, [40, 40, 10, 10]),
        ([1, 2, 2, 2], 2, [1, 3]),
    ],
)
def test_frequent_numbers_have_bins_of_their_own(
    numbers: list[float], bins: int, counts: list[int]
) -> None:
    encoder = FieldEncoder({"a": Bins(bins)})
    batch = encoder.fit_transform({"a": numbers})
    assert torch.bincount(batch.indices).tolist() == [0, *counts]


@given(
    st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 200)), min_size=1, max_size=30),
    st.integers(1, 40),
)
def test_as_many_bins_as_asked_for(runs: list[tuple[int, int]], bins: int) -> None:
    numbers = np.repeat(*np.array(runs).T).astype(np.float64)
    distinct, counts = np.unique(numbers, return_counts=True)
    encoding = Bins(bins)
    encoding.fit(numbers)
    ids = encoding.encode(numbers)[0]
    rows = np.bincount(ids)
    assert len(rows) == encoding.num_features == 1 + min(bins, len(distinct))
    assert rows[0] == 0
    assert rows[1:].min() > 0
    assert set(encoding.edges) <= set(distinct)
    if bins > 2 and counts.max() * bins >= len(numbers):
        heaviest = distinct[counts.argmax()]
        assert rows[encoding.encode(np.array([heaviest]))[0]] == counts.max()


@pytest.mark.parametrize(
    ("edges", "texts"),
    [
        ([30.0, 0.1 + 0.2], ["0.3", "30"]),
        ([1000002.0, 1000003.0, 1000004.0], ["1000002", "1000003", "1000004"]),
        ([2.0**53 - 2, 2.0**53], ["9007199254740990.0", "9007199254740992.0"]),
        ([0.3, 0.1 + 0.2], ["0.3", "0.30000000000000004"]),
    ],
)
def test_names_tell_bins_apart(edges: list[float], texts: list[str]) -> None:
    ends = pairwise(["-inf", *texts, "inf"])
    names = [f" in [{low}, {high})" for low, high in ends]
    assert list(Bins(edges=sorted(edges)).names()) == ["=<missing>", *names]


def test_edges_of_any_numbers_are_loaded(tmp_path: Path) -> None:
    """Files may have edges that no number of the frame has, such as quantiles between two of them."""
    FieldEncoder({"a": Bins(2)}).fit({"a": [1, 2]}).save(tmp_path / "encoder.json")
    info = json.loads((tmp_path / "encoder.json").read_text())
    info["columns"][0]["edges"] = [1.5]
    (tmp_path / "encoder.json").write_text(json.dumps(info))
    loaded = FieldEncoder.load(tmp_path / "encoder.json")
    assert loaded.transform({"a": [1, 1.5, 2]}).indices.tolist() == [1, 2, 2]


def test_times_are_no_numbers(make: Make) -> None:
    start = datetime.datetime(2024, 2, 29)
    for column in ([start, None], [start - start], [start.date()]):
        for kind in (Bins(), Numeric()):
            with pytest.raises(ValueError, match=r"numbers are needed, got .*total_seconds\(\)"):
                FieldEncoder({"a": kind}).fit(make({"a": column}))
    with pytest.raises(ValueError, match=r"numbers are needed, got int, str$"):
        FieldEncoder({"a": Bins()}).fit({"a": np.array([1, "x"], dtype=object)})


@pytest.mark.parametrize("make_frame", [pandas_frame, polars_frame])
def test_seconds_of_times_are_numbers(make_frame: Make) -> None:
    """As the error says."""
    start = datetime.datetime(2024, 2, 29)
    column = make_frame({"t": [start, None, start + datetime.timedelta(minutes=1)]})["t"]
    frame = make_frame({"t": (column - start).dt.total_seconds()})
    found = FieldEncoder({"t": "numeric"}).fit_transform(frame)
    assert found.values is not None
    assert found.values.tolist() == [0, 60]
    assert found.offsets.tolist() == [0, 1, 1, 2]


def test_tokens_keep_their_last_nuls() -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    polars = pytest.importorskip("polars")
    for tokens in ([b"\1", b"\1\0", b"\1\0\0"], ["a", "a\0", "a\0\0"]):
        texts = [t if isinstance(t, str) else t.decode() for t in tokens]
        for frame in (
            {"c": tokens},
            {"c": tuple(tokens)},
            {"c": [tokens]},
            {"c": [[token] for token in tokens]},
            {"c": [tokens[:2], tokens[2:]]},
            {"c": np.array(tokens, dtype=object)},
            pandas.DataFrame({"c": tokens}),
            pandas.DataFrame({"c": [tokens]}),
            polars.DataFrame({"c": tokens}),
            polars.DataFrame({"c": [tokens]}),
            arrow.table({"c": tokens}),
            arrow.table({"c": [tokens]}),
            pandas.DataFrame({"c": pandas.Series(arrow.array([tokens]).to_pylist())}),
            arrow.table({"c": [tokens]}).to_pandas(types_mapper=pandas.ArrowDtype),
        ):
            names = FieldEncoder({"c": "vocabulary"}).fit(frame).feature_names[2:]
            assert names == tuple(f"c={text}" for text in texts)


def test_lists_of_arrow_in_pandas_keep_large_integers() -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    lists = arrow.array([[2**53 + 1, None], None, [], [1]])
    frame = pandas.DataFrame({"c": pandas.Series(pandas.arrays.ArrowExtensionArray(lists))})
    encoder = FieldEncoder({"c": "vocabulary"})
    assert [[name for name, _ in row] for row in rows(encoder, encoder.fit_transform(frame))] == [
        *(["c=9007199254740993"], ["c=<missing>"], [], ["c=1"]),
    ]


def test_times_with_a_zone_are_read_as_arrays() -> None:
    """Not as an object each, which takes many times longer."""
    pandas = pytest.importorskip("pandas")
    days = pandas.Series(pandas.to_datetime(["2024-02-29T12:00", None, "2024-07-01T00:00"]))
    zoned = days.dt.tz_localize("Europe/Berlin")
    for column in (zoned, zoned.astype("category"), zoned[::-1]):
        values = columns_of(pandas.DataFrame({"t": column}), ["t"])["t"].values
        assert values.dtype.kind == "M"
        encoder = FieldEncoder({"t": "vocabulary"}).fit({"t": values})
        assert encoder.feature_names[2:] == ("t=2024-02-29T11:00:00", "t=2024-06-30T22:00:00")


def test_scikit_learn_knows_whether_it_is_fitted(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError
    from sklearn.frozen import FrozenEstimator
    from sklearn.pipeline import make_pipeline
    from sklearn.utils.validation import check_is_fitted

    frame = pandas_frame({"user": ["ann", "bob"], "age": [1.0, 2.0]})
    encoder = FieldEncoder()
    assert not hasattr(encoder, "feature_names_in_")
    assert not hasattr(encoder, "n_features_in_")
    with pytest.raises(NotFittedError):
        check_is_fitted(encoder)
    wanted = encoder.fit_transform(frame).indices.tolist()
    encoder.save(tmp_path / "encoder.json")
    for fitted in (
        encoder,
        FieldEncoder.load(tmp_path / "encoder.json"),
        FrozenEstimator(encoder),
        make_pipeline(FieldEncoder()).fit(frame),
        make_pipeline(FieldEncoder(), "passthrough").fit(frame)[:-1],
    ):
        check_is_fitted(fitted)
        assert fitted.transform(frame).indices.tolist() == wanted
        assert list(fitted.feature_names_in_) == ["user", "age"]
        assert fitted.n_features_in_ == 2
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(encoder))
    pairs = FieldEncoder().fit({("a", 1): ["x"], 2: ["y"]})
    assert pairs.feature_names_in_.tolist() == [("a", 1), 2]


def test_a_column_transformer_takes_no_batches() -> None:
    """As the documentation says."""
    compose = pytest.importorskip("sklearn.compose")
    columns = compose.ColumnTransformer([("e", FieldEncoder(), ["u"])])
    with pytest.raises(ValueError, match="should be 2D"):
        columns.fit_transform(pandas_frame({"u": ["a", "b"]}))


def test_saved_and_loaded(make: Make, tmp_path: Path) -> None:
    encoder = FieldEncoder(COLUMNS).fit(make(TRAIN))
    encoder.save(tmp_path / "encoder.json")
    found = FieldEncoder.load(tmp_path / "encoder.json")
    assert found.columns == encoder.columns
    assert found.feature_names == encoder.feature_names
    a, b = encoder.transform(make(TEST)), found.transform(make(TEST))
    assert torch.equal(a.indices, b.indices)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.json"]


def test_numpys_integers_are_saved_too(tmp_path: Path) -> None:
    two = np.int64(2)
    encoder = FieldEncoder({"site": Hash(two, two), "age": Bins(two), "user": Vocabulary(two)})
    encoder.fit(TRAIN).save(tmp_path / "encoder.json")
    assert FieldEncoder.load(tmp_path / "encoder.json").columns == encoder.columns


def test_names_of_several_levels_are_saved(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({("a", 1): ["u", "v"], ("b", ("c", None)): ["p", "q"], 2: ["x", "y"]})
    encoder = FieldEncoder().fit(frame)
    encoder.save(tmp_path / "encoder.json")
    found = FieldEncoder.load(tmp_path / "encoder.json")
    assert found.columns == encoder.columns
    assert torch.equal(found.transform(frame).indices, encoder.transform(frame).indices)
    numbered = FieldEncoder({np.int64(3): "vocabulary"}).fit({3: ["u"]})
    numbered.save(tmp_path / "encoder.json")
    assert FieldEncoder.load(tmp_path / "encoder.json").columns == numbered.columns
    dated = FieldEncoder().fit({pd.Timestamp("2026-01-01"): ["u"]})
    with pytest.raises(TypeError, match=r"FieldEncoder.save: a column's name has Timestamp"):
        dated.save(tmp_path / "encoder.json")
    assert FieldEncoder.load(tmp_path / "encoder.json").columns == numbered.columns


def test_bytes_that_are_no_text_are_saved(tmp_path: Path) -> None:
    frame = {"c": [b"\xff", "\u00e9"]}
    encoder = FieldEncoder({"c": "vocabulary"}).fit(frame)
    encoder.save(tmp_path / "encoder.json")
    found = FieldEncoder.load(tmp_path / "encoder.json")
    assert found.columns == encoder.columns
    assert torch.equal(found.transform(frame).indices, encoder.transform(frame).indices)


def test_files_that_hold_no_encoder(tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    FieldEncoder(COLUMNS).fit(TRAIN).save(path)
    text = path.read_text()
    info = json.loads(text)
    columns = info["columns"]
    for bad in (
        "",
        text[:-9],
        "[]",
        "[" * 100_000,
        json.dumps({**info, "version": 2}),
        json.dumps({**info, "format": "other"}),
        json.dumps({**info, "columns": [{"name": "a", "kind": "other"}]}),
        json.dumps({**info, "columns": [{**columns[0], "min_count": 0}]}),
        json.dumps({**info, "columns": [{**columns[0], "more": 0}]}),
        json.dumps({**info, "columns": [{**columns[0], "categories": "abc"}]}),
        json.dumps({**info, "columns": [{**columns[0], "categories": [1, 2]}]}),
        json.dumps({**info, "columns": [{**columns[2], "edges": ["x"]}]}),
        json.dumps({**info, "columns": [{**columns[2], "edges": {"1": 2}}]}),
        json.dumps({**info, "columns": [{**columns[2], "edges": [True]}]}),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: corrupt: "):
            FieldEncoder.load(path)
    with pytest.raises(FileNotFoundError):
        FieldEncoder.load(tmp_path / "no")


def test_misuse() -> None:
    with pytest.raises(
        ValueError, match=r"columns\['a'\] = 'words' is not one of vocabulary, hash"
    ):
        FieldEncoder({"a": "words"})  # type: ignore[dict-item]
    for wrong in (lambda: Hash(0), lambda: Bins(0), lambda: Vocabulary(0), lambda: Hash(4, -1)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    encoder = FieldEncoder({"a": "numeric"})
    for use in (encoder.transform, lambda _: encoder.num_features):
        with pytest.raises(RuntimeError, match="FieldEncoder: call fit first"):
            use({"a": [1]})
    encoder.fit({"a": [1]})
    for column, text in (
        (["x"], "numbers are needed, got"),
        ([10**400, 1], "integers do not fit float64"),
        ([math.inf], "inf is not finite in float32"),
        ([1e300], "1e.300 is not finite in float32"),
        ([[1.0, 2.0], [3.0]], "a numeric column cannot hold lists"),
    ):
        with pytest.raises(ValueError, match=f"FieldEncoder: column 'a': {text}"):
            encoder.transform({"a": column})
    with pytest.raises(ValueError, match=r"columns differ in length: \{'a': 1, 'b': 2\}"):
        FieldEncoder().fit({"a": [1], "b": [1, 2]})
    with pytest.raises(TypeError, match=r"a frame is a pandas .* got list"):
        FieldEncoder().fit([1, 2])
    with pytest.raises(ValueError, match="column 'b': numbers are needed"):
        FieldEncoder({"b": Bins(3)}).fit({"b": ["x"]})
    for wrong, text in (
        ([{"a": 1}], "a category must be hashable: .*'dict'"),
        ([[{"a": 1}], "x"], "a category must be hashable: .*'dict'"),
        ([[["a", "b"]], [["c"]]], "lists of lists have no encoding"),
        (5, "a list or an array is needed, got int"),
    ):
        for kind in (Vocabulary(), Hash(8)):
            with pytest.raises(ValueError, match=f"^FieldEncoder: column 'c': {text}"):
                FieldEncoder({"c": kind}).fit_transform({"c": wrong})


def test_a_failed_fit_changes_nothing() -> None:
    encoder = FieldEncoder({"user": "vocabulary", "age": Bins(2), "price": "numeric"})
    bad = {"user": ["eve"], "age": [1.0], "price": ["x"]}
    for fit in (encoder.fit, encoder.fit_transform):
        with pytest.raises(ValueError, match="column 'price': numbers are needed"):
            fit(bad)
        with pytest.raises(RuntimeError, match="call fit first"):
            encoder.transform(TEST)
    names = encoder.fit(TRAIN).feature_names
    with pytest.raises(ValueError, match="column 'price': numbers are needed"):
        encoder.fit(bad)
    assert encoder.feature_names == names
    inferred = FieldEncoder().fit({"a": ["x"]})
    with pytest.raises(ValueError, match="column 'b': a category must be hashable"):
        inferred.fit({"a": ["y"], "b": [{"c": 1}]})
    assert inferred.feature_names[2:] == ("a=x",)


def test_columns_without_an_encoding_are_named() -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    polars = pytest.importorskip("polars")
    parts = [arrow.array([1, 2]), arrow.array(["a", "b"])]
    union = arrow.UnionArray.from_sparse(arrow.array([0, 1], arrow.int8()), parts)
    for frame in (
        polars.DataFrame({"c": [{"x": 1}, None]}),
        polars.DataFrame({"c": [[{"x": 1}]]}),
        arrow.table({"c": [{"x": 1}, None]}),
        arrow.table({"c": union}),
        pandas.DataFrame({"c": pandas.Series(pandas.arrays.ArrowExtensionArray(union))}),
    ):
        with pytest.raises(ValueError, match=r"^FieldEncoder: column 'c': "):
            FieldEncoder().fit(frame)


def test_columns_of_one_name() -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    numbers = arrow.array([1, 3])
    for frame in (
        pandas.DataFrame([[1, 2, 5], [3, 4, 6]], columns=["a", "a", "b"]),
        arrow.Table.from_arrays([numbers, numbers, numbers], names=["a", "a", "b"]),
    ):
        for columns in (None, {"a": Vocabulary()}):
            with pytest.raises(ValueError, match="the frame has 2 columns 'a'"):
                FieldEncoder(columns).fit(frame)
        FieldEncoder({"b": "vocabulary"}).fit_transform(frame)


def test_a_dataset_from_a_frame(make: Make) -> None:
    encoder = FieldEncoder({"user": "vocabulary", "price": Numeric()})
    batch = encoder.fit_transform(make(TRAIN))
    data = SparseDataset.from_arrays(
        batch, [1, 0, 0, 1], num_features=encoder.num_features, num_fields=encoder.num_fields
    )
    assert (len(data), data.num_features, data.num_fields) == (4, 5, 2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"u": Vocabulary},
            "columns\\['u'\\] = <class .*Vocabulary'> is no Vocabulary, Hash, Bins or Numeric",
        ),
        ({"u": 5}, "columns\\['u'\\] = 5 is no Vocabulary"),
        (["u", "v"], "columns must be a mapping .*, got list"),
    ],
    ids=["class", "number", "list"],
)
def test_what_is_no_encoding_is_refused(columns: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FieldEncoder(columns)


def test_a_lazy_frame_is_to_be_collected() -> None:
    polars = pytest.importorskip("polars")
    with pytest.raises(TypeError, match=r"call .collect\(\)"):
        FieldEncoder().fit(polars.DataFrame({"u": [1]}).lazy())


def test_a_copy_of_a_loaded_encoder_has_its_columns(tmp_path: Path) -> None:
    encoder = FieldEncoder({"u": Vocabulary(min_count=2)})
    encoder.fit({"u": ["a", "a", "b"]}).save(tmp_path / "e.json")
    loaded = FieldEncoder.load(tmp_path / "e.json")
    again = FieldEncoder(**loaded.get_params())
    assert (
        again.fit({"u": ["c", "c"]}).feature_names
        == FieldEncoder({"u": Vocabulary(min_count=2)}).fit({"u": ["c", "c"]}).feature_names
    )
    assert again.set_params(columns={"v": "hash"}).field_names == ("v",)


def test_the_fields_of_features_lie_on_the_cpu() -> None:
    encoder = FieldEncoder({"a": Hash(3), "b": Hash(2)}).fit({"a": ["x"], "b": ["y"]})
    device = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        assert encoder.feature_fields.tolist() == [0] * 4 + [1] * 3  # one more each: missing
    finally:
        torch.set_default_device(device)
