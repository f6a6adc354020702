// SPDX-License-Identifier: MIT
// The CPU kernels as tables of functions, one of each kind for an ISA and a storage type (see isa.h). Each works on a
// range of samples or entries and calls nothing but itself: threads are the adapter's.
#pragma once

#include <cstddef>

#include "../optimizer.h"

namespace ffm {

// Samples or fields [begin, end).
struct Range {
  int64_t begin, end;
};

struct ForwardKernels {
  // Bytes of scratch, aligned to 64, that a thread needs for `forward`.
  size_t (*scratch_bytes)(const Problem&);

  // Samples [begin, end) -> their part of out.
  void (*forward)(const Problem&, void* out, int64_t begin, int64_t end, void* scratch);

  // Sum of the rows of each sample -> their part of out [B].
  void (*gather_sum)(const Problem&, void* out, int64_t begin, int64_t end);
};

struct BackwardKernels {
  // Bytes of scratch, aligned to 64, that a thread needs for `backward`, where it updates the table or not.
  size_t (*scratch_bytes)(const Problem&, bool updates);

  // Samples -> the gradients of those of their entries that belong to some fields, one or more: all, or the samples are
  // a matrix and there is neither an update nor a gradient of values.
  void (*backward)(const Problem&, const Gradient&, Range samples, Range fields, void* scratch);

  // Adds the staged rows of n entries, in the given order.
  void (*add_staged)(const Problem&, const Gradient&, const int64_t* entries, int64_t n);

  // With sum_slots: stores the sums [begin, end) in the rows of the entries that are their first, or updates those.
  void (*finish_sums)(const Problem&, const Gradient&, const int64_t* first_entries, int64_t begin, int64_t end);
};

struct TrainKernels {
  // Bytes of scratch, aligned to 64, that a thread needs for `train`.
  size_t (*scratch_bytes)(const Problem&);

  // Samples [begin, end), one after the other: score, loss, update of all that the sample reads. labels [B]; weights
  // [B], or none: all are 1. Sample b is update number step + b of its table. The sum of weight * loss.
  double (*train)(const Problem&, const Training&, const float* labels, const float* weights, int64_t step,
                  int64_t begin, int64_t end, void* scratch);

  // Rows rows[i], each named once, for i in [begin, end): updated with gradient i of grad_rows [., F, K], in the type
  // of the table. No rows: row i. scratch: [F, K] in the type of sums, aligned to 64.
  void (*update_rows)(const Update&, const int64_t* rows, const void* grad_rows, int64_t begin, int64_t end,
                      void* scratch);

  // Row `row` of a table with its states, and row `slot` of two copies: what `own` has changed since `before` is added
  // to the table's row, and both become what that is.
  void (*join_row)(const Update&, int64_t row, const UpdatedTable& own, const UpdatedTable& before, int64_t slot);
};

// On a packed table (packed_row_bytes).
struct Int8Kernels {
  // Whether `forward` takes a Problem; of its samples, those that have one entry a field, in the order of the fields.
  bool (*has_forward)(const Problem&);

  // Bytes of scratch, aligned to 64, that a thread needs for `forward` or `field_sums`.
  size_t (*scratch_bytes)(const Problem&);

  // Samples [begin, end) -> their part of out.
  void (*forward)(const Problem&, float* out, int64_t begin, int64_t end, void* scratch);

  // Sample b -> how many entries each field has, counts [F]; the field sums S[f] of those that have any, sums [F, F,
  // K]; and, with within_field, the products of the pairs inside each field, within [F, K].
  void (*field_sums)(const Problem&, int64_t b, int64_t* counts, float* sums, float* within, void* scratch);

  // Rows [begin, end) of the table -> rows [end - begin, F, K].
  void (*dequantize)(const Problem&, float* rows, int64_t begin, int64_t end);
};

}  // namespace ffm
