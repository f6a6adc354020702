// SPDX-License-Identifier: MIT
// Argument checks shared by the devices. Every message names operator, argument, value and place. In Python,
// std::invalid_argument becomes ValueError (a wrong dtype too: no C++ exception becomes TypeError) and
// std::out_of_range IndexError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace ffm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Error = std::invalid_argument, typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "a dtype of another kind";
  }
}

inline ScalarKind scalar_kind(const char* op, const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return ScalarKind::kFloat32;
    case ScalarType::Double: return ScalarKind::kFloat64;
    case ScalarType::BFloat16: return ScalarKind::kBFloat16;
    case ScalarType::Half: return ScalarKind::kFloat16;
    default: fail(op, "weight must be float32, float64, bfloat16 or float16, got ", dtype_text(weight.scalar_type()));
  }
}

inline Output output_kind(const char* op, const std::string& output) {
  if (output == "sum") return Output::kSum;
  if (output == "dot") return Output::kDot;
  if (output == "hadamard") return Output::kHadamard;
  fail(op, "output = '", output, "' is not one of sum, dot, hadamard");
}

inline Ids ids(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Int && t.scalar_type() != ScalarType::Long) {
    fail(op, name, " must be int32 or int64, got ", dtype_text(t.scalar_type()));
  }
  // An empty list has no memory; any address says that it was given.
  static const int64_t kNothing = 0;
  return {t.numel() ? t.const_data_ptr() : &kNothing, t.scalar_type() == ScalarType::Long};
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& weight,
                              const char* weight_name = "weight") {
  auto text = [](const Tensor& x) {
    return x.is_cpu() ? std::string("the CPU")
                      : (x.is_cuda() ? "CUDA device " : "device ") + std::to_string(x.get_device_index());
  };
  if (t.is_cpu() != weight.is_cpu() || t.is_cuda() != weight.is_cuda() ||
      t.get_device_index() != weight.get_device_index()) {
    fail(op, name, " is on ", text(t), ", ", weight_name, " is on ", text(weight));
  }
}

// A table, the name of its argument, and what it says of a Problem.
struct Table {
  Tensor tensor;
  const char* name = "weight";
  ScalarType dtype;  // of values and outputs
  Problem problem;
};

inline Table float_table(const char* op, const Tensor& weight) {
  Table table{weight, "weight", weight.scalar_type(), {}};
  Problem& p = table.problem;
  if (weight.dim() != 3) fail(op, "weight must be [N, F, K], got shape ", shape_text(weight));
  p.dtype = scalar_kind(op, weight);
  p.num_features = weight.size(0);
  p.num_fields = weight.size(1);
  p.embed_dim = weight.size(2);
  if (p.num_fields == 0 || p.embed_dim == 0)
    fail(op, "weight has shape ", shape_text(weight), ": F and K must be positive");
  if (!weight.is_contiguous()) {
    fail(op, "weight is not contiguous (strides ", weight.stride(0), ", ", weight.stride(1), ", ", weight.stride(2),
         "); call .contiguous() once where it is made");
  }
  p.weight = weight.const_data_ptr();
  return table;
}

// Tensors of one call, dense in memory, and what they say. The table is never copied; the lists are where they are not
// contiguous.
struct Batch {
  Tensor weight, indices;
  std::optional<Tensor> fields, values, offsets;
  Problem problem;

  Batch(const char* op, const Tensor& weight_, const Tensor& indices_, const std::optional<Tensor>& fields_,
        const std::optional<Tensor>& values_, const std::optional<Tensor>& offsets_, const std::string& output,
        bool within_field)
      : Batch(op, float_table(op, weight_), indices_, fields_, values_, offsets_, output, within_field) {}

  Batch(const char* op, const Table& table, const Tensor& indices_, const std::optional<Tensor>& fields_,
        const std::optional<Tensor>& values_, const std::optional<Tensor>& offsets_, const std::string& output,
        bool within_field)
      : weight(table.tensor), indices(torch::stable::contiguous(indices_)), problem(table.problem), table_(table.name) {
    Problem& p = problem;
    p.output = output_kind(op, output);
    p.within_field = within_field;

    check_same_device(op, "indices", indices, weight, table_);
    p.indices = ids(op, "indices", indices);
    p.num_entries = indices.numel();
    if (indices.dim() == 2) {
      if (fields_ || offsets_) fail(op, "indices is [B, F], so ", fields_ ? "fields" : "offsets", " must be None");
      if (indices.size(1) != p.num_fields) {
        fail(op, "indices has shape ", shape_text(indices), ", but ", table_, " has ", p.num_fields, " fields");
      }
      p.batch_size = indices.size(0);
    } else if (indices.dim() == 1) {
      if (!fields_ || !offsets_) fail(op, "indices is [nnz], so ", fields_ ? "offsets" : "fields", " is needed too");
      fields = list(op, "fields", *fields_);
      offsets = list(op, "offsets", *offsets_);
      if (fields->size(0) != p.num_entries) {
        fail(op, "fields has shape ", shape_text(*fields), ", indices has ", shape_text(indices));
      }
      if (offsets->size(0) == 0) fail(op, "offsets is empty; it needs a sample count plus one entries");
      p.fields = ids(op, "fields", *fields);
      p.offsets = ids(op, "offsets", *offsets);
      p.batch_size = offsets->size(0) - 1;
    } else {
      fail(op, "indices must be [B, F] or [nnz], got shape ", shape_text(indices));
    }
    if (values_) {
      values = torch::stable::contiguous(*values_);
      check_same_device(op, "values", *values, weight, table_);
      if (values->scalar_type() != table.dtype) {
        fail(op, "values is ", dtype_text(values->scalar_type()), ", ", table_,
             table.dtype == weight.scalar_type() ? " is " : " takes ", dtype_text(table.dtype));
      }
      if (shape_text(*values) != shape_text(indices)) {
        fail(op, "values has shape ", shape_text(*values), ", indices has ", shape_text(indices));
      }
      p.values = values->const_data_ptr();
    }
  }

  std::vector<int64_t> output_shape() const {
    const Problem& p = problem;
    if (p.output == Output::kSum) return {p.batch_size};
    const int64_t terms = p.num_fields * (p.num_fields - 1) / 2 + (p.within_field ? p.num_fields : 0);
    if (p.output == Output::kDot) return {p.batch_size, terms};
    return {p.batch_size, terms, p.embed_dim};
  }

  // Whether the output is of the type of sums, and wider than the table.
  bool has_wide_output() const { return problem.output == Output::kSum && is_narrow(problem.dtype); }

  // The gradient of the output, contiguous.
  Tensor checked_grad_output(const char* op, const Tensor& grad_output) const {
    check_same_device(op, "grad_output", grad_output, weight);
    if (grad_output.scalar_type() != weight.scalar_type()) {
      fail(op, "grad_output is ", dtype_text(grad_output.scalar_type()), ", weight is ",
           dtype_text(weight.scalar_type()));
    }
    const std::vector<int64_t> shape = output_shape();
    bool same = grad_output.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = grad_output.size(i) == shape[i];
    if (!same) fail(op, "grad_output has shape ", shape_text(grad_output), ", which is not that of the output");
    return torch::stable::contiguous(grad_output);
  }

 private:
  Tensor list(const char* op, const char* name, const Tensor& t) const {
    check_same_device(op, name, t, weight, table_);
    if (t.dim() != 1) fail(op, name, " must have one dimension, got shape ", shape_text(t));
    return torch::stable::contiguous(t);
  }

  const char* table_;
};

}  // namespace ffm
