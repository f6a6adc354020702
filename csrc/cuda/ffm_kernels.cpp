// SPDX-License-Identifier: MIT
// The kernels that are compiled for each type by itself, by that of the table.

#include "ffm_kernels.h"

#include "../dispatch.h"

namespace ffm::cuda {

const char* forward(const Problem& p, void* out, void* stream) {
  const char* error = nullptr;
  dispatch_dtype(p.dtype, [&](auto scalar) { error = forward<typename decltype(scalar)::type>(p, out, stream); });
  return error;
}

const char* gather_sum(const Problem& p, void* out, void* stream) {
  const char* error = nullptr;
  dispatch_dtype(p.dtype, [&](auto scalar) { error = gather_sum<typename decltype(scalar)::type>(p, out, stream); });
  return error;
}

size_t backward_bytes(const Problem& p, bool has_groups) {
  size_t bytes = 0;
  dispatch_dtype(p.dtype, [&](auto scalar) { bytes = backward_bytes<typename decltype(scalar)::type>(p, has_groups); });
  return bytes;
}

const char* backward(const Problem& p, const Gradient& grad, const RowGroups* groups, void* workspace, void* stream) {
  const char* error = nullptr;
  dispatch_dtype(p.dtype, [&](auto scalar) {
    error = backward<typename decltype(scalar)::type>(p, grad, groups, workspace, stream);
  });
  return error;
}

}  // namespace ffm::cuda
