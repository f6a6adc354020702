# SPDX-License-Identifier: MIT
from __future__ import annotations

import hashlib
import io
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ffm_ext import SparseBatch
from ffm_ext.datasets import (
    FieldDataset,
    _movielens,
    fetch_movielens_100k,
    load_adult,
    make_user_item_regression,
)


def as_csr(ds: FieldDataset) -> sp.csr_matrix:
    """The data as one scipy matrix ``[n, N]``, in float64."""
    if isinstance(ds.data, SparseBatch):
        assert ds.data.values is not None
        parts = (ds.data.values.double(), ds.data.indices, ds.data.offsets)
        values, indices, offsets = (part.numpy() for part in parts)
    else:
        indices = ds.data.numpy().ravel()
        values, offsets = np.ones(indices.size), np.arange(0, indices.size + 1, ds.num_fields)
    return sp.csr_matrix((values, indices, offsets), shape=(len(ds), ds.num_features))


# ------------------------------------------------------------------ make_user_item_regression


def test_user_item_published_figures() -> None:
    X, y, (w0, w, V) = make_user_item_regression(label_stdev=0.4, n_user=100, n_item=50)
    assert X.format == "csc"
    assert X.shape == (5000, 150)
    assert np.isscalar(w0)
    assert w.shape == (150,)
    assert V.shape == (2, 150)
    assert y.mean() == pytest.approx(210.3303, abs=5e-5)
    assert y.std() == pytest.approx(7.1353, abs=5e-5)
    assert y[0] == pytest.approx(210.13141355, abs=5e-9)


def test_user_item_is_the_full_grid_user_major() -> None:
    X, _, _ = make_user_item_regression(n_user=3, n_item=2)
    users, items = X.toarray()[:, :3], X.toarray()[:, 3:]
    assert (X.sum(axis=1) == 2).all()
    assert users.argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2]
    assert items.argmax(axis=1).tolist() == [0, 1, 0, 1, 0, 1]


def test_user_item_ratings_are_the_machine_without_noise() -> None:
    X, y, (w0, w, V) = make_user_item_regression(n_user=7, n_item=5, rank=3, label_stdev=0.0)
    dense = X.toarray()
    pairs = 0.5 * ((dense @ V.T) ** 2 - dense @ (V.T**2)).sum(axis=1)
    np.testing.assert_allclose(y, w0 + dense @ w + pairs, rtol=1e-12)


@pytest.mark.parametrize(("bias", "first_order"), [(False, True), (True, False)])
def test_user_item_switches_leave_the_other_draws_alone(bias: bool, first_order: bool) -> None:
    _, y, (w0, w, V) = make_user_item_regression(bias=bias, first_order=first_order)
    X, y_all, (w0_all, w_all, V_all) = make_user_item_regression()
    np.testing.assert_array_equal(V, V_all)
    assert w0 == (w0_all if bias else 0)
    np.testing.assert_array_equal(w, w_all if first_order else np.zeros_like(w_all))
    np.testing.assert_allclose(y_all - y, w0_all - w0 + X @ (w_all - w), rtol=1e-12, atol=1e-10)


def test_user_item_random_state() -> None:
    _, y, _ = make_user_item_regression(5)
    _, again, _ = make_user_item_regression(np.random.RandomState(5))
    _, other, _ = make_user_item_regression(6)
    np.testing.assert_array_equal(y, again)
    assert (y != other).all()


@pytest.mark.parametrize(
    "bad", [{"n_user": 0}, {"n_item": -1}, {"rank": 0}, {"label_stdev": -0.1}, {"stdev_V": -1.0}]
)
def test_user_item_bad_arguments(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"make_user_item_regression: {name} = {value} must"):
        make_user_item_regression(**bad)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n_user": 100, "n_item": 50},
        {"random_state": 7, "n_user": 3, "n_item": 11, "rank": 5, "label_stdev": 2.0},
        {"label_stdev": 0.0, "mean_w": 0.0, "stdev_V": 1.0, "mean_V": -0.5},
    ],
)
def test_user_item_equals_fastfm(arguments: dict[str, Any]) -> None:
    theirs = pytest.importorskip(
        "fastFM.datasets", reason="fastFM is not installed: nothing to compare with"
    )
    X, y, coef = make_user_item_regression(**arguments)
    X_theirs, y_theirs, coef_theirs = theirs.make_user_item_regression(**arguments)
    assert X.format == X_theirs.format
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(X, name), getattr(X_theirs, name))
        assert getattr(X, name).dtype == getattr(X_theirs, name).dtype
    for part, part_theirs in zip(coef, coef_theirs, strict=True):
        np.testing.assert_array_equal(part, part_theirs)
    np.testing.assert_allclose(y, y_theirs, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ load_adult


@pytest.fixture(scope="module")
def adult() -> FieldDataset:
    return load_adult()


def test_adult_raw_table_is_ucis(adult: FieldDataset) -> None:
    frame = adult.frame
    assert list(frame) == [
        "age",
        "workclass",
        "fnlwgt",
        "education",
        "education-num",
        "marital-status",
        "occupation",
        "relationship",
        "race",
        "sex",
        "capital-gain",
        "capital-loss",
        "hours-per-week",
        "native-country",
        "income",
    ]
    assert {len(column) for column in frame.values()} == {48842}
    first = [column[0] for column in frame.values()]
    assert first == [
        *(39, "State-gov", 77516, "Bachelors", 13, "Never-married", "Adm-clerical"),
        *("Not-in-family", "White", "Male", 2174, 0, 40, "United-States", "<=50K"),
    ]
    # Missing values and positives of adult.data and adult.test, as UCI documents them.
    for name, value, counts in (
        ("workclass", "?", [1836, 963]),
        ("occupation", "?", [1843, 966]),
        ("native-country", "?", [583, 274]),
        ("income", ">50K", [7841, 3846]),
    ):
        parts = np.split(frame[name] == value, [32561])
        assert [int(part.sum()) for part in parts] == counts


def test_adult_split(adult: FieldDataset) -> None:
    assert {name: len(rows) for name, rows in adult.rows.items()} == {
        "train": 29305,
        "valid": 3256,
        "test": 16281,
    }
    assert torch.equal(torch.cat(list(adult.rows.values())).sort().values, torch.arange(48842))
    assert torch.equal(adult.rows["test"], torch.arange(32561, 48842))
    data, target = adult.split("valid")
    assert torch.equal(data, adult.data[adult.rows["valid"]])
    assert torch.equal(target, adult.target[adult.rows["valid"]])
    with pytest.raises(KeyError, match="name = 'dev' is not one of train, valid, test"):
        adult.split("dev")


def test_adult_encoding(adult: FieldDataset) -> None:
    assert adult.data.shape == (48842, adult.num_fields) == (48842, 12)
    assert adult.data.dtype == torch.int32
    assert adult.target.dtype == torch.float32
    assert np.array_equal(adult.target.numpy() == 1, adult.frame["income"] == ">50K")
    assert len(adult.feature_names) == len(set(adult.feature_names)) == adult.num_features
    # Every id lies in its column's field, and every name says its field.
    assert torch.equal(
        adult.feature_fields[adult.data.long()],
        torch.arange(12, dtype=torch.int32).expand(48842, 12),
    )
    local = adult.data - adult.field_offsets
    assert (local >= 0).all()
    assert (local < torch.tensor(adult.field_dims)).all()
    for name, field in zip(adult.feature_names, adult.feature_fields.tolist(), strict=True):
        assert name.startswith(f"{adult.field_names[field]}=")


def test_adult_categories_and_bins_say_what_they_hold(adult: FieldDataset) -> None:
    counts = np.bincount(adult.data[adult.rows["train"]].ravel(), minlength=adult.num_features)
    labels = np.array([name.partition("=")[2] for name in adult.feature_names])
    train = adult.rows["train"].numpy()
    for f, name in enumerate(adult.field_names):
        ids, raw = adult.data[:, f].numpy(), adult.frame[name]
        if raw.dtype.kind == "U":
            assert np.array_equal(labels[ids], raw)
            continue
        first = int(adult.field_offsets[f])
        assert counts[first : first + adult.field_dims[f]].min() >= 5
        # Learnt on the training part: there, every value lies between the ends that the label names.
        ends = np.array([label.split("..") * 2 for label in labels[ids]], dtype=object)
        low = np.array([int(end[0]) for end in ends])
        high = np.array([int(end[1]) for end in ends])
        assert (low[train] <= raw[train]).all()
        assert (raw[train] <= high[train]).all()
        # Elsewhere bins are in the order of the values, without a gap.
        order = np.argsort(raw, kind="stable")
        assert (np.diff(ids[order]) >= 0).all()


def test_adult_logistic_regression(adult: FieldDataset) -> None:
    """The encoding alone carries a linear model to the AUC that boosted trees are known for."""
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="scikit-learn is not installed"
    )
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    X, y = as_csr(adult), adult.target.numpy()
    train, test = adult.rows["train"].numpy(), adult.rows["test"].numpy()
    model = linear_model.LogisticRegression(max_iter=1000).fit(X[train], y[train])
    assert metrics.roc_auc_score(y[test], model.decision_function(X[test])) > 0.922


def test_adult_file_is_small_and_licensed() -> None:
    folder = resources.files("ffm_ext.datasets")
    assert len(folder.joinpath("adult.npz").read_bytes()) < 500_000
    license_text = folder.joinpath("DATA_LICENSE.txt").read_text(encoding="utf-8")
    assert "10.24432/C5XW20" in license_text
    assert "CC BY 4.0" in license_text


def test_dataset_repr(adult: FieldDataset) -> None:
    assert repr(adult) == (
        "FieldDataset(Adult: 48842 samples (train 29305, valid 3256, test 16281), "
        f"{adult.num_features} features in 12 fields)"
    )


# ------------------------------------------------------------------ fetch_movielens_100k
# The small files are made up; none of their lines is MovieLens'.

USERS = [(1, 61, "F", "writer"), (2, 19, "M", "student"), (4, 34, "M", "other")]
ITEMS = [(3, "Un Été (2001)", (14,)), (5, "Both (1990)", (1, 5, 8)), (6, "None (1980)", ())]
RATINGS = [(4, 5, 3, 900), (1, 3, 5, 800), (2, 6, 1, 700), (1, 5, 4, 650), (4, 3, 2, 600)]

Files = dict[str, bytes]


def grouplens_files() -> Files:
    flags = ["|".join("01"[g in genres] for g in range(19)) for _, _, genres in ITEMS]
    return {
        "u.data": "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in RATINGS).encode(),
        "u.user": "".join(f"{u}|{a}|{g}|{o}|12345\n" for u, a, g, o in USERS).encode(),
        "u.item": "".join(
            f"{i}|{title}|01-Jan-2001||http://x/{i}|{flag}\n"
            for (i, title, _), flag in zip(ITEMS, flags, strict=True)
        ).encode("latin-1"),
    }


def recbole_files() -> Files:
    names = _movielens._GENRES
    users = "".join(f"{u}\t{a}\t{g}\t{o}\t12345\n" for u, a, g, o in USERS)
    items = "".join(
        f"{i}\t{title}\t2001\t{' '.join(names[g] for g in reversed(genres))}\n"
        for i, title, genres in ITEMS
    )
    ratings = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in RATINGS)
    return {
        "ml-100k.inter": f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{ratings}".encode(),
        "ml-100k.user": (
            f"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n{users}"
        ).encode(),
        "ml-100k.item": (
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + items
        ).encode(),
    }


def put(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def archive_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in grouplens_files().items():
            archive.writestr(f"ml-100k/{name}", content)
    return buffer.getvalue()


@pytest.fixture
def small_archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes of a small archive, which counts as GroupLens' own within the test."""
    content = archive_bytes()
    monkeypatch.setattr(_movielens, "_SHA256", hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes | Exception]]:
    """What the server answers, one after the other; no test reaches the network."""
    queue: list[bytes | Exception] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
        answer = queue.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    yield queue
    assert not queue


def assert_same(a: FieldDataset, b: FieldDataset) -> None:
    for name in ("indices", "fields", "values", "offsets"):
        assert torch.equal(getattr(a.data, name), getattr(b.data, name))
    assert torch.equal(a.target, b.target)
    assert a.fields == b.fields
    assert a.feature_names == b.feature_names
    for name in a.rows:
        assert torch.equal(a.rows[name], b.rows[name])
    assert list(a.frame) == list(b.frame)
    for name in a.frame:
        np.testing.assert_array_equal(a.frame[name], b.frame[name])


def test_movielens_encoding(tmp_path: Path) -> None:
    put(tmp_path, grouplens_files())
    ds = fetch_movielens_100k(data_home=tmp_path, download_if_missing=False)
    assert ds.fields == {
        "user": 3,
        "item": 3,
        "age": 13,
        "gender": 2,
        "occupation": 3,
        "genres": 19,
    }
    assert len(ds.feature_names) == ds.num_features == 43

    batch = ds.data
    assert isinstance(batch, SparseBatch)
    assert batch.indices.dtype == torch.int32
    assert batch.values is not None
    assert batch.values.dtype == torch.float32
    assert torch.equal(ds.feature_fields[batch.indices.long()], batch.fields)
    samples = [
        [
            (ds.feature_names[a], value)
            for a, value in zip(
                batch.indices[s:e].tolist(), batch.values[s:e].tolist(), strict=True
            )
        ]
        for s, e in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    ]
    third = float(np.float32(1 / 3))
    assert samples[0] == [
        ("user=4", 1.0),
        ("item=5", 1.0),
        ("age=30..34", 1.0),
        ("gender=M", 1.0),
        ("occupation=other", 1.0),
        ("genres=Action", third),
        ("genres=Comedy", third),
        ("genres=Drama", third),
    ]
    assert samples[1][2:] == [
        ("age=60..", 1.0),
        ("gender=F", 1.0),
        ("occupation=writer", 1.0),
        ("genres=Romance", 1.0),
    ]
    # A film without genres: the field is empty.
    assert [name for name, _ in samples[2]] == [
        "user=2",
        "item=6",
        "age=15..19",
        "gender=M",
        "occupation=student",
    ]

    assert ds.target.tolist() == [3.0, 5.0, 1.0, 4.0, 2.0]
    assert ds.frame["timestamp"].tolist() == [900, 800, 700, 650, 600]
    assert ds.frame["age"].tolist() == [34, 61, 19, 61, 34]
    assert ds.frame["genres"].tolist() == [
        "Action|Comedy|Drama",
        "Romance",
        "",
        "Action|Comedy|Drama",
        "Romance",
    ]
    order = np.random.RandomState(0).permutation(5)
    assert {name: rows.tolist() for name, rows in ds.rows.items()} == {
        "train": order[:3].tolist(),
        "valid": order[3:4].tolist(),
        "test": order[4:].tolist(),
    }
    data, target = ds.split("train")
    assert isinstance(data, SparseBatch)
    assert len(data) == 3
    assert torch.equal(target, ds.target[ds.rows["train"]])


def test_movielens_every_place_and_layout_gives_the_same(
    tmp_path: Path, small_archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = [
        put(tmp_path / "a", grouplens_files()),
        put(tmp_path / "b" / "ml-100k", grouplens_files()).parent,
        put(tmp_path / "c", recbole_files()),
        put(tmp_path / "d" / "ml-100k", recbole_files()).parent,
        put(tmp_path / "e", {"ml-100k.zip": small_archive}),
    ]
    sets = [fetch_movielens_100k(data_home=home, download_if_missing=False) for home in homes]
    monkeypatch.setenv("FFM_EXT_DATA", str(tmp_path / "d"))
    sets.append(fetch_movielens_100k(download_if_missing=False))
    crlf = {name: text.replace(b"\n", b"\r\n") for name, text in recbole_files().items()}
    sets.append(fetch_movielens_100k(data_home=put(tmp_path / "f", crlf)))
    for other in sets[1:]:
        assert_same(sets[0], other)


def test_movielens_default_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FFM_EXT_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "ffm_ext_data" / "ml-100k", grouplens_files())
    assert len(fetch_movielens_100k(download_if_missing=False)) == 5


def test_movielens_missing_says_what_to_put_where(tmp_path: Path) -> None:
    put(tmp_path, {"u.data": b"", "ml-100k.inter": b""})
    with pytest.raises(OSError, match="download_if_missing is False") as error:
        fetch_movielens_100k(data_home=tmp_path, download_if_missing=False)
    for hint in (
        str(tmp_path),
        "FFM_EXT_DATA",
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "u.data, u.user, u.item",
        "ml-100k.inter, ml-100k.user, ml-100k.item",
    ):
        assert hint in str(error.value)


def test_movielens_download(
    tmp_path: Path, small_archive: bytes, answers: list[bytes | Exception]
) -> None:
    answers += [urllib.error.URLError("no route"), small_archive[:100], small_archive]
    home = tmp_path / "new" / "home"
    ds = fetch_movielens_100k(data_home=home, delay=0.0)
    assert len(ds) == 5
    assert [path.name for path in home.iterdir()] == ["ml-100k.zip"]
    # The second call finds the archive: there is no answer left.
    assert_same(ds, fetch_movielens_100k(data_home=home, delay=0.0))


def test_movielens_download_fails(tmp_path: Path, answers: list[bytes | Exception]) -> None:
    answers += [urllib.error.URLError("no route"), TimeoutError("slow")]
    with pytest.raises(OSError, match=r"cannot download .* \(2 tries\): slow\nPut one of"):
        fetch_movielens_100k(data_home=tmp_path, n_retries=1, delay=0.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="n_retries = -1 must not be negative"):
        fetch_movielens_100k(data_home=tmp_path, n_retries=-1)


def test_movielens_other_archive_is_refused(
    tmp_path: Path, answers: list[bytes | Exception]
) -> None:
    other = archive_bytes()  # not GroupLens': its checksum is not the one that is built in
    answers.append(other)
    with pytest.raises(OSError, match="what came has SHA-256"):
        fetch_movielens_100k(data_home=tmp_path, n_retries=0)
    assert not list(tmp_path.iterdir())
    put(tmp_path, {"ml-100k.zip": other})
    with pytest.raises(OSError, match=r"ml-100k\.zip has SHA-256 .*, expected 50d2a982"):
        fetch_movielens_100k(data_home=tmp_path)


@pytest.mark.parametrize(
    ("files", "name", "old", "new", "message"),
    [
        (grouplens_files, "u.data", b"\t800", b"", r"u\.data:2: 3 values, expected 4"),
        (grouplens_files, "u.data", b"1\t3\t5", b"1\tx\t5", r"u\.data:2: 'x' is not an integer"),
        (grouplens_files, "u.data", b"1\t3\t5", b"1\t3\tnan", r"u\.data:2: 'nan' is not a number"),
        (grouplens_files, "u.data", b"1\t3\t5", b"9\t3\t5", "user_id = 9 of rating 2 is not in"),
        (grouplens_files, "u.data", b"2\t6\t1", b"2\t7\t1", "item_id = 7 of rating 3 is not in"),
        (grouplens_files, "u.user", b"|19|", b"|19y|", r"u\.user:2: '19y' is not an integer"),
        (grouplens_files, "u.user", b"|19|", b"|-5|", r"u\.user:2: '-5' is out of range"),
        (
            grouplens_files,
            "u.user",
            b"|19|",
            b"|1" + b"0" * 20 + b"|",
            r"u\.user:2: '10*' is out of range",
        ),
        (grouplens_files, "u.item", b"|0|0\n", b"|0|2\n", r"u\.item:1: the last 19 values must be"),
        (recbole_files, "ml-100k.inter", b"800", b"8h", r"ml-100k\.inter:3: '8h' is not a num"),
        (recbole_files, "ml-100k.user", b"age:", b"ages:", r"ml-100k\.user:1: no column 'age'"),
        (recbole_files, "ml-100k.item", b"Romance", b"Noise", r"ml-100k\.item:2: 'Noise' is not"),
        (
            recbole_files,
            "ml-100k.item",
            b"Romance",
            b"Rom\xe2nce",
            r"ml-100k\.item:2: not in UTF-8",
        ),
    ],
)
def test_movielens_bad_files(
    tmp_path: Path, files: Callable[[], Files], name: str, old: bytes, new: bytes, message: str
) -> None:
    content = files()
    content[name] = content[name].replace(old, new, 1)
    put(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        fetch_movielens_100k(data_home=tmp_path)


@pytest.mark.parametrize(
    ("empty", "what"), [("u.data", "ratings"), ("u.user", "users"), ("u.item", "films")]
)
def test_movielens_empty_files(tmp_path: Path, empty: str, what: str) -> None:
    put(tmp_path, {**grouplens_files(), empty: b""})
    with pytest.raises(ValueError, match=f"the files hold no {what}"):
        fetch_movielens_100k(data_home=tmp_path)


@pytest.fixture(scope="module")
def movielens() -> FieldDataset:
    if "FFM_EXT_DATA" not in os.environ:
        pytest.skip(
            "FFM_EXT_DATA does not name a folder with MovieLens 100K, which is not ours to share"
        )
    return fetch_movielens_100k(download_if_missing=False)


def test_movielens_real_data(movielens: FieldDataset) -> None:
    ds = movielens
    assert len(ds) == 100_000
    assert ds.field_dims == (943, 1682, 13, 2, 21, 19)
    assert {name: len(rows) for name, rows in ds.rows.items()} == {
        "train": 70_000,
        "valid": 10_000,
        "test": 20_000,
    }
    # The ratings, written as u.data has them, are u.data to the byte: nothing lost, same order.
    columns = [
        ds.frame[name].astype(np.int64) for name in ("user_id", "item_id", "rating", "timestamp")
    ]
    lines = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in zip(*columns, strict=True))
    assert hashlib.sha256(lines.encode()).hexdigest() == (
        "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"
    )
    genres = ds.frame["genres"][np.unique(ds.frame["item_id"], return_index=True)[1]]
    counts = [
        sum(name in text.split("|") for text in genres) for name in ("Drama", "Comedy", "War")
    ]
    assert counts == [725, 505, 71]

    assert isinstance(ds.data, SparseBatch)
    assert ds.data.values is not None
    assert ds.data.offsets[-1] == ds.data.nnz == 712_595
    field_sums = np.bincount(ds.data.fields, weights=ds.data.values)
    np.testing.assert_allclose(field_sums, 1e5, rtol=1e-6)


def test_movielens_real_data_errors(movielens: FieldDataset) -> None:
    """The constant and the linear model have the errors that are known for this split."""
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="scikit-learn is not installed"
    )
    X, y = as_csr(movielens), movielens.target.double().numpy()
    train, test = movielens.rows["train"].numpy(), movielens.rows["test"].numpy()
    assert np.sqrt(np.mean((y[test] - y[train].mean()) ** 2)) == pytest.approx(1.131, abs=5e-4)
    ridge = linear_model.Ridge(alpha=3.0).fit(X[train], y[train])
    error = np.sqrt(np.mean((ridge.predict(X[test]) - y[test]) ** 2))
    assert error == pytest.approx(0.9526, abs=5e-4)
