# SPDX-License-Identifier: MIT
"""What each CUDA kernel takes: registers, static shared memory, and the occupancy that its registers allow.

From what ptxas said at the last build (build/**/*.ptxas), one line a kernel and architecture. Dynamic shared memory is
decided at the launch (csrc/cuda/stage_rows.cuh) and limits the kernels that stage rows before registers do: they fill
a multiprocessor's shared memory with rows in flight.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REGISTERS = 65536  # of a multiprocessor, sm_80 and sm_90
WARPS = 64
BLOCK = 256  # threads, the most that our kernels are launched with

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class Kernel(NamedTuple):
    source: str
    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int

    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that its registers have room for; a thread takes eight at a time."""
        a_warp = (self.registers + 7) // 8 * 8 * 32
        warps_a_block = BLOCK // 32
        blocks = min(WARPS // warps_a_block, REGISTERS // (a_warp * warps_a_block))
        return blocks * warps_a_block / WARPS


def kernels(build: Path) -> Iterator[Kernel]:
    built = "".join(path.read_text() for path in build.rglob("build.ninja"))
    for path in sorted(build.rglob("*.ptxas")):
        if f"/{path.stem}:" not in built:  # of a source that is no more
            continue
        name = arch = ""
        stack = spilled = 0
        for line in path.read_text().splitlines():
            if entry := ENTRY.search(line):
                name, arch = entry.groups()
            elif spills := SPILLS.search(line):
                stack, spilled = int(spills[1]), int(spills[2])
            elif name and (used := USED.search(line)):
                shared = SHARED.search(line)
                yield Kernel(
                    path.name.partition(".")[0],
                    name,
                    arch,
                    int(used[1]),
                    int(shared[1]) if shared else 0,
                    stack,
                    spilled,
                )
                name = ""


def demangled(names: list[str]) -> list[str]:
    """As C++ has them, without the types of parameters."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for name in text.stdout.splitlines():
        name = re.sub(
            r"ffm::cuda::|ffm::|\(anonymous namespace\)::", "", name.removeprefix("void ")
        )
        depth, end = 0, len(name)
        for i, letter in enumerate(name):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = i
                break
        short.append(name[:end])
    return short


def main() -> int:
    found = list(kernels(Path("build")))
    if not found:
        print("no CUDA kernels in build/: build with FFM_EXT_CUDA=1 first")
        return 1
    # What is ours: CUB's are in the log of device_sort too.
    found = [kernel for kernel in found if "3cub" not in kernel.name]
    names = demangled([kernel.name for kernel in found])
    width = max(map(len, names))
    print(f"{'kernel':{width}}  arch   registers  shared  spilled  occupancy at {BLOCK} threads")
    for name, kernel in sorted(zip(names, found)):
        print(
            f"{name:{width}}  {kernel.arch}  {kernel.registers:9}  {kernel.shared:6}  "
            f"{kernel.spilled:7}  {kernel.occupancy():.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
