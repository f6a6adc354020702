# SPDX-License-Identifier: MIT
from os import PathLike
from typing import Any

def build_info() -> dict[str, Any]: ...
def advise_huge_pages(address: int, bytes: int) -> int: ...
def kept_bytes() -> int: ...
def release_kept_memory() -> None: ...
def read_text(
    path: str | PathLike[str],
    *,
    libsvm: bool = False,
    begin: int = 0,
    end: int | None = None,
    first_line: int = 1,
    num_features: int | None = None,
    num_fields: int | None = None,
    lenient: bool = False,
    max_faults: int = 10,
    num_threads: int = 1,
) -> dict[str, Any]: ...
