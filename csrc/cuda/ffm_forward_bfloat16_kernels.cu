// SPDX-License-Identifier: MIT
// The interaction on tables of bfloat16.

#include "forward.cuh"

namespace ffm::cuda {

const char* forward_bfloat16(const Problem& p, void* out, void* stream) {
  return launch_forward<BFloat16>(p, out, stream);
}

}  // namespace ffm::cuda
