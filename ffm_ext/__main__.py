# SPDX-License-Identifier: MIT
"""``python -m ffm_ext`` is ``ffm-ext``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
