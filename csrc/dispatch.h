// SPDX-License-Identifier: MIT
// From run-time properties to template arguments: the dtype list and the embed_dim list.
#pragma once

#include <type_traits>

#include "params.h"

namespace ffm {

// A storage type as an argument.
template <typename T>
struct Scalar {
  using type = T;
};

// Calls fn(Scalar<T>{}).
template <typename Fn>
FFM_HOST_DEVICE void dispatch_dtype(ScalarKind dtype, Fn&& fn) {
  switch (dtype) {
    case ScalarKind::kFloat32: return fn(Scalar<float>{});
    case ScalarKind::kFloat64: return fn(Scalar<double>{});
    case ScalarKind::kBFloat16: return fn(Scalar<BFloat16>{});
    case ScalarKind::kFloat16: return fn(Scalar<Float16>{});
  }
}

// Calls fn(std::integral_constant<int, K>{}), K = 0 where embed_dim is known only at run time.
template <typename Fn>
FFM_HOST_DEVICE void dispatch_embed_dim(int64_t embed_dim, Fn&& fn) {
  switch (embed_dim) {
    case 4: return fn(std::integral_constant<int, 4>{});
    case 8: return fn(std::integral_constant<int, 8>{});
    case 16: return fn(std::integral_constant<int, 16>{});
    default: return fn(std::integral_constant<int, 0>{});
  }
}

// Calls fn(std::integral_constant<Output, O>{}).
template <typename Fn>
FFM_HOST_DEVICE void dispatch_output(Output output, Fn&& fn) {
  switch (output) {
    case Output::kSum: return fn(std::integral_constant<Output, Output::kSum>{});
    case Output::kDot: return fn(std::integral_constant<Output, Output::kDot>{});
    case Output::kHadamard: return fn(std::integral_constant<Output, Output::kHadamard>{});
  }
}

}  // namespace ffm
