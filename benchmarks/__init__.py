# SPDX-License-Identifier: MIT
"""What the fused interaction costs, beside everything else that computes it. `python -m benchmarks`."""
