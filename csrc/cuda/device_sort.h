// SPDX-License-Identifier: MIT
// Sorting and scanning lists on the device. Nothing is allocated, waited for or read back.
#pragma once

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st*;

namespace ffm::cuda {

// Bytes of workspace, aligned to 256, that any of the functions needs for n elements.
size_t sort_workspace_bytes(int64_t n);

// Sorts pairs by the low `key_bits` of their keys; pairs of equal keys keep their order. Inputs and outputs do not
// overlap. An error text, or null.
const char* sort_pairs(const uint32_t* keys, const int32_t* values, uint32_t* sorted_keys, int32_t* sorted_values,
                       int64_t n, int key_bits, void* workspace, size_t workspace_bytes, cudaStream_t stream);

// list[i] = list[0] + ... + list[i], in place. An error text, or null.
const char* inclusive_sum(int32_t* list, int64_t n, void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace ffm::cuda
