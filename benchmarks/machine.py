# SPDX-License-Identifier: MIT
"""What the figures were measured on. Nothing here names a person, a host or a path."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import cpuinfo  # type: ignore[import-untyped]
import torch

import ffm_ext


def describe() -> dict[str, Any]:
    """The machine header of a result."""
    info = cpuinfo.get_cpu_info()
    build = ffm_ext.build_info()
    return {
        "cpu": info.get("brand_raw") or platform.machine(),
        "cores": os.cpu_count(),
        "caches": _caches() or "unknown",
        "memory": f"{_meminfo('MemTotal') / 2**30:.0f} GiB",
        "isa": build["isa"],
        "torch": torch.__version__,
        "ffm_ext": build["version"],
        "compiler": build["compiler"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }


def slug(machine: dict[str, Any]) -> str:
    """The folder of a machine's results: its CPU model, the ISA of the kernels and its cores.

    Virtual machines with quite different CPUs call them all by one name.
    """
    model = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|processor", "", str(machine["cpu"]).lower())
    return "-".join([*re.findall(r"[a-z0-9]+", model), machine["isa"], f"{machine['cores']}-cores"])


def commit() -> str | None:
    """What is measured, where git knows: the commit, and whether files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        found = git("rev-parse", "--short=10", "HEAD")
        return f"{found}-dirty" if git("status", "--porcelain", "--untracked-files=no") else found
    except (OSError, subprocess.CalledProcessError):
        return None


def available_memory() -> int:
    """Bytes that a process can still take without swapping."""
    return _meminfo("MemAvailable")


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return 1024 * int(rest.split()[0])
    raise RuntimeError(f"benchmarks: /proc/meminfo has no {key}")


def _caches() -> str:
    """'L1d 32K, L2 1024K, L3 32768K', as the first core sees them."""
    found = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / key).read_text().strip() for key in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found)
