# SPDX-License-Identifier: MIT
"""What tests/test_distributed.py does in processes of its own: functions of ``(rank, size, folder)``.

``python tests/distributed_checks.py FOLDER RANK SIZE NAME …`` runs some as one process of a gloo group that meets in
FOLDER, and writes what they return, or raise, to ``FOLDER/result-SIZE-RANK.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ffm_ext
from ffm_ext import optim
from ffm_ext.distributed import DistributedDataParallel, DistributedTrainer, read_share

# B can be divided by 1, 2 and 3: the mean of the means of the processes is that of the batch.
N, F, K, B, STEPS = 60, 5, 4, 24, 6
SAVED = 4  # steps before a checkpoint


def batches(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Global batches: ids ``[B, F]`` and labels."""
    random = torch.Generator().manual_seed(seed)
    per = N // F
    return [
        (
            torch.randint(0, per, (B, F), generator=random) + torch.arange(F) * per,
            torch.rand(B, generator=random).round(),
        )
        for _ in range(STEPS)
    ]


def new_model(grad: str, **options: Any) -> ffm_ext.FFM:
    torch.manual_seed(0)
    return ffm_ext.FFM(K, num_features=N, num_fields=F, grad=grad, **options)


class DeepFFM(nn.Module):
    """An FFM, and a network over the products of a second table. FSDP takes no scalars: no bias."""

    def __init__(self, grad: Any) -> None:
        super().__init__()
        self.ffm = new_model(grad, bias=False)
        self.pairs = ffm_ext.FFMInteraction(N, F, K, output="hadamard", grad=grad)
        width = F * (F - 1) // 2 * K
        self.top = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffm(x) + self.top(self.pairs(x).flatten(1)).squeeze(1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    rank: int = 0,
    size: int = 1,
    steps: slice = slice(None),
) -> list[float]:
    """The loss of every step on this process's part of each batch."""
    losses = []
    for x, labels in batches()[steps]:
        mine = slice(B * rank // size, B * (rank + 1) // size)
        if optimizer is not None:
            optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x[mine]), labels[mine])
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        losses.append(loss.item())
    return losses


def mean(losses: list[float]) -> list[float]:
    """Over the processes."""
    found = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(found)
    return (found / dist.get_world_size()).tolist()


# ---------------------------------------------------------------- replicas


def ddp(rank: int, size: int, folder: Path, grad: str) -> list[float]:
    model = new_model(grad)
    replicas = DistributedDataParallel(model)
    losses = train(replicas, torch.optim.SGD(model.parameters(), lr=0.5), rank, size)
    assert model.interaction.weight.grad is not None
    assert model.interaction.weight.grad.is_sparse == (grad == "sparse")
    if grad == "sparse":
        assert model.interaction.weight.grad.is_coalesced()
        assert len(model.interaction.weight.grad.indices()[0]) < N
    both = [torch.empty_like(model.interaction.weight) for _ in range(size)]
    dist.all_gather(both, model.interaction.weight.detach())
    assert all(torch.equal(both[0], other) for other in both)
    return mean(losses)


def ddp_dense(rank: int, size: int, folder: Path) -> list[float]:
    return ddp(rank, size, folder, "dense")


def ddp_atomic(rank: int, size: int, folder: Path) -> list[float]:
    return ddp(rank, size, folder, "atomic")


def ddp_sparse(rank: int, size: int, folder: Path) -> list[float]:
    return ddp(rank, size, folder, "sparse")


def ddp_of_torch_dense(rank: int, size: int, folder: Path) -> list[float]:
    model = new_model("dense")
    replicas = nn.parallel.DistributedDataParallel(model)
    return mean(train(replicas, torch.optim.SGD(model.parameters(), lr=0.5), rank, size))


def ddp_of_torch_sparse(rank: int, size: int, folder: Path) -> None:
    train(nn.parallel.DistributedDataParallel(new_model("sparse", linear=False)), None)


def ddp_fused(rank: int, size: int, folder: Path) -> None:
    model = new_model("dense")
    model.interaction.fuse_optimizer(optim.SGD(lr=0.5))
    DistributedDataParallel(model)


def ddp_of_torch_fused(rank: int, size: int, folder: Path) -> None:
    model = new_model("dense")
    model.interaction.fuse_optimizer(optim.SGD(lr=0.5))
    train(nn.parallel.DistributedDataParallel(model), None)


def ddp_of_torch_fused_compiled(rank: int, size: int, folder: Path) -> None:
    model = new_model("dense")
    model.interaction.fuse_optimizer(optim.SGD(lr=0.5))
    replicas = torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")
    train(replicas, None)


def ddp_whose_mode_changes(rank: int, size: int, folder: Path) -> None:
    model = new_model("dense")
    replicas = DistributedDataParallel(model)
    model.grad = "atomic"  # which is dense, too
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train(replicas, optimizer, rank, size)
    model.grad = "sparse"
    train(replicas, optimizer, rank, size)


# ---------------------------------------------------------------- FSDP


def fully_sharded(model: nn.Module, size: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    if isinstance(model, DeepFFM):
        fully_shard(model.top, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(rank: int, size: int, folder: Path, grad: str = "dense") -> list[float]:
    """All steps, with a checkpoint of model and optimizer after ``SAVED``."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = fully_sharded(DeepFFM(grad), size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = train(model, optimizer, rank, size, slice(SAVED))
    for table in (model.ffm.interaction.weight, model.pairs.weight):  # type: ignore[union-attr]
        assert table.to_local().shape[0] < N, "every process holds a part of the rows"  # type: ignore[operator, union-attr]
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(state, checkpoint_id=folder / f"fsdp-{grad}")
    losses += train(model, optimizer, rank, size, slice(SAVED, None))
    return mean(losses)


def fsdp_atomic(rank: int, size: int, folder: Path) -> list[float]:
    return fsdp(rank, size, folder, "atomic")


def fsdp_resumed(rank: int, size: int, folder: Path) -> list[float]:
    """The steps after the checkpoint, in a new model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = fully_sharded(DeepFFM("dense"), size)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(state, checkpoint_id=folder / "fsdp-dense")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return mean(train(model, optimizer, rank, size, slice(SAVED, None)))


def fsdp_sparse(rank: int, size: int, folder: Path) -> None:
    train(fully_sharded(DeepFFM("sparse"), size), None)


def fsdp_fused_before(rank: int, size: int, folder: Path) -> None:
    model = DeepFFM("dense")
    model.pairs.fuse_optimizer(optim.SGD(lr=0.5))
    train(fully_sharded(model, size), None)


def fsdp_fused_after(rank: int, size: int, folder: Path) -> None:
    model = fully_sharded(DeepFFM("dense"), size)
    model.pairs.fuse_optimizer(optim.SGD(lr=0.5))  # type: ignore[operator, union-attr]


# ---------------------------------------------------------------- DistributedTrainer


def trainer(folder: Path, **settings: Any) -> DistributedTrainer:
    torch.manual_seed(0)
    model = ffm_ext.FFM(K, num_features=N, num_fields=6, within_field=True, normalize=True).double()
    return DistributedTrainer(
        model,
        **{"optimizer": optim.AdaGrad(lr=0.1), "batch_size": 32, "num_threads": 1, **settings},
    )


def trainer_runs(rank: int, size: int, folder: Path) -> list[list[float]]:
    """Two epochs; a checkpoint in the middle of the second."""
    made = trainer(folder)
    train_part, valid = read_share(folder / "train.ffm"), read_share(folder / "valid.ffm")
    stop = StopIteration()

    def interrupt(progress: Any) -> None:
        if progress.epoch == 2 and 0 < progress.samples < progress.total:
            made.save(folder / "checkpoint")
            raise stop

    with contextlib.suppress(StopIteration):
        made.fit(
            train_part,
            valid,
            epochs=2,
            callback=interrupt,
            checkpoint=folder / "each",
            checkpoint_every=100,
        )
    assert made._sample > 0, "it was to stop within an epoch"
    return trainer_resumed(rank, size, folder)


def trainer_resumed(rank: int, size: int, folder: Path) -> list[list[float]]:
    made = DistributedTrainer.load(folder / "checkpoint")
    assert made.epoch == 1 and made._sample > 0
    made.fit(folder / "train.ffm", folder / "valid.ffm", epochs=2)
    return [[epoch.train_loss, epoch.valid_loss or 0.0] for epoch in made.history]


def trainer_takes_the_weights_of_the_first(rank: int, size: int, folder: Path) -> list[list[float]]:
    """With an optimizer whose state stands for weights; what all of it is afterwards."""
    torch.manual_seed(100 + rank)
    model = ffm_ext.FFM(K, num_features=N, num_fields=6).double()
    made = DistributedTrainer(model, optimizer=optim.FTRL(), batch_size=32)
    made.fit(folder / "train.ffm", epochs=2)
    tensors, _ = made._tensors_and_metadata()
    return [tensor.flatten().tolist() for tensor in tensors.values()]


def a_fault_of_one_is_told_by_all(rank: int, size: int, folder: Path) -> None:
    read_share(folder / "broken.ffm")


def ids_outside_the_table_are_told_by_all(rank: int, size: int, folder: Path) -> None:
    DistributedTrainer(ffm_ext.FFM(K, num_features=N - 1, num_fields=6)).fit(folder / "last.ffm")


# ---------------------------------------------------------------- TorchRec

SIZES = {"user": 11, "film": 7, "genre": 20}
# With a small epsilon Adagrad's first step is the sign of a gradient, which rounding may turn where it is all but zero.
ARGUMENTS = {
    torch.optim.SGD: {"lr": 0.1},
    torch.optim.Adagrad: {"lr": 0.1, "eps": 1e-3},
}


def jagged(rank: int, size: int) -> list[tuple[Any, Tensor]]:
    """The part of a process of every batch: several ids a field, with weights."""
    from torchrec import KeyedJaggedTensor

    random = torch.Generator().manual_seed(1)
    mine = slice(B * rank // size, B * (rank + 1) // size)
    found = []
    for _ in range(STEPS):
        lengths = torch.randint(0, 4, (len(SIZES), B), generator=random)
        ends = torch.nn.functional.pad(lengths.cumsum(1), (1, 0))
        ids, weights = [], []
        for f, n in enumerate(SIZES.values()):
            one = torch.randint(0, n, (int(ends[f, -1]),), generator=random)
            weight = torch.rand(len(one), generator=random)
            ids.append(one[ends[f, mine.start] : ends[f, mine.stop]])
            weights.append(weight[ends[f, mine.start] : ends[f, mine.stop]])
        features = KeyedJaggedTensor(
            list(SIZES), torch.cat(ids), torch.cat(weights), lengths=lengths[:, mine].flatten()
        )
        found.append((features, torch.rand(B, generator=random).round()[mine]))
    return found


def new_embedding_ffm() -> Any:
    from ffm_ext.distributed import EmbeddingFFM

    torch.manual_seed(0)
    return EmbeddingFFM(SIZES, 8, within_field=True)


def train_jagged(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int = 0,
    size: int = 1,
    steps: slice = slice(None),
) -> list[float]:
    losses = []
    for features, labels in jagged(rank, size)[steps]:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(features), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(how: str, kind: type[torch.optim.Optimizer]) -> tuple[Any, torch.optim.Optimizer]:
    """A model, and the optimizer of what TorchRec does not update."""
    from ffm_ext.distributed import shard

    arguments = ARGUMENTS[kind]
    model = shard(new_embedding_ffm(), how, optimizer=kind, optimizer_args=arguments)  # type: ignore[arg-type]
    bias = [parameter for name, parameter in model.named_parameters() if name == "bias"]
    return model, kind(bias, **arguments)


def torchrec_state(model: Any, rest: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "tables": model.fused_optimizer.state_dict(),
        "rest": rest.state_dict()["state"],
    }


def torchrec(
    rank: int, size: int, folder: Path, how: str, kind: type[torch.optim.Optimizer]
) -> list[float]:
    """All steps, with a checkpoint of model and optimizers after ``SAVED``."""
    import torch.distributed.checkpoint as dcp

    model, rest = sharded(how, kind)
    losses = train_jagged(model, rest, rank, size, slice(SAVED))
    dcp.save(torchrec_state(model, rest), checkpoint_id=folder / f"torchrec-{how}-{kind.__name__}")
    losses += train_jagged(model, rest, rank, size, slice(SAVED, None))
    return mean(losses)


def torchrec_resumed(rank: int, size: int, folder: Path, how: str) -> list[float]:
    """The steps after the checkpoint, in a new model."""
    import torch.distributed.checkpoint as dcp

    kind = torch.optim.Adagrad
    model, rest = sharded(how, kind)
    state = torchrec_state(model, rest)
    dcp.load(state, checkpoint_id=folder / f"torchrec-{how}-{kind.__name__}")
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["tables"])
    rest.load_state_dict({**rest.state_dict(), "state": state["rest"]})
    return mean(train_jagged(model, rest, rank, size, slice(SAVED, None)))


def torchrec_row_wise_sgd(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec(rank, size, folder, "row_wise", torch.optim.SGD)


def torchrec_row_wise_adagrad(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec(rank, size, folder, "row_wise", torch.optim.Adagrad)


def torchrec_column_wise_sgd(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec(rank, size, folder, "column_wise", torch.optim.SGD)


def torchrec_column_wise_adagrad(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec(rank, size, folder, "column_wise", torch.optim.Adagrad)


def torchrec_table_wise_adagrad(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec(rank, size, folder, "table_wise", torch.optim.Adagrad)


def torchrec_row_wise_resumed(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec_resumed(rank, size, folder, "row_wise")


def torchrec_column_wise_resumed(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec_resumed(rank, size, folder, "column_wise")


def torchrec_table_wise_resumed(rank: int, size: int, folder: Path) -> list[float]:
    return torchrec_resumed(rank, size, folder, "table_wise")


def torchrec_from_meta(rank: int, size: int, folder: Path) -> list[float]:
    """The largest weight of tables that were nowhere before they were sharded, and the losses of training them."""
    from ffm_ext.distributed import EmbeddingFFM, shard

    torch.manual_seed(rank)
    made = shard(
        EmbeddingFFM(SIZES, 8, device="meta"),
        "row_wise",
        optimizer=torch.optim.SGD,
        optimizer_args={"lr": 0.1},
    )
    tables = [
        part.tensor
        for name, table in made.state_dict().items()
        if name != "bias"
        for part in table.local_shards()
    ]
    largest = torch.cat([table.flatten() for table in tables]).abs().max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    bias = [parameter for name, parameter in made.named_parameters() if name == "bias"]
    return [largest.item(), *mean(train_jagged(made, torch.optim.SGD(bias, lr=0.1), rank, size))]


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size
    )
    results: dict[str, Any] = {}
    for name in sys.argv[4:]:
        try:
            results[name] = {"value": globals()[name](rank, size, folder)}
        except Exception as error:
            results[name] = {
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc(),
            }
        dist.barrier()
    (folder / f"result-{size}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
