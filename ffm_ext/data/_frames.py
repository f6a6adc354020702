# SPDX-License-Identifier: MIT
"""Columns of pandas, polars, pyarrow and dicts, all in one form. None of these packages is imported here."""

from __future__ import annotations

import datetime
import decimal
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LISTS = (list, tuple, set, frozenset, np.ndarray)
# Types that have a NaN, which differs from itself. NaT of pandas is a datetime.
_WITH_NAN = (float, np.generic, datetime.datetime, decimal.Decimal)


class Column(NamedTuple):
    """``n`` rows with any number of values each.

    Attributes:
        values: those that are there, one after the other, ``[m]``.
        counts: how many of them each row has, ``[n]`` int64.
        missing: rows whose value is missing, ``[n]`` bool; they have none.
        is_list: the rows are lists.
    """

    values: Array
    counts: npt.NDArray[np.int64]
    missing: npt.NDArray[np.bool_]
    is_list: bool


def columns_of(frame: Any, names: Iterable[str] | None) -> dict[str, Column]:
    """These columns of a frame, or all.

    Raises:
        KeyError: there is no such column.
        TypeError: it is no frame.
        ValueError: columns differ in length, one is there twice, is no array, is of a type that has no encoding, or
            holds lists of lists.
    """
    package = type(frame).__module__.partition(".")[0]
    if type(frame).__name__ == "LazyFrame":
        raise TypeError("FieldEncoder: a LazyFrame has no rows yet: call .collect()")
    if isinstance(frame, Mapping):
        there = Counter(frame.keys())
    elif package in _READERS and hasattr(frame, "columns"):
        there = Counter(frame.schema.names if package == "pyarrow" else frame.columns)
    else:
        raise TypeError(
            "FieldEncoder: a frame is a pandas or polars DataFrame, a pyarrow Table or RecordBatch or "
            f"a dict of arrays, got {type(frame).__name__}"
        )
    get = _from_array if isinstance(frame, Mapping) else _READERS[package]
    columns = {}
    for name in there if names is None else names:
        if name not in there:
            raise KeyError(f"FieldEncoder: the frame has no column {name!r}")
        if there[name] > 1:
            raise ValueError(f"FieldEncoder: the frame has {there[name]} columns {name!r}")
        with naming(name):
            columns[name] = get(frame[name])
    lengths = {name: len(column.counts) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"FieldEncoder: columns differ in length: {lengths}")
    return columns


class naming:
    """Puts the column's name before the text of a ValueError, and of what a frame's package says of a type."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # pandas and pyarrow have NotImplementedError for a type that arrays cannot hold, polars errors of its own.
        of_polars = type(error).__module__.startswith("polars.")
        if isinstance(error, ValueError | NotImplementedError) or of_polars:
            raise ValueError(f"FieldEncoder: column {self.name!r}: {error}") from error


def _from_pandas(series: Any) -> Column:
    if hasattr(series.dtype, "pyarrow_dtype"):
        return _from_arrow(series.array.__arrow_array__())
    missing = series.isna().to_numpy(dtype=bool, copy=True)
    values = series[~missing] if missing.any() else series
    if values.dtype.name == "category":
        values = values.astype(values.cat.categories.dtype)
    if getattr(values.dtype, "tz", None) is not None:
        values = values.dt.tz_convert(None)  # in UTC; arrays hold no time zone, only objects do
    array = values.to_numpy()
    if array.dtype.kind == "f":  # NaN may be a value to pandas beside its own mask
        is_nan = np.isnan(array)
        missing[~missing] = is_nan
        array = array[~is_nan]
    return _from_present(array, missing)


def _from_polars(series: Any) -> Column:
    if hasattr(series.dtype, "fields"):
        raise ValueError(f"{series.dtype} has no encoding")
    if series.dtype.is_nested():
        if hasattr(series.dtype, "shape"):  # fixed-size lists
            series = series.arr.to_list()
        missing = series.is_null().to_numpy()
        counts = series.list.len().fill_null(0).to_numpy().astype(np.int64)
        elements = series.filter(series.list.len() > 0).explode()
        return _from_elements(_from_polars(elements), counts, missing)
    missing = series.is_null()
    if series.dtype.is_float():
        missing = missing | series.is_nan().fill_null(True)
    if str(series.dtype).startswith(("Categorical", "Enum")):
        series = series.cast(str)
    return _from_present(series.filter(~missing).to_numpy(), missing.to_numpy())


def _from_arrow(column: Any) -> Column:
    kind = str(column.type)
    if kind.startswith("dictionary"):
        column = column.cast(column.type.value_type)
    missing = np.asarray(column.is_null(nan_is_null=True))
    if kind.startswith(("list", "large_list", "fixed_size_list")):
        lists = column.drop_null().to_pylist()
        return _from_lists(lists, missing)
    present = column.filter(~missing) if missing.any() else column
    return _from_present(np.asarray(present), missing)


_READERS = {"pandas": _from_pandas, "polars": _from_polars, "pyarrow": _from_arrow}


def _from_array(values: Any) -> Column:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.fromiter(values, dtype=object)
    if array.ndim == 0:
        raise ValueError(f"a list or an array is needed, got {type(values).__name__}")
    mask = np.ma.getmask(values)
    if array.ndim > 1:
        array = np.fromiter(values if all(map(_is_list, values)) else array, dtype=object)
        mask = np.ma.nomask  # each row has its own
    elif _is_changed(array, values):
        array = np.fromiter(values, dtype=object)
    missing = _is_missing(array) | mask
    return _from_present(array[~missing], missing)


def _is_changed(array: Array, values: Any) -> bool:
    """Numpy has made texts of a list, or other numbers of integers that no float64 holds.

    Its texts are those of ``None`` and numbers too, and lack the NULs at their ends.
    """
    if array.dtype.kind in "US":
        return not hasattr(values, "__array__")
    if array.dtype != np.float64 or not (np.abs(array) >= 2**53).any():
        return False
    return any(
        isinstance(value, int | np.integer) and int(value) != number
        for value, number in zip(values, array.tolist(), strict=True)
    )


def _from_present(values: Array, missing: npt.NDArray[np.bool_]) -> Column:
    types = set(map(type, values)) if values.dtype.kind == "O" else set()
    if any(issubclass(t, _LISTS) for t in types):
        return _from_lists(values, missing)
    if types == {float}:
        values = values.astype(np.float64)
    return Column(values, (~missing).astype(np.int64), missing, False)


def _from_lists(lists: Iterable[Any], missing: npt.NDArray[np.bool_]) -> Column:
    """Rows that are lists; a value among them is a list of one."""
    lists = [_elements(row) if _is_list(row) else [row] for row in lists]
    counts = np.zeros(len(missing), dtype=np.int64)
    counts[~missing] = [len(row) for row in lists]
    return _from_elements(_from_array([v for row in lists for v in row]), counts, missing)


def _from_elements(
    elements: Column, counts: npt.NDArray[np.int64], missing: npt.NDArray[np.bool_]
) -> Column:
    """Lists, from their elements; a missing element is none."""
    if elements.is_list:
        raise ValueError("lists of lists have no encoding")
    rows = np.repeat(np.arange(len(counts)), counts)[~elements.missing]
    return Column(elements.values, np.bincount(rows, minlength=len(counts)), missing, True)


def _is_list(value: Any) -> bool:
    return isinstance(value, _LISTS)


def _elements(row: Any) -> list[Any]:
    return list(row.compressed() if isinstance(row, np.ma.MaskedArray) else row)


def _is_missing(array: Array) -> npt.NDArray[np.bool_]:
    if array.dtype.kind == "f":
        return np.isnan(array)
    if array.dtype.kind in "mM":
        return np.isnat(array)
    if array.dtype.kind != "O":
        return np.zeros(len(array), dtype=bool)
    types = set(map(type, array))
    # pandas.NA compares to nothing, and pandas need not be there: its name tells.
    null = {t for t in types if t is type(None) or t.__name__ == "NAType"}
    with_nan = {t for t in types if issubclass(t, _WITH_NAN)}
    return np.fromiter(
        (type(v) in null or (type(v) in with_nan and bool(v != v)) for v in array),
        bool,
        len(array),
    )
