# SPDX-License-Identifier: MIT
"""Field-aware factorization machines as scikit-learn estimators.

::

    from ffm_ext.sklearn import FFMClassifier

    model = FFMClassifier(feature_fields="categorical").fit(ids, clicked)
    model.predict_proba(ids)

What ``X`` may be, and what its features and fields are:

==========================================  ===================  ====================================================
``X``                                       ``feature_fields``   meaning
==========================================  ===================  ====================================================
array, frame or sparse matrix ``[n, d]``    ``None``             a column is a feature with a field of its own
array, frame or sparse matrix ``[n, d]``    ``[d]`` integers     a column is a feature of the field that is given
whole numbers ``[n, F]``                    ``"categorical"``    a column is a field, a number is one of its features
:class:`~ffm_ext.SparseBatch`               ``None``             it names the feature and the field of every entry
:class:`~ffm_ext.SparseBatch`               ``[N]`` integers     the same, in a table of N features of these fields
==========================================  ===================  ====================================================

In the first two, the values of a sample are its nonzeros. Categories count from 0 in every column, as
``sklearn.preprocessing.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-1)``
makes them. -1 is no entry: it adds nothing. The table is as large as the first call that trains makes it: later, a
category or an id of a ``SparseBatch`` above the largest of that call is no entry either, of which training warns. One
below it that was not seen has the weights that it began with. scikit-learn's model selection splits all of these, a
``SparseBatch`` too.

Where data comes in chunks, the first does not show all. ``feature_fields`` beside a ``SparseBatch`` makes the table as
large as it will have to be::

    encoder = FieldEncoder({"user": Hash(1 << 20), "film": Hash(1 << 16)})
    model = FFMClassifier(feature_fields=encoder.fit(first).feature_fields)
    for frame, clicked in chunks:
        model.partial_fit(encoder.transform(frame), clicked, classes=[0, 1])
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from . import inspection
from ._arguments import Loss
from .batch import SparseBatch, fields_of_features, keep_entries
from .memory import fits
from .modules import FFM
from .optim import FTRL, OPTIMIZERS, Optimizer
from .training import Mode, Progress, Trainer

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state
    from sklearn.utils.class_weight import compute_class_weight
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import (
        _check_sample_weight,
        assert_all_finite,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        "ffm_ext.sklearn needs scikit-learn 1.6 or later: pip install ffm-ext[sklearn]"
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FFMClassifier", "FFMRegressor"]

# Samples that are scored at a time, so that prediction takes no memory that grows with X beyond its own encoding.
_BLOCK = 1 << 16

# With a field for each column, a table has d² · embed_dim weights: past this size it is a mistake rather than a wish.
_LARGE_TABLE = 1 << 32

# With more samples than these, the part that tells when to stop is one that training does not miss: as
# HistGradientBoostingClassifier has it.
_MANY_SAMPLES = 10_000

# What a model is made with, and holds as long as it does; and what a trainer is told as it is.
_SETTLED = ("embed_dim", "normalize", "within_field", "bias", "linear", "feature_fields")
_OF_TRAINER = ("mode", "batch_size", "num_threads")


@dataclass(eq=False, repr=False)
class _BaseFFM(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share: encoding of ``X``, fitting, inspection."""

    _loss: ClassVar[Loss]

    embed_dim: int = 4
    _: KW_ONLY
    lr: float = 0.2
    weight_decay: float = 2e-5
    epochs: int = 15
    optimizer: str | Optimizer = "adagrad"
    mode: Mode = "exact"
    batch_size: int = 1024
    normalize: bool = True
    within_field: bool = False
    bias: bool = True
    linear: bool = True
    feature_fields: Sequence[int] | np.ndarray | Tensor | Literal["categorical"] | None = None
    early_stopping: bool | Literal["auto"] = "auto"
    validation_fraction: float = 0.1
    patience: int = 1
    num_threads: int | None = None
    random_state: int | np.random.RandomState | None = None
    warm_start: bool = False
    verbose: int = 0

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # ---------------------------------------------------------------------------------------- fitting

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, *, partial: bool, classes: Any = None
    ) -> None:
        """Train: one pass where ``partial``, else all of them. Where it fails, all is as it was before.

        But for the weights of one pass: a copy of a large table would take longer than a pass over few samples.
        """
        new = not hasattr(self, "model_") or not (partial or self.warm_start)
        before = vars(self).copy()
        state = None if new or partial else deepcopy(self.trainer_.state_dict())
        try:
            self._train(X, y, sample_weight, new, partial, classes)
        except BaseException:  # Ctrl-C, too
            # A model goes with the features, fields and labels that it was made for.
            self.__dict__ = before
            if state is not None:
                self.trainer_.load_state_dict(state)
            raise

    def _train(
        self, X: Any, y: Any, sample_weight: Any, new: bool, partial: bool, classes: Any
    ) -> None:
        if self.early_stopping not in (True, False, "auto"):
            raise ValueError(
                f"{type(self).__name__}: early_stopping = {self.early_stopping!r} is not True, False or 'auto'"
            )
        if partial and self.early_stopping not in (False, "auto"):
            raise ValueError(
                f"{type(self).__name__}: early_stopping should be False or 'auto' with partial_fit, which is one pass"
            )
        if new:
            self._categorical = isinstance(self.feature_fields, str)
        else:
            self._take_new_settings()
        batch, y = self._training_data(X, y, new)
        random = check_random_state(self.random_state)
        seed = int(random.randint(np.iinfo(np.int32).max))
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(
                sample_weight, y, dtype=np.float64, ensure_non_negative=True
            )
            # A sample without weight is no sample: it does not even move the mean of y.
            kept = weights.astype(np.float32) > 0
            if not kept.any():
                raise ValueError(
                    f"sample_weight is 0 for all samples, in float32: the largest is {weights.max()}"
                )
            if not kept.all():
                batch, y, weights = batch[kept], y[kept], weights[kept]
        targets = self._targets(y, weights, new, classes)
        weights = self._weighted_by_class(y, weights, partial)
        if new:
            self._new_model(seed)
        data: tuple[Any, ...] = (batch, torch.from_numpy(targets.astype(np.float32)))
        if weights is not None:
            data += (torch.from_numpy(weights.astype(np.float32)),)
        if partial:
            self.trainer_.partial_fit(data)
            self._learn_owners(batch)
            self.history_ = [*getattr(self, "history_", []), self.trainer_.history[-1]]
            self.n_iter_ = len(self.history_)
            return
        stops_early = bool(self.early_stopping)
        if self.early_stopping == "auto":
            stops_early = len(y) > _MANY_SAMPLES
        valid = None
        if stops_early:
            data, valid = self._set_aside(data, y, seed)
        trainer = self.trainer_
        if not new:
            # Whether it gets worse is asked anew: the part set aside may be another one.
            trainer.reset_auto_stop()
        before = trainer.epoch
        trainer.fit(
            data,
            valid,
            epochs=before + self.epochs,
            auto_stop=stops_early,
            patience=self.patience,
            callback=self._report if self.verbose else None,
        )
        self._learn_owners(batch)
        self.history_ = trainer.history[before:]
        self.n_iter_ = len(self.history_)

    def _new_model(self, seed: int) -> None:
        options = {
            name: getattr(self, name) for name in ("bias", "linear", "normalize", "within_field")
        }
        model = FFM(
            self.embed_dim,
            num_features=self._num_features,
            num_fields=self._num_fields,
            device="meta",
            **options,
        )
        # Of a generator of its own: torch's is the whole process's, other threads' too.
        model.to_empty(device="cpu")
        model.reset_parameters(generator=torch.Generator("cpu").manual_seed(seed))
        model.field_names = self._field_names or model.field_names
        model.feature_fields = self._fields
        self.trainer_ = self._new_trainer(model, self._new_optimizer(), seed)
        self.model_ = model
        self._settled = {name: getattr(self, name) for name in _SETTLED}

    def _new_optimizer(self) -> Optimizer:
        if not isinstance(self.optimizer, str):
            return self.optimizer
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"{type(self).__name__}: optimizer = {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"
            )
        return OPTIMIZERS[self.optimizer](lr=self.lr, weight_decay=self.weight_decay)

    def _new_trainer(self, model: FFM, optimizer: Optimizer, seed: int) -> Trainer:
        return Trainer(
            model,
            optimizer=optimizer,
            loss=self._loss,
            seed=seed,
            **{name: getattr(self, name) for name in _OF_TRAINER},
        )

    def _take_new_settings(self) -> None:
        """Train on with settings that have changed since the model was made, where it can be."""
        advice = "fit without warm_start makes a new model"
        for name, before in self._settled.items():
            now = getattr(self, name)
            if not np.array_equal(now, before):
                raise ValueError(
                    f"{type(self).__name__}: {name} = {now!r}, but the model has {before!r}; {advice}"
                )
        trainer, optimizer = self.trainer_, self._new_optimizer()
        before = trainer.optimizer
        if optimizer != before:
            # FTRL's state stands for weights by its numbers: with others it would be other weights.
            if type(optimizer) is not type(before) or isinstance(optimizer, FTRL):
                raise ValueError(
                    f"{type(self).__name__}: {optimizer} cannot go on from the state of {before}; {advice}"
                )
            trainer.optimizer = optimizer
        for name in _OF_TRAINER:
            setattr(trainer, name, getattr(self, name))

    def _set_aside(
        self, data: tuple[Any, ...], y: np.ndarray, seed: int
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """``data`` in two: to train on, and to know when to stop."""
        kept, aside = train_test_split(
            np.arange(len(y)),
            test_size=self.validation_fraction,
            random_state=seed,
            stratify=y if self._loss == "logistic" else None,
        )
        return tuple(part[kept] for part in data), tuple(part[aside] for part in data)

    @staticmethod
    def _report(progress: Progress) -> None:
        epoch = progress.finished
        if epoch is None:
            return
        line = f"epoch {epoch.epoch}: train loss {epoch.train_loss:.5f}"
        if epoch.valid_loss is not None:
            line += f", validation loss {epoch.valid_loss:.5f}"
        print(line)

    def _check_y(self, y: Any) -> np.ndarray:
        """``y``, ``[n]``, of a kind that the estimator can learn."""
        raise NotImplementedError

    def _targets(
        self, y: np.ndarray, weights: np.ndarray | None, new: bool, classes: Any
    ) -> np.ndarray:
        """``y`` as the trainer takes it. What there is to learn of ``y`` itself is learnt where ``new``."""
        raise NotImplementedError

    def _weighted_by_class(
        self, y: np.ndarray, weights: np.ndarray | None, partial: bool
    ) -> np.ndarray | None:
        """The weights of samples, ``[n]``, times those of their classes."""
        return weights

    # ---------------------------------------------------------------------------------------- X

    def _training_data(self, X: Any, y: Any, new: bool) -> tuple[SparseBatch, np.ndarray]:
        if isinstance(X, SparseBatch):
            y = self._check_y(y)
            check_consistent_length(X, y)
        else:
            X, y = self._validate(X, y, reset=new)
            y = self._check_y(y)
        if new:
            self._learn_fields(X)
        if isinstance(X, SparseBatch) and self.feature_fields is not None:
            self._check_owners(X)
        entries = self._entries(X)
        batch = self._in_table(entries)
        if batch.nnz < entries.nnz:
            advice = "the first call must have the largest category of every column"
            if not self._categorical:
                advice = "feature_fields=encoder.feature_fields, say, makes a table of all features at once"
            warnings.warn(
                f"{type(self).__name__}: {entries.nnz - batch.nnz} of {entries.nnz} entries are left out, whose "
                f"feature or field is not in the table of {self._num_features} features and {self._num_fields} fields: "
                f"{advice}",
                stacklevel=5,
            )
        return batch, y

    def _check_owners(self, batch: SparseBatch) -> None:
        """Raise where an entry contradicts ``feature_fields``."""
        in_table = batch.indices < self._num_features
        indices, fields = batch.indices[in_table].numpy(), batch.fields[in_table].numpy()
        owners = np.asarray(self.feature_fields)[indices]
        wrong = owners != fields
        if wrong.any():
            feature, field, owner = (x[wrong][0] for x in (indices, fields, owners))
            raise ValueError(
                f"{type(self).__name__}: an entry has feature {feature} in field {field}, feature_fields has it in "
                f"{owner}"
            )

    def _learn_owners(self, batch: SparseBatch) -> None:
        """Take the fields of the features that training has had."""
        indices, fields = batch.indices.long(), batch.fields.long()
        if not torch.equal(self._fields[indices], fields):
            self._fields[indices] = fields
            self.model_.feature_fields = self._fields

    def _validate(self, X: Any, y: Any = "no_validation", *, reset: bool) -> Any:
        categorical = self._categorical
        return validate_data(
            self,
            X,
            y,
            reset=reset,
            accept_sparse=False if categorical else "csr",
            dtype=None if categorical else np.float32,
        )

    def _check_table(self, features: int, fields: int, why: str) -> None:
        """Raise where memory does not hold the table, before anything of its size is made."""
        if not fits(features * fields * self.embed_dim):
            raise ValueError(
                f"{type(self).__name__}: there is no memory for a table of {features} features, {fields} fields and "
                f"{self.embed_dim} factors: {why}"
            )

    def _learn_fields(self, X: Any) -> None:
        """The sizes of the table, and the field of each feature: -1 where entries are yet to tell."""
        name = type(self).__name__
        self._field_names: list[str] | None = None
        by_entries = isinstance(X, SparseBatch)
        if by_entries:
            if self._categorical:
                raise ValueError(
                    f"{name}: feature_fields = {self.feature_fields!r} goes with a matrix; a SparseBatch has its own"
                )
            if not X.nnz:
                raise ValueError(f"{name}: the SparseBatch has no entries")
            if X.indices.min() < 0 or X.fields.min() < 0:
                raise ValueError(f"{name}: the SparseBatch has a negative id or field")
        if by_entries and self.feature_fields is None:
            features, self._num_fields = int(X.indices.max()) + 1, int(X.fields.max()) + 1
            self._check_table(
                features,
                self._num_fields,
                "that is what the SparseBatch's largest id and field make",
            )
            fields = torch.full((features,), -1, dtype=torch.int64, device="cpu")
        elif self._categorical:
            if self.feature_fields != "categorical":
                raise ValueError(
                    f"{name}: feature_fields = {self.feature_fields!r} is neither 'categorical' nor a list of integers"
                )
            counts = torch.from_numpy(_categories(name, X).max(axis=0) + 1).clamp(min=1)
            self._starts = np.concatenate([[0], counts.cumsum(0).numpy()])
            self._num_fields = len(counts)
            column = int(counts.argmax())
            self._check_table(
                sum(counts.tolist()),
                len(counts),
                f"column {column} has categories up to {int(counts[column]) - 1}; "
                "sklearn.preprocessing.OrdinalEncoder numbers them from 0",
            )
            fields = fields_of_features(counts.tolist())
        elif self.feature_fields is None:
            size = X.shape[1] ** 2 * self.embed_dim
            if size > _LARGE_TABLE:
                raise ValueError(
                    f"{name}: {X.shape[1]} features in {X.shape[1]} fields make a table of {size} weights; "
                    "give feature_fields, the field of each column"
                )
            self._num_fields = X.shape[1]
            self._check_table(
                X.shape[1], X.shape[1], "give feature_fields, the field of each column"
            )
            fields = torch.arange(X.shape[1], device="cpu")
        else:
            given = np.asarray(self.feature_fields)
            columns = given.size if by_entries else X.shape[1]
            is_list = given.shape == (columns,) and columns > 0
            if not is_list or given.dtype.kind not in "iu" or given.min() < 0:
                raise ValueError(
                    f"{name}: feature_fields must be {columns} integers from 0, one for each column of X, "
                    f"got {given.dtype} of shape {list(given.shape)}"
                )
            self._num_fields = int(given.max()) + 1
            self._check_table(
                len(given), self._num_fields, "that is what the largest of feature_fields makes"
            )
            fields = torch.from_numpy(given.astype(np.int64))
            if by_entries:
                # As without the list: what training never has keeps random weights, which say nothing of a field.
                fields.fill_(-1)
        self._num_features = len(fields)
        self._fields = fields
        if by_entries:
            self.n_features_in_ = len(fields)
            self.__dict__.pop("feature_names_in_", None)
        elif hasattr(self, "feature_names_in_") and (
            self._categorical or self.feature_fields is None
        ):
            self._field_names = self.feature_names_in_.tolist()

    def _batch(self, X: Any) -> SparseBatch:
        """``X``, validated, as entries that the table has."""
        return self._in_table(self._entries(X))

    def _in_table(self, batch: SparseBatch) -> SparseBatch:
        known = (batch.indices < self._num_features) & (batch.fields < self._num_fields)
        return batch if bool(known.all()) else keep_entries(batch, known)

    def _entries(self, X: Any) -> SparseBatch:
        """``X``, validated, as entries. What the table does not have is beyond its end."""
        if isinstance(X, SparseBatch):
            return X
        if self._categorical:
            ids = _categories(type(self).__name__, X)
            is_entry = ids >= 0
            indices = np.where(
                ids < np.diff(self._starts), ids + self._starts[:-1], self._num_features
            )
            offsets = np.concatenate([[0], is_entry.sum(axis=1).cumsum()])
            return SparseBatch(
                torch.from_numpy(indices[is_entry]),
                torch.from_numpy(np.nonzero(is_entry)[1]),
                None,
                torch.from_numpy(offsets),
            )
        fields = self._fields.where(self._fields >= 0, self._num_fields)
        if isinstance(X, np.ndarray):
            return SparseBatch.from_dense(X, fields)
        if not (X.has_canonical_format and X.data.all()):
            # Two entries of one place are one value, their sum; one of 0 is none.
            X = X.copy()
            X.sum_duplicates()
            X.eliminate_zeros()
        return SparseBatch.from_scipy(X, fields)

    def _scores(self, X: Any) -> np.ndarray:
        """What the model says of each sample, ``[n]`` float64."""
        check_is_fitted(self)
        if not isinstance(X, SparseBatch):
            X = self._validate(X, reset=False)
        batch = self._batch(X)
        with torch.inference_mode():
            parts = [self.model_(batch[b : b + _BLOCK]) for b in range(0, len(batch), _BLOCK)]
        return torch.cat(parts).double().numpy() if parts else np.empty(0)

    # ---------------------------------------------------------------------------------------- inspection

    def top_interactions(self, n: int = 20, X: Any = None) -> list[inspection.Interaction]:
        """The strongest pairs of features: see :func:`ffm_ext.inspection.top_interactions`.

        Args:
            n: how many.
            X: only pairs that come up in these samples.

        Ids are columns of ``X``, or those of a ``SparseBatch``; with ``feature_fields="categorical"`` they count
        through all columns: :attr:`model_` ``.feature_fields`` says where each begins. Without ``X``, features of a
        ``SparseBatch`` that no fit has had are left out.
        """
        check_is_fitted(self)
        return inspection.top_interactions(self.model_, n, data=self._inspected(X))

    def plot_field_strength(self, ax: Axes | None = None, X: Any = None) -> Axes:
        """A heat map of how strongly fields interact: see :func:`ffm_ext.inspection.plot_field_strength`.

        Args:
            ax: where to draw; ``None`` = a new figure.
            X: over these samples; ``None`` = over all pairs of features, as :meth:`top_interactions` has them.

        Where a column is a field, it has the name that it has in ``feature_names_in_``.
        """
        check_is_fitted(self)
        return inspection.plot_field_strength(self.model_, self._inspected(X), ax=ax)

    def _inspected(self, X: Any) -> SparseBatch | None:
        if X is None:
            return None
        return self._batch(X if isinstance(X, SparseBatch) else self._validate(X, reset=False))


@dataclass(eq=False, repr=False)
class FFMClassifier(ClassifierMixin, _BaseFFM):  # type: ignore[misc]
    """A field-aware factorization machine of two classes, trained on the logistic loss.

    Args:
        embed_dim: K, the number of latent factors.
        lr: learning rate of the optimizer.
        weight_decay: L2.
        epochs: passes over the data at most.
        optimizer: ``"adagrad"`` (as libffm), ``"vector_adagrad"``, ``"sgd"``, ``"adam"``, ``"ftrl"``, or an object of
            :mod:`ffm_ext.optim`, whose own numbers then count instead of ``lr`` and ``weight_decay``.
        mode: ``"exact"``, ``"hogwild"`` or ``"deterministic"``, as :class:`~ffm_ext.training.Trainer` has them.
        batch_size: samples of a step, where the mode has steps of more than one.
        normalize, within_field, bias, linear: as :class:`~ffm_ext.FFM` has them.
        feature_fields: the field of each column of ``X`` or feature of a ``SparseBatch``, ``"categorical"``, or
            ``None``: see the top of :mod:`ffm_ext.sklearn`.
        early_stopping: set a part of the data aside, stop once the loss on it has not fallen for ``patience`` epochs,
            and take the weights of the epoch at which it was lowest, also where ``epochs`` comes first. ``"auto"``:
            where a fit has more than 10,000 samples. ``partial_fit`` has no use for it: ``True`` is a ``ValueError``.
        validation_fraction: how large that part is.
        patience: epochs.
        num_threads: ``None`` = those of torch.
        random_state: seeds the initial weights, the order of samples and the part set aside: int,
            ``numpy.random.RandomState`` or ``None``.
        warm_start: ``fit`` goes on from the weights that are there, and keeps what is known of features and fields.
            Settings may change in between, but for those of the model (``embed_dim``, ``normalize``, ``within_field``,
            ``bias``, ``linear``, ``feature_fields``), the kind of optimizer, and the numbers of FTRL: ``ValueError``.
            A copy of the weights is there meanwhile, and they are as they were where ``fit`` fails.
        verbose: 1 prints a line an epoch.
        class_weight: ``{label: weight}``, more than 0, by which ``sample_weight`` is multiplied; a label that is not in
            it has 1. ``"balanced"``: ``n / (2 · samples of the label)``, which ``partial_fit`` cannot know.

    Attributes:
        model_: the trained :class:`~ffm_ext.FFM`. Its ``feature_fields`` is -1 for a feature of a ``SparseBatch`` that
            no fit has had.
        trainer_: the :class:`~ffm_ext.training.Trainer`, with the state of the optimizer.
        history_: an :class:`~ffm_ext.training.Epoch` for each epoch of the last ``fit``, and for each ``partial_fit``
            since, with its losses.
        n_iter_: the number of these.
        n_features_in_, feature_names_in_: of ``X``, as scikit-learn has them; the largest id + 1 for a ``SparseBatch``.
        classes_: the two labels; the second is the positive one.

    For more than two classes there is ``sklearn.multiclass.OneVsRestClassifier``.
    """

    _loss = "logistic"

    _: KW_ONLY
    class_weight: Mapping[Any, float] | Literal["balanced"] | None = None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FFMClassifier:
        """Train from the start, or on from where it is with ``warm_start``.

        Args:
            X: see the top of :mod:`ffm_ext.sklearn`.
            y: ``[n]`` labels of two classes.
            sample_weight: ``[n]``, at least 0; ``None`` = 1. A weight of 2 is a step of twice the size, or, in
                ``mode="deterministic"``, the sample twice in its batch.
        """
        self._fit(X, y, sample_weight, partial=False)
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> FFMClassifier:
        """One pass over more data. The table and the classes are those of the first call.

        Entries that the table does not have are left out with a ``UserWarning``: ``feature_fields`` makes it as large
        as it will have to be.

        Args:
            X, y, sample_weight: as :meth:`fit` has them.
            classes: the two labels; needed on the first call where ``y`` does not have both, and the same ones later.

        Where the loss is not finite any more, ``FloatingPointError``, the weights are lost.
        """
        self._fit(X, y, sample_weight, partial=True, classes=classes)
        return self

    def _check_y(self, y: Any) -> np.ndarray:
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y")
        if kind == "multiclass":
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}."
            )
        return y

    def _targets(
        self, y: np.ndarray, weights: np.ndarray | None, new: bool, classes: Any
    ) -> np.ndarray:
        if new:
            where = (
                "" if weights is None or classes is not None else " where sample_weight is above 0"
            )
            classes = np.unique(y if classes is None else classes)
            if len(classes) != 2:
                raise ValueError(
                    f"{type(self).__name__} needs two classes, got {len(classes)} class(es){where}: {classes}"
                )
            self.classes_ = classes
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(
                f"{type(self).__name__}: classes = {classes!r}, but the model has {self.classes_}"
            )
        unknown = y[~np.isin(y, self.classes_)]
        if len(unknown):
            raise ValueError(
                f"{type(self).__name__}: y has {unknown[0]!r}, which is not one of the classes {self.classes_}"
            )
        return np.where(y == self.classes_[1], 1.0, -1.0)

    def _weighted_by_class(
        self, y: np.ndarray, weights: np.ndarray | None, partial: bool
    ) -> np.ndarray | None:
        if self.class_weight is None:
            return weights
        where = f"{type(self).__name__}: class_weight = {self.class_weight!r}"
        if partial and self.class_weight == "balanced":
            raise ValueError(
                f"{where} is not supported by partial_fit, which has a part of y; give the dict that "
                "sklearn.utils.class_weight.compute_class_weight makes of all of it"
            )
        of_class = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
        narrow = of_class.astype(np.float32)
        if not (np.isfinite(narrow) & (narrow > 0)).all():
            raise ValueError(f"{where} must have finite weights above 0")
        of_sample = of_class[(y == self.classes_[1]).astype(np.intp)]
        return of_sample if weights is None else weights * of_sample

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits of the second class.

        Args:
            X: see the top of :mod:`ffm_ext.sklearn`.

        Returns:
            ``[n]`` float64.

        Raises:
            sklearn.exceptions.NotFittedError: :meth:`fit` has not been called.
            ValueError: ``X`` has another number of columns, or holds what is not finite.
        """
        return self._scores(X)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the two classes, ``[n, 2]`` float64; arguments and errors of :meth:`decision_function`."""
        logits = torch.from_numpy(self._scores(X))
        return torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The more probable label of each sample, ``[n]``; arguments and errors of :meth:`decision_function`."""
        positive = self._scores(X) > 0
        return self.classes_[positive.astype(np.intp)]


@dataclass(eq=False, repr=False)
class FFMRegressor(RegressorMixin, _BaseFFM):  # type: ignore[misc]
    """A field-aware factorization machine trained on the squared loss.

    It learns ``(y - mean) / scale``, with the mean and the standard deviation of the ``y`` that it first sees, so that
    learning rate and weight decay mean the same for every unit of ``y``.

    Args and attributes are those of :class:`FFMClassifier`, except for ``class_weight`` and ``classes_``, and:

    Attributes:
        y_mean_, y_scale_: of ``y``, weighted by ``sample_weight``. Scores of ``model_`` and ``trainer_`` alone, also
            where the model was saved, are ``(y - y_mean_) / y_scale_``.
    """

    _loss = "squared"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FFMRegressor:
        """Train from the start, or on from where it is with ``warm_start``.

        Args:
            X: see the top of :mod:`ffm_ext.sklearn`.
            y: ``[n]`` numbers.
            sample_weight: ``[n]``, at least 0; ``None`` = 1. A weight of 2 is a step of twice the size, or, in
                ``mode="deterministic"``, the sample twice in its batch.
        """
        self._fit(X, y, sample_weight, partial=False)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> FFMRegressor:
        """One pass over more data. The table, mean and scale of ``y`` are those of the first call.

        Entries that the table does not have are left out with a ``UserWarning``: ``feature_fields`` makes it as large
        as it will have to be.

        Args:
            X, y, sample_weight: as :meth:`fit` has them.

        Where the loss is not finite any more, ``FloatingPointError``, the weights are lost.
        """
        self._fit(X, y, sample_weight, partial=True)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions.

        Args:
            X: see the top of :mod:`ffm_ext.sklearn`.

        Returns:
            ``[n]`` float64.

        Raises:
            sklearn.exceptions.NotFittedError: :meth:`fit` has not been called.
            ValueError: ``X`` has another number of columns, or holds what is not finite.
        """
        return self._scores(X) * self.y_scale_ + self.y_mean_

    def _check_y(self, y: Any) -> np.ndarray:
        y = column_or_1d(y, warn=True).astype(np.float64)
        assert_all_finite(y, input_name="y")
        return y

    def _targets(
        self, y: np.ndarray, weights: np.ndarray | None, new: bool, classes: Any
    ) -> np.ndarray:
        if new:
            with np.errstate(over="ignore", invalid="ignore"):
                self.y_mean_ = float(np.average(y, weights=weights))
                variance = float(np.average((y - self.y_mean_) ** 2, weights=weights))
            if not math.isfinite(variance):
                raise ValueError(
                    f"{type(self).__name__}: y goes from {y.min():.3g} to {y.max():.3g}, and its variance is out of "
                    "the range of float64: other units of y may help"
                )
            scale = variance**0.5
            # Of y that is the same everywhere, what the mean was rounded by is left.
            is_noise = scale <= 10 * np.finfo(np.float64).eps * abs(self.y_mean_)
            self.y_scale_ = 1.0 if is_noise else scale
        return (y - self.y_mean_) / self.y_scale_


def _categories(name: str, X: np.ndarray) -> np.ndarray:
    """``X`` as int64 ids, -1 and more."""
    if X.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: categories must be whole numbers, got {X.dtype}; sklearn.preprocessing.OrdinalEncoder makes them"
        )
    ids = X.astype(np.int64)
    wrong = np.argwhere((ids != X) | (ids < -1))
    if len(wrong):
        i, j = wrong[0]
        raise ValueError(
            f"{name}: X[{i}, {j}] = {X[i, j]} is no category: a whole number from 0, or -1 for none"
        )
    return ids
