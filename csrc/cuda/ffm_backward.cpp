// SPDX-License-Identifier: MIT
// Backward operators on CUDA: arguments -> checks -> params.h -> kernels, on torch's current stream. But for the rows
// of a sparse gradient, of which the host must know how many there are, nothing waits for the device, and how much
// memory an operator takes follows from shapes alone.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../updated_table.h"
#include "contents.h"

namespace ffm::cuda {
namespace {

Tensor new_workspace(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, std::vector<int64_t>{static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

struct GroupedRows {
  GroupedRows(const Batch& batch, bool number_rows, const OnDevice& on)
      : memory(new_workspace(batch.weight, group_rows_bytes(batch.problem, number_rows))) {
    on.check(group_rows(batch.problem, number_rows, memory.mutable_data_ptr(), &groups, on.stream()));
  }
  Tensor memory;
  RowGroups groups;
};

void run_backward(const Batch& batch, const Gradient& grad, const RowGroups* groups, const OnDevice& on) {
  const Tensor workspace = new_workspace(batch.weight, backward_bytes(batch.problem, groups != nullptr));
  on.check(backward(batch.problem, grad, groups, workspace.mutable_data_ptr(), on.stream()));
}

Tensor new_grad_rows(const Batch& batch, int64_t rows) {
  return torch::stable::new_empty(batch.weight,
                                  std::vector<int64_t>{rows, batch.problem.num_fields, batch.problem.embed_dim});
}

std::tuple<Tensor, Tensor> ffm_backward(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                                        const OptionalTensor& fields, const OptionalTensor& values,
                                        const OptionalTensor& offsets, const std::string& output, bool within_field,
                                        bool values_grad, bool deterministic) {
  const char* op = "ffm_backward";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const OnDevice on(op, weight);
  check_contents(op, batch.problem, weight, on);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  Tensor grad_weight = new_grad_rows(batch, batch.problem.num_features);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  grad.grad_rows = grad_weight.mutable_data_ptr();
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  if (!deterministic) {
    if (is_narrow(batch.problem.dtype)) {
      fail(op, "deterministic=False needs a float32 or float64 weight, got ", dtype_text(weight.scalar_type()));
    }
    run_backward(batch, grad, nullptr, on);
    return {grad_weight, grad_values};
  }
  const GroupedRows rows(batch, false, on);
  run_backward(batch, grad, &rows.groups, on);
  return {grad_weight, grad_values};
}

std::tuple<Tensor, Tensor, Tensor> ffm_backward_sparse(const Tensor& grad_output, const Tensor& weight,
                                                       const Tensor& indices, const OptionalTensor& fields,
                                                       const OptionalTensor& values, const OptionalTensor& offsets,
                                                       const std::string& output, bool within_field, bool values_grad) {
  const char* op = "ffm_backward_sparse";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem& p = batch.problem;
  const OnDevice on(op, weight);
  check_contents(op, p, weight, on);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  const GroupedRows grouped(batch, true, on);
  int32_t num_rows = 0;
  if (p.num_entries > 0) {
    on.check(read_back(&num_rows, grouped.groups.numbers + p.num_entries - 1, sizeof(num_rows), on.stream()));
  }
  Tensor rows = torch::stable::new_empty(weight, std::vector<int64_t>{num_rows}, ScalarType::Long);
  Tensor grad_rows = new_grad_rows(batch, num_rows);
  if (num_rows > 0) {
    on.check(list_rows(p, grouped.groups, static_cast<int64_t*>(rows.mutable_data_ptr()), on.stream()));
  }
  grad.grad_rows = grad_rows.mutable_data_ptr();
  run_backward(batch, grad, &grouped.groups, on);
  return {rows, grad_rows, grad_values};
}

Tensor ffm_backward_fused_(const Tensor& grad_output, const Tensor& weight, const std::vector<Tensor>& states,
                           const Tensor& indices, const OptionalTensor& fields, const OptionalTensor& values,
                           const OptionalTensor& offsets, const std::string& output, bool within_field,
                           bool values_grad, const std::string& optimizer, const std::vector<double>& settings,
                           int64_t step, std::optional<int64_t> rounding_seed) {
  const char* op = "ffm_backward_fused_";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem& p = batch.problem;
  const OnDevice on(op, weight);
  check_contents(op, p, weight, on);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  const Update update = checked_update(op, weight, p, states, optimizer, settings, step, rounding_seed);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  grad.update = &update;
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  const GroupedRows rows(batch, false, on);
  run_backward(batch, grad, &rows.groups, on);
  return grad_values;
}

Tensor ffm_backward_values(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                           const OptionalTensor& fields, const Tensor& values, const OptionalTensor& offsets,
                           const std::string& output, bool within_field) {
  const char* op = "ffm_backward_values";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const OnDevice on(op, weight);
  check_contents(op, batch.problem, weight, on);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  Tensor grad_values = new_grad_values(op, batch, true, grad);
  run_backward(batch, grad, nullptr, on);
  return grad_values;
}

}  // namespace
}  // namespace ffm::cuda

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CUDA, m) {
  m.impl("ffm_backward", TORCH_BOX(&ffm::cuda::ffm_backward));
  m.impl("ffm_backward_sparse", TORCH_BOX(&ffm::cuda::ffm_backward_sparse));
  m.impl("ffm_backward_fused_", TORCH_BOX(&ffm::cuda::ffm_backward_fused_));
  m.impl("ffm_backward_values", TORCH_BOX(&ffm::cuda::ffm_backward_values));
}
