# SPDX-License-Identifier: MIT
"""Ratings of every user for every item, drawn from a known second-order factorization machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Floats = npt.NDArray[np.float64]


def make_user_item_regression(
    random_state: int | np.random.RandomState | None = 123,
    n_user: int = 20,
    n_item: int = 20,
    label_stdev: float = 0.4,
    rank: int = 2,
    bias: bool = True,
    first_order: bool = True,
    stdev_w0: float = 0.2,
    stdev_w: float = 0.3,
    stdev_V: float = 0.4,
    mean_w0: float = 2.0,
    mean_w: float = 5.0,
    mean_V: float = 10.0,
) -> tuple[sp.csc_matrix, Floats, tuple[float, Floats, Floats]]:
    """Ratings of every user for every item, drawn from a known factorization machine.

    Sample ``u * n_item + i`` is user ``u`` with item ``i``: a one in column ``u`` and a one in column
    ``n_user + i``. Its rating is ``w0 + w[u] + w[n_user + i] + <V[:, u], V[:, n_user + i]>`` plus
    Gaussian noise. The numbers are those of ``fastFM.datasets.make_user_item_regression`` of fastFM
    0.2.10, to rounding, for the same arguments; fastFM leaves ``bias`` and ``first_order`` unread.

    Args:
        random_state: a seed, a generator to draw from, or None for a seed from the system.
        n_user: number of users.
        n_item: number of items.
        label_stdev: standard deviation of the noise; 0 for none.
        rank: number of latent factors.
        bias: False sets ``w0`` to 0.
        first_order: False sets ``w`` to 0. What is drawn for ``V`` and the noise stays the same.
        stdev_w0, stdev_w, stdev_V: standard deviation of the draws of each coefficient.
        mean_w0, mean_w, mean_V: mean of the draws of each coefficient.

    Returns:
        ``(X, y, (w0, w, V))``: ``X`` a CSC matrix ``[n_user * n_item, n_user + n_item]`` float64, ``y``
        ``[n_user * n_item]`` float64, ``w0`` a number, ``w`` ``[n_user + n_item]`` and ``V``
        ``[rank, n_user + n_item]``.

    Raises:
        ValueError: ``n_user``, ``n_item`` or ``rank`` is below 1, or a standard deviation is negative.
    """
    for name, size in (("n_user", n_user), ("n_item", n_item), ("rank", rank)):
        if size < 1:
            raise ValueError(f"make_user_item_regression: {name} = {size} must be at least 1")
    for name, stdev in (
        ("label_stdev", label_stdev),
        ("stdev_w0", stdev_w0),
        ("stdev_w", stdev_w),
        ("stdev_V", stdev_V),
    ):
        if not stdev >= 0:
            raise ValueError(f"make_user_item_regression: {name} = {stdev} must not be negative")
    n_samples, n_features = n_user * n_item, n_user + n_item

    columns = np.empty((n_samples, 2), dtype=np.int32)
    columns[:, 0], columns[:, 1] = np.divmod(np.arange(n_samples), n_item)
    columns[:, 1] += n_user
    starts = np.arange(0, 2 * n_samples + 1, 2, dtype=np.int32)
    X = sp.csr_matrix(
        (np.ones(2 * n_samples), columns.ravel(), starts), shape=(n_samples, n_features)
    ).tocsc()

    # The order of these draws is part of the result.
    rng = (
        random_state
        if isinstance(random_state, np.random.RandomState)
        else np.random.RandomState(random_state)
    )
    w0 = rng.normal(mean_w0, stdev_w0)
    w = rng.normal(mean_w, stdev_w, n_features)
    V = rng.normal(mean_V, stdev_V, (rank, n_features))
    if not bias:
        w0 = 0.0
    if not first_order:
        w = np.zeros_like(w)
    # [n_user, n_item]
    ratings = w0 + w[:n_user, None] + w[None, n_user:] + V[:, :n_user].T @ V[:, n_user:]
    y = ratings.ravel()
    if label_stdev > 0:
        y = rng.normal(y, label_stdev)
    return X, y, (w0, w, V)
