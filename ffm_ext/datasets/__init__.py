# SPDX-License-Identifier: MIT
"""Data to try a factorization machine on: one made, one in the package, one fetched."""

from ._adult import load_adult
from ._base import FieldDataset
from ._movielens import fetch_movielens_100k
from ._synthetic import make_user_item_regression

__all__ = ["FieldDataset", "fetch_movielens_100k", "load_adult", "make_user_item_regression"]
