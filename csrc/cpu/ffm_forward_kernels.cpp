// SPDX-License-Identifier: MIT
// The interaction, a sample at a time (see field_sums.h), and the roof that it is measured against.

#include <algorithm>
#include <bit>
#include <type_traits>
#include <utility>

#include "../dispatch.h"
#include "ffm_kernels.h"
#include "intrinsics.h"

namespace ffm::FFM_ISA {
namespace {

#include "vec.h"
// after vec.h, which it uses
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

template <typename T, int kEmbedDim, Output kOutput>
void forward(const Problem& p, T* out, int64_t begin, int64_t end, void* scratch) {
  using A = Sum<T>;
  const int64_t F = p.num_fields, K = kEmbedDim ? kEmbedDim : p.embed_dim;
  const int64_t P = F * (F - 1) / 2, num_terms = P + (p.within_field ? F : 0);
  Arena arena(scratch);
  FieldSums<T> s(p, arena);
  RowsAhead<T> ahead(p, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    s.load_sample(p.entries_begin(b), p.entries_begin(b + 1));
    ahead.at_sample(b, s.num_active() * (s.num_active() - 1) / 2);
    s.with_rows([&](auto rows) {
      using R = std::remove_const_t<std::remove_pointer_t<std::remove_pointer_t<decltype(rows)>>>;
      if constexpr (kOutput == Output::kSum) {
        const auto step = [&](int64_t work) { ahead.step(work); };
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
        store(out + b, y);
      } else {
        constexpr bool kDot = kOutput == Output::kDot;
        const int64_t width = kDot ? 1 : K;
        T* const terms = out + b * num_terms * width;
        if (!s.is_dense()) {
          for (int64_t i = 0; i < num_terms * width; ++i) store(terms + i, A(0));
        }
        for (int64_t i = 0; i < s.num_active(); ++i) {
          ahead.step(s.num_active() - 1 - i);
          const int64_t f = s.active(i);
          for (int64_t j = i + 1; j < s.num_active(); ++j) {
            const int64_t g = s.active(j);
            const A x = s.scale(f) * s.scale(g);
            const R* const left = rows[f] + g * K;
            const R* const right = rows[g] + f * K;
            T* const term = terms + pair_index(f, g, F) * width;
            if constexpr (kDot) {
              A d = 0;
              for (int64_t k = 0; k < K; ++k) d += load(left + k) * load(right + k);
              store(term, x * d);
            } else {
              for (int64_t k = 0; k < K; ++k) store(term + k, x * (load(left + k) * load(right + k)));
            }
          }
          if (p.within_field) {
            T* const term = terms + (P + f) * width;
            if constexpr (kDot) {
              A d = 0;
              for (int64_t k = 0; k < K; ++k) d += s.within(f)[k];
              store(term, d);
            } else {
              for (int64_t k = 0; k < K; ++k) store(term + k, s.within(f)[k]);
            }
          }
        }
      }
    });
    ahead.after_sample();
  }
}

template <typename T>
void gather_sum(const Problem& p, T* out, int64_t begin, int64_t end) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const int64_t row_size = p.row_size();
  const Entries<T> entries(p);
  RowsAhead<T> ahead(p, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    ahead.at_sample(b, p.entries_begin(b + 1) - p.entries_begin(b));
    Vec<A, L> wide[2] = {};
    A rest = 0;
    for (int64_t e = p.entries_begin(b); e < p.entries_begin(b + 1); ++e) {
      ahead.step(1);
      const T* const row = entries.row(e);
      int64_t i = 0;
      for (; i + 2 * L <= row_size; i += 2 * L) {
        wide[0] += load<L>(row + i);
        wide[1] += load<L>(row + i + L);
      }
      for (; i + L <= row_size; i += L) wide[0] += load<L>(row + i);
      for (; i < row_size; ++i) rest += load(row + i);
    }
    ahead.after_sample();
    store(out + b, sum<A, L>(wide[0] + wide[1]) + rest);
  }
}

void dispatch_forward(const Problem& p, void* out, int64_t begin, int64_t end, void* scratch) {
  dispatch_all(p, [&](auto scalar, auto embed_dim, auto output) {
    using T = typename decltype(scalar)::type;
    forward<T, embed_dim(), output()>(p, static_cast<T*>(out), begin, end, scratch);
  });
}

void dispatch_gather_sum(const Problem& p, void* out, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    gather_sum<T>(p, static_cast<T*>(out), begin, end);
  });
}

}  // namespace

extern const ForwardKernels forward_kernels;
const ForwardKernels forward_kernels = {field_sums_bytes, dispatch_forward, dispatch_gather_sum};

}  // namespace ffm::FFM_ISA
