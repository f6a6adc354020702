#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Everything that wants a GPU, in one run of under ten minutes, offline: build, the tests on the device, compute-sanitizer,
# the roofline, the peers. Results: $OUT, or benchmarks/results/<gpu>/. A step that fails is reported, and the next runs.
#
#   PYTHON=python3 benchmarks/gpu_check.sh [step ...]      steps: build tests sanitizer roofline peers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
