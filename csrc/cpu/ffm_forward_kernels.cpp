// SPDX-License-Identifier: MIT
// The interaction, a sample at a time (see field_sums.h), and the roof that it is measured against.

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

// Sum over the pairs of a sample, in registers until its end. R is what its rows are stored in.
template <typename R, int kEmbedDim>
class PairSum {
 public:
  using A = Sum<R>;
  static constexpr int L = kLanes<A>;
  // A register holds the factors of kPairs pairs, or one pair needs one or more registers.
  static constexpr bool kJoin = kEmbedDim > 0 && kEmbedDim < L;
  static constexpr int kPairs = kJoin ? L / kEmbedDim : 1;

  // The pairs of field active(i) with all later ones.
  template <bool kScaled, typename T>
  void add_row(const FieldSums<T>& s, const R* const* rows, int64_t i, int64_t embed_dim) {
    const int64_t K = kEmbedDim ? kEmbedDim : embed_dim;
    const int64_t m = s.num_active(), f = s.active(i), column = f * K;
    const R* const left = rows[f];
    const A scale = kScaled ? s.scale(f) : A(1);
    int64_t j = i + 1;
    if constexpr (kJoin) {
      if (s.is_dense()) {
        int parity = 0;
        for (; j + kPairs <= m; j += kPairs, parity ^= 1) {
          Vec<A, L> right = load_column<kEmbedDim, kPairs>(rows + j, column);
          if (kScaled) right *= scale * load<L>(s.wide_scale() + j * K);
          wide_[parity] += load<L>(left + j * K) * right;
        }
      }
    }
    for (; j < m; ++j) {
      const int64_t g = s.active(j);
      const R* const a = left + g * K;
      const R* const b = rows[g] + column;
      const A x = kScaled ? scale * s.scale(g) : A(1);
      int64_t k = 0;
      for (; k + L <= K; k += L) {
        Vec<A, L> product = load<L>(a + k) * load<L>(b + k);
        if (kScaled) product *= x;
        wide_[(k / L) & 1] += product;
      }
      add_rest<kScaled, L / 2>(a + k, b + k, x, K - k);
    }
  }

  A total() const {
    A result = sum<A, L>(wide_[0] + wide_[1]) + rest1_;
    if constexpr (L > 2) result += rest2_[0] + rest2_[1];
    if constexpr (L > 4) result += sum<A, 4>(rest4_);
    if constexpr (L > 8) result += sum<A, 8>(rest8_);
    return result;
  }

 private:
  // The n < L factors that do not fill a register, by halves.
  template <bool kScaled, int W>
  void add_rest(const R* a, const R* b, A x, int64_t n) {
    if constexpr (W > 1) {
      if (n & W) {
        Vec<A, W> product = load<W>(a) * load<W>(b);
        if (kScaled) product *= x;
        if constexpr (W == 8) rest8_ += product;
        if constexpr (W == 4) rest4_ += product;
        if constexpr (W == 2) rest2_ += product;
        a += W;
        b += W;
      }
      add_rest<kScaled, W / 2>(a, b, x, n);
    } else if (n & 1) {
      rest1_ += x * load(a) * load(b);
    }
  }

  Vec<A, L> wide_[2] = {};
  Vec<A, 8> rest8_ = {};
  Vec<A, 4> rest4_ = {};
  Vec<A, 2> rest2_ = {};
  A rest1_ = 0;
};

template <typename T, int kEmbedDim, Output kOutput>
void forward(const Problem& p, T* out, int64_t begin, int64_t end, void* scratch) {
  using A = Sum<T>;
  const int64_t F = p.num_fields, K = kEmbedDim ? kEmbedDim : p.embed_dim;
  const int64_t P = F * (F - 1) / 2, num_terms = P + (p.within_field ? F : 0);
  Arena arena(scratch);
  FieldSums<T> s(p, arena);
  NextSample<T> next(p, end);
  for (int64_t b = begin; b < end; ++b) {
    s.load_sample(p.entries_begin(b), p.entries_begin(b + 1));
    next.after(b);
    s.with_rows([&](auto rows) {
      using R = std::remove_const_t<std::remove_pointer_t<std::remove_pointer_t<decltype(rows)>>>;
      if constexpr (kOutput == Output::kSum) {
        PairSum<R, kEmbedDim> pairs;
        for (int64_t i = 0; i < s.num_active(); ++i) {
          next.prefetch_one();
          if (p.values) {
            pairs.template add_row<true>(s, rows, i, K);
          } else {
            pairs.template add_row<false>(s, rows, i, K);
          }
        }
        A y = pairs.total();
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
          next.prefetch_one();
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
    next.prefetch_rest();
  }
}

template <typename T>
void gather_sum(const Problem& p, T* out, int64_t begin, int64_t end) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const int64_t row_size = p.row_size();
  const Entries<T> entries(p);
  NextSample<T> next(p, end);
  for (int64_t b = begin; b < end; ++b) {
    next.after(b);
    Vec<A, L> wide[2] = {};
    A rest = 0;
    for (int64_t e = p.entries_begin(b); e < p.entries_begin(b + 1); ++e) {
      next.prefetch_one();
      const T* const row = entries.row(e);
      int64_t i = 0;
      for (; i + 2 * L <= row_size; i += 2 * L) {
        wide[0] += load<L>(row + i);
        wide[1] += load<L>(row + i + L);
      }
      for (; i + L <= row_size; i += L) wide[0] += load<L>(row + i);
      for (; i < row_size; ++i) rest += load(row + i);
    }
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
