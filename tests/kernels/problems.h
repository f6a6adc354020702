// SPDX-License-Identifier: MIT
// Problems for the kernels and their answers by the definition: every pair of entries of a sample, in double precision.
// No torch, no Python, and none of the kernels' own conversions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace ffm {

inline int num_passed = 0, num_failed = 0;

inline void check(bool ok, const std::string& what) {
  ++(ok ? num_passed : num_failed);
  if (!ok && num_failed <= 20) std::printf("FAILED %s\n", what.c_str());
}
// ---- Numbers, read and made without the kernels' conversions.

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;
template <typename T>
using SumOf = std::conditional_t<kIsHalf<T>, float, T>;
template <typename T>
constexpr int kMantissaBits = std::is_same_v<T, BFloat16> ? 7 : 10;
template <typename T>
constexpr int kBias = std::is_same_v<T, BFloat16> ? 127 : 15;

template <typename T>
double decode(T x) {
  if constexpr (kIsHalf<T>) {
    constexpr int kBits = kMantissaBits<T>, kOne = 1 << kBits;
    const int mantissa = x.bits % kOne, exponent = (x.bits & 0x7fff) / kOne;
    double y = exponent > 0 ? std::ldexp(kOne + mantissa, exponent - kBias<T> - kBits)
                            : std::ldexp(mantissa, 1 - kBias<T> - kBits);
    if (exponent == 0x7fff / kOne) y = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
    return x.bits & 0x8000 ? -y : y;
  } else {
    return static_cast<double>(x);
  }
}

template <typename T>
std::vector<double> decode(const std::vector<T>& numbers) {
  std::vector<double> decoded;
  for (T x : numbers) decoded.push_back(decode(x));
  return decoded;
}

// The relative error of one rounding, and the absolute one near zero.
template <typename T>
double rounding(double y) {
  if constexpr (!kIsHalf<T>) return std::numeric_limits<T>::epsilon() / 2 * std::abs(y);
  return std::max(std::ldexp(std::abs(y), -kMantissaBits<T> - 1), std::ldexp(1.0, -kBias<T> - kMantissaBits<T>));
}

// What no kernel may leave in its result: a NaN of any type.
template <typename T>
std::vector<T> unwritten(int64_t n) {
  T nan;
  std::memset(&nan, 0xff, sizeof(nan));
  return std::vector<T>(n, nan);
}

inline std::mt19937_64 random_bits;

// In (-1, 1).
template <typename T>
T random_number() {
  const uint64_t bits = random_bits();
  if constexpr (kIsHalf<T>) {
    const int exponent = kBias<T> - 1 - static_cast<int>(bits >> 32 & 3);
    const int mantissa = static_cast<int>(bits) & ((1 << kMantissaBits<T>)-1);
    return {static_cast<uint16_t>(bits >> 63 << 15 | exponent << kMantissaBits<T> | mantissa)};
  } else {
    return static_cast<T>(static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-63);
  }
}

template <typename T>
std::vector<T> random_numbers(int64_t n) {
  std::vector<T> numbers(n);
  for (T& x : numbers) x = random_number<T>();
  return numbers;
}

// ---- Problems.

struct IdArray {
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;

  IdArray& operator=(std::vector<int64_t> ids) {
    narrow.assign(ids.begin(), ids.end());
    wide = std::move(ids);
    return *this;
  }
  Ids as(bool is_int64) const {
    if (is_int64) return {wide.data(), true};
    return {narrow.data(), false};
  }
};

// Where Problem and Gradient point into.
template <typename T>
struct Batch {
  using Number = T;

  std::string name;
  Problem problem;
  IdArray indices, fields, offsets;
  std::vector<T> weight, values;

  int64_t field(int64_t e) const { return problem.fields ? fields.wide[e] : e % problem.num_fields; }
  int64_t num_terms() const {
    const int64_t F = problem.num_fields;
    return F * (F - 1) / 2 + (problem.within_field ? F : 0);
  }
  int64_t output_size() const {
    if (problem.output == Output::kSum) return problem.batch_size;
    return problem.batch_size * num_terms() * (problem.output == Output::kHadamard ? problem.embed_dim : 1);
  }
};

constexpr int64_t kBatchSize = 4;

// The fields of a ragged sample: some with any number of entries, none, one a field, at least one a field; in any
// order.
inline std::vector<int64_t> ragged_fields(int64_t b, int64_t num_fields) {
  std::vector<int64_t> fields;
  for (int64_t f = 0; f < num_fields; ++f) {
    const int64_t any = static_cast<int64_t>(random_bits() % 4);
    const int64_t counts[4] = {any, 0, 1, 1 + any % 3};
    fields.insert(fields.end(), counts[b % 4], f);
  }
  std::shuffle(fields.begin(), fields.end(), random_bits);
  return fields;
}

template <typename T>
void set_problem(Batch<T>& batch, ScalarKind dtype, int64_t num_fields, int64_t embed_dim, bool is_ragged,
                 bool has_values, bool is_int64, int64_t batch_size = kBatchSize) {
  Problem& p = batch.problem;
  p.dtype = dtype;
  p.num_fields = num_fields;
  p.embed_dim = embed_dim;
  p.batch_size = batch_size;
  p.num_features = num_fields + 3;  // so few that samples share rows, and one sample has a row twice
  p.num_entries = batch_size * num_fields;
  if (is_ragged) {
    std::vector<int64_t> fields, offsets = {0};
    for (int64_t b = 0; b < batch_size; ++b) {
      for (int64_t f : ragged_fields(b, num_fields)) fields.push_back(f);
      offsets.push_back(static_cast<int64_t>(fields.size()));
    }
    p.num_entries = offsets.back();
    batch.fields = std::move(fields);
    batch.offsets = std::move(offsets);
    p.fields = batch.fields.as(is_int64);
    p.offsets = batch.offsets.as(is_int64);
  }
  std::vector<int64_t> indices(p.num_entries);
  for (int64_t& i : indices) i = static_cast<int64_t>(random_bits() % p.num_features);
  batch.indices = std::move(indices);
  batch.weight = random_numbers<T>(p.num_features * p.row_size());
  batch.values = random_numbers<T>(has_values ? p.num_entries : 0);
  p.indices = batch.indices.as(is_int64);
  p.weight = batch.weight.data();
  p.values = has_values ? batch.values.data() : nullptr;
}

// ---- The definition.

// A sum, and the sum of the magnitudes of its terms, to which rounding errors are in proportion.
struct Number {
  double value = 0, size = 0;

  void add(double term) {
    value += term;
    size += std::abs(term);
  }
  void add(const Number& other) {
    value += other.value;
    size += other.size;
  }
};

struct Truth {
  std::vector<Number> out, row_sums;
  std::vector<Number> grad_rows, grad_values;  // of every entry: [nnz, F, K], [nnz]
};

template <typename T>
Truth find_truth(const Batch<T>& batch, const std::vector<T>& grad_output) {
  const Problem& p = batch.problem;
  const int64_t F = p.num_fields, K = p.embed_dim;
  const std::vector<double> weight = decode(batch.weight), grads = decode(grad_output);
  const std::vector<double> values = p.values ? decode(batch.values) : std::vector<double>(p.num_entries, 1.0);
  auto row = [&](int64_t e) { return weight.data() + batch.indices.wide[e] * F * K; };
  std::vector<int64_t> terms(F * F);
  int64_t t = 0;
  for (int64_t f = 0; f < F; ++f) {
    for (int64_t g = f + 1; g < F; ++g) terms[f * F + g] = terms[g * F + f] = t++;
  }
  for (int64_t f = 0; f < F; ++f) terms[f * F + f] = t++;

  Truth truth;
  truth.out.resize(grad_output.size());
  truth.row_sums.resize(p.batch_size);
  truth.grad_rows.resize(p.num_entries * F * K);
  truth.grad_values.resize(p.num_entries);
  for (int64_t b = 0; b < p.batch_size; ++b) {
    for (int64_t e = p.entries_begin(b); e < p.entries_begin(b + 1); ++e) {
      for (int64_t i = 0; i < F * K; ++i) truth.row_sums[b].add(row(e)[i]);
      for (int64_t h = p.entries_begin(b); h < e; ++h) {
        const int64_t f = batch.field(e), g = batch.field(h);
        if (f == g && !p.within_field) continue;
        const double x = values[e], y = values[h];
        for (int64_t k = 0; k < K; ++k) {
          int64_t o = b * batch.num_terms() + terms[f * F + g];
          if (p.output == Output::kSum) o = b;
          if (p.output == Output::kHadamard) o = o * K + k;
          const double v = row(e)[g * K + k], w = row(h)[f * K + k], grad = grads[o];
          truth.out[o].add(x * y * v * w);
          truth.grad_rows[(e * F + g) * K + k].add(grad * x * y * w);
          truth.grad_rows[(h * F + f) * K + k].add(grad * x * y * v);
          truth.grad_values[e].add(grad * y * v * w);
          truth.grad_values[h].add(grad * x * v * w);
          if (f == g) {
            // Kernels take an entry's own part out of the sum of its field.
            truth.grad_rows[(e * F + g) * K + k].size += std::abs(grad * x * x * v);
            truth.grad_rows[(h * F + f) * K + k].size += std::abs(grad * y * y * w);
            truth.grad_values[e].size += std::abs(grad * x * v * v);
            truth.grad_values[h].size += std::abs(grad * y * w * w);
          }
        }
      }
    }
  }
  return truth;
}

template <typename T>
void compare(const std::string& what, const std::vector<T>& found, const std::vector<Number>& truth) {
  for (size_t i = 0; i < truth.size(); ++i) {
    const auto [value, size] = truth[i];
    const double tolerance =
        4 * std::numeric_limits<SumOf<T>>::epsilon() * size + (kIsHalf<T> ? rounding<T>(value) : 0);
    if (std::abs(decode(found[i]) - value) <= tolerance) continue;
    char where[160];
    std::snprintf(where, sizeof(where), "[%zu] = %.9g, not %.9g +- %.2g", i, decode(found[i]), value, tolerance);
    return check(false, what + where);
  }
  check(true, what);
}

// fn<Out>() with the type that forward writes: sums are not rounded to the table's.
template <typename T, typename Fn>
auto with_output_type(const Batch<T>& batch, Fn fn) {
  if (batch.problem.output == Output::kSum) return fn.template operator()<SumOf<T>>();
  return fn.template operator()<T>();
}

// ---- Packed tables.

// A random packed table; batch.weight becomes what it stands for.
inline std::vector<char> pack_table(Batch<float>& batch) {
  const Problem& p = batch.problem;
  const int64_t F = p.num_fields, K = p.embed_dim;
  std::vector<char> packed(p.num_features * packed_row_bytes(F, K));
  for (int64_t i = 0; i < p.num_features * F; ++i) {
    char* const row = packed.data() + i / F * packed_row_bytes(F, K);
    BFloat16 scale = random_number<BFloat16>();
    scale.bits &= 0x7fff;
    std::memcpy(row + 2 * (i % F), &scale, sizeof(scale));
    for (int64_t k = 0; k < K; ++k) {
      const auto number = static_cast<signed char>(static_cast<int>(random_bits() % 255) - 127);
      row[2 * F + i % F * packed_embed_dim(K) + k] = static_cast<char>(number);
      batch.weight[i * K + k] = static_cast<float>(decode(scale) * number);
    }
  }
  return packed;
}

// Calls fn(batch, number) for every stride-th of the problems, up to number `last`, with batch_size(number) samples.
template <typename BatchSize, typename Fn>
void for_kernel_problems(uint64_t stride, uint64_t last, const BatchSize& batch_size, Fn&& fn) {
  uint64_t number = 0;
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  const char* const outputs[] = {"sum", "dot", "hadamard"};
  for (ScalarKind dtype : {ScalarKind::kFloat32, ScalarKind::kFloat64, ScalarKind::kBFloat16, ScalarKind::kFloat16}) {
    dispatch_dtype(dtype, [&](auto scalar) {
      using T = typename decltype(scalar)::type;
      for (int64_t F : {1, 2, 3, 7, 39}) {
        for (int64_t K : {1, 3, 4, 5, 8, 10, 12, 16, 24}) {
          for (int variant = 0; variant < 24; ++variant) {
            if (++number % stride || number > last) continue;
            const bool is_ragged = variant % 2, has_values = variant / 2 % 2;
            random_bits.seed(number);
            Batch<T> batch;
            set_problem(batch, dtype, F, K, is_ragged, has_values, number % 3 == 0, batch_size(number));
            batch.problem.within_field = variant / 4 % 2;
            batch.problem.output = static_cast<Output>(variant / 8);
            batch.name = std::string(" (") + std::to_string(number) + ": " + names[static_cast<int>(dtype)] +
                         ", F = " + std::to_string(F) + ", K = " + std::to_string(K) +
                         (is_ragged ? ", ragged" : ", one-hot") + (has_values ? ", values" : "") +
                         (batch.problem.within_field ? ", within" : "") + ", " + outputs[variant / 8] + ")";
            fn(batch, number);
          }
        }
      }
    });
  }
}

}  // namespace ffm
