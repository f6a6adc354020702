# SPDX-License-Identifier: MIT
"""``ffm-ext check``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._command import Command, to_json
from ._data import check_data, data_in_pieces


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="libffm text, or a folder that `convert` made")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> None:
    check_data(False, args.file)
    problems, skipped = list[str](), 0
    rows = num_entries = positive = 0
    label_sum, low, high = 0.0, math.inf, -math.inf
    pairs = torch.zeros(0, 2, dtype=torch.int64)  # each (field, feature) that occurs, once
    entries = torch.zeros(0, 2, dtype=torch.int64)  # each field that occurs, and how many it has
    for data in data_in_pieces(args.file, lenient=True):
        problems += data.metadata.get("problems", [])
        skipped += int(data.metadata.get("skipped", 0))
        for batch, labels, _ in data.shards:
            rows += len(labels)
            num_entries += batch.nnz
            positive += int((labels > 0).sum())
            label_sum += float(labels.double().sum())
            both = torch.stack([batch.fields.long(), batch.indices.long()], 1)
            pairs = torch.cat([pairs, _unique_pairs(both)])
            entries = _added(entries, torch.stack(both[:, 0].unique(return_counts=True), 1))
            if batch.nnz:
                values = torch.ones(1) if batch.values is None else batch.values
                low, high = min(low, float(values.min())), max(high, float(values.max()))
        pairs = _unique_pairs(pairs)
    found: dict[str, Any] = {
        "broken lines": skipped,
        "rows": rows,
        "entries": num_entries,
        "entries a row": round(num_entries / max(1, rows), 3),
        "features": len(pairs[:, 1].unique()),
        "largest feature": int(pairs[:, 1].max()) if len(pairs) else -1,
        "fields": len(entries),
        "largest field": int(entries[-1, 0]) if len(entries) else -1,
        "labels > 0": round(positive / rows, 6) if rows else None,
        "label mean": round(label_sum / rows, 6) if rows else None,
        "values": [low, high] if num_entries else None,
        "numbers of the fields": entries[:, 0].tolist(),
        "features of each field": pairs[:, 0].unique(return_counts=True)[1].tolist(),
        "entries of each field": entries[:, 1].tolist(),
    }
    if args.json:
        print(to_json({"file": str(args.file), "problems": list(problems), **found}))
    else:
        for problem in problems:
            print(problem)
        if skipped > len(problems):
            print(f"… and {skipped - len(problems)} more")
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {value}")
    if skipped:
        raise ValueError(f"{args.file}: {skipped} broken lines")


def _added(counts: Tensor, more: Tensor) -> Tensor:
    """Two lists ``[n, 2]`` of numbers and their counts as one, by number."""
    both = torch.cat([counts, more])
    numbers, places = both[:, 0].unique(return_inverse=True)
    sums = torch.zeros_like(numbers).index_add(0, places, both[:, 1])
    return torch.stack([numbers, sums], 1)


def _unique_pairs(pairs: Tensor) -> Tensor:
    """The rows of ``[n, 2]`` int64 without repetition."""
    if len(pairs) == 0:
        return pairs
    width = int(pairs[:, 1].max()) + 1
    if int(pairs[:, 0].max()) < 2**62 // width:
        keys = (pairs[:, 0] * width + pairs[:, 1]).unique()  # much faster than unique(dim=0)
        return torch.stack([keys // width, keys % width], 1)
    return pairs.unique(dim=0)


COMMAND = Command(
    help="tell what is wrong with a libffm text, where, and what is in it",
    add_arguments=add_arguments,
    run=run,
    only_prints=lambda args: True,
)
