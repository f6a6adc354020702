// SPDX-License-Identifier: MIT
// Gradients of tables of float64.

#include "backward.cuh"

namespace ffm::cuda {

const char* backward_float64(const Problem& p, const Gradient& grad, const RowGroups* groups, void* workspace,
                             void* stream) {
  return launch_backward<double>(p, grad, groups, workspace, stream);
}
size_t backward_bytes_float64(const Problem& p, bool has_groups) {
  return BackwardWorkspace<double>(p, has_groups, nullptr).bytes;
}

}  // namespace ffm::cuda
