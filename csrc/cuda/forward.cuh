// SPDX-License-Identifier: MIT
// Which kernel computes the interaction of a Problem on a table of T.
#pragma once

#include "field_sums_forward.cuh"
#include "one_hot_forward.cuh"

namespace ffm::cuda {

// One-hot samples that fit into shared memory; false: they do not.
template <typename T>
bool launch_table_pairs(const Device& device, const Problem& p, void* out, cudaStream_t stream, cudaError_t* error) {
  const int64_t bytes = p.embed_dim * static_cast<int64_t>(sizeof(T));
  const auto launch = [&](auto unit_bytes, auto units) {
    return launch_one_hot<TablePairs<T, unit_bytes(), units()>>(
        device, p, p.row_size() * static_cast<int64_t>(sizeof(T)), unit_bytes(), bytes / unit_bytes(), 0, out, stream,
        error);
  };
  using std::integral_constant;
  constexpr integral_constant<int, 16> k16;
  constexpr integral_constant<int, 8> k8;
  constexpr integral_constant<int, 4> k4;
  constexpr integral_constant<int, 0> kAny;
  // Those of embed_dim 4, 8 and 16.
  switch (bytes) {
    case 8:
      if constexpr (sizeof(T) == 2) return launch(k8, integral_constant<int, 1>{});
      break;
    case 16:
      if constexpr (sizeof(T) <= 4) return launch(k16, integral_constant<int, 1>{});
      break;
    case 32: return launch(k16, integral_constant<int, 2>{});
    case 64:
      if constexpr (sizeof(T) >= 4) return launch(k16, integral_constant<int, 4>{});
      break;
    default: break;
  }
  switch (common_alignment(bytes, nullptr)) {
    case 16: return launch(k16, kAny);
    case 8: return launch(k8, kAny);
    case 4:
      if constexpr (sizeof(T) <= 4) return launch(k4, kAny);
      break;
    default:
      if constexpr (sizeof(T) == 2) return launch(integral_constant<int, 2>{}, kAny);
      break;
  }
  return false;
}

template <typename T>
const char* launch_forward(const Problem& p, void* out, void* stream_) {
  if (p.batch_size == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error_text(error);
  if (!p.fields && launch_table_pairs<T>(device, p, out, stream, &error)) return error_text(error);
  const int64_t row_bytes = p.row_size() * static_cast<int64_t>(sizeof(T));
  const TableRows<T> rows{static_cast<const unsigned char*>(p.weight), row_bytes};
  // Numbers that are read at once: in shared memory they are 16 bytes at most.
  const int64_t bytes = p.embed_dim * static_cast<int64_t>(sizeof(T));
  switch (common_alignment(bytes, p.weight) / static_cast<int>(sizeof(T))) {
    case 8:
    case 4:
      if constexpr (sizeof(T) <= 4) return error_text(launch_field_sums<TableRows<T>, 4>(device, p, rows, out, stream));
      [[fallthrough]];
    case 2: return error_text(launch_field_sums<TableRows<T>, 2>(device, p, rows, out, stream));
    default: return error_text(launch_field_sums<TableRows<T>, 1>(device, p, rows, out, stream));
  }
}

// In a file a dtype, for a build on several cores.
const char* forward_float32(const Problem& p, void* out, void* stream);
const char* forward_float64(const Problem& p, void* out, void* stream);
const char* forward_bfloat16(const Problem& p, void* out, void* stream);
const char* forward_float16(const Problem& p, void* out, void* stream);

}  // namespace ffm::cuda
