// SPDX-License-Identifier: MIT
// The gradient of the interaction, a sample at a time (see field_sums.h): for an entry of field f,
//   d[g] = dL/dS[f, g] = grad_output(f, g) * S[g, f],   grad_row = x * d,   grad_x = <row, d>.

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

// The gradient of a sample's output, read as that of any pair or field.
template <typename T, Output kOutput>
class OutputGradient {
 public:
  OutputGradient(const Problem& p, const Gradient& g, int64_t b) : F_(p.num_fields), K_(p.embed_dim) {
    const int64_t num_terms = F_ * (F_ - 1) / 2 + (p.within_field ? F_ : 0);
    const int64_t width = kOutput == Output::kSum ? 1 : num_terms * (kOutput == Output::kDot ? 1 : K_);
    terms_ = static_cast<const T*>(g.grad_output) + b * width;
  }

  // Of a term: [K] numbers for kHadamard, else one for all k; read by at().
  const T* pair(int64_t f, int64_t g) const { return term(f < g ? pair_index(f, g, F_) : pair_index(g, f, F_)); }
  const T* within(int64_t f) const { return term(F_ * (F_ - 1) / 2 + f); }
  static Sum<T> at(const T* term, int64_t k) { return load(term + (kOutput == Output::kHadamard ? k : 0)); }

 private:
  const T* term(int64_t t) const {
    if constexpr (kOutput == Output::kSum) return terms_;
    return terms_ + (kOutput == Output::kDot ? t : t * K_);
  }

  const T* terms_;
  int64_t F_, K_;
};

// Where the gradients of rows go (see Gradient).
template <typename T>
class RowGradients {
 public:
  using A = Sum<T>;

  RowGradients(const Problem& p, const Gradient& g)
      : g_(g),
        entries_(p),
        row_size_(p.row_size()),
        rows_(static_cast<T*>(g.grad_rows)),
        sums_(static_cast<A*>(kIsNarrow<T> ? g.sums : g.grad_rows)),
        staged_(static_cast<A*>(g.staged)) {}

  explicit operator bool() const { return rows_ != nullptr; }

  // Entry e contributes x * d. What is staged is d alone: multiplied and added in one step either way, a sum has the
  // same bits whether or not it was staged.
  void put(int64_t e, A x, const A* d) const {
    if (is_only(e)) return scale_into(rows_ + g_.slots[e] * row_size_, x, d, row_size_);
    if (is_first(e)) return scale_into(sum(e), x, d, row_size_);
    if (staged_) return scale_into(staged(e), A(1), d, row_size_);
    add_scaled(sum(e), x, d, row_size_);
  }
  // The second half of a put() that was staged, by the owner of the row: the part that its slot is congruent to.
  void add_staged(int64_t e, int64_t part, int64_t parts) const {
    if (is_only(e) || is_first(e) || slot(e) % parts != part) return;
    add_scaled(sum(e), entries_.value(e), staged(e), row_size_);
  }
  // The rounding of a sum, at its first entry.
  void round(int64_t e) const {
    if (!is_only(e) && is_first(e)) scale_into(rows_ + g_.slots[e] * row_size_, A(1), sum(e), row_size_);
  }

 private:
  bool is_only(int64_t e) const { return kIsNarrow<T> && g_.sum_slots[e] < 0; }
  bool is_first(int64_t e) const { return g_.is_first && g_.is_first[e]; }
  int64_t slot(int64_t e) const { return kIsNarrow<T> ? g_.sum_slots[e] : g_.slots[e]; }
  A* sum(int64_t e) const { return sums_ + slot(e) * row_size_; }
  A* staged(int64_t e) const { return staged_ + (e - g_.staged_begin) * row_size_; }

  const Gradient& g_;
  Entries<T> entries_;
  int64_t row_size_;
  T* rows_;
  A* sums_;
  A* staged_;
};

// d = dL/dS[f]: for every field g that has entries, grad_output(f, g) * S[g, f]; zero at f itself.
template <int kEmbedDim, Output kOutput, typename T, typename R>
void field_gradient(const FieldSums<T>& s, const OutputGradient<T, kOutput>& terms, const R* const* rows, int64_t f,
                    int64_t embed_dim, Sum<T>* d) {
  using A = Sum<T>;
  using Terms = OutputGradient<T, kOutput>;
  constexpr int L = kLanes<A>;
  const int64_t K = kEmbedDim ? kEmbedDim : embed_dim;
  const int64_t m = s.num_active(), column = f * K;
  int64_t i = 0;
  if constexpr (kOutput == Output::kSum && kEmbedDim > 0 && kEmbedDim < L) {
    // One factor for all pairs, and registers that hold several of them.
    constexpr int kPairs = L / kEmbedDim;
    if (s.is_dense()) {
      const A factor = Terms::at(terms.pair(f, f), 0);
      for (; i + kPairs <= m; i += kPairs) {
        Vec<A, L> v = factor * load_column<kEmbedDim, kPairs>(rows + i, column);
        if (s.entries().has_values()) v *= load<L>(s.wide_scale() + i * K);
        store<L>(d + i * K, v);
      }
    }
  }
  for (; i < m; ++i) {
    const int64_t g = s.active(i);
    if (g == f) continue;
    const T* const term = terms.pair(f, g);
    if constexpr (kOutput == Output::kHadamard) {
      for (int64_t k = 0; k < K; ++k) d[g * K + k] = Terms::at(term, k) * (s.scale(g) * load(rows[g] + column + k));
    } else {
      scale_into(d + g * K, Terms::at(term, 0) * s.scale(g), rows[g] + column, K);
    }
  }
  for (int64_t k = 0; k < K; ++k) d[f * K + k] = 0;
}

template <typename T, int kEmbedDim, Output kOutput>
void backward(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, void* scratch) {
  using A = Sum<T>;
  using Terms = OutputGradient<T, kOutput>;
  const int64_t K = kEmbedDim ? kEmbedDim : p.embed_dim, row_size = p.num_fields * K;
  const RowGradients<T> grad_rows(p, grad);
  T* const grad_values = static_cast<T*>(grad.grad_values);
  Arena arena(scratch);
  FieldSums<T> s(p, arena);
  const Entries<T>& entries = s.entries();
  // dS[f], the gradient of the field sum that the current entry belongs to; zero at fields that have no entry.
  A* const d = arena.take<A>(row_size);
  NextSample<T> next(p, end);

  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    s.load_sample(first, last);
    next.after(b);
    const Terms terms(p, grad, b);
    if (b == begin || !s.is_dense()) {
      for (int64_t i = 0; i < row_size; ++i) d[i] = 0;
    }
    s.with_rows([&](auto rows) {
      int64_t current = -1;
      for (int64_t e = first; e < last; ++e) {
        next.prefetch_one();
        const int64_t f = entries.field(e, first);
        const A x = entries.value(e);
        const T* const row = entries.row(e);
        if (f != current) {
          current = f;
          field_gradient<kEmbedDim, kOutput>(s, terms, rows, f, K, d);
        }
        if (p.within_field && s.count(f) > 1) {
          const T* const term = terms.within(f);
          const A* const own_sum = s.own_sum(f);
          for (int64_t k = 0; k < K; ++k) {
            d[f * K + k] = Terms::at(term, k) * (own_sum[k] - x * load(row + f * K + k));
          }
        }
        if (grad_rows) grad_rows.put(e, x, d);
        if (grad_values) store(grad_values + e, dot(row, d, row_size));
      }
    });
    next.prefetch_rest();
  }
}

void dispatch_backward(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, void* scratch) {
  dispatch_all(p, [&](auto scalar, auto embed_dim, auto output) {
    using T = typename decltype(scalar)::type;
    backward<T, embed_dim(), output()>(p, grad, begin, end, scratch);
  });
}

void dispatch_add_staged(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, int64_t part,
                         int64_t parts) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    const RowGradients<typename decltype(scalar)::type> grad_rows(p, grad);
    for (int64_t e = begin; e < end; ++e) grad_rows.add_staged(e, part, parts);
  });
}

void dispatch_round_sums(const Problem& p, const Gradient& grad, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    const RowGradients<typename decltype(scalar)::type> grad_rows(p, grad);
    for (int64_t e = begin; e < end; ++e) grad_rows.round(e);
  });
}

}  // namespace

extern const BackwardKernels backward_kernels;
const BackwardKernels backward_kernels = {field_sums_bytes, dispatch_backward, dispatch_add_staged,
                                          dispatch_round_sums};

}  // namespace ffm::FFM_ISA
