// SPDX-License-Identifier: MIT
// What csrc/cuda/device_sort.cu leaves to CUB, for the emulator.

#include "cuda/device_sort.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace ffm::cuda {

size_t sort_workspace_bytes(int64_t n) { return static_cast<size_t>(4 * n + 1000) / 256 * 256; }

const char* sort_pairs(const uint32_t* keys, const int32_t* values, uint32_t* sorted_keys, int32_t* sorted_values,
                       int64_t n, int key_bits, void* workspace, size_t workspace_bytes, cudaStream_t) {
  if (workspace_bytes < sort_workspace_bytes(n)) return "sort_pairs: the workspace is too small";
  std::memset(workspace, 0xff, workspace_bytes);
  const uint32_t mask = key_bits >= 32 ? ~0u : (1u << key_bits) - 1;
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return (keys[i] & mask) < (keys[j] & mask); });
  for (int64_t i = 0; i < n; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_values[i] = values[order[i]];
  }
  return nullptr;
}

const char* inclusive_sum(int32_t* list, int64_t n, void* workspace, size_t workspace_bytes, cudaStream_t) {
  if (workspace_bytes < sort_workspace_bytes(n)) return "inclusive_sum: the workspace is too small";
  std::memset(workspace, 0xff, workspace_bytes);
  std::partial_sum(list, list + n, list);
  return nullptr;
}

}  // namespace ffm::cuda
