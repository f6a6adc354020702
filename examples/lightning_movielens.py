# SPDX-License-Identifier: MIT
"""An FFM in a LightningModule, with the optimizer of its table fused into backward: ratings of MovieLens-100K.

    pip install lightning
    python examples/lightning_movielens.py      # fetches the data, or uses what is in $FFM_EXT_DATA

Lightning runs the loop: batches, validation, early stopping, the best checkpoint. `backward` updates the table by
itself, so `configure_optimizers` names what is left, bias and linear weights. The state of the fused optimizer is part
of the `state_dict`, and so of Lightning's checkpoints.

The settings are plain ones, not the outcome of a search; the validation rows say when to stop. The test rows are scored
once, at the end; the exit status is 1 where a ridge regression on the same rows does better.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import ffm_ext
from ffm_ext.data import Shard, SparseDataset
from ffm_ext.datasets import FieldDataset, fetch_movielens_100k

RIDGE = 0.9526  # the RMSE to beat


class Ratings(lightning.LightningModule):
    """An FFM that predicts a rating.

    Args:
        ds: for the sizes.
        start: what the bias starts from.
        args: embed_dim, lr and weight_decay.
    """

    def __init__(self, ds: FieldDataset, start: float, args: argparse.Namespace) -> None:
        super().__init__()
        self.lr, self.weight_decay = args.lr, args.weight_decay
        self.ffm = ffm_ext.FFM(args.embed_dim, fields=ds.fields, grad="dense")
        torch.nn.init.constant_(self.ffm.linear.bias, start)
        # Of the table alone: the linear weights have a dense gradient, for the optimizer below.
        self.ffm.interaction.fuse_optimizer(
            ffm_ext.optim.AdaGrad(lr=args.lr, weight_decay=args.weight_decay)
        )

    def forward(self, batch: ffm_ext.SparseBatch) -> Tensor:
        return self.ffm(batch)

    def training_step(self, shard: Shard, number: int) -> Tensor:
        # Summed, as the fused optimizer's rule is that of one sample: a row moves for each sample that it is in.
        return mse_loss(self(shard.batch), shard.labels, reduction="sum") / 2

    def validation_step(self, shard: Shard, number: int) -> None:
        self._log_error("valid_mse", shard)

    def test_step(self, shard: Shard, number: int) -> None:
        self._log_error("test_mse", shard)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(
            self.ffm.linear.parameters(), lr=self.lr, initial_accumulator_value=1.0
        )

    def _log_error(self, name: str, shard: Shard) -> None:
        error = mse_loss(self(shard.batch).clamp(1, 5), shard.labels)
        self.log(name, error, batch_size=len(shard.labels), prog_bar=True)


def loader(ds: FieldDataset, part: str, batch_size: int, *, shuffle: bool = False) -> DataLoader:
    x, target = ds.split(part)
    data = SparseDataset.from_arrays(
        x, target, num_features=ds.num_features, num_fields=ds.num_fields
    )
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=data.collate)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embed-dim", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=0.3, help="of the table")
    parser.add_argument("--epochs", type=int, default=40, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    lightning.seed_everything(args.seed, verbose=False)
    ds = fetch_movielens_100k()
    model = Ratings(ds, ds.split("train")[1].mean().item(), args)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="valid_mse")
        trainer = lightning.Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            callbacks=[best, EarlyStopping("valid_mse", patience=2)],
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
        )
        trainer.fit(
            model,
            loader(ds, "train", args.batch_size, shuffle=True),
            loader(ds, "valid", 10_000),
        )
        (scores,) = trainer.test(
            model, loader(ds, "test", 10_000), ckpt_path=best.best_model_path, verbose=False
        )
    rmse = scores["test_mse"] ** 0.5
    print(f"{ds.name}: best of {trainer.current_epoch} epochs: ", end="")
    print(f"validation RMSE {best.best_model_score.sqrt():.4f}, test RMSE {rmse:.4f}")
    print(f"a ridge regression: {RIDGE:.4f}")
    return int(not rmse < RIDGE)


if __name__ == "__main__":
    sys.exit(main())
