// SPDX-License-Identifier: MIT
// The gradient of the interaction, a sample at a time (see field_sums.h): for an entry of field f,
//   d[g] = dL/dS[f, g] = grad_output(f, g) * S[g, f],   grad_row = x * d,   grad_x = <row, d>.

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <utility>

#include "../dispatch.h"
#include "../optimizer.h"
#include "ffm_kernels.h"
#include "intrinsics.h"

namespace ffm::FFM_ISA {
namespace {

#include "vec.h"
// after vec.h, which they use
#include "field_gradients.h"
#include "field_sums.h"
#include "update_rules.h"

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
        sums_(static_cast<A*>(g.sum_slots ? g.sums : g.grad_rows)),
        stage_(static_cast<A*>(g.stage)),
        indices_(p.indices),
        update_row_(g.update ? choose_update<T>(g.update->optimizer.kind) : nullptr) {}

  explicit operator bool() const { return g_.put != nullptr; }

  // Entry e contributes x * d. What is staged is d alone: multiplied and added in one step either way, a sum has the
  // same bits whether or not it was staged.
  void put(int64_t e, A x, const A* d) const {
    if (is_only(e)) return finish(e, x, d);
    if (is_first(e)) return g_.sum_slots ? scale_into(sum(e), x, d, row_size_) : store_first(sum(e), x, d);
    if (g_.put[e] == Put::kStage) return scale_into(staged(e), A(1), d, row_size_);
    add_scaled(sum(e), x, d, row_size_);
  }
  // The second half of a put() that was staged.
  void add_staged(int64_t e) const { add_scaled(sum(e), entries_.value(e), staged(e), row_size_); }
  // What becomes of the sum that begins with entry e.
  void finish_sum(int64_t e) const { finish(e, A(1), sum(e)); }

  // The sum that put(e) will add to or begin, and the row of the gradient that it will store by itself; null where it
  // does neither, or past the caches.
  const A* sum_to_ask(int64_t e) const {
    const bool is_asked = g_.put[e] == Put::kAdd || (is_first(e) && (g_.sum_slots || !g_.is_streamed));
    return is_asked && !is_only(e) ? sum(e) : nullptr;
  }
  const T* row_to_ask(int64_t e) const { return is_only(e) && stores_row() && !g_.is_streamed ? row(e) : nullptr; }
  // Whether there are such rows beside sums.
  bool asks_rows() const { return g_.sum_slots && stores_row() && !g_.is_streamed; }

  // Asks for both. Inlined by force, as prefetch is.
  __attribute__((always_inline)) void prefetch_put(int64_t e) const {
    if (!g_.put) return;
    if (const A* const sum = sum_to_ask(e)) prefetch(sum, row_size_);
    if (const T* const row = row_to_ask(e)) prefetch(row, row_size_);
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
  // The gradient of e's row is x * d.
  void finish(int64_t e, A x, const A* d) const {
    if (stores_row()) return store_first(row(e), x, d);
    update_row_(g_.update->table, g_.update->optimizer, indices_[e], x, d, 0, row_size_);
  }
  bool is_only(int64_t e) const { return g_.sum_slots && g_.sum_slots[e] < 0; }
  bool is_first(int64_t e) const { return g_.put[e] == Put::kStore; }
  int64_t slot(int64_t e) const { return g_.sum_slots ? g_.sum_slots[e] : g_.slots[e]; }
  bool stores_row() const { return update_row_ == nullptr; }
  T* row(int64_t e) const { return rows_ + g_.slots[e] * row_size_; }
  A* sum(int64_t e) const { return sums_ + slot(e) * row_size_; }
  A* staged(int64_t e) const { return stage_ + g_.stage_slots[e] * row_size_; }

  const Gradient& g_;
  Entries<T> entries_;
  int64_t row_size_;
  T* rows_;
  A* sums_;
  A* stage_;
  Ids indices_;
  UpdateRow<T> update_row_;
};

// Rows of the gradient, asked for with those of the table (see rows_ahead.h) and, where most entries need one, by place
// as they are: the row of an entry whose column is worked on is stored column by column.
template <typename T, typename Rows>
class GradientsAhead {
 public:
  using A = Sum<T>;

  // none: as many numbers as a row has, asked for where an entry needs no row.
  GradientsAhead(const Problem& p, Arena& arena, Rows& rows, const RowGradients<T>& gradients, bool is_by_place,
                 const A* none, int64_t end, Range fields)
      : p_(p),
        rows_(rows),
        gradients_(gradients),
        none_(none),
        end_(end),
        fields_(fields),
        is_by_place_(is_by_place && gradients),
        asks_rows_(gradients && gradients.asks_rows()),
        sum_places_(p, arena, 0, p.row_size()),
        row_places_(p, arena, 0, p.row_size()) {}

  // Sample b is next. Whether this is to be told of its places; `rows` asks for the table's alone.
  bool at_sample(int64_t b) {
    const int64_t later = b + rows_.distance();
    has_later_ = rows_.is_by_place() && later < end_;
    if (!has_later_) return false;
    first_ = p_.entries_begin(later);
    if (!is_by_place_) return false;
    for (int64_t f = fields_.begin; f < fields_.end; ++f) {
      const A* const sum = gradients_.sum_to_ask(first_ + f);
      sum_places_.set_row(f, sum ? sum : none_);
      if (!asks_rows_) continue;
      const T* const row = gradients_.row_to_ask(first_ + f);
      row_places_.set_row(f, row ? row : reinterpret_cast<const T*>(none_));
    }
    return true;
  }
  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_square(int64_t f, int64_t g, int64_t embed_dim) {
    rows_.template ask_square<kEmbedDim, kFields>(f, g, embed_dim);
    ask_gradients<kEmbedDim, kFields, false, kFields>(f, g, embed_dim);
  }
  template <int kEmbedDim, int kFields, bool kAlways = false, int kRows = kFields>
  __attribute__((always_inline)) void ask_vectors(int64_t g, int64_t f, int64_t embed_dim) const {
    rows_.template ask_vectors<kEmbedDim, kFields, kAlways, kRows>(g, f, embed_dim);
    ask_gradients<kEmbedDim, kRows, kAlways, kFields>(f, g, embed_dim);
  }
  // Field f is done.
  __attribute__((always_inline)) void pass_field(int64_t f) const {
    if (has_later_ && !is_by_place_) gradients_.prefetch_put(first_ + f);
    rows_.pass_field(f);
  }

 private:
  template <int kEmbedDim, int kFields, bool kAlways, int kRows>
  __attribute__((always_inline)) void ask_gradients(int64_t f, int64_t g, int64_t embed_dim) const {
    sum_places_.template ask_vectors<kEmbedDim, kFields, kAlways, kRows>(f, g, embed_dim);
    if constexpr (kIsNarrow<T>) {
      if (asks_rows_) row_places_.template ask_vectors<kEmbedDim, kFields, kAlways, kRows>(f, g, embed_dim);
    }
  }

  const Problem& p_;
  Rows& rows_;
  const RowGradients<T>& gradients_;
  const A* none_;
  int64_t end_;
  const Range fields_;
  bool is_by_place_, asks_rows_, has_later_ = false;
  Places<A> sum_places_;
  Places<T> row_places_;
  int64_t first_ = 0;  // the first entry of the sample that is asked for
};

template <typename T, int kEmbedDim, Output kOutput>
void backward(const Problem& p, const Gradient& grad, Range samples, Range fields, void* scratch) {
  using A = Sum<T>;
  using Terms = OutputGradient<T, kOutput>;
  const int64_t K = kEmbedDim ? kEmbedDim : p.embed_dim, row_size = p.num_fields * K;
  const RowGradients<T> grad_rows(p, grad);
  T* const grad_values = static_cast<T*>(grad.grad_values);
  Arena arena(scratch);
  FieldSums<T> s(p, arena);
  const Entries<T>& entries = s.entries();
  // dL/dS of the fields that are worked on; zero at fields that have no entry.
  // With an update those of all fields are made before the first row moves.
  const bool keeps_all = grad.update != nullptr;
  A* const d = take_gradient_rows<A>(p, arena, gradient_rows(p, keeps_all));
  const int64_t stride = gradient_stride<A>(p);
  const auto put = [&](int64_t e, A x, const A* gradient) {
    if (grad_values) store(grad_values + e, dot(entries.row(e), gradient, row_size));
    if (grad_rows) grad_rows.put(e, x, gradient);
  };
  const auto prefetch_put = [&](int64_t e) __attribute__((always_inline)) { grad_rows.prefetch_put(e); };
  RowsAhead<T, decltype(prefetch_put)> ahead(p, arena, kAskFor<kOutput>, samples, fields, prefetch_put);
  GradientsAhead<T, decltype(ahead)> gradients_ahead(p, arena, ahead, grad_rows, grad.most_are_asked, d, samples.end,
                                                     fields);

  for (int64_t b = samples.begin; b < samples.end; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    s.load_sample(first, last);
    ahead.at_sample(b, p.fields ? last - first : fields.end - fields.begin);
    const bool asks_gradients = gradients_ahead.at_sample(b);
    const Terms terms(p, grad, b);
    if (b == samples.begin || !s.is_dense()) {
      for (int64_t f = 0; f < (keeps_all ? p.num_fields : 1); ++f) {
        for (int64_t i = 0; i < row_size; ++i) d[f * stride + i] = 0;
      }
    }
    s.with_rows([&](auto rows) {
      if constexpr (kOutput == Output::kSum) {
        if (s.is_in_order()) {
          const auto put_field = [&](int64_t f, const A* gradient) {
            put(first + f, entries.value(first + f), gradient);
          };
          dispatch_registers<kEmbedDim, kLanes<A>>(K, [&](auto embed_dim, auto rest) {
            constexpr int kFields = kFieldsTogether<A, embed_dim()>;
            const A grad_output = Terms::at(terms.within(0), 0);
            int64_t f = fields.begin;
            const auto work_on = [&](auto fields_at_once) {
              A* const d_fields = d + (keeps_all ? f * stride : 0);
              const auto make = [&](auto& asks) {
                field_gradients<embed_dim(), rest(), fields_at_once()>(s, grad_output, rows, f, p.num_fields, K,
                                                                       d_fields, stride, asks);
              };
              asks_gradients ? make(gradients_ahead) : make(ahead);
              for (int64_t r = 0; r < fields_at_once() && !keeps_all; ++r) put_field(f + r, d_fields + r * stride);
              for (int r = 0; r < fields_at_once(); ++r) gradients_ahead.pass_field(f + r);
              ahead.step(fields_at_once());
              f += fields_at_once();
            };
            while (f + kFields <= fields.end) work_on(std::integral_constant<int, kFields>{});
            while (f < fields.end) work_on(std::integral_constant<int, 1>{});
          });
          for (int64_t f = 0; f < p.num_fields && keeps_all; ++f) put_field(f, d + f * stride);
          return;
        }
      }
      if (keeps_all) {
        for (int64_t i = 0; i < s.num_active(); ++i) {
          field_gradient<kOutput>(s, terms, rows, s.active(i), K, d + s.active(i) * stride);
        }
      }
      int64_t current = -1;
      for (int64_t e = first; e < last; ++e) {
        const int64_t f = entries.field(e, first);
        if (f < fields.begin || f >= fields.end) continue;
        ahead.step(1);
        const A x = entries.value(e);
        const T* const row = entries.row(e);
        A* const d_field = d + (keeps_all ? f * stride : 0);
        if (f != current && !keeps_all) field_gradient<kOutput>(s, terms, rows, f, K, d);
        current = f;
        if (p.within_field && s.count(f) > 1) {
          const T* const term = terms.within(f);
          const A* const own_sum = s.own_sum(f);
          for (int64_t k = 0; k < K; ++k) {
            d_field[f * K + k] = Terms::at(term, k) * (own_sum[k] - x * load(row + f * K + k));
          }
        }
        put(e, x, d_field);
      }
    });
    ahead.after_sample();
  }
  fence_streams();
}

template <typename T>
size_t backward_bytes(const Problem& p, bool updates) {
  return field_sums_bytes<T>(p, gradient_rows(p, updates)) + 3 * Places<T>::bytes(p);
}

template <typename T>
void dispatch_backward(const Problem& p, const Gradient& grad, Range samples, Range fields, void* scratch) {
  dispatch_constants(
      p, [&](auto embed_dim, auto output) { backward<T, embed_dim(), output()>(p, grad, samples, fields, scratch); });
}

template <typename T>
void add_staged(const Problem& p, const Gradient& grad, const int64_t* entries, int64_t n) {
  constexpr int64_t kAhead = 8;
  const RowGradients<T> grad_rows(p, grad);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) grad_rows.prefetch_staged(entries[i + kAhead]);
    grad_rows.add_staged(entries[i]);
  }
}

template <typename T>
void finish_sums(const Problem& p, const Gradient& grad, const int64_t* first_entries, int64_t begin, int64_t end) {
  const RowGradients<T> grad_rows(p, grad);
  for (int64_t s = begin; s < end; ++s) grad_rows.finish_sum(first_entries[s]);
  fence_streams();
}

}  // namespace

template <typename T>
const BackwardKernels& backward_kernels() {
  static constexpr BackwardKernels kKernels = {backward_bytes<T>, dispatch_backward<T>, add_staged<T>, finish_sums<T>};
  return kKernels;
}
template const BackwardKernels& backward_kernels<FFM_DTYPE>();

}  // namespace ffm::FFM_ISA
