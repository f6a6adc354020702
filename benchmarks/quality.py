# SPDX-License-Identifier: MIT
"""What the models of this package and of fastFM learn from the same data, with the same rank.

Hyper-parameters were chosen on a validation part where the data has one (MovieLens-100K). The user-item data has none:
there some were scanned on the test part, so its errors are those of a comparison, not of unseen data.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.model_selection import train_test_split

import ffm_ext

from .peer import Peer

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Adam:
    """How FM or FFM is trained: mini-batches, the learning rate falling to zero."""

    epochs: int
    batch_size: int
    lr: float
    decay: tuple[float, float]  # L2 of the linear weights, of the factors


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters for one data set; chosen on its validation part, or, where it has none, on the test part."""

    rank: int
    fm: Adam
    ffm: Adam
    als: dict[str, Any]
    mcmc: dict[str, Any]
    ridge_alpha: float


@dataclass(frozen=True)
class Data:
    """Samples as matrices [n, N] float64 with the field of each column, and their targets."""

    name: str
    recipe: Recipe
    feature_fields: npt.NDArray[np.int64]  # [N]
    X_train: sp.csr_matrix
    X_test: sp.csr_matrix
    y_train: Floats
    y_test: Floats


def user_item() -> Data:
    """The seed's data: 100 users times 50 items, rank 2, nearly additive."""
    n_user, n_item = 100, 50
    X, y, _ = ffm_ext.datasets.make_user_item_regression(
        random_state=123, n_user=n_user, n_item=n_item, label_stdev=0.4
    )
    X_train, X_test, y_train, y_test = train_test_split(
        X.tocsr(), y, test_size=0.33, random_state=42
    )
    recipe = Recipe(
        rank=2,
        fm=Adam(60, 256, 0.1, (1e-4, 1e-4)),
        ffm=Adam(60, 256, 0.1, (1e-4, 1e-4)),
        als={"n_iter": 1000, "init_stdev": 0.1, "l2_reg_w": 0.1, "l2_reg_V": 0.5},
        mcmc={"n_iter": 1000, "init_stdev": 0.1},
        ridge_alpha=1e-3,
    )
    fields = np.repeat([0, 1], [n_user, n_item])
    return Data("user-item", recipe, fields, X_train, X_test, y_train, y_test)


def movielens() -> Data:
    """MovieLens 100K, six fields, genres many a row; only where its files already are."""
    data = ffm_ext.datasets.fetch_movielens_100k(download_if_missing=False)

    def part(name: str) -> tuple[sp.csr_matrix, Floats]:
        batch, target = data.split(name)
        assert isinstance(batch, ffm_ext.SparseBatch)
        assert batch.values is not None
        entries = batch.values.double().numpy(), batch.indices.numpy(), batch.offsets.numpy()
        shape = len(batch), data.num_features
        return sp.csr_matrix(entries, shape=shape), target.double().numpy()

    recipe = Recipe(
        rank=8,
        fm=Adam(8, 1024, 0.05, (1e-4, 3e-4)),
        ffm=Adam(5, 1024, 0.05, (1e-4, 4e-4)),
        als={"n_iter": 100, "init_stdev": 0.1, "l2_reg_w": 10.0, "l2_reg_V": 10.0},
        mcmc={"n_iter": 200, "init_stdev": 0.1},
        ridge_alpha=10.0,
    )
    fields = data.feature_fields.numpy().astype(np.int64)
    (X_train, y_train), (X_test, y_test) = part("train"), part("test")
    return Data("MovieLens-100K", recipe, fields, X_train, X_test, y_train, y_test)


DATA = {"user-item": user_item, "MovieLens-100K": movielens}


class Learner(Peer, ABC):
    """Fits and predicts in one call, as fastFM's MCMC must. A new learner is a class here."""

    name: ClassVar[str]

    @abstractmethod
    def fit_predict(self, data: Data, effort: float) -> Floats:
        """Predictions for ``X_test``; ``effort`` scales the number of epochs or iterations."""


def train(model: torch.nn.Module, data: Data, adam: Adam, effort: float) -> Floats:
    """Minimises the squared error of the standardised target with Adam; predictions for ``X_test``."""
    train, test = _batch(data, data.X_train), _batch(data, data.X_test)
    mean, std = data.y_train.mean(), data.y_train.std()
    target = torch.from_numpy((data.y_train - mean) / std).float()

    linear: list[torch.nn.Parameter] = []
    factors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (linear if name.startswith("linear") else factors).append(parameter)
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in zip((linear, factors), adam.decay, strict=True)
    ]
    epochs = max(1, round(adam.epochs * effort))
    optimizer = torch.optim.Adam(groups, lr=adam.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * -(-len(train) // adam.batch_size)
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(adam.batch_size):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(train[rows]), target[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return np.asarray(model(test).double()) * std + mean


class FM(Learner):
    name = "ffm_ext FM"

    def fit_predict(self, data: Data, effort: float) -> Floats:
        torch.manual_seed(0)
        model = ffm_ext.FM(len(data.feature_fields), data.recipe.rank, grad="dense")
        return train(model, data, data.recipe.fm, effort)


class FFM(Learner):
    name = "ffm_ext FFM"

    def fit_predict(self, data: Data, effort: float) -> Floats:
        torch.manual_seed(0)
        model = ffm_ext.FFM(
            data.recipe.rank,
            num_features=len(data.feature_fields),
            num_fields=int(data.feature_fields.max()) + 1,
            grad="dense",
        )
        return train(model, data, data.recipe.ffm, effort)


def _batch(data: Data, X: sp.csr_matrix) -> ffm_ext.SparseBatch:
    return ffm_ext.SparseBatch.from_scipy(X.astype(np.float32), data.feature_fields)


class FastFM(Learner):
    """One of fastFM's regressors, by its module."""

    module: ClassVar[str]

    def regression(self, data: Data, options: dict[str, Any], effort: float) -> Any:
        """The estimator, its number of iterations scaled by ``effort``."""
        options = {**options, "n_iter": max(2, round(options["n_iter"] * effort))}
        estimator = importlib.import_module(self.module).FMRegression
        return estimator(rank=data.recipe.rank, random_state=0, **options)


class FastFMALS(FastFM):
    name = "fastFM ALS"
    module = "fastFM.als"

    def fit_predict(self, data: Data, effort: float) -> Floats:
        model = self.regression(data, data.recipe.als, effort)
        model.fit(data.X_train.tocsc(), data.y_train)
        return np.asarray(model.predict(data.X_test.tocsc()))


class FastFMMCMC(FastFM):
    name = "fastFM MCMC"
    module = "fastFM.mcmc"

    def fit_predict(self, data: Data, effort: float) -> Floats:
        model = self.regression(data, data.recipe.mcmc, effort)
        X_train, X_test = data.X_train.tocsc(), data.X_test.tocsc()
        return np.asarray(model.fit_predict(X_train, data.y_train, X_test))


class Linear(Learner):
    name = "ridge"

    def fit_predict(self, data: Data, effort: float) -> Floats:
        model = Ridge(alpha=data.recipe.ridge_alpha).fit(data.X_train, data.y_train)
        return np.asarray(model.predict(data.X_test))


LEARNERS: tuple[type[Learner], ...] = (FM, FFM, FastFMALS, FastFMMCMC, Linear)


def scores(data: Data, predicted: Floats) -> dict[str, float]:
    return {
        "rmse": float(root_mean_squared_error(data.y_test, predicted)),
        "r2": float(r2_score(data.y_test, predicted)),
    }
