# SPDX-License-Identifier: MIT
"""Columns of a frame to features: a column is a field."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ffm_ext._arguments import check_positive
from ffm_ext._files import atomic_write
from ffm_ext.batch import SparseBatch, fields_of_features

from ._dataset import compact
from ._frames import Column, columns_of, naming

Array = npt.NDArray[Any]
Kind = Literal["vocabulary", "hash", "bins", "numeric"]

FORMAT, VERSION = "ffm_ext.FieldEncoder", 1


@dataclass
class Vocabulary:
    """A feature for each category that occurs, one for those that do not, one for a missing value.

    Args:
        min_count: categories with fewer occurrences in :meth:`FieldEncoder.fit` count as unknown.

    The ids of the field: missing, unknown, then the categories in the order of their text.
    """

    min_count: int = 1
    categories: list[str] = field(default_factory=list)
    kind: ClassVar[Kind] = "vocabulary"

    def __post_init__(self) -> None:
        (self.min_count,) = check_positive("Vocabulary", min_count=self.min_count)
        _check_elements("Vocabulary: categories", self.categories, str, "a text")

    @property
    def num_features(self) -> int:
        """How many ids the field has."""
        return 2 + len(self.categories)

    def fit(self, values: Array) -> None:
        """Learn the categories."""
        texts, inverse = _unique_texts(values)
        counts = Counter[str]()
        for text, count in zip(texts, np.bincount(inverse, minlength=len(texts)), strict=True):
            counts[text] += int(count)
        self.categories = sorted(text for text, n in counts.items() if n >= self.min_count)

    def encode(self, values: Array) -> tuple[Array, Array | None]:
        """Local ids of values that are there, and the value of each entry (``None``: 1)."""
        ids = {text: i for i, text in enumerate(self.categories, 2)}
        texts, inverse = _unique_texts(values)
        return np.array([ids.get(text, 1) for text in texts], dtype=np.int64)[inverse], None

    def names(self) -> Iterable[str]:
        """What each local id stands for."""
        return ["=<missing>", "=<unknown>", *(f"={text}" for text in self.categories)]


@dataclass
class Hash:
    """A feature for each of ``buckets`` buckets, and one for a missing value. It needs no vocabulary.

    Args:
        buckets: a category goes into the bucket ``blake2b(its text, 8 bytes, key=seed) mod buckets``: the same one on
            every machine.
        seed: of the hash.
    """

    buckets: int = 1 << 18
    seed: int = 0
    kind: ClassVar[Kind] = "hash"

    def __post_init__(self) -> None:
        (self.buckets,) = check_positive("Hash", buckets=self.buckets)
        self.seed = operator.index(self.seed)
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"Hash: seed = {self.seed} must be in [0, 2**64)")

    @property
    def num_features(self) -> int:
        """How many ids the field has."""
        return 1 + self.buckets

    def fit(self, values: Array) -> None:
        """Nothing is to be learnt."""

    def encode(self, values: Array) -> tuple[Array, Array | None]:
        """Local ids of values that are there, and the value of each entry (``None``: 1)."""
        key = self.seed.to_bytes(8, "little")

        def bucket(text: str) -> int:
            data = text.encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(data, digest_size=8, key=key).digest()
            return 1 + int.from_bytes(digest, "little") % self.buckets

        texts, inverse = _unique_texts(values)
        return np.array([bucket(text) for text in texts], dtype=np.int64)[inverse], None

    def names(self) -> Iterable[str]:
        """What each local id stands for."""
        return ["=<missing>", *(f"#{i}" for i in range(self.buckets))]


@dataclass
class Bins:
    """A feature for each of ``bins`` intervals that hold about equally many numbers, and one for a missing value.

    Args:
        bins: how many; as many as there are distinct numbers where these are fewer.

    An interval begins at a number that occurs in :meth:`FieldEncoder.fit`, and each has some. A number that makes up
    the share of a bin, or more, gets a bin of its own, the most frequent one first, and the others share the rest, as
    in LightGBM's ``GreedyFindBin``: where 95 of 100 numbers are zeros, the other five share all bins but one. It stays
    with its neighbours only where too few bins would be left for those below and those above it.
    """

    bins: int = 10
    edges: list[float] = field(default_factory=list)
    kind: ClassVar[Kind] = "bins"

    def __post_init__(self) -> None:
        (self.bins,) = check_positive("Bins", bins=self.bins)
        _check_elements("Bins: edges", self.edges, float | int, "a number")

    @property
    def num_features(self) -> int:
        """How many ids the field has."""
        return 2 + len(self.edges)

    def fit(self, values: Array) -> None:
        """Learn the inner edges: where each bin but the first begins."""
        numbers = _as_numbers(values)
        distinct, counts = np.unique(numbers[np.isfinite(numbers)], return_counts=True)
        self.edges = distinct[_bin_starts(counts, self.bins)[1:]].tolist()

    def encode(self, values: Array) -> tuple[Array, Array | None]:
        """Local ids of values that are there, and the value of each entry (``None``: 1)."""
        return 1 + np.searchsorted(np.array(self.edges), _as_numbers(values), side="right"), None

    def names(self) -> Iterable[str]:
        """What each local id stands for."""
        ends = pairwise(["-inf", *_texts_of_edges(self.edges), "inf"])
        return ["=<missing>", *(f" in [{low}, {high})" for low, high in ends)]


@dataclass
class Numeric:
    """One feature, whose value is the number itself; a missing number is no entry."""

    kind: ClassVar[Kind] = "numeric"

    @property
    def num_features(self) -> int:
        """How many ids the field has."""
        return 1

    def fit(self, values: Array) -> None:
        """Nothing is to be learnt, but whether they are numbers."""
        _as_numbers(values)

    def encode(self, values: Array) -> tuple[Array, Array | None]:
        """Local ids of values that are there, and the value of each entry.

        Raises:
            ValueError: a number is infinite.
        """
        with np.errstate(over="ignore"):
            numbers = _as_numbers(values).astype(np.float32)
        if not np.isfinite(numbers).all():
            bad = values[~np.isfinite(numbers)][0]
            raise ValueError(f"{bad} is not finite in float32")
        return np.zeros(len(numbers), dtype=np.int64), numbers

    def names(self) -> Iterable[str]:
        """What each local id stands for."""
        return [""]


Encoding = Vocabulary | Hash | Bins | Numeric
_ENCODINGS: dict[str, type[Encoding]] = {cls.kind: cls for cls in (Vocabulary, Hash, Bins, Numeric)}


class FieldEncoder:
    """Learns how the columns of a frame become features, and makes batches of frames. A column is a field.

    Frames are pandas and polars data frames, pyarrow tables and record batches, and dicts of arrays or lists. Missing
    are ``None``, NaN, NaT, what is masked and what the frame calls null. A column of lists is multi-hot: an entry for
    each element; a value among lists is a list of one, an empty list is a sample without entries in this field, a
    missing list is a missing value.

    Categories are told apart by their text, numbers by value: 1, 1.0, ``Decimal("1.00")``, ``True`` and ``"1"`` are the
    same, so that a column may be of integers here and, for a missing value, of floats there. So are times, whatever a
    frame has them in: an instant with a time zone is that in UTC, a date its midnight.

    Args:
        columns: column -> :class:`Vocabulary`, :class:`Hash`, :class:`Bins` or :class:`Numeric`, or the name of one
            (``"vocabulary"``, ``"hash"``, ``"bins"``, ``"numeric"``) with its defaults. ``None``: all columns of the
            frame that :meth:`fit` sees, floating-point ones as ``"bins"``, others as ``"vocabulary"``.

    In a scikit-learn pipeline it stands before an estimator of :mod:`ffm_ext.sklearn`. It has no place in a
    ``ColumnTransformer``, which joins arrays: :meth:`transform` gives a :class:`~ffm_ext.SparseBatch`.

    Raises:
        TypeError: ``columns`` is no mapping, or holds something else.
        ValueError: there is no encoding of that name.
    """

    def __init__(self, columns: Mapping[str, Kind | Encoding] | None = None) -> None:
        if columns is not None and not isinstance(columns, Mapping):
            raise TypeError(
                "FieldEncoder: columns must be a mapping from names to encodings, such as {'user': 'vocabulary'}, got "
                f"{type(columns).__name__}"
            )
        self._given = columns
        self._infer = columns is None
        self._is_fitted = False
        self.columns: dict[str, Encoding] = {}
        for name, encoding in (columns or {}).items():
            if isinstance(encoding, str):
                if encoding not in _ENCODINGS:
                    raise ValueError(
                        f"FieldEncoder: columns[{name!r}] = {encoding!r} is not one of "
                        f"{', '.join(get_args(Kind))}"
                    )
                encoding = _ENCODINGS[encoding]()
            if not isinstance(encoding, tuple(_ENCODINGS.values())):
                raise TypeError(
                    f"FieldEncoder: columns[{name!r}] = {encoding!r} is no Vocabulary, Hash, Bins or Numeric"
                )
            # What fit learns is of one column, and the caller's object may be that of several.
            self.columns[name] = copy.deepcopy(encoding)

    @property
    def num_fields(self) -> int:
        """F, the number of columns."""
        return len(self.columns)

    @property
    def field_names(self) -> tuple[str, ...]:
        """The columns, in the order of their fields."""
        return tuple(self.columns)

    @property
    def field_dims(self) -> tuple[int, ...]:
        """How many features each field has, ``F`` of them."""
        self._check_fitted()
        return tuple(encoding.num_features for encoding in self.columns.values())

    @property
    def num_features(self) -> int:
        """N, over all fields."""
        return sum(self.field_dims)

    @property
    def feature_fields(self) -> Tensor:
        """The field of each feature, ``[N]`` int32."""
        return fields_of_features(self.field_dims).int()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What each of the N features stands for, such as ``"user=alice"``, ``"age in [20, 30)"``, ``"site#17"``."""
        self._check_fitted()
        return tuple(
            f"{name}{rest}" for name, encoding in self.columns.items() for rest in encoding.names()
        )

    @property
    def n_features_in_(self) -> int:
        """How many columns :meth:`fit` has taken, as scikit-learn calls it: F. Before, an ``AttributeError``."""
        return len(self.feature_names_in_)

    @property
    def feature_names_in_(self) -> Array:
        """The columns that :meth:`fit` has taken, ``[F]`` objects. Before, an ``AttributeError``."""
        if not self._is_fitted:
            raise AttributeError("FieldEncoder: call fit first")
        return np.fromiter(self.columns, dtype=object, count=self.num_fields)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What the constructor was given, for scikit-learn, which makes copies that are not fitted of it."""
        return {"columns": self._given}

    def set_params(self, **params: Any) -> FieldEncoder:
        """Begin anew, not fitted, with other ``columns``.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if params:
            self.__init__(**params)  # type: ignore[misc]
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return self._is_fitted

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(),
            input_tags=InputTags(string=True, categorical=True, allow_nan=True),
        )

    def fit(self, frame: Any, y: Any = None) -> FieldEncoder:
        """Learn vocabularies and bins. After an error, the encoder is as it was.

        Args:
            frame: see above.
            y: not used: a pipeline gives it.

        Raises:
            KeyError: the frame lacks a column.
            ValueError: columns differ in length, one is there twice or of a type that has no encoding, numbers are
                asked of a column that holds none, or a category is not hashable.
        """
        found = columns_of(frame, None if self._infer else self.columns)
        columns = copy.deepcopy(self.columns)
        if self._infer:
            columns = {
                name: Bins() if column.values.dtype.kind == "f" else Vocabulary()
                for name, column in found.items()
            }
        for name, encoding in columns.items():
            with naming(name):
                encoding.fit(found[name].values)
        self.columns = columns
        self._is_fitted = True
        return self

    def transform(self, frame: Any) -> SparseBatch:
        """A batch of the frame's rows; the entries of a row in the order of the fields.

        Raises:
            KeyError: the frame lacks a column.
            RuntimeError: :meth:`fit` has not been called.
            ValueError: columns differ in length, one is there twice or of a type that has no encoding, should hold
                numbers and does not, is ``"numeric"`` and holds lists or an infinite number, or holds a category that
                is not hashable.
        """
        self._check_fitted()
        found = columns_of(frame, self.columns)
        fields = []
        begin = 0
        for name, encoding in self.columns.items():
            with naming(name):
                fields.append(_encode(found[name], encoding, begin))
            begin += encoding.num_features
        return _interleave(fields, len(next(iter(found.values())).counts) if found else 0)

    def fit_transform(self, frame: Any, y: Any = None) -> SparseBatch:
        """:meth:`fit`, then :meth:`transform`."""
        return self.fit(frame).transform(frame)

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON, for :meth:`load`. The file is there whole, or as it was.

        Raises:
            RuntimeError: it is not fitted.
            TypeError: a column's name is no text, number or ``None``, nor a tuple of these.
            OSError: it cannot be written.
        """
        self._check_fitted()
        info = {
            "format": FORMAT,
            "version": VERSION,
            "columns": [
                {"name": name, "kind": encoding.kind, **asdict(encoding)}
                for name, encoding in self.columns.items()
            ],
        }
        text = json.dumps(info, indent=1, default=_number_of_name)
        with atomic_write(path) as new:
            new.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FieldEncoder:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is corrupt, holds something else, or is of a later version.
            OSError: it cannot be read.
        """
        try:
            info = json.loads(Path(path).read_text(encoding="utf-8"))
            if info["format"] != FORMAT or info["version"] != VERSION:
                raise ValueError(f"it is not {FORMAT} of version {VERSION}")
            encoder = cls({})
            for column in info["columns"]:
                name, kind = column.pop("name"), column.pop("kind")
                encoder.columns[_name_of_json(name)] = _ENCODINGS[kind](**column)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: corrupt: {type(error).__name__}: {error}") from None
        encoder._given = dict(encoder.columns)
        encoder._is_fitted = True
        return encoder

    def _check_fitted(self) -> None:
        if not self._is_fitted:
            raise RuntimeError("FieldEncoder: call fit first")

    def __repr__(self) -> str:
        columns = ", ".join(f"{name}: {e.kind}" for name, e in self.columns.items())
        return f"FieldEncoder({columns or 'not fitted'})"


def _encode(column: Column, encoding: Encoding, begin: int) -> tuple[Array, Array | None, Array]:
    """Global ids, values, and how many of them each row has."""
    is_numeric = isinstance(encoding, Numeric)
    if is_numeric and column.is_list:
        raise ValueError("a numeric column cannot hold lists")
    ids, values = encoding.encode(column.values)
    counts = column.counts
    if not is_numeric and column.missing.any():
        # A missing value has no entry yet, and gets that of local id 0.
        ids = np.insert(ids, (counts.cumsum() - counts)[column.missing], 0)
        counts = counts + column.missing
    return ids + begin, values, counts


def _interleave(fields: list[tuple[Array, Array | None, Array]], n: int) -> SparseBatch:
    """The entries of all fields, row by row."""
    rows = sum((counts for _, _, counts in fields), np.zeros(n, dtype=np.int64))
    offsets = np.concatenate([[0], rows.cumsum()])
    indices = np.empty(offsets[-1], dtype=np.int64)
    field_of = np.empty(offsets[-1], dtype=np.int64)
    reals = np.ones(offsets[-1], dtype=np.float32)
    starts = offsets[:-1].copy()
    for f, (ids, values, counts) in enumerate(fields):
        before = counts.cumsum() - counts
        at = np.repeat(starts - before, counts) + np.arange(len(ids))
        indices[at], field_of[at] = ids, f
        if values is not None:
            reals[at] = values
        starts += counts
    tensors = map(torch.from_numpy, (indices, field_of, reals, offsets))
    return compact(SparseBatch(*tensors))


def _bin_starts(counts: npt.NDArray[np.int64], bins: int) -> npt.NDArray[np.int64]:
    """Where each of ``min(bins, d)`` bins begins among ``d`` distinct numbers that occur ``counts`` times."""
    starts = []
    parts = [(0, len(counts), bins)]
    while parts:
        begin, end, bins = parts.pop()
        some = counts[begin:end]
        if len(some) <= bins:
            starts.append(np.arange(begin, end))
            continue
        upto = some.cumsum()
        rows = int(upto[-1])
        heaviest = int(some.argmax())
        if bins <= 2 or some[heaviest] * bins < rows:
            # A number goes where its middle lies. All being narrower than a bin, middles are less than
            # a bin apart, so that each bin has one. Two bins have those of the least and the largest.
            cells = (2 * upto - some) * bins // (2 * rows)
            starts.append(begin + np.flatnonzero(np.diff(cells, prepend=-1)))
            continue
        # The others share the bins that are left: each side one at least, and not more than it has numbers.
        below, above = heaviest, len(some) - heaviest - 1
        share = (bins - 1) * (upto[heaviest] - some[heaviest]) / (rows - some[heaviest])
        least, most = max(below > 0, bins - 1 - above), min(below, bins - 1 - (above > 0))
        lower = min(max(round(share), least), most)
        middle = begin + heaviest
        parts.append((begin, middle, lower))
        parts.append((middle, middle + 1, 1))
        parts.append((middle + 1, end, bins - 1 - lower))
    return np.sort(np.concatenate(starts))


def _texts_of_edges(edges: list[float]) -> list[str]:
    """With six digits, or as many more as it takes to tell them apart."""
    for digits in range(6, 16):
        texts = [f"{edge:.{digits}g}" for edge in edges]
        if len(set(texts)) == len(edges):
            return texts
    return list(map(repr, edges))


def _unique_texts(values: Array) -> tuple[list[str], Array]:
    """The texts of ``values``, each about once, and which of them each value has."""
    if values.dtype.kind != "O":
        unique, inverse = np.unique(values, return_inverse=True)
        if unique.dtype.kind in "mM":
            return _texts_of_times(unique), inverse
        return list(map(_text, unique.tolist() if unique.dtype.kind != "f" else unique)), inverse
    numbers: dict[Any, int] = {}
    try:
        inverse = np.fromiter(
            (numbers.setdefault(value, len(numbers)) for value in values), np.int64, len(values)
        )
    except TypeError as error:
        raise ValueError(f"a category must be hashable: {error}") from None
    return list(map(_text, numbers)), inverse


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    # Instants and durations of pandas have nanoseconds; this is what they are to numpy, in UTC.
    value = getattr(value, "asm8", value)
    if isinstance(value, np.datetime64 | np.timedelta64):
        return _texts_of_times(np.array([value]))[0]
    if isinstance(value, bool | int | np.bool_ | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return str(int(value)) if float(value).is_integer() else str(value)
    if isinstance(value, Decimal):
        return _text_of_decimal(value)
    if isinstance(value, datetime.datetime) and value.utcoffset() is not None:
        value = value.astimezone(datetime.timezone.utc).replace(tzinfo=None)
    elif isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _texts_of_times(times: Array) -> list[str]:
    """Instants and durations of numpy as ``datetime.isoformat`` and ``str(timedelta)`` have them.

    Nanoseconds, which those lack, have three places more where they are not zero.
    """
    kind, (unit, _) = times.dtype.kind, np.datetime_data(times.dtype)
    unit, scale = ("ns", 1) if unit in ("ns", "ps", "fs", "as") else ("us", 1000)
    seconds, parts = np.divmod(times.astype(f"{kind}8[{unit}]").astype(np.int64), 10**9 // scale)
    whole = (
        np.datetime_as_string(seconds.astype("M8[s]")).tolist()
        if kind == "M"
        else [str(datetime.timedelta(seconds=number)) for number in seconds.tolist()]
    )
    return [
        f"{text}.{part:09d}".removesuffix("000") if part else text
        for text, part in zip(whole, (parts * scale).tolist(), strict=True)
    ]


def _text_of_decimal(value: Decimal) -> str:
    """As that of the integer or the float of this value, or of the float that is written so."""
    number = float(value)
    if value.is_finite() and value == value.to_integral_value():
        return f"{value:f}".partition(".")[0] if value else "0"
    if value == number or value == Decimal(str(number)):
        return str(number)
    return f"{value:f}".rstrip("0")


def _as_numbers(values: Array) -> npt.NDArray[np.float64]:
    try:
        if values.dtype.kind in "biufO":
            return values.astype(np.float64)
    except OverflowError:
        raise ValueError("integers do not fit float64") from None
    except (TypeError, ValueError):
        pass
    is_time, got = values.dtype.kind in "mM", str(values.dtype)
    if values.dtype.kind == "O":
        types = set(map(type, values))
        is_time = any(issubclass(t, datetime.date | datetime.timedelta) for t in types)
        got = ", ".join(sorted(t.__name__ for t in types))
    how = (
        ". Make numbers of times first, such as seconds: (column - start).dt.total_seconds() in pandas and polars, or "
        "casts to timestamp('s') and int64 in Arrow"
    )
    raise ValueError(f"numbers are needed, got {got}{how if is_time else ''}")


def _check_elements(where: str, elements: Any, kind: Any, what: str) -> None:
    if not isinstance(elements, list):
        raise TypeError(f"{where} must be a list, got {type(elements).__name__}")
    for i, element in enumerate(elements):
        if not isinstance(element, kind) or isinstance(element, bool):
            raise TypeError(f"{where}[{i}] = {element!r} must be {what}")


def _number_of_name(part: Any) -> Any:
    if isinstance(part, np.generic):
        return part.item()
    raise TypeError(f"FieldEncoder.save: a column's name has {part!r}, which JSON cannot hold")


def _name_of_json(name: Any) -> Any:
    """JSON has lists for tuples, which the names of a frame with several levels are."""
    return tuple(_name_of_json(part) for part in name) if isinstance(name, list) else name
