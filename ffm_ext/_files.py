# SPDX-License-Identifier: MIT
"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_write", "check_writable", "flush_to_disk"]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that a reader sees the old one or the whole new one, and a crash or a full disk leaves the old.

    ::

        with atomic_write("model.bin") as temporary:
            temporary.write_bytes(…)

    Yields the path of an empty file in the folder of ``path``. Without an exception it is flushed to the disk and takes
    the place and the permissions of ``path``; with one it is removed. A symbolic link stays one: what it points to is
    replaced.

    Raises:
        OSError: the folder does not exist, cannot be written to, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")
    # Not tempfile, whose files only their owner may read: umask has its say here.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        flush_to_disk(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The name, too, is on the disk only once its folder is.
    flush_to_disk(target.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError where ``path`` cannot be made or replaced."""
    folder = os.path.dirname(os.path.realpath(path))
    problem = 0
    if os.path.isdir(path):
        problem = errno.EISDIR
    elif os.path.exists(path) and not os.path.isfile(path):  # a device or FIFO is written to
        problem = 0 if os.access(path, os.W_OK) else errno.EACCES
    elif not os.path.isdir(folder):
        problem = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = errno.EACCES
    if problem:
        raise OSError(problem, os.strerror(problem), os.fspath(path))


def flush_to_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
