// SPDX-License-Identifier: MIT
// From run-time properties to template arguments: the dtype list and the embed_dim list.
#pragma once

#include <type_traits>

#include "params.h"

namespace ffm {

// Called from the host with functions of the host, from kernels with functions of the device: nvcc need not ask which.
#ifdef __CUDACC__
#define FFM_ANY_FUNCTION _Pragma("nv_exec_check_disable")
#else
#define FFM_ANY_FUNCTION
#endif

// A storage type as an argument.
template <typename T>
struct Scalar {
  using type = T;
};

// Calls fn(Scalar<T>{}).
FFM_ANY_FUNCTION
template <typename Fn>
FFM_HOST_DEVICE void dispatch_dtype(ScalarKind dtype, Fn&& fn) {
  switch (dtype) {
    case ScalarKind::kFloat32: return fn(Scalar<float>{});
    case ScalarKind::kFloat64: return fn(Scalar<double>{});
    case ScalarKind::kBFloat16: return fn(Scalar<BFloat16>{});
    case ScalarKind::kFloat16: return fn(Scalar<Float16>{});
  }
}

// The embed_dim list.
constexpr bool has_own_kernels(int64_t embed_dim) { return embed_dim == 4 || embed_dim == 8 || embed_dim == 16; }

// Calls fn(std::integral_constant<int, K>{}), K = 0 where embed_dim is known only at run time.
FFM_ANY_FUNCTION
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
FFM_ANY_FUNCTION
template <typename Fn>
FFM_HOST_DEVICE void dispatch_output(Output output, Fn&& fn) {
  switch (output) {
    case Output::kSum: return fn(std::integral_constant<Output, Output::kSum>{});
    case Output::kDot: return fn(std::integral_constant<Output, Output::kDot>{});
    case Output::kHadamard: return fn(std::integral_constant<Output, Output::kHadamard>{});
  }
}

}  // namespace ffm
