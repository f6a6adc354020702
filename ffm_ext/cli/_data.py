# SPDX-License-Identifier: MIT
"""Libffm text and dataset folders, as the subcommands read them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from .._files import is_stream
from ..data import SparseDataset, iter_libffm, open_dataset, read_libffm
from ..data._dataset import check_shard


def check_data(lenient: bool, *paths: Path | None) -> None:
    """See whether paths, where they are given, can be those of data, before one is opened: a pipe waits for a writer.

    Raises:
        ValueError: one cannot, or ``lenient`` would do nothing.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        if is_stream(path):
            raise ValueError(f"{path}: data is read from a file, not from a pipe or a device")
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(2) == b"\x1f\x8b":
                    raise ValueError(f"{path}: it is compressed by gzip; gunzip it first")
    if lenient and all(path.is_dir() for path in given):
        raise ValueError(f"--lenient is for lines of text, and {given[0]} is a folder")


def load_data(path: Path, lenient: bool = False) -> SparseDataset:
    """A folder that ``convert`` made, or a libffm text. How many lines were skipped is said."""
    data = open_dataset(path) if path.is_dir() else read_libffm(path, lenient=lenient)
    report_skipped(data.metadata.get("skipped", 0), path)
    return data


def data_in_pieces(path: Path, lenient: bool = False) -> Iterator[SparseDataset]:
    """The same, a piece of a text or a shard of a folder at a time: it may be larger than memory."""
    if not path.is_dir():
        yield from iter_libffm(path, lenient=lenient)
        return
    data = open_dataset(path)
    N, F = data.num_features, data.num_fields
    for number, shard in enumerate(data.shards):
        check_shard(f"{path}: shards[{number}]", shard, N, F)
        yield SparseDataset([shard], num_features=N, num_fields=F)


def report_skipped(skipped: int, path: Path) -> None:
    if skipped:
        print(f"{path}: {skipped} broken lines skipped", file=sys.stderr)
