// SPDX-License-Identifier: MIT
// The gradient of the interaction, a sample at a time (see field_sums.h): for an entry of field f,
//   d[g] = dL/dS[f, g] = grad_output(f, g) * S[g, f],   grad_row = x * d,   grad_x = <row, d>.

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
        stage_(static_cast<A*>(g.stage)) {}

  explicit operator bool() const { return rows_ != nullptr; }

  // Entry e contributes x * d. What is staged is d alone: multiplied and added in one step either way, a sum has the
  // same bits whether or not it was staged.
  void put(int64_t e, A x, const A* d) const {
    if (is_only(e)) return store_first(rows_ + g_.slots[e] * row_size_, x, d);
    if (is_first(e)) return kIsNarrow<T> ? scale_into(sum(e), x, d, row_size_) : store_first(sum(e), x, d);
    if (g_.put[e] == Put::kStage) return scale_into(staged(e), A(1), d, row_size_);
    add_scaled(sum(e), x, d, row_size_);
  }
  // The second half of a put() that was staged.
  void add_staged(int64_t e) const { add_scaled(sum(e), entries_.value(e), staged(e), row_size_); }
  // The rounding of the sum that begins with entry e.
  void round(int64_t e) const { store_first(rows_ + g_.slots[e] * row_size_, A(1), sum(e)); }

  // Asks for the row that entry e will be added to. Inlined by force, as prefetch is.
  __attribute__((always_inline)) void prefetch_sum(int64_t e) const {
    if (rows_ && g_.put[e] == Put::kAdd) prefetch(sum(e), row_size_);
  }

  __attribute__((always_inline)) void prefetch_staged(int64_t e) const {
    prefetch(sum(e), row_size_);
    prefetch(staged(e), row_size_);
  }

 private:
  template <typename To>
  void store_first(To* row, A x, const A* d) const {
    g_.is_streamed ? stream_into(row, x, d, row_size_) : scale_into(row, x, d, row_size_);
  }
  bool is_only(int64_t e) const { return kIsNarrow<T> && g_.sum_slots[e] < 0; }
  bool is_first(int64_t e) const { return g_.put[e] == Put::kStore; }
  int64_t slot(int64_t e) const { return kIsNarrow<T> ? g_.sum_slots[e] : g_.slots[e]; }
  A* sum(int64_t e) const { return sums_ + slot(e) * row_size_; }
  A* staged(int64_t e) const { return stage_ + g_.stage_slots[e] * row_size_; }

  const Gradient& g_;
  Entries<T> entries_;
  int64_t row_size_;
  T* rows_;
  A* sums_;
  A* stage_;
};

// d = dL/dS[f]: for every field g that has entries, grad_output(f, g) * S[g, f]; zero at f itself.
template <Output kOutput, typename T, typename R>
void field_gradient(const FieldSums<T>& s, const OutputGradient<T, kOutput>& terms, const R* const* rows, int64_t f,
                    int64_t K, Sum<T>* d) {
  using Terms = OutputGradient<T, kOutput>;
  for (int64_t i = 0; i < s.num_active(); ++i) {
    const int64_t g = s.active(i);
    if (g == f) continue;
    const T* const term = terms.pair(f, g);
    const R* const column = rows[g] + f * K;
    if constexpr (kOutput == Output::kHadamard) {
      for (int64_t k = 0; k < K; ++k) d[g * K + k] = Terms::at(term, k) * (s.scale(g) * load(column + k));
    } else {
      scale_into(d + g * K, Terms::at(term, 0) * s.scale(g), column, K);
    }
  }
  for (int64_t k = 0; k < K; ++k) d[f * K + k] = 0;
}

// The same for kSum, where all fields have entries: d[r] = dL/dS[f + r] for `kFields` fields, a register at a time.
// What the last register of a K-vector has too much, the next one overwrites. See dispatch_registers.
template <int kEmbedDim, int kRest, int kFields, typename T, typename R>
void field_gradients(const FieldSums<T>& s, Sum<T> grad_output, const R* const* rows, int64_t f, int64_t F,
                     int64_t embed_dim, Sum<T>* d, int64_t stride) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const int64_t K = kEmbedDim ? kEmbedDim : embed_dim;
  const bool has_values = s.entries().has_values();
  int64_t g = 0;
  if constexpr (kFields > 1) {
    // A square of K-vectors at a time, read along the rows g and transposed.
    const auto load_pairs = [](const auto* p) { return load_first<L>(p, kFields * kEmbedDim); };
    for (; g + kFields <= F; g += kFields) {
      Vec<A, L> columns[kFields];
      for (int r = 0; r < kFields; ++r) columns[r] = load_pairs(rows[g + r] + f * K);
      transpose<kEmbedDim>(columns);
      for (int r = 0; r < kFields; ++r) {
        columns[r] *= grad_output;
        if (has_values) columns[r] *= load_pairs(s.wide_scale() + g * K);
        store<L>(d + r * stride + g * K, columns[r]);
      }
    }
  }
  for (; g < F; ++g) {
    for (int r = 0; r < kFields; ++r) {
      const R* const column = rows[g] + (f + r) * K;
      A* const to = d + r * stride + g * K;
      const A x = grad_output * s.scale(g);
      int64_t k = 0;
      for (; k + L <= K; k += L) store<L>(to + k, x * load<L>(column + k));
      if constexpr (kRest > 0) store<kRest>(to + k, x * load_first<kRest>(column + k, K - k));
    }
  }
  for (int r = 0; r < kFields; ++r) {
    for (int64_t k = 0; k < K; ++k) d[r * stride + (f + r) * K + k] = 0;
  }
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
  // dL/dS of the fields that are worked on; zero at fields that have no entry.
  A* const d = take_gradient_rows<A>(p, arena);
  const int64_t stride = gradient_stride<A>(p);
  const auto put = [&](int64_t e, A x, const A* gradient) {
    if (grad_rows) grad_rows.put(e, x, gradient);
    if (grad_values) store(grad_values + e, dot(entries.row(e), gradient, row_size));
  };
  const auto prefetch_sum = [&](int64_t e) __attribute__((always_inline)) { grad_rows.prefetch_sum(e); };
  RowsAhead<T, decltype(prefetch_sum)> ahead(p, begin, end, prefetch_sum);

  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    s.load_sample(first, last);
    ahead.at_sample(b, last - first);
    const Terms terms(p, grad, b);
    if (b == begin || !s.is_dense()) {
      for (int64_t i = 0; i < row_size; ++i) d[i] = 0;
    }
    s.with_rows([&](auto rows) {
      if constexpr (kOutput == Output::kSum) {
        if (s.is_in_order()) {
          dispatch_registers<kEmbedDim, kLanes<A>>(K, [&](auto embed_dim, auto rest) {
            constexpr int kFields = kPairsPerRegister<embed_dim(), kLanes<A>>;
            const A grad_output = Terms::at(terms.within(0), 0);
            int64_t f = 0;
            const auto put_fields = [&](auto fields) {
              field_gradients<embed_dim(), rest(), fields()>(s, grad_output, rows, f, p.num_fields, K, d, stride);
              for (int64_t r = 0; r < fields(); ++r) put(first + f + r, entries.value(first + f + r), d + r * stride);
              ahead.step(fields());
              f += fields();
            };
            while (f + kFields <= p.num_fields) put_fields(std::integral_constant<int, kFields>{});
            while (f < p.num_fields) put_fields(std::integral_constant<int, 1>{});
          });
          return;
        }
      }
      int64_t current = -1;
      for (int64_t e = first; e < last; ++e) {
        ahead.step(1);
        const int64_t f = entries.field(e, first);
        const A x = entries.value(e);
        const T* const row = entries.row(e);
        if (f != current) {
          current = f;
          field_gradient<kOutput>(s, terms, rows, f, K, d);
        }
        if (p.within_field && s.count(f) > 1) {
          const T* const term = terms.within(f);
          const A* const own_sum = s.own_sum(f);
          for (int64_t k = 0; k < K; ++k) {
            d[f * K + k] = Terms::at(term, k) * (own_sum[k] - x * load(row + f * K + k));
          }
        }
        put(e, x, d);
      }
    });
    ahead.after_sample();
  }
  fence_streams();
}

void dispatch_backward(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, void* scratch) {
  dispatch_all(p, [&](auto scalar, auto embed_dim, auto output) {
    using T = typename decltype(scalar)::type;
    backward<T, embed_dim(), output()>(p, grad, begin, end, scratch);
  });
}

void dispatch_add_staged(const Problem& p, const Gradient& grad, const int64_t* entries, int64_t n) {
  constexpr int64_t kAhead = 8;
  dispatch_dtype(p.dtype, [&](auto scalar) {
    const RowGradients<typename decltype(scalar)::type> grad_rows(p, grad);
    for (int64_t i = 0; i < n; ++i) {
      if (i + kAhead < n) grad_rows.prefetch_staged(entries[i + kAhead]);
      grad_rows.add_staged(entries[i]);
    }
  });
}

void dispatch_round_sums(const Problem& p, const Gradient& grad, const int64_t* first_entries, int64_t begin,
                         int64_t end) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    const RowGradients<typename decltype(scalar)::type> grad_rows(p, grad);
    for (int64_t s = begin; s < end; ++s) grad_rows.round(first_entries[s]);
  });
  fence_streams();
}

}  // namespace

extern const BackwardKernels backward_kernels;
const BackwardKernels backward_kernels = {field_sums_bytes, dispatch_backward, dispatch_add_staged,
                                          dispatch_round_sums};

}  // namespace ffm::FFM_ISA
