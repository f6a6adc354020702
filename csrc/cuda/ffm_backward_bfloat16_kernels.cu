// SPDX-License-Identifier: MIT
// Gradients of tables of bfloat16.

#include "backward.cuh"

namespace ffm::cuda {

const char* backward_bfloat16(const Problem& p, const Gradient& grad, const RowGroups* groups, void* workspace,
                              void* stream) {
  return launch_backward<BFloat16>(p, grad, groups, workspace, stream);
}
size_t backward_bytes_bfloat16(const Problem& p, bool has_groups) {
  return BackwardWorkspace<BFloat16>(p, has_groups, nullptr).bytes;
}

}  // namespace ffm::cuda
