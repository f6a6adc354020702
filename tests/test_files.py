# SPDX-License-Identifier: MIT
"""Files that are whole or not there, what is no file, and what can be known before there is anything to write."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ffm_ext import FFM, interop
from ffm_ext._files import atomic_write, check_writable, is_same_file


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    with atomic_write(link) as temporary:
        temporary.write_text("second")
    assert link.is_symlink()
    assert path.read_text() == "second"
    assert path.stat().st_mode & 0o777 == 0o640

    def interrupted() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("third")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "second"
    assert sorted(tmp_path.iterdir()) == [path, link]
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "no" / "where"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_another_file_in_the_place_of_the_new_one_has_its_permissions(
    umask: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o400))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_one_file_of_two_names(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    file = tmp_path / "file"
    assert is_same_file(file, tmp_path / "link") and is_same_file(file, tmp_path / "folder/../file")
    assert is_same_file(tmp_path / "new", tmp_path / "folder/../new")
    assert not is_same_file(file, tmp_path / "other") and not is_same_file(file, tmp_path / "new")
    assert not is_same_file("/dev/null", "/dev/null")


def test_a_pipe_stays_one_and_gets_the_file_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with atomic_write(pipe) as temporary:
        assert temporary != pipe
        temporary.write_bytes(b"hel")
        with open(temporary, "ab") as file:
            file.write(b"lo")
        assert not read
    reader.join(60)
    assert read == [b"hello"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_pipe_that_nobody_reads_any_more_is_named(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_RDONLY)), daemon=True)
    reader.start()
    with (
        pytest.raises(BrokenPipeError, match=re.escape(f"'{pipe}'")),
        atomic_write(pipe) as temporary,
    ):
        temporary.write_bytes(bytes(1 << 20))  # more than a pipe holds
    reader.join(60)


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd", "/proc/thread-self/fd", "link"])
@pytest.mark.parametrize("flags", [os.O_APPEND, 0])
def test_an_open_descriptor_stays_one_at_its_place_in_its_file(
    folder: str, flags: int, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old ")
    descriptor = os.open(path, os.O_WRONLY | flags)
    os.lseek(descriptor, 0, os.SEEK_END)
    name = Path(folder, str(descriptor))
    if folder == "link":
        name = tmp_path / "link"
        name.symlink_to(f"/dev/fd/{descriptor}")
    os.write(descriptor, b"before ")
    check_writable(name)
    with atomic_write(name) as temporary:
        temporary.write_bytes(b"new ")
    os.write(descriptor, b"after")
    os.close(descriptor)
    assert path.read_bytes() == b"old before new after"
    with pytest.raises(OSError, match=re.escape(f"'{name}'")):
        check_writable(name)


def test_a_descriptor_that_is_only_read_from(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with open(tmp_path / "file") as file:
        name = f"/dev/fd/{file.fileno()}"
        with pytest.raises(PermissionError, match=name):
            check_writable(name)
        with pytest.raises(OSError, match=name), atomic_write(name) as temporary:
            temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(("output", "number"), [("/dev/stdout", 1), ("/dev/fd/3", 3)])
def test_output_of_the_command_line_is_appended_where_it_is_told_to(
    output: str, number: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    interop.save_model(FFM(num_features=4, num_fields=2), tmp_path / "model")
    (tmp_path / "data").write_text("1 0:1:1 1:2:1\n0 0:0:1\n")
    (tmp_path / "file").write_text("old\n")
    predict = f"{sys.executable} -m ffm_ext predict data model {output} --json"
    done = subprocess.run(
        [
            *("sh", "-c"),
            f"(echo before >&{number}; {predict}; echo after >&{number}) {number}>>file",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    old, before, *scores, after = (tmp_path / "file").read_text().splitlines()
    assert (old, before, after) == ("old", "before", "after")
    if number == 1:
        assert scores.pop().startswith('{"samples": 2')
    assert len([float(score) for score in scores]) == 2


def test_what_cannot_be_written_is_known_before_and_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, error in (
        ("no/where", FileNotFoundError),
        ("file/below", NotADirectoryError),
        ("folder", IsADirectoryError),
    ):
        path = tmp_path / name
        message = re.escape(f"'{path}'") + "$"
        with pytest.raises(error, match=message):
            check_writable(path)
        with pytest.raises(error, match=message), atomic_write(path):
            pass
    (tmp_path / "file").write_text("old")
    for name in ("file", "new"):
        check_writable(tmp_path / name)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
