# SPDX-License-Identifier: MIT
"""The C++ reader of libffm and libsvm text, against one in Python, and what it says of every fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ffm_ext import _C, SparseBatch
from ffm_ext.data import SparseDataset, iter_libffm, read_libffm, read_libsvm, write_libffm

ROOT = Path(__file__).parents[1]

Lines = list[tuple[float, list[tuple[int, int, float]]]]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "train.ffm"
    path.write_bytes(text.encode("latin-1") if isinstance(text, str) else text)
    return path


def says(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def slowly(text: str) -> Lines:
    """What the text says, of whole libffm lines."""
    lines: Lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        label, *entries = line.split() or [""]
        if label:
            parts = [entry.split(":") for entry in entries]
            entries_of = [(int(f), int(i), float(np.float32(v))) for f, i, v in parts]
            lines.append((float(np.float32(label)), entries_of))
    return lines


def as_lines(dataset: SparseDataset) -> Lines:
    lines: Lines = []
    for batch, labels, _ in dataset.batches(1):
        values = torch.ones(batch.nnz) if batch.values is None else batch.values
        entries = zip(batch.fields.tolist(), batch.indices.tolist(), values.tolist(), strict=True)
        lines.append((labels.item(), list(entries)))
    return lines


ids = st.integers(0, 30) | st.integers(0, 2**31 - 1)
features = ids | st.integers(0, 2**63 - 3)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
samples = st.lists(
    st.tuples(floats, st.lists(st.tuples(ids, features, floats), max_size=4)), max_size=6
)


@given(samples=samples, data=st.data())
def test_any_layout_of_lines(
    samples: Lines, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")

    def choose(*options: str) -> str:
        return data.draw(st.sampled_from(options))

    def number(x: float) -> str:
        return choose(repr(x), f"{x:.9e}", f"{x:+.3f}", f"{x:.12G}", f"{x:.60f}")

    text = ""
    for label, entries in samples:
        text += choose("", " ", "\t") + number(label)
        for f, i, v in entries:
            text += (
                choose(" ", "  ", "\t")
                + f"{choose('', '0')}{f}:{choose('', '0' * 20)}{i}:{number(v)}"
            )
        text += choose("", " ", "\t ") + choose("\n", "\r\n", "\n\n", "\r\n \t\n")
    if choose("whole", "cut") == "cut":
        text = text.rstrip("\r\n")
    wanted = slowly(text)
    for threads in (1, 2, 5):
        found = read_libffm(written(folder, text), num_threads=threads)
        assert as_lines(found) == wanted
        assert found.num_features == max((i + 1 for _, es in wanted for _, i, _ in es), default=0)
        assert found.num_fields == max((f + 1 for _, es in wanted for f, _, _ in es), default=0)


@given(samples=samples)
@example(samples=[(1.0, [(2**31 - 1, 0, 1.0)])])
def test_written_and_read(samples: Lines, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "a.ffm"
    labels, entries = zip(*samples, strict=True) if samples else ((), ())
    batch = SparseBatch.from_lists(entries)
    dataset = SparseDataset.from_arrays(batch, labels)
    write_libffm(dataset, path)
    assert as_lines(read_libffm(path)) == as_lines(dataset) == slowly(path.read_text())


@given(
    text=st.from_regex(
        r"[+-]?([0-9]{1,25}\.?[0-9]{0,25}|\.[0-9]{1,25})([eE][+-]?[0-9]{1,3})?", fullmatch=True
    )
)
def test_numbers_are_the_nearest_float32(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("text"), text)
    with np.errstate(over="ignore"):
        wanted = np.float32(text)
    if np.isfinite(wanted):
        assert read_libffm(path).shards[0].labels.numpy() == wanted
    else:
        with pytest.raises(ValueError, match=r":1:1: label is too large for float32$"):
            read_libffm(path)


def test_double_rounding(tmp_path: Path) -> None:
    """Decimals next to the midpoint of two floats, where a way through double goes wrong."""
    for text, wanted in (
        ("1.00000005960464477540", 1.00000011920928955078125),  # just above the midpoint
        ("1.00000005960464477539", 1.0),
        ("1.000000059604644775390625", 1.0),  # the midpoint itself: to even
        ("1.0000000596046447753", 1.0),
        ("1e-45", 1.401298464324817e-45),
        ("7e-46", 0.0),
        ("1e-400", 0.0),
        ("0." + "0" * 500 + "1", 0.0),
        ("3.4028235e38", 3.4028234663852886e38),
        ("0e999", 0.0),
        ("1" + "0" * 30 + "e-30", 1.0),
    ):
        assert read_libffm(written(tmp_path, text)).shards[0].labels.item() == wanted, text


LIMIT = "it must be below 9223372036854775807"
FAULTS = {
    "1 317": "1:6: ':' expected after the field, got the end of the line",
    "1 3x17:1": "1:4: ':' expected after the field, got 'x'",
    "1 3:17": "1:7: ':' expected after the feature, got the end of the line",
    "1 3:17 4:1:1": "1:7: ':' expected after the feature, got a space",
    "1 3:17\t4:1:1": "1:7: ':' expected after the feature, got a tab",
    "1 3:1.5:1": "1:6: ':' expected after the feature, got '.'",
    "1 :3:1": "1:3: field expected, got ':'",
    "1 ::": "1:3: field expected, got ':'",
    "1 x:3:1": "1:3: field expected, got 'x'",
    "1 +2:3:1": "1:3: field expected, got '+'",
    "1 2::1": "1:5: feature expected, got ':'",
    "1 2: 3:1": "1:5: feature expected, got a space",
    "1 2:3:": "1:7: value expected, got the end of the line",
    "1 2:3: 1": "1:7: value expected, got a space",
    "1 2:3:x": "1:7: value expected, got 'x'",
    "1 2:3:-": "1:7: value expected, got '-'",
    "1 2:3:.": "1:7: value expected, got '.'",
    "1 2:3:e5": "1:7: value expected, got 'e'",
    "1 2:3:1x": "1:8: space expected after the value, got 'x'",
    "1 2:3:1e": "1:8: space expected after the value, got 'e'",
    "1 2:3:1e+": "1:8: space expected after the value, got 'e'",
    "1 2:3:0x10": "1:8: space expected after the value, got 'x'",
    "1 2:3:1,5": "1:8: space expected after the value, got ','",
    "1 2:3:4:5": "1:8: space expected after the value, got ':'",
    "1 2:3:1 # note": "1:9: field expected, got '#'",
    "1 -2:3:1": "1:3: field is negative",
    "1 2:-3:1": "1:5: feature is negative",
    "1 2:-:1": "1:5: feature expected, got '-'",
    "1 2:3:nan": "1:7: value is not finite",
    "1 2:3:-Inf": "1:7: value is not finite",
    "1 2:3:infinity": "1:7: value is not finite",
    "1 2:3:1e39": "1:7: value is too large for float32",
    "1 2:3:-1e9999999999999999999999": "1:7: value is too large for float32",
    "1 2147483648:3:1": "1:3: field 2147483648 is too large, it must be below 2147483648",
    "1 2:9223372036854775807:1": f"1:5: feature 9223372036854775807 is too large, {LIMIT}",
    "1 2:18446744073709551616:1": f"1:5: feature 18446744073709551616 is too large, {LIMIT}",
    "1 2:" + "9" * 99 + ":1": f"1:5: feature {'9' * 32}... is too large, {LIMIT}",
    "x": "1:1: label expected, got 'x'",
    "nan 1:1:1": "1:1: label is not finite",
    "-inf": "1:1: label is not finite",
    "1e99": "1:1: label is too large for float32",
    "1: 1:1:1": "1:1: label expected, got a feature",
    "1:1:1": "1:1: label expected, got a feature",
    "  0:1:1 1:1:1": "1:3: label expected, got a feature",
    "1, 1:1:1": "1:2: space expected after the label, got ','",
    "1 1:1:1\r1 1:1:1": "1:8: space expected after the value, got byte 0x0D",
    "\xef\xbb\xbf1 1:1:1": "1:1: label expected, got byte 0xEF",
    "1 1:1:1\0": "1:8: space expected after the value, got byte 0x00",
}


@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=["no end", "LF", "CRLF"])
@pytest.mark.parametrize("line", FAULTS)
def test_faults(line: str, end: str, tmp_path: Path) -> None:
    path = written(tmp_path, line + end)
    with says(f"{path}:{FAULTS[line]}"):
        read_libffm(path)

    good = "1 0:1:0.5\r\n\n0 1:2:1\n"
    path = written(tmp_path, good + line + end + ("" if end == "" else good))
    wanted = f"{path}:4:{FAULTS[line].partition(':')[2]}"
    for threads in (1, 3):
        with says(wanted):
            read_libffm(path, num_threads=threads)
        found = read_libffm(path, lenient=True, num_threads=threads)
        assert found.metadata == {"skipped": 1, "problems": [wanted]}
        assert as_lines(found) == slowly(good) * (1 if end == "" else 2)
        assert (found.num_features, found.num_fields) == (3, 2)


def test_limits(tmp_path: Path) -> None:
    path = written(tmp_path, "1 0:1:1\n1 2:5:1\n")
    assert read_libffm(path, num_features=10, num_fields=7).num_features == 10
    assert read_libffm(path, num_features=6, num_fields=3).num_fields == 3
    with pytest.raises(
        ValueError, match=r"train\.ffm:2:5: feature 5 is too large, it must be below 5$"
    ):
        read_libffm(path, num_features=5)
    with pytest.raises(
        ValueError, match=r"train\.ffm:2:3: field 2 is too large, it must be below 2$"
    ):
        read_libffm(path, num_fields=2)
    with pytest.raises(ValueError, match=r"train\.ffm: num_threads = 0 must be positive"):
        read_libffm(path, num_threads=0)
    with pytest.raises(ValueError, match=r"train\.ffm: num_fields = -1 is negative"):
        read_libffm(path, num_fields=-1)
    with pytest.raises(TypeError, match=r"train\.ffm: num_features = 1\.5 must be an integer"):
        read_libffm(path, num_features=1.5)  # type: ignore[arg-type]
    large = written(tmp_path, f"1 {2**32 + 1}:0:1 0:1:1\n")
    with pytest.raises(
        ValueError, match=r":1:3: field 4294967297 is too large, it must be below 2147483648"
    ):
        read_libffm(large, num_fields=2**33)
    assert read_libffm(path, num_features=5, lenient=True).metadata["skipped"] == 1


@pytest.mark.parametrize("text", ["", "\n", "\r\n\r\n", " \t\n\n  "])
def test_no_samples(text: str, tmp_path: Path) -> None:
    found = read_libffm(written(tmp_path, text))
    assert (len(found), found.nnz, found.num_features, found.num_fields) == (0, 0, 0, 0)
    assert found.shards[0].batch.offsets.tolist() == [0]


def test_dtypes(tmp_path: Path) -> None:
    batch = read_libffm(written(tmp_path, "1 0:1:1 1:2:1.0\n")).shards[0].batch
    assert batch.values is None
    assert batch.indices.dtype == batch.fields.dtype == batch.offsets.dtype == torch.int32
    batch = read_libffm(written(tmp_path, f"1 0:1:2 1:{2**31}:1.0\n")).shards[0].batch
    assert batch.values is not None and batch.values.dtype == torch.float32
    assert batch.indices.dtype == batch.fields.dtype == batch.offsets.dtype == torch.int64
    # The last id of int32, and one that only a line with a fault holds.
    batch = read_libffm(written(tmp_path, f"1 0:{2**31 - 1}:1\n")).shards[0].batch
    assert batch.indices.dtype == torch.int32
    text = f"1 0:1:1\n1 0:{2**40}:1 x\n"
    found = read_libffm(written(tmp_path, text), lenient=True)
    assert (found.num_features, found.metadata["skipped"]) == (2, 1)


def long_text(n: int, broken: dict[int, str] | None = None) -> str:
    random = np.random.default_rng(0)
    lines = []
    for i in range(n):
        ids, values = random.integers(0, 10**6, 20), random.random(20).round(3)
        entries = zip(range(20), ids, values, strict=True)
        lines.append(f"{i % 2} " + " ".join(f"{f}:{i}:{v}" for f, i, v in entries))
    for i, line in (broken or {}).items():
        lines[i] = line
    return "\n".join(lines)


def arrays(found: dict[str, Any]) -> list[bytes]:
    names = ("labels", "offsets", "fields", "indices", "values")
    return [np.asarray(found[name]).tobytes() for name in names]


def test_threads_change_nothing(tmp_path: Path) -> None:
    """1 MB: more parts than one; with lines that leave gaps."""
    for broken in ({}, {7: "", 2000: "0", 2500: "", 3999: ""}, {9: "1 1:1", 3000: "x", 3500: ""}):
        path = written(tmp_path, long_text(4000, broken))
        lenient = 9 in broken
        wanted = _C.read_text(path, num_threads=1, lenient=lenient)
        for threads in (2, 3, 8, 64):
            found = _C.read_text(path, num_threads=threads, lenient=lenient)
            assert arrays(found) == arrays(wanted)
            assert {**found, **wanted}.keys() == found.keys()
            assert found["faults"] == wanted["faults"]
    wanted_lines = [(10, 6), (3001, 1)]
    assert [fault[:2] for fault in wanted["faults"]] == wanted_lines
    assert len(wanted["labels"]) == 3997


def test_the_first_fault_is_reported(tmp_path: Path) -> None:
    path = written(tmp_path, long_text(4000, {3900: "x", 1700: "1 1:2", 3000: f"1 1:{2**40}:1"}))
    for threads in (1, 2, 16):
        for _ in range(5):
            with pytest.raises(ValueError, match=r"train\.ffm:1701:6: ':' expected"):
                read_libffm(path, num_threads=threads)


def test_int64_is_needed_late(tmp_path: Path) -> None:
    path = written(tmp_path, long_text(4000, {3900: f"1 1:{2**40}:1"}))
    for threads in (1, 4):
        found = read_libffm(path, num_threads=threads)
        assert found.num_features == 2**40 + 1
        assert len(found) == 4000


def test_a_very_long_line(tmp_path: Path) -> None:
    line = "1 " + " ".join(f"{i % 7}:{i}:1" for i in range(300_000))
    path = written(tmp_path, "\n".join(["0 0:1:1", line, line, "1"]))
    found = read_libffm(path, num_threads=4)
    counts = found.shards[0].batch.offsets.diff().tolist()
    assert counts == [1, 300_000, 300_000, 0]


def test_many_faults(tmp_path: Path) -> None:
    path = written(tmp_path, "x\n1 0:0:1\n" * 5000)
    found = read_libffm(path, lenient=True, num_threads=4)
    assert len(found) == found.metadata["skipped"] == 5000
    assert [p.split(":")[-3] for p in found.metadata["problems"]] == [
        str(line) for line in range(1, 20, 2)
    ]


def test_ranges(tmp_path: Path) -> None:
    """Every line is in one range, wherever the cuts are."""
    text = "1 0:1:1\n\n0 1:2:0.5\r\n1\n0 0:0:1"
    path = written(tmp_path, text)
    for step in range(1, len(text) + 2):
        labels, line, begin = [], 1, 0
        while begin < len(text):
            found = _C.read_text(path, begin=begin, end=begin + step, first_line=line)
            labels += found["labels"].tolist()
            assert found["end"] >= begin + step or found["end"] == len(text)
            begin, line = found["end"], line + found["num_lines"]
        assert labels == [1, 0, 1, 0]
        assert line == 6
    assert len(_C.read_text(path, begin=10**9)["labels"]) == 0
    assert _C.read_text(path, begin=3, end=4)["end"] == 8


def test_libsvm(tmp_path: Path) -> None:
    path = written(tmp_path, "1 1:0.5 3:1\n-1 2:2\n")
    found = read_libsvm(path, np.array([9, 0, 1, 1], np.int16)[::1])
    assert as_lines(found) == [(1, [(0, 1, 0.5), (1, 3, 1)]), (-1, [(1, 2, 2)])]
    assert (found.num_features, found.num_fields) == (4, 10)
    with pytest.raises(ValueError, match=r":1:9: feature 3 is too large, it must be below 3$"):
        read_libsvm(path, [0, 0, 1])
    with pytest.raises(ValueError, match=r":1:6: space expected after the value, got ':'$"):
        read_libsvm(written(tmp_path, "1 1:2:3"), [0, 0, 1])
    for bad in ([0.5, 1.0], [[1]], [-1, 0]):
        with pytest.raises(ValueError, match="read_libsvm: feature_fields"):
            read_libsvm(path, bad)
    with pytest.raises(ValueError, match="not in"):
        read_libsvm(path, [0, 5], num_fields=5)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file .*no\.ffm"):
        read_libffm(tmp_path / "no.ffm")
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read_libffm(tmp_path)
    with pytest.raises(TypeError):
        read_libffm(3)  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "pipe")
    keeps_it_open = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(ValueError, match="pipe: it is not a regular file"):
        read_libffm(tmp_path / "pipe")
    os.close(keeps_it_open)
    secret = written(tmp_path, "1\n")
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root reads everything
        with pytest.raises(PermissionError):
            read_libffm(secret)


def test_any_name_of_a_file(tmp_path: Path) -> None:
    for name in ("a b", "ä", os.fsdecode(b"\xff")):
        path = tmp_path / name
        path.write_text("1 0:x:1")
        with says(f"{path}:1:5: feature expected, got 'x'"):
            read_libffm(path)
        assert len(read_libffm(os.fsencode(path), lenient=True)) == 0


@pytest.mark.slow
def test_under_sanitizers(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    sys.path.insert(0, str(ROOT))
    import setup

    try:
        compiler = setup.find_compiler()
    except SystemExit as missing:
        pytest.skip(str(missing).strip())
    program = tmp_path / "test_libffm_reader"
    flags = [*setup.CXXFLAGS, "-O0", "-g", "-fsanitize=address,undefined"]
    sources = ["csrc/io/libffm_reader.cpp", "tests/io/test_libffm_reader.cpp"]
    command = [*compiler.command, *flags, "-fno-sanitize-recover=all", "-Icsrc", "-pthread"]
    for step in ([*command, *sources, "-o", str(program)], [str(program)]):
        done = subprocess.run(step, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "passed: 0 failed\n"


@pytest.mark.parametrize("piece_bytes", [1, 40, 1000, 10**6])
def test_in_pieces(tmp_path: Path, piece_bytes: int) -> None:
    lines = [f"{i % 2} " + " ".join(f"{f}:{i * f}:0.5" for f in range(i % 5)) for i in range(50)]
    path = written(tmp_path, "\n".join(lines))
    pieces = list(iter_libffm(path, piece_bytes=piece_bytes))
    assert [line for piece in pieces for line in as_lines(piece)] == as_lines(read_libffm(path))
    assert len(pieces) == 1 or piece_bytes < 1000
    assert max(piece.num_features for piece in pieces) == read_libffm(path).num_features


def test_in_pieces_faults(tmp_path: Path) -> None:
    path = written(tmp_path, "1 0:1:1\n" * 30 + "1 0:x:1\n" + "0 1:1:1\n" * 30)
    pieces = iter_libffm(path, piece_bytes=16)
    for _ in range(5):
        next(pieces)
    with says(f"{path}:31:5: feature expected, got 'x'"):
        list(pieces)
    lenient = list(iter_libffm(path, piece_bytes=16, lenient=True))
    assert sum(piece.metadata["skipped"] for piece in lenient) == 1
    problems = [text for piece in lenient for text in piece.metadata["problems"]]
    assert problems == [f"{path}:31:5: feature expected, got 'x'"]
    with pytest.raises(ValueError, match=r"^iter_libffm: piece_bytes = 0 must be positive$"):
        iter_libffm(path, piece_bytes=0)


@pytest.mark.parametrize("num_threads", [0, -1, 1 << 29, 1 << 40])
def test_a_number_of_threads_that_cannot_be(num_threads: int, tmp_path: Path) -> None:
    path = tmp_path / "data.ffm"
    path.write_text("1 0:1:1\n" * 5)
    with pytest.raises(ValueError, match=f"data.ffm: num_threads = {num_threads} "):
        read_libffm(path, num_threads=num_threads)
    assert len(read_libffm(path, num_threads=1000)) == 5
