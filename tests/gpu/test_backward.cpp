// SPDX-License-Identifier: MIT
// Gradients and fused updates, against the definition and against the rules of the optimizers in float64.
#include <algorithm>
#include <cmath>

#include "optimizer.h"
#include "testing.h"

namespace ffm {
namespace {

double inverse_sqrt(double v) { return 1 / std::sqrt(std::max(v, 0x1p-126)); }
double twice_inverse_sqrt(double v) { return 2 * inverse_sqrt(v); }
double square_root(double v) { return v * inverse_sqrt(v); }
#include "update_rules.h"

template <typename T>
using A = SumOf<T>;

// Memory as the launchers ask for it.
struct Workspace {
  explicit Workspace(size_t bytes) : bytes_(static_cast<int64_t>(bytes + 256)) {}
  void* get() {
    bytes_.clear();
    return bytes_.data() + (-reinterpret_cast<uintptr_t>(bytes_.data()) & 255);
  }

 private:
  DeviceArray<unsigned char> bytes_;
};

// A problem, where it lies on the device, and what flows back into its output.
template <typename T>
struct Subject {
  Subject(const Batch<T>& given, uint64_t number_)
      : batch(given),
        number(number_),
        on_device(batch, number % 5 != 0),
        grad_output(random_numbers<T>(batch.output_size())),
        device_grad_output(grad_output, number % 7 != 0),
        truth(find_truth(batch, grad_output)) {}

  // The gradients of the table's rows.
  std::vector<Number> grad_weight() const {
    std::vector<Number> rows(batch.weight.size());
    const int64_t size = batch.problem.row_size();
    for (int64_t i = 0; i < static_cast<int64_t>(truth.grad_rows.size()); ++i) {
      rows[batch.indices.wide[i / size] * size + i % size].add(truth.grad_rows[i]);
    }
    return rows;
  }
  std::vector<int64_t> touched_rows() const {
    std::vector<int64_t> rows = batch.indices.wide;
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    return rows;
  }

  const Batch<T>& batch;
  uint64_t number;
  DeviceBatch<T> on_device;
  std::vector<T> grad_output;
  DeviceArray<T> device_grad_output;
  Truth truth;
};

template <typename T>
void test_values(const Coverage& coverage, const Subject<T>& s) {
  const Problem& p = s.on_device.problem;
  if (!p.values) return;
  const std::string what = "gradient of values" + s.batch.name;
  DeviceArray<T> grad_values(p.num_entries);
  Workspace workspace(cuda::backward_bytes(p, false));
  Gradient grad;
  grad.grad_output = s.device_grad_output.data();
  grad.grad_values = grad_values.data();
  compare(what,
          under_schedules(coverage, s.number, what,
                          [&] {
                            grad_values.clear();
                            launched(what, cuda::backward(p, grad, nullptr, workspace.get(), nullptr));
                            return grad_values.read();
                          }),
          s.truth.grad_values);
}

template <typename T>
void test_rows(const Coverage& coverage, const Subject<T>& s, bool is_sparse) {
  const Problem& p = s.on_device.problem;
  const std::string what = (is_sparse ? "sparse gradient" : "dense gradient") + s.batch.name;
  const std::vector<int64_t> touched = s.touched_rows();
  std::vector<Number> expected = s.grad_weight();
  if (is_sparse) {
    std::vector<Number> rows;
    for (int64_t row : touched) {
      rows.insert(rows.end(), expected.begin() + row * p.row_size(), expected.begin() + (row + 1) * p.row_size());
    }
    expected = std::move(rows);
  }
  DeviceArray<T> grad_rows(static_cast<int64_t>(expected.size())), grad_values(p.values ? p.num_entries : 0);
  DeviceArray<int64_t> rows(static_cast<int64_t>(touched.size()));
  Workspace lists(cuda::group_rows_bytes(p, is_sparse)), workspace(cuda::backward_bytes(p, true));
  Gradient grad;
  grad.grad_output = s.device_grad_output.data();
  grad.grad_rows = grad_rows.data();
  if (p.values) grad.grad_values = grad_values.data();
  const std::vector<T> found = under_schedules(coverage, s.number, what, [&] {
    grad_rows.clear();
    grad_values.clear();
    cuda::RowGroups groups;
    launched(what, cuda::group_rows(p, is_sparse, lists.get(), &groups, nullptr));
    if (is_sparse && p.num_entries > 0) {
      int32_t num_rows = 0;
      launched(what, cuda::read_back(&num_rows, groups.numbers + p.num_entries - 1, sizeof(num_rows), nullptr));
      check(num_rows == static_cast<int32_t>(touched.size()), what + ": another number of rows");
      launched(what, cuda::list_rows(p, groups, rows.data(), nullptr));
      check(rows.read() == touched, what + ": other rows");
    }
    launched(what, cuda::backward(p, grad, &groups, workspace.get(), nullptr));
    return grad_rows.read();
  });
  compare(what, found, expected);
  if (p.values) compare(what + ", values", grad_values.read(), s.truth.grad_values);
}

// By atomic additions, whose order the schedule decides: near the same, not the same bits.
template <typename T>
void test_added(const Coverage& coverage, const Subject<T>& s) {
  if constexpr (!kIsHalf<T>) {
    const Problem& p = s.on_device.problem;
    const std::string what = "gradient by atomics" + s.batch.name;
    DeviceArray<T> grad_rows(static_cast<int64_t>(s.batch.weight.size()));
    Workspace workspace(cuda::backward_bytes(p, false));
    Gradient grad;
    grad.grad_output = s.device_grad_output.data();
    grad.grad_rows = grad_rows.data();
    for (const gpu::emulator::Schedule& schedule : chosen_schedules(coverage, s.number)) {
      gpu::emulator::set_schedule(schedule);
      grad_rows.clear();
      launched(what, cuda::backward(p, grad, nullptr, workspace.get(), nullptr));
      compare(what, grad_rows.read(), s.grad_weight());
    }
  }
}

// In any order: other bits under other schedules.
template <typename T>
void test_added_rows(const Subject<T>& s) {
  const Problem& p = s.on_device.problem;
  const std::string what = "gradient added atomically" + s.batch.name;
  DeviceArray<T> grad_rows(static_cast<int64_t>(s.batch.weight.size())), grad_values(p.values ? p.num_entries : 0);
  Workspace workspace(cuda::backward_bytes(p, false));
  Gradient grad;
  grad.grad_output = s.device_grad_output.data();
  grad.grad_rows = grad_rows.data();
  if (p.values) grad.grad_values = grad_values.data();
  const char* const error = cuda::backward(p, grad, nullptr, workspace.get(), nullptr);
  if (kIsHalf<T>) return check(error != nullptr, what + ": half precision is not refused");
  launched(what, error);
  compare(what, grad_rows.read(), s.grad_weight());
  if (p.values) compare(what + ", values", grad_values.read(), s.truth.grad_values);
}

// Samples that cannot be used give nothing, the others what they gave before; where offsets fall, none gives anything.
template <typename T>
void test_bad_lists(const Coverage& coverage, const Batch<T>& good, uint64_t number) {
  Batch<T> batch = good;
  Problem& p = batch.problem;
  const bool is_falling = p.offsets && p.num_entries > 0 && number / coverage.stride % 4 == 0;
  std::vector<int64_t> indices = batch.indices.wide, fields = batch.fields.wide, offsets = batch.offsets.wide;
  std::vector<bool> is_bad(p.batch_size, is_falling);
  for (int64_t b = 0; b < p.batch_size && !is_falling; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    if (random_bits() % 2 || first == last) continue;
    const int64_t e = first + static_cast<int64_t>(random_bits() % (last - first));
    const int64_t bad_ids[] = {p.num_features, -1, INT32_MAX, INT32_MIN};
    (p.fields && random_bits() % 2 ? fields[e] = random_bits() % 2 ? p.num_fields : -1
                                   : indices[e] = bad_ids[random_bits() % 4]);
    is_bad[b] = true;
  }
  if (is_falling) {
    // Samples that overlap, and one that seems to end before it begins.
    offsets[1] = p.num_entries + 5;
    offsets[2] = -3;
  }
  const bool is_int64 = p.indices.is_int64;
  batch.indices = std::move(indices);
  p.indices = batch.indices.as(is_int64);
  if (p.fields) {
    batch.fields = std::move(fields);
    batch.offsets = std::move(offsets);
    p.fields = batch.fields.as(is_int64);
    p.offsets = batch.offsets.as(is_int64);
  }
  std::vector<T> grad_output = random_numbers<T>(good.output_size());
  const int64_t size = good.output_size() / std::max<int64_t>(1, p.batch_size);
  for (int64_t i = 0; i < good.output_size(); ++i) {
    if (is_bad[i / size]) grad_output[i] = T{};
  }
  const Truth truth = find_truth(good, grad_output);
  for (int64_t i = 0; i < good.output_size(); ++i) {
    if (is_bad[i / size]) grad_output[i] = unwritten<T>(1)[0];
  }
  std::vector<Number> expected(good.weight.size());
  std::vector<bool> is_touched(p.num_features);
  for (int64_t b = 0; b < p.batch_size; ++b) {
    for (int64_t e = good.problem.entries_begin(b); e < good.problem.entries_begin(b + 1); ++e) {
      const int64_t row = good.indices.wide[e];
      if (!is_bad[b]) is_touched[row] = true;
      for (int64_t i = 0; i < p.row_size(); ++i) {
        expected[row * p.row_size() + i].add(truth.grad_rows[e * p.row_size() + i]);
      }
    }
  }

  const DeviceBatch<T> on_device(batch);
  const DeviceArray<T> device_grad_output(grad_output);
  DeviceArray<T> grad_rows(static_cast<int64_t>(good.weight.size())), grad_values(p.values ? p.num_entries : 0);
  Workspace lists(cuda::group_rows_bytes(p, false)), workspace(cuda::backward_bytes(p, true));
  const std::string what = "gradient of bad lists" + good.name;
  Gradient grad;
  grad.grad_output = device_grad_output.data();
  grad.grad_rows = grad_rows.data();
  if (p.values) grad.grad_values = grad_values.data();
  const std::vector<T> found = under_schedules(coverage, number, what, [&] {
    cuda::RowGroups groups;
    launched(what, cuda::group_rows(on_device.problem, false, lists.get(), &groups, nullptr));
    launched(what, cuda::backward(on_device.problem, grad, &groups, workspace.get(), nullptr));
    return grad_rows.read();
  });
  compare(what, found, expected);
  if (p.values) compare(what + ", values", grad_values.read(), truth.grad_values);

  // Decay moves every row that a good sample touches, and no other.
  DeviceArray<T> weight(good.weight);
  Update update;
  update.optimizer.lr = 0.5;
  update.optimizer.weight_decay = 0.5;
  update.table = {weight.data(), {}, p.row_size(), p.embed_dim, p.row_size()};
  grad.grad_rows = nullptr;
  grad.update = &update;
  Problem in_place = on_device.problem;
  in_place.weight = weight.data();
  cuda::RowGroups groups;
  launched(what, cuda::group_rows(in_place, false, lists.get(), &groups, nullptr));
  launched(what, cuda::backward(in_place, grad, &groups, workspace.get(), nullptr));
  const std::vector<T> moved = weight.read();
  for (int64_t row = 0; row < p.num_features; ++row) {
    const bool has_moved = std::memcmp(moved.data() + row * p.row_size(), good.weight.data() + row * p.row_size(),
                                       p.row_size() * sizeof(T)) != 0;
    check(has_moved == is_touched[row],
          what + ": row " + std::to_string(row) + (has_moved ? " moved" : " did not move"));
  }
}

// An optimizer with numbers that leave nothing out, a table and its states.
template <typename T>
struct Trained {
  Trained(const Batch<T>& batch, OptimizerKind kind, bool is_aligned)
      : weight(batch.weight, is_aligned),
        width(traits(kind).is_vector_wise ? batch.problem.num_fields : batch.problem.row_size()),
        states{DeviceArray<A<T>>(traits(kind).num_states > 0 ? batch.problem.num_features * width : 0, is_aligned),
               DeviceArray<A<T>>(traits(kind).num_states > 1 ? batch.problem.num_features * width : 0, is_aligned)},
        given(batch.weight) {
    Optimizer& o = update.optimizer;
    o.kind = kind;
    o.lr = 0.25;
    o.weight_decay = 0.125;
    o.beta1 = kind == OptimizerKind::kAdam ? 0.75 : 1;
    o.beta2 = 0.875;
    o.eps = 1e-3;
    o.l1 = 0.0625;
    o.set_step(3);
    update.table = {weight.data(), {}, batch.problem.row_size(), batch.problem.embed_dim, width};
    for (int i = 0; i < traits(kind).num_states; ++i) {
      update.table.states[i] = states[i].data();
      given_states[i] = random_numbers<A<T>>(batch.problem.num_features * width);
      // Sums of squares are not negative.
      const bool is_signed = (kind == OptimizerKind::kAdam || kind == OptimizerKind::kFtrl) && i == 0;
      for (A<T>& x : given_states[i]) x = is_signed ? x : std::abs(x) + A<T>(0.5);
    }
  }
  void reset() {
    std::copy(given.begin(), given.end(), weight.data());
    for (int i = 0; i < 2; ++i) std::copy(given_states[i].begin(), given_states[i].end(), states[i].data());
  }
  // Weights and states, one behind the other, in float64.
  std::vector<double> read() const {
    std::vector<double> all = decode(weight.read());
    for (const auto& state : states) {
      for (A<T> x : state.read()) all.push_back(x);
    }
    return all;
  }

  DeviceArray<T> weight;
  int64_t width;
  DeviceArray<A<T>> states[2];
  std::vector<T> given;
  std::vector<A<T>> given_states[2];
  Update update;
};

// What becomes of the rows in float64, where each number of a gradient may be off by a rounding of its terms.
template <typename T>
struct Moved {
  std::vector<double> value, tolerance;
};

template <typename T>
Moved<T> move_rows(const Trained<T>& t, const std::vector<int64_t>& rows, const std::vector<Number>& gradients,
                   double gradient_eps) {
  const int64_t size = t.update.table.row_size, K = t.update.table.embed_dim;
  const OptimizerKind kind = t.update.optimizer.kind;
  // The result for gradients that are moved by `by` times their tolerance.
  const auto result = [&](double by) {
    std::vector<double> w = decode(t.given), s[2];
    for (int i = 0; i < 2; ++i) s[i].assign(t.given_states[i].begin(), t.given_states[i].end());
    for (size_t r = 0; r < rows.size(); ++r) {
      for (int64_t first = 0; first < size; first += K) {
        const auto gradient = [&](int64_t k) {
          const Number& g = gradients[r * size + first + k];
          return g.value + by * gradient_eps * g.size;
        };
        double& sum = s[0].empty() ? w[0] : s[0][(rows[r] * size + first) / (traits(kind).is_vector_wise ? K : 1)];
        if (traits(kind).is_vector_wise) {
          double squares = 0;
          for (int64_t k = 0; k < K; ++k) {
            const double g = gradient(k) + 0.125 * w[rows[r] * size + first + k];
            squares += g * g;
          }
          sum += squares / static_cast<double>(K);
        }
        for (int64_t k = 0; k < K; ++k) {
          const int64_t at = rows[r] * size + first + k;
          double none = 0, &s0 = s[0].empty() ? none : s[0][traits(kind).is_vector_wise ? at / K : at];
          double& s1 = s[1].empty() ? none : s[1][at];
          const Optimizer& o = t.update.optimizer;
          switch (kind) {
            case OptimizerKind::kSgd: Sgd<double>(o).update(w[at], s0, s1, gradient(k)); break;
            case OptimizerKind::kAdaGrad: AdaGrad<double>(o).update(w[at], s0, s1, gradient(k)); break;
            case OptimizerKind::kAdam: Adam<double>(o).update(w[at], s0, s1, gradient(k)); break;
            case OptimizerKind::kFtrl: Ftrl<double>(o).update(w[at], s0, s1, gradient(k)); break;
            case OptimizerKind::kVectorAdaGrad:
              w[at] -= 0.25 * (gradient(k) + 0.125 * w[at]) * inverse_sqrt(sum);
              break;
          }
        }
      }
    }
    for (const auto& state : s) w.insert(w.end(), state.begin(), state.end());
    return w;
  };
  Moved<T> moved{result(0), {}};
  const std::vector<double> more = result(1), less = result(-1);
  for (size_t i = 0; i < moved.value.size(); ++i) {
    const double value = moved.value[i];
    double tolerance = std::max(std::abs(more[i] - value), std::abs(less[i] - value));
    tolerance += 32 * std::numeric_limits<A<T>>::epsilon() * (1 + std::abs(value));
    if (kIsHalf<T> && i < t.given.size()) tolerance += rounding<T>(value);
    moved.tolerance.push_back(tolerance);
  }
  return moved;
}

template <typename T>
void compare_moved(const std::string& what, const std::vector<double>& found, const Moved<T>& moved) {
  for (size_t i = 0; i < found.size(); ++i) {
    if (std::abs(found[i] - moved.value[i]) <= moved.tolerance[i]) continue;
    char where[160];
    std::snprintf(where, sizeof(where), "[%zu] = %.9g, not %.9g +- %.2g", i, found[i], moved.value[i],
                  moved.tolerance[i]);
    return check(false, what + where);
  }
  check(true, what);
}

template <typename T>
void test_fused(const Coverage& coverage, const Subject<T>& s, OptimizerKind kind) {
  Trained<T> trained(s.batch, kind, s.number % 5 != 0);
  const std::string what = "fused update " + std::to_string(static_cast<int>(kind)) + s.batch.name;
  Problem p = s.on_device.problem;
  p.weight = trained.weight.data();
  DeviceArray<T> grad_values(p.values ? p.num_entries : 0);
  Workspace lists(cuda::group_rows_bytes(p, false)), workspace(cuda::backward_bytes(p, true));
  Gradient grad;
  grad.grad_output = s.device_grad_output.data();
  grad.update = &trained.update;
  if (p.values) grad.grad_values = grad_values.data();
  const auto run = [&] {
    trained.reset();
    grad_values.clear();
    cuda::RowGroups groups;
    launched(what, cuda::group_rows(p, false, lists.get(), &groups, nullptr));
    launched(what, cuda::backward(p, grad, &groups, workspace.get(), nullptr));
    return trained.read();
  };
  const std::vector<int64_t> rows = s.touched_rows();
  const std::vector<Number> all = s.grad_weight();
  std::vector<Number> gradients;
  for (int64_t row : rows) {
    gradients.insert(gradients.end(), all.begin() + row * p.row_size(), all.begin() + (row + 1) * p.row_size());
  }
  const Moved<T> moved = move_rows(trained, rows, gradients, 4 * std::numeric_limits<A<T>>::epsilon());
  compare_moved(what, under_schedules(coverage, s.number, what, run), moved);
  if (p.values) compare(what + ", values", grad_values.read(), s.truth.grad_values);

  if constexpr (std::is_same_v<T, BFloat16>) {
    // Rounded at random: one of the neighbours, and the same again.
    trained.update.optimizer.is_stochastic = true;
    trained.update.optimizer.seed = s.number;
    Moved<T> between = moved;
    for (size_t i = 0; i < trained.given.size(); ++i) between.tolerance[i] += rounding<T>(between.value[i]);
    const std::vector<double> found = run();
    compare_moved(what + ", rounded at random", found, between);
    check(found == run(), what + ": rounded at random, and not the same again");
  }
}

template <typename T>
void test_update(const Coverage& coverage, const Batch<T>& batch, uint64_t number, OptimizerKind kind) {
  const Problem& p = batch.problem;
  Trained<T> trained(batch, kind, number % 5 != 0);
  const std::string what = "update of rows " + std::to_string(static_cast<int>(kind)) + batch.name;
  const bool is_listed = number % 2;
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < p.num_features; ++row) {
    if (!is_listed || random_bits() % 2) rows.push_back(row);
  }
  const int64_t n = static_cast<int64_t>(rows.size());
  const std::vector<T> gradient = random_numbers<T>(n * p.row_size());
  const DeviceArray<T> grad_rows(gradient, number % 7 != 0);
  const DeviceArray<int64_t> list(rows);
  std::vector<Number> gradients;
  for (double g : decode(gradient)) gradients.push_back({g, 0});
  compare_moved(what,
                under_schedules(coverage, number, what,
                                [&] {
                                  trained.reset();
                                  launched(what, cuda::update_rows(trained.update, p.dtype, p.num_features,
                                                                   is_listed ? list.data() : nullptr, n,
                                                                   grad_rows.data(), nullptr));
                                  return trained.read();
                                }),
                move_rows(trained, rows, gradients, 0));
}

// Many entries of few rows, so that sums go through all levels: some rows have thousands of entries, some one.
void test_long_rows(const Coverage& coverage) {
  for (int64_t num_entries : {64, 65, 4096, 4500, 9000}) {
    Batch<float> batch;
    Problem& p = batch.problem;
    random_bits.seed(static_cast<uint64_t>(num_entries));
    set_problem(batch, ScalarKind::kFloat32, 2, num_entries % 2 ? 1 : 4, false, true, true, num_entries / 2);
    p.num_features = num_entries;
    batch.weight = random_numbers<float>(p.num_features * p.row_size());
    std::vector<int64_t> indices(p.num_entries);
    for (int64_t& i : indices) {
      const uint64_t kind = random_bits() % 8;
      // A half of row 7, a quarter of row 100, others of some rows and of many.
      i = kind < 4   ? 7
          : kind < 6 ? std::min<int64_t>(100, p.num_features - 1)
                     : static_cast<int64_t>(random_bits() % (kind < 7 ? 50 : p.num_features));
    }
    batch.indices = std::move(indices);
    p.indices = batch.indices.as(true);
    p.weight = batch.weight.data();
    choose_device(0);
    batch.name = " (" + std::to_string(num_entries) + " entries of few rows)";
    const Subject<float> s(batch, 1);
    test_rows(coverage, s, false);
    test_rows(coverage, s, true);
    test_fused(coverage, s, OptimizerKind::kSgd);
    test_fused(coverage, s, OptimizerKind::kVectorAdaGrad);
  }
}

}  // namespace

void test_backward(const Coverage& coverage) {
  for_problems(coverage, [&]<typename T>(const Batch<T>& batch, uint64_t number) {
    const Subject<T> s(batch, number);
    test_values(coverage, s);
    test_rows(coverage, s, number / coverage.stride % 2);
    test_added(coverage, s);
    test_added_rows(s);
    test_bad_lists(coverage, batch, number);
    test_fused(coverage, s, kOptimizers[number / coverage.stride % 5].kind);
    test_update(coverage, batch, number, kOptimizers[number / coverage.stride % 5].kind);
  });
  if (coverage.last == UINT64_MAX) test_long_rows(coverage);
}

}  // namespace ffm
