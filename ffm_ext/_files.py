# SPDX-License-Identifier: MIT
"""Files and folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "atomic_write",
    "beside",
    "check_writable",
    "flush_to_disk",
    "is_same_file",
    "is_stream",
    "put_in_place",
    "save_tensors",
]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that a reader sees the old one or the whole new one, and a crash or a full disk leaves the old.

    ::

        with atomic_write("model.bin") as temporary:
            temporary.write_bytes(…)

    Yields the path of an empty file in the folder of ``path``. Without an exception it is flushed to the disk and takes
    the place and the permissions of ``path``, or of a new file where there was none; with one it is removed. A symbolic
    link stays one: what it points to is replaced. A pipe or a device stays what it is, and so does an open descriptor
    (``/dev/stdout``, ``/dev/fd/3``), also one of a file: it is sent the whole file at the end.

    Raises:
        OSError: ``path`` is a folder, its folder does not exist or cannot be written to, or the disk is full.
    """
    descriptor = _descriptor(path)
    if is_stream(path) or descriptor is not None:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "file")
            temporary.touch()
            yield temporary
            with (
                _naming(path),
                open(temporary, "rb") as file,
                _open_stream(path, descriptor) as stream,
            ):
                shutil.copyfileobj(file, stream)
        return
    target, temporary = _new_beside(path)
    new = temporary.stat()
    try:
        yield temporary
        with _naming(path):
            # Whoever wrote may have put a file of his own there: safetensors does, and only its owner may read that.
            mode = target.stat().st_mode if target.exists() else new.st_mode
            os.chmod(temporary, stat.S_IMODE(mode))
            flush_to_disk(temporary)
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The name, too, is on the disk only once its folder is.
    flush_to_disk(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """See whether :func:`atomic_write` could begin now, before the work whose result it is to keep.

    Raises:
        OSError: it could not; the text names ``path``.
    """
    descriptor = _descriptor(path)
    if descriptor is not None:
        with _naming(path):
            mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        may_write = mode != os.O_RDONLY
    elif is_stream(path):
        may_write = os.access(path, os.W_OK)
    else:
        _new_beside(path)[1].unlink()
        may_write = True
    if not may_write:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to what is neither file nor folder: nothing may take its place."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths name one file, by links too, or would if there were one. Pipes and devices are no files."""
    if is_stream(one):
        return False
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """The open descriptor of this process that a path, or a link there, stands for: of ``/dev/stdout`` 1.

    What it leads to may be a file, whose place is not that of the path: whoever opened it goes on writing to it.
    """
    name = os.fsdecode(path)
    shown = set(map(os.path.realpath, ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")))
    for _ in range(40):  # so many links Linux follows
        folder, last = os.path.split(name)
        folder = os.path.realpath(folder)
        name = os.path.join(folder, last)
        if folder in shown and last.isdecimal():
            return int(last)
        if not os.path.islink(name):
            break
        name = os.path.join(folder, os.readlink(name))
    return None


def _open_stream(path: str | os.PathLike[str], descriptor: int | None) -> BinaryIO:
    """What is neither file nor folder, or the descriptor that it stands for, at its place in its file."""
    if descriptor is None:
        return open(path, "wb")
    for written in (sys.stdout, sys.stderr):
        if written is not None:  # it may be the same file, and then comes first
            written.flush()
    return open(os.dup(descriptor), "wb")


def _new_beside(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that ``path`` names, or a link there, and a new one in its folder."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    temporary = beside(target)
    with _naming(path):
        # Not tempfile, whose files only their owner may read: umask has its say here.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return target, temporary


def beside(target: Path) -> Path:
    """A path that nobody uses, on the file system of ``target``."""
    return target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")


def put_in_place(new: Path, target: Path) -> None:
    """Give the folder ``new`` the name ``target``; what had it is afterwards called ``new``, or removed."""
    if target.exists():
        # Linux can exchange two names at once; so there is no moment at which neither folder is there.
        here, exchange = -100, 2
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
        if renameat2 and not renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange):
            return
        old = beside(target)
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(target)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors inside name the path that was asked for, not what it takes to write there."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def flush_to_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(
    where: str,
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file by :func:`atomic_write`: the same bytes for the same contents.

    Raises:
        OSError: it cannot be written; the text names ``where`` and ``path``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{where}: {os.fspath(path)}: {error}") from error
        if metadata is not None:
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the texts of a file in any order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # Blanks at its end are part of the format.
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
