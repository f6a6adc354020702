# SPDX-License-Identifier: MIT
"""The estimators: scikit-learn's own checks, every form of X, and what they are wrong with."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ffm_ext import SparseBatch, optim
from ffm_ext.data import FieldEncoder, Hash
from ffm_ext.sklearn import FFMClassifier, FFMRegressor

WEIGHTS = "a sample of weight 2 is one step of twice the size, not two steps"
STEPWISE = {
    f"check_sample_weight_equivalence_on_{kind}_data": WEIGHTS for kind in ("dense", "sparse")
}
IN_ONE_BATCH: Any = {"mode": "deterministic", "batch_size": 10_000}


@parametrize_with_checks(
    [
        FFMClassifier(random_state=0),
        FFMRegressor(random_state=0),
        # A pass is one step: 15 of them have to be longer to follow class weights of 1000 and 0.0001.
        FFMClassifier(random_state=0, **IN_ONE_BATCH, lr=0.5),
        FFMRegressor(random_state=0, **IN_ONE_BATCH),
    ],
    # As of scikit-learn's own SGDClassifier. In one batch, weights and repetitions are the same.
    expected_failed_checks=lambda estimator: STEPWISE if estimator.mode == "exact" else {},
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def pairs_matter(n: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids ``[n, 3]`` of fields of 5, 6 and 3 features, a score of the pairs of the first two fields, and its sign."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(size, size=n) for size in (5, 6, 3)], axis=1)
    score = rng.standard_normal((5, 6))[ids[:, 0], ids[:, 1]]
    return ids, 100 + 7 * score, np.where(score > 0, "yes", "no")


def forms() -> dict[str, tuple[Any, Any]]:
    """The same samples: X and feature_fields."""
    ids, _, _ = pairs_matter()
    one_hot = OneHotEncoder().fit_transform(ids)
    fields = [0] * 5 + [1] * 6 + [2] * 3
    batch = SparseBatch.from_scipy(one_hot.astype(np.float32), fields)
    return {
        "categorical": (ids, "categorical"),
        "categorical floats": (ids.astype(float), "categorical"),
        "dense": (one_hot.toarray(), fields),
        "csr": (one_hot, fields),
        "csc": (sp.csc_array(one_hot), np.array(fields)),
        "SparseBatch": (batch, None),
        "SparseBatch without values": (
            SparseBatch(batch.indices, batch.fields, None, batch.offsets),
            None,
        ),
    }


@pytest.mark.parametrize("form", forms())
def test_forms_of_X(form: str) -> None:
    X, feature_fields = forms()[form]
    ids, target, label = pairs_matter()
    first = FFMClassifier(feature_fields="categorical", random_state=0).fit(ids, label)
    model = FFMClassifier(feature_fields=feature_fields, random_state=0).fit(X, label)
    assert list(model.classes_) == ["no", "yes"]
    assert roc_auc_score(label == "yes", model.decision_function(X)) > 0.97
    np.testing.assert_allclose(
        model.decision_function(X), first.decision_function(ids), rtol=1e-3, atol=1e-4
    )
    assert model.model_.interaction.num_fields == 3
    assert model.model_.feature_fields.tolist() == [0] * 5 + [1] * 6 + [2] * 3
    proba = model.predict_proba(X)
    assert proba.shape == (2000, 2)
    assert ((proba[:, 1] > 0.5) == (model.predict(X) == "yes")).all()
    regressor = FFMRegressor(feature_fields=feature_fields, random_state=0).fit(X, target)
    assert np.corrcoef(regressor.predict(X), target)[0, 1] > 0.97
    assert regressor.predict(X).mean() == pytest.approx(target.mean(), abs=1)


def test_a_column_is_a_field_of_its_own() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1000, 4))
    y = X[:, 0] * X[:, 1] > 0
    model = FFMClassifier(random_state=0, epochs=30, normalize=False).fit(X, y)
    assert model.score(X, y) > 0.95
    assert model.model_.feature_fields.tolist() == [0, 1, 2, 3]
    pair = model.top_interactions(1)[0]
    assert (pair.feature_a, pair.feature_b) == (0, 1)


def test_duplicates_in_a_sparse_matrix_are_added() -> None:
    X = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    twice = sp.csr_matrix(
        (np.r_[0.5, 0.5, 2, 3, 1, 2, 1], np.r_[0, 0, 1, 0, 1, 0, 1], [0, 3, 4, 5, 7]), shape=(4, 2)
    )
    model = FFMRegressor(random_state=0).fit(X, [1, 2, 3, 4])
    np.testing.assert_allclose(model.predict(twice), model.predict(X), rtol=1e-5)
    assert twice.nnz == 7


def test_stored_zeros_of_a_sparse_matrix_are_no_entries() -> None:
    rng = np.random.default_rng(0)
    stored = sp.csr_matrix(rng.standard_normal((200, 6)))
    stored.data[::3] = 0
    nnz, y = stored.nnz, rng.integers(2, size=200)
    dense = stored.toarray()
    model = FFMClassifier(random_state=0, weight_decay=0.01)
    expected = model.fit(dense, y).predict_proba(dense)
    assert (model.predict_proba(stored) == expected).all()
    assert (model.fit(stored, y).predict_proba(dense) == expected).all()
    assert stored.nnz == nnz
    sum_of_0 = sp.csr_matrix(([2.0, 1.0, -1.0], [0, 1, 1], [0, 3]), shape=(1, 6))
    assert (model.predict_proba(sum_of_0) == model.predict_proba(sum_of_0.toarray())).all()


def test_what_fit_has_not_seen_adds_nothing() -> None:
    ids, _, label = pairs_matter()
    model = FFMClassifier(feature_fields="categorical", random_state=0).fit(ids, label)
    batch = SparseBatch.from_lists([[(0, 2, 1.0), (2, 12, 1.0)]])
    unseen = model.predict_proba([[2, 99, 1], [2, -1, 1]])
    np.testing.assert_allclose(unseen[0], unseen[1])
    by_entries = FFMClassifier(random_state=0).fit(forms()["SparseBatch"][0], label)
    bigger = SparseBatch.from_lists([[(0, 2, 1.0), (1, 99, 5.0), (2, 12, 1.0), (7, 3, 1.0)]])
    expected = by_entries.predict_proba(batch)
    np.testing.assert_allclose(by_entries.predict_proba(bigger), expected)
    np.testing.assert_allclose(expected[0], unseen[0], rtol=1e-3)


def test_in_a_pipeline() -> None:
    ids, _, label = pairs_matter()
    words = np.array(list("abcdefg"))[ids]
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    pipeline = make_pipeline(
        encoder, FFMClassifier(feature_fields="categorical", random_state=0)
    ).fit(words[:1500], label[:1500])
    assert pipeline.score(words[1500:], label[1500:]) > 0.9
    pipeline.predict([["a", "z", "b"]])
    numbers = make_pipeline(StandardScaler(), FFMRegressor(random_state=0))
    assert cross_val_score(numbers, ids[:300], label[:300] == "yes", cv=3).shape == (3,)


def test_with_the_tools_of_scikit_learn() -> None:
    ids, _, label = pairs_matter()
    base = FFMClassifier(feature_fields="categorical", random_state=0, epochs=5)
    search = GridSearchCV(base, {"embed_dim": [1, 4], "lr": [0.05, 0.2]}, cv=3).fit(ids, label)
    assert search.best_score_ > 0.8
    calibrated = CalibratedClassifierCV(base, cv=3).fit(ids, label)
    assert calibrated.score(ids, label) > 0.9
    three = OneVsRestClassifier(base).fit(ids, ids[:, 1] % 3)
    assert three.score(ids, ids[:, 1] % 3) > 0.9
    # A batch of entries is split as a matrix is.
    batch, _ = forms()["SparseBatch"]
    by_entries = FFMClassifier(random_state=0, epochs=5)
    expected = cross_val_score(base, ids, label, cv=3)
    found = cross_val_score(by_entries, batch, label, cv=3)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert GridSearchCV(by_entries, {"embed_dim": [1, 4]}, cv=3).fit(batch, label).best_score_ > 0.8
    train, test, rows, _ = train_test_split(batch, np.arange(2000), random_state=0)
    assert (len(train), len(test), train.nnz) == (1500, 500, 4500)
    assert torch.equal(train.indices, batch[rows].indices)
    copy = clone(base.set_params(optimizer=optim.AdaGrad(lr=0.1)))
    assert copy.optimizer == optim.AdaGrad(lr=0.1)
    assert not hasattr(copy, "model_")


def test_pickle_keeps_what_was_learnt() -> None:
    ids, target, label = pairs_matter()
    for model, y in (
        (FFMClassifier(random_state=0), label),
        (FFMRegressor(random_state=0), target),
    ):
        model.set_params(feature_fields="categorical").fit(ids, y)
        same = pickle.loads(pickle.dumps(model))
        assert (same.predict(ids) == model.predict(ids)).all()
        # The state of the optimizer and of the random numbers too.
        for one in (model, same):
            one.partial_fit(ids, y)
        np.testing.assert_allclose(same._scores(ids), model._scores(ids), rtol=1e-6)


def test_the_seed_is_all_that_is_random() -> None:
    ids, _, label = pairs_matter()

    def scores(seed: int) -> np.ndarray:
        model = FFMClassifier(feature_fields="categorical", random_state=seed, epochs=2)
        return model.fit(ids, label).decision_function(ids)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert (scores(0) == scores(0)).all()
    assert (scores(0) != scores(1)).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_do_not_share_their_random_numbers() -> None:
    ids, _, label = pairs_matter(100)

    def scores(seed: int) -> np.ndarray:
        model = FFMClassifier(
            feature_fields="categorical", random_state=seed, epochs=2, early_stopping=True
        )
        return model.fit(ids, label).decision_function(ids)

    seeds = [*range(8)] * 5
    with ThreadPoolExecutor(2) as threads:
        np.testing.assert_array_equal([*threads.map(scores, seeds)], [*map(scores, seeds)])


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS])
def test_optimizers(name: str) -> None:
    ids, _, label = pairs_matter()
    lr = {"adam": 0.01, "sgd": 0.2}.get(name, 0.2)
    mode: Any = "exact" if name == "adagrad" else "deterministic"
    model = FFMClassifier(
        feature_fields="categorical",
        random_state=0,
        optimizer=name,
        lr=lr,
        mode=mode,
        batch_size=16,
    )
    assert model.fit(ids, label).score(ids, label) > 0.8
    with pytest.raises(
        ValueError, match="FFMClassifier: optimizer = 'magic' is not one of sgd, ada"
    ):
        model.set_params(optimizer="magic").fit(ids, label)


@pytest.mark.parametrize("mode", ["exact", "hogwild", "deterministic"])
def test_modes(mode: Any) -> None:
    ids, _, label = pairs_matter()
    model = FFMClassifier(
        feature_fields="categorical", random_state=0, mode=mode, num_threads=2, batch_size=16
    )
    assert model.fit(ids, label).score(ids, label) > 0.9


def test_early_stopping() -> None:
    rng = np.random.default_rng(0)
    ids, y = rng.integers(30, size=(500, 2)), rng.integers(2, size=500)
    model = FFMClassifier(
        feature_fields="categorical", random_state=0, epochs=200, early_stopping=True, lr=0.5
    ).fit(ids, y)
    # Nothing to learn: it soon gets worse on what was set aside.
    assert model.n_iter_ < 200
    assert len(model.history_) == model.n_iter_
    assert all(epoch.valid_loss is not None for epoch in model.history_)
    # It goes on all the same where it is asked to.
    before = model.decision_function(ids)
    model.set_params(warm_start=True, early_stopping=False, epochs=3).fit(ids, y)
    assert model.n_iter_ == 3
    assert (model.decision_function(ids) != before).any()


@pytest.mark.parametrize(("n", "stops"), [(10_000, False), (10_001, True)])
def test_early_stopping_where_there_is_much_data(n: int, stops: bool) -> None:
    rng = np.random.default_rng(0)
    ids, y = rng.integers(30, size=(n, 2)), rng.integers(2, size=n)
    model = FFMClassifier(feature_fields="categorical", random_state=0, epochs=1).fit(ids, y)
    assert (model.history_[0].valid_loss is not None) == stops
    # A sample without weight is no sample.
    weights = np.r_[0.0, np.ones(n - 1)]
    assert model.fit(ids, y, weights).history_[0].valid_loss is None
    assert model.partial_fit(ids, y).history_[-1].valid_loss is None


def test_early_stopping_that_cannot_be() -> None:
    ids, target, _ = pairs_matter()
    model = FFMRegressor(feature_fields="categorical", random_state=0, epochs=1).fit(ids, target)
    with pytest.raises(ValueError, match="early_stopping should be False or 'auto' with partial_"):
        model.set_params(early_stopping=np.True_).partial_fit(ids, target)
    for call in (model.fit, model.partial_fit):
        model.set_params(early_stopping="on")
        with pytest.raises(ValueError, match="early_stopping = 'on' is not True, False or 'auto'"):
            call(ids, target)


def test_warm_start_and_partial_fit() -> None:
    ids, target, _ = pairs_matter()
    model = FFMRegressor(feature_fields="categorical", random_state=0, epochs=1, warm_start=True)
    errors = [np.square(model.fit(ids, target).predict(ids) - target).mean() for _ in range(8)]
    assert errors[-1] < 0.7 * errors[0]
    cold = FFMRegressor(feature_fields="categorical", random_state=0, epochs=1)
    assert (cold.fit(ids, target).predict(ids) == cold.fit(ids, target).predict(ids)).all()
    for _ in range(8):
        cold.partial_fit(ids, target)
    assert np.square(cold.predict(ids) - target).mean() < 0.7 * errors[0]
    assert cold.n_iter_ == 9
    assert [epoch.epoch for epoch in cold.history_] == list(range(1, 10))
    assert cold.history_ == cold.trainer_.history


def test_a_warm_start_that_diverges_leaves_the_model_that_was_there() -> None:
    ids, target, _ = pairs_matter()
    settings = {"feature_fields": "categorical", "optimizer": "sgd", "random_state": 0}
    model = FFMRegressor(**settings, lr=0.01, epochs=2, warm_start=True).fit(ids, target)
    expected, history, trainer = model.predict(ids), model.history_, model.trainer_
    with pytest.raises(FloatingPointError, match="a smaller learning rate may help"):
        model.set_params(lr=1e20).fit(ids, target)
    assert (model.predict(ids) == expected).all()
    assert (model.history_, model.n_iter_, model.trainer_) == (history, 2, trainer)
    # It trains on as if nothing had been.
    model.set_params(lr=0.01).fit(ids, target)
    other = FFMRegressor(**settings, lr=0.01, epochs=2, warm_start=True).fit(ids, target)
    assert (model.predict(ids) == other.fit(ids, target).predict(ids)).all()


@pytest.mark.parametrize("call", ["fit", "partial_fit"])
def test_settings_that_change_between_calls(call: str) -> None:
    ids, _, label = pairs_matter()
    model = FFMClassifier(feature_fields="categorical", random_state=0, epochs=1, warm_start=True)
    go_on = getattr(model, call)
    go_on(ids, label)
    first = model.trainer_
    go_on(ids, label)
    assert model.trainer_ is first
    sums, before = first._states["table"][0].clone(), model.decision_function(ids)
    model.set_params(lr=1e-30, weight_decay=0.0, mode="deterministic", batch_size=7, num_threads=1)
    go_on(ids, label)
    trainer = model.trainer_
    assert trainer.optimizer == optim.AdaGrad(lr=1e-30, weight_decay=0)
    assert (trainer.mode, trainer.batch_size, trainer.num_threads) == ("deterministic", 7, 1)
    assert trainer.epoch == 3
    np.testing.assert_allclose(model.decision_function(ids), before, rtol=1e-5, atol=1e-6)
    assert (trainer._states["table"][0] >= sums).all()
    for name, other, message in (
        ("embed_dim", 8, r"embed_dim = 8, but the model has 4; fit without warm_start makes"),
        ("normalize", False, "normalize = False, but the model has True"),
        ("feature_fields", [0, 1, 2], r"feature_fields = \[0, 1, 2\], but .* 'categorical'"),
        ("optimizer", "vector_adagrad", r"VectorAdaGrad\(.* from the state of AdaGrad\("),
    ):
        kept = model.get_params()[name]
        with pytest.raises(ValueError, match=message):
            getattr(model.set_params(**{name: other}), call)(ids, label)
        model.set_params(**{name: kept})
    go_on(ids, label)
    model.set_params(warm_start=False, optimizer="ftrl", lr=0.1, embed_dim=2).fit(ids, label)
    model.set_params(warm_start=True, batch_size=9)
    go_on(ids, label)
    with pytest.raises(ValueError, match=r"FTRL\(.* cannot go on from the state of FTRL\("):
        getattr(model.set_params(lr=0.2), call)(ids, label)


@pytest.mark.parametrize("form", ["categorical", "dense", "SparseBatch"])
def test_a_fit_that_fails_leaves_the_model_that_was_there(form: str) -> None:
    X, feature_fields = forms()[form]
    _, target, label = pairs_matter()
    model = FFMClassifier(feature_fields=feature_fields, random_state=0, epochs=1).fit(X, label)
    expected = model.predict_proba(X)
    given, other, y = model.get_params(), np.eye(4)[:, :2], [0, 1, 0, 1]
    for settings, labels, message in (
        ({}, np.ones(4), "needs two classes, got 1 class"),
        ({}, [0, 1, 2, 3], "Only binary classification"),
        ({"feature_fields": "cats"}, y, "'cats' is neither"),
        ({"optimizer": "magic"}, y, "'magic' is not one of"),
        ({"early_stopping": True}, y, "test_size = 1 should be"),
        ({"early_stopping": True, "validation_fraction": 0.5, "patience": 0}, y, "patience"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_params(**given | {"feature_fields": None} | settings).fit(other, labels)
        assert (model.predict_proba(X) == expected).all()
        assert (model.predict(X) == np.where(expected[:, 1] > 0.5, "yes", "no")).all()
    regressor = FFMRegressor(feature_fields=feature_fields, random_state=0, epochs=1)
    expected = regressor.fit(X, target).predict(X)
    with pytest.raises(ValueError, match="embed_dim"):
        regressor.set_params(embed_dim=0, feature_fields=None).fit(other, y)
    assert (regressor.predict(X) == expected).all()


def test_a_fit_that_is_interrupted_leaves_the_model_that_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, target, _ = pairs_matter()
    settings = {"feature_fields": "categorical", "random_state": 0, "epochs": 3}
    model = FFMRegressor(**settings, warm_start=True).fit(ids, target)
    expected = model.predict(ids)
    trainer, first = model.trainer_, FFMRegressor(**settings)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(trainer), "_finish_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fit(ids, target)
        with pytest.raises(KeyboardInterrupt):
            first.fit(ids, target)
    assert (model.predict(ids) == expected).all()
    assert not hasattr(first, "model_")
    model.fit(ids[:100], target[:100])
    assert model.trainer_ is trainer and trainer.epoch == 6


@pytest.mark.parametrize(
    ("before", "after"), [("categorical", None), (None, "categorical"), (None, [0, 0, 1])]
)
def test_prediction_is_by_the_fields_of_the_fit(before: Any, after: Any) -> None:
    ids, _, label = pairs_matter()
    model = FFMClassifier(feature_fields=before, random_state=0, epochs=1).fit(ids, label)
    expected, pairs = model.predict_proba(ids), model.top_interactions(3, X=ids)
    model.set_params(feature_fields=after)
    assert (model.predict_proba(ids) == expected).all()
    assert model.top_interactions(3, X=ids) == pairs


def test_partial_fit_knows_its_classes() -> None:
    ids, _, label = pairs_matter()
    one = label == "yes"
    model = FFMClassifier(feature_fields="categorical", random_state=0)
    with pytest.raises(ValueError, match="needs two classes, got 1 class"):
        model.partial_fit(ids[one], label[one])
    model.partial_fit(ids, label, classes=["yes", "no"])
    model.partial_fit(ids[one], label[one])
    assert list(model.classes_) == ["no", "yes"]
    model.partial_fit(ids, label, classes=np.array(["no", "yes"]))
    for classes in (["no", "maybe"], ["no"], ["no", "yes", "maybe"]):
        with pytest.raises(ValueError, match=r"classes = \[.*\], but the model has \['no' 'yes'\]"):
            model.partial_fit(ids, label, classes=classes)
    with pytest.raises(ValueError, match=r"y has .*maybe.*, which is not one of the classes"):
        model.partial_fit(ids[:2], ["no", "maybe"])
    with pytest.raises(ValueError, match="Only binary classification is supported"):
        model.fit(ids[:3], ["no", "maybe", "yes"])


def test_sample_weight() -> None:
    ids, target, label = pairs_matter()
    rng = np.random.default_rng(1)
    noise = rng.random(len(label)) < 0.4
    wrong = np.where(noise, np.where(label == "yes", "no", "yes"), label)
    model = FFMClassifier(feature_fields="categorical", random_state=0)
    # Without weight is without the sample, to the bit.
    a = model.fit(ids, wrong, sample_weight=(~noise).astype(float)).decision_function(ids)
    b = model.fit(ids[~noise], wrong[~noise], sample_weight=np.ones((~noise).sum()))
    assert (a == b.decision_function(ids)).all()
    regressor = FFMRegressor(feature_fields="categorical", random_state=0)
    regressor.fit(
        ids, np.r_[target[:1000], np.full(1000, 5000.0)], np.r_[np.ones(1000), np.zeros(1000)]
    )
    assert regressor.y_mean_ == pytest.approx(target[:1000].mean())
    with pytest.raises(ValueError, match=r"is 0 for all|non-zero"):
        model.fit(ids, label, sample_weight=np.zeros(len(label)))
    # Float32 has no such numbers.
    tiny = np.where(noise, 1e-300, 1.0)
    assert (model.fit(ids, wrong, tiny).decision_function(ids) == a).all()
    with pytest.raises(ValueError, match="is 0 for all samples, in float32: the largest is 1e-300"):
        model.fit(ids, label, np.full(len(label), 1e-300))


def test_class_weight() -> None:
    ids, _, label = pairs_matter()
    half = np.r_[np.ones(1000), np.zeros(1000)]
    settings = {"feature_fields": "categorical", "random_state": 0}
    balance = 2000 / (2 * np.unique(label, return_counts=True)[1])
    balance_of_half = 1000 / (2 * np.unique(label[:1000], return_counts=True)[1])
    for class_weight, given, of_class in (
        ({"no": 0.5, "yes": 3}, None, (0.5, 3)),
        ({"yes": 3}, half * 0.5, (1, 3)),
        ("balanced", None, balance),
        ("balanced", half, balance_of_half),
    ):
        model = FFMClassifier(**settings, class_weight=class_weight).fit(ids, label, given)
        weights = np.where(label == "yes", of_class[1], of_class[0])
        weights = weights if given is None else weights * given
        expected = FFMClassifier(**settings).fit(ids, label, weights)
        np.testing.assert_array_equal(model.decision_function(ids), expected.decision_function(ids))
    with pytest.raises(
        ValueError, match=r"'balanced' is not supported by partial_fit, .*compute_c"
    ):
        model.partial_fit(ids, label)
    # A chunk need not have the class that weighs more.
    one = label == "no"
    by_class = FFMClassifier(**settings, class_weight={"yes": 3}).fit(ids, label)
    by_sample = FFMClassifier(**settings).fit(ids, label, np.where(one, 1.0, 3.0))
    np.testing.assert_array_equal(
        by_class.partial_fit(ids[one], label[one]).decision_function(ids),
        by_sample.partial_fit(ids[one], label[one], None, np.ones(one.sum())).decision_function(
            ids
        ),
    )
    for wrong in (0, -1, np.nan, 1e-300):
        with pytest.raises(ValueError, match=r"class_weight = \{'yes': .*must have finite weights"):
            FFMClassifier(**settings, class_weight={"yes": wrong}).fit(ids, label)
    with pytest.raises(ValueError, match="class_weight"):
        FFMClassifier(**settings, class_weight="magic").fit(ids, label)


def test_a_class_that_has_no_weight_is_missing() -> None:
    ids, _, label = pairs_matter()
    with pytest.raises(
        ValueError, match=r"got 1 class\(es\) where sample_weight is above 0: \['ye"
    ):
        FFMClassifier(feature_fields="categorical").fit(ids, label, label == "yes")


def test_y_beyond_the_range_of_its_variance() -> None:
    ids, target, _ = pairs_matter()
    model = FFMRegressor(feature_fields="categorical", random_state=0, epochs=1)
    for factor in (1e200, 1e306):
        with pytest.raises(ValueError, match=r"y goes from .*e\+\d+ to .*e\+\d+, and its variance"):
            model.fit(ids, target * factor)
    assert np.isfinite(model.fit(ids, target * 1e100).predict(ids)).all()


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    ids, _, label = pairs_matter()
    model = FFMClassifier(feature_fields="categorical", random_state=0, epochs=2, verbose=1)
    model.fit(ids, label)
    assert len(capsys.readouterr().out.splitlines()) == 2
    model.set_params(early_stopping=True, verbose=1).fit(ids, label)
    assert "validation loss" in capsys.readouterr().out


def test_inspection() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ids, target, _ = pairs_matter()
    model = FFMRegressor(feature_fields="categorical", random_state=0)
    for call in (model.top_interactions, model.plot_field_strength):
        with pytest.raises(NotFittedError):
            call()
    model.fit(ids, target)
    found = model.top_interactions(5)
    assert len(found) == 5
    assert all((pair.field_a, pair.field_b) == (0, 1) for pair in found)
    in_data = model.top_interactions(5, X=ids[:1])
    assert len(in_data) == 3
    for axes in (model.plot_field_strength(), model.plot_field_strength(X=ids)):
        strength = axes.images[0].get_array()
        assert strength.argmax() == 1
    matplotlib.pyplot.close("all")


def test_a_feature_that_no_fit_has_had_is_of_no_field() -> None:
    frame = {"a": np.array(list("xy") * 10), "b": np.array(list("pqqp") * 5)}
    encoder = FieldEncoder({"a": Hash(64), "b": "vocabulary"}).fit(frame)
    batch, y = encoder.transform(frame), [0, 1] * 10
    model = FFMClassifier(random_state=0, epochs=1).fit(batch, y)
    known = {*batch.indices.tolist()}
    fields = encoder.feature_fields.tolist()
    assert model.model_.feature_fields.tolist() == [
        fields[a] if a in known else -1 for a in range(max(known) + 1)
    ]
    found = model.top_interactions(1000)
    assert {(x.feature_a, x.feature_b) for x in found} == {
        (a, b) for a in known for b in known if fields[a] < fields[b]
    }
    # A later call may have it.
    new = (set(range(max(known))) - known).pop()
    more = SparseBatch.from_lists([[(fields[new], new, 1.0)]])
    model.partial_fit(more, [1])
    assert model.model_.feature_fields[new] == fields[new]
    # As a column of a matrix, it is no entry.
    row = np.zeros((2, model.n_features_in_), dtype=np.float32)
    row[:, min(known)] = 1
    row[1, (set(range(max(known))) - known - {new}).pop()] = 1
    for X in (row, sp.csr_array(row)):
        first, second = model.decision_function(X)
        assert first == second


def test_data_that_comes_in_chunks() -> None:
    ids, _, label = pairs_matter()
    batch, fields = forms()["SparseBatch"][0], [0] * 5 + [1] * 6 + [2] * 3
    first = SparseBatch.from_lists([[(0, 1, 1.0), (1, 7, 1.0)], [(0, 2, 1.0)]])
    model = FFMClassifier(random_state=0).partial_fit(first, [0, 1])
    lost = int((ids[:, 1] > 2).sum() + len(ids))
    with pytest.warns(
        UserWarning, match=rf"FFMClassifier: {lost} of 6000 entries .* 8 features and 2 fields: fea"
    ) as caught:
        model.partial_fit(batch, label == "yes")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=f"{lost} of 6000 entries are left out"):
        model.set_params(warm_start=True).fit(batch, label == "yes")
    by_category = FFMClassifier(feature_fields="categorical").partial_fit([[0, 1], [1, 0]], [0, 1])
    with pytest.warns(UserWarning, match="2 of 3 entries .*: the first call must have the largest"):
        by_category.partial_fit([[2, -1], [1, 9]], [0, 1])
    for given in (fields, np.array(fields), torch.tensor(fields, dtype=torch.int32)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = clone(FFMClassifier(random_state=0, feature_fields=given))
            model.partial_fit(first, ["no", "yes"]).partial_fit(batch, label)
            model.predict(batch)
        assert model.n_features_in_ == 14
        assert model.model_.interaction.weight.shape == (14, 3 * 4)
        assert model.model_.feature_fields.tolist() == fields
        model.fit(first, ["no", "yes"])
        assert model.model_.feature_fields.tolist() == [-1, 0, 0] + [-1] * 4 + [1] + [-1] * 6
    with pytest.raises(ValueError, match=r"an entry has feature 3 in field 1, .* has it in 0"):
        model.partial_fit(SparseBatch.from_lists([[(1, 3, 1.0)]]), ["no"])
    with pytest.warns(UserWarning, match="1 of 2 entries"):
        model.fit(SparseBatch.from_lists([[(0, 3, 1.0)], [(2, 14, 1.0)]]), ["no", "yes"])


def test_fields_have_the_names_of_columns() -> None:
    pd = pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ids, _, label = pairs_matter()
    frame = pd.DataFrame(ids, columns=["user", "item", "day"])
    for feature_fields, X, names in (
        ("categorical", frame, ["user", "item", "day"]),
        (None, frame, ["user", "item", "day"]),
        ([0, 1, 0], frame, ["0", "1"]),
        (None, forms()["SparseBatch"][0], ["0", "1", "2"]),
    ):
        model = FFMClassifier(epochs=1).fit(frame, label)
        model.set_params(feature_fields=feature_fields).fit(X, label)
        ticks = model.plot_field_strength().get_xticklabels()
        assert [tick.get_text() for tick in ticks] == names
        assert hasattr(model, "feature_names_in_") == (X is frame)
    matplotlib.pyplot.close("all")


def test_what_is_wrong_with_X(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _, label = pairs_matter()
    one_hot = forms()["csr"][0]
    batch = forms()["SparseBatch"][0]
    for feature_fields, X, message in (
        ("cats", ids, "feature_fields = 'cats' is neither 'categorical' nor a list"),
        ([0, 1], ids, r"feature_fields must be 3 integers from 0, .* got int64 of shape \[2\]"),
        ([0, 1, -1], ids, "feature_fields must be 3 integers from 0"),
        ([0.0, 1.0, 2.0], ids, "feature_fields must be 3 integers from 0, .* got float64"),
        ("categorical", batch, "'categorical' goes with a matrix; a SparseBatch has its own"),
        ([0] * 14, batch, r"an entry has feature \d+ in field [12], feature_fields has it in 0"),
        ([[0] * 14], batch, r"must be 14 integers from 0, .* of shape \[1, 14\]"),
        ([], batch, "must be 0 integers from 0"),
        ("categorical", ids + 0.5, r"X\[0, 0\] = .* is no category"),
        ("categorical", ids - 2, r"X\[\d+, \d+\] = -2 is no category"),
        ("categorical", ids.astype(str), "categories must be whole numbers"),
        (None, batch[:0], "no entries|0 sample"),
    ):
        y = label[: len(X)] if isinstance(X, SparseBatch) else label
        with pytest.raises(ValueError, match=message):
            FFMClassifier(feature_fields=feature_fields).fit(X, y)
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        FFMClassifier(feature_fields="categorical").fit(one_hot, label)
    with pytest.raises(ValueError, match="negative id"):
        FFMClassifier().fit(SparseBatch.from_lists([[(0, -1, 1.0)], [(0, 0, 1.0)]]), [0, 1])
    with pytest.raises(
        ValueError, match=r"100000 features in 100000 fields .* give feature_fields"
    ):
        FFMClassifier().fit(sp.csr_array((10, 100_000)), [0, 1] * 5)
    # Entries of a SparseBatch name their fields: there is no such advice for it.
    monkeypatch.setattr("ffm_ext.sklearn._LARGE_TABLE", 1)
    FFMClassifier(epochs=1).fit(batch, label)
    with pytest.raises(NotFittedError):
        FFMClassifier().predict(batch)


def test_without_scikit_learn() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import ffm_ext.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs scikit-learn 1.6 or later: pip install ffm-ext[sklearn]" in done.stderr


def test_of_a_constant_nothing_is_learnt_as_its_scale():
    X = np.array([[0, 1], [1, 0], [1, 1], [0, 0]] * 10)
    regressor = FFMRegressor(feature_fields="categorical", random_state=0)
    for y in (0.1, 3.3, 19.99):
        for n in (3, 7, 12, 40):
            assert regressor.fit(X[:n], [y] * n).y_scale_ == 1
    assert regressor.fit(X, np.linspace(5, 5 + 1e-9, 40)).y_scale_ == pytest.approx(3e-10, rel=0.1)


@pytest.mark.parametrize(
    ("feature_fields", "X", "message"),
    [
        (
            "categorical",
            [[0, 1 << 44], [1, 3]],
            "column 1 has categories up to 17592186044416; .*OrdinalEncoder",
        ),
        ([0, 1 << 44], [[0, 1], [1, 3]], "the largest of feature_fields"),
        (None, SparseBatch.from_lists([[(1 << 44, 1, 1.0)]] * 2), "largest id and field"),
    ],
    ids=["categorical", "fields", "batch"],
)
def test_tables_that_memory_does_not_hold(feature_fields, X, message):
    with pytest.raises(ValueError, match=f"no memory for a table of .*{message}"):
        FFMClassifier(feature_fields=feature_fields).fit(X, [0, 1])


def test_the_default_device_is_no_matter():
    X, y = np.eye(4), [0, 1, 0, 1]
    with torch.device("meta"):
        found = FFMClassifier(epochs=2, random_state=0).fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(
        found, FFMClassifier(epochs=2, random_state=0).fit(X, y).predict_proba(X)
    )


def test_an_encoder_of_frames_in_a_pipeline():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user": rng.choice(list("abc"), 200), "age": rng.random(200)})
    y = ((frame.user == "a") ^ (frame.age > 0.5)).to_numpy()
    for encoder in (FieldEncoder({"user": "vocabulary", "age": "bins"}), FieldEncoder()):
        pipeline = make_pipeline(encoder, FFMClassifier(epochs=10, random_state=0))
        assert cross_val_score(pipeline, frame, y, cv=3).min() > 0.8
        assert pipeline.fit(frame, y).score(frame, y) > 0.8
        assert not clone(encoder)._is_fitted
