// SPDX-License-Identifier: MIT
// The operators on the CPU: arguments -> checks -> params.h -> kernels, over torch's threads.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "batch.h"
#include "group_rows.h"
#include "huge_pages.h"
#include "isa.h"
#include "parallel.h"

namespace ffm {
namespace {

// Staged rows of a block of samples: few enough to stay in the caches.
constexpr int64_t kStagedBytes = 2 << 20;

int64_t sum_bytes(ScalarKind dtype) { return dtype == ScalarKind::kFloat64 ? 8 : 4; }
bool is_narrow(ScalarKind dtype) { return dtype == ScalarKind::kBFloat16 || dtype == ScalarKind::kFloat16; }

void run_samples(const Problem& p, Gradient grad) {
  const BackwardKernels& kernels = backward_kernels();
  const int64_t parts = sample_parts(p, 0, p.batch_size);
  const Scratch scratch(parts, kernels.scratch_bytes(p));
  auto run = [&](int64_t begin, int64_t end, int64_t parts_) {
    parallel_parts(parts_, [&](int64_t part) {
      kernels.backward(p, grad, part_begin(p, begin, end, part, parts_), part_begin(p, begin, end, part + 1, parts_),
                       scratch.of(part));
    });
  };
  if (parts == 1 || grad.grad_rows == nullptr) return run(0, p.batch_size, parts);

  // Several threads: a block of samples at a time, rows that other entries share are staged, and then added by the one
  // thread that owns the row, in the order of the entries.
  const int64_t row_bytes = p.row_size() * sum_bytes(p.dtype);
  const int64_t block_entries = std::max<int64_t>(1, kStagedBytes / row_bytes);
  int64_t staged_entries = 0;
  std::vector<int64_t> blocks = {0};
  for (int64_t b = 0, start = 0; b < p.batch_size; ++b) {
    const int64_t entries = p.entries_begin(b + 1) - start;
    if (entries >= block_entries || b + 1 == p.batch_size) {
      blocks.push_back(b + 1);
      staged_entries = std::max(staged_entries, entries);
      start = p.entries_begin(b + 1);
    }
  }
  const AlignedBuffer staged(static_cast<size_t>(staged_entries) * row_bytes);
  grad.staged = staged.data();
  for (size_t i = 0; i + 1 < blocks.size(); ++i) {
    const int64_t first = p.entries_begin(blocks[i]), last = p.entries_begin(blocks[i + 1]);
    grad.staged_begin = first;
    run(blocks[i], blocks[i + 1], std::min(parts, std::max<int64_t>(1, blocks[i + 1] - blocks[i])));
    parallel_parts(parts, [&](int64_t part) { kernels.add_staged(p, grad, first, last, part, parts); });
  }
}

// `groups` is given for half precision, and wherever the slots are those of the touched rows.
void run_backward(const Problem& p, Gradient grad, const RowGroups* groups) {
  if (groups) grad.is_first = reinterpret_cast<const bool*>(groups->is_first.data());
  if (!is_narrow(p.dtype) || grad.grad_rows == nullptr) return run_samples(p, grad);
  const SharedRows shared = shared_rows(*groups);
  const AlignedBuffer sums(static_cast<size_t>(shared.count * p.row_size() * sum_bytes(p.dtype)));
  grad.sums = sums.data();
  grad.sum_slots = shared.slots.data();
  run_samples(p, grad);
  const BackwardKernels& kernels = backward_kernels();
  const int64_t parts = num_parts(p.num_entries * p.row_size(), kGrainElements);
  parallel_parts(parts, [&](int64_t part) {
    kernels.round_sums(p, grad, p.num_entries * part / parts, p.num_entries * (part + 1) / parts);
  });
}

Tensor ffm_forward(const Tensor& weight, const Tensor& indices, const OptionalTensor& fields,
                   const OptionalTensor& values, const OptionalTensor& offsets, const std::string& output,
                   bool within_field) {
  const char* op = "ffm_forward";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem& p = batch.problem;
  check_contents(op, p);
  Tensor out = torch::stable::new_empty(weight, batch.output_shape());
  const ForwardKernels& kernels = forward_kernels();
  const int64_t parts = sample_parts(p, 0, p.batch_size);
  const Scratch scratch(parts, kernels.scratch_bytes(p));
  void* const data = out.mutable_data_ptr();
  parallel_parts(parts, [&](int64_t part) {
    kernels.forward(p, data, part_begin(p, 0, p.batch_size, part, parts),
                    part_begin(p, 0, p.batch_size, part + 1, parts), scratch.of(part));
  });
  return out;
}

// Room for gradients of `rows` rows. It is new memory on every call, so its page faults are part of the cost.
Tensor new_grad_rows(const Batch& batch, int64_t rows) {
  const Problem& p = batch.problem;
  Tensor grad = torch::stable::new_empty(batch.weight, std::vector<int64_t>{rows, p.num_fields, p.embed_dim});
  advise_huge_pages(grad.mutable_data_ptr(), static_cast<size_t>(grad.numel()) * grad.element_size());
  return grad;
}

void zero(Tensor& t) {
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  char* const data = static_cast<char*>(t.mutable_data_ptr());
  const int64_t parts = num_parts(bytes, kHugePage);
  parallel_parts(parts, [&](int64_t part) {
    const int64_t begin = bytes * part / parts;
    std::memset(data + begin, 0, bytes * (part + 1) / parts - begin);
  });
}

// The gradient of values where it is asked for, else an empty tensor.
Tensor new_grad_values(const char* op, const Batch& batch, bool values_grad, Gradient& grad) {
  if (!values_grad) return torch::stable::new_empty(batch.weight, std::vector<int64_t>{0});
  if (!batch.values) fail(op, "values_grad is set, but values is None");
  Tensor grad_values = torch::stable::empty_like(*batch.values);
  grad.grad_values = grad_values.mutable_data_ptr();
  return grad_values;
}

std::tuple<Tensor, Tensor> ffm_backward(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                                        const OptionalTensor& fields, const OptionalTensor& values,
                                        const OptionalTensor& offsets, const std::string& output, bool within_field,
                                        bool values_grad) {
  const char* op = "ffm_backward";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem& p = batch.problem;
  check_contents(op, p);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  Tensor grad_weight = new_grad_rows(batch, p.num_features);
  zero(grad_weight);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  grad.grad_rows = grad_weight.mutable_data_ptr();
  grad.slots = p.indices;
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  std::optional<RowGroups> groups;
  if (is_narrow(p.dtype)) groups = group_rows(p.indices, p.num_entries, p.num_features);
  run_backward(p, grad, groups ? &*groups : nullptr);
  return {grad_weight, grad_values};
}

std::tuple<Tensor, Tensor, Tensor> ffm_backward_sparse(const Tensor& grad_output, const Tensor& weight,
                                                       const Tensor& indices, const OptionalTensor& fields,
                                                       const OptionalTensor& values, const OptionalTensor& offsets,
                                                       const std::string& output, bool within_field, bool values_grad) {
  const char* op = "ffm_backward_sparse";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem& p = batch.problem;
  check_contents(op, p);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  const RowGroups groups = group_rows(p.indices, p.num_entries, p.num_features);
  const int64_t R = static_cast<int64_t>(groups.rows.size());
  Tensor rows = torch::stable::new_empty(weight, std::vector<int64_t>{R}, ScalarType::Long);
  if (R > 0) std::memcpy(rows.mutable_data_ptr(), groups.rows.data(), R * sizeof(int64_t));
  Tensor grad_rows = new_grad_rows(batch, R);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  grad.grad_rows = grad_rows.mutable_data_ptr();
  grad.slots = {groups.slots.data(), true};
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  run_backward(p, grad, &groups);
  return {rows, grad_rows, grad_values};
}

Tensor ffm_backward_values(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                           const OptionalTensor& fields, const Tensor& values, const OptionalTensor& offsets,
                           const std::string& output, bool within_field) {
  const char* op = "ffm_backward_values";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem& p = batch.problem;
  check_contents(op, p);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  Tensor grad_values = new_grad_values(op, batch, true, grad);
  run_backward(p, grad, nullptr);
  return grad_values;
}

Tensor gather_sum(const Tensor& weight, const Tensor& indices) {
  const char* op = "gather_sum";
  const Batch batch(op, weight, indices, std::nullopt, std::nullopt, std::nullopt, "sum", false);
  const Problem& p = batch.problem;
  check_contents(op, p);
  Tensor out = torch::stable::new_empty(weight, std::vector<int64_t>{p.batch_size});
  const ForwardKernels& kernels = forward_kernels();
  const int64_t parts = sample_parts(p, 0, p.batch_size);
  void* const data = out.mutable_data_ptr();
  parallel_parts(parts, [&](int64_t part) {
    kernels.gather_sum(p, data, part_begin(p, 0, p.batch_size, part, parts),
                       part_begin(p, 0, p.batch_size, part + 1, parts));
  });
  return out;
}

}  // namespace
}  // namespace ffm

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CPU, m) {
  m.impl("ffm_forward", TORCH_BOX(&ffm::ffm_forward));
  m.impl("ffm_backward", TORCH_BOX(&ffm::ffm_backward));
  m.impl("ffm_backward_sparse", TORCH_BOX(&ffm::ffm_backward_sparse));
  m.impl("ffm_backward_values", TORCH_BOX(&ffm::ffm_backward_values));
  m.impl("gather_sum", TORCH_BOX(&ffm::gather_sum));
}
