# SPDX-License-Identifier: MIT
"""Mini-batches over processes: each reads a share of the data, and all of them hold the same weights.

::

    a step:   samples of the own share -> scores, losses, gradient of the touched rows     (the kernels, here)
              -> gradients of all processes, one after the other -> rows summed            (all-gather)
              -> the update of the summed rows                                             (ffm_update_, everywhere)

Every process makes the same update with the same numbers in the same order, so that weights and optimizer states stay
the same bits everywhere. The batches are the same for any number of processes, and so are the results, but for the
rounding of sums that are taken in another order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ffm_ext._arguments import sum_dtype
from ffm_ext._files import check_writable, flush_to_disk, put_in_place
from ffm_ext.data import SparseDataset
from ffm_ext.modules import FFM
from ffm_ext.training import Part, Trainer

from ._group import Group
from ._share import Share, read_share, share

_INFO = "trainer.json"
_CHECKPOINT = re.compile(r"step-\d{6}-\d{12}")
# What a killed process leaves behind of one, by its own name or by that of ``beside``.
_LEFTOVER = re.compile(rf"\.{_CHECKPOINT.pattern}(\.[0-9a-f]+)?\.tmp")


class DistributedTrainer(Trainer):
    """A :class:`~ffm_ext.training.Trainer` in ``"deterministic"`` mode whose batches are spread over processes.

    Every process makes one with the same arguments, and makes the same calls: each is a matter of all. Without a
    process group it works alone.

    Args:
        model: the weights of the first process are copied to the others.
        group: a process group whose backend takes CPU tensors, such as gloo. ``None``: the default one.
        settings: as for :class:`~ffm_ext.training.Trainer`. ``batch_size`` is that of all processes together; batches
            are smaller by up to one sample a range, so that all are alike.

    ``fit`` and ``evaluate`` take a :class:`Share`, a path for :func:`read_share`, or a dataset that is the same in
    every process. ``predict`` takes what that of ``Trainer`` does, and works alone. The gradients of a bfloat16 table
    are rounded to bfloat16 before they are summed.
    """

    _saves_alone = False

    def __init__(
        self, model: FFM, *, group: dist.ProcessGroup | None = None, **settings: Any
    ) -> None:
        self._members = Group(group)
        self._group = group
        if isinstance(model, FFM):  # Trainer refuses what is none
            # Before there are optimizer states: those of FTRL stand for the weights.
            for parameter in model.parameters():
                self._members.broadcast(parameter.detach())
        super().__init__(model, **{"mode": "deterministic", **settings})
        self._orders: list[np.ndarray] = []

    def _checked(self, name: str, value: Any) -> Any:
        if name == "mode" and value != "deterministic":
            raise ValueError(
                f"DistributedTrainer: mode = {value!r} is for one process; several have 'deterministic'"
            )
        return super()._checked(name, value)

    # ---------------------------------------------------------------- data

    def _parts(self, where: str, data: Any) -> list[Any]:
        if isinstance(data, str | os.PathLike):
            data = read_share(data, group=self._group)
        elif isinstance(data, SparseDataset):
            data = share(data, group=self._group)
        if not isinstance(data, Share):
            raise TypeError(
                f"{where} must be a Share, a SparseDataset or a path, got {type(data).__name__}"
            )
        found, members = data, self._members
        place = where if members.size == 1 else f"{where}: process {members.rank}"
        members.together(lambda: self._check_parts(place, found.data.shards))
        return [found]

    def _part_sizes(self, parts: list[Any]) -> list[int]:
        return [size for part in parts for size in part.sizes.tolist()]

    def _steps(self, part: Any, number: int) -> np.ndarray:
        self._orders = [self._order(int(part.sizes[i]), 1 + i) for i in part.ranges]
        return np.arange(part.num_steps(self.batch_size))

    def _piece(self, save_every: int | None) -> int:
        return max(1, super()._piece(save_every) // self.batch_size)

    # ---------------------------------------------------------------- a step

    def _train(self, part: Any, order: np.ndarray) -> tuple[float, float, int]:
        steps = part.num_steps(self.batch_size)
        loss, weight, n = 0.0, 0.0, 0
        for step in order.tolist():
            batch = Part(*part.data.__getitems__(part.rows(step, steps, self._orders)))
            loss += self._train_batch(batch)
            weight += (
                len(batch.labels) if batch.weights is None else float(batch.weights.double().sum())
            )
            n += len(batch.labels)
        loss, weight, samples = self._members.sum(loss, weight, n)
        return loss, weight, int(samples)

    def _update_table(self, slope: Tensor, lists: tuple[Any, ...]) -> None:
        table = self._table()
        rows, gradient, _ = torch.ops.ffm_ext.ffm_backward_sparse(slope, table, *lists, False)
        rows, gradient = self._summed(rows, gradient)
        torch.ops.ffm_ext.ffm_update_(
            table, self._states["table"], rows, gradient, *self._update("table")
        )

    def _update_small(self, name: str, rows: Tensor | None, gradient: np.ndarray) -> None:
        if rows is None:
            gradient = np.array(self._members.sum(*gradient))
        else:
            rows, summed = self._summed(rows, torch.from_numpy(gradient))
            gradient = summed.numpy()
        super()._update_small(name, rows, gradient)

    def _summed(self, rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that any process has, rising, and the sum of their gradients."""
        if self._members.size == 1:
            return rows, gradient
        rows, gradient = self._members.cat(rows, gradient)
        rows, inverse = rows.unique(return_inverse=True)
        sums = torch.zeros(len(rows), *gradient.shape[1:], dtype=sum_dtype(gradient))
        sums.index_add_(0, inverse, gradient.to(sums.dtype))
        return rows, sums.to(gradient.dtype)

    def _sum_of_weights(self, parts: list[Any]) -> float:
        mine = [Part(*piece) for part in parts for piece in part.data.shards]
        return self._members.sum(super()._sum_of_weights(mine))[0]

    def _sum_of_losses(self, parts: list[Any]) -> tuple[float, float]:
        mine = [Part(*piece) for part in parts for piece in part.data.shards]
        total, weight = self._members.sum(*super()._sum_of_losses(mine))
        return total, weight

    # ---------------------------------------------------------------- keeping

    def _check_checkpoint(self, path: str | os.PathLike[str]) -> None:
        def check() -> None:
            if self._members.rank == 0:
                Path(path).mkdir(parents=True, exist_ok=True)
                check_writable(Path(path) / _INFO)

        self._members.together(check)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint into a folder, by ``torch.distributed.checkpoint``; every process writes a part of it.

        It is written beside the older one, takes its place when it is whole, and leaves all else in the folder as it
        is: after a failure, the older one is there still. Tensors are in safetensors files, all else in
        ``trainer.json``; nothing is pickled. All processes see the same file system.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        folder, members = Path(path), self._members
        tensors, metadata = self._tensors_and_metadata()
        metadata["tensors"] = json.dumps(
            {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()}
        )
        # The number of the update alone would not do: an auto-stop changes weights without one.
        name = f"step-{self.epoch:06d}-{self._step:012d}"
        new, target = folder / f".{name}.tmp", folder / name

        def prepare() -> None:
            if members.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                (new / _INFO).write_text(json.dumps(metadata), encoding="utf-8")
                flush_to_disk(new / _INFO)

        members.together(prepare)
        try:
            save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(new), save_distributed=True),
                process_group=self._group,
                no_dist=members.size == 1,
            )
        except CheckpointException as error:
            _raise_interrupt(error.failures)
            raise OSError(f"DistributedTrainer.save: {os.fspath(path)}: {error}") from error

        def finish() -> None:
            if members.rank == 0:
                flush_to_disk(new)
                put_in_place(new, target)
                flush_to_disk(folder)
                # Older ones; if the same step has been saved before, that too, as ``new``.
                for other in [*_named(_CHECKPOINT, folder), *_named(_LEFTOVER, folder)]:
                    if other != target:
                        shutil.rmtree(other, ignore_errors=True)

        members.barrier()
        members.together(finish)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None
    ) -> DistributedTrainer:
        """A trainer, and its model, as :meth:`save` wrote them, in any number of processes.

        Raises:
            FileNotFoundError: there is no checkpoint in the folder.
            ValueError: it is not whole, or something else; the text names it.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        where = f"DistributedTrainer.load: {os.fspath(path)}"
        members = Group(group)
        newest = members.together(lambda: newest_checkpoint(path))
        if newest is None:
            raise FileNotFoundError(f"{where}: no checkpoint")
        try:
            metadata = json.loads((newest / _INFO).read_text(encoding="utf-8"))
            shapes = json.loads(metadata["tensors"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{where}: {newest / _INFO} is not whole ({error})") from error
        state: dict[str, Any] = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, *shape) in shapes.items()
        }
        try:
            load(
                state,
                storage_reader=HuggingFaceStorageReader(str(newest)),
                process_group=group,
                no_dist=members.size == 1,
            )
        except CheckpointException as error:
            _raise_interrupt(error.failures)
            raise ValueError(f"{where}: {newest.name} is not whole ({error})") from error
        trainer = cls._from(where, state, metadata, group=group)
        assert isinstance(trainer, DistributedTrainer)
        return trainer


def _raise_interrupt(failures: dict[int, Any]) -> None:
    """A Ctrl-C in any process, of which ``torch.distributed.checkpoint`` makes a failure like others, stops all."""
    if any(isinstance(error, KeyboardInterrupt) for error, _ in failures.values()):
        raise KeyboardInterrupt


def newest_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """The last whole checkpoint in a folder of :meth:`DistributedTrainer.save`."""
    return max(_named(_CHECKPOINT, Path(path)), default=None)


def _named(pattern: re.Pattern[str], folder: Path) -> list[Path]:
    """What a folder holds of these names; all else there is the user's."""
    return [path for path in folder.glob("*") if pattern.fullmatch(path.name)]
