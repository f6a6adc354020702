// SPDX-License-Identifier: MIT
// Gradients of tables of float32.

#include "backward.cuh"

namespace ffm::cuda {

const char* backward_float32(const Problem& p, const Gradient& grad, const RowGroups* groups, void* workspace,
                             void* stream) {
  return launch_backward<float>(p, grad, groups, workspace, stream);
}
size_t backward_bytes_float32(const Problem& p, bool has_groups) {
  return BackwardWorkspace<float>(p, has_groups, nullptr).bytes;
}

}  // namespace ffm::cuda
