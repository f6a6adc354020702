// SPDX-License-Identifier: MIT
// The interaction on tables of float16.

#include "forward.cuh"

namespace ffm::cuda {

const char* forward_float16(const Problem& p, void* out, void* stream) {
  return launch_forward<Float16>(p, out, stream);
}

}  // namespace ffm::cuda
