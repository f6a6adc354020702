// SPDX-License-Identifier: MIT
// The operators that update tables outside of backward: passes over samples, and rows with given gradients.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../updated_table.h"
#include "batch.h"
#include "isa.h"
#include "own_rows.h"

namespace ffm {
namespace {

// Samples in the order in which they are trained, so many at a time: kernels read them one behind the other.
constexpr int64_t kSamplesAtATime = 256;

// In an order of their own, samples lie anywhere: the entries of each are asked for so many samples ahead, up to so
// many bytes of each list, behind which a core asks by itself.
constexpr int64_t kSamplesAhead = 16, kBytesAhead = 1 << 10;

// A thread tells the others what it did to a frequent row after so many samples of all threads together, if so many of
// its updates have come together among all of them. By that the model is old that each of them updates: the more
// threads, the more often they tell. But to tell costs about as much as an update of a row that is shared.
constexpr int64_t kSamplesBetween = 512, kUpdatesBetween = 32, kFewestUpdates = 2;

// Those of numbers[kSamplesAhead], of n that are left.
__attribute__((always_inline)) inline void ask_entries(const Problem& p, const int64_t* numbers, int64_t n) {
  if (n <= kSamplesAhead) return;
  const int64_t first = p.entries_begin(numbers[kSamplesAhead]), last = p.entries_begin(numbers[kSamplesAhead] + 1);
  if (first < 0 || first >= last || last > p.num_entries) return;
  const auto ask = [&](const void* entries, int64_t bytes) __attribute__((always_inline)) {
    if (entries == nullptr) return;
    const char* const begin = static_cast<const char*>(entries) + first * bytes;
    const char* const end = begin + std::min(kBytesAhead, (last - first) * bytes);
    for (const char* at = begin; at < end; at += 64) __builtin_prefetch(at);
    __builtin_prefetch(end - 1);
  };
  ask(p.indices.data, p.indices.element_bytes());
  ask(p.fields.data, p.fields.element_bytes());
  ask(p.values, element_bytes(p.dtype));
}

// A copy of some samples of a Problem. Where a thread has rows of its own, they name these.
class Samples {
 public:
  Samples(const Problem& p, const Training& training, OwnRows* own) : p_(p), own_(own), copy_(p), training_(training) {}

  const Problem& problem() const { return copy_; }
  const Training& training() const { return training_; }

  // Those that numbers[0 .. n) name.
  void gather(const int64_t* numbers, int64_t n) {
    offsets_.assign(1, 0);
    for (int64_t i = 0; i < n; ++i) {
      ask_entries(p_, numbers + i, n - i);
      offsets_.push_back(offsets_.back() + p_.entries_begin(numbers[i] + 1) - p_.entries_begin(numbers[i]));
    }
    copy_.batch_size = n;
    copy_.num_entries = offsets_.back();
    if (p_.offsets) copy_.offsets = {offsets_.data(), true};
    Ids indices = p_.indices;
    indices.data = gather(p_.indices.data, p_.indices.element_bytes(), numbers, n, indices_);
    copy_.indices = training_.state_rows = training_.linear_rows = indices;
    copy_.fields.data = gather(p_.fields.data, p_.fields.element_bytes(), numbers, n, fields_);
    copy_.values = gather(p_.values, element_bytes(p_.dtype), numbers, n, values_);
    if (!own_) return;
    table_rows_.resize(copy_.num_entries);
    state_rows_.resize(copy_.num_entries);
    own_->take(indices, copy_.num_entries, table_rows_.data(), state_rows_.data());
    copy_.indices = {table_rows_.data(), true};
    training_.state_rows = {state_rows_.data(), true};
  }

 private:
  const void* gather(const void* entries, int64_t bytes, const int64_t* numbers, int64_t n, std::vector<char>& copy) {
    if (entries == nullptr) return nullptr;
    copy.resize(std::max<int64_t>(1, offsets_.back()) * bytes);
    for (int64_t i = 0; i < n; ++i) {
      const char* const from = static_cast<const char*>(entries) + p_.entries_begin(numbers[i]) * bytes;
      const int64_t size = (offsets_[i + 1] - offsets_[i]) * bytes;
      if (size > 0) std::memcpy(copy.data() + offsets_[i] * bytes, from, size);
    }
    return copy.data();
  }

  const Problem& p_;
  OwnRows* const own_;
  Problem copy_;
  Training training_;
  std::vector<int64_t> offsets_, table_rows_, state_rows_;
  std::vector<char> indices_, fields_, values_;
};

// check_contents of some samples alone: a pass over many comes a piece at a time.
void check_samples(const char* op, const Problem& p, const int64_t* numbers, int64_t n) {
  const auto is_good = [&](int64_t first, int64_t last) {
    if (first < 0 || first > last || last > p.num_entries) return false;
    const int64_t count = last - first;
    if (!all_in_range(p.indices.from(first), count, p.num_features)) return false;
    if (p.fields && !all_in_range(p.fields.from(first), count, p.num_fields)) return false;
    return !p.values || all_finite(p, first, count);
  };
  const auto are_good = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      ask_entries(p, numbers + i, end - i);
      if (!is_good(p.entries_begin(numbers[i]), p.entries_begin(numbers[i] + 1))) return false;
    }
    return true;
  };
  const int64_t entries = n * (p.num_entries / std::max<int64_t>(1, p.batch_size));
  // The whole is looked at where something is wrong: it knows what to say.
  if (!all_parts(n, entries, are_good)) check_contents(op, p);
}

Loss checked_loss(const char* op, const std::string& loss) {
  if (loss == "logistic") return Loss::kLogistic;
  if (loss == "squared") return Loss::kSquared;
  fail(op, "loss = '", loss, "' is not one of logistic, squared");
}

// The linear weights or the bias.
UpdatedTable checked_vector(const char* op, const std::string& name, const OptionalTensor& vector,
                            const std::vector<Tensor>& states, int64_t size, const Tensor& weight, OptimizerKind kind) {
  if (!vector) return {};
  check_same_device(op, name.c_str(), *vector, weight);
  if (vector->scalar_type() != sum_type(weight.scalar_type())) {
    fail(op, name, " must be ", dtype_text(sum_type(weight.scalar_type())), ", got ",
         dtype_text(vector->scalar_type()));
  }
  if (vector->numel() != size || !vector->is_contiguous()) {
    fail(op, name, " has shape ", shape_text(*vector), ", it needs ", size, " numbers, contiguous");
  }
  return checked_table(op, name + "_", *vector, size, 1, 1, states, kind);
}

// A finite number for each sample.
Tensor checked_numbers(const char* op, const char* name, const Tensor& t, const Problem& p, const Tensor& weight) {
  const Tensor list = checked_list(op, name, t, ScalarType::Float, weight);
  if (list.numel() != p.batch_size) {
    fail(op, name, " has shape ", shape_text(t), ", the batch has ", p.batch_size, " samples");
  }
  const float* const numbers = static_cast<const float*>(list.const_data_ptr());
  for (int64_t b = 0; b < p.batch_size; ++b) {
    if (!std::isfinite(numbers[b])) fail(op, name, "[", b, "] = ", numbers[b], " is not finite");
  }
  return list;
}

Tensor ffm_train_(const Tensor& weight, const std::vector<Tensor>& states, const OptionalTensor& linear,
                  const std::vector<Tensor>& linear_states, const OptionalTensor& bias,
                  const std::vector<Tensor>& bias_states, const Tensor& indices, const OptionalTensor& fields,
                  const OptionalTensor& values, const OptionalTensor& offsets, const Tensor& labels,
                  const OptionalTensor& sample_weights, const Tensor& order, const std::string& loss, bool within_field,
                  bool normalize, const std::string& optimizer, const std::vector<double>& settings, int64_t step,
                  std::optional<int64_t> rounding_seed, bool parallel) {
  const char* op = "ffm_train_";
  const Batch batch(op, weight, indices, fields, values, offsets, "sum", within_field);
  const Problem& p = batch.problem;

  Training training;
  training.optimizer = checked_optimizer(op, optimizer, settings, step, rounding_seed, p.dtype);
  const OptimizerKind kind = training.optimizer.kind;
  training.table = checked_table(op, "", weight, p.num_features, p.num_fields, p.embed_dim, states, kind);
  training.linear = checked_vector(op, "linear", linear, linear_states, p.num_features, weight, kind);
  training.bias = checked_vector(op, "bias", bias, bias_states, 1, weight, kind);
  training.loss = checked_loss(op, loss);
  training.normalize = normalize;

  const Tensor all_labels = checked_numbers(op, "labels", labels, p, weight);
  const float* const label = static_cast<const float*>(all_labels.const_data_ptr());
  std::optional<Tensor> all_weights;
  if (sample_weights) all_weights = checked_numbers(op, "sample_weights", *sample_weights, p, weight);
  const float* const sample_weight = all_weights ? static_cast<const float*>(all_weights->const_data_ptr()) : nullptr;
  const Tensor numbers = checked_list(op, "order", order, ScalarType::Long, weight);
  const int64_t n = numbers.numel();
  const int64_t* const at = static_cast<const int64_t*>(numbers.const_data_ptr());
  const int64_t wrong = first_outside({at, true}, n, p.batch_size);
  if (wrong < n) {
    fail<std::out_of_range>(op, "order[", wrong, "] = ", at[wrong], " is out of range for ", p.batch_size, " samples");
  }
  check_samples(op, p, at, n);

  const TrainKernels& kernels = train_kernels(p.dtype);
  const int64_t entries = p.num_entries;
  const int64_t parts =
      parallel ? std::min(std::max<int64_t>(1, n), num_parts(entries * p.row_size(), kGrainElements)) : 1;
  const Scratch scratch(parts, kernels.scratch_bytes(p));
  std::vector<double> losses(parts, 0);
  // Copies of samples name the copies of rows.
  std::optional<FrequentRows> frequent;
  if (parts > 1 && traits(kind).adds_up) frequent.emplace(p, training.table, at, n);
  const bool has_own = frequent && frequent->count() > 0;
  const int64_t at_a_time =
      has_own ? std::clamp(kSamplesBetween / parts, kSamplesAhead, kSamplesAtATime) : kSamplesAtATime;
  const int64_t fewest = std::max(kFewestUpdates, kUpdatesBetween / parts);
  parallel_ranges(parts, n, [&](int64_t part, int64_t begin, int64_t end) {
    std::optional<OwnRows> own;
    if (has_own) own.emplace(*frequent, p, Update{training.table, training.optimizer}, kernels);
    Samples samples(p, training, own ? &*own : nullptr);
    std::vector<float> some_labels(at_a_time), some_weights(at_a_time);
    for (int64_t from = begin; from < end; from += at_a_time) {
      if (own) own->join(step + from, fewest, false);
      const int64_t count = std::min(at_a_time, end - from);
      for (int64_t i = 0; i < count; ++i) {
        some_labels[i] = label[at[from + i]];
        if (sample_weight) some_weights[i] = sample_weight[at[from + i]];
      }
      samples.gather(at + from, count);
      losses[part] +=
          kernels.train(samples.problem(), samples.training(), some_labels.data(),
                        sample_weight ? some_weights.data() : nullptr, step + from, 0, count, scratch.of(part));
    }
    if (own) own->join(step + end, 1, true);
  });
  Tensor total = torch::stable::new_empty(all_labels, std::vector<int64_t>{}, ScalarType::Double);
  double sum = 0;
  for (const double part : losses) sum += part;
  *static_cast<double*>(total.mutable_data_ptr()) = sum;
  return total;
}

void ffm_update_(const Tensor& weight, const std::vector<Tensor>& states, const OptionalTensor& rows,
                 const Tensor& grad_rows, const std::string& optimizer, const std::vector<double>& settings,
                 int64_t step, std::optional<int64_t> rounding_seed) {
  const char* op = "ffm_update_";
  const RowsUpdate given(op, weight, states, rows, grad_rows, optimizer, settings, step, rounding_seed);
  const Problem& p = given.table;
  const int64_t n = given.num_rows;
  const int64_t* const rows_in_order = given.rows ? static_cast<const int64_t*>(given.rows->const_data_ptr()) : nullptr;
  for (int64_t i = 0; rows_in_order && i < n; ++i) {
    const int64_t row = rows_in_order[i];
    if (row < 0 || row >= p.num_features) fail_row_range(op, p, i, row);
    if (i > 0 && row <= rows_in_order[i - 1]) fail_row_order(op, i, row);
  }
  const TrainKernels& kernels = train_kernels(p.dtype);
  const int64_t parts = num_parts(n * p.row_size(), kGrainElements);
  const Scratch scratch(parts, static_cast<size_t>(p.row_size() * sum_bytes(p.dtype)));
  parallel_ranges(parts, n, [&](int64_t part, int64_t begin, int64_t end) {
    kernels.update_rows(given.update, rows_in_order, given.gradient.const_data_ptr(), begin, end, scratch.of(part));
  });
}

}  // namespace
}  // namespace ffm

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CPU, m) {
  m.impl("ffm_train_", TORCH_BOX(&ffm::ffm_train_));
  m.impl("ffm_update_", TORCH_BOX(&ffm::ffm_update_));
}
