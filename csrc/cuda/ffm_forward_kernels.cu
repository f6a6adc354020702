// SPDX-License-Identifier: MIT
// The interaction on a table of FFM_DTYPE, and the roof that it is measured against.

#include "ffm_kernels.h"
#include "field_sums_forward.cuh"
#include "one_hot_forward.cuh"
#include "pairs.cuh"

namespace ffm::cuda {
namespace {

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

constexpr int kThreads = 256;

// A warp a sample: every lane has several reads in flight, of kBytes each.
template <typename T, int kBytes>
__global__ void __launch_bounds__(kThreads, 4) gather_sum_kernel(const Problem p, T* out) {
  using A = Sum<T>;
  constexpr int kAtOnce = 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row_bytes = p.row_size() * static_cast<int64_t>(sizeof(T));
  const int F = static_cast<int>(p.num_fields), units = static_cast<int>(row_bytes / kBytes);
  const int step_row = 32 / units, step_unit = 32 % units;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kThreads / 32;
  for (int64_t b = warp; b < p.batch_size; b += num_warps) {
    A total = 0;
    bool is_bad = false;
    int r = lane / units, u = lane % units;
    while (r < F) {
      typename Bits<kBytes>::type raw[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        raw[j] = {};
        if (r >= F) continue;
        const int64_t id = p.indices[b * F + r];
        if (static_cast<uint64_t>(id) < static_cast<uint64_t>(p.num_features)) {
          const void* const from = static_cast<const unsigned char*>(p.weight) + id * row_bytes + u * kBytes;
          raw[j] = *static_cast<const typename Bits<kBytes>::type*>(from);
        } else {
          is_bad = true;
        }
        r += step_row;
        u += step_unit;
        if (u >= units) {
          u -= units;
          ++r;
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const auto unit = unpack_unit<T, kBytes>(raw[j]);
#pragma unroll
        for (int k = 0; k < unit.kCount; ++k) total += unit.x[k];
      }
    }
    if (is_bad) total = not_a_number<A>();
    total = sum_lanes(total);
    if (lane == 0) store(out + b, total);
  }
}

template <typename T, int kBytes>
cudaError_t launch_gather_sum(const Problem& p, void* out, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(&device);
  unsigned blocks = 0;
  const int64_t work = (p.batch_size + kThreads / 32 - 1) / (kThreads / 32);
  const auto kernel = gather_sum_kernel<T, kBytes>;
  if (error == cudaSuccess) error = resident_blocks(device, kernel, kThreads, 0, work, &blocks);
  if (error != cudaSuccess) return error;
  return GPU_LAUNCH(kernel, blocks, kThreads, 0, stream, p, static_cast<T*>(out));
}

}  // namespace

template <typename T>
const char* forward(const Problem& p, void* out, void* stream_) {
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

template <typename T>
const char* gather_sum(const Problem& p, void* out, void* stream) {
  if (p.batch_size == 0) return nullptr;
  const int64_t row_bytes = p.row_size() * static_cast<int64_t>(sizeof(T));
  const auto launch = [&](auto bytes) {
    return error_text(launch_gather_sum<T, bytes()>(p, out, static_cast<cudaStream_t>(stream)));
  };
  switch (common_alignment(row_bytes, p.weight)) {
    case 16: return launch(std::integral_constant<int, 16>{});
    case 8: return launch(std::integral_constant<int, 8>{});
    default: return launch(std::integral_constant<int, sizeof(T)>{});
  }
}

template const char* forward<FFM_DTYPE>(const Problem&, void*, void*);
template const char* gather_sum<FFM_DTYPE>(const Problem&, void*, void*);

}  // namespace ffm::cuda
