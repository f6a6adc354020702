# SPDX-License-Identifier: MIT
from typing import Any

def build_info() -> dict[str, Any]: ...
