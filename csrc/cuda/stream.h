// SPDX-License-Identifier: MIT
// The device and the stream on which an operator runs: those of its tensors, and torch's current one there.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

namespace ffm::cuda {

// While it lives, the device of a tensor is the current one.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& t) : op_(op), guard_(t.get_device_index()), stream_(current_stream(op, t)) {}

  void* stream() const { return stream_; }

  // What a launcher (ffm_kernels.h) returned.
  void check(const char* error) const {
    if (error != nullptr) fail<std::runtime_error>(op_, "CUDA: ", error);
  }

 private:
  // Looked up where it lies: a binary that asked for it by name would not load in a torch for the CPU.
  static void* current_stream(const char* op, const Tensor& t) {
    using Getter = AOTITorchError (*)(int32_t device_index, void** stream);
    static const Getter get = [] {
      void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return torch_cuda ? reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    if (get == nullptr) fail<std::runtime_error>(op, "libtorch_cuda.so is not loaded, or knows no current stream");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
    return stream;
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

}  // namespace ffm::cuda
