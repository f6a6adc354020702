// SPDX-License-Identifier: MIT
// The CPU kernels against the definition: every pair of entries of a sample, in double precision. It needs no torch and
// no Python, so it runs wherever there is a compiler and a CPU or an emulator of one. FFM_EXT_ISA picks the kernels, as
// it does in the package; an argument n leaves every n-th problem. Prints what fails, and at last "N passed, N failed".

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "problems.h"

namespace ffm {
namespace {

constexpr int64_t kMiddle = 2;

// ---- The kernels.

std::unique_ptr<void, decltype(&std::free)> new_scratch(size_t bytes) {
  bytes = std::max<size_t>(64, (bytes + 63) / 64 * 64);
  std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
  std::memset(scratch.get(), 0xff, bytes);
  return scratch;
}

template <typename Out, typename T>
std::vector<Out> run_forward(const Batch<T>& batch) {
  const Problem& p = batch.problem;
  std::vector<Out> out = unwritten<Out>(batch.output_size());
  const ForwardKernels& kernels = forward_kernels(p.dtype);
  const auto scratch = new_scratch(kernels.scratch_bytes(p));
  kernels.forward(p, out.data(), 0, kMiddle, scratch.get());
  kernels.forward(p, out.data(), kMiddle, p.batch_size, scratch.get());
  return out;
}

template <typename T>
std::vector<T> run_gather_sum(const Batch<T>& batch) {
  std::vector<T> out = unwritten<T>(batch.problem.batch_size);
  const ForwardKernels& kernels = forward_kernels(batch.problem.dtype);
  kernels.gather_sum(batch.problem, out.data(), 0, kMiddle);
  kernels.gather_sum(batch.problem, out.data(), kMiddle, batch.problem.batch_size);
  return out;
}

enum class Rows { kNone, kDense, kSparse };

template <typename T>
struct Gradients {
  std::vector<int64_t> slots;  // entry -> row of rows
  std::vector<T> rows;         // [R, F, K]
  std::vector<T> values;       // [nnz]
};

// `is_staged`, `is_cut`: as several threads do it, in blocks and parts of samples, or in parts of the fields.
template <typename T>
Gradients<T> run_backward(const Batch<T>& batch, const std::vector<T>& grad_output, Rows kind, bool is_staged,
                          bool is_streamed, bool is_cut = false) {
  const Problem& p = batch.problem;
  const std::vector<int64_t>& indices = batch.indices.wide;
  const int64_t nnz = p.num_entries;

  Gradients<T> result;
  Gradient grad;
  grad.grad_output = grad_output.data();
  if (p.values) {
    result.values = unwritten<T>(nnz);
    grad.grad_values = result.values.data();
  }
  std::vector<Put> put(nnz, Put::kAdd);
  std::vector<int64_t> stage_slots(nnz), first_entries;
  std::vector<int64_t> sparse_slots, sum_slots;
  std::vector<SumOf<T>> sums, stage;
  if (kind != Rows::kNone) {
    // Rows are numbered in the order in which they first occur, and so are those that several entries share.
    std::vector<int64_t> row_of(p.num_features, -1), sum_row_of(p.num_features, -1), count(p.num_features);
    int64_t num_rows = 0, num_sums = 0;
    for (int64_t i : indices) ++count[i];
    for (int64_t e = 0; e < nnz; ++e) {
      const bool is_first = row_of[indices[e]] < 0;
      if (is_first) put[e] = Put::kStore;
      if (is_first) row_of[indices[e]] = num_rows++;
      if (is_first && count[indices[e]] > 1) {
        sum_row_of[indices[e]] = num_sums++;
        first_entries.push_back(e);
      }
      sparse_slots.push_back(row_of[indices[e]]);
      sum_slots.push_back(sum_row_of[indices[e]]);
    }
    const bool is_sparse = kind == Rows::kSparse;
    result.slots = is_sparse ? sparse_slots : indices;
    result.rows = unwritten<T>((is_sparse ? num_rows : p.num_features) * p.row_size());
    for (int64_t i = 0; !is_sparse && i < p.num_features; ++i) {
      if (count[i] == 0) std::fill_n(result.rows.begin() + i * p.row_size(), p.row_size(), T{});
    }
    grad.grad_rows = result.rows.data();
    grad.slots = is_sparse ? Ids{sparse_slots.data(), true} : p.indices;
    grad.put = put.data();
    grad.stage_slots = stage_slots.data();
    grad.is_streamed = is_streamed;
    grad.most_are_asked = !is_streamed || is_staged;
    if (kIsHalf<T>) {
      sums = unwritten<SumOf<T>>(num_sums * p.row_size());
      grad.sums = sums.data();
      grad.sum_slots = sum_slots.data();
    }
  }

  const BackwardKernels& kernels = backward_kernels(p.dtype);
  const auto scratch = new_scratch(kernels.scratch_bytes(p, false));
  for (auto [begin, end] : {std::pair(int64_t{0}, kMiddle), std::pair(kMiddle, p.batch_size)}) {
    const int64_t first = p.entries_begin(begin), last = p.entries_begin(end);
    std::vector<int64_t> staged;
    for (int64_t e = first; is_staged && e < last; ++e) {
      if (put[e] != Put::kAdd) continue;
      put[e] = Put::kStage;
      stage_slots[e] = static_cast<int64_t>(staged.size());
      staged.push_back(e);
    }
    stage = unwritten<SumOf<T>>(static_cast<int64_t>(staged.size()) * p.row_size());
    grad.stage = stage.data();
    const int64_t cut = is_cut ? p.num_fields / 2 : 0;
    if (is_cut) kernels.backward(p, grad, {begin, end}, {0, cut}, scratch.get());
    kernels.backward(p, grad, {begin, end}, {cut, p.num_fields}, scratch.get());
    const int64_t num_staged = static_cast<int64_t>(staged.size());
    if (is_staged) kernels.add_staged(p, grad, staged.data(), num_staged);
  }
  if (kIsHalf<T> && kind != Rows::kNone) {
    const int64_t num_sums = static_cast<int64_t>(first_entries.size());
    kernels.finish_sums(p, grad, first_entries.data(), 0, num_sums / 2);
    kernels.finish_sums(p, grad, first_entries.data(), num_sums / 2, num_sums);
  }
  return result;
}

// Fields with ids of their own, in parts.
template <typename T>
void test_parts_of_fields(Batch<T> batch, const std::vector<T>& grad_output) {
  Problem& p = batch.problem;
  std::vector<int64_t> indices(p.num_entries);
  for (int64_t e = 0; e < p.num_entries; ++e) {
    const int64_t f = e % p.num_fields, id = batch.indices.wide[e];
    indices[e] = f == 0 && id >= p.num_fields ? id : f;
  }
  batch.indices = std::move(indices);
  p.indices = batch.indices.as(p.indices.is_int64);
  for (Rows kind : {Rows::kDense, Rows::kSparse}) {
    for (bool is_streamed : {false, true}) {
      const Gradients<T> whole = run_backward(batch, grad_output, kind, false, is_streamed);
      const Gradients<T> cut = run_backward(batch, grad_output, kind, false, is_streamed, true);
      check(std::memcmp(cut.rows.data(), whole.rows.data(), whole.rows.size() * sizeof(T)) == 0,
            "backward" + batch.name + ": not the same bits in parts of the fields");
    }
  }
}

template <typename T>
void test_problem(const Batch<T>& batch) {
  const Problem& p = batch.problem;
  const std::vector<T> grad_output = random_numbers<T>(batch.output_size());
  const Truth truth = find_truth(batch, grad_output);
  with_output_type(batch, [&]<typename Out>() { compare("forward" + batch.name, run_forward<Out>(batch), truth.out); });
  compare("gather_sum" + batch.name, run_gather_sum(batch), truth.row_sums);

  if (p.values) {
    const Gradients<T> found = run_backward(batch, grad_output, Rows::kNone, false, false);
    compare("backward, values only" + batch.name, found.values, truth.grad_values);
  }
  for (Rows kind : {Rows::kDense, Rows::kSparse}) {
    const std::string what = kind == Rows::kDense ? "backward, dense" : "backward, sparse";
    const Gradients<T> direct = run_backward(batch, grad_output, kind, false, false);
    std::vector<Number> rows(direct.rows.size());
    for (size_t i = 0; i < truth.grad_rows.size(); ++i) {
      const int64_t e = static_cast<int64_t>(i) / p.row_size(), column = static_cast<int64_t>(i) % p.row_size();
      rows[direct.slots[e] * p.row_size() + column].add(truth.grad_rows[i]);
    }
    compare(what + batch.name, direct.rows, rows);
    if (p.values) compare(what + ", values" + batch.name, direct.values, truth.grad_values);

    const Gradients<T> staged = run_backward(batch, grad_output, kind, true, false);
    compare(what + ", staged" + batch.name, staged.rows, rows);
    check(std::memcmp(staged.rows.data(), direct.rows.data(), staged.rows.size() * sizeof(T)) == 0,
          what + batch.name + ": not the same bits when staged");
    for (bool is_staged : {false, true}) {
      const Gradients<T> streamed = run_backward(batch, grad_output, kind, is_staged, true);
      check(std::memcmp(streamed.rows.data(), direct.rows.data(), streamed.rows.size() * sizeof(T)) == 0,
            what + batch.name + ": not the same bits when streamed");
    }
  }
  if (!p.fields && !p.values && p.num_fields > 1) test_parts_of_fields(batch, grad_output);
}

// ---- Training.

// A sample after the other and a pair after the other, in float64: AdaGrad from 1 on a squared loss, with r = 1 / sum
// x^2.
template <typename T>
std::vector<double> train_in_turn(const Batch<T>& batch, const std::vector<float>& labels, double lr, double decay) {
  const Problem& p = batch.problem;
  std::vector<double> w = decode(batch.weight), sums(w.size(), 1.0);
  const auto vector = [&](int64_t e, int64_t f) { return (p.indices[e] * p.num_fields + f) * p.embed_dim; };
  const auto value = [&](int64_t e) { return p.values ? decode(batch.values[e]) : 1.0; };
  for (int64_t b = 0; b < p.batch_size; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    double squares = 0, score = 0;
    for (int64_t e = first; e < last; ++e) squares += value(e) * value(e);
    const double r = squares > 0 ? 1 / squares : 0;
    const auto for_pairs = [&](auto&& fn) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = i + 1; j < last; ++j) {
          if (batch.field(i) == batch.field(j) && !p.within_field) continue;
          fn(vector(i, batch.field(j)), vector(j, batch.field(i)), r * value(i) * value(j));
        }
      }
    };
    for_pairs([&](int64_t one, int64_t two, double x) {
      for (int64_t k = 0; k < p.embed_dim; ++k) score += x * w[one + k] * w[two + k];
    });
    const double slope = score - labels[b];
    for_pairs([&](int64_t one, int64_t two, double x) {
      for (int64_t k = 0; k < p.embed_dim; ++k) {
        const double left = w[one + k], right = w[two + k];
        const auto move = [&](int64_t at, double gradient) {
          sums[at] += gradient * gradient;
          w[at] -= lr * gradient / std::sqrt(sums[at]);
        };
        move(one + k, slope * x * right + decay * left);
        move(two + k, slope * x * left + decay * right);
      }
    });
  }
  return w;
}

// Row 1 of a table and its state, of which a thread has changed a copy: slot 1 of two.
template <typename T>
void test_join(const Update& update, Batch<T>& batch, std::vector<SumOf<T>>& states) {
  const auto test = [&]<typename U>(const std::vector<U>& shared, const std::vector<U>& shared_before,
                                    const std::vector<U>& copied, const std::vector<U>& changed,
                                    const std::vector<U>& own, const std::vector<U>& before, int64_t n,
                                    const std::string& what) {
    bool is_right = true;
    for (int64_t i = 0; i < static_cast<int64_t>(shared.size()); ++i) {
      const bool is_joined = i / n == 1;
      const double change = is_joined ? decode(changed[i]) - decode(copied[i]) : 0, found = decode(shared[i]);
      const double expected = decode(shared_before[i]) + change;
      is_right = is_right && std::abs(found - expected) <= (is_joined ? 0.02 : 0);
    }
    for (int64_t i = 0; i < n; ++i) {
      is_right = is_right && decode(own[n + i]) == decode(shared[n + i]) && decode(before[n + i]) == decode(own[n + i]);
      is_right = is_right && decode(own[i]) == decode(changed[i]) && decode(before[i]) == decode(copied[i]);
    }
    check(is_right, "join of " + what + batch.name);
  };
  const Problem& p = batch.problem;
  const int64_t n = p.row_size(), width = update.table.state_row_size;
  const std::vector<T> copied = random_numbers<T>(2 * n), changed = random_numbers<T>(2 * n);
  const auto copied_sums = random_numbers<SumOf<T>>(2 * width), changed_sums = random_numbers<SumOf<T>>(2 * width);
  std::vector<T> own = changed, before = copied;
  std::vector<SumOf<T>> own_sums = changed_sums, sums_before = copied_sums;
  UpdatedTable copy = update.table, copy_before = update.table;
  copy.weight = own.data();
  copy_before.weight = before.data();
  if (!states.empty()) {
    copy.states[0] = own_sums.data();
    copy_before.states[0] = sums_before.data();
  }
  const std::vector<T> shared = batch.weight;
  const std::vector<SumOf<T>> shared_sums = states;
  train_kernels(p.dtype).join_row(update, 1, copy, copy_before, 1);
  test(batch.weight, shared, copied, changed, own, before, n, "weights");
  if (states.empty()) return;
  test(states, shared_sums, copied_sums, changed_sums, own_sums, sums_before, width, "states");
}

// Every optimizer stays inside its memory, and AdaGrad is that above.
template <typename T>
void test_training(const Batch<T>& given) {
  const TrainKernels& kernels = train_kernels(given.problem.dtype);
  for (OptimizerKind kind : {OptimizerKind::kAdaGrad, OptimizerKind::kSgd, OptimizerKind::kVectorAdaGrad,
                             OptimizerKind::kAdam, OptimizerKind::kFtrl}) {
    Batch<T> batch = given;
    Problem& p = batch.problem;
    p.weight = batch.weight.data();
    // A feature that a field of a sample names twice is one that the kernel takes differently in second order.
    std::vector<int64_t> apart(p.num_entries);
    bool is_compared = kind == OptimizerKind::kAdaGrad;
    for (int64_t b = 0; b < p.batch_size; ++b) {
      const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
      for (int64_t e = first; e < last; ++e) apart[e] = (3 * b + e - first) % p.num_features;
      is_compared = is_compared && last - first <= p.num_features;
    }
    batch.indices = std::move(apart);
    p.indices = batch.indices.as(p.indices.is_int64);
    if (p.fields) p.fields = batch.fields.as(p.fields.is_int64);
    if (p.offsets) p.offsets = batch.offsets.as(p.offsets.is_int64);
    if (p.values) p.values = batch.values.data();
    std::vector<SumOf<T>> states[2], linear(p.num_features), linear_states[2];
    Training training;
    Optimizer& optimizer = training.optimizer;
    optimizer.kind = kind;
    optimizer.lr = 0.1;
    optimizer.weight_decay = 0.01;
    optimizer.beta1 = 0.9;
    optimizer.beta2 = 0.99;
    optimizer.eps = 1e-8;
    optimizer.is_stochastic = std::is_same_v<T, BFloat16>;
    training.loss = Loss::kSquared;
    training.normalize = true;
    const int64_t width = traits(kind).is_vector_wise ? p.num_fields : p.row_size();
    training.table = {batch.weight.data(), {}, p.row_size(), p.embed_dim, width};
    training.state_rows = training.linear_rows = p.indices;
    if (!is_compared) training.linear = {linear.data(), {}, 1, 1, 1};
    for (int i = 0; i < traits(kind).num_states; ++i) {
      states[i].assign(p.num_features * width, 1);
      linear_states[i].assign(p.num_features, 1);
      training.table.states[i] = states[i].data();
      training.linear.states[i] = linear_states[i].data();
    }
    const std::vector<float> labels = random_numbers<float>(p.batch_size);
    const std::vector<double> expected = train_in_turn(batch, labels, 0.1, 0.01);
    const auto scratch = new_scratch(kernels.scratch_bytes(p));
    double loss = kernels.train(p, training, labels.data(), nullptr, 1, 0, kMiddle, scratch.get());
    loss += kernels.train(p, training, labels.data(), nullptr, 1, kMiddle, p.batch_size, scratch.get());
    bool is_right = std::isfinite(loss);
    for (size_t i = 0; i < expected.size(); ++i) {
      const double found = decode(batch.weight[i]);
      const double tolerance = is_compared && !kIsHalf<T> ? 1e-6 : 1e9;
      is_right = is_right && std::abs(found - expected[i]) <= tolerance;
    }
    check(is_right, "train with optimizer " + std::to_string(static_cast<int>(kind)) + batch.name);

    Update update{training.table, optimizer};
    update.optimizer.set_step(3);
    const std::vector<T> gradients = random_numbers<T>(p.num_features * p.row_size());
    std::vector<int64_t> rows(p.num_features);
    for (int64_t i = 0; i < p.num_features; ++i) rows[i] = i;
    const auto row = new_scratch(static_cast<size_t>(p.row_size() * sum_bytes(p.dtype)));
    kernels.update_rows(update, rows.data(), gradients.data(), 0, p.num_features, row.get());
    bool is_finite = true;
    for (const T& x : batch.weight) is_finite = is_finite && std::isfinite(decode(x));
    check(is_finite, "update of rows with optimizer " + std::to_string(static_cast<int>(kind)) + batch.name);
    if (traits(kind).adds_up) test_join(update, batch, states[0]);
  }
}

// ---- Kernels on packed tables.

void test_int8(const Batch<float>& given) {
  Batch<float> batch = given;
  Problem& p = batch.problem;
  const int64_t F = p.num_fields, K = p.embed_dim, row_size = p.row_size();
  const std::vector<char> packed = pack_table(batch);
  const Truth truth = find_truth(batch, std::vector<float>(batch.output_size(), 1.0f));
  p.weight = packed.data();
  const Int8Kernels& kernels = int8_kernels();

  std::vector<float> rows = unwritten<float>(p.num_features * row_size);
  kernels.dequantize(p, rows.data(), 0, 2);
  kernels.dequantize(p, rows.data() + 2 * row_size, 2, p.num_features);
  check(rows == batch.weight, "int8 dequantize" + batch.name);

  const auto scratch = new_scratch(kernels.scratch_bytes(p));
  if (!p.fields && kernels.has_forward(p)) {
    std::vector<float> out = unwritten<float>(batch.output_size());
    kernels.forward(p, out.data(), 0, kMiddle, scratch.get());
    kernels.forward(p, out.data(), kMiddle, p.batch_size, scratch.get());
    compare("int8 forward" + batch.name, out, truth.out);
  }

  for (int64_t b = 0; b < p.batch_size; ++b) {
    std::vector<int64_t> counts(F, -1), true_counts(F);
    std::vector<float> sums = unwritten<float>(F * row_size), within = unwritten<float>(row_size);
    std::vector<Number> true_sums(F * row_size), true_within(row_size);
    kernels.field_sums(p, b, counts.data(), sums.data(), within.data(), scratch.get());
    for (int64_t e = p.entries_begin(b); e < p.entries_begin(b + 1); ++e) {
      const int64_t f = batch.field(e);
      ++true_counts[f];
      for (int64_t i = 0; i < row_size; ++i) {
        const double term = (p.values ? batch.values[e] : 1.0) * rows[batch.indices.wide[e] * row_size + i];
        Number& sum = true_sums[f * row_size + i];
        if (i / K == f) {
          true_within[i].value += sum.value * term;
          true_within[i].size += sum.size * std::abs(term);
        }
        sum.add(term);
      }
    }
    check(counts == true_counts, "int8 field counts" + batch.name);
    for (int64_t f = 0; f < F; ++f) {
      if (counts[f] == 0) std::fill_n(sums.begin() + f * row_size, row_size, 0.0f);
    }
    compare("int8 field sums" + batch.name, sums, true_sums);
    if (p.within_field) compare("int8 within fields" + batch.name, within, true_within);
  }
}

// Whether y is the nearest to `exact`, the even one of two that are as near.
template <typename T>
bool is_rounded(T y, double exact) {
  if (std::isnan(exact)) return std::isnan(decode(y));
  if (std::isnan(decode(y)) || std::signbit(decode(y)) != std::signbit(exact)) return false;
  if (std::isinf(exact)) return std::isinf(decode(y));
  // Infinity is where the number after the largest would be.
  auto distance = [&](T z) {
    const double next = std::copysign(std::ldexp(1.0, kBias<T> + 1), exact);
    return std::abs((std::isinf(decode(z)) ? next : decode(z)) - exact);
  };
  for (int step : {-1, 1}) {
    const double other = distance({static_cast<uint16_t>(y.bits + step)});  // NaN, where there is no neighbour
    if (other < distance(y) || (other == distance(y) && y.bits % 2 == 1)) return false;
  }
  return true;
}

// Every number of a half-precision type times `factor`, in rows of 2 K: as vectors, or one by one where K is 1.
template <typename T>
void test_conversions(ScalarKind dtype, int64_t K, double factor) {
  const int64_t num_samples = 65536 / K;
  const T one = {static_cast<uint16_t>(kBias<T> << kMantissaBits<T>)};
  T x = {0};
  while (decode(x) < factor) ++x.bits;

  // Two fields: the gradient of the first row of a sample is its value times the second row.
  Batch<T> batch;
  Problem& p = batch.problem;
  p.dtype = dtype;
  p.num_fields = 2;
  p.embed_dim = K;
  p.batch_size = num_samples;
  p.num_features = p.num_entries = 2 * num_samples;
  batch.weight.assign(p.num_features * p.row_size(), one);
  for (int64_t i = 0; i < 65536; ++i) {
    batch.weight[(2 * (i / K) + 1) * p.row_size() + i % K] = {static_cast<uint16_t>(i)};
  }
  std::vector<int64_t> indices(p.num_entries);
  std::iota(indices.begin(), indices.end(), 0);
  batch.indices = std::move(indices);
  batch.values.assign(p.num_entries, x);
  for (int64_t e = 1; e < p.num_entries; e += 2) batch.values[e] = one;
  p.indices = batch.indices.as(true);
  p.weight = batch.weight.data();
  p.values = batch.values.data();
  const std::vector<T> grad_output(num_samples, one);
  const Gradients<T> found = run_backward(batch, grad_output, Rows::kDense, false, false);

  for (int64_t i = 0; i < 65536; ++i) {
    const T given = {static_cast<uint16_t>(i)};
    const T product = found.rows[2 * (i / K) * p.row_size() + K + i % K];
    if (is_rounded(product, decode(given) * decode(x))) continue;
    char what[160];
    std::snprintf(what, sizeof(what), "0x%04x = %.9g times %.9g: 0x%04x = %.9g", given.bits, decode(given), decode(x),
                  product.bits, decode(product));
    return check(false, what);
  }
  check(true, "conversions");
}

// Every stride-th problem.
void test_all(uint64_t stride) {
  const auto batch_size = [](uint64_t) { return kBatchSize; };
  for_kernel_problems(stride, UINT64_MAX, batch_size, [](auto& batch, uint64_t) {
    using T = typename std::remove_reference_t<decltype(batch)>::Number;
    test_problem(batch);
    if (batch.problem.output == Output::kSum) test_training(batch);
    if constexpr (std::is_same_v<T, float>) test_int8(batch);
  });
  for (int64_t K : {1, 8}) {
    for (double x : {0.7, 1.7}) {
      test_conversions<BFloat16>(ScalarKind::kBFloat16, K, x);
      test_conversions<Float16>(ScalarKind::kFloat16, K, x);
    }
  }
}

}  // namespace
}  // namespace ffm

int main(int argc, char** argv) {
  try {
    std::printf("kernels: %s\n", ffm::cpu_isa());
    ffm::test_all(argc > 1 ? std::stoul(argv[1]) : 1);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("%d passed, %d failed\n", ffm::num_passed, ffm::num_failed);
  return ffm::num_failed > 0;
}
