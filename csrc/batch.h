// SPDX-License-Identifier: MIT
// What the adapters of every device share beyond checks.h: tables and batches on whatever device, and the words for
// lists that hold what they must not.
#pragma once

#include "checks.h"

namespace ffm {

using OptionalTensor = std::optional<Tensor>;

// "indices[3, 17]" or "indices[42]".
inline std::string place(const char* name, const Problem& p, int64_t e) {
  std::ostringstream text;
  text << name << '[';
  if (!p.offsets) text << e / p.num_fields << ", " << e % p.num_fields;
  if (p.offsets) text << e;
  text << ']';
  return text.str();
}

[[noreturn]] inline void fail_index(const char* op, const Problem& p, int64_t e, int64_t id) {
  fail<std::out_of_range>(op, place("indices", p, e), " = ", id, " is out of range for a table of ", p.num_features,
                          " features");
}

[[noreturn]] inline void fail_field(const char* op, const Problem& p, int64_t e, int64_t field) {
  fail<std::out_of_range>(op, place("fields", p, e), " = ", field, " is out of range for ", p.num_fields, " fields");
}

[[noreturn]] inline void fail_value(const char* op, const Problem& p, int64_t e, double value) {
  fail(op, place("values", p, e), " = ", value, " is not finite");
}

// offsets[i] is wrong, at first sight because of offsets[i - 1]; i = B + 1 stands for an end that is not nnz.
[[noreturn]] inline void fail_offset(const char* op, const Problem& p, int64_t i, int64_t offset, int64_t before) {
  if (i == 0) fail(op, "offsets[0] = ", offset, " must be 0");
  if (i <= p.batch_size) fail(op, "offsets[", i, "] = ", offset, " is less than offsets[", i - 1, "] = ", before);
  fail(op, "offsets[", p.batch_size, "] = ", offset, " must be the number of entries, ", p.num_entries);
}

// Where outputs go that are of another type than the table.
inline Tensor new_wide_output(const Batch& batch) {
  return torch::stable::new_empty(batch.weight, batch.output_shape(), ScalarType::Float);
}

// The gradient of values where it is asked for, else an empty tensor.
inline Tensor new_grad_values(const char* op, const Batch& batch, bool values_grad, Gradient& grad) {
  if (!values_grad) return torch::stable::new_empty(batch.weight, std::vector<int64_t>{0});
  if (!batch.values) fail(op, "values_grad is set, but values is None");
  Tensor grad_values = torch::stable::empty_like(*batch.values);
  grad.grad_values = grad_values.mutable_data_ptr();
  return grad_values;
}

// A packed table [N, R] uint8 (packed_row_bytes), whose values and outputs are float32.
inline Table packed_table(const char* op, const Tensor& packed, int64_t num_fields, int64_t embed_dim) {
  if (packed.dim() != 2) fail(op, "packed must be [N, R], got shape ", shape_text(packed));
  if (packed.scalar_type() != ScalarType::Byte) {
    fail(op, "packed must be uint8, got ", dtype_text(packed.scalar_type()));
  }
  if (num_fields <= 0) fail(op, "num_fields = ", num_fields, " must be positive");
  if (embed_dim <= 0) fail(op, "embed_dim = ", embed_dim, " must be positive");
  const int64_t row_bytes = packed.size(1);
  // The first two, so that the third cannot overflow.
  if (num_fields > row_bytes || embed_dim > row_bytes || packed_row_bytes(num_fields, embed_dim) != row_bytes) {
    fail(op, "packed has shape ", shape_text(packed), ", which are not the rows of num_fields = ", num_fields,
         " and embed_dim = ", embed_dim);
  }
  if (!packed.is_contiguous()) {
    fail(op, "packed is not contiguous (strides ", packed.stride(0), ", ", packed.stride(1),
         "); call .contiguous() once where it is made");
  }
  Table table{packed, "packed", ScalarType::Float, {}};
  table.problem.weight = packed.const_data_ptr();
  table.problem.num_features = packed.size(0);
  table.problem.num_fields = num_fields;
  table.problem.embed_dim = embed_dim;
  table.problem.dtype = ScalarKind::kFloat32;
  return table;
}

// Element i of a table cannot be packed.
[[noreturn]] inline void fail_element(const char* op, const Problem& p, int64_t i, double value) {
  fail(op, "weight[", i / p.row_size(), ", ", i / p.embed_dim % p.num_fields, ", ", i % p.embed_dim, "] = ", value,
       " is not finite in float32");
}

}  // namespace ffm
