// SPDX-License-Identifier: MIT
// The gradients of a sample's field sums. Included after vec.h, inside the namespace of an ISA.
#pragma once

#include "rows_ahead.h"

// d = dL/dS[f]: for every field g that has entries, grad_output(f, g) * S[g, f]; zero at f itself.
// terms.pair(f, g) is the gradient of the pair's terms, terms.at(term, k) that of its number k.
template <Output kOutput, typename T, typename R, typename Terms>
void field_gradient(const FieldSums<T>& s, const Terms& terms, const R* const* rows, int64_t f, int64_t K, Sum<T>* d) {
  for (int64_t i = 0; i < s.num_active(); ++i) {
    const int64_t g = s.active(i);
    if (g == f) continue;
    const auto term = terms.pair(f, g);
    const R* const column = rows[g] + f * K;
    if constexpr (kOutput == Output::kHadamard) {
      for (int64_t k = 0; k < K; ++k) d[g * K + k] = terms.at(term, k) * (s.scale(g) * load(column + k));
    } else {
      scale_into(d + g * K, terms.at(term, 0) * s.scale(g), column, K);
    }
  }
  for (int64_t k = 0; k < K; ++k) d[f * K + k] = 0;
}

// Fields whose gradients are made together: those of a register, or else two of a cache line. Of more, the rows of the
// gradient that they go to would be stored in too long a burst.
template <typename A, int kEmbedDim, int kSquare = kPairsPerRegister<kEmbedDim, kLanes<A>>>
constexpr int kFieldsTogether = std::max(kSquare, std::min(2, kFieldsABlock<A, kEmbedDim, kSquare>));

// The same for kSum, where all fields have entries: d[r] = dL/dS[f + r] for `kFields` fields, a block of them or one, a
// register at a time. What the last register of a K-vector has too much, the next one overwrites. See
// dispatch_registers, and rows_ahead.h for `ahead`.
template <int kEmbedDim, int kRest, int kFields, typename T, typename R, typename Ahead>
void field_gradients(const FieldSums<T>& s, Sum<T> grad_output, const R* const* rows, int64_t f, int64_t F,
                     int64_t embed_dim, Sum<T>* d, int64_t stride, Ahead& ahead) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>, kSquare = kPairsPerRegister<kEmbedDim, L>, kBlock = kFieldsTogether<A, kEmbedDim>;
  const int64_t K = kEmbedDim ? kEmbedDim : embed_dim;
  const bool has_values = s.entries().has_values();
  const auto make_row = [&](int64_t g) __attribute__((always_inline)) {
    for (int r = 0; r < kFields; ++r) {
      const R* const column = rows[g] + (f + r) * K;
      A* const to = d + r * stride + g * K;
      const A x = grad_output * s.scale(g);
      int64_t k = 0;
      for (; k + L <= K; k += L) store<L>(to + k, x * load<L>(column + k));
      if constexpr (kRest > 0) store<kRest>(to + k, x * load_first<kRest>(column + k, K - k));
    }
  };
  int64_t g = 0;
  if constexpr (kFields == kBlock) {
    for (; g + kBlock <= F; g += kBlock) {
      if constexpr (kSquare > 1) {
        // A square of K-vectors, read along the rows g and transposed.
        const auto load_pairs = [](const auto* p) { return load_first<L>(p, kBlock * kEmbedDim); };
        Vec<A, L> columns[kBlock];
        for (int r = 0; r < kBlock; ++r) columns[r] = load_pairs(rows[g + r] + f * K);
        transpose<kEmbedDim>(columns);
        // First the factors and then the number, as above: the same bits, whichever fields are worked on together.
        Vec<A, L> x = grad_output - Vec<A, L>{};
        if (has_values) x *= load_pairs(s.wide_scale() + g * K);
        for (int r = 0; r < kBlock; ++r) store<L>(d + r * stride + g * K, x * columns[r]);
      } else {
        for (int r = 0; r < kBlock; ++r) make_row(g + r);
      }
      ahead.template ask_square<kEmbedDim, kBlock>(f, g, K);
    }
  }
  for (; g < F; ++g) {
    ahead.template ask_vectors<kEmbedDim, kFields, false, 1>(g, f, K);
    make_row(g);
  }
  for (int r = 0; r < kFields; ++r) {
    for (int64_t k = 0; k < K; ++k) d[r * stride + (f + r) * K + k] = 0;
  }
}
