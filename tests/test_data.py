# SPDX-License-Identifier: MIT
"""Datasets: what they hold, in which order they give it, and how they lie on the disk."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ffm_ext import SparseBatch, _files
from ffm_ext._arguments import check_contents
from ffm_ext.data import (
    Shard,
    SparseDataset,
    _store,
    convert_libffm,
    open_dataset,
    read_libffm,
    write_libffm,
)

Sample = tuple[float, float, list[tuple[int, int, float]]]


def make(n: int, *, ones: bool = False, weights: bool = False, seed: int = 0) -> SparseDataset:
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(n):
        count = random.integers(0, 4)
        values = np.ones(count) if ones else random.random(count)
        lists.append(
            list(
                zip(random.integers(0, 3, count), random.integers(0, 9, count), values, strict=True)
            )
        )
    return SparseDataset.from_arrays(
        SparseBatch.from_lists(lists),
        random.integers(0, 2, n),
        random.random(n) if weights else None,
        num_features=9,
        num_fields=3,
    )


def test_numbers_of_a_graph_are_kept_without_it() -> None:
    labels, weights, values = (torch.ones(3, requires_grad=True) * n for n in (1, 2, 3))
    batch = SparseBatch(torch.arange(3), torch.zeros(3).long(), values, torch.arange(4))
    data = SparseDataset.from_arrays(batch, labels, weights)
    for tensor in (data.shards[0].labels, data.shards[0].weights, data.shards[0].batch.values):
        assert tensor is not None and not tensor.requires_grad


def sharded(*parts: SparseDataset) -> SparseDataset:
    return SparseDataset([s for p in parts for s in p.shards], num_features=9, num_fields=3)


MIXED = sharded(make(5), make(0), make(7, ones=True, weights=True, seed=1), make(1, seed=2))


def samples(data: SparseDataset | Shard) -> list[Sample]:
    found: list[Sample] = []
    for batch, labels, weights in data.shards if isinstance(data, SparseDataset) else [data]:
        ends = batch.offsets.tolist()
        values = [1.0] * batch.nnz if batch.values is None else batch.values.tolist()
        entries = list(zip(batch.fields.tolist(), batch.indices.tolist(), values, strict=True))
        of = [1.0] * len(labels) if weights is None else weights.tolist()
        for b, label in enumerate(labels.tolist()):
            found.append((label, of[b], entries[ends[b] : ends[b + 1]]))
    return found


ALL = samples(MIXED)


def test_sizes() -> None:
    assert (len(MIXED), len(ALL)) == (13, 13)
    assert MIXED.nnz == sum(len(entries) for _, _, entries in ALL)
    assert repr(MIXED) == (
        f"SparseDataset(13 samples, {MIXED.nnz} entries, 9 features in 3 fields, 4 shards)"
    )
    found = SparseDataset(MIXED.shards)
    assert found.num_features == 1 + max(i for _, _, es in ALL for _, i, _ in es)
    assert found.num_fields == 3
    assert (len(SparseDataset([])), SparseDataset([]).num_features) == (0, 0)


def test_one_sample() -> None:
    for i in range(-13, 13):
        assert samples(MIXED[i]) == [ALL[i]]
        assert samples(MIXED[np.int64(i)]) == [ALL[i]]
    for i in (13, -14, 2**40):
        with pytest.raises(IndexError, match=f"sample {i} is out of range for 13 samples"):
            MIXED[i]


ends = st.none() | st.integers(-20, 20)


@given(start=ends, stop=ends, step=st.none() | st.sampled_from([-3, -1, 1, 2, 5]))
def test_slices(start: int | None, stop: int | None, step: int | None) -> None:
    found = MIXED[start:stop:step]
    assert samples(found) == ALL[start:stop:step]
    assert len(found.shards) == 1
    assert (found.num_features, found.num_fields) == (9, 3)


@given(rows=st.lists(st.integers(-13, 12)))
def test_rows(rows: list[int]) -> None:
    wanted = [ALL[i] for i in rows]
    assert samples(MIXED[torch.tensor(rows, dtype=torch.int64)]) == wanted
    assert samples(MIXED[np.array(rows, dtype=np.int32)]) == wanted
    assert samples(MIXED.__getitems__(rows)) == wanted


def test_masks() -> None:
    mask = torch.arange(13) % 3 == 0
    assert samples(MIXED[mask]) == ALL[::3]
    with pytest.raises(IndexError, match=re.escape("mask has shape [12]")):
        MIXED[mask[:12]]


@pytest.mark.parametrize("nothing", [[], (), np.array([]), torch.tensor([]), slice(3, 3)])
def test_no_samples_at_all(nothing: Any) -> None:
    for found in (MIXED[nothing], MIXED[:0][nothing]):
        assert samples(found) == []
        assert (found.num_features, found.num_fields) == (MIXED.num_features, MIXED.num_fields)
    with pytest.raises(TypeError, match=r"must be one list of integers, got torch\.float32"):
        MIXED[torch.ones(3)]


def test_a_slice_is_a_view() -> None:
    data = make(20)
    found = data[5:15].shards[0]
    assert found.labels.data_ptr() == data.shards[0].labels[5:].data_ptr()
    assert found.batch.indices.untyped_storage().data_ptr() == (
        data.shards[0].batch.indices.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 13, 14, 100])
def test_batches(size: int) -> None:
    found = [samples(batch) for batch in MIXED.batches(size)]
    assert found == [ALL[i : i + size] for i in range(0, 13, size)]
    kept = [samples(batch) for batch in MIXED.batches(size, drop_last=True)]
    assert kept == [batch for batch in found if len(batch) == size]

    shuffled = [samples(batch) for batch in MIXED.batches(size, shuffle=True, seed=3)]
    assert [len(batch) for batch in shuffled] == [len(batch) for batch in found]
    order = [sample for batch in shuffled for sample in batch]
    assert order != ALL
    assert sorted(order, key=repr) == sorted(ALL, key=repr)
    again = [samples(batch) for batch in MIXED.batches(size, shuffle=True, seed=3)]
    other = [samples(batch) for batch in MIXED.batches(size, shuffle=True, seed=4)]
    assert shuffled == again != other


def test_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_size = 0 must be positive"):
        MIXED.batches(0)
    assert list(SparseDataset([]).batches(3)) == []
    assert list(make(0).batches(3, shuffle=True)) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "mapped"])
def test_data_loader(workers: int, mapped: bool, tmp_path: Path) -> None:
    data = MIXED
    if mapped:
        data.save(tmp_path / "data")
        data = open_dataset(tmp_path / "data")
    loader: Any = DataLoader(data, batch_size=4, collate_fn=data.collate, num_workers=workers)  # type: ignore[var-annotated]
    found = list(loader)
    assert all(isinstance(batch, Shard) for batch in found)
    assert [samples(batch) for batch in found] == [ALL[i : i + 4] for i in range(0, 13, 4)]


def test_data_loader_of_spawned_workers(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "data")
    data = open_dataset(tmp_path / "data")
    loader: Any = DataLoader(
        data,
        batch_size=5,
        collate_fn=data.collate,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert [s for batch in loader for s in samples(batch)] == ALL


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_data_loader_of_views_in_new_processes(context: str) -> None:
    for data in (
        MIXED[2:9],
        SparseDataset.from_arrays(torch.arange(12).view(4, 3), torch.ones(9)[:4]),
    ):
        loader: Any = DataLoader(
            data,
            batch_size=2,
            collate_fn=data.collate,
            num_workers=1,
            multiprocessing_context=context,
        )
        assert [s for batch in loader for s in samples(batch)] == samples(data[:])


def test_sizes_of_numpy(tmp_path: Path) -> None:
    ids = np.array([[1, 2], [3, 4]])
    data = SparseDataset.from_arrays(ids, [0, 1], num_features=ids.max() + 1)
    data.save(tmp_path / "data")
    assert open_dataset(tmp_path / "data").num_features == 5
    write_libffm(data, tmp_path / "text")
    for sizes in ({"num_features": np.int64(10)}, {"num_fields": np.int32(10)}):
        found = convert_libffm(tmp_path / "text", tmp_path / "converted", **sizes)
        assert 10 in (found.num_features, found.num_fields)
    assert len(list(data.batches(1, shuffle=True, seed=np.int64(3)))) == 2
    with pytest.raises(TypeError, match=r"SparseDataset: num_features = 10\.5 must be an integer"):
        SparseDataset.from_arrays(ids, [0, 1], num_features=10.5)  # type: ignore[arg-type]


def test_defaults_of_torch_change_nothing(tmp_path: Path) -> None:
    def all_of_it() -> list[Any]:
        data = SparseDataset([*MIXED.shards, *make(3, ones=True).shards])
        ids = SparseDataset.from_arrays([[1, 2], [3, 0]], [0, 1])
        write_libffm(ids, tmp_path / "text")
        dense = SparseBatch.from_dense(np.eye(3, dtype=np.float32), np.arange(3))
        return [
            *(samples(data[which]) for which in ([], [0, 14], slice(0, 9, 2))),
            *(samples(batch) for batch in data.batches(4, shuffle=True)),
            *(samples(ids[[1]]), samples(read_libffm(tmp_path / "text")[:])),
            *(dense.values, data[[0, 14]].shards[0].batch.values),
        ]

    expected = all_of_it()
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        found = all_of_it()
    finally:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        else:
            assert one == other


def test_arrays_as_they_come() -> None:
    """Backwards, of the other byte order, read-only: torch takes no such memory by itself."""
    ids = np.arange(12).reshape(4, 3)
    data = SparseDataset.from_arrays(ids, np.arange(4))
    backwards = np.arange(4)[::-1]
    assert data[backwards].shards[0].labels.tolist() == [3, 2, 1, 0]
    assert data.shards[0].batch[backwards].indices.tolist() == ids[::-1].ravel().tolist()
    for same in (ids[::-1][::-1], ids.astype(">i8"), ids.astype(np.int16)):
        same.flags.writeable = False
        found = SparseDataset.from_arrays(same, np.arange(4)).shards[0].batch
        assert found.indices.tolist() == list(range(12))
    fields = np.arange(3)[::-1]
    for dense in (np.eye(3), np.eye(3, dtype=">f8"), np.eye(3)[::-1][::-1]):
        batch = SparseBatch.from_dense(dense, fields)
        assert batch.fields.tolist() == [2, 1, 0]
        assert batch.values is not None and batch.values.tolist() == [1, 1, 1]


def test_labels_that_are_no_numbers(tmp_path: Path) -> None:
    ids = np.zeros((2, 1), int)
    with pytest.raises(ValueError, match=r"labels\[0\] = nan is not finite"):
        SparseDataset.from_arrays(ids, np.ma.array([1, 2.0], mask=[1, 0]))
    with pytest.raises(TypeError, match=r"labels must be numbers, got torch\.complex64"):
        SparseDataset.from_arrays(ids, torch.ones(2, dtype=torch.complex64))
    (shard,) = SparseDataset.from_arrays(ids, [0, 1]).shards
    shard = shard._replace(labels=torch.tensor([0, float("nan")]))
    with pytest.raises(ValueError, match=r"write_libffm: labels\[1\] = nan is not finite"):
        write_libffm(SparseDataset([shard]), tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_collate() -> None:
    assert samples(SparseDataset.collate([MIXED[i] for i in range(13)])) == ALL
    assert samples(SparseDataset.collate([])) == []


def test_from_ids() -> None:
    ids = np.array([[0, 3], [1, 4], [2, 3]])
    data = SparseDataset.from_arrays(ids, [1, 0, 1.5])
    assert samples(data) == [
        (1, 1, [(0, 0, 1), (1, 3, 1)]),
        (0, 1, [(0, 1, 1), (1, 4, 1)]),
        (1.5, 1, [(0, 2, 1), (1, 3, 1)]),
    ]
    assert (data.num_features, data.num_fields) == (5, 2)
    batch = data.shards[0].batch
    assert batch.values is None
    assert batch.indices.dtype == torch.int32
    large = SparseDataset.from_arrays(torch.tensor([[2**40]]), [1])
    assert large.shards[0].batch.indices.dtype == torch.int64
    none = SparseDataset.from_arrays(torch.zeros(0, 3, dtype=torch.int64), [])
    assert (len(none), none.num_features, none.num_fields) == (0, 0, 3)


def test_values_become_float32_or_nothing() -> None:
    batch = SparseBatch.from_lists([[(0, 0, 1.0)], [(0, 1, 1.0)]])
    assert SparseDataset.from_arrays(batch.to(torch.float64), [0, 1]).shards[0].batch.values is None
    batch = SparseBatch.from_lists([[(0, 0, 1.0)], [(0, 1, 2.0)]]).to(torch.float64)
    values = SparseDataset.from_arrays(batch, [0, 1]).shards[0].batch.values
    assert values is not None
    assert values.dtype == torch.float32


IDS = torch.tensor([[0, 3], [1, 4]])


@pytest.mark.parametrize(
    ("error", "text", "arguments", "sizes"),
    [
        (ValueError, "ids must be [n, F], got shape [4]", (IDS.flatten(), [0, 1]), {}),
        (TypeError, "ids must be integers, got torch.float32", (IDS.float(), [0, 1]), {}),
        (ValueError, "labels has shape [3], but there are 2 samples", (IDS, [0, 1, 2]), {}),
        (ValueError, "labels[1] = nan is not finite", (IDS, [0, np.nan]), {}),
        (ValueError, "weights has shape [1], but there are 2 samples", (IDS, [0, 1], [1]), {}),
        (ValueError, "weights[0] = inf is not finite", (IDS, [0, 1], [np.inf, 1]), {}),
        (IndexError, "indices[3] = 4 is out of range", (IDS, [0, 1]), {"num_features": 4}),
        (IndexError, "indices[0] = -1 is out of range", (IDS - 1, [0, 1]), {}),
        (
            IndexError,
            "fields[1] = 1 is out of range for 1 fields",
            (IDS, [0, 1]),
            {"num_fields": 1},
        ),
    ],
)
def test_bad_arrays(
    error: type[Exception], text: str, arguments: Any, sizes: dict[str, int]
) -> None:
    with pytest.raises(error, match=re.escape(f"SparseDataset.from_arrays: {text}")):
        SparseDataset.from_arrays(*arguments, **sizes)


def test_bad_shards() -> None:
    batch, labels, _ = make(3).shards[0]
    with pytest.raises(TypeError, match=r"labels must be float32, got torch\.float64"):
        SparseDataset([Shard(batch, labels.double(), None)])
    with pytest.raises(TypeError, match=r"values must be float32, got torch\.float64"):
        SparseDataset([Shard(batch.to(torch.float64), labels, None)])
    with pytest.raises(ValueError, match=re.escape("weights has shape [2], the batch has 3")):
        SparseDataset([Shard(batch, labels, labels[:2])])
    with pytest.raises(ValueError, match="num_fields = -1 is negative"):
        SparseDataset([], num_fields=-1)


# On the disk


def test_saved_and_opened(tmp_path: Path) -> None:
    for i, data in enumerate((MIXED, make(0), make(3, ones=True), SparseDataset([]))):
        data.metadata = {"name": "ä", "n": [i]}
        folder = tmp_path / f"data-{i}"
        data.save(folder)
        found = open_dataset(folder)
        assert samples(found) == samples(data)
        assert len(found.shards) == len(data.shards)
        for a, b in zip(found.shards, data.shards, strict=True):
            assert a.batch.indices.dtype == b.batch.indices.dtype
            assert (a.batch.values is None, a.weights is None) == (
                b.batch.values is None,
                b.weights is None,
            )
        sizes = (found.num_features, found.num_fields, found.metadata)
        assert sizes == (data.num_features, data.num_fields, data.metadata)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"data-{i}" for i in range(4)]


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    numbers = torch.arange(6)
    for i, fields in enumerate((numbers[:4], numbers[1:5])):  # those of indices, and in part
        batch = SparseBatch(numbers[:4], fields, None, numbers[:5])
        data = SparseDataset([Shard(batch, torch.ones(4), None)])
        data.save(tmp_path / f"{i}")
        assert samples(open_dataset(tmp_path / f"{i}")) == samples(data)


def test_int64_ids_are_kept(tmp_path: Path) -> None:
    SparseDataset.from_arrays(torch.tensor([[2**40, 0]]), [1]).save(tmp_path / "data")
    found = open_dataset(tmp_path / "data")
    assert found.shards[0].batch.indices.tolist() == [2**40, 0]
    assert found.num_features == 2**40 + 1


def test_opening_reads_nothing_much(tmp_path: Path) -> None:
    n = 2_000_000
    SparseDataset.from_arrays(torch.zeros(n, 4, dtype=torch.int32), torch.zeros(n)).save(
        tmp_path / "data"
    )

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        total, inside = 0, False
        for line in lines:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = str(tmp_path) in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    data = open_dataset(tmp_path / "data")
    assert resident() < 2000  # kB; the file has 80,000
    data.shards[0].batch.indices.sum()
    assert resident() > 20_000


def test_writing_to_an_opened_dataset_leaves_the_file(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "data")
    open_dataset(tmp_path / "data").shards[0].labels.fill_(7)
    assert samples(open_dataset(tmp_path / "data")) == ALL


def test_pickled(tmp_path: Path) -> None:
    data = make(10_000)
    assert samples(pickle.loads(pickle.dumps(data))) == samples(data)
    few = data[100:110]
    assert len(pickle.dumps(few)) < 5000
    assert samples(pickle.loads(pickle.dumps(few))) == samples(few)

    data.save(tmp_path / "data")
    opened = open_dataset(tmp_path / "data")
    assert len(pickle.dumps(opened)) < 300
    assert samples(pickle.loads(pickle.dumps(opened))) == samples(data)
    few = opened[100:110]
    assert len(pickle.dumps(few)) < 5000
    assert samples(pickle.loads(pickle.dumps(few))) == samples(few)


def test_a_pickle_knows_its_dataset_from_another_in_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    make(10).save(folder)
    data = open_dataset(folder)
    data.num_features, data.metadata = 50, {"name": "a"}
    pickled = pickle.dumps(data)
    found = pickle.loads(pickled)
    assert (found.num_features, found.metadata) == (50, {"name": "a"})
    make(10, seed=1).save(folder)  # of the same sizes
    with pytest.raises(ValueError, match=f"^{folder}: another dataset has taken the place"):
        pickle.loads(pickled)


def test_a_folder_without_an_id_is_known_by_its_time(tmp_path: Path) -> None:
    make(3).save(tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    info = json.loads(path.read_text())
    del info["id"]
    path.write_text(json.dumps(info))
    pickled = pickle.dumps(open_dataset(tmp_path / "data"))
    assert samples(pickle.loads(pickled)) == samples(make(3))
    os.utime(path, ns=(0, 1))
    with pytest.raises(ValueError, match="another dataset has taken the place"):
        pickle.loads(pickled)


def test_copies_are_of_the_tensors(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "data")
    opened = open_dataset(tmp_path / "data")
    opened.num_features = 50
    (tmp_path / "data").rename(tmp_path / "moved")
    for data in (opened, MIXED[:], MIXED[2:9]):
        one, other = copy.copy(data), copy.deepcopy(data)
        assert one.num_features == other.num_features == data.num_features
        data.shards[0].labels[0] = 7
        assert samples(one) == samples(data) != samples(other)
        assert samples(pickle.loads(pickle.dumps(other))) == samples(other)


def test_a_relative_folder_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    MIXED.save("data")
    pickled = pickle.dumps(open_dataset("data"))
    monkeypatch.chdir("/")
    assert samples(pickle.loads(pickled)) == ALL


def test_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    sharded(*[make(2)] * 5).save(folder)
    old = open_dataset(folder)
    MIXED.save(folder)
    assert samples(open_dataset(folder)) == ALL
    assert len(list(folder.iterdir())) == 5
    assert len(samples(old)) == 10  # its files live as long as they are mapped
    open_dataset(folder).save(folder)
    assert samples(open_dataset(folder)) == ALL
    assert os.listdir(tmp_path) == ["data"]


def test_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files.ctypes, "CDLL", lambda _: object())
    test_replaced(tmp_path)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    MIXED.save(tmp_path / "data")
    (tmp_path / "reference").mkdir()
    wanted = stat.S_IMODE((tmp_path / "reference").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == wanted
    for path in (tmp_path / "data").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == wanted & 0o666


def test_what_is_not_a_dataset_is_left(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("home", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not a dataset"):
            MIXED.save(tmp_path / name)
    assert (tmp_path / "home" / "letter").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    MIXED.save(tmp_path / "empty")
    assert samples(open_dataset(tmp_path / "empty")) == ALL


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dataset.json", "{}", r"is not a dataset; it is left as it is \(.*format is not"),
        ("dataset.json", "[" * 100_000, r"is not a dataset; it is left as it is \(.*corrupt: "),
        ("notes", "dear", "holds more than a dataset, such as 'notes'; it is left as it is"),
        ("part-00004.safetensors", "", "more than a dataset, such as 'part-00004.safetensors'"),
    ],
)
def test_a_folder_with_files_of_the_user_is_left(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    MIXED.save(folder)
    (folder / name).write_text(text)
    before = sorted(os.listdir(folder))
    with pytest.raises(FileExistsError, match=f"^{folder} .*{message}"):
        MIXED.save(folder)
    write_libffm(make(3), tmp_path / "text")
    with pytest.raises(FileExistsError, match=message):
        convert_libffm(tmp_path / "text", folder)
    assert sorted(os.listdir(folder)) == before
    assert (folder / name).read_text() == text


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """Really: a file of this process may not grow past 64 bytes."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from test_data import make
data = make(50, seed=3)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    data.save("data")
except OSError as error:
    print("OSError", error)
"""
    old = make(20)
    old.save(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"OSError {tmp_path / 'data'}: "), done.stderr
    assert len(open_dataset(tmp_path / "data")) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failed_save_leaves_the_old_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    MIXED.save(folder)
    bad = make(3)
    bad.metadata = {"no JSON": object()}
    with pytest.raises(TypeError):
        bad.save(folder)

    count = 0

    def fails_at_the_third(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_store, "save_file", fails_at_the_third)
    monkeypatch.setattr(_store.Path, "chmod", lambda *_: None)
    monkeypatch.setattr(_store, "flush_to_disk", lambda *_: None)
    with pytest.raises(OSError, match="No space left"):
        sharded(*[make(2)] * 5).save(folder)
    assert samples(open_dataset(folder)) == ALL
    assert os.listdir(tmp_path) == ["data"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no is not there: it is not a dataset"):
        open_dataset(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"has no dataset\.json: it is not a dataset"):
        open_dataset(tmp_path)


def test_truncated_or_corrupt_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    MIXED.save(folder)
    part = folder / "part-00002.safetensors"
    whole = part.read_bytes()
    message = rf"{re.escape(str(part))}: corrupt"
    for n in (0, 1, 7, 8, 50, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=message):
            open_dataset(folder)
    for bad in (
        whole + b"x",
        b"\xff" * 16 + whole[16:],
        whole.replace(b'"labels"', b'"labelz"'),
        (folder / "part-00000.safetensors").read_bytes(),
    ):
        part.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            open_dataset(folder)
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00002\.safetensors is not there"):
        open_dataset(folder)
    part.write_bytes(whole)
    assert samples(open_dataset(folder)) == ALL


def test_offsets_that_miss_the_entries(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    make(5).save(folder)
    part = folder / "part-00000.safetensors"
    tensors = _store.safe_open(part, framework="pt")
    found = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
    found["offsets"][-1] += 1
    _store.save_file(found, part)
    with pytest.raises(ValueError, match="corrupt: offsets go from 0 to"):
        open_dataset(folder)


def test_broken_descriptions(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    MIXED.save(folder)
    path = folder / "dataset.json"
    text = path.read_text()
    info = json.loads(text)
    for bad in (
        "",
        text[:-5],
        "[]",
        "[" * 100_000,
        json.dumps({**info, "format": "other"}),
        json.dumps({**info, "version": 2}),
        json.dumps({**info, "num_fields": -1}),
        json.dumps({**info, "num_fields": "3"}),
        json.dumps({**info, "shards": 3}),
        json.dumps({**info, "shards": [{"samples": 5}]}),
        json.dumps({k: v for k, v in info.items() if k != "metadata"}),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"^" + re.escape(str(path)) + ": "):
            open_dataset(folder)


# Text


def test_converted_in_pieces(tmp_path: Path) -> None:
    text = tmp_path / "train.ffm"
    data = make(200)
    write_libffm(data, text)
    whole = read_libffm(text)
    assert samples(whole) == samples(data)
    for size in (1, 50, 1000, 10**6):
        found = convert_libffm(text, tmp_path / "data", shard_bytes=size)
        assert samples(found) == samples(data)
        assert (found.num_features, found.num_fields) == (whole.num_features, whole.num_fields)
        assert (len(found.shards) == 1) == (size == 10**6)
    found = convert_libffm(text, tmp_path / "data", shard_bytes=99, num_features=50, num_fields=4)
    assert (found.num_features, found.num_fields) == (50, 4)
    with pytest.raises(ValueError, match="shard_bytes = 0 must be positive"):
        convert_libffm(text, tmp_path / "data", shard_bytes=0)


def test_conversion_with_faults(tmp_path: Path) -> None:
    text = tmp_path / "train.ffm"
    text.write_text("1 0:1:1\n\nx\n" * 20)
    convert_libffm(text, tmp_path / "old", lenient=True)
    for size in (1, 7, 20, 1000):
        with pytest.raises(ValueError, match=r"train\.ffm:3:1: label expected, got 'x'"):
            convert_libffm(text, tmp_path / "old", shard_bytes=size)
        found = convert_libffm(text, tmp_path / "new", shard_bytes=size, lenient=True)
        assert found.metadata == read_libffm(text, lenient=True).metadata
        assert (len(found), found.metadata["skipped"]) == (20, 20)
        assert found.metadata["problems"][9].startswith(f"{text}:30:1: ")
        assert len(found.metadata["problems"]) == 10
    assert sorted(os.listdir(tmp_path)) == ["new", "old", "train.ffm"]


def test_nothing_to_convert(tmp_path: Path) -> None:
    text = tmp_path / "train.ffm"
    text.write_text("")
    assert len(convert_libffm(text, tmp_path / "data")) == 0
    text.write_text("x\n" * 5)
    assert len(convert_libffm(text, tmp_path / "data", shard_bytes=3, lenient=True)) == 0
    with pytest.raises(FileNotFoundError):
        convert_libffm(tmp_path / "no", tmp_path / "data")


def test_weights_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.ffm").write_text("1\n")
    with pytest.raises(ValueError, match="no place for weights"):
        write_libffm(MIXED, tmp_path / "a.ffm")
    assert (tmp_path / "a.ffm").read_text() == "1\n"
    assert os.listdir(tmp_path) == ["a.ffm"]


@pytest.mark.parametrize("field", [2**31 - 2, 2**31 - 1, 2**31, 2**40])
def test_a_field_that_int32_cannot_hold(field: int) -> None:
    """Small ids are kept in int32, fields in the dtype of ids: what does not fit must not wrap."""
    batch = SparseBatch.from_lists([[(field, 3, 1.0)]])
    dataset = SparseDataset.from_arrays(batch, [1.0])
    assert dataset.num_fields == field + 1
    assert dataset.shards[0].batch.fields.tolist() == [field]


def test_fields_and_offsets_are_narrowed_without_wrapping() -> None:
    fields, offsets = torch.tensor([2**32 + 1, -(2**32)]), torch.tensor([0, 2**32 + 2])
    batch = SparseBatch(torch.tensor([0, 1], dtype=torch.int32), fields, None, offsets)
    assert batch.fields.tolist() == [2**31 - 1, -(2**31)]
    assert batch.offsets.tolist() == [0, 2**31 - 1]


def test_int32_ids_of_more_features_than_int32_counts() -> None:
    ids = torch.tensor([[0, 2**31 - 1]], dtype=torch.int32)
    check_contents("here", ids, None, None, 2**31)
    check_contents("here", ids, None, None, 2**40)
    with pytest.raises(IndexError, match=r"here: indices\[0, 1\] = 2147483647 is out of range"):
        check_contents("here", ids, None, None, 2**31 - 1)
