// SPDX-License-Identifier: MIT
// What launchers ask of the current device. For .cu files.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "../params.h"
#include "cuda/gpu_compat.h"

namespace ffm::cuda {

inline const char* error_text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

struct Device {
  int num_multiprocessors = 0;
  int shared_bytes = 0;        // that a launch may ask for, beside 1 KiB of static variables
  int shared_bytes_total = 0;  // of a multiprocessor
  bool has_bulk_copies = false;
};

inline cudaError_t current_device(Device* device) {
  int index = 0, major = 0;
  if (cudaError_t error = cudaGetDevice(&index)) return error;
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrMultiProcessorCount, &device->num_multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_bytes_total},
      {cudaDevAttrComputeCapabilityMajor, &major}};
  for (const auto& [attribute, value] : wanted) {
    if (cudaError_t error = cudaDeviceGetAttribute(value, attribute, index)) return error;
  }
  device->shared_bytes -= 1 << 10;
  // FFM_EXT_BULK_COPIES=0 leaves them out, to compare.
  const char* const wanted_bulk = std::getenv("FFM_EXT_BULK_COPIES");
  device->has_bulk_copies = major >= 9 && (wanted_bulk == nullptr || std::strcmp(wanted_bulk, "0") != 0);
#ifndef __CUDACC__
  device->has_bulk_copies &= GPU_HAS_BULK_COPIES != 0;
#endif
  return cudaSuccess;
}

// Before a kernel is launched with so much dynamic shared memory.
template <typename Kernel>
cudaError_t use_shared_memory(Kernel* kernel, size_t shared_bytes) {
  if (shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // Kernels that ask for much shared memory have no use for the first-level cache that shares it.
  if (shared_bytes <= 8 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
}

// As many blocks as the device runs at the same time, but no more than there is work for.
template <typename Kernel>
cudaError_t resident_blocks(const Device& device, Kernel* kernel, int threads, size_t shared_bytes, int64_t work,
                            unsigned* blocks) {
  if (cudaError_t error = use_shared_memory(kernel, shared_bytes)) return error;
  int a_multiprocessor = 0;
  if (cudaError_t error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&a_multiprocessor, kernel, threads, shared_bytes)) {
    return error;
  }
  const int64_t all = static_cast<int64_t>(std::max(1, a_multiprocessor)) * device.num_multiprocessors;
  *blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min(all, work)));
  return cudaSuccess;
}

// The largest power of two, at most `limit`, that divides n and the address.
inline int common_alignment(int64_t n, const void* address, int limit = 16) {
  const uint64_t bits = static_cast<uint64_t>(n) | reinterpret_cast<uintptr_t>(address) | static_cast<uint64_t>(limit);
  return static_cast<int>(bits & (~bits + 1));
}

}  // namespace ffm::cuda
