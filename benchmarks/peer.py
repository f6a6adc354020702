# SPDX-License-Identifier: MIT
"""What can be measured only where a package is installed."""

from __future__ import annotations

import importlib
from typing import ClassVar


class Peer:
    """Base of all that is compared; ``module`` is what it needs to import, if anything."""

    name: ClassVar[str]
    module: ClassVar[str | None] = None

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot run here; None if it can."""
        try:
            if cls.module:
                importlib.import_module(cls.module)
        except ImportError as error:
            return f"missing: {error}"
        return None
