// SPDX-License-Identifier: MIT
// The CUDA kernels as plain functions that launch them: no torch, no CUDA types.
//
// Each works on the current device and queues its work on `stream`, a cudaStream_t. None allocates, none waits for the
// device (but read_back), so all can be captured in a CUDA graph. Each returns null, or the text of what went wrong.
//
// Lists may hold anything: nothing is read out of bounds. An entry whose id is outside [0, N) or whose field is outside
// [0, F) counts for nothing: its sample's output is NaN, and neither it nor the other entries of its sample give the
// table a gradient. Offsets are clamped to [0, nnz]; where they fall, the sample is empty and its output is NaN.
#pragma once

#include <cstddef>

#include "../params.h"

namespace ffm::cuda {

// -> out, as Problem::output says.
const char* forward(const Problem&, void* out, void* stream);

// The sum of the rows of each sample, one-hot -> out [B].
const char* gather_sum(const Problem&, void* out, void* stream);

// On a packed table (packed_row_bytes) -> out.
const char* forward_int8(const Problem&, float* out, void* stream);

// A table of numbers -> packed [N, R], and where the first element is that float32 cannot hold, kNoFault where none is.
const char* quantize(const Problem&, void* packed, int64_t* first_bad, void* stream);

// packed -> weight [N, F, K].
const char* dequantize(const Problem&, float* weight, void* stream);

constexpr int64_t kNoFault = INT64_MAX;

// Where lists first hold what they must not, in device memory. offset: as fail_offset (../batch.h) counts them.
struct Faults {
  int64_t offset = kNoFault;
  int64_t index = kNoFault;
  int64_t field = kNoFault;
  int64_t value = kNoFault;
};
const char* find_faults(const Problem&, Faults* faults, void* stream);

// Copies from the device to the host, and waits for it.
const char* read_back(void* host, const void* device, size_t bytes, void* stream);

}  // namespace ffm::cuda
