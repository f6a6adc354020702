// SPDX-License-Identifier: MIT
// The interaction and its gradient, a sample at a time.
//
// A sample is turned into its field sums S[f] (F rows of F * K), then pairs of fields are met: <S[f, g], S[g, f]>.
// Where a field has one entry, S[f] is the table's own row and x is kept beside it: nothing is copied. Where it has
// several, they are summed into scratch, which makes the cost linear in the number of entries.

#include "ffm_kernels.h"

#include <utility>

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

// The field sums of one sample.
template <typename A>
class FieldSums {
 public:
  FieldSums(const Problem& p, Arena& arena)
      : p_(p),
        table_(static_cast<const A*>(p.weight)),
        values_(static_cast<const A*>(p.values)),
        rows_(arena.take<const A*>(p.num_fields)),
        scale_(arena.take<A>(p.num_fields)),
        wide_scale_(arena.take<A>(p.row_size())),
        count_(arena.take<int64_t>(p.num_fields)),
        active_(arena.take<int64_t>(p.num_fields)),
        within_(arena.take<A>(p.row_size())),
        sums_(p.fields ? arena.take<A>(p.num_fields * p.row_size()) : nullptr) {
    if (rows_ == nullptr) return;
    for (int64_t f = 0; f < p.num_fields; ++f) count_[f] = 0;
    for (int64_t i = 0; i < p.row_size(); ++i) within_[i] = 0;
  }

  // S[f, g, :] = scale(f) * column(f, g)
  const A* row(int64_t f) const { return rows_[f]; }
  const A* const* rows() const { return rows_; }
  const A* column(int64_t f, int64_t g) const { return rows_[f] + g * p_.embed_dim; }
  A scale(int64_t f) const { return scale_[f]; }
  // scale(g) repeated K times for every g; only where is_dense().
  const A* wide_scale() const { return wide_scale_; }

  // The fields that have entries, in rising order.
  int64_t num_active() const { return num_active_; }
  int64_t active(int64_t i) const { return active_[i]; }
  bool is_dense() const { return num_active_ == p_.num_fields; }

  // How many entries field f has, and the products of its pairs, [K].
  int64_t count(int64_t f) const { return count_[f]; }
  const A* within(int64_t f) const { return within_ + f * p_.embed_dim; }

  const A* table_row(int64_t e) const { return table_ + p_.indices[e] * p_.row_size(); }
  A value(int64_t e) const { return values_ ? values_[e] : A(1); }
  int64_t field(int64_t e, int64_t begin) const { return p_.fields ? p_.fields[e] : e - begin; }

  void load(int64_t begin, int64_t end) {
    if (p_.fields) {
      load_ragged(begin, end);
    } else {
      num_active_ = p_.num_fields;
      for (int64_t f = 0; f < num_active_; ++f) {
        rows_[f] = table_row(begin + f);
        scale_[f] = value(begin + f);
        count_[f] = 1;
        active_[f] = f;
      }
    }
    if (values_ && is_dense()) {
      for (int64_t f = 0, i = 0; f < p_.num_fields; ++f) {
        for (int64_t k = 0; k < p_.embed_dim; ++k) wide_scale_[i++] = scale_[f];
      }
    }
  }

 private:
  void load_ragged(int64_t begin, int64_t end) {
    const int64_t K = p_.embed_dim, row_size = p_.row_size();
    for (int64_t i = 0; i < num_active_; ++i) count_[active_[i]] = 0;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t f = p_.fields[e];
      const A* row = table_row(e);
      const A x = value(e);
      if (count_[f]++ == 0) {
        rows_[f] = row;
        scale_[f] = x;
        continue;
      }
      A* sum = sums_ + f * row_size;
      A* within = within_ + f * K;
      if (count_[f] == 2) {
        scale_into(sum, scale_[f], rows_[f], row_size);
        rows_[f] = sum;
        scale_[f] = 1;
        for (int64_t k = 0; k < K; ++k) within[k] = 0;
      }
      // A new entry meets the sum of those before it: all pairs, and no difference of large squares.
      for (int64_t k = 0; k < K; ++k) within[k] += x * row[f * K + k] * sum[f * K + k];
      add_scaled(sum, x, row, row_size);
    }
    num_active_ = 0;
    for (int64_t f = 0; f < p_.num_fields; ++f) {
      if (count_[f] == 0) continue;
      active_[num_active_++] = f;
      if (count_[f] == 1) {
        for (int64_t k = 0; k < K; ++k) within_[f * K + k] = 0;
      }
    }
  }

  const Problem& p_;
  const A* table_;
  const A* values_;
  const A** rows_;
  A* scale_;
  A* wide_scale_;
  int64_t* count_;
  int64_t* active_;
  A* within_;
  A* sums_;
  int64_t num_active_ = 0;
};

// Calls fn(begin, end) for the entries of each sample, and asks for the rows of the next sample meanwhile: fn calls
// prefetch_next(i) once for each of its fields.
template <typename A>
class NextSample {
 public:
  NextSample(const Problem& p, int64_t end) : p_(p), table_(static_cast<const A*>(p.weight)), last_(end) {}

  void of(int64_t b) {
    begin_ = b + 1 < last_ ? p_.entries_begin(b + 1) : 0;
    end_ = b + 1 < last_ ? p_.entries_begin(b + 2) : 0;
  }
  // Asks for the next row that has not been asked for.
  void prefetch_one() {
    if (begin_ < end_) prefetch(table_ + p_.indices[begin_++] * p_.row_size(), p_.row_size());
  }
  void prefetch_rest() {
    while (begin_ < end_) prefetch_one();
  }

 private:
  const Problem& p_;
  const A* table_;
  int64_t last_;
  int64_t begin_ = 0, end_ = 0;
};

// Sum over the pairs of a sample, in registers until its end.
template <typename A, int kEmbedDim>
class PairSum {
 public:
  static constexpr int L = kLanes<A>;
  // A register holds the factors of kPairs pairs, or one pair needs one or more registers.
  static constexpr bool kJoin = kEmbedDim > 0 && kEmbedDim < L;
  static constexpr int kPairs = kJoin ? L / kEmbedDim : 1;
  static constexpr int W = kJoin ? kEmbedDim : L;

  // The pairs of field active(i) with all later ones.
  template <bool kScaled>
  void add_row(const FieldSums<A>& s, int64_t i, int64_t embed_dim) {
    const int64_t K = kEmbedDim ? kEmbedDim : embed_dim;
    const int64_t m = s.num_active(), f = s.active(i), column = f * K;
    const A* left = s.row(f);
    const A scale = kScaled ? s.scale(f) : A(1);
    int64_t j = i + 1;
    if constexpr (kJoin) {
      if (s.is_dense()) {
        int parity = 0;
        for (; j + kPairs <= m; j += kPairs, parity ^= 1) {
          Vec<A, L> right = load_column<kEmbedDim, kPairs>(s.rows() + j, column);
          if (kScaled) right *= scale * load<L>(s.wide_scale() + j * K);
          wide_[parity] += load<L>(left + j * K) * right;
        }
      }
    }
    for (; j < m; ++j) {
      const int64_t g = s.active(j);
      const A* a = left + g * K;
      const A* b = s.row(g) + column;
      const A x = kScaled ? scale * s.scale(g) : A(1);
      int64_t k = 0;
      for (; k + W <= K; k += W) {
        Vec<A, W> product = load<W>(a + k) * load<W>(b + k);
        if (kScaled) product *= x;
        if constexpr (kJoin) {
          narrow_ += product;
        } else {
          wide_[(k / W) & 1] += product;
        }
      }
      for (; k < K; ++k) rest_ += x * a[k] * b[k];
    }
  }

  A total() const {
    A result = sum<A, L>(wide_[0] + wide_[1]) + rest_;
    if constexpr (kJoin) result += sum<A, W>(narrow_);
    return result;
  }

 private:
  Vec<A, L> wide_[2] = {};
  Vec<A, W> narrow_ = {};
  A rest_ = 0;
};

template <typename A, int kEmbedDim, Output kOutput>
void forward(const Problem& p, A* out, int64_t begin, int64_t end, void* scratch) {
  const int64_t F = p.num_fields, K = kEmbedDim ? kEmbedDim : p.embed_dim;
  const int64_t P = F * (F - 1) / 2, num_terms = P + (p.within_field ? F : 0);
  Arena arena(scratch);
  FieldSums<A> s(p, arena);
  NextSample<A> next(p, end);
  for (int64_t b = begin; b < end; ++b) {
    s.load(p.entries_begin(b), p.entries_begin(b + 1));
    next.of(b);
    if constexpr (kOutput == Output::kSum) {
      PairSum<A, kEmbedDim> pairs;
      for (int64_t i = 0; i < s.num_active(); ++i) {
        next.prefetch_one();
        if (p.values) {
          pairs.template add_row<true>(s, i, K);
        } else {
          pairs.template add_row<false>(s, i, K);
        }
      }
      A y = pairs.total();
      if (p.within_field) {
        for (int64_t i = 0; i < s.num_active(); ++i) {
          for (int64_t k = 0; k < K; ++k) y += s.within(s.active(i))[k];
        }
      }
      out[b] = y;
    } else {
      constexpr bool kDot = kOutput == Output::kDot;
      const int64_t width = kDot ? 1 : K;
      A* terms = out + b * num_terms * width;
      if (!s.is_dense()) {
        for (int64_t i = 0; i < num_terms * width; ++i) terms[i] = 0;
      }
      for (int64_t i = 0; i < s.num_active(); ++i) {
        next.prefetch_one();
        const int64_t f = s.active(i);
        for (int64_t j = i + 1; j < s.num_active(); ++j) {
          const int64_t g = s.active(j);
          const A x = s.scale(f) * s.scale(g);
          const A* a = s.column(f, g);
          const A* c = s.column(g, f);
          A* term = terms + pair_index(f, g, F) * width;
          if constexpr (kDot) {
            A d = 0;
            for (int64_t k = 0; k < K; ++k) d += a[k] * c[k];
            *term = x * d;
          } else {
            for (int64_t k = 0; k < K; ++k) term[k] = x * (a[k] * c[k]);
          }
        }
        if (p.within_field) {
          A* term = terms + (P + f) * width;
          if constexpr (kDot) {
            A d = 0;
            for (int64_t k = 0; k < K; ++k) d += s.within(f)[k];
            *term = d;
          } else {
            for (int64_t k = 0; k < K; ++k) term[k] = s.within(f)[k];
          }
        }
      }
    }
    next.prefetch_rest();
  }
}

// The gradient of a sample's output, read as that of any pair or field.
template <typename A, Output kOutput>
struct OutputGradient {
  const A* terms;
  int64_t F, K;

  OutputGradient(const Problem& p, const Gradient& g, int64_t b) : F(p.num_fields), K(p.embed_dim) {
    const int64_t num_terms = F * (F - 1) / 2 + (p.within_field ? F : 0);
    const int64_t width = kOutput == Output::kSum ? 1 : num_terms * (kOutput == Output::kDot ? 1 : K);
    terms = static_cast<const A*>(g.grad_output) + b * width;
  }

  // Of the term: [K] for kHadamard, else one number for all k.
  const A* pair(int64_t f, int64_t g) const { return term(f < g ? pair_index(f, g, F) : pair_index(g, f, F)); }
  const A* within(int64_t f) const { return term(F * (F - 1) / 2 + f); }

 private:
  const A* term(int64_t t) const {
    if constexpr (kOutput == Output::kSum) return terms;
    return terms + (kOutput == Output::kDot ? t : t * K);
  }
};

template <typename A, int kEmbedDim, Output kOutput>
void backward(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, void* scratch) {
  const int64_t K = kEmbedDim ? kEmbedDim : p.embed_dim, row_size = p.num_fields * K;
  A* const grad_rows = static_cast<A*>(grad.grad_rows);
  A* const grad_values = static_cast<A*>(grad.grad_values);
  A* const staged = static_cast<A*>(grad.staged);
  Arena arena(scratch);
  FieldSums<A> s(p, arena);
  // dS[f], the gradient of the field sum that the current entries belong to; zero at fields that have no entry.
  A* const d = arena.take<A>(row_size);
  NextSample<A> next(p, end);

  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    s.load(first, last);
    next.of(b);
    const OutputGradient<A, kOutput> go(p, grad, b);
    if (b == begin || !s.is_dense()) {
      for (int64_t i = 0; i < row_size; ++i) d[i] = 0;
    }
    int64_t current = -1;
    for (int64_t e = first; e < last; ++e) {
      next.prefetch_one();
      const int64_t f = s.field(e, first);
      const A x = s.value(e);
      const A* row = s.table_row(e);
      if (f != current) {
        current = f;
        for (int64_t i = 0; i < s.num_active(); ++i) {
          const int64_t g = s.active(i);
          if (g == f) continue;
          const A* column = s.column(g, f);
          const A* g_out = go.pair(f, g);
          for (int64_t k = 0; k < K; ++k) {
            d[g * K + k] = (kOutput == Output::kHadamard ? g_out[k] : *g_out) * (s.scale(g) * column[k]);
          }
        }
        for (int64_t k = 0; k < K; ++k) d[f * K + k] = 0;
      }
      if (p.within_field && s.count(f) > 1) {
        const A* own_sum = s.column(f, f);
        const A* g_out = go.within(f);
        for (int64_t k = 0; k < K; ++k) {
          d[f * K + k] = (kOutput == Output::kHadamard ? g_out[k] : *g_out) * (own_sum[k] - x * row[f * K + k]);
        }
      }
      if (grad_rows) {
        A* const target = grad_rows + grad.slots[e] * row_size;
        if (grad.is_first && grad.is_first[e]) {
          scale_into(target, x, d, row_size);
        } else if (staged) {
          scale_into(staged + (e - grad.staged_begin) * row_size, x, d, row_size);
        } else {
          add_scaled(target, x, d, row_size);
        }
      }
      if (grad_values) grad_values[e] = dot(row, d, row_size);
    }
    next.prefetch_rest();
  }
}

template <typename A>
void add_staged(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const int64_t row_size = p.row_size();
  A* const grad_rows = static_cast<A*>(grad.grad_rows);
  const A* const staged = static_cast<const A*>(grad.staged);
  for (int64_t e = begin; e < end; ++e) {
    const int64_t slot = grad.slots[e];
    if (slot % parts != part || (grad.is_first && grad.is_first[e])) continue;
    add_scaled(grad_rows + slot * row_size, A(1), staged + (e - grad.staged_begin) * row_size, row_size);
  }
}

template <typename A>
void gather_sum(const Problem& p, A* out, int64_t begin, int64_t end) {
  constexpr int L = kLanes<A>;
  const int64_t row_size = p.row_size();
  NextSample<A> next(p, end);
  for (int64_t b = begin; b < end; ++b) {
    next.of(b);
    Vec<A, L> wide[2] = {};
    A rest = 0;
    for (int64_t e = p.entries_begin(b); e < p.entries_begin(b + 1); ++e) {
      next.prefetch_one();
      const A* row = static_cast<const A*>(p.weight) + p.indices[e] * row_size;
      int64_t i = 0;
      for (; i + 2 * L <= row_size; i += 2 * L) {
        wide[0] += load<L>(row + i);
        wide[1] += load<L>(row + i + L);
      }
      for (; i + L <= row_size; i += L) wide[0] += load<L>(row + i);
      for (; i < row_size; ++i) rest += row[i];
    }
    out[b] = sum<A, L>(wide[0] + wide[1]) + rest;
  }
}

size_t dispatch_scratch_bytes(const Problem& p) {
  size_t bytes = 0;
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using A = typename decltype(scalar)::sum_t;
    Arena arena(nullptr);
    FieldSums<A> s(p, arena);
    arena.take<A>(p.row_size());
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
    using A = typename decltype(scalar)::sum_t;
    forward<A, embed_dim(), output()>(p, static_cast<A*>(out), begin, end, scratch);
  });
}

void dispatch_backward(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, void* scratch) {
  dispatch_all(p, [&](auto scalar, auto embed_dim, auto output) {
    using A = typename decltype(scalar)::sum_t;
    backward<A, embed_dim(), output()>(p, grad, begin, end, scratch);
  });
}

void dispatch_add_staged(const Problem& p, const Gradient& grad, int64_t begin, int64_t end, int64_t part,
                         int64_t parts) {
  dispatch_dtype(p.dtype,
                 [&](auto scalar) { add_staged<typename decltype(scalar)::sum_t>(p, grad, begin, end, part, parts); });
}

void dispatch_gather_sum(const Problem& p, void* out, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using A = typename decltype(scalar)::sum_t;
    gather_sum<A>(p, static_cast<A*>(out), begin, end);
  });
}

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels = {dispatch_scratch_bytes, dispatch_forward, dispatch_backward, dispatch_add_staged,
                            dispatch_gather_sum};

}  // namespace ffm::FFM_ISA
