// SPDX-License-Identifier: MIT
// The interaction on tables of float64.

#include "forward.cuh"

namespace ffm::cuda {

const char* forward_float64(const Problem& p, void* out, void* stream) {
  return launch_forward<double>(p, out, stream);
}

}  // namespace ffm::cuda
