// SPDX-License-Identifier: MIT
// What forward and backward kernels share: the field sums of a sample. Included like vec.h, inside the namespace of an
// ISA.
//
// A sample is turned into its field sums S[f] (F rows of F * K); then pairs of fields are met: <S[f, g], S[g, f]>.
// Where a field has one entry, S[f] is the table's own row and x is kept beside it: nothing is copied. Where it has
// several, they are summed into scratch, which makes the cost linear in the number of entries.
#pragma once

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
        sums_(p.fields ? arena.take<A>(p.num_fields * sum_stride()) : nullptr) {
    if (table_rows_ == nullptr) return;
    // Without a list of fields, samples differ in their rows alone.
    is_in_order_ = !p.fields;
    num_active_ = p.fields ? 0 : p.num_fields;
    for (int64_t f = 0; f < p.num_fields; ++f) {
      count_[f] = p.fields ? 0 : 1;
      active_[f] = f;
    }
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
  // The same for a batch that has none.
  const A* wide_ones() {
    std::fill_n(wide_scale_, p_.row_size(), A(1));
    return wide_scale_;
  }

  // The fields that have entries, in rising order.
  int64_t num_active() const { return num_active_; }
  int64_t active(int64_t i) const { return active_[i]; }
  bool is_dense() const { return num_active_ == p_.num_fields; }
  // Whether every field has one entry, and the entries come in the order of the fields.
  bool is_in_order() const { return is_in_order_; }

  // Whether a field has several entries.
  bool is_summed() const { return is_summed_; }
  // How many entries field f has; where they are several, its own sum S[f, f, :] and the products of their pairs, [K].
  int64_t count(int64_t f) const { return count_[f]; }
  const A* own_sum(int64_t f) const { return sum_rows_[f] + f * p_.embed_dim; }
  const A* within(int64_t f) const { return within_ + f * p_.embed_dim; }
  // The sum of those products: 0 where a field has one entry.
  A sum_within(int64_t f) const {
    A sum = 0;
    for (int64_t k = 0; count_[f] > 1 && k < p_.embed_dim; ++k) sum += within(f)[k];
    return sum;
  }

  void load_sample(int64_t begin, int64_t end) {
    if (p_.fields) {
      load_ragged(begin, end);
    } else {
      for (int64_t f = 0; f < p_.num_fields; ++f) set_row(f, begin + f);
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

  // Sums lie in scratch, as whole registers.
  int64_t sum_stride() const { return (p_.row_size() + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

  // The registers [i / L, i / L + R) of sum += x * row for the entries [begin, end), the last one filled up with zeros.
  template <int R>
  void add_columns(A* sum, int64_t i, int64_t begin, int64_t end) const {
    constexpr int L = kLanes<A>;
    const int64_t last = p_.row_size() - i - (R - 1) * L;
    Vec<A, L> columns[R];
    for (int r = 0; r < R; ++r) columns[r] = load<L>(sum + i + r * L);
    for (int64_t e = begin; e < end; ++e) {
      const T* const row = entries_.row(e) + i;
      const A x = entries_.value(e);
      for (int r = 0; r + 1 < R; ++r) columns[r] += x * load<L>(row + r * L);
      const T* const rest = row + (R - 1) * L;
      columns[R - 1] += x * (last >= L ? load<L>(rest) : load_first<L>(rest, last));
    }
    for (int r = 0; r < R; ++r) store<L>(sum + i + r * L, columns[r]);
  }

  // sum += x * row for entries that follow each other: a few registers at a time, for all of them.
  void add_rows(A* sum, int64_t begin, int64_t end) const {
    constexpr int L = kLanes<A>;
    const int64_t n = p_.row_size();
    for (int64_t i = 0; i < n; i += 4 * L) {
      if (i + 3 * L < n) {
        add_columns<4>(sum, i, begin, end);
      } else if (i + 2 * L < n) {
        add_columns<3>(sum, i, begin, end);
      } else if (i + L < n) {
        add_columns<2>(sum, i, begin, end);
      } else {
        add_columns<1>(sum, i, begin, end);
      }
    }
  }

  // S[f] = x * the table's row, in scratch.
  void start_sum(int64_t f) {
    A* const sum = sums_ + f * sum_stride();
    scale_into(sum, scale_[f], table_rows_[f], p_.row_size());
    for (int64_t i = p_.row_size(); i < sum_stride(); ++i) sum[i] = 0;
    sum_rows_[f] = sum;
    scale_[f] = 1;
  }

  void load_ragged(int64_t begin, int64_t end) {
    const int64_t K = p_.embed_dim;
    for (int64_t i = 0; i < num_active_; ++i) count_[active_[i]] = 0;
    is_summed_ = false;
    is_in_order_ = end - begin == p_.num_fields;
    for (int64_t e = begin; e < end;) {
      const int64_t f = p_.fields[e], first = e;
      is_in_order_ &= f == e - begin;
      if (count_[f]++ == 0) {
        set_row(f, e++);
        continue;
      }
      is_summed_ = true;
      A* const sum = sums_ + f * sum_stride();
      if (count_[f] == 2) {
        start_sum(f);
        for (int64_t k = 0; k < K; ++k) within_[f * K + k] = 0;
      }
      ++e;
      if (p_.within_field) {
        // A new entry meets the sum of those before it: all pairs, and no difference of large squares.
        const T* const row = entries_.row(first) + f * K;
        const A x = entries_.value(first);
        for (int64_t k = 0; k < K; ++k) within_[f * K + k] += x * load(row + k) * sum[f * K + k];
      } else {
        while (e < end && p_.fields[e] == f) ++e;
        count_[f] += e - first - 1;
      }
      add_rows(sum, first, e);
    }
    num_active_ = 0;
    for (int64_t f = 0; f < p_.num_fields; ++f) {
      if (count_[f] == 0) continue;
      active_[num_active_++] = f;
      if (kIsNarrow<T> && is_summed_ && count_[f] == 1) start_sum(f);
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
  bool is_summed_ = false, is_in_order_ = false;
};

// The gradients of as many fields as are worked on together, or of all, are each kept in a row of scratch, with room
// for a register behind it.
template <typename A>
int64_t gradient_stride(const Problem& p) {
  return (p.row_size() + 2 * kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}
inline int64_t gradient_rows(const Problem& p, bool keeps_all) {
  constexpr int64_t kMost = kCacheLine / sizeof(float);  // see kFieldsTogether
  return keeps_all ? p.num_fields : std::max<int64_t>(1, kMost / p.embed_dim);
}
template <typename A>
A* take_gradient_rows(const Problem& p, Arena& arena, int64_t rows) {
  return arena.take<A>(rows * gradient_stride<A>(p));
}

// Bytes of scratch for the field sums and so many gradients of fields.
template <typename T>
size_t field_sums_bytes(const Problem& p, int64_t rows) {
  Arena arena(nullptr);
  FieldSums<T> s(p, arena);
  take_gradient_rows<Sum<T>>(p, arena, rows);
  return arena.used();
}

// Calls fn(embed_dim, output) with what p is, as constants.
template <typename Fn>
inline void dispatch_constants(const Problem& p, Fn&& fn) {
  dispatch_embed_dim(p.embed_dim,
                     [&](auto embed_dim) { dispatch_output(p.output, [&](auto output) { fn(embed_dim, output); }); });
}

// How K-vectors lie in registers of L lanes: kPairs of them side by side where several fit, and for that embed_dim has
// to be a constant; else one in several registers, the last of which may be partly filled.
template <int kEmbedDim, int L>
constexpr int kPairsPerRegister = kEmbedDim > 0 && kEmbedDim < L ? L / kEmbedDim : 1;

// How many fields meet as many others before the next do: those of a register or, where that is longer, of a cache line
// of sums, so that a line is read once.
template <typename A, int kEmbedDim, int kFields>
constexpr int kFieldsABlock =
    kFields * std::max(1, kPairsPerRegister<kEmbedDim, kCacheLine / int{sizeof(A)}> / kFields);

// Calls fn(embed_dim, rest), both as constants: embed_dim 0 where it is none, and the width of what a K-vector leaves
// for its last register, 0 where it leaves nothing, else rounded up to one of a few widths.
template <int kEmbedDim, int L, int kTry = 2, typename Fn>
auto dispatch_registers(int64_t K, const Fn& fn) {
  using std::integral_constant;
  if constexpr (kEmbedDim > 0) {
    constexpr unsigned kRest = kEmbedDim % L;
    return fn(integral_constant<int, kEmbedDim>{}, integral_constant<int, kRest ? std::bit_ceil(kRest) : 0>{});
  } else if constexpr (kTry <= L / 2) {
    if constexpr (!has_own_kernels(kTry)) {
      if (K == kTry) return dispatch_registers<kTry, L>(K, fn);
    }
    return dispatch_registers<kEmbedDim, L, kTry + 1>(K, fn);
  } else {
    constexpr integral_constant<int, 0> kAny;
    const int64_t rest = K % L;
    if (rest == 0) return fn(kAny, integral_constant<int, 0>{});
    if (L > 8 && rest > 8) return fn(kAny, integral_constant<int, L>{});
    if (L > 4 && rest > 4) return fn(kAny, integral_constant < int, L<8 ? L : 8>{});
    return fn(kAny, integral_constant < int, L<4 ? L : 4>{});
  }
}
