# SPDX-License-Identifier: MIT
"""Single-pass training: one kernel reads a sample's rows once, for its score, its loss and its update.

::

    model = FFM(num_features=N, num_fields=F, embed_dim=4, bias=False, linear=False, normalize=True, within_field=True)
    trainer = Trainer(model, optimizer=AdaGrad(lr=0.2, weight_decay=2e-5))      # libffm's defaults
    trainer.fit(train, valid, epochs=15, auto_stop=True)
    trainer.predict(test)

Modes:

``"exact"``
    One sample after the other on one thread: libffm's arithmetic and order of updates, to float32 rounding. Where a
    field has several entries, pair after pair, as libffm does it: time then grows with the square of their number,
    while that of ``"deterministic"`` grows with the number.
``"hogwild"``
    The same over threads that do not wait for each other (Niu et al., NIPS 2011): faster, and no two runs are alike.
    With SGD and both AdaGrads each thread changes copies of frequent rows, and adds what it has changed to the table
    about every 512 samples of all threads. ``torch.use_deterministic_algorithms(True)`` refuses the mode.
``"deterministic"``
    Batches: every sample of a batch is scored with the weights from before it, and their gradients are summed, not
    averaged. The same bits for any number of threads.

With one thread ``"exact"`` and ``"hogwild"`` are the same. The weights of the model are changed in place, so it stays
an ordinary module: what ``model(batch, dtype=torch.float32)`` returns is what :meth:`Trainer.predict`
starts from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._arguments import (
    Loss,
    alert_not_deterministic,
    check_choice,
    check_contents,
    check_finite,
    check_fits,
    check_num_threads,
    check_positive,
    check_size,
    sum_dtype,
)
from ._files import check_writable, save_tensors
from .batch import SparseBatch
from .data import SparseDataset, open_dataset
from .data._dataset import check_entries, checked_numbers, placed
from .interop import model_arguments, model_fields, model_from_arguments
from .modules import (
    FFM,
    FFMInteraction,
    check_computes_ffm,
    entry_lists,
    global_ids,
    sample_numbers,
)
from .optim import OPTIMIZERS, AdaGrad, Optimizer

__all__ = ["Epoch", "History", "Progress", "Trainer"]

Mode = Literal["exact", "hogwild", "deterministic"]
Data = SparseDataset | str | os.PathLike[str] | tuple[Any, ...]

# Samples between two looks at the clock, and at whether someone has pressed Ctrl-C.
_PIECE = 1 << 17
# No scores, float32 on the CPU whatever the defaults of torch are.
_NONE = torch.empty(0, dtype=torch.float32, device="cpu")
_PREDICTED = 1 << 16
_FORMAT = "ffm_ext.Trainer"
_VERSION = "1"


class Epoch(NamedTuple):
    """What an epoch came to.

    Attributes:
        epoch: from 1.
        train_loss: mean over the epoch, each sample's loss taken before it was trained with.
        valid_loss: mean after the epoch; ``None`` without validation data.
        seconds: of training, without validation.
        samples: trained with.
    """

    epoch: int
    train_loss: float
    valid_loss: float | None
    seconds: float
    samples: int


class Progress(NamedTuple):
    """What :meth:`Trainer.fit` tells its callback. ``finished`` is the epoch's result, at its end.

    ``loss`` is the mean so far, ``seconds`` the time since the epoch (or this part of it) began.
    """

    epoch: int
    epochs: int
    samples: int
    total: int
    loss: float
    seconds: float
    finished: Epoch | None


#: The epochs that are complete, in order.
History = list[Epoch]


class Part(NamedTuple):
    """Samples as the kernels take them."""

    x: Tensor | SparseBatch
    labels: Tensor
    weights: Tensor | None


class Trainer:
    """Trains an :class:`~ffm_ext.FFM` on the CPU, and keeps all that is needed to go on where it stopped.

    Args:
        model: changed in place. Its table may be float32, float64, bfloat16 or float16; linear weights and bias are
            float32 (float64 with a float64 table): ``model.interaction.to(torch.bfloat16)`` converts the table alone.
        optimizer: one of :mod:`ffm_ext.optim`, for table, linear weights and bias (the bias does not decay). In
            ``"exact"`` and ``"hogwild"`` a weight decays once for each pair it is in, as in libffm; in
            ``"deterministic"`` once for each batch that touches its row.
        loss: ``"logistic"``: ``log(1 + exp(-y t))`` with ``y = 1`` for labels > 0, else -1. ``"squared"``:
            ``(t - label)² / 2``.
        mode: see above.
        batch_size: samples that ``"deterministic"`` updates with together.
        num_threads: ``None``: torch's number. ``"exact"`` uses one.
        shuffle: take the samples of an epoch in another order each time: shards, and samples within a shard.
        seed: of that order.

    Attributes:
        optimizer: can be replaced by one of its kind, with another learning rate, say; weights stay as they are.
        epoch: how many epochs are complete.
        history: a list of :class:`Epoch`.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    # A save on Ctrl-C, which the processes of a group would begin at different steps, is for one that is alone.
    _saves_alone = True

    def __init__(
        self,
        model: FFM,
        *,
        optimizer: Optimizer | None = None,
        loss: Loss = "logistic",
        mode: Mode = "exact",
        batch_size: int = 1024,
        num_threads: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, FFM):
            raise TypeError(f"Trainer: model must be an FFM, got {type(model).__name__}")
        optimizer = AdaGrad(lr=0.2, weight_decay=2e-5) if optimizer is None else optimizer
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Trainer: optimizer must be one of ffm_ext.optim, got {type(optimizer).__name__}"
            )
        self.loss: Loss = loss
        self.mode: Mode = mode
        self.batch_size = batch_size
        self.num_threads = num_threads
        self.shuffle = shuffle
        self.seed = seed
        _check_trainable("Trainer", model)
        self.model = model
        self._optimizer = optimizer

        self.epoch = 0
        self.history: History = []
        self._step = 1  # number of the next update
        # Within an epoch: shards that are done, samples of the next that are, and their losses.
        self._shard, self._sample = 0, 0
        self._loss, self._weight, self._seconds, self._samples = 0.0, 0.0, 0.0, 0
        self._sizes: list[int] = []  # samples of each part of the epoch
        self._best: dict[str, Tensor]
        self._best_loss: float
        self._rises: int  # epochs since the lowest loss
        self._stopped: bool
        self._passed: bool  # the weights are those of the end of an epoch after the best
        self.reset_auto_stop()
        table = model.interaction.weight
        self._states = {
            "table": list(optimizer.new_state(table, model.interaction.embed_dim).values())
        }
        for name, parameter in self._small_parameters().items():
            state = self._optimizer_of(name).new_state(parameter.view(-1, 1), 1)
            self._states[name] = list(state.values())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._checked(name, value))

    def _checked(self, name: str, value: Any) -> Any:
        """What an attribute is set to; raise TypeError or ValueError where it cannot be."""
        match name:
            case "loss":
                return check_choice("Trainer", name, value, Loss)
            case "mode":
                return check_choice("Trainer", name, value, Mode)
            case "batch_size":
                return check_size("Trainer", name, value, least=1)
            case "num_threads":
                return check_num_threads("Trainer", value)
            case "seed":
                return check_size("Trainer", name, value)
            case "shuffle":
                return bool(value)
        return value

    @property
    def optimizer(self) -> Optimizer:
        """See above."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        if type(optimizer) is not type(self._optimizer):
            raise TypeError(
                f"Trainer: optimizer must be {type(self._optimizer).__name__}, whose states are there, got "
                f"{optimizer!r}; another kind begins in a new Trainer"
            )
        self._optimizer = optimizer
        self._keep_weights()

    # ---------------------------------------------------------------- training

    def fit(
        self,
        train: Data,
        valid: Data | None = None,
        *,
        epochs: int = 15,
        auto_stop: bool = False,
        patience: int = 1,
        callback: Callable[[Progress], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
    ) -> History:
        """Train until ``epochs`` epochs are complete, those of earlier calls and of a loaded checkpoint included.

        Args:
            train, valid: a :class:`~ffm_ext.data.SparseDataset`, the folder of one, or ``(x, labels)`` or
                ``(x, labels, weights)`` with x ids ``[n, F]`` (as ``model`` takes them) or a ``SparseBatch``.
            epochs: in all.
            auto_stop: stop when the loss of ``valid`` has not come below its lowest for ``patience`` epochs in a row
                (libffm's auto-stop has patience 1), and take the weights of the lowest, also where ``epochs`` comes
                first. After a stop a later call with ``auto_stop`` trains no further, and warns of it; one without it
                does. What is trained later starts from the weights that were taken; but a checkpoint of the last of
                ``epochs`` has that epoch's, and a longer run from there is as one that never ended.
            callback: is told of the progress, at least every 131,072 samples and at the end of each epoch.
            checkpoint: a file that :meth:`save` writes after every epoch, when Ctrl-C is pressed, and every
                ``checkpoint_every`` samples.

        Returns:
            :attr:`history`.

        All of the data is looked at before the first update: what is wrong with it changes nothing.

        Raises:
            TypeError: ``train`` or ``valid`` is none of these, or a number is not whole.
            ValueError: an option makes no sense, shapes of the data do not fit each other or the model, a number in it
                is not finite, a parameter of the model has been frozen or parametrized since, or ``train`` or ``valid``
                has no samples or weights whose sum is not positive.
            IndexError: an id or a field of the data is out of range.
            RuntimeError: the mode is ``"hogwild"`` and ``torch.use_deterministic_algorithms(True)`` is set.
            FloatingPointError: the loss, or that of ``valid``, is not finite any more; the text says when.
            OSError: ``checkpoint`` cannot be written; that is found before training where it can be.
        """
        if auto_stop and valid is None:
            raise ValueError("Trainer.fit: auto_stop needs valid")
        _check_trainable("Trainer.fit", self.model)
        epochs, patience = check_positive("Trainer.fit", epochs=epochs, patience=patience)
        if checkpoint_every is not None:
            checkpoint_every = check_size(
                "Trainer.fit", "checkpoint_every", checkpoint_every, least=1
            )
            if checkpoint is None:
                raise ValueError("Trainer.fit: checkpoint_every needs checkpoint")
        if auto_stop and self._stopped and self.epoch < epochs:
            warnings.warn(
                f"Trainer.fit: stopped in epoch {self.epoch}, when the loss of valid had not fallen any more; "
                "without auto_stop it trains on",
                stacklevel=2,
            )
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
        parts = self._training_parts("Trainer.fit: train", train)
        valid_parts = None
        if valid is not None:
            valid_parts = self._weighted_parts("Trainer.fit: valid", valid)

        def save() -> None:
            if checkpoint is not None:
                self.save(checkpoint)

        try:
            while self.epoch < epochs and not (auto_stop and self._stopped):
                self._run_epoch(parts, epochs, callback, save, checkpoint_every)
                with _uninterrupted():
                    finished = self._finish_epoch(valid_parts, auto_stop, patience)
                save()
                if callback is not None:
                    callback(
                        Progress(
                            finished.epoch,
                            epochs,
                            finished.samples,
                            finished.samples,
                            finished.train_loss,
                            finished.seconds,
                            finished,
                        )
                    )
        except KeyboardInterrupt:
            if self._saves_alone:
                save()
            raise
        # Not in the checkpoint: from there a longer run goes on as if it had not stopped.
        if auto_stop and self._passed:
            with _uninterrupted():
                self._take_best()
        return self.history

    def partial_fit(self, data: Data) -> float:
        """One pass over ``data``, for what arrives a piece at a time. The mean loss, before each update.

        It counts as an epoch, so that the next pass takes another order.

        Raises:
            ValueError, IndexError: as :meth:`fit`.
        """
        _check_trainable("Trainer.partial_fit", self.model)
        parts = self._training_parts("Trainer.partial_fit: data", data)
        self._begin_epoch()
        self._run_epoch(parts, self.epoch + 1, None, None, None)
        return self._finish_epoch(None, False, 1).train_loss

    def _run_epoch(
        self,
        parts: list[Part],
        epochs: int,
        callback: Callable[[Progress], None] | None,
        save: Callable[[], None] | None,
        save_every: int | None,
    ) -> None:
        if self.mode == "hogwild":
            alert_not_deterministic("Trainer: mode='hogwild' adds updates", "mode='deterministic'")
        start, sizes = time.perf_counter() - self._seconds, self._part_sizes(parts)
        total = sum(sizes)
        if (self._shard or self._sample) and sizes != self._sizes:
            raise ValueError(
                f"{type(self).__name__}: it is in the middle of an epoch of {sum(self._sizes)} samples, train has "
                f"{total}, in {len(self._sizes)} and {len(sizes)} parts, or in others; a checkpoint or a call that was "
                "interrupted left it there, and partial_fit begins anew"
            )
        self._sizes, self._passed = sizes, False
        shards = self._order(len(parts), 0)
        saved = self._samples
        with self._threads():
            while self._shard < len(parts):
                number = int(shards[self._shard])
                part = parts[number]
                order = self._steps(part, number)
                while self._sample < len(order):
                    piece = order[self._sample : self._sample + self._piece(save_every)]
                    with _uninterrupted():
                        loss, weight, samples = self._train(part, piece)
                        # The operators write past autograd, which has to notice: a graph from before is of no use.
                        for parameter in self.model.parameters():
                            if not parameter.is_inference():
                                torch.autograd.graph.increment_version(parameter)
                        self._loss += loss
                        self._weight += weight
                        self._sample += len(piece)
                        self._samples += samples
                        self._seconds = time.perf_counter() - start
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"Trainer: the loss is {loss} after {self._samples} samples of epoch "
                            f"{self.epoch + 1}: a smaller learning rate may help"
                        )
                    if callback is not None:
                        callback(
                            Progress(
                                self.epoch + 1,
                                epochs,
                                self._samples,
                                total,
                                self._loss / max(self._weight, 1e-300),
                                self._seconds,
                                None,
                            )
                        )
                    if save is not None and save_every and self._samples - saved >= save_every:
                        save()
                        saved = self._samples
                self._shard, self._sample = self._shard + 1, 0

    def _finish_epoch(self, valid: list[Part] | None, auto_stop: bool, patience: int) -> Epoch:
        valid_loss = None if valid is None else self._mean_loss(valid)
        if valid_loss is not None and not math.isfinite(valid_loss):
            raise FloatingPointError(
                f"Trainer: the loss of valid is {valid_loss} after epoch {self.epoch + 1}: "
                "a smaller learning rate may help"
            )
        self.epoch += 1
        finished = Epoch(
            self.epoch,
            self._loss / max(self._weight, 1e-300),
            valid_loss,
            self._seconds,
            self._samples,
        )
        self.history.append(finished)
        self._begin_epoch()
        if auto_stop and valid_loss is not None:
            if valid_loss < self._best_loss:
                self._best_loss, self._rises = valid_loss, 0
                self._best = {
                    name: parameter.detach().clone()
                    for name, parameter in self.model.named_parameters()
                }
            else:
                self._passed = True
                self._rises += 1
                if self._rises >= patience:
                    self._stopped = True
                    self._take_best()
        return finished

    def _begin_epoch(self) -> None:
        self._shard, self._sample = 0, 0
        self._loss, self._weight, self._seconds, self._samples = 0.0, 0.0, 0.0, 0

    @torch.no_grad()
    def _take_best(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._best[name])
        self._keep_weights()
        self._passed = False

    def _keep_weights(self) -> None:
        """Let the states of the optimizer stand for the weights as they are."""
        for name, weight in {"table": self._table(), **self._small_parameters()}.items():
            settled = self._optimizer_of(name)
            self.optimizer.keep_weights(
                weight, self._states[name], settled.lr, settled.weight_decay
            )

    def _optimizer_of(self, name: str) -> Optimizer:
        """The optimizer of the table, of ``linear``, or of ``bias``, which does not decay."""
        if name != "bias":
            return self.optimizer
        return dataclasses.replace(self.optimizer, weight_decay=0.0)

    def _piece(self, save_every: int | None) -> int:
        piece = _PIECE if not save_every else min(_PIECE, save_every)
        if self.mode != "deterministic":
            return piece
        return max(1, piece // self.batch_size) * self.batch_size

    def _order(self, n: int, stream: int) -> np.ndarray:
        """The order of this epoch, of shards (stream 0) or of the samples in a shard."""
        if not self.shuffle:
            return np.arange(n)
        return np.random.default_rng([self.seed, self.epoch, stream]).permutation(n)

    def _part_sizes(self, parts: list[Part]) -> list[int]:
        """The samples of each part. A checkpoint from within an epoch goes on with data that is cut alike only."""
        return [len(part.labels) for part in parts]

    def _steps(self, part: Part, number: int) -> np.ndarray:
        """What this epoch goes through in a part, in order: its samples."""
        return self._order(len(part.labels), 1 + number)

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        # "exact" takes one of them.
        wanted = None if self.mode == "exact" else self.num_threads
        if wanted is not None and wanted != before:
            torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _train(self, part: Part, order: np.ndarray) -> tuple[float, float, int]:
        """Train with some samples of a part: the sums of their losses and of their weights, and how many they are."""
        n = len(order)
        weight = float(n) if part.weights is None else float(part.weights[order].double().sum())
        if self.mode == "deterministic":
            batches = (order[i : i + self.batch_size] for i in range(0, n, self.batch_size))
            return sum(self._train_batch(_take(part, batch)) for batch in batches), weight, n
        layer, normalize = self.model.interaction, self.model.normalize
        if normalize and self._normalizes_first() and _has_values(part):
            part, order, normalize = _take(part, order), np.arange(n), False
            part = part._replace(x=self.model._normalized(part.x, None, torch.float64)[0])
        indices, fields, values, offsets = entry_lists("Trainer", part.x, None, layer.weight.dtype)
        small, empty = self._small_parameters(), list[Tensor]()
        loss = torch.ops.ffm_ext.ffm_train_(
            self._table(),
            self._states["table"],
            small.get("linear"),
            self._states.get("linear", empty),
            small.get("bias"),
            self._states.get("bias", empty),
            indices,
            fields,
            values,
            offsets,
            part.labels,
            part.weights,
            torch.from_numpy(order),
            self.loss,
            layer.within_field,
            normalize,
            self.optimizer.name,
            self.optimizer.settings(),
            self._step,
            self.optimizer.rounding_seed,
            self.mode == "hogwild",
        )
        self._step += n
        return float(loss), weight, n

    def _normalizes_first(self) -> bool:
        """Whether values are normalised in float64, as the model does it, and then rounded to the type of the table.

        The kernel rounds first; float16 has no room for values as they come.
        """
        return self.mode == "deterministic" or self.model.interaction.weight.dtype == torch.float16

    def _train_batch(self, part: Part) -> float:
        """One update with the summed gradients of a batch."""
        layer, dtype = self.model.interaction, self.model.interaction.weight.dtype
        x: Tensor | SparseBatch = part.x
        values: Tensor | None = None
        if self.model.normalize:
            x, values = self.model._normalized(x, None, torch.float64)
        indices, fields, values, offsets = entry_lists("Trainer", x, values, torch.float64)
        table_values = None if values is None else values.to(dtype)
        lists = (indices, fields, table_values, offsets, "sum", layer.within_field)
        table, small = self._table(), self._small_parameters()
        score = torch.ops.ffm_ext.ffm_forward(table, *lists).double().numpy()
        wide = np.ones(indices.numel()) if values is None else values.flatten().numpy()
        ids, B = indices.flatten().numpy(), len(part.labels)
        counts = np.full(B, indices.shape[1]) if offsets is None else offsets.diff().numpy()
        samples = np.repeat(np.arange(B), counts)
        if "linear" in small:
            weights = small["linear"].numpy()[ids, 0].astype(np.float64)
            score = score + np.bincount(samples, wide * weights, B)
        if "bias" in small:
            score = score + float(small["bias"])
        loss, slope = _loss_and_slope(self.loss, score, part.labels.double().numpy())
        if part.weights is not None:
            loss, slope = loss * part.weights.numpy(), slope * part.weights.numpy()

        self._update_table(torch.from_numpy(slope).to(dtype), lists)
        if "linear" in small:
            rows, inverse = np.unique(ids, return_inverse=True)
            gradient = np.bincount(inverse.ravel(), wide * slope[samples], len(rows))
            self._update_small("linear", torch.from_numpy(rows).long(), gradient)
        if "bias" in small:
            self._update_small("bias", None, np.add.reduce(slope, keepdims=True))
        self._step += 1
        return float(np.add.reduce(loss))

    def _update_table(self, slope: Tensor, lists: tuple[Any, ...]) -> None:
        states, update = self._states["table"], self._update("table")
        torch.ops.ffm_ext.ffm_backward_fused_(slope, self._table(), states, *lists, False, *update)

    def _update_small(self, name: str, rows: Tensor | None, gradient: np.ndarray) -> None:
        parameter = self._small_parameters()[name]
        grad_rows = torch.from_numpy(gradient).to(parameter.dtype).view(-1, 1, 1)
        weight, states, update = parameter.view(-1, 1, 1), self._states[name], self._update(name)
        torch.ops.ffm_ext.ffm_update_(weight, states, rows, grad_rows, *update)

    def _update(self, name: str) -> tuple[Any, ...]:
        """What operators are told of this update. All but the table keeps enough bits not to be rounded at random."""
        optimizer = self._optimizer_of(name)
        seed = optimizer.rounding_seed if name == "table" else None
        return optimizer.name, optimizer.settings(), self._step, seed

    def _table(self) -> Tensor:
        layer = self.model.interaction
        return layer.weight.detach().view(layer.num_features, layer.num_fields, layer.embed_dim)

    def _small_parameters(self) -> dict[str, Tensor]:
        """``linear`` ``[N, 1]`` and ``bias``, where the model has them."""
        wide = sum_dtype(self.model.interaction.weight)
        found: dict[str, Tensor] = {}
        for name, parameter in (
            ("linear", self.model.linear.weight),
            ("bias", self.model.linear.bias),
        ):
            if parameter is None:
                continue
            if parameter.dtype != wide:
                place = "weight" if name == "linear" else name
                raise ValueError(
                    f"Trainer: model.linear.{place} is {parameter.dtype}, not {wide}; only the table may be narrower: "
                    f"model.interaction.to({self.model.interaction.weight.dtype})"
                )
            found[name] = parameter.detach()
        return found

    # ---------------------------------------------------------------- using

    def evaluate(self, data: Data) -> float:
        """The mean loss (weighted where the data has weights) of the model as it is.

        Args:
            data: as for :meth:`fit`.

        Raises:
            TypeError, ValueError, IndexError: as :meth:`fit`.
        """
        return self._mean_loss(self._weighted_parts("Trainer.evaluate: data", data))

    def predict(self, data: Data | Tensor | SparseBatch) -> Tensor:
        """Probabilities of a positive label (logistic), or values (squared): ``[n]`` float32.

        Args:
            data: as for :meth:`fit`; labels may be left out: ids ``[n, F]`` or a ``SparseBatch`` alone.

        Raises:
            TypeError, ValueError, IndexError: as :meth:`fit`.
        """
        parts = self._local_parts("Trainer.predict: data", data, has_labels=False)
        scores = torch.cat([_NONE, *(self._scores(part) for part in parts)])
        return torch.sigmoid(scores) if self.loss == "logistic" else scores

    def _scores(self, part: Part) -> Tensor:
        with torch.inference_mode():
            pieces = [
                self.model.score_table_ids(part.x[i : i + _PREDICTED], dtype=torch.float32)
                for i in range(0, len(part.labels), _PREDICTED)
            ]
        return torch.cat([_NONE, *pieces])

    def reset_auto_stop(self) -> None:
        """Let ``auto_stop`` begin anew, with other validation data, say: as if no loss had been the lowest yet."""
        self._best, self._best_loss, self._rises = {}, math.inf, 0
        self._stopped = self._passed = False

    def _mean_loss(self, parts: list[Part]) -> float:
        total, weight = self._sum_of_losses(parts)
        return total / weight

    def _sum_of_weights(self, parts: list[Part]) -> float:
        return sum(
            len(labels) if weights is None else float(weights.double().sum())
            for _, labels, weights in parts
        )

    def _sum_of_losses(self, parts: list[Part]) -> tuple[float, float]:
        """The losses of all samples, each times its weight, and the weights."""
        total = weight = 0.0
        for part in parts:
            loss, _ = _loss_and_slope(
                self.loss, self._scores(part).double().numpy(), part.labels.double().numpy()
            )
            weights = np.ones(len(loss)) if part.weights is None else part.weights.double().numpy()
            total += float(np.add.reduce(loss * weights))
            weight += float(np.add.reduce(weights))
        return total, weight

    def _parts(self, where: str, data: Any) -> list[Any]:
        """The samples of ``data``, all of which can be trained with or evaluated."""
        return self._local_parts(where, data)

    def _weighted_parts(self, where: str, data: Any) -> list[Any]:
        """The same of data that has a mean loss."""
        parts = self._parts(where, data)
        if not self._sum_of_weights(parts) > 0:
            raise ValueError(f"{where} has no samples, or weights whose sum is not positive")
        return parts

    def _training_parts(self, where: str, data: Any) -> list[Any]:
        """The same of data whose norms the engine can work with: it has them in the type of its sums."""
        parts = self._weighted_parts(where, data)
        if not self.model.normalize or self._normalizes_first():
            return parts
        weight = self.model.interaction.weight
        for place, part in placed(where, parts):
            if _has_values(part):
                check_fits(place, "values", part.x.values, weight.dtype)
                _check_norms(place, part.x, part.x.values, torch.finfo(sum_dtype(weight)))
        return parts

    def _local_parts(self, where: str, data: Any, *, has_labels: bool = True) -> list[Part]:
        if isinstance(data, str | os.PathLike):
            data = open_dataset(data)
        if isinstance(data, SparseDataset):
            parts = [Part(*shard) for shard in data.shards]
        else:
            parts = [self._part(where, data, has_labels)]
        self._check_parts(where, parts, has_labels)
        if isinstance(data, SparseDataset):
            self._check_table_ids(where, parts)
        return parts

    def _part(self, where: str, data: Any, has_labels: bool) -> Part:
        if not has_labels and isinstance(data, Tensor | SparseBatch):
            data = (data, None)
        if not isinstance(data, tuple) or len(data) not in (2, 3):
            raise TypeError(
                f"{where} must be a SparseDataset, its folder, (x, labels) or "
                f"(x, labels, weights), got {type(data).__name__}"
            )
        x, labels, weights = (*data, None)[:3]
        if isinstance(x, SparseBatch) and x.values is not None:
            x = SparseBatch(x.indices, x.fields, x.values.detach(), x.offsets)
        if isinstance(x, Tensor) and self.model.offsets is not None:
            x = global_ids(where, x, self.model.offsets)
        if not isinstance(x, Tensor | SparseBatch):
            raise TypeError(
                f"{where}: x must be ids [n, F] or a SparseBatch, got {type(x).__name__}"
            )
        if not has_labels:
            return Part(x, torch.zeros(len(x), dtype=torch.float32, device="cpu"), None)
        labels = checked_numbers(where, "labels", labels, len(x))
        if weights is not None:
            weights = checked_numbers(where, "weights", weights, len(x))
        return Part(x, labels, weights)

    def _check_table_ids(self, where: str, parts: Sequence[Part]) -> None:
        """Raise where ids that count from 0 in every field stand for those of the table, which a dataset has."""
        starts = self.model.offsets
        if starts is None:
            return
        for place, (x, *_) in placed(where, parts):
            if not isinstance(x, SparseBatch):
                continue
            pieces = zip(x.indices.split(_PIECE), x.fields.split(_PIECE), strict=True)
            for i, (ids, fields) in enumerate(pieces):
                wrong = (ids < starts[fields]) | (ids >= starts[fields + 1])
                for e in wrong.nonzero()[:1].flatten().tolist():
                    f = int(fields[e])
                    raise ValueError(
                        f"{place}: indices[{i * _PIECE + e}] = {int(ids[e])} is of field {f}, which has the features "
                        f"[{int(starts[f])}, {int(starts[f + 1])}): a dataset has ids of the whole table, as "
                        "x + model.offsets[:-1] makes them"
                    )

    def _check_parts(self, where: str, parts: Sequence[Any], has_labels: bool = True) -> None:
        """Look at everything before the first update: an operator sees a batch, and says where in that it is wrong."""
        layer = self.model.interaction
        for place, (x, labels, weights) in placed(where, parts):
            if isinstance(x, SparseBatch):
                check_entries(place, x, layer.num_features, layer.num_fields)
                if x.values is not None and not self.model.normalize:
                    check_fits(place, "values", x.values, layer.weight.dtype)
            elif x.dtype in (torch.int32, torch.int64):
                check_contents(place, x, None, None, layer.num_features)
            else:
                raise ValueError(f"{place}: x must be int32 or int64, got {x.dtype}")
            if has_labels:
                check_finite(place, "labels", labels)
            if has_labels and weights is not None:
                check_finite(place, "weights", weights)

    # ---------------------------------------------------------------- keeping

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer states (tensors, not copied) and position (``"position"``: plain numbers)."""
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        position = {name: getattr(self, f"_{name}") for name in _POSITION}
        position |= {"epoch": self.epoch, "history": [list(epoch) for epoch in self.history]}
        position["shape"] = self._shape()
        position["settings"] = self.optimizer.settings()
        return {**self._tensors(), **best, "position": position}

    def _shape(self) -> list[int]:
        """N, F and K, of which the shape of a table ``[N, F·K]`` does not tell the last two."""
        return list(self._table().shape)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for table, states in self._states.items():
            kept = f"optimizer.{self.optimizer.name}.{table}"
            tensors |= {f"{kept}.{i}": state for i, state in enumerate(states)}
        return tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a trainer with the same model and optimizer, whose numbers may differ.

        Raises:
            ValueError: it is that of another model or optimizer, or not whole; nothing is changed then.
        """
        position = state.get("position", {})
        missing = [name for name in (*_POSITION, "epoch", "history") if name not in position]
        if missing:
            raise ValueError(f"Trainer.load_state_dict: position lacks {', '.join(missing)}")
        try:
            numbers = {name: type(getattr(self, f"_{name}"))(position[name]) for name in _POSITION}
            epoch = operator.index(position["epoch"])
            history = [Epoch(*finished) for finished in position["history"]]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Trainer.load_state_dict: position is not what state_dict makes ({error})"
            ) from error
        shape = list(position.get("shape", self._shape()))
        if shape != self._shape():
            raise ValueError(
                f"Trainer.load_state_dict: it has N, F, K = {shape}, the model {self._shape()}"
            )
        mine = self._tensors()
        given = {name: tensor for name, tensor in state.items() if name != "position"}
        best = {
            name.removeprefix("best."): tensor.clone()
            for name, tensor in given.items()
            if name.startswith("best.")
        }
        wanted = {name: tensor.shape for name, tensor in mine.items()}
        if best:
            wanted |= {f"best.{name}": p.shape for name, p in self.model.named_parameters()}
        found = {name: tensor.shape for name, tensor in given.items()}
        if wanted != found:
            differing = sorted(
                name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
            )
            raise ValueError(f"Trainer.load_state_dict: these do not fit: {', '.join(differing)}")
        for name, tensor in mine.items():
            tensor.copy_(given[name])
        self._best = best
        for name, number in numbers.items():
            setattr(self, f"_{name}", number)
        self.epoch = epoch
        self.history[:] = history
        if position.get("settings", self.optimizer.settings()) != self.optimizer.settings():
            self._keep_weights()

    def _check_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Raise OSError where :meth:`save` could not write."""
        check_writable(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that is needed to go on, as one safetensors file. A crash or a full disk leaves an older one as is.

        It names its data position, seed and optimizer; :meth:`load` goes on from it. In ``"deterministic"`` mode, and
        in ``"exact"``, what comes out then has the same bits as without the interruption.

        Raises:
            OSError: it cannot be written.
        """
        save_tensors("Trainer.save", path, *self._tensors_and_metadata())

    def _tensors_and_metadata(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a checkpoint holds: tensors, and texts that describe all else."""
        state = self.state_dict()
        position = state.pop("position")
        arguments = {name: getattr(self, name) for name in _ARGUMENTS}
        optimizer = {"name": self.optimizer.name, **dataclasses.asdict(self.optimizer)}
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": json.dumps(model_arguments(f"{type(self).__name__}.save", self.model)),
            "trainer": json.dumps({**arguments, "optimizer": optimizer}),
            "position": json.dumps(position),
        }
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        return tensors | model_fields(self.model), metadata

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trainer:
        """A trainer, and its model, as :meth:`save` wrote them.

        Raises:
            ValueError: the file is truncated, corrupt or something else; the text names it.
            OSError: it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        where = f"Trainer.load: {os.fspath(path)}"
        if Path(path).is_dir():
            raise IsADirectoryError(
                f"{where}: a folder; checkpoints of several processes are for DistributedTrainer.load"
            )
        if not Path(path).is_file():
            raise FileNotFoundError(f"{where}: no such file")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{where}: not a whole safetensors file ({error})") from error
        return cls._from(where, state, metadata)

    @classmethod
    def _from(
        cls, where: str, state: dict[str, Any], metadata: dict[str, str], **more: Any
    ) -> Trainer:
        """The trainer of :meth:`_tensors_and_metadata`."""
        if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
            raise ValueError(f"{where}: not a checkpoint of this version of ffm_ext.Trainer")
        try:
            arguments = json.loads(metadata["trainer"])
            settings = arguments.pop("optimizer")
            kind = OPTIMIZERS[settings.pop("name")]
            model = model_from_arguments(json.loads(metadata["model"]))
            model.interaction.weight.data = model.interaction.weight.data.to(
                state["model.interaction.weight"].dtype
            )
            for name, parameter in model.linear.named_parameters():
                parameter.data = parameter.data.to(state[f"model.linear.{name}"].dtype)
            if "feature_fields" in state:
                model.feature_fields = state.pop("feature_fields")
            trainer = cls(model, optimizer=kind(**settings), **arguments, **more)
            state["position"] = json.loads(metadata["position"])
            trainer.load_state_dict(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: its metadata describes no trainer ({type(error).__name__}: {error})"
            ) from error
        return trainer


_ARGUMENTS = ("loss", "mode", "batch_size", "num_threads", "shuffle", "seed")
_POSITION = (
    *("step", "shard", "sample", "sizes", "loss", "weight", "seconds", "samples"),
    *("best_loss", "rises", "stopped", "passed"),
)


def _check_trainable(where: str, model: FFM) -> None:
    """Raise where the operators, which change parameters in place, would not train what the model computes with."""
    layer = model.interaction
    if not isinstance(layer, FFMInteraction):
        raise TypeError(f"{where}: model has a {type(layer).__name__}, which is for inference")
    check_computes_ffm(where, model)
    for place, module, names in (
        ("interaction", layer, ("weight",)),
        ("linear", model.linear, ("weight", "bias")),
    ):
        for name in names:
            if name not in module._parameters:
                raise ValueError(
                    f"{where}: {place}.{name} is computed from another tensor (parametrized or pruned, say), and has "
                    "to be the parameter itself"
                )
            parameter = module._parameters[name]
            if parameter is None:
                continue
            if not parameter.requires_grad:
                raise ValueError(
                    f"{where}: {place}.{name} has requires_grad=False, and would be trained"
                )
            if parameter.device.type != "cpu":
                raise ValueError(f"{where}: model is on {parameter.device}, not the CPU")


def _has_values(part: Part) -> bool:
    return isinstance(part.x, SparseBatch) and part.x.values is not None


def _take(part: Part, rows: np.ndarray) -> Part:
    at = torch.from_numpy(rows)
    return Part(part.x[at], part.labels[at], None if part.weights is None else part.weights[at])


def _loss_and_slope(
    loss: Loss, score: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of float64 scores, and their derivatives."""
    if loss == "squared":
        return (score - labels) ** 2 / 2, score - labels
    sign = np.where(labels > 0, 1.0, -1.0)
    margin = sign * score
    return np.logaddexp(0, -margin), -sign * np.exp(-np.logaddexp(0, margin))


def _check_norms(where: str, x: SparseBatch, values: Tensor, limits: torch.finfo) -> None:
    """Raise ValueError where a sample's sum of squares, or its inverse, is out of a dtype's range."""
    longest = int(x.offsets.diff().max()) if len(x) else 0
    least, most = limits.tiny * 4, limits.max

    def is_good(size: Tensor) -> bool:
        return size.amax().item() ** 2 * longest <= most and (
            size.masked_fill_(size == 0, 1).amin().item() ** 2 >= least
        )

    # A piece at a time: no copy of all, which may be a file.
    if all(is_good(piece.abs()) for piece in values.split(1 << 18) if len(piece)):
        return
    squares = torch.zeros(len(x), dtype=torch.float64, device="cpu")
    squares.index_add_(0, sample_numbers(x.indices, x.offsets), values.double().square())
    wrong = (squares > most) | ((squares > 0) & (squares < least))
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where}: the values of sample {b} have the squared norm {squares[b].item():.3g}, which cannot be divided "
            f"by in {limits.dtype}: mode='deterministic' can, or other units of the values"
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this, so that weights and position always belong together."""
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread is interrupted; and where no function of Python's is, the process ends or nothing happens.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[0])
