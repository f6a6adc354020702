// SPDX-License-Identifier: MIT
// Gradients, by the type of the table.

#include "ffm_kernels.h"

namespace ffm::cuda {

#define FFM_BACKWARD_OF(dtype)                                                                                    \
  const char* backward_##dtype(const Problem&, const Gradient&, const RowGroups*, void* workspace, void* stream); \
  size_t backward_bytes_##dtype(const Problem&, bool has_groups);
FFM_BACKWARD_OF(float32)
FFM_BACKWARD_OF(float64)
FFM_BACKWARD_OF(bfloat16)
FFM_BACKWARD_OF(float16)
#undef FFM_BACKWARD_OF

size_t backward_bytes(const Problem& p, bool has_groups) {
  switch (p.dtype) {
    case ScalarKind::kFloat32: return backward_bytes_float32(p, has_groups);
    case ScalarKind::kFloat64: return backward_bytes_float64(p, has_groups);
    case ScalarKind::kBFloat16: return backward_bytes_bfloat16(p, has_groups);
    case ScalarKind::kFloat16: return backward_bytes_float16(p, has_groups);
  }
  return 0;
}

const char* backward(const Problem& p, const Gradient& grad, const RowGroups* groups, void* workspace, void* stream) {
  switch (p.dtype) {
    case ScalarKind::kFloat32: return backward_float32(p, grad, groups, workspace, stream);
    case ScalarKind::kFloat64: return backward_float64(p, grad, groups, workspace, stream);
    case ScalarKind::kBFloat16: return backward_bfloat16(p, grad, groups, workspace, stream);
    case ScalarKind::kFloat16: return backward_float16(p, grad, groups, workspace, stream);
  }
  return "no such dtype";
}

}  // namespace ffm::cuda
