// SPDX-License-Identifier: MIT
// The sum over the pairs of a sample. Included after vec.h, inside the namespace of an ISA.
#pragma once

#include "field_sums.h"

// Sum over the pairs of a sample, in registers until its end. R is what its rows are stored in; see dispatch_registers.
// kScaled: fields have values.
template <typename R, int kEmbedDim, int kRest, bool kScaled>
class PairSum {
 public:
  using A = Sum<R>;
  static constexpr int L = kLanes<A>;
  static constexpr int kPairs = kPairsPerRegister<kEmbedDim, L>;

  // All pairs of the fields that have entries. step(n) is called after every few rows, with the number of their pairs.
  template <typename T, typename Step>
  void add_pairs(const FieldSums<T>& s, const R* const* rows, int64_t embed_dim, const Step& step) {
    const int64_t K = kEmbedDim ? kEmbedDim : embed_dim, m = s.num_active();
    int64_t i = 0;
    if constexpr (kPairs > 1) {
      for (; s.is_dense() && i + kPairs <= m; i += kPairs) {
        int64_t j = i + kPairs;
        for (; j + kPairs <= m; j += kPairs) add_tile(s, rows, i, j);
        for (int64_t f = i; f < i + kPairs; ++f) {
          for (int64_t g = f + 1; g < i + kPairs; ++g) add_pair(s, rows, f, g, K);
          for (int64_t g = j; g < m; ++g) add_pair(s, rows, f, g, K);
        }
        step(kPairs * (m - i) - kPairs * (kPairs + 1) / 2);
      }
    }
    for (; i < m; ++i) {
      const int64_t f = s.active(i);
      int64_t j = i + 1;
      for (; j + 1 < m; j += 2) {
        add_pair(s, rows, f, s.active(j), K);
        add_pair<kSums / 2>(s, rows, f, s.active(j + 1), K);
      }
      if (j < m) add_pair(s, rows, f, s.active(j), K);
      step(m - 1 - i);
    }
  }

  A total() const {
    return sum<A, kWide>((wide_[0] + wide_[1]) + (wide_[2] + wide_[3])) + sum<A, kLast>(rest_[0] + rest_[1]);
  }

 private:
  // The pairs of kPairs fields from f on with as many from g on: rows are read a register at a time, those of g are
  // then transposed.
  template <typename T>
  void add_tile(const FieldSums<T>& s, const R* const* rows, int64_t f, int64_t g) {
    constexpr int K = kEmbedDim, N = kPairs * K;
    decltype(factors<L>(rows[0], N)) right[kPairs];
    for (int r = 0; r < kPairs; ++r) right[r] = factors<L>(rows[g + r] + f * K, N);
    transpose<K>(right);
    for (int r = 0; r < kPairs; ++r) {
      if constexpr (kScaled) right[r] *= s.scale(f + r) * load_first<L>(s.wide_scale() + g * K, N);
      add(wide_[r % kSums], factors<L>(rows[f + r] + g * K, N), right[r], A(1));
    }
  }

  template <int kFirstSum = 0, typename T>
  __attribute__((always_inline)) void add_pair(const FieldSums<T>& s, const R* const* rows, int64_t f, int64_t g,
                                               int64_t K) {
    const R* const a = rows[f] + g * K;
    const R* const b = rows[g] + f * K;
    const A x = kScaled ? s.scale(f) * s.scale(g) : A(1);
    int64_t k = 0;
    for (; k + L <= K; k += L) {
      add(wide_[(kFirstSum + k / L) % kSums], factors<L>(a + k, L), factors<L>(b + k, L), x);
    }
    if constexpr (kRest > 0) {
      add(rest_[kFirstSum / (kSums / 2)], factors<kRest>(a + k, K - k), factors<kRest>(b + k, K - k), x);
    }
  }

  // bfloat16 products need no factors of their own width, as long as neighbours may go into one sum.
  static constexpr bool kKeepsNarrow = std::is_same_v<R, BFloat16> && !kScaled;

  // The first n of N factors at p, as they are multiplied.
  template <int N>
  static auto factors(const R* p, int64_t n) {
    if constexpr (kKeepsNarrow) {
      return load_first_bits<N>(p, n);
    } else {
      return load_first<N>(p, n);
    }
  }
  template <typename Sums, typename Factors>
  static void add(Sums& sums, Factors a, Factors b, A x) {
    if constexpr (kKeepsNarrow) {
      sums = add_bfloat16_products(sums, a, b);
    } else {
      sums += kScaled ? x * (a * b) : a * b;
    }
  }

  // Several, so that an addition need not wait for the one before it.
  static constexpr int kSums = 4;
  static constexpr int kWide = kKeepsNarrow ? L / 2 : L;
  static constexpr int kLast = kRest == 0 ? 1 : kKeepsNarrow ? kRest / 2 : kRest;
  Vec<A, kWide> wide_[kSums] = {};
  Vec<A, kLast> rest_[2] = {};
};

// That sum, for whatever K and values the Problem has.
template <int kEmbedDim, typename T, typename R, typename Step>
__attribute__((always_inline)) inline Sum<T> sum_pairs(const Problem& p, const FieldSums<T>& s, const R* const* rows,
                                                       const Step& step) {
  using A = Sum<T>;
  const int64_t K = kEmbedDim ? kEmbedDim : p.embed_dim;
  A y = dispatch_registers<kEmbedDim, kLanes<A>>(K, [&](auto embed_dim, auto rest) {
    if (p.values) {
      PairSum<R, embed_dim(), rest(), true> pairs;
      pairs.add_pairs(s, rows, K, step);
      return pairs.total();
    }
    PairSum<R, embed_dim(), rest(), false> pairs;
    pairs.add_pairs(s, rows, K, step);
    return pairs.total();
  });
  if (p.within_field) {
    for (int64_t i = 0; i < s.num_active(); ++i) {
      for (int64_t k = 0; k < K; ++k) y += s.within(s.active(i))[k];
    }
  }
  return y;
}
