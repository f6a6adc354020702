# SPDX-License-Identifier: MIT
"""MovieLens 100K, fetched from GroupLens or read from files that are already there."""

from __future__ import annotations

import hashlib
import http.client
import io
import math
import os
import shutil
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ffm_ext._files import atomic_write
from ffm_ext.batch import SparseBatch

from ._base import FieldDataset

_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
# Of the archive whose MD5 GroupLens publishes as 0e33842e24a9c977be4e0107933c0723.
_SHA256 = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"
_TIMEOUT = 30.0  # seconds without a byte

_GROUPLENS_FILES = ("u.data", "u.user", "u.item")
_RECBOLE_FILES = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")
# The flags at the end of a line of u.item, in their order there.
_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_AGE_STEP, _OLDEST = 5, 12  # years a feature; the last feature, open above
_RATING = np.dtype(
    [("user_id", np.int64), ("item_id", np.int64), ("rating", np.float32), ("timestamp", np.int64)]
)
_DESCRIPTION = """\
MovieLens 100K: 100,000 ratings, 1 to 5, of 1,682 films by 943 people, from September 1997 to April 1998.

F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM
Transactions on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872.
GroupLens' terms: no redistribution and no commercial use without its permission; see its README.
"""

Open = Callable[[str], IO[bytes]]


class _User(NamedTuple):
    age: int
    gender: str
    occupation: str


class _Tables(NamedTuple):
    """What both layouts hold; the ratings in the order of u.data."""

    ratings: npt.NDArray[Any]  # [n] of _RATING
    users: dict[int, _User]
    genres: dict[int, tuple[int, ...]]  # item id -> positions in _GENRES, ascending


def fetch_movielens_100k(
    *,
    data_home: str | os.PathLike[str] | None = None,
    download_if_missing: bool = True,
    n_retries: int = 3,
    delay: float = 1.0,
) -> FieldDataset:
    """MovieLens 100K (Harper & Konstan 2015): 100,000 ratings, 6 fields, a film's rating from 1 to 5.

    Used, whichever is there first, in ``data_home / "ml-100k"`` or ``data_home``: the files u.data,
    u.user and u.item of GroupLens; ml-100k.inter, ml-100k.user and ml-100k.item of RecBole; and
    ml-100k.zip of GroupLens. Where there is none, ml-100k.zip (5 MB) is downloaded to ``data_home`` and
    its SHA-256 checked. All of them give the same data set. GroupLens' terms: no redistribution and no
    commercial use without its permission.

    ``data`` is a :class:`~ffm_ext.SparseBatch`. Fields: user, item, age (``age // 5``, at most 12),
    gender, occupation, with one feature of value 1 in every sample, and genres: the ``n`` genres of
    the film, with value ``1 / n`` each. ``rows`` are slices of
    ``numpy.random.RandomState(0).permutation(100000)``: 70 % "train", 10 % "valid", 20 % "test".
    ``frame`` holds user_id, item_id, rating, timestamp (seconds since 1970, UTC), age, gender,
    occupation and genres (``"Action|Thriller"``) of every rating.

    Args:
        data_home: the folder; by default the environment variable ``FFM_EXT_DATA``, or
            ``~/ffm_ext_data``.
        download_if_missing: False raises instead of downloading.
        n_retries: how many more times a failed download is tried.
        delay: seconds between tries.

    Returns:
        The data set; ``target`` is the rating.

    Raises:
        OSError: the files are missing and may not or cannot be downloaded, or ml-100k.zip is not
            GroupLens' archive.
        ValueError: a file does not hold what it should (the message names file and line), or
            ``n_retries`` is negative.
    """
    if n_retries < 0:
        raise ValueError(f"fetch_movielens_100k: n_retries = {n_retries} must not be negative")
    home = Path(data_home or os.environ.get("FFM_EXT_DATA") or "~/ffm_ext_data").expanduser()
    return _encode(_read(home, download_if_missing, n_retries, delay))


def _read(home: Path, download_if_missing: bool, n_retries: int, delay: float) -> _Tables:
    folders = (home / "ml-100k", home)
    for folder in folders:
        if all((folder / name).is_file() for name in _GROUPLENS_FILES):
            return _read_grouplens(_opener(folder))
        if all((folder / name).is_file() for name in _RECBOLE_FILES):
            return _read_recbole(_opener(folder))
    archive = next(
        (path for path in (folder / "ml-100k.zip" for folder in folders) if path.is_file()), None
    )
    if archive is None:
        archive = home / "ml-100k.zip"
        if not download_if_missing:
            raise FileNotFoundError(
                f"fetch_movielens_100k: no MovieLens 100K in {home}, and download_if_missing is "
                f"False.\n{_help(home)}"
            )
        _download(archive, n_retries, delay)
    elif (found := _sha256(archive)) != _SHA256:
        raise OSError(f"fetch_movielens_100k: {archive} has SHA-256 {found}, expected {_SHA256}")
    with zipfile.ZipFile(archive) as members:
        return _read_grouplens(lambda name: members.open(f"ml-100k/{name}"))


def _opener(folder: Path) -> Open:
    return lambda name: (folder / name).open("rb")


def _help(home: Path) -> str:
    return (
        f"Put one of these into {home} (or into another folder that data_home or the environment "
        "variable FFM_EXT_DATA names):\n"
        f"  ml-100k.zip, from {_URL}\n"
        f"  ml-100k/ with its files {', '.join(_GROUPLENS_FILES)}\n"
        f"  ml-100k/ with RecBole's files {', '.join(_RECBOLE_FILES)}"
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(archive: Path, n_retries: int, delay: float) -> None:
    """Fetch the archive; what stands under its name is always whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    for left in range(n_retries, -1, -1):
        try:
            with (
                atomic_write(archive) as part,
                part.open("wb") as file,
                urllib.request.urlopen(_URL, timeout=_TIMEOUT) as response,
            ):
                shutil.copyfileobj(response, file)
                file.flush()
                if (found := _sha256(part)) != _SHA256:
                    raise OSError(f"what came has SHA-256 {found}, expected {_SHA256}")
            return
        except (OSError, http.client.HTTPException) as error:
            if left == 0:
                raise OSError(
                    f"fetch_movielens_100k: cannot download {_URL} ({n_retries + 1} tries): "
                    f"{error}\n{_help(archive.parent)}"
                ) from error
        time.sleep(delay)


def _read_grouplens(open_file: Open) -> _Tables:
    users: dict[int, _User] = {}
    for where, cells in _rows(open_file, "u.user", "|", 5):
        user, age, gender, occupation, _zip = cells
        users[_integer(where, user)] = _User(_integer(where, age), gender, occupation)
    genres: dict[int, tuple[int, ...]] = {}
    for where, cells in _rows(open_file, "u.item", "|", 5 + len(_GENRES)):
        item, _title, _released, _video, _url, *flags = cells
        if not set(flags) <= {"0", "1"}:
            raise ValueError(f"{where}: the last {len(_GENRES)} values must be 0 or 1")
        genres[_integer(where, item)] = tuple(g for g, flag in enumerate(flags) if flag == "1")
    return _Tables(_ratings(_rows(open_file, "u.data", "\t", 4)), users, genres)


def _read_recbole(open_file: Open) -> _Tables:
    rating_file, user_file, item_file = _RECBOLE_FILES
    users: dict[int, _User] = {}
    wanted: tuple[str, ...] = ("user_id", "age", "gender", "occupation")
    for where, (user, age, gender, occupation) in _recbole_rows(open_file, user_file, wanted):
        users[_integer(where, user)] = _User(_integer(where, age), gender, occupation)
    genres: dict[int, tuple[int, ...]] = {}
    for where, (item, names) in _recbole_rows(open_file, item_file, ("item_id", "class")):
        unknown = [name for name in names.split() if name not in _GENRES]
        if unknown:
            raise ValueError(f"{where}: {unknown[0]!r} is not a genre of MovieLens")
        genres[_integer(where, item)] = tuple(sorted(map(_GENRES.index, names.split())))
    wanted = ("user_id", "item_id", "rating", "timestamp")
    return _Tables(_ratings(_recbole_rows(open_file, rating_file, wanted)), users, genres)


def _recbole_rows(
    open_file: Open, name: str, wanted: tuple[str, ...]
) -> Iterator[tuple[str, list[str]]]:
    """``(place, [value of each wanted column])`` of an atomic file, whose first line names columns."""
    with open_file(name) as file:
        header = file.readline().decode("utf-8", "surrogateescape").rstrip("\r\n")
    names = [cell.partition(":")[0] for cell in header.split("\t")]
    for column in wanted:
        if column not in names:
            raise ValueError(f"{name}:1: no column {column!r} in the header {header!r}")
    columns = [names.index(column) for column in wanted]
    rows = _rows(open_file, name, "\t", len(names), encoding="utf-8")
    next(rows)
    for where, cells in rows:
        yield where, [cells[column] for column in columns]


def _rows(
    open_file: Open, name: str, separator: str, width: int, encoding: str = "latin-1"
) -> Iterator[tuple[str, list[str]]]:
    """``(place, cells)`` of every line that is not blank."""
    with (
        open_file(name) as file,
        io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape") as text,
    ):
        for number, line in enumerate(text, 1):
            if not line.isascii() and any("\ud800" <= c <= "\udfff" for c in line):
                raise ValueError(f"{name}:{number}: not in {encoding.upper()}: {line!r}")
            if line.strip():
                cells = line.rstrip("\n").split(separator)
                if len(cells) != width:
                    raise ValueError(f"{name}:{number}: {len(cells)} values, expected {width}")
                yield f"{name}:{number}", cells


def _ratings(rows: Iterable[tuple[str, list[str]]]) -> npt.NDArray[Any]:
    return np.array(
        [
            (
                _integer(where, user),
                _integer(where, item),
                _number(where, rating),
                _number(where, timestamp),
            )
            for where, (user, item, rating, timestamp) in rows
        ],
        dtype=_RATING,
    )


def _integer(where: str, text: str) -> int:
    """Ids, ages and the like: from 0 on."""
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not an integer") from None
    if not 0 <= number < 1 << 31:
        raise ValueError(f"{where}: {text!r} is out of range")
    return number


def _number(where: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < 1 << 62:
        raise ValueError(f"{where}: {text!r} is not a number")
    return number


def _encode(tables: _Tables) -> FieldDataset:
    ratings, n = tables.ratings, len(tables.ratings)
    for what, rows in (("ratings", ratings), ("users", tables.users), ("films", tables.genres)):
        if len(rows) == 0:
            raise ValueError(f"fetch_movielens_100k: the files hold no {what}")
    user_ids = np.array(sorted(tables.users))
    item_ids = np.array(sorted(tables.genres))
    user = _positions("user_id", ratings["user_id"], user_ids)
    item = _positions("item_id", ratings["item_id"], item_ids)

    # One row a user or a film; the ratings pick from them.
    people = [tables.users[i] for i in user_ids]
    ages = np.array([person.age for person in people])
    genders, gender = np.unique([person.gender for person in people], return_inverse=True)
    occupations, occupation = np.unique(
        [person.occupation for person in people], return_inverse=True
    )
    films = [tables.genres[i] for i in item_ids]
    genre_counts = np.array([len(genres) for genres in films])
    genre_texts = np.array(["|".join(_GENRES[g] for g in genres) for genres in films])

    fields = {
        "user": len(user_ids),
        "item": len(item_ids),
        "age": _OLDEST + 1,
        "gender": len(genders),
        "occupation": len(occupations),
        "genres": len(_GENRES),
    }
    age_names = [f"{a * _AGE_STEP}..{a * _AGE_STEP + _AGE_STEP - 1}" for a in range(_OLDEST)]
    age_names.append(f"{_OLDEST * _AGE_STEP}..")
    labels: tuple[Iterable[Any], ...] = (
        user_ids,
        item_ids,
        age_names,
        genders,
        occupations,
        _GENRES,
    )
    feature_names = [
        f"{field}={label}" for field, names in zip(fields, labels, strict=True) for label in names
    ]

    # [n, 5 + most genres of a film]: the ids of a sample's entries, -1 where there is none.
    first = np.cumsum([0, *fields.values()])
    genre_field = len(fields) - 1
    ids = np.full((n, genre_field + genre_counts.max()), -1, dtype=np.int32)
    age = np.minimum(ages // _AGE_STEP, _OLDEST)
    for f, column in enumerate((user, item, age[user], gender[user], occupation[user])):
        ids[:, f] = first[f] + column
    padded = np.full((len(films), genre_counts.max()), -1, dtype=np.int32)
    for i, genres in enumerate(films):
        padded[i, : len(genres)] = first[genre_field] + np.array(genres, dtype=np.int32)
    ids[:, genre_field:] = padded[item]
    values = np.ones(ids.shape, dtype=np.float32)
    values[:, genre_field:] = 1 / np.maximum(genre_counts, 1)[item, None]
    entry_fields = np.minimum(np.arange(ids.shape[1], dtype=np.int32), genre_field)
    present = ids >= 0

    order = torch.from_numpy(np.random.RandomState(0).permutation(n))
    train, valid = n * 7 // 10, n * 8 // 10
    return FieldDataset(
        name="MovieLens 100K",
        data=SparseBatch(
            torch.from_numpy(ids[present]),
            torch.from_numpy(np.broadcast_to(entry_fields, ids.shape)[present]),
            torch.from_numpy(values[present]),
            torch.from_numpy(np.concatenate([[0], np.cumsum(present.sum(1))])),
        ),
        target=torch.from_numpy(ratings["rating"].copy()),
        fields=fields,
        feature_names=tuple(feature_names),
        rows={"train": order[:train], "valid": order[train:valid], "test": order[valid:]},
        frame={
            "user_id": ratings["user_id"].copy(),
            "item_id": ratings["item_id"].copy(),
            "rating": ratings["rating"].copy(),
            "timestamp": ratings["timestamp"].copy(),
            "age": ages[user],
            "gender": genders[gender][user],
            "occupation": occupations[occupation][user],
            "genres": genre_texts[item],
        },
        description=_DESCRIPTION,
    )


def _positions(
    name: str, ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Where each id stands in ``known``, which is sorted."""
    missing = ~np.isin(ids, known)
    if missing.any():
        i = int(missing.argmax())
        raise ValueError(
            f"fetch_movielens_100k: {name} = {ids[i]} of rating {i + 1} is not in its file"
        )
    return np.searchsorted(known, ids)
