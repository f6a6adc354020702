# SPDX-License-Identifier: MIT
"""Text of libffm and libsvm, to datasets and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffm_ext import _C
from ffm_ext._arguments import as_tensor, check_num_threads, check_size, is_integral
from ffm_ext._files import atomic_write
from ffm_ext.batch import SparseBatch

from ._dataset import Shard, SparseDataset, check_shard, placed
from ._store import DatasetWriter, open_dataset

# Descriptions of faults that a lenient reader keeps.
MAX_PROBLEMS = 10
# Samples that are written as text at a time.
_LINES_AT_ONCE = 4096


def read_libffm(
    path: str | PathLike[str],
    *,
    lenient: bool = False,
    num_features: int | None = None,
    num_fields: int | None = None,
    num_threads: int | None = None,
) -> SparseDataset:
    """Read ``label field:feature:value …`` lines, as libffm and xLearn have them.

    Lines may be of any length and end in LF or CRLF, the last one in neither. Spaces and tabs separate. Blank lines are
    left out; a label alone is a sample without entries. Labels and values are decimal numbers, read to the nearest
    float32; labels stay as they are in the file. The file is memory-mapped and must not be cut short meanwhile.

    Args:
        path: of a regular file.
        lenient: leave out lines with a fault; ``metadata["skipped"]`` counts them, ``metadata["problems"]`` describes
            the first ten. Otherwise the first fault is an error.
        num_features: N: a feature from here on is a fault. ``None``: one more than the largest.
        num_fields: F, likewise.
        num_threads: ``None``: ``torch.get_num_threads()``. The result is the same for any number.

    Raises:
        ValueError: a fault, as ``path:line:column: what is wrong``: a colon, number or label is missing, an id is
            negative or too large, a number is not finite, something follows the value.
        OSError: the file is not there, is a folder, or cannot be read.
    """
    limits = _limits(path, lenient, num_features, num_fields, num_threads)
    return _whole(_read(path, limits), limits)


def read_libsvm(
    path: str | PathLike[str],
    feature_fields: Any,
    *,
    lenient: bool = False,
    num_fields: int | None = None,
    num_threads: int | None = None,
) -> SparseDataset:
    """Read ``label feature:value …`` lines, as libsvm has them, with the field of every feature.

    Args:
        path: of a regular file.
        feature_fields: the field of each feature, ``[N]`` integers. Features are numbered as they are in the file:
            where they count from 1, ``feature_fields[0]`` belongs to no feature.
        lenient, num_threads: as for :func:`read_libffm`.
        num_fields: F; ``None``: one more than the largest of ``feature_fields``.

    Raises:
        ValueError: as :func:`read_libffm`; a feature from N on is a fault. Or ``feature_fields`` holds no fields.
        OSError: as :func:`read_libffm`.
    """
    fields = as_tensor(feature_fields)
    if fields.dim() != 1 or not is_integral(fields):
        raise ValueError(
            f"read_libsvm: feature_fields must be [N] integers, got {fields.dtype} "
            f"of shape {list(fields.shape)}"
        )
    least, most = (int(fields.min()), int(fields.max())) if fields.numel() else (0, -1)
    num_fields = most + 1 if num_fields is None else num_fields
    if least < 0 or most >= num_fields:
        raise ValueError(
            f"read_libsvm: feature_fields are in [{least}, {most}], which is not in [0, {num_fields})"
        )
    limits = _limits(path, lenient, fields.numel(), num_fields, num_threads)
    return _whole(_read(path, limits, feature_fields=fields.cpu().long()), limits)


def convert_libffm(
    path: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    shard_bytes: int = 256 << 20,
    lenient: bool = False,
    num_features: int | None = None,
    num_fields: int | None = None,
    num_threads: int | None = None,
) -> SparseDataset:
    """Convert libffm text of any size to a dataset folder, a shard at a time.

    Args:
        path: as for :func:`read_libffm`, with the other arguments.
        folder: where :func:`open_dataset` finds it; a dataset that is there already is replaced when all is done.
        shard_bytes: about how much text goes into a shard. Memory that is needed is about three times as much.

    Returns:
        The dataset, opened.

    Raises:
        ValueError: as :func:`read_libffm`; then ``folder`` is as it was.
        OSError: as :func:`read_libffm` and :meth:`SparseDataset.save`.
    """
    if shard_bytes <= 0:
        raise ValueError(f"convert_libffm: shard_bytes = {shard_bytes} must be positive")
    limits = _limits(path, lenient, num_features, num_fields, num_threads)
    max_index = max_field = -1
    skipped, problems = 0, list[str]()
    with DatasetWriter(folder) as writer:
        for piece in _pieces(path, limits, shard_bytes):
            if len(piece.shard.batch):
                writer.add(piece.shard)
            max_index = max(max_index, piece.max_index)
            max_field = max(max_field, piece.max_field)
            skipped += piece.skipped
            problems += piece.problems
        if writer.num_shards == 0:
            writer.add(piece.shard)
        writer.finish(
            max_index + 1 if limits.num_features is None else limits.num_features,
            max_field + 1 if limits.num_fields is None else limits.num_fields,
            lenient_metadata(lenient, skipped, problems),
        )
    return open_dataset(folder)


def iter_libffm(
    path: str | PathLike[str],
    *,
    piece_bytes: int = 64 << 20,
    lenient: bool = False,
    num_features: int | None = None,
    num_fields: int | None = None,
    num_threads: int | None = None,
) -> Iterator[SparseDataset]:
    """Read libffm text of any size a piece at a time.

    Args:
        path: as for :func:`read_libffm`, with the other arguments; line numbers, and the ten faults that
            ``metadata["problems"]`` describes, count over all pieces, ``metadata["skipped"]`` is that of a piece.
        piece_bytes: about how much text makes a piece. Memory that is needed is about three times as much.

    Yields:
        At least one dataset. Its sizes are, where they are not given, those of the piece alone.

    Raises:
        ValueError: as :func:`read_libffm`, when the piece with the fault is reached.
        OSError: as :func:`read_libffm`.
    """
    if piece_bytes <= 0:
        raise ValueError(f"iter_libffm: piece_bytes = {piece_bytes} must be positive")
    limits = _limits(path, lenient, num_features, num_fields, num_threads)
    return (_whole(piece, limits) for piece in _pieces(path, limits, piece_bytes))


def write_libffm(dataset: SparseDataset, path: str | PathLike[str]) -> None:
    """Write a dataset as libffm text, which :func:`read_libffm` reads to the same numbers, bit by bit.

    The file is written beside ``path`` and then renamed.

    Raises:
        ValueError: the dataset has weights, for which the format has no place, a number is not finite, or offsets are
            wrong.
        IndexError: an id is outside the dataset's sizes.
        OSError: it cannot be written.
    """
    if any(shard.weights is not None for shard in dataset.shards):
        raise ValueError("write_libffm: libffm's text has no place for weights")
    for place, shard in placed("write_libffm", dataset.shards):
        check_shard(place, shard, dataset.num_features, dataset.num_fields)
    with atomic_write(path) as new, open(new, "w", encoding="ascii", newline="\n") as file:
        for batch, labels, _ in dataset.batches(_LINES_AT_ONCE):
            values = ["1"] * batch.nnz if batch.values is None else _decimals(batch.values)
            entries = list(
                map("{}:{}:{}".format, batch.fields.tolist(), batch.indices.tolist(), values)
            )
            ends = batch.offsets.tolist()
            for b, label in enumerate(_decimals(labels)):
                file.write(" ".join([label, *entries[ends[b] : ends[b + 1]]]) + "\n")


class _Limits(NamedTuple):
    lenient: bool
    num_features: int | None
    num_fields: int | None
    num_threads: int | None


def _limits(
    path: str | PathLike[str],
    lenient: bool,
    num_features: int | None,
    num_fields: int | None,
    num_threads: int | None,
) -> _Limits:
    where = os.fsdecode(path)
    N, F = (
        None if size is None else check_size(where, name, size)
        for name, size in (("num_features", num_features), ("num_fields", num_fields))
    )
    return _Limits(lenient, N, F, check_num_threads(where, num_threads))


class _Piece(NamedTuple):
    shard: Shard
    max_index: int
    max_field: int
    skipped: int
    problems: list[str]
    num_lines: int
    end: int  # in bytes: where the next piece begins


def _read(
    path: str | PathLike[str],
    limits: _Limits,
    *,
    feature_fields: Tensor | None = None,
    begin: int = 0,
    end: int | None = None,
    first_line: int | None = 1,
    max_problems: int = MAX_PROBLEMS,
) -> _Piece:
    """The lines that begin in the bytes ``begin:end``.

    ``first_line`` is the number of the first of them; ``None``: it is counted where a fault has to be named.
    """
    lenient, num_features, num_fields, num_threads = limits
    path = os.fspath(path)
    found = _C.read_text(
        path,
        libsvm=feature_fields is not None,
        begin=begin,
        end=end,
        first_line=first_line or 1,
        num_features=num_features,
        num_fields=None if feature_fields is not None else num_fields,
        lenient=lenient,
        max_faults=max_problems,
        num_threads=num_threads or torch.get_num_threads(),
    )
    name = os.fsdecode(path)
    before = 0 if first_line is not None or not found["faults"] else _lines_before(path, begin)
    problems = [
        f"{name}:{before + line}:{column}: {what}" for line, column, what in found["faults"]
    ]
    if found["num_faults"] and not lenient:
        raise ValueError(problems[0])
    indices, values = torch.from_numpy(found["indices"]), found["values"]
    batch = SparseBatch(
        indices,
        feature_fields[indices]
        if feature_fields is not None
        else torch.from_numpy(found["fields"]),
        None if values is None else torch.from_numpy(values),
        torch.from_numpy(found["offsets"]),
    )
    return _Piece(
        Shard(batch, torch.from_numpy(found["labels"]), None),
        found["max_index"],
        found["max_field"],
        found["num_faults"],
        problems,
        found["num_lines"],
        found["end"],
    )


def read_ranges(
    path: str | PathLike[str], ranges: range, of: int, *, lenient: bool, num_threads: int | None
) -> list[_Piece]:
    """Some of the ``of`` ranges of equal length that the bytes of a libffm text fall into, a piece each.

    A line belongs to the range that its first byte is in, so that every line is in one range.
    """
    size = os.path.getsize(path)
    limits = _limits(path, lenient, None, None, num_threads)
    return [
        _read(path, limits, begin=size * i // of, end=size * (i + 1) // of, first_line=None)
        for i in ranges
    ]


def _lines_before(path: str, begin: int) -> int:
    """How many lines begin before the first one that begins at ``begin`` or after."""
    lines, before = 0, b"\n"
    with open(path, "rb") as file:
        while begin > 0 and (block := file.read(min(begin, 1 << 24))):
            lines += block.count(b"\n")
            begin, before = begin - len(block), block[-1:]
    return lines + (before != b"\n")


def _pieces(path: str | PathLike[str], limits: _Limits, size: int) -> Iterator[_Piece]:
    """The whole file, at least one piece."""
    begin, line, num_problems = 0, 1, 0
    while True:
        piece = _read(
            path,
            limits,
            begin=begin,
            end=begin + size,
            first_line=line,
            max_problems=MAX_PROBLEMS - num_problems,
        )
        is_empty = piece.end == begin
        if begin == 0 or not is_empty:
            yield piece
        if is_empty:
            return
        begin, line = piece.end, line + piece.num_lines
        num_problems += len(piece.problems)


def _whole(piece: _Piece, limits: _Limits) -> SparseDataset:
    N, F = limits.num_features, limits.num_fields
    return SparseDataset(
        [piece.shard],
        num_features=piece.max_index + 1 if N is None else N,
        num_fields=piece.max_field + 1 if F is None else F,
        metadata=lenient_metadata(limits.lenient, piece.skipped, piece.problems),
    )


def lenient_metadata(lenient: bool, skipped: int, problems: list[str]) -> dict[str, Any]:
    return {"skipped": skipped, "problems": problems} if lenient else {}


def _decimals(numbers: Tensor) -> list[str]:
    """The shortest decimals that are read as these float32 numbers."""
    return [text.removesuffix(".0") for text in numbers.numpy().astype("U").tolist()]
