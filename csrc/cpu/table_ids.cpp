// SPDX-License-Identifier: MIT
// Ids that count from 0 in every field -> ids of the whole table.

#include <torch/csrc/stable/library.h>

#include <limits>

#include "batch.h"

namespace ffm {
namespace {

Tensor ffm_table_ids(const Tensor& field_ids, const Tensor& field_starts, const std::string& where) {
  const char* op = where.c_str();
  const Tensor given = torch::stable::contiguous(field_ids);
  const Ids indices = ids(op, "indices", given);
  check_same_device(op, "starts", field_starts, field_ids, "indices");
  if (field_starts.dim() != 1 || field_starts.scalar_type() != ScalarType::Long || field_starts.numel() < 2) {
    fail(op, "starts must be int64 [F + 1], got ", dtype_text(field_starts.scalar_type()), ' ',
         shape_text(field_starts));
  }
  const Tensor dense_starts = torch::stable::contiguous(field_starts);
  const int64_t* const starts = static_cast<const int64_t*>(dense_starts.const_data_ptr());
  const int64_t F = field_starts.numel() - 1;
  if (given.dim() != 2 || given.size(1) != F) {
    fail(op, "ids must be [B, ", F, "], one column a field, got ", shape_text(given));
  }
  if (!indices.is_int64 && starts[F] - 1 > std::numeric_limits<int32_t>::max()) {
    fail(op, "indices are int32, which cannot hold the ids of a table of ", starts[F], " features: they must be int64");
  }
  Tensor result = torch::stable::empty_like(given);
  const auto move = [&]<typename Id>(const Id* from, Id* to) {
    return all_parts(given.size(0), given.numel(), [&](int64_t begin, int64_t end) {
      bool is_good = true;
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t f = 0; f < F; ++f) {
          const int64_t id = from[b * F + f];
          is_good &= 0 <= id && id < starts[f + 1] - starts[f];
          to[b * F + f] = static_cast<Id>(static_cast<uint64_t>(id) + static_cast<uint64_t>(starts[f]));
        }
      }
      return is_good;
    });
  };
  void* const to = result.mutable_data_ptr();
  const bool is_good = indices.is_int64 ? move(static_cast<const int64_t*>(indices.data), static_cast<int64_t*>(to))
                                        : move(static_cast<const int32_t*>(indices.data), static_cast<int32_t*>(to));
  for (int64_t i = 0; !is_good && i < given.numel(); ++i) {
    const int64_t f = i % F, size = starts[f + 1] - starts[f];
    if (0 <= indices[i] && indices[i] < size) continue;
    fail<std::out_of_range>(op, "indices[", i / F, ", ", f, "] = ", indices[i], " is out of range for field ", f,
                            " of ", size, " features");
  }
  return result;
}

}  // namespace
}  // namespace ffm

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CPU, m) { m.impl("ffm_table_ids", TORCH_BOX(&ffm::ffm_table_ids)); }
