// SPDX-License-Identifier: MIT
// The interaction and its gradient, a sample at a time.
//
// A sample is turned into its field sums S[f] (F rows of F * K), then pairs of fields are met: <S[f, g], S[g, f]>.
// Where a field has one entry, S[f] is the table's own row and x is kept beside it: nothing is copied. Where it has
// several, they are summed into scratch, which makes the cost linear in the number of entries.

#include "ffm_kernels.h"

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../dispatch.h"

namespace ffm::FFM_ISA {
namespace {

#include "vec.h"

// A view of scratch memory that hands out aligned pieces; without memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}

  template <typename U>
  U* take(int64_t n) {
    char* piece = base_ + used_;
    used_ += (static_cast<size_t>(n) * sizeof(U) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return base_ ? reinterpret_cast<U*>(piece) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Where the pair (f, g), f < g, stands among all pairs.
inline int64_t pair_index(int64_t f, int64_t g, int64_t F) { return f * (2 * F - f - 1) / 2 + g - f - 1; }

// The entries of a batch and the table's rows that they name.
template <typename T>
class Entries {
 public:
  explicit Entries(const Problem& p)
      : p_(p), table_(static_cast<const T*>(p.weight)), values_(static_cast<const T*>(p.values)) {}

  const T* row(int64_t e) const { return table_ + p_.indices[e] * p_.row_size(); }
  Sum<T> value(int64_t e) const { return values_ ? load(values_ + e) : Sum<T>(1); }
  // Of an entry of the sample that starts at `begin`.
  int64_t field(int64_t e, int64_t begin) const { return p_.fields ? p_.fields[e] : e - begin; }
  bool has_values() const { return values_ != nullptr; }

 private:
  const Problem& p_;
  const T* table_;
  const T* values_;
};

// The field sums of one sample: S[f, g, :] = scale(f) * row(f)[g * K + :].
template <typename T>
class FieldSums {
 public:
  using A = Sum<T>;

  FieldSums(const Problem& p, Arena& arena)
      : p_(p),
        entries_(p),
        table_rows_(arena.take<const T*>(p.num_fields)),
        sum_rows_(arena.take<const A*>(p.num_fields)),
        scale_(arena.take<A>(p.num_fields)),
        wide_scale_(arena.take<A>(p.row_size())),
        count_(arena.take<int64_t>(p.num_fields)),
        active_(arena.take<int64_t>(p.num_fields)),
        within_(arena.take<A>(p.row_size())),
        sums_(p.fields ? arena.take<A>(p.num_fields * p.row_size()) : nullptr) {
    if (table_rows_ == nullptr) return;
    for (int64_t f = 0; f < p.num_fields; ++f) count_[f] = 0;
    for (int64_t i = 0; i < p.row_size(); ++i) within_[i] = 0;
  }

  const Entries<T>& entries() const { return entries_; }

  // Calls fn(rows) with the F rows, those of the table where every field has one entry at most and nothing was summed.
  template <typename Fn>
  void with_rows(Fn&& fn) const {
    if constexpr (kIsNarrow<T>) {
      if (!is_summed_) return fn(table_rows_);
    }
    fn(sum_rows_);
  }

  A scale(int64_t f) const { return scale_[f]; }
  // scale(g) repeated K times for every g; only where is_dense() and the batch has values.
  const A* wide_scale() const { return wide_scale_; }

  // The fields that have entries, in rising order.
  int64_t num_active() const { return num_active_; }
  int64_t active(int64_t i) const { return active_[i]; }
  bool is_dense() const { return num_active_ == p_.num_fields; }

  // How many entries field f has, its own sum S[f, f, :] where they are several, and the products of their pairs, [K].
  int64_t count(int64_t f) const { return count_[f]; }
  const A* own_sum(int64_t f) const { return sum_rows_[f] + f * p_.embed_dim; }
  const A* within(int64_t f) const { return within_ + f * p_.embed_dim; }

  void load_sample(int64_t begin, int64_t end) {
    if (p_.fields) {
      load_ragged(begin, end);
    } else {
      num_active_ = p_.num_fields;
      for (int64_t f = 0; f < num_active_; ++f) {
        set_row(f, begin + f);
        count_[f] = 1;
        active_[f] = f;
      }
    }
    if (entries_.has_values() && is_dense()) {
      for (int64_t f = 0, i = 0; f < p_.num_fields; ++f) {
        for (int64_t k = 0; k < p_.embed_dim; ++k) wide_scale_[i++] = scale_[f];
      }
    }
  }

 private:
  void set_row(int64_t f, int64_t e) {
    table_rows_[f] = entries_.row(e);
    if constexpr (!kIsNarrow<T>) sum_rows_[f] = table_rows_[f];
    scale_[f] = entries_.value(e);
  }

  // S[f] = x * the table's row, in scratch.
  void start_sum(int64_t f) {
    A* const sum = sums_ + f * p_.row_size();
    scale_into(sum, scale_[f], table_rows_[f], p_.row_size());
    sum_rows_[f] = sum;
    scale_[f] = 1;
  }

  void load_ragged(int64_t begin, int64_t end) {
    const int64_t K = p_.embed_dim, row_size = p_.row_size();
    for (int64_t i = 0; i < num_active_; ++i) count_[active_[i]] = 0;
    is_summed_ = false;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t f = p_.fields[e];
      if (count_[f]++ == 0) {
        set_row(f, e);
        continue;
      }
      is_summed_ = true;
      A* const sum = sums_ + f * row_size;
      A* const within = within_ + f * K;
      if (count_[f] == 2) {
        start_sum(f);
        for (int64_t k = 0; k < K; ++k) within[k] = 0;
      }
      // A new entry meets the sum of those before it: all pairs, and no difference of large squares.
      const T* const row = entries_.row(e);
      const A x = entries_.value(e);
      for (int64_t k = 0; k < K; ++k) within[k] += x * load(row + f * K + k) * sum[f * K + k];
      add_scaled(sum, x, row, row_size);
    }
    num_active_ = 0;
    for (int64_t f = 0; f < p_.num_fields; ++f) {
      if (count_[f] == 0) continue;
      active_[num_active_++] = f;
      if (count_[f] > 1) continue;
      for (int64_t k = 0; k < K; ++k) within_[f * K + k] = 0;
      if (kIsNarrow<T> && is_summed_) start_sum(f);
    }
  }

  const Problem& p_;
  Entries<T> entries_;
  const T** table_rows_;
  const A** sum_rows_;
  A* scale_;
  A* wide_scale_;
  int64_t* count_;
  int64_t* active_;
  A* within_;
  A* sums_;
  int64_t num_active_ = 0;
  bool is_summed_ = false;
};

// Asks for the rows of the next sample while this one is worked on, a row at a time.
template <typename T>
class NextSample {
 public:
  NextSample(const Problem& p, int64_t end) : p_(p), entries_(p), last_(end) {}

  void after(int64_t b) {
    begin_ = b + 1 < last_ ? p_.entries_begin(b + 1) : 0;
    end_ = b + 1 < last_ ? p_.entries_begin(b + 2) : 0;
  }
  void prefetch_one() {
    if (begin_ < end_) prefetch(entries_.row(begin_++), p_.row_size());
  }
  void prefetch_rest() {
    while (begin_ < end_) prefetch_one();
  }

 private:
  const Problem& p_;
  Entries<T> entries_;
  int64_t last_;
  int64_t begin_ = 0, end_ = 0;
};

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
        row_size_(p.row_size()),
        rows_(static_cast<T*>(g.grad_rows)),
        sums_(static_cast<A*>(kIsNarrow<T> ? g.sums : g.grad_rows)),
        staged_(static_cast<A*>(g.staged)) {}

  explicit operator bool() const { return rows_ != nullptr; }

  // Entry e contributes x * d.
  void put(int64_t e, A x, const A* d) const {
    if (is_only(e)) return scale_into(rows_ + g_.slots[e] * row_size_, x, d, row_size_);
    if (is_first(e)) return scale_into(sum(e), x, d, row_size_);
    if (staged_) return scale_into(staged(e), x, d, row_size_);
    add_scaled(sum(e), x, d, row_size_);
  }
  // The second half of a put() that was staged, by the owner of the row: the part that its slot is congruent to.
  void add_staged(int64_t e, int64_t part, int64_t parts) const {
    if (is_only(e) || is_first(e) || slot(e) % parts != part) return;
    add_scaled(sum(e), A(1), staged(e), row_size_);
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
  int64_t row_size_;
  T* rows_;
  A* sums_;
  A* staged_;
};

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
          for (int64_t i = 0; i < s.num_active(); ++i) {
            const int64_t g = s.active(i);
            if (g == f) continue;
            const T* const term = terms.pair(f, g);
            const auto* const column = rows[g] + f * K;
            for (int64_t k = 0; k < K; ++k) d[g * K + k] = Terms::at(term, k) * (s.scale(g) * load(column + k));
          }
          for (int64_t k = 0; k < K; ++k) d[f * K + k] = 0;
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

// From a Problem to the instance that solves it.

size_t dispatch_scratch_bytes(const Problem& p) {
  size_t bytes = 0;
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    Arena arena(nullptr);
    FieldSums<T> s(p, arena);
    arena.take<Sum<T>>(p.row_size());
    bytes = arena.used();
  });
  return bytes;
}

template <typename Fn>
void dispatch_all(const Problem& p, Fn&& fn) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    dispatch_embed_dim(p.embed_dim, [&](auto embed_dim) {
      dispatch_output(p.output, [&](auto output) { fn(scalar, embed_dim, output); });
    });
  });
}

void dispatch_forward(const Problem& p, void* out, int64_t begin, int64_t end, void* scratch) {
  dispatch_all(p, [&](auto scalar, auto embed_dim, auto output) {
    using T = typename decltype(scalar)::type;
    forward<T, embed_dim(), output()>(p, static_cast<T*>(out), begin, end, scratch);
  });
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

void dispatch_gather_sum(const Problem& p, void* out, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    gather_sum<T>(p, static_cast<T*>(out), begin, end);
  });
}

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels = {dispatch_scratch_bytes, dispatch_forward,    dispatch_backward,
                            dispatch_add_staged,    dispatch_round_sums, dispatch_gather_sum};

}  // namespace ffm::FFM_ISA
