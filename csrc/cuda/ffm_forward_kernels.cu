// SPDX-License-Identifier: MIT
// The interaction, by dtype; the roof that it is measured against; and what may be wrong with a batch.

#include "../dispatch.h"
#include "ffm_kernels.h"
#include "forward.cuh"
#include "pairs.cuh"

namespace ffm::cuda {
namespace {

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

__device__ __forceinline__ void at_first(int64_t* place, int64_t i) {
  atomicMin(reinterpret_cast<unsigned long long*>(place), static_cast<unsigned long long>(i));
}

__global__ void __launch_bounds__(kThreads) find_faults_kernel(const Problem p, Faults* faults) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  if (p.offsets) {
    const int64_t B = p.batch_size;
    for (int64_t b = first; b <= B; b += step) {
      if (b == 0 ? p.offsets[0] != 0 : p.offsets[b] < p.offsets[b - 1]) at_first(&faults->offset, b);
      if (b == B && p.offsets[B] != p.num_entries) at_first(&faults->offset, B + 1);
    }
  }
  for (int64_t e = first; e < p.num_entries; e += step) {
    if (static_cast<uint64_t>(p.indices[e]) >= static_cast<uint64_t>(p.num_features)) at_first(&faults->index, e);
    if (p.fields && static_cast<uint64_t>(p.fields[e]) >= static_cast<uint64_t>(p.num_fields)) {
      at_first(&faults->field, e);
    }
    if (p.values) {
      bool is_finite = true;
      dispatch_dtype(p.dtype, [&](auto scalar) {
        using T = typename decltype(scalar)::type;
        const Sum<T> x = load(static_cast<const T*>(p.values) + e);
        is_finite = x - x == 0;
      });
      if (!is_finite) at_first(&faults->value, e);
    }
  }
}

}  // namespace

const char* forward(const Problem& p, void* out, void* stream) {
  switch (p.dtype) {
    case ScalarKind::kFloat32: return forward_float32(p, out, stream);
    case ScalarKind::kFloat64: return forward_float64(p, out, stream);
    case ScalarKind::kBFloat16: return forward_bfloat16(p, out, stream);
    case ScalarKind::kFloat16: return forward_float16(p, out, stream);
  }
  return "no such dtype";
}

const char* gather_sum(const Problem& p, void* out, void* stream) {
  if (p.batch_size == 0) return nullptr;
  cudaError_t error = cudaSuccess;
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    const int64_t row_bytes = p.row_size() * static_cast<int64_t>(sizeof(T));
    const auto launch = [&](auto bytes) {
      error = launch_gather_sum<T, bytes()>(p, out, static_cast<cudaStream_t>(stream));
    };
    switch (common_alignment(row_bytes, p.weight)) {
      case 16: return launch(std::integral_constant<int, 16>{});
      case 8: return launch(std::integral_constant<int, 8>{});
      default: return launch(std::integral_constant<int, sizeof(T)>{});
    }
  });
  return error_text(error);
}

const char* find_faults(const Problem& p, Faults* faults, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  static_assert(kNoFault == 0x7f7f7f7f7f7f7f7f, "as cudaMemset writes it");
  cudaError_t error = cudaMemsetAsync(faults, 0x7f, sizeof(Faults), stream);
  Device device;
  if (error == cudaSuccess) error = current_device(&device);
  unsigned blocks = 0;
  const int64_t work = (std::max(p.num_entries, p.batch_size + 1) + kThreads - 1) / kThreads;
  if (error == cudaSuccess) error = resident_blocks(device, find_faults_kernel, kThreads, 0, work, &blocks);
  if (error == cudaSuccess) error = GPU_LAUNCH(find_faults_kernel, blocks, kThreads, 0, stream, p, faults);
  return error_text(error);
}

const char* read_back(void* host, const void* device, size_t bytes, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  cudaError_t error = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  return error_text(error);
}

}  // namespace ffm::cuda
