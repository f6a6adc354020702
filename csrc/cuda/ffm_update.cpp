// SPDX-License-Identifier: MIT
// Rows of a table, updated on CUDA with gradients that are given.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../updated_table.h"
#include "contents.h"

namespace ffm::cuda {
namespace {

// Where the check is on: raises what the CPU raises.
void check_rows(const char* op, const RowsUpdate& given, const OnDevice& on) {
  if (!checks_device_contents()) return;
  const Tensor memory = torch::stable::new_empty(
      *given.rows, std::vector<int64_t>{static_cast<int64_t>(sizeof(RowFaults))}, ScalarType::Byte);
  RowFaults* const faults = static_cast<RowFaults*>(memory.mutable_data_ptr());
  const int64_t* const rows = static_cast<const int64_t*>(given.rows->const_data_ptr());
  on.check(find_row_faults(rows, given.num_rows, given.table.num_features, faults, on.stream()));
  RowFaults found;
  on.check(read_back(&found, faults, sizeof(found), on.stream()));
  const int64_t first = std::min(found.range, found.order);
  if (first == kNoFault) return;
  int64_t row = 0;
  on.check(read_back(&row, rows + first, sizeof(row), on.stream()));
  if (first == found.range) fail_row_range(op, given.table, first, row);
  fail_row_order(op, first, row);
}

void ffm_update_(const Tensor& weight, const std::vector<Tensor>& states, const OptionalTensor& rows,
                 const Tensor& grad_rows, const std::string& optimizer, const std::vector<double>& settings,
                 int64_t step, std::optional<int64_t> rounding_seed) {
  const char* op = "ffm_update_";
  const RowsUpdate given(op, weight, states, rows, grad_rows, optimizer, settings, step, rounding_seed);
  const OnDevice on(op, weight);
  if (given.rows) check_rows(op, given, on);
  const int64_t* const list = given.rows ? static_cast<const int64_t*>(given.rows->const_data_ptr()) : nullptr;
  on.check(update_rows(given.update, given.table.dtype, given.table.num_features, list, given.num_rows,
                       given.gradient.const_data_ptr(), on.stream()));
}

}  // namespace
}  // namespace ffm::cuda

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CUDA, m) { m.impl("ffm_update_", TORCH_BOX(&ffm::cuda::ffm_update_)); }
