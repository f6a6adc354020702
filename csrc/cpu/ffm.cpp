// SPDX-License-Identifier: MIT
// The operators on the CPU: arguments -> checks -> params.h -> kernels, over torch's threads.

#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>
#include <tuple>
#include <vector>

#include "../updated_table.h"
#include "batch.h"
#include "group_rows.h"
#include "isa.h"
#include "new_result.h"
#include "parallel.h"

namespace ffm {
namespace {

// Several threads work on a block of samples at a time, which contributes so many bytes to gradients. Fewer need more
// pauses, more find more rows that two threads share.
constexpr int64_t kBlockBytes = 8 << 20;

// Gradients from this size on are written past the caches, so that no line is read before it is written: those of
// which the last cache, where table and other programs are too, would not keep what the next call writes again.
int64_t streamed_bytes(const char* op) {
  constexpr const char* kSetting = "FFM_EXT_STREAM_BYTES";
  static const char* const setting = std::getenv(kSetting);
  if (setting == nullptr || *setting == '\0') {
    constexpr int64_t kLeast = 2 << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
    static const int64_t cache_bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return std::max(kLeast, cache_bytes / 5);
#else
    return kLeast;
#endif
  }
  int64_t bytes = 0;
  const char* const end = setting + std::strlen(setting);
  const auto [last, error] = std::from_chars(setting, end, bytes);
  if (error != std::errc() || last != end || bytes < 0) fail(op, kSetting, " = '", setting, "' is no number of bytes");
  return bytes;
}

// Samples that several threads work on, and the entries among them that are staged, by the thread that will add them.
struct Block {
  int64_t begin, end;
  int64_t num_staged = 0;
  std::vector<std::vector<int64_t>> staged = {};
};

std::vector<Block> cut_blocks(const Problem& p) {
  const int64_t block_entries = std::max<int64_t>(1, kBlockBytes / (p.row_size() * sum_bytes(p.dtype)));
  std::vector<Block> blocks;
  for (int64_t b = 0, begin = 0; b < p.batch_size; ++b) {
    if (p.entries_begin(b + 1) - p.entries_begin(begin) < block_entries && b + 1 < p.batch_size) continue;
    blocks.push_back({begin, b + 1});
    begin = b + 1;
  }
  return blocks;
}

int64_t block_part_begin(const Problem& p, const Block& block, int64_t part, int64_t parts) {
  return part_begin(p, block.begin, block.end, part, parts);
}

// Stages every entry whose row an earlier part of its block touches, so that no row has two threads at work on it, and
// each is added to in the order of its entries.
void stage_entries(const Problem& p, const RowGroups& groups, int64_t parts, std::vector<Block>& blocks,
                   int64_t* stage_slots) {
  const int64_t num_blocks = static_cast<int64_t>(blocks.size()), shares = std::min(parts, num_blocks);
  parallel_ranges(shares, num_blocks, [&](int64_t, int64_t first_block, int64_t last_block) {
    // The part that touched a row first, counted through all blocks.
    std::vector<int64_t> first_part(groups.num_rows, -1);
    for (int64_t i = first_block; i < last_block; ++i) {
      Block& block = blocks[i];
      block.staged.resize(parts);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t end = p.entries_begin(block_part_begin(p, block, part + 1, parts));
        for (int64_t e = p.entries_begin(block_part_begin(p, block, part, parts)); e < end; ++e) {
          const int64_t slot = groups.slots[e];
          int64_t& first = first_part[slot];
          if (first < i * parts) first = i * parts + part;
          if (first == i * parts + part) continue;
          groups.put[e] = Put::kStage;
          stage_slots[e] = block.num_staged++;
          block.staged[slot % parts].push_back(e);
        }
      }
    }
  });
}

// The samples of a batch, checked. A list that names every field once, in order, becomes a matrix, which takes less
// time to load; its errors speak of the list.
Problem checked_samples(const char* op, const Batch& batch) {
  Problem p = batch.problem;
  const bool lists_a_matrix = is_matrix(p);
  if (lists_a_matrix) p.fields = {};
  check_contents(op, p);
  if (lists_a_matrix) p.offsets = {};
  return p;
}

// The columns of a row that are read by themselves should be worth its cache lines.
constexpr int64_t kColumnBytes = 128;

// The fields in parts, as many as a divisor of `parts`, so that nobody else is at work on the rows of a part's entries:
// several in a matrix whose fields have ids of their own, else one.
std::vector<Range> parts_of_fields(const Problem& p, const Gradient& grad, int64_t parts) {
  const std::vector<Range> whole = {{0, p.num_fields}};
  if (p.fields || grad.update || grad.grad_values) return whole;
  const int64_t row_bytes = p.row_size() * element_bytes(p.dtype);
  int64_t n = std::min({parts, p.num_fields, row_bytes / kColumnBytes});
  while (n > 1 && parts % n != 0) --n;
  if (n <= 1) return whole;
  std::vector<Range> fields(n), ids(n);
  parallel_ranges(n, p.num_fields, [&](int64_t part, int64_t first, int64_t last) {
    Range seen = {p.num_features, 0};
    for (int64_t b = 0; b < p.batch_size; ++b) {
      for (int64_t f = first; f < last; ++f) {
        const int64_t id = p.indices[b * p.num_fields + f];
        seen = {std::min(seen.begin, id), std::max(seen.end, id + 1)};
      }
    }
    fields[part] = {first, last};
    ids[part] = seen;
  });
  std::sort(ids.begin(), ids.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (int64_t i = 1; i < n; ++i) {
    if (ids[i].begin < ids[i - 1].end) return whole;
  }
  return fields;
}

// `groups`, where there are gradients of rows.
void run_samples(const Problem& p, Gradient grad, const RowGroups* groups) {
  const BackwardKernels& kernels = backward_kernels(p.dtype);
  const int64_t parts = sample_parts(p, 0, p.batch_size);
  const std::vector<Range> fields = parts_of_fields(p, grad, groups ? parts : 1);
  const int64_t shares = static_cast<int64_t>(fields.size()), parts_of_samples = parts / shares;
  const Scratch scratch(parts, kernels.scratch_bytes(p, grad.update != nullptr));
  std::vector<Block> blocks = {{0, p.batch_size}};
  std::unique_ptr<int64_t[]> stage_slots;
  int64_t num_staged = 0;
  if (parts_of_samples > 1 && groups) {
    blocks = cut_blocks(p);
    stage_slots = std::make_unique_for_overwrite<int64_t[]>(p.num_entries);
    stage_entries(p, *groups, parts_of_samples, blocks, stage_slots.get());
    for (const Block& block : blocks) num_staged = std::max(num_staged, block.num_staged);
  }
  const AlignedBuffer stage(static_cast<size_t>(num_staged * p.row_size() * sum_bytes(p.dtype)));
  grad.stage = stage.data();
  grad.stage_slots = stage_slots.get();
  for (const Block& block : blocks) {
    parallel_parts(parts, [&](int64_t part) {
      const int64_t i = part / shares;
      const Range samples = {block_part_begin(p, block, i, parts_of_samples),
                             block_part_begin(p, block, i + 1, parts_of_samples)};
      kernels.backward(p, grad, samples, fields[part % shares], scratch.of(part));
    });
    if (block.num_staged == 0) continue;
    parallel_parts(parts_of_samples, [&](int64_t part) {
      const std::vector<int64_t>& staged = block.staged[part];
      kernels.add_staged(p, grad, staged.data(), static_cast<int64_t>(staged.size()));
    });
  }
}

void run_backward(const char* op, const Problem& p, Gradient grad, const RowGroups& groups) {
  grad.put = groups.put.get();
  // An update leaves nothing to store.
  grad.is_streamed = grad.update || groups.num_rows * p.row_size() * element_bytes(p.dtype) >= streamed_bytes(op);
  const bool has_sums = is_narrow(p.dtype) || grad.update;
  const SharedRows shared = has_sums ? shared_rows(groups, p.num_entries) : SharedRows();
  // Entries that are their row's first, or only, one.
  const int64_t stored = grad.is_streamed ? groups.num_rows - shared.count : 0;
  grad.most_are_asked = 2 * stored < p.num_entries;
  if (!has_sums) return run_samples(p, grad, &groups);
  const AlignedBuffer sums(static_cast<size_t>(shared.count * p.row_size() * sum_bytes(p.dtype)));
  grad.sums = sums.data();
  grad.sum_slots = shared.slots.get();
  run_samples(p, grad, &groups);
  const BackwardKernels& kernels = backward_kernels(p.dtype);
  const int64_t parts = num_parts(shared.count * p.row_size(), kGrainElements);
  parallel_ranges(parts, shared.count, [&](int64_t, int64_t begin, int64_t end) {
    kernels.finish_sums(p, grad, shared.first_entries.get(), begin, end);
  });
}

Tensor ffm_forward(const Tensor& weight, const Tensor& indices, const OptionalTensor& fields,
                   const OptionalTensor& values, const OptionalTensor& offsets, const std::string& output,
                   bool within_field) {
  const char* op = "ffm_forward";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem p = checked_samples(op, batch);
  Tensor out = batch.has_wide_output() ? new_wide_output(batch) : new_result(weight, batch.output_shape());
  const ForwardKernels& kernels = forward_kernels(p.dtype);
  const int64_t parts = sample_parts(p, 0, p.batch_size);
  const Scratch scratch(parts, kernels.scratch_bytes(p));
  void* const data = out.mutable_data_ptr();
  parallel_parts(parts, [&](int64_t part) {
    kernels.forward(p, data, part_begin(p, 0, p.batch_size, part, parts),
                    part_begin(p, 0, p.batch_size, part + 1, parts), scratch.of(part));
  });
  return out;
}

Tensor new_grad_rows(const Batch& batch, int64_t rows) {
  return new_result(batch.weight, {rows, batch.problem.num_fields, batch.problem.embed_dim});
}

// Zeros in the rows of a dense gradient that the batch does not touch.
void zero_other_rows(const Problem& p, const RowGroups& groups, void* grad_rows) {
  const int64_t row_bytes = p.row_size() * element_bytes(p.dtype);
  const int64_t parts = num_parts((p.num_features - groups.num_rows) * p.row_size(), kGrainElements);
  parallel_ranges(parts, groups.num_rows, [&](int64_t part, int64_t begin, int64_t end) {
    // Before each of its touched rows, and, the last part, behind all of them.
    for (int64_t r = begin; r < end + (part + 1 == parts); ++r) {
      const int64_t from = r == 0 ? 0 : groups.rows[r - 1] + 1;
      const int64_t to = r == groups.num_rows ? p.num_features : groups.rows[r];
      std::memset(static_cast<char*>(grad_rows) + from * row_bytes, 0, (to - from) * row_bytes);
    }
  });
}

std::tuple<Tensor, Tensor> ffm_backward(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                                        const OptionalTensor& fields, const OptionalTensor& values,
                                        const OptionalTensor& offsets, const std::string& output, bool within_field,
                                        bool values_grad, bool /*deterministic*/) {
  const char* op = "ffm_backward";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem p = checked_samples(op, batch);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  const RowGroups groups = group_rows(p.indices, p.num_entries, p.num_features);
  Tensor grad_weight = new_grad_rows(batch, p.num_features);
  zero_other_rows(p, groups, grad_weight.mutable_data_ptr());
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  grad.grad_rows = grad_weight.mutable_data_ptr();
  grad.slots = p.indices;
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  run_backward(op, p, grad, groups);
  return {grad_weight, grad_values};
}

std::tuple<Tensor, Tensor, Tensor> ffm_backward_sparse(const Tensor& grad_output, const Tensor& weight,
                                                       const Tensor& indices, const OptionalTensor& fields,
                                                       const OptionalTensor& values, const OptionalTensor& offsets,
                                                       const std::string& output, bool within_field, bool values_grad) {
  const char* op = "ffm_backward_sparse";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem p = checked_samples(op, batch);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  const RowGroups groups = group_rows(p.indices, p.num_entries, p.num_features);
  const int64_t R = groups.num_rows;
  Tensor rows = torch::stable::new_empty(weight, std::vector<int64_t>{R}, ScalarType::Long);
  if (R > 0) std::memcpy(rows.mutable_data_ptr(), groups.rows.get(), R * sizeof(int64_t));
  Tensor grad_rows = new_grad_rows(batch, R);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  grad.grad_rows = grad_rows.mutable_data_ptr();
  grad.slots = {groups.slots.get(), true};
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  run_backward(op, p, grad, groups);
  return {rows, grad_rows, grad_values};
}

Tensor ffm_backward_fused_(const Tensor& grad_output, const Tensor& weight, const std::vector<Tensor>& states,
                           const Tensor& indices, const OptionalTensor& fields, const OptionalTensor& values,
                           const OptionalTensor& offsets, const std::string& output, bool within_field,
                           bool values_grad, const std::string& optimizer, const std::vector<double>& settings,
                           int64_t step, std::optional<int64_t> rounding_seed) {
  const char* op = "ffm_backward_fused_";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem p = checked_samples(op, batch);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  const Update update = checked_update(op, weight, p, states, optimizer, settings, step, rounding_seed);
  const RowGroups groups = group_rows(p.indices, p.num_entries, p.num_features);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  grad.slots = {groups.slots.get(), true};
  grad.update = &update;
  Tensor grad_values = new_grad_values(op, batch, values_grad, grad);
  run_backward(op, p, grad, groups);
  return grad_values;
}

Tensor ffm_backward_values(const Tensor& grad_output, const Tensor& weight, const Tensor& indices,
                           const OptionalTensor& fields, const Tensor& values, const OptionalTensor& offsets,
                           const std::string& output, bool within_field) {
  const char* op = "ffm_backward_values";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const Problem p = checked_samples(op, batch);
  const Tensor grad_out = batch.checked_grad_output(op, grad_output);
  Gradient grad;
  grad.grad_output = grad_out.const_data_ptr();
  Tensor grad_values = new_grad_values(op, batch, true, grad);
  run_samples(p, grad, nullptr);
  return grad_values;
}

Tensor gather_sum(const Tensor& weight, const Tensor& indices) {
  const char* op = "gather_sum";
  const Batch batch(op, weight, indices, std::nullopt, std::nullopt, std::nullopt, "sum", false);
  const Problem p = checked_samples(op, batch);
  Tensor out = torch::stable::new_empty(weight, std::vector<int64_t>{p.batch_size});
  const ForwardKernels& kernels = forward_kernels(p.dtype);
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
  m.impl("ffm_backward_fused_", TORCH_BOX(&ffm::ffm_backward_fused_));
  m.impl("ffm_backward_values", TORCH_BOX(&ffm::ffm_backward_values));
  m.impl("gather_sum", TORCH_BOX(&ffm::gather_sum));
}
