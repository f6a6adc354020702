# SPDX-License-Identifier: MIT
"""Columns of pandas, polars, pyarrow and dicts, all in one form. None of these packages is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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
        ValueError: columns differ in length.
    """
    package = type(frame).__module__.partition(".")[0]
    if isinstance(frame, Mapping):
        there = list(frame)
    elif package in _READERS and hasattr(frame, "columns"):
        there = list(frame.column_names if package == "pyarrow" else frame.columns)
    else:
        raise TypeError(
            "FieldEncoder: a frame is a pandas or polars DataFrame, a pyarrow Table or a dict of "
            f"arrays, got {type(frame).__name__}"
        )
    get = _from_array if isinstance(frame, Mapping) else _READERS[package]
    columns = {}
    for name in there if names is None else names:
        if name not in there:
            raise KeyError(f"FieldEncoder: the frame has no column {name!r}")
        columns[name] = get(frame[name])
    lengths = {name: len(column.counts) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"FieldEncoder: columns differ in length: {lengths}")
    return columns


def _from_pandas(series: Any) -> Column:
    missing = series.isna().to_numpy(dtype=bool)
    values = series[~missing] if missing.any() else series
    if values.dtype.name == "category":
        values = values.astype(values.cat.categories.dtype)
    return _from_present(values.to_numpy(), missing)


def _from_polars(series: Any) -> Column:
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
    return _from_present(present.to_numpy(), missing)


_READERS = {"pandas": _from_pandas, "polars": _from_polars, "pyarrow": _from_arrow}


def _from_array(values: Any) -> Column:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.fromiter(values, dtype=object)
    if array.dtype.kind == "U" and any(not isinstance(value, str) for value in values):
        array = np.fromiter(values, dtype=object)  # numpy has made texts of None and numbers
    if array.ndim > 1:
        array = np.fromiter(array, dtype=object)
    if array.ndim == 0:
        raise ValueError(
            f"FieldEncoder: a column is a list or an array, got {type(values).__name__}"
        )
    missing = _is_missing(array)
    return _from_present(array[~missing], missing)


def _from_present(values: Array, missing: npt.NDArray[np.bool_]) -> Column:
    if values.dtype.kind == "O" and len(values) and _is_list(values[0]):
        return _from_lists(values, missing)
    if values.dtype.kind == "O" and set(map(type, values)) == {float}:
        values = values.astype(np.float64)
    return Column(values, (~missing).astype(np.int64), missing, False)


def _from_lists(lists: Iterable[Any], missing: npt.NDArray[np.bool_]) -> Column:
    lists = [list(row) for row in lists]
    counts = np.zeros(len(missing), dtype=np.int64)
    counts[~missing] = [len(row) for row in lists]
    return _from_elements(_from_array([v for row in lists for v in row]), counts, missing)


def _from_elements(
    elements: Column, counts: npt.NDArray[np.int64], missing: npt.NDArray[np.bool_]
) -> Column:
    """Lists, from their elements; a missing element is none."""
    rows = np.repeat(np.arange(len(counts)), counts)[~elements.missing]
    return Column(elements.values, np.bincount(rows, minlength=len(counts)), missing, True)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset | np.ndarray)


def _is_missing(array: Array) -> npt.NDArray[np.bool_]:
    if array.dtype.kind == "f":
        return np.isnan(array)
    if array.dtype.kind in "mM":
        return np.isnat(array)
    if array.dtype.kind != "O":
        return np.zeros(len(array), dtype=bool)
    # NaN is what differs from itself.
    return np.fromiter(
        (v is None or (isinstance(v, float | np.generic) and bool(v != v)) for v in array),
        bool,
        len(array),
    )
