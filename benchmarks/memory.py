# SPDX-License-Identifier: MIT
"""How far the memory of a process rises during a step: beside the table, which is there before.

``python -m benchmarks.memory torchfm dense 100000 4 uniform 39 4096`` prints it, in bytes, for N, K, ids, F and B.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import astuple, replace
from typing import get_args

import torch

from ffm_ext import memory

from .subjects import Fused, Subject, Torchfm, Vectorised
from .workloads import DIRECTIONS, Direction, Ids, Workload, make_batches, make_weight

MEASURED: tuple[type[Subject], ...] = (Fused, Torchfm, Vectorised)


def expected_bytes(workload: Workload, direction: Direction, touched: int) -> int:
    """What our step makes: its output, the gradient of ``touched`` rows or of all, and lists that group the entries."""
    entries = workload.batch_size * workload.num_fields
    row = workload.num_fields * workload.embed_dim * 4
    output = 4 * workload.batch_size
    if direction == "forward":
        return output
    # A row number, a slot and a mark an entry; 16 bytes for 64 rows of the table (csrc/cpu/group_rows.cpp).
    lists = 17 * entries + workload.num_features // 4
    if direction == "dense":
        return output + workload.num_features * row + lists
    return output + touched * (row + 8) + lists


def measure(kind: type[Subject], workload: Workload, direction: Direction) -> int:
    """The same in a process of its own, whose memory nothing else has touched."""
    shape = astuple(workload)  # N, K, ids, F, B
    done = subprocess.run(
        [sys.executable, "-m", __name__, kind.name, direction, *map(str, shape)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def rise(kind: type[Subject], workload: Workload, direction: Direction) -> int:
    """Of this process, by its high-water mark of resident memory, which Linux lets us lower."""
    torch.set_num_threads(1)
    # Threads, code and what is loaded on first use.
    small = replace(workload, num_features=10 * workload.num_fields, batch_size=2)
    warm = kind(small, make_weight(small))
    warm.step(warm.prepare(make_batches(small)[0]), torch.ones(2), direction)
    memory.release()
    subject = kind(workload, make_weight(workload))
    batch = subject.prepare(make_batches(workload)[0])
    grad_output = torch.ones(workload.batch_size)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    subject.step(batch, grad_output, direction)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"^{name}:\s+(\d+) kB$", file.read(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=[kind.name for kind in MEASURED])
    parser.add_argument("direction", choices=DIRECTIONS)
    parser.add_argument("num_features", type=int)
    parser.add_argument("embed_dim", type=int)
    parser.add_argument("ids", choices=get_args(Ids))
    parser.add_argument("num_fields", type=int)
    parser.add_argument("batch_size", type=int)
    given = vars(parser.parse_args())
    name, direction = given.pop("subject"), given.pop("direction")
    kind = next(kind for kind in MEASURED if kind.name == name)
    print(rise(kind, Workload(**given), direction))


if __name__ == "__main__":
    main()
