// SPDX-License-Identifier: MIT
// From the arguments of the operators that update tables to optimizer.h.
#pragma once

#include <string>
#include <vector>

#include "checks.h"
#include "optimizer.h"

namespace ffm {

// How the schemas of ops.cpp name an optimizer and give its numbers.
inline Optimizer checked_optimizer(const char* op, const std::string& name, const std::vector<double>& settings,
                                   int64_t step, std::optional<int64_t> rounding_seed, ScalarKind dtype) {
  Optimizer o;
  std::string names;
  bool is_known = false;
  for (const OptimizerTraits& other : kOptimizers) {
    names += (names.empty() ? "" : ", ") + std::string(other.name);
    if (name != other.name) continue;
    o.kind = other.kind;
    is_known = true;
  }
  if (!is_known) fail(op, "optimizer = '", name, "' is not one of ", names);
  if (settings.size() != 6) {
    fail(op, "settings has ", settings.size(), " numbers, not lr, weight_decay, beta1, beta2, eps, l1");
  }
  o.lr = settings[0];
  o.weight_decay = settings[1];
  o.beta1 = settings[2];
  o.beta2 = settings[3];
  o.eps = settings[4];
  o.l1 = settings[5];
  if (step < 1) fail(op, "step = ", step, " must be at least 1");
  o.set_step(step);
  if (rounding_seed) {
    if (dtype != ScalarKind::kBFloat16) fail(op, "rounding_seed is given, but weight is not bfloat16");
    o.is_stochastic = true;
    o.seed = static_cast<uint64_t>(*rounding_seed);
  }
  return o;
}

inline ScalarType sum_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// A table of rows [F, K] and its states, which are dense, on the table's device, and as long as the optimizer needs.
inline UpdatedTable checked_table(const char* op, const std::string& name, const Tensor& weight, int64_t num_rows,
                                  int64_t num_fields, int64_t embed_dim, const std::vector<Tensor>& states,
                                  OptimizerKind kind) {
  UpdatedTable table;
  table.weight = weight.mutable_data_ptr();
  table.row_size = num_fields * embed_dim;
  table.embed_dim = embed_dim;
  table.state_row_size = traits(kind).is_vector_wise ? num_fields : table.row_size;
  const int num_states = traits(kind).num_states;
  if (static_cast<int64_t>(states.size()) != num_states) {
    fail(op, name, "states has ", states.size(), " tensors, the optimizer keeps ", num_states);
  }
  for (size_t i = 0; i < states.size(); ++i) {
    const std::string state = name + "states[" + std::to_string(i) + "]";
    check_same_device(op, state.c_str(), states[i], weight);
    if (states[i].scalar_type() != sum_type(weight.scalar_type())) {
      fail(op, state, " must be ", dtype_text(sum_type(weight.scalar_type())), ", got ",
           dtype_text(states[i].scalar_type()));
    }
    if (!states[i].is_contiguous()) fail(op, state, " is not contiguous");
    if (states[i].numel() != num_rows * table.state_row_size) {
      fail(op, state, " has shape ", shape_text(states[i]), ", it needs ", num_rows, " rows of ", table.state_row_size);
    }
    table.states[i] = states[i].mutable_data_ptr();
  }
  return table;
}

// The update of a table [N, F, K], described by p.
inline Update checked_update(const char* op, const Tensor& weight, const Problem& p, const std::vector<Tensor>& states,
                             const std::string& optimizer, const std::vector<double>& settings, int64_t step,
                             std::optional<int64_t> rounding_seed) {
  Update update;
  update.optimizer = checked_optimizer(op, optimizer, settings, step, rounding_seed, p.dtype);
  update.table =
      checked_table(op, "", weight, p.num_features, p.num_fields, p.embed_dim, states, update.optimizer.kind);
  return update;
}

// A list of numbers, one for each sample or row.
inline Tensor checked_list(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& weight) {
  check_same_device(op, name, t, weight);
  if (t.scalar_type() != dtype) fail(op, name, " must be ", dtype_text(dtype), ", got ", dtype_text(t.scalar_type()));
  if (t.dim() != 1) fail(op, name, " must have one dimension, got shape ", shape_text(t));
  return torch::stable::contiguous(t);
}

// Rows of a table that are updated with gradients that are given, checked but for what `rows` holds.
struct RowsUpdate {
  RowsUpdate(const char* op, const Tensor& weight, const std::vector<Tensor>& states,
             const std::optional<Tensor>& rows_, const Tensor& grad_rows, const std::string& optimizer,
             const std::vector<double>& settings, int64_t step, std::optional<int64_t> rounding_seed)
      : table(float_table(op, weight).problem),
        update(checked_update(op, weight, table, states, optimizer, settings, step, rounding_seed)) {
    const Problem& p = table;
    check_same_device(op, "grad_rows", grad_rows, weight);
    num_rows = rows_ ? rows_->numel() : p.num_features;
    if (grad_rows.scalar_type() != weight.scalar_type() || grad_rows.numel() != num_rows * p.row_size()) {
      fail(op, "grad_rows is ", dtype_text(grad_rows.scalar_type()), " ", shape_text(grad_rows), ", it must be ",
           dtype_text(weight.scalar_type()), " with ", num_rows, " rows of ", p.row_size());
    }
    gradient = torch::stable::contiguous(grad_rows);
    if (rows_) rows = checked_list(op, "rows", *rows_, ScalarType::Long, weight);
  }

  Problem table;
  Update update;
  Tensor gradient;
  std::optional<Tensor> rows;  // none: all of the table
  int64_t num_rows = 0;
};

[[noreturn]] inline void fail_row_range(const char* op, const Problem& p, int64_t i, int64_t row) {
  fail<std::out_of_range>(op, "rows[", i, "] = ", row, " is out of range for a table of ", p.num_features, " features");
}
[[noreturn]] inline void fail_row_order(const char* op, int64_t i, int64_t row) {
  fail(op, "rows[", i, "] = ", row, " does not rise");
}

}  // namespace ffm
