// SPDX-License-Identifier: MIT
// What may be wrong with a batch.

#include "../dispatch.h"
#include "ffm_kernels.h"
#include "launch.h"
#include "scalars.cuh"

namespace ffm::cuda {
namespace {

constexpr int kThreads = 256;

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
