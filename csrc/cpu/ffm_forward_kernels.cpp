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
// after vec.h, which they use
#include "field_sums.h"
#include "pair_sum.h"

template <typename T, Output kOutput>
using OutputOf = std::conditional_t<kOutput == Output::kSum, Sum<T>, T>;

template <typename T, int kEmbedDim, Output kOutput>
void forward(const Problem& p, OutputOf<T, kOutput>* out, int64_t begin, int64_t end, void* scratch) {
  using A = Sum<T>;
  const int64_t F = p.num_fields, K = kEmbedDim ? kEmbedDim : p.embed_dim;
  const int64_t P = F * (F - 1) / 2, num_terms = P + (p.within_field ? F : 0);
  Arena arena(scratch);
  FieldSums<T> s(p, arena);
  RowsAhead<T> ahead(p, arena, kAskFor<kOutput>, {begin, end}, {0, F});
  for (int64_t b = begin; b < end; ++b) {
    s.load_sample(p.entries_begin(b), p.entries_begin(b + 1));
    ahead.at_sample(b, s.num_active() * (s.num_active() - 1) / 2);
    s.with_rows([&](auto rows) {
      using R = std::remove_const_t<std::remove_pointer_t<std::remove_pointer_t<decltype(rows)>>>;
      if constexpr (kOutput == Output::kSum) {
        out[b] = sum_pairs<kEmbedDim>(p, s, rows, ahead);
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
              store(term, s.sum_within(f));
            } else {
              for (int64_t k = 0; k < K; ++k) store(term + k, s.count(f) > 1 ? s.within(f)[k] : A(0));
            }
          }
        }
      }
    });
    ahead.after_sample();
  }
}

template <typename T>
void gather_sum(const Problem& p, void* out, int64_t begin, int64_t end) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  constexpr int64_t kLine = kCacheLine / sizeof(T);
  const int64_t row_size = p.row_size(), last = p.entries_begin(end);
  const int64_t rows_ahead = rows_in(kWindowBytes, row_size * static_cast<int64_t>(sizeof(T)));
  const Entries<T> entries(p);
  for (int64_t e = p.entries_begin(begin); e < std::min(last, p.entries_begin(begin) + rows_ahead); ++e) {
    prefetch(entries.row(e), row_size);
  }
  for (int64_t b = begin; b < end; ++b) {
    Vec<A, L> wide[2] = {};
    A rest = 0;
    for (int64_t e = p.entries_begin(b); e < p.entries_begin(b + 1); ++e) {
      const T* const row = entries.row(e);
      // Each place is a cue to ask for that of a later row, as in rows_ahead.h.
      const T* const later = entries.row(std::min(e + rows_ahead, last - 1));
      prefetch_line(later + row_size - 1);
      int64_t i = 0;
      for (; i + 2 * L <= row_size; i += 2 * L) {
        for (int64_t k = 0; k < 2 * L; k += kLine) prefetch_line(later + i + k);
        if constexpr (std::is_same_v<T, BFloat16>) {
          const auto [even, odd] = halves_of_bfloat16(load_bits<2 * L>(row + i));
          wide[0] += even;
          wide[1] += odd;
        } else {
          wide[0] += load<L>(row + i);
          wide[1] += load<L>(row + i + L);
        }
      }
      for (int64_t k = i; k < row_size; k += kLine) prefetch_line(later + k);
      for (; i + L <= row_size; i += L) wide[0] += load<L>(row + i);
      for (; i < row_size; ++i) rest += load(row + i);
    }
    store(static_cast<T*>(out) + b, sum<A, L>(wide[0] + wide[1]) + rest);
  }
}

template <typename T>
size_t forward_bytes(const Problem& p) {
  return field_sums_bytes<T>(p, 0) + Places<T>::bytes(p);
}

template <typename T>
void dispatch_forward(const Problem& p, void* out, int64_t begin, int64_t end, void* scratch) {
  dispatch_constants(p, [&](auto embed_dim, auto output) {
    auto* const typed = static_cast<OutputOf<T, output()>*>(out);
    forward<T, embed_dim(), output()>(p, typed, begin, end, scratch);
  });
}

}  // namespace

template <typename T>
const ForwardKernels& forward_kernels() {
  static constexpr ForwardKernels kKernels = {forward_bytes<T>, dispatch_forward<T>, gather_sum<T>};
  return kKernels;
}
template const ForwardKernels& forward_kernels<FFM_DTYPE>();

}  // namespace ffm::FFM_ISA
