// SPDX-License-Identifier: MIT
// The interaction on tables of float32.

#include "forward.cuh"

namespace ffm::cuda {

const char* forward_float32(const Problem& p, void* out, void* stream) { return launch_forward<float>(p, out, stream); }

}  // namespace ffm::cuda
