# SPDX-License-Identifier: MIT
"""Two processes on this machine, over gloo, against one: the same losses, and nothing lost when one is killed.

What runs in processes of its own is in distributed_checks.py; here its results are compared with those of one process.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_checks as checks
import numpy as np
import pytest
import torch
from problems import python
from test_training import samples
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

import ffm_ext
from ffm_ext import data, interop, optim
from ffm_ext.data._libffm import read_ranges
from ffm_ext.distributed import DistributedTrainer, Share, read_share, share
from ffm_ext.distributed._share import ranges_of
from ffm_ext.modules import initial_std
from ffm_ext.training import Trainer

GROUP = "Distributed"
MOVES = "from two processes to one and to three, with the optimizer's state"
compatibility = pytest.mark.compatibility
WAIT = 300  # seconds; a busy machine takes long to start processes

needs_torchrec = pytest.mark.skipif(
    find_spec("torchrec") is None, reason="torchrec is not installed: the extra distributed"
)


def write_data(path: Path, n: int, seed: int) -> None:
    lists, labels = samples("multi-hot", n, seed)
    batch = ffm_ext.SparseBatch.from_lists(lists)
    data.write_libffm(
        data.SparseDataset.from_arrays(batch, labels, num_features=60, num_fields=6), path
    )


def run_checks(names: list[str], folder: Path, size: int = 2) -> list[dict[str, Any]]:
    """Run functions of distributed_checks.py in ``size`` processes: the results of each process."""
    script = Path(checks.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank), str(size), *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=WAIT)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"result-{size}-{rank}.json").read_text()) for rank in range(size)]


QUICK = (
    *("ddp_dense", "ddp_atomic", "ddp_sparse", "ddp_of_torch_dense", "ddp_of_torch_sparse"),
    *("ddp_of_torch_fused_compiled", "ddp_whose_mode_changes"),
    *("ddp_fused", "ddp_of_torch_fused", "fsdp", "fsdp_atomic", "fsdp_sparse"),
    *("fsdp_fused_before", "fsdp_fused_after", "trainer_runs", "a_fault_of_one_is_told_by_all"),
    *("trainer_takes_the_weights_of_the_first", "ids_outside_the_table_are_told_by_all"),
)


class Results:
    """Of processes that run some checks once, for the whole file."""

    def __init__(self, folder: Path, names: tuple[str, ...], size: int = 2) -> None:
        self.folder = folder
        self.found = run_checks(list(names), folder, size)

    def __call__(self, name: str) -> Any:
        """What all processes returned; what they raised is raised here."""
        first, *others = (found[name] for found in self.found)
        if "error" in first:
            assert all(other.get("error") == first["error"] for other in others), first["trace"]
            raise RuntimeError(first["error"])
        assert all(other == first for other in others)
        return first["value"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("two")
    write_data(folder / "train.ffm", 300, 0)
    write_data(folder / "valid.ffm", 90, 1)
    lines = (folder / "train.ffm").read_text().splitlines()
    lines[250] += " 1:2"
    (folder / "broken.ffm").write_text("\n".join(lines))
    (folder / "last.ffm").write_text("1 0:0:1\n" * 99 + "0 0:1:1 5:59:1\n")
    return Results(folder, QUICK)


@pytest.fixture(scope="module", params=[1, 3], ids=["1 process", "3 processes"])
def resumed(request: pytest.FixtureRequest, two: Results) -> Results:
    """Of other numbers of processes, which go on from what two have saved."""
    return Results(two.folder, ("fsdp_resumed", "trainer_resumed"), request.param)


# ---------------------------------------------------------------- replicas and FSDP


def one_process(grad: str, make: Any, **options: Any) -> list[float]:
    model = checks.new_model(grad, **options)
    return checks.train(model, make(model.parameters()))


@pytest.mark.parametrize(
    ("name", "grad"),
    [
        pytest.param(
            "ddp_dense",
            "dense",
            marks=compatibility("DistributedDataParallel", group=GROUP, mode="dense"),
        ),
        pytest.param(
            "ddp_atomic",
            "atomic",
            marks=compatibility("DistributedDataParallel", group=GROUP, mode="atomic"),
        ),
        pytest.param(
            "ddp_sparse",
            "sparse",
            marks=compatibility(
                "DistributedDataParallel",
                group=GROUP,
                mode="sparse",
                note="by `ffm_ext.distributed.DistributedDataParallel`, a subclass of torch's",
            ),
        ),
        ("ddp_of_torch_dense", "dense"),
    ],
)
def test_ddp(name: str, grad: str, two: Results) -> None:
    expected = one_process(grad, lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    assert two(name) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] != pytest.approx(expected[0], abs=1e-3)


@compatibility(
    "DistributedDataParallel",
    group=GROUP,
    mode="fused",
    refuses="cannot be trained under DistributedDataParallel",
)
def test_ddp_refuses_a_fused_table(two: Results) -> None:
    two("ddp_fused")


def test_torchs_own_ddp_refuses_what_it_cannot_do(two: Results) -> None:
    for check in ("ddp_of_torch_fused", "ddp_of_torch_fused_compiled"):
        with pytest.raises(RuntimeError, match="cannot be trained under DistributedDataParallel"):
            two(check)
    with pytest.raises(RuntimeError, match=r"wrap the model in ffm_ext\.distributed"):
        two("ddp_of_torch_sparse")


def test_ddp_of_a_gradient_of_another_kind(two: Results) -> None:
    with pytest.raises(RuntimeError, match=r"grad = 'sparse', and it was 'dense' when .* wrap the"):
        two("ddp_whose_mode_changes")


FSDP = "FSDP2 (`fully_shard`), the layers beside a network"


def deep_ffm() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps in one process, and the state after the first ``SAVED``."""
    model = checks.DeepFFM("dense")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = checks.train(model, optimizer, steps=slice(checks.SAVED))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return losses + checks.train(model, optimizer, steps=slice(checks.SAVED, None)), state


@pytest.mark.parametrize(
    "grad",
    [
        pytest.param(grad, marks=compatibility(FSDP, group=GROUP, mode=grad))
        for grad in ("dense", "atomic")
    ],
)
def test_fsdp_and_its_checkpoint_in_one_process(grad: str, two: Results) -> None:
    import torch.distributed.checkpoint as dcp

    expected, state = deep_ffm()
    assert two("fsdp" if grad == "dense" else "fsdp_atomic") == pytest.approx(expected, abs=1e-5)
    assert expected[-1] != pytest.approx(expected[0], abs=1e-3)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load({"model": loaded}, checkpoint_id=two.folder / f"fsdp-{grad}", no_dist=True)
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, atol=1e-4, rtol=0)


@compatibility("FSDP2, torch.distributed.checkpoint", group=GROUP, mode="dense", note=MOVES)
@pytest.mark.slow
def test_fsdp_goes_on_in_another_number_of_processes(resumed: Results) -> None:
    """With the state of Adam: without it the two steps would be others."""
    assert resumed("fsdp_resumed") == pytest.approx(deep_ffm()[0][checks.SAVED :], abs=1e-5)


@compatibility(
    FSDP,
    group=GROUP,
    mode="sparse",
    refuses="fsdp::chunk_cat",
    note="torch's reduction of gradients knows no sparse ones",
)
def test_fsdp_takes_no_sparse_gradient(two: Results) -> None:
    two("fsdp_sparse")


@compatibility(FSDP, group=GROUP, mode="fused", refuses="fused optimizer")
def test_fsdp_refuses_a_fused_table(two: Results) -> None:
    two("fsdp_fused_before")


def test_a_table_that_fsdp_holds_is_not_fused(two: Results) -> None:
    with pytest.raises(RuntimeError, match="the table is a DTensor"):
        two("fsdp_fused_after")


# ---------------------------------------------------------------- shares of a file


TEXT = (
    "1 0:0:1 1:5:2\r\n\n-1 0:3:0.5\n0\n1 0:1:1" + " 2:7:1" * 40 + "\n 1 1:6:3\n\n\n-1 0:2:1 1:4:1"
)


@pytest.mark.parametrize("ranges", [1, 2, 7, 64, len(TEXT) + 3])
@pytest.mark.parametrize("end", ["", "\n"])
def test_every_line_is_in_one_range(ranges: int, end: str, tmp_path: Path) -> None:
    path = tmp_path / "some.ffm"
    path.write_bytes((TEXT + end).encode())
    whole = data.read_libffm(path)
    for size in (1, 2, 3):
        parts = [
            piece.shard
            for rank in range(size)
            for piece in read_ranges(
                path, ranges_of(rank, size, ranges), ranges, lenient=False, num_threads=1
            )
        ]
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.shards[0].labels)
        for name in ("indices", "fields"):
            joined = torch.cat([getattr(part.batch, name) for part in parts])
            assert torch.equal(joined, getattr(whole.shards[0].batch, name))


@pytest.mark.parametrize("ranges", [1, 2, 5, 30])
def test_faults_are_counted_from_the_start_of_the_file(ranges: int, tmp_path: Path) -> None:
    path = tmp_path / "some.ffm"
    lines = [f"1 0:{i}:1 1:{i + 40}:0.25" for i in range(40)]
    for at in (0, 17, 39):
        broken = [line + " 1:x:1" if i == at else line for i, line in enumerate(lines)]
        path.write_text("\n".join(broken))
        with pytest.raises(ValueError, match=rf"some\.ffm:{at + 1}:"):
            read_ranges(path, range(ranges), ranges, lenient=False, num_threads=1)


def test_batches_hold_every_sample_once_for_any_number_of_processes() -> None:
    n, ranges = 101, 8
    ids = torch.arange(n)[:, None]
    dataset = data.SparseDataset.from_arrays(ids, torch.zeros(n))
    mine = [share(dataset, ranges=ranges)]
    assert mine[0].num_steps(16) == 7
    for size in (2, 3):
        bounds = np.arange(ranges + 1) * n // ranges
        mine += [
            Share(dataset[int(bounds[r.start]) : int(bounds[r.stop])], mine[0].sizes, r)
            for r in (ranges_of(rank, size, ranges) for rank in range(size))
        ]
    orders = [np.random.default_rng(i).permutation(size) for i, size in enumerate(mine[0].sizes)]
    seen = []
    for step in range(7):
        found = [
            one.data.shards[0]
            .batch.indices[one.rows(step, 7, [orders[i] for i in one.ranges])]
            .tolist()
            for one in mine
        ]
        assert found[0] == found[1] + found[2] == found[3] + found[4] + found[5]
        assert abs(len(found[0]) - n / 7) <= ranges
        seen += found[0]
    assert sorted(seen) == list(range(n))


# ---------------------------------------------------------------- DistributedTrainer


def test_alone_it_makes_the_updates_of_trainer(tmp_path: Path) -> None:
    write_data(tmp_path / "train.ffm", 200, 0)
    mine = checks.trainer(tmp_path, shuffle=False)
    part = read_share(tmp_path / "train.ffm", ranges=5)
    mine.fit(part, epochs=2)
    steps = part.num_steps(32)
    orders = [np.arange(part.sizes[i]) for i in part.ranges]
    batches = [part.data.__getitems__(part.rows(step, steps, orders)) for step in range(steps)]
    other = checks.trainer(tmp_path).model
    reference = Trainer(
        other, optimizer=optim.AdaGrad(lr=0.1), mode="deterministic", batch_size=1000, shuffle=False
    )
    reference.fit(data.SparseDataset(batches, num_features=60, num_fields=6), epochs=2)
    for epoch, expected in zip(mine.history, reference.history):
        assert epoch.train_loss == pytest.approx(expected.train_loss, abs=1e-12)
    torch.testing.assert_close(
        mine.model.state_dict(), reference.model.state_dict(), atol=1e-12, rtol=0
    )


def test_two_processes_end_as_one_and_resume_as_one(two: Results) -> None:
    one = checks.trainer(two.folder)
    paths = two.folder / "train.ffm", two.folder / "valid.ffm"
    one.fit(*paths, epochs=2)
    expected = [[epoch.train_loss, epoch.valid_loss] for epoch in one.history]
    assert np.allclose(two("trainer_runs"), expected, atol=1e-9, rtol=0)
    # What two processes wrote in the middle of an epoch, one goes on with.
    resumed = DistributedTrainer.load(two.folder / "checkpoint")
    assert resumed.epoch == 1 and resumed._sample > 0
    resumed.fit(*paths, epochs=2)
    assert np.allclose(
        [[e.train_loss, e.valid_loss] for e in resumed.history], expected, atol=1e-9, rtol=0
    )
    # Checkpoints replace each other, and leave nothing beside them.
    assert len(list((two.folder / "each").iterdir())) == 1


@pytest.mark.slow
def test_what_two_processes_saved_others_go_on_with(resumed: Results, two: Results) -> None:
    assert np.allclose(resumed("trainer_resumed"), two("trainer_runs"), atol=1e-9, rtol=0)


@pytest.mark.slow
def test_what_one_process_saved_two_go_on_with(tmp_path: Path) -> None:
    write_data(tmp_path / "train.ffm", 300, 0)
    write_data(tmp_path / "valid.ffm", 90, 1)
    expected = checks.trainer_runs(0, 1, tmp_path)
    found = Results(tmp_path, ("trainer_resumed",))("trainer_resumed")
    assert np.allclose(found, expected, atol=1e-9, rtol=0)


def test_weights_that_differ_become_those_of_the_first_process(two: Results) -> None:
    expected = checks.trainer_takes_the_weights_of_the_first(0, 1, two.folder)
    found = two("trainer_takes_the_weights_of_the_first")  # the same bits in both, or it says so
    assert all(np.allclose(*pair, atol=1e-9, rtol=0) for pair in zip(found, expected))


def test_a_fault_of_one_process_is_raised_in_all(two: Results) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: .*broken\.ffm:251:"):
        two("a_fault_of_one_is_told_by_all")
    with pytest.raises(
        RuntimeError, match=r"IndexError: .*train: process 1: indices\[\d+\] = 59 is"
    ):
        two("ids_outside_the_table_are_told_by_all")


def test_a_checkpoint_wants_its_own_data_and_a_whole_folder(tmp_path: Path) -> None:
    write_data(tmp_path / "train.ffm", 100, 0)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        DistributedTrainer.load(tmp_path)
    made = checks.trainer(tmp_path)
    made.fit(tmp_path / "train.ffm", epochs=1)
    made._sample = 1
    made.save(tmp_path / "checkpoint")
    loaded = DistributedTrainer.load(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="in the middle of an epoch of 100 samples"):
        loaded.fit(read_share(tmp_path / "train.ffm", ranges=3), epochs=2)
    (step,) = (tmp_path / "checkpoint").iterdir()
    (file,) = step.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{step.name} is not whole"):
        DistributedTrainer.load(tmp_path / "checkpoint")
    (step / "trainer.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer\.json is not whole"):
        DistributedTrainer.load(tmp_path / "checkpoint")


def trainer_with_checkpoint(folder: Path) -> DistributedTrainer:
    """After an epoch of ``train.ffm``; what it was then is in ``checkpoint``."""
    write_data(folder / "train.ffm", 100, 0)
    made = checks.trainer(folder)
    made.fit(folder / "train.ffm", epochs=1, checkpoint=folder / "checkpoint")
    return made


def test_ctrl_c_while_a_checkpoint_is_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stays Ctrl-C, whatever torch makes of it, and leaves the older checkpoint."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    made = trainer_with_checkpoint(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made.fit(tmp_path / "train.ffm", epochs=2, checkpoint=tmp_path / "checkpoint")
        patch.setattr(HuggingFaceStorageReader, "read_data", interrupt)
        with pytest.raises(KeyboardInterrupt):
            DistributedTrainer.load(tmp_path / "checkpoint")
    assert DistributedTrainer.load(tmp_path / "checkpoint").epoch == 1


def test_folders_of_other_names_are_left(tmp_path: Path) -> None:
    made = trainer_with_checkpoint(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    others = ["step-1-raw-data", "step-z", "step-999999-999999999999-mine", ".step-mine.tmp"]
    leftovers = [".step-000001-000000000001.tmp", ".step-000001-000000000001.0123456789ab.tmp"]
    for name in [*others, *leftovers]:
        (checkpoint / name).mkdir()
    assert DistributedTrainer.load(checkpoint).epoch == 1
    made.save(checkpoint)
    (kept,) = {path.name for path in checkpoint.iterdir()} - {*others}
    assert DistributedTrainer.load(checkpoint).epoch == 1 and kept.startswith("step-000001-")
    assert len(list(checkpoint.iterdir())) == 5


def test_the_same_step_saved_again_leaves_one_checkpoint_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("killed")

    made = trainer_with_checkpoint(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with contextlib.suppress(OSError):
            made.save(tmp_path / "checkpoint")
        assert DistributedTrainer.load(tmp_path / "checkpoint").epoch == 1
    made.save(tmp_path / "checkpoint")
    assert DistributedTrainer.load(tmp_path / "checkpoint").epoch == 1
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode = 'hogwild' is for one process"):
        checks.trainer(tmp_path, mode="hogwild")
    with pytest.raises(ValueError, match="ranges = 0 is less than the 1 processes"):
        read_share(__file__, ranges=0)
    with pytest.raises(FileNotFoundError):
        read_share(tmp_path / "nothing.ffm")
    write_data(tmp_path / "train.ffm", 100, 0)
    with pytest.raises(OSError, match=r"File exists: .*train\.ffm"):
        checks.trainer(tmp_path).fit(tmp_path / "train.ffm", checkpoint=tmp_path / "train.ffm")


# ---------------------------------------------------------------- torchrun


def torchrun(size: int, *arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
    options = ["--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": os.devnull},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The objects that a run with ``--json`` printed."""
    out, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_command_line_gives_the_same_loss_for_any_number_of_processes(tmp_path: Path) -> None:
    write_data(tmp_path / "train.ffm", 500, 0)
    write_data(tmp_path / "valid.ffm", 90, 1)
    data.convert_libffm(tmp_path / "train.ffm", tmp_path / "folder", shard_bytes=5000)
    for source, sizes in (("train.ffm", (1, 2, 3)), ("folder", (1, 2))):
        runs = {}
        for size in sizes:
            model = tmp_path / f"model-{size}"
            runs[size] = finished(
                torchrun(
                    size, "-m", "ffm_ext", "train", "--json", "-t", 3, "--batch-size", 64, "--bias", "--linear",
                    "-p", tmp_path / "valid.ffm", tmp_path / source, model,
                )
            )  # fmt: skip
            assert len(runs[size]) == 4, "three epochs and a summary, of the first process alone"
        for size in sizes[1:]:
            for one, several in zip(runs[1], runs[size], strict=True):
                for name in ("train_loss", "valid_loss", "valid_logloss", "samples"):
                    assert several.get(name) == pytest.approx(one.get(name), abs=1e-5)
            torch.testing.assert_close(
                interop.load_model(tmp_path / f"model-{size}").state_dict(),
                interop.load_model(tmp_path / "model-1").state_dict(),
                atol=1e-4, rtol=0,
            )  # fmt: skip


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_ends_the_same(tmp_path: Path) -> None:
    write_data(tmp_path / "train.ffm", 3000, 0)
    write_data(tmp_path / "valid.ffm", 90, 1)
    command = ["-m", "ffm_ext", "train", "--json", "-t", 12, "--batch-size", 16]
    files = ["-p", tmp_path / "valid.ffm", tmp_path / "train.ffm"]
    expected = finished(torchrun(2, *command, *files, tmp_path / "undisturbed"))[-1]

    checkpoint = tmp_path / "checkpoint"
    kept = ["--checkpoint", checkpoint, "--checkpoint-every", 1000]
    process = torchrun(2, *command, *kept, *files, tmp_path / "killed", restarts=2)
    deadline = time.monotonic() + WAIT
    while len(list(checkpoint.glob("step-*"))) == 0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0, errors
    assert "SIGKILL" in errors or "Signal 9" in errors or "-9" in errors
    printed = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert "going on from" in errors
    assert printed[-1]["valid_logloss"] == expected["valid_logloss"]
    assert torch.equal(
        interop.load_model(tmp_path / "killed").interaction.weight,
        interop.load_model(tmp_path / "undisturbed").interaction.weight,
    )


# ---------------------------------------------------------------- TorchRec


def test_without_torchrec_the_error_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['torchrec'] = None\n"
        "from importlib.machinery import PathFinder; find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *a: None if name in ('torchrec', 'fbgemm_gpu') else find(name, *a)\n"
        "del sys.modules['torchrec']\n"
        "from ffm_ext.distributed import EmbeddingFFM\n"
        "EmbeddingFFM({'a': 3}, 4)"
    )
    found = python("-c", code)
    assert found.returncode == 1
    assert "EmbeddingFFM needs torchrec and fbgemm_gpu" in found.stderr
    assert "pip install 'ffm-ext[distributed]'" in found.stderr


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_the_bias_is_never_on_the_meta_device(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffm_ext.distributed import EmbeddingFFM, _torchrec

    made = SimpleNamespace(
        EmbeddingConfig=SimpleNamespace, EmbeddingCollection=lambda **_: torch.nn.Module()
    )
    monkeypatch.setattr(_torchrec, "_torchrec", lambda _: made)
    assert EmbeddingFFM({"a": 3}, 4, device=device).bias.device.type == "cpu"


TORCHREC = {
    "torchrec_row_wise_sgd": torch.optim.SGD,
    "torchrec_row_wise_adagrad": torch.optim.Adagrad,
    "torchrec_column_wise_sgd": torch.optim.SGD,
    "torchrec_column_wise_adagrad": torch.optim.Adagrad,
    "torchrec_table_wise_adagrad": torch.optim.Adagrad,
}


@pytest.fixture(scope="module")
def two_with_torchrec(tmp_path_factory: pytest.TempPathFactory) -> Results:
    names = (*TORCHREC, "torchrec_from_meta")
    return Results(tmp_path_factory.mktemp("torchrec"), names)


def sharded(how: str) -> Any:
    return compatibility(
        f"TorchRec, {how}", group=GROUP, mode="fused",
        note="by `ffm_ext.distributed.EmbeddingFFM`, with the optimizers of FBGEMM",
    )  # fmt: skip


@needs_torchrec
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torchrec_row_wise_sgd", marks=sharded("row-wise")),
        pytest.param("torchrec_row_wise_adagrad", marks=sharded("row-wise")),
        pytest.param("torchrec_column_wise_sgd", marks=sharded("column-wise")),
        pytest.param("torchrec_column_wise_adagrad", marks=sharded("column-wise")),
        pytest.param("torchrec_table_wise_adagrad", marks=sharded("table-wise")),
    ],
)
def test_sharded_tables_end_as_one(name: str, two_with_torchrec: Results) -> None:
    import torch.distributed.checkpoint as dcp

    model = checks.new_embedding_ffm()
    kind = TORCHREC[name]
    optimizer = kind(model.parameters(), **checks.ARGUMENTS[kind])  # type: ignore[abstract, arg-type]
    expected = checks.train_jagged(model, optimizer, steps=slice(checks.SAVED))
    state = copy.deepcopy(model.state_dict())
    expected += checks.train_jagged(model, optimizer, steps=slice(checks.SAVED, None))
    assert two_with_torchrec(name) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] != pytest.approx(expected[0], abs=1e-3)
    # The parts of two processes are whole tables again in one.
    how = name.removeprefix("torchrec_").rsplit("_", 1)[0]
    loaded = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    folder = two_with_torchrec.folder / f"torchrec-{how}-{kind.__name__}"
    dcp.load({"model": loaded}, checkpoint_id=folder, no_dist=True)
    for key, tensor in state.items():
        torch.testing.assert_close(loaded[key], tensor, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=[1, 3], ids=["1 process", "3 processes"])
def resumed_with_torchrec(request: pytest.FixtureRequest, two_with_torchrec: Results) -> Results:
    names = tuple(f"torchrec_{how}_resumed" for how in ("row_wise", "column_wise", "table_wise"))
    return Results(two_with_torchrec.folder, names, request.param)


@compatibility("TorchRec, torch.distributed.checkpoint", group=GROUP, mode="fused", note=MOVES)
@needs_torchrec
@pytest.mark.slow
@pytest.mark.parametrize("how", ["row_wise", "column_wise", "table_wise"])
def test_sharded_tables_go_on_in_another_number_of_processes(
    how: str, resumed_with_torchrec: Results
) -> None:
    """With the sums of Adagrad: without them the two steps would be others."""
    model = checks.new_embedding_ffm()
    optimizer = torch.optim.Adagrad(model.parameters(), **checks.ARGUMENTS[torch.optim.Adagrad])
    expected = checks.train_jagged(model, optimizer)[checks.SAVED :]
    assert resumed_with_torchrec(f"torchrec_{how}_resumed") == pytest.approx(expected, abs=1e-5)


@needs_torchrec
@pytest.mark.slow
def test_tables_are_made_where_they_belong(two_with_torchrec: Results) -> None:
    largest, *losses = two_with_torchrec("torchrec_from_meta")
    bound = 3**0.5 * initial_std(len(checks.SIZES), 8)
    assert 0.9 * bound < largest <= bound
    assert np.isfinite(losses).all()


@needs_torchrec
@pytest.mark.slow
def test_embedding_ffm_is_an_ffm() -> None:
    model = checks.new_embedding_ffm()
    sizes = list(checks.SIZES.values())
    other = ffm_ext.FFM(8, field_dims=sizes, within_field=True, linear=False, grad="dense")
    tables = [table.weight.detach() for table in model.embeddings.embeddings.values()]
    with torch.no_grad():
        other.interaction.weight.copy_(torch.cat(tables))
    for features, _ in checks.jagged(0, 1):
        parts = [features[name] for name in checks.SIZES]
        lists: list[list[tuple[int, int, float]]] = [[] for _ in range(checks.B)]
        for f, part in enumerate(parts):
            ends = part.offsets().tolist()
            for b in range(checks.B):
                lists[b] += [
                    (f, int(part.values()[i]) + sum(sizes[:f]), float(part.weights()[i]))
                    for i in range(ends[b], ends[b + 1])
                ]
        expected = other(ffm_ext.SparseBatch.from_lists(lists))
        torch.testing.assert_close(model(features), expected, atol=1e-6, rtol=1e-5)


@needs_torchrec
@pytest.mark.slow
def test_bad_shardings() -> None:
    from ffm_ext.distributed import EmbeddingFFM, shard

    with pytest.raises(ValueError, match="3 fields of embed_dim = 5 make rows of 15 numbers"):
        EmbeddingFFM(checks.SIZES, 5)
    with pytest.raises(ValueError, match="sharding = 'diagonal' is not one of row_wise"):
        shard(checks.new_embedding_ffm(), "diagonal")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no process group"):
        shard(checks.new_embedding_ffm(), "row_wise")
