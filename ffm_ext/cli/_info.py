# SPDX-License-Identifier: MIT
"""``ffm-ext info``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._build_info import build_info, library_path
from ..data import open_dataset
from ..training import Trainer
from ._command import Command
from ._models import is_checkpoint_folder, load_any_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, nargs="?", help="a model, checkpoint or dataset to describe instead"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> None:
    info = dict(build_info()) if args.file is None else describe(args.file)
    if args.file is None:
        info["library"] = str(library_path())
    if args.json:
        print(json.dumps(info, indent=2))
        return
    width = max(map(len, info))
    for name, value in info.items():
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        print(f"{name:<{width}}  {text}")


def describe(path: Path) -> dict[str, Any]:
    """What a model, checkpoint or dataset is."""
    if path.is_dir() and not is_checkpoint_folder(path):
        data = open_dataset(path)
        return {
            "kind": "ffm_ext dataset",
            "samples": len(data),
            "entries": data.nnz,
            "skipped": data.metadata.get("skipped", 0),
            "num_features": data.num_features,
            "num_fields": data.num_fields,
            "shards": len(data.shards),
        }
    model, kind, loss, trainer = load_any_model(path)
    layer = model.interaction
    return {
        "kind": kind,
        "num_features": layer.num_features,
        "num_fields": layer.num_fields,
        "embed_dim": layer.embed_dim,
        "dtype": str(layer.weight.dtype).removeprefix("torch."),
        "within_field": layer.within_field,
        "normalize": model.normalize,
        "bias": model.linear.bias is not None,
        "linear": model.linear.weight is not None,
        **({} if loss is None else {"loss": loss}),
        **({} if trainer is None else _progress_of(trainer)),
    }


def _progress_of(trainer: Trainer) -> dict[str, Any]:
    """How far a checkpoint is, and the settings that it goes on with."""
    optimizer = trainer.optimizer
    return {
        "epochs": trainer.epoch,
        "samples_of_next_epoch": trainer.state_dict()["position"]["samples"],
        "mode": trainer.mode,
        "batch_size": trainer.batch_size,
        "shuffle": trainer.shuffle,
        "seed": trainer.seed,
        "optimizer": optimizer.name,
        **asdict(optimizer),
    }


COMMAND = Command(
    help="print what was built and what it runs on, or what a file is",
    add_arguments=add_arguments,
    run=run,
    only_prints=lambda args: True,
)
