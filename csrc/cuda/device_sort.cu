// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "device_sort.h"

namespace ffm::cuda {
namespace {

const char* error_text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

size_t sort_workspace_bytes(int64_t n) {
  size_t sort_bytes = 0, scan_bytes = 0;
  cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, static_cast<const uint32_t*>(nullptr),
                                  static_cast<uint32_t*>(nullptr), static_cast<const int32_t*>(nullptr),
                                  static_cast<int32_t*>(nullptr), n);
  cub::DeviceScan::InclusiveSum(nullptr, scan_bytes, static_cast<int32_t*>(nullptr), static_cast<int32_t*>(nullptr), n);
  return std::max(sort_bytes, scan_bytes);
}

const char* sort_pairs(const uint32_t* keys, const int32_t* values, uint32_t* sorted_keys, int32_t* sorted_values,
                       int64_t n, int key_bits, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  return error_text(cub::DeviceRadixSort::SortPairs(workspace, workspace_bytes, keys, sorted_keys, values,
                                                    sorted_values, n, 0, key_bits, stream));
}

const char* inclusive_sum(int32_t* list, int64_t n, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  return error_text(cub::DeviceScan::InclusiveSum(workspace, workspace_bytes, list, list, n, stream));
}

}  // namespace ffm::cuda
