// SPDX-License-Identifier: MIT
// Tensors for results, the large ones in memory that is kept (see kept_memory.h).
#pragma once

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "huge_pages.h"
#include "kept_memory.h"

// Part of the stable ABI from torch 2.11 on; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* deleter_context);

namespace ffm {

// An uninitialised tensor on the CPU with the dtype of `like`. From 1 MiB on it is made from kept memory, unless torch
// is older than 2.11.
inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes) {
  size_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes < kSmallestBlock || torch_from_blob == nullptr) {
    Tensor result = torch::stable::new_empty(like, sizes);
    advise_huge_pages(result.mutable_data_ptr(), bytes);
    return result;
  }
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  const KeptBlock block = take_block(bytes);
  AtenTensorHandle tensor = nullptr;
  const AOTITorchError error = torch_from_blob(
      block.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype,
      aoti_torch_device_type_cpu(), -1, &tensor, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void* capacity) { give_back({data, reinterpret_cast<size_t>(capacity)}); },
      reinterpret_cast<void*>(block.bytes));
  if (error != AOTI_TORCH_SUCCESS) give_back(block);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(tensor);
}

}  // namespace ffm
