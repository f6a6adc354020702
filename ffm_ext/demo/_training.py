# SPDX-License-Identifier: MIT
"""The two models that the demo compares: an FFM, and logistic regression on the same one-hot features."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import OneHotEncoder
from torch import Tensor

import ffm_ext
from ffm_ext.datasets import FieldDataset

EMBED_DIM = 4
LEARNING_RATE = 0.05
BATCH_SIZE = 256
# Inverse strengths of the L2 penalty of logistic regression; the validation rows choose.
PENALTIES = (1.0, 3.0, 10.0, 30.0)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A model's predictions for the test rows.

    Attributes:
        name: of the model.
        setting: what the validation rows chose.
        seconds: what training took.
        target, probability: ``[n]``.
    """

    name: str
    setting: str
    seconds: float
    target: Floats
    probability: Floats

    @property
    def auc(self) -> float:
        return float(roc_auc_score(self.target, self.probability))

    @property
    def logloss(self) -> float:
        return float(log_loss(self.target, self.probability))


@dataclass(frozen=True)
class History:
    """Mean logloss of every epoch: of the training rows while they were learnt, of the validation rows after it."""

    train: list[float]
    valid: list[float]

    @property
    def best(self) -> int:
        """The epoch, counted from 0, whose weights are kept."""
        return int(np.argmin(self.valid))


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:9,.0f} samples/s")


def train_ffm(
    dataset: FieldDataset, console: Console, *, epochs: int, seed: int
) -> tuple[Fit, History]:
    """Train an FFM by AdaGrad on sparse gradients; keep the epoch that is best on the validation rows."""
    x, y = _split(dataset, "train")
    x_valid, y_valid = _split(dataset, "valid")
    x_test, y_test = _split(dataset, "test")

    torch.manual_seed(seed)
    model = ffm_ext.FFM(EMBED_DIM, num_features=dataset.num_features, num_fields=dataset.num_fields)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=LEARNING_RATE)
    loss_of = torch.nn.BCEWithLogitsLoss()

    history = History([], [])
    best: dict[str, Any] = {}
    progress = Progress(
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        _SpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    start = time.perf_counter()
    with progress:
        bar = progress.add_task("", total=epochs * len(y), epoch=1, epochs=epochs, loss="")
        for epoch in range(1, epochs + 1):
            total, seen = 0.0, 0
            for batch in torch.randperm(len(y)).split(BATCH_SIZE):
                optimizer.zero_grad()
                loss = loss_of(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
                seen += len(batch)
                progress.update(
                    bar, advance=len(batch), epoch=epoch, loss=f"loss {total / seen:.4f}"
                )
            with torch.no_grad():
                valid = loss_of(model(x_valid), y_valid).item()
            history.train.append(total / seen)
            history.valid.append(valid)
            if history.best == epoch - 1:
                best = copy.deepcopy(model.state_dict())
            console.print(f"  epoch {epoch}   train {total / seen:.4f}   valid {valid:.4f}")
    seconds = time.perf_counter() - start

    model.load_state_dict(best)
    with torch.no_grad():
        probability = model(x_test).sigmoid()
    setting = f"epoch {history.best + 1} of {epochs}"
    return Fit("FFM", setting, seconds, _floats(y_test), _floats(probability)), history


def fit_logistic_regression(dataset: FieldDataset) -> Fit:
    """Logistic regression on the one-hot form, its penalty the best of a few on the validation rows."""
    bounds = zip(dataset.field_offsets.tolist(), dataset.field_dims, strict=True)
    encoder = OneHotEncoder(categories=[np.arange(start, start + size) for start, size in bounds])

    def one_hot(name: str) -> tuple[Any, Floats]:
        x, y = _split(dataset, name)
        return encoder.fit_transform(x.numpy()), _floats(y)

    x, y = one_hot("train")
    x_valid, y_valid = one_hot("valid")
    x_test, y_test = one_hot("test")
    start = time.perf_counter()
    # liblinear is the quickest of scikit-learn's solvers at this size.
    models = [LogisticRegression(C=C, solver="liblinear").fit(x, y) for C in PENALTIES]
    seconds = time.perf_counter() - start
    best = min(models, key=lambda model: log_loss(y_valid, model.predict_proba(x_valid)[:, 1]))
    setting = f"C = {best.C:g} of {len(models)} tried"
    return Fit("logistic regression", setting, seconds, y_test, best.predict_proba(x_test)[:, 1])


def _split(dataset: FieldDataset, name: str) -> tuple[Tensor, Tensor]:
    x, y = dataset.split(name)
    assert isinstance(x, Tensor)
    return x, y


def _floats(t: Tensor) -> Floats:
    return t.double().numpy()
