# SPDX-License-Identifier: MIT
"""``ffm-ext demo``: an FFM trained on the Adult data, and the fused layer timed beside plain PyTorch.

It needs rich, scikit-learn and matplotlib (the extras ``cli``, ``sklearn`` and ``bench``).
"""

from ._run import run_demo

__all__ = ["run_demo"]
