# SPDX-License-Identifier: MIT
"""UCI Adult, in the package: who earns more than 50,000 dollars a year?"""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ._base import FieldDataset

_NUM_TRAIN = 32561  # the rows of adult.data; those of adult.test follow
_NUM_FIT = 29305  # nine tenths of them: the part that is neither "valid" nor "test"
_MIN_BIN = 5
_FIELDS = (
    "age",
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
)
_DESCRIPTION = """\
Adult (Census Income): 48,842 people of the 1994 US census; does a person earn more than 50,000 dollars
a year?

Becker, B. & Kohavi, R. (1996). Adult [Dataset]. UCI Machine Learning Repository.
https://doi.org/10.24432/C5XW20. Licence: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/.
"""


def load_adult() -> FieldDataset:
    """UCI Adult (Becker & Kohavi 1996): 48,842 people, 12 fields, income above 50,000 dollars or not.

    The data is part of the package; nothing is downloaded. It stands under CC BY 4.0,
    https://doi.org/10.24432/C5XW20.

    ``data`` is ``[48842, 12]``: one feature a field. A categorical column is a field as it is, ``"?"``
    (not known) a category like any other. The numeric columns (age, capital-gain, capital-loss,
    hours-per-week) are cut into bins: the sorted values of the training part, equal ones together, are
    grouped until a bin has 5 people. A bin reaches up to the start of the next one, the first and the
    last bin are open. Most whole years, hours and usual sums of capital thus have a feature of their
    own. Left out are fnlwgt (the survey's sampling weight, no trait of the person) and education-num
    (education, numbered); ``frame`` has them, under UCI's names like all 15 raw columns.

    The split is UCI's own: ``rows["test"]`` is adult.test (16,281 rows), and adult.data (32,561 rows),
    permuted by ``numpy.random.RandomState(0).permutation``, gives "train" (29,305) and "valid" (3,256).

    Returns:
        The data set; ``target`` is 1 for an income above 50,000 dollars, else 0.
    """
    frame, codes = _read()
    order = np.random.RandomState(0).permutation(_NUM_TRAIN)
    rows = {
        "train": order[:_NUM_FIT],
        "valid": order[_NUM_FIT:],
        "test": np.arange(_NUM_TRAIN, len(frame["income"])),
    }

    data = np.empty((len(frame["income"]), len(_FIELDS)), dtype=np.int32)
    fields: dict[str, int] = {}
    feature_names: list[str] = []
    for f, name in enumerate(_FIELDS):
        if name in codes:
            ids, labels = codes[name]
        else:
            ids, labels = _bin(frame[name], rows["train"])
        data[:, f] = ids
        data[:, f] += len(feature_names)
        fields[name] = len(labels)
        feature_names += [f"{name}={label}" for label in labels]

    return FieldDataset(
        name="Adult",
        data=torch.from_numpy(data),
        target=torch.from_numpy((frame["income"] == ">50K").astype(np.float32)),
        fields=fields,
        feature_names=tuple(feature_names),
        rows={name: torch.from_numpy(numbers) for name, numbers in rows.items()},
        frame=frame,
        description=_DESCRIPTION,
    )


def _read() -> tuple[dict[str, npt.NDArray[Any]], dict[str, tuple[npt.NDArray[Any], list[str]]]]:
    """The raw columns, and ``(codes, categories)`` of those that are categorical."""
    frame: dict[str, npt.NDArray[Any]] = {}
    codes: dict[str, tuple[npt.NDArray[Any], list[str]]] = {}
    with (
        resources.files(__package__).joinpath("adult.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        for name in arrays.files:
            if name.endswith(".categories"):
                continue
            column = arrays[name]
            if f"{name}.categories" in arrays.files:
                categories = arrays[f"{name}.categories"]
                codes[name] = column, categories.tolist()
                frame[name] = categories[column]
            else:
                frame[name] = column.astype(np.int64)
    return frame, codes


def _bin(
    values: npt.NDArray[np.int64], train: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Bins of at least ``_MIN_BIN`` training rows each: ``(bin of every row, label of every bin)``."""
    distinct, counts = np.unique(values[train], return_counts=True)
    starts: list[int] = []
    filled = _MIN_BIN
    for i, count in enumerate(counts):
        if filled >= _MIN_BIN:
            starts.append(i)
            filled = 0
        filled += count
    if filled < _MIN_BIN and len(starts) > 1:
        starts.pop()
    labels = []
    for i, end in zip(starts, [*starts[1:], len(distinct)], strict=True):
        low, high = distinct[i], distinct[end - 1]
        labels.append(str(low) if low == high else f"{low}..{high}")
    return np.searchsorted(distinct[starts[1:]], values, side="right"), labels
