# SPDX-License-Identifier: MIT
"""An FFM over TorchRec tables, with KeyedJaggedTensor input: who likes which film, MovieLens-100K.

    pip install '.[distributed]' && pip install --no-deps torchrec==1.8.0       # from the root of the source tree
    torchrun --nproc-per-node 2 examples/torchrec_movielens.py     # fetches the data, or uses what is in $FFM_EXT_DATA

Each field is a key of the input and a table; the tables are spread by rows over the processes, and FBGEMM's Adagrad is
fused into their backward pass. Each process takes its share of every batch. `python examples/torchrec_movielens.py` is
a run of one process.

The settings are plain ones, not the outcome of a search. The test rows are scored once, at the end; the exit status is
1 where they are not ranked clearly better than by chance.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import ffm_ext
from ffm_ext.datasets import FieldDataset, fetch_movielens_100k
from ffm_ext.distributed import EmbeddingFFM, shard

# They greet every process with advice on parts that are not used here.
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
from torchrec import KeyedJaggedTensor  # noqa: E402

LIKED = 4  # the lowest rating that counts as a like


def jagged(ds: FieldDataset, rows: Tensor) -> KeyedJaggedTensor:
    """Samples as TorchRec wants them: one field after the other, ids that count from 0 in every field."""
    batch = ds.data[rows]
    assert isinstance(batch, ffm_ext.SparseBatch) and batch.values is not None
    B, F = len(batch), ds.num_fields
    sample = torch.arange(B).repeat_interleave(batch.offsets.diff())
    cell = batch.fields.long() * B + sample
    order = cell.argsort(stable=True)
    ids = batch.indices - ds.field_offsets[batch.fields.long()]
    return KeyedJaggedTensor(
        list(ds.fields),
        ids.long()[order],
        batch.values[order],
        lengths=torch.bincount(cell, minlength=F * B),
    )


def share(rows: Tensor, rank: int, size: int) -> Tensor:
    return rows[len(rows) * rank // size : len(rows) * (rank + 1) // size]


@torch.no_grad()
def evaluate(model: torch.nn.Module, ds: FieldDataset, part: str, rank: int, size: int) -> Tensor:
    """Logloss and AUC of a part; every process scores a share of it."""
    rows = ds.rows[part]
    scores = torch.zeros(len(rows))
    first, last = len(rows) * rank // size, len(rows) * (rank + 1) // size
    scores[first:last] = model(jagged(ds, share(rows, rank, size)))
    dist.all_reduce(scores)
    liked = (ds.target[rows] >= LIKED).float()
    ranks = torch.empty(len(rows), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(rows) + 1, dtype=torch.float64)
    positive = liked.double().sum()
    auc = (ranks[liked > 0].sum() - positive * (positive + 1) / 2) / (
        positive * (len(rows) - positive)
    )
    return torch.stack([binary_cross_entropy_with_logits(scores, liked).double(), auc])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embed-dim", type=int, default=4)
    parser.add_argument(
        "--sharding", choices=("row_wise", "column_wise", "table_wise"), default="row_wise"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ |= {**alone, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    ds = fetch_movielens_100k()
    torch.manual_seed(args.seed)
    model = shard(
        EmbeddingFFM(ds.fields, args.embed_dim, within_field=True),
        args.sharding,
        optimizer=torch.optim.Adagrad,
        optimizer_args={"lr": args.lr},
    )
    bias = [parameter for name, parameter in model.named_parameters() if name == "bias"]
    optimizer = torch.optim.Adagrad(bias, lr=args.lr)
    train = ds.rows["train"]
    for epoch in range(1, args.epochs + 1):
        order = train[torch.randperm(len(train))]  # the same everywhere: one seed
        for rows in order.split(args.batch_size):
            mine = share(rows, rank, size)
            optimizer.zero_grad()
            liked = (ds.target[mine] >= LIKED).float()
            binary_cross_entropy_with_logits(model(jagged(ds, mine)), liked).backward()
            optimizer.step()
        logloss, auc = evaluate(model, ds, "valid", rank, size).tolist()
        if rank == 0:
            print(f"epoch {epoch}: validation logloss {logloss:.4f}, AUC {auc:.4f}", flush=True)
    logloss, auc = evaluate(model, ds, "test", rank, size).tolist()
    if rank == 0:
        print(
            f"{ds.name}, {size} processes, {args.sharding}: test logloss {logloss:.4f}, AUC {auc:.4f}"
        )
    dist.destroy_process_group()
    return int(not auc > 0.75)


if __name__ == "__main__":
    sys.exit(main())
