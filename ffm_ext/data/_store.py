# SPDX-License-Identifier: MIT
"""Datasets as folders: a safetensors file a shard, and ``dataset.json``.

::

    dataset.json           {"format": "ffm_ext.SparseDataset", "version": 1, "num_features": …, "num_fields": …,
                            "shards": [{"samples": …, "entries": …}, …], "metadata": {…},
                            "id": of this writing, by which a pickle finds out that the folder has been replaced}
    part-00000.safetensors  labels [n] float32, offsets [n + 1], fields [nnz], indices [nnz] int32 or int64,
                            values [nnz] float32 (if not all are 1), weights [n] float32 (if there are any)
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ffm_ext._files import beside, flush_to_disk, put_in_place
from ffm_ext.batch import SparseBatch

from ._dataset import Shard, SparseDataset

FORMAT, VERSION = "ffm_ext.SparseDataset", 1
INFO = "dataset.json"


def open_dataset(folder: str | PathLike[str]) -> SparseDataset:
    """Open what :meth:`SparseDataset.save` or :func:`convert_libffm` wrote.

    It is memory-mapped: samples are read from the disk when they are used, and the system drops them when memory is
    short. Writing to its tensors does not change the files. It is pickled as the path of its folder; unpickling it once
    another dataset is there is a ValueError. Copies are made of the tensors, deep ones in memory.

    Raises:
        FileNotFoundError: ``folder``, or a file of it, is not there.
        NotADirectoryError: it is a file.
        ValueError: a file is corrupt, truncated or of a later version; the message names it.
    """
    path = Path(os.path.abspath(folder))
    info = _read_info(path)
    shards = [
        _open_shard(path / _part_name(i), samples, entries)
        for i, (samples, entries) in enumerate(info["shards"])
    ]
    dataset = SparseDataset(
        shards,
        num_features=info["num_features"],
        num_fields=info["num_fields"],
        metadata=info["metadata"],
    )
    dataset._source = (_open_again, (str(path), info["id"]))
    return dataset


def _open_again(
    folder: str,
    identity: str | int,
    num_features: int,
    num_fields: int,
    metadata: dict[str, Any],
) -> SparseDataset:
    """What a pickled dataset becomes."""
    dataset = open_dataset(folder)
    if dataset._source != (_open_again, (folder, identity)):
        raise ValueError(
            f"{folder}: another dataset has taken the place of the one that was pickled"
        )
    dataset.num_features, dataset.num_fields, dataset.metadata = num_features, num_fields, metadata
    return dataset


class DatasetWriter:
    """Writes a dataset folder a shard at a time; it is there after :meth:`finish`, whole, or not at all.

    Use it in a ``with`` statement: leaving it without :meth:`finish` leaves nothing behind.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(os.path.realpath(folder))
        _check_replaceable(self.folder)
        self._new = beside(self.folder)
        self._shards: list[dict[str, int]] = []

    def __enter__(self) -> DatasetWriter:
        self._new.mkdir()
        return self

    @property
    def num_shards(self) -> int:
        """How many have been written."""
        return len(self._shards)

    def add(self, shard: Shard) -> None:
        """Write one more shard.

        Raises:
            OSError: it cannot be written.
        """
        batch = shard.batch
        tensors = {
            "labels": shard.labels,
            "offsets": batch.offsets,
            "fields": batch.fields,
            "indices": batch.indices,
            "values": batch.values,
            "weights": shard.weights,
        }
        path = self._new / _part_name(len(self._shards))
        try:
            save_file(_apart({k: v for k, v in tensors.items() if v is not None}), path)
        except SafetensorError as error:
            raise OSError(f"{self.folder}: {error}") from error
        path.chmod(
            self._new.stat().st_mode & 0o666
        )  # as the umask has it: save_file makes it private
        flush_to_disk(path)
        self._shards.append({"samples": len(batch), "entries": batch.nnz})

    def finish(self, num_features: int, num_fields: int, metadata: dict[str, Any]) -> None:
        """Put the folder in its place."""
        info = {
            "format": FORMAT,
            "version": VERSION,
            "num_features": num_features,
            "num_fields": num_fields,
            "shards": self._shards,
            "metadata": metadata,
            "id": secrets.token_hex(8),
        }
        path = self._new / INFO
        path.write_text(json.dumps(info, indent=1), encoding="utf-8")
        flush_to_disk(path)
        flush_to_disk(self._new)
        _check_replaceable(self.folder)
        put_in_place(self._new, self.folder)
        flush_to_disk(self.folder.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._new, ignore_errors=True)  # after an exchange: what was there before


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    found, end = {name: tensor.contiguous() for name, tensor in tensors.items()}, 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            found[name] = tensor.clone()
        else:
            end = tensor.data_ptr() + tensor.nbytes
    return found


def _part_name(i: int) -> str:
    return f"part-{i:05d}.safetensors"


def _check_replaceable(folder: Path) -> None:
    """A folder may be replaced that is empty, or a dataset and nothing besides: whatever else there is is the user's.

    Raises:
        FileExistsError: it is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        info = _read_info(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise FileExistsError(
            f"{folder} exists and is not a dataset; it is left as it is ({error})"
        ) from None
    known = {INFO, *map(_part_name, range(len(info["shards"])))}
    others = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if others:
        raise FileExistsError(
            f"{folder} holds more than a dataset, such as {others[0]!r}; it is left as it is"
        )


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        written = path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_file():
            raise NotADirectoryError(
                f"{folder} is a file, and a dataset is a folder: read_libffm reads a text, convert_libffm makes it one"
            ) from None
        what = f"has no {INFO}" if folder.exists() else "is not there"
        raise FileNotFoundError(f"{folder} {what}: it is not a dataset") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: corrupt: {error}") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{path}: it does not describe a dataset (format is not {FORMAT!r})")
    if info.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {info.get('version')!r} is not known here, only {VERSION}"
        )
    try:
        return {
            "num_features": _count(info["num_features"]),
            "num_fields": _count(info["num_fields"]),
            "shards": [(_count(s["samples"]), _count(s["entries"])) for s in info["shards"]],
            "metadata": dict(info["metadata"]),
            # A folder without one is known by when it was written.
            "id": str(info["id"]) if "id" in info else written,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: corrupt: {type(error).__name__}: {error}") from None


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a count")
    return number


def _open_shard(path: Path, samples: int, entries: int) -> Shard:
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there: the dataset is not whole") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: corrupt or truncated: {error}") from None

    def take(name: str, size: int, *dtypes: torch.dtype) -> Tensor:
        tensor = found.get(name)
        if tensor is None:
            raise ValueError(f"{path}: corrupt: {name} is missing")
        if tensor.shape != (size,) or tensor.dtype not in dtypes:
            raise ValueError(
                f"{path}: corrupt: {name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"expected {dtypes[0]} of shape {[size]}"
            )
        return tensor

    indices = take("indices", entries, torch.int32, torch.int64)
    offsets = take("offsets", samples + 1, indices.dtype)
    if int(offsets[0]) != 0 or int(offsets[-1]) != entries:
        raise ValueError(
            f"{path}: corrupt: offsets go from {int(offsets[0])} to {int(offsets[-1])}, "
            f"there are {entries} entries"
        )
    return Shard(
        SparseBatch(
            indices,
            take("fields", entries, indices.dtype),
            take("values", entries, torch.float32) if "values" in found else None,
            offsets,
        ),
        take("labels", samples, torch.float32),
        take("weights", samples, torch.float32) if "weights" in found else None,
    )
