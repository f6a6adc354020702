// SPDX-License-Identifier: MIT
// The CUDA kernels as plain functions that launch them: no torch, no CUDA types.
//
// Each works on the current device and queues its work on `stream`, a cudaStream_t. None allocates, none waits for the
// device (but read_back), so all can be captured in a CUDA graph. Each returns null, or the text of what went wrong.
//
// Lists may hold anything: nothing is read out of bounds. An entry whose id is outside [0, N) or whose field is outside
// [0, F) counts for nothing: its sample's output is NaN, and neither it nor the other entries of its sample give the
// table a gradient. Offsets are clamped to [0, nnz]; where they fall, the sample is empty and its output is NaN.
//
// Templates are for a table of T, and compiled for each type by itself; ffm_kernels.cpp chooses between them.
#pragma once

#include <cstddef>

#include "../optimizer.h"
#include "../params.h"

namespace ffm::cuda {

// -> out, as Problem::output says.
const char* forward(const Problem&, void* out, void* stream);
template <typename T>
const char* forward(const Problem&, void* out, void* stream);

// The sum of the rows of each sample, one-hot -> out [B].
const char* gather_sum(const Problem&, void* out, void* stream);
template <typename T>
const char* gather_sum(const Problem&, void* out, void* stream);

// On a packed table (packed_row_bytes) -> out.
const char* forward_int8(const Problem&, float* out, void* stream);

// A table of numbers -> packed [N, R], and where the first element is that float32 cannot hold, kNoFault where none is.
const char* quantize(const Problem&, void* packed, int64_t* first_bad, void* stream);

// packed -> weight [N, F, K].
const char* dequantize(const Problem&, float* weight, void* stream);

constexpr int64_t kNoFault = 0x7f7f7f7f7f7f7f7f;  // later than all

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

// Which entries of a batch share a row of the table. Lists on the device, in the workspace that group_rows was given.
// Entries are sorted by row, those of a row in their order; entries that count for nothing come last. Where offsets
// fall anywhere, no entry counts.
struct Place;
struct RowGroups {
  const uint32_t* rows = nullptr;     // [nnz] place -> row
  const Place* places = nullptr;      // [nnz] entry -> its place (group_rows.cuh)
  int32_t* arrivals = nullptr;        // [nnz] first place of a row of few entries -> how many of them are done; zeros
  const int32_t* has_many = nullptr;  // whether any row has many entries
  const uint32_t* heads = nullptr;   // a bit for each place: unset where a row of many entries goes on (group_rows.cuh)
  const int32_t* numbers = nullptr;  // [nnz] place -> number of rows up to there, if asked for; the last is R
};
size_t group_rows_bytes(const Problem&, bool number_rows);
const char* group_rows(const Problem&, bool number_rows, void* workspace, RowGroups* groups, void* stream);

// The numbered rows, rising -> rows [R].
const char* list_rows(const Problem&, const RowGroups& groups, int64_t* rows, void* stream);

// Gradients. `grad` has that of the output, and says what is asked for: grad_values; grad_rows, [N, F, K] or with
// numbered rows [R, F, K]; or an update of the table. A row's gradient is summed in an order that its entries' places
// decide: the same bits in every run. No row moves before all samples are read. Without groups: values alone, or
// grad_rows [N, F, K], of float32 or float64, to which entries are added in any order.
size_t backward_bytes(const Problem&, bool has_groups);
template <typename T>
size_t backward_bytes(const Problem&, bool has_groups);
const char* backward(const Problem&, const Gradient& grad, const RowGroups* groups, void* workspace, void* stream);
template <typename T>
const char* backward(const Problem&, const Gradient& grad, const RowGroups* groups, void* workspace, void* stream);

// Updates rows[i], for i in [0, n), with gradient i of grad_rows [n, F, K] in the type of the table. rows rise; none:
// all rows in their order. A row outside the table is left out.
const char* update_rows(const Update&, ScalarKind, int64_t num_features, const int64_t* rows, int64_t n,
                        const void* grad_rows, void* stream);

// Where rows [n] first are out of range, and where they first do not rise; kNoFault where nowhere. In device memory.
struct RowFaults {
  int64_t range = kNoFault;
  int64_t order = kNoFault;
};
const char* find_row_faults(const int64_t* rows, int64_t n, int64_t num_features, RowFaults* faults, void* stream);

}  // namespace ffm::cuda
