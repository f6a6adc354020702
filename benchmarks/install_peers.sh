#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Installs the libraries that the benchmarks compare against into one Python environment.
#
#   benchmarks/install_peers.sh [PYTHON] [PEER ...]
#
# PYTHON defaults to $PYTHON, then to python3; PEER to torchfm, modern-fm, pylibffm and fastFM (xlearn only
# when named). Peers are installed one by one and without their dependencies, so that none of them moves the
# torch or numpy that is being measured. One that fails is reported at the end with its reason and stops no
# other; the exit status is 1 if any failed.
set -uo pipefail

python=${1:-${PYTHON:-python3}}
[ $# -gt 0 ] && shift
peers=("$@")
[ ${#peers[@]} -eq 0 ] && peers=(torchfm modern-fm pylibffm fastFM)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pip_install() { "$python" -m pip install --quiet --no-deps "$@"; }

# Runs a program in a scratch folder, so that an import sees what is installed and nothing else.
check() { (cd "$work" && "$python" -c "$1"); }

install_torchfm() {
  pip_install torchfm==0.7.0
  check "import numpy; numpy.long = numpy.int64; import torchfm.layer"
}

install_modern-fm() {
  pip_install modern-fm==1.1.2
  check "from modern_fm import FFMRegressor, _backend; assert _backend._rust, 'no compiled backend'"
}

install_pylibffm() {
  pip_install pylibffm==0.4.1
  check "import pylibffm"
}

# The sdist ships C code of an old Cython, which a current Python does not compile, beside static libraries
# of fastFM-core and OpenBLAS for Linux on x86-64. Only the Cython layer is made anew, in an environment of
# its own that has the target's numpy headers and the last Cython before 3.
install_fastFM() {
  local build=$work/fastfm numpy
  numpy=$(check "import numpy; print(numpy.__version__)")
  "$python" -m venv "$build/venv"
  "$build/venv/bin/python" -m pip install --quiet "cython<3" "setuptools<81" wheel "numpy==$numpy"
  "$build/venv/bin/python" -m pip download --quiet --no-deps --no-build-isolation --no-binary fastFM \
    --dest "$build" fastFM==0.2.10
  tar -xzf "$build/fastFM-0.2.10.tar.gz" -C "$build"
  rm "$build/fastFM-0.2.10/fastFM/ffm.c"
  (cd "$build/fastFM-0.2.10" && "$build/venv/bin/python" setup.py --quiet bdist_wheel)
  pip_install "$build"/fastFM-0.2.10/dist/*.whl
  check "
from fastFM import als, datasets, mcmc
x, y, _ = datasets.make_user_item_regression(n_user=5, n_item=4)
als.FMRegression(n_iter=2, rank=2).fit(x, y).predict(x)
mcmc.FMRegression(n_iter=2, rank=2).fit_predict(x, y, x)"
}

install_xlearn() {
  USER=${USER:-nobody} pip_install xlearn==0.40a1
  check "import os; os.environ.setdefault('USER', 'nobody'); import xlearn"
}

"$python" -m pip --version > /dev/null || { echo "install_peers: '$python' has no pip" >&2; exit 1; }
# What the peers import besides torch; already there in a development environment.
"$python" -m pip install --quiet numpy scipy scikit-learn || exit 1

summary=()
failed=0
for peer in "${peers[@]}"; do
  echo "install_peers: $peer"
  if [ "$(type -t "install_$peer")" != function ]; then
    summary+=("FAILED     $peer: unknown; known are torchfm, modern-fm, pylibffm, fastFM, xlearn")
    failed=1
    continue
  fi
  log=$work/$peer.log
  # A subshell of its own: inside an 'if', bash would ignore set -e.
  (set -e; "install_$peer") > "$log" 2>&1
  if [ $? -eq 0 ]; then
    summary+=("installed  $peer")
  else
    sed 's/^/  /' "$log" | tail -n 40
    reason=$(grep -iE 'error|not found|no such' "$log" | tail -n 1)
    summary+=("FAILED     $peer: ${reason:-$(tail -n 1 "$log")}")
    failed=1
  fi
done

echo
printf 'install_peers: %s\n' "${summary[@]}"
exit "$failed"
