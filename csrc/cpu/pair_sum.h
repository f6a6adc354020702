// SPDX-License-Identifier: MIT
// The sum over the pairs of a sample. Included after vec.h, inside the namespace of an ISA.
#pragma once

#include "rows_ahead.h"

// Where a tile's lanes all count, in place of a function that masks those of a row.
struct AllLanes {};

// All pairs of F fields, kFields of them with kFields others at a time, F >= kFields: tile(f, g) for those that lie
// whole beside each other; the last ones, where F is no multiple, overlap those before them: last(f, g, done), of which
// the first `done` have been met; diagonal(f, done) for fields among themselves, of which the first `done` have met.
template <int kFields, typename Tile, typename Last, typename Diagonal>
__attribute__((always_inline)) inline void for_tiles(int64_t F, const Tile& tile, const Last& last,
                                                     const Diagonal& diagonal) {
  const int64_t whole = F / kFields * kFields, g_last = F - kFields, done = whole - g_last;
  for (int64_t f = 0; f < whole; f += kFields) {
    for (int64_t g = f + kFields; g < whole; g += kFields) tile(f, g);
    if (whole < F) last(f, g_last, done);
    diagonal(f, 0);
  }
  if (whole < F) diagonal(g_last, done);
}

// fn(I) for I = 0 .. n - 1, as constants.
template <int n, typename Fn>
__attribute__((always_inline)) inline void for_constants(const Fn& fn) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (fn(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, n>{});
}

// Sum over the pairs of a sample, in registers until its end. R is what its rows are stored in; see dispatch_registers.
// kScaled: fields have values.
template <typename R, int kEmbedDim, int kRest, bool kScaled>
class PairSum {
 public:
  using A = Sum<R>;

  // All pairs of the fields that have entries; `ahead` is told where it is (rows_ahead.h).
  template <typename T, typename Ahead>
  __attribute__((always_inline)) void add_pairs(const FieldSums<T>& s, const R* const* rows, int64_t embed_dim,
                                                Ahead& ahead) {
    const int64_t K = kEmbedDim ? kEmbedDim : embed_dim, m = s.num_active();
    int64_t i = 0;
    if constexpr (kFields > 1 && kKeepsNarrow) {
      if (s.is_dense() && m >= kFields) return add_tiles(s, rows, ahead);
    } else if constexpr (kBlock > 1) {
      if (s.is_dense()) {
        const Range whole = {0, m / kBlock * kBlock};
        for (; i < whole.end; i += kBlock) {
          ahead.template ask_tile<kEmbedDim, kBlock>(i, i, whole, K);
          add_triangle(s, rows, i, K);
          int64_t j = i + kBlock;
          for (; j < whole.end; j += kBlock) {
            add_square(s, rows, i, j, K);
            ahead.template ask_tile<kEmbedDim, kBlock>(i, j, whole, K);
          }
          if (j < m) ahead.template ask_vectors<kEmbedDim, kBlock>(i, j, K);
          for (; j < m; ++j) {
            for_constants<kBlock>([&](auto r)
                                      __attribute__((always_inline)) { add_pair<r % kSums>(s, rows, i + r, j, K); });
            ahead.template ask_vectors<kEmbedDim, kBlock, false, 1>(j, i, K);
          }
          ahead.step(kBlock * (m - i) - kBlock * (kBlock + 1) / 2);
        }
      }
    }
    const Range rest = {i, m};
    for (; i < m; ++i) {
      const int64_t f = s.active(i);
      int64_t j = i + 1;
      const auto add = [&](auto r) __attribute__((always_inline)) {
        const int64_t g = s.active(j + r);
        add_pair<r>(s, rows, f, g, K);
        ahead.template ask_tile<kEmbedDim, 1>(f, g, rest, K);
      };
      for (; j + kSums <= m; j += kSums) for_constants<kSums>(add);
      for (; j < m; ++j) add(std::integral_constant<int, 0>{});
      ahead.template ask_tile<kEmbedDim, 1>(f, f, rest, K);
      ahead.step(m - 1 - i);
    }
  }

  A total() const {
    return sum<A, kWide>((wide_[0] + wide_[1]) + (wide_[2] + wide_[3])) +
           sum<A, kLast>((rest_[0] + rest_[1]) + (rest_[2] + rest_[3]));
  }

 private:
  // bfloat16 products need no factors of their own width, as long as neighbours may go into one sum.
  static constexpr bool kKeepsNarrow = std::is_same_v<R, BFloat16> && !kScaled;
  // Factors in a register, and the fields whose K-vectors lie in it.
  static constexpr bool kIsSmall = kEmbedDim > 0 && kEmbedDim < kLanes<A>;
  static constexpr int L = kIsSmall && kKeepsNarrow ? 2 * kLanes<A> : kLanes<A>;
  static constexpr int kFields = kPairsPerRegister<kEmbedDim, L>;
  static constexpr int kBlock = kFieldsABlock<A, kEmbedDim, kFields>;

  using Lane = int16_t;
  using Lanes = Vec<Lane, L>;

  // All pairs in tiles: where half as many registers hold a row, pairs by themselves would take as long as the rest.
  template <typename T, typename Ahead>
  __attribute__((always_inline)) void add_tiles(const FieldSums<T>& s, const R* const* rows, Ahead& ahead) {
    const int64_t F = s.num_active();
    const Range whole = {0, F / kFields * kFields};
    const Lanes field = run_of_lane<Lane, L, kEmbedDim>();
    const auto at_least = [&](int64_t first) { return field >= static_cast<Lane>(first); };
    for_tiles<kFields>(
        F,
        [&](int64_t f, int64_t g) {
          add_tile(s, rows, f, g, AllLanes{});
          ahead.template ask_tile<kEmbedDim, kFields>(f, g, whole, kEmbedDim);
        },
        [&](int64_t f, int64_t g, int64_t done) {
          add_tile(s, rows, f, g, [&](int64_t) { return at_least(done); });
          ahead.template ask_last_tile<kEmbedDim, kFields>(f, g);
        },
        [&](int64_t f, int64_t done) {
          add_tile(s, rows, f, f, [&](int64_t r) { return at_least(r >= done ? r + 1 : kFields); });
          ahead.template ask_last_tile<kEmbedDim, kFields>(f, f);
          ahead.step(kFields * std::max<int64_t>(0, F - f - kFields) + kFields * (kFields - 1) / 2);
        });
  }

  // The pairs of kFields fields from f on with as many from g on, of which lanes(r) are those of field f + r that
  // count: rows are read a register at a time, those of g are then transposed.
  template <typename T, typename LanesOf>
  __attribute__((always_inline)) void add_tile(const FieldSums<T>& s, const R* const* rows, int64_t f, int64_t g,
                                               const LanesOf& lanes) {
    constexpr int K = kEmbedDim, N = kFields * K;
    using Factors = decltype(factors<L>(rows[0], N));
    // Of both factors: 0 times what is not finite is not 0.
    const auto counted = [&](Factors v, int r) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<LanesOf, AllLanes>)
        return v;
      else
        return bit_copy<Factors>(bit_copy<Lanes>(v) & lanes(r));
    };
    Factors right[kFields];
    for (int r = 0; r < kFields; ++r) right[r] = factors<L>(rows[g + r] + f * K, N);
    transpose<K>(right);
    for (int r = 0; r < kFields; ++r) {
      if constexpr (kScaled) right[r] *= s.scale(f + r) * load_first<L>(s.wide_scale() + g * K, N);
      add(wide_[r % kSums], counted(factors<L>(rows[f + r] + g * K, N), r), counted(right[r], r), A(1));
    }
  }

  // The pairs of a block of fields, from f on, with another, from g on.
  template <typename T>
  __attribute__((always_inline)) void add_square(const FieldSums<T>& s, const R* const* rows, int64_t f, int64_t g,
                                                 int64_t K) {
    for_constants<kBlock / kFields>([&](auto r) __attribute__((always_inline)) {
      for_constants<kBlock / kFields>([&](auto q) __attribute__((always_inline)) {
        if constexpr (kFields > 1) {
          add_tile(s, rows, f + r * kFields, g + q * kFields, AllLanes{});
        } else {
          add_pair<(kBlock * r + q) % kSums>(s, rows, f + r, g + q, K);
        }
      });
    });
  }
  // Those of a block of fields with each other.
  template <typename T>
  __attribute__((always_inline)) void add_triangle(const FieldSums<T>& s, const R* const* rows, int64_t f, int64_t K) {
    for_constants<kBlock>([&](auto r) __attribute__((always_inline)) {
      for_constants<kBlock>([&](auto q) __attribute__((always_inline)) {
        constexpr bool kAreTogether = kFields == 1 || r / kFields == q / kFields;
        if constexpr (r < q && kAreTogether) add_pair<q % kSums>(s, rows, f + r, f + q, K);
        if constexpr (r < q && !kAreTogether && r % kFields == 0 && q % kFields == 0) {
          add_tile(s, rows, f + r, f + q, AllLanes{});
        }
      });
    });
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
      add(rest_[kFirstSum], factors<kRest>(a + k, K - k), factors<kRest>(b + k, K - k), x);
    }
  }

  // The first n of N factors at p, as they are multiplied.
  template <int N>
  __attribute__((always_inline)) static auto factors(const R* p, int64_t n) {
    if constexpr (kKeepsNarrow) {
      return load_first_bits<N>(p, n);
    } else {
      return load_first<N>(p, n);
    }
  }
  template <typename Sums, typename Factors>
  __attribute__((always_inline)) static void add(Sums& sums, Factors a, Factors b, A x) {
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
  Vec<A, kLast> rest_[kSums] = {};
};

// That sum, for whatever K and values the Problem has.
template <int kEmbedDim, typename T, typename R, typename Ahead>
__attribute__((always_inline)) inline Sum<T> sum_pairs(const Problem& p, const FieldSums<T>& s, const R* const* rows,
                                                       Ahead& ahead) {
  using A = Sum<T>;
  const int64_t K = kEmbedDim ? kEmbedDim : p.embed_dim;
  A y = dispatch_registers<kEmbedDim, kLanes<A>>(K, [&](auto embed_dim, auto rest) {
    if (p.values) {
      PairSum<R, embed_dim(), rest(), true> pairs;
      pairs.add_pairs(s, rows, K, ahead);
      return pairs.total();
    }
    PairSum<R, embed_dim(), rest(), false> pairs;
    pairs.add_pairs(s, rows, K, ahead);
    return pairs.total();
  });
  if (p.within_field && s.is_summed()) {
    for (int64_t i = 0; i < s.num_active(); ++i) y += s.sum_within(s.active(i));
  }
  return y;
}
