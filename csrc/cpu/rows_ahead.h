// SPDX-License-Identifier: MIT
// Asking for the rows of later samples while a sample is worked on. Included like vec.h, inside the namespace of an
// ISA.
//
// Whoever goes over pairs tells an object such as these where it is, by
//   ask_tile, ask_last_tile, ask_square, ask_vectors  it is at these K-vectors, of fields in their order,
//   step(work)                                        it has done so many of the units of work that a sample takes.
// Where samples are a matrix, every K-vector is a cue to ask for one of a later sample: requests then come as evenly as
// loads do, and neither keeps the other waiting for a line buffer. Of other samples it is not known in time where a
// field's row is, so whole rows are asked for in bursts: a core keeps more lines in flight when no loads stand between
// the requests.
#pragma once

#include "field_sums.h"

// Rows that are asked for together, and rows that are on their way at a time.
constexpr int64_t kBurstBytes = 4 << 10, kWindowBytes = 24 << 10;
inline int64_t rows_in(int64_t bytes, int64_t row_bytes) { return std::max<int64_t>(1, bytes / row_bytes); }

// A row for each field, to be asked for place by place.
template <typename T>
class Places {
 public:
  // Columns are those of the fields from first_field on, up to the number `end` of a row.
  Places(const Problem& p, Arena& arena, int64_t first_field, int64_t end)
      : first_field_(first_field),
        end_(end),
        rows_(arena.take<const T*>(p.num_fields)),
        next_(arena.take<const T*>(p.num_fields)) {}

  // Of each piece of memory that is taken.
  static size_t bytes(const Problem& p) {
    Arena arena(nullptr);
    Places(p, arena, 0, 0);
    return arena.used();
  }

  const T* row(int64_t f) const { return rows_[f]; }
  // The last place of a row may reach into one more line, which is asked for at once, or before: of the next row.
  __attribute__((always_inline)) void set_row(int64_t f, const T* row) const {
    rows_[f] = row;
    prefetch_line(row + end_ - 1);
  }
  void set_next_row(int64_t f, const T* row) const { next_[f] = row; }
  __attribute__((always_inline)) void ask_next_end(int64_t f) const { prefetch_line(next_[f] + end_ - 1); }
  void turn_to_next() { std::swap(rows_, next_); }

  // For who goes over the tiles (f, g), f <= g, of the fields [begin, end), kFields by kFields, f by f: those of the
  // tile, and as many from below the diagonal, where rows are taken from the last to the first, so that both sides are
  // done together and every row is asked for from one end to the other, as memory likes it.
  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_tile(int64_t f, int64_t g, Range fields, int64_t embed_dim) const {
    ask_vectors<kEmbedDim, kFields>(f, g, embed_dim);
    if (f == g) return;
    ask_vectors<kEmbedDim, kFields>(fields.begin + fields.end - kFields - f, fields.begin + g - f - kFields, embed_dim);
  }
  // Of a tile that is out of step: those of both its sides, always.
  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_last_tile(int64_t f, int64_t g) const {
    ask_vectors<kEmbedDim, kFields, true>(f, g, kEmbedDim);
    if (f != g) ask_vectors<kEmbedDim, kFields, true>(g, f, kEmbedDim);
  }

  // Those for kFields fields from g on, in the rows of kRows fields from f on. Such as share a line are asked for once,
  // at the first of it, or always: where g is out of step.
  template <int kEmbedDim, int kFields, bool kAlways = false, int kRows = kFields>
  __attribute__((always_inline)) void ask_vectors(int64_t f, int64_t g, int64_t embed_dim) const {
    constexpr int64_t kLine = kCacheLine / sizeof(T), kPerLine = kEmbedDim > 0 ? kLine / kEmbedDim : 1;
    if constexpr (kPerLine > 1 && kFields % kPerLine != 0 && !kAlways) {
      if ((g - first_field_) % kPerLine != 0) return;
    }
    const int64_t K = kEmbedDim ? kEmbedDim : embed_dim;
    for (int r = 0; r < kRows; ++r) {
      const T* const vectors = rows_[f + r] + g * K;
      // What is wider than a row's type, as states of bfloat16 weights are, takes several lines.
      int64_t k = 0;
      do {
        prefetch_line(vectors + k);
        k += kLine;
      } while (k < kFields * K);
    }
  }

 private:
  int64_t first_field_, end_;
  const T** rows_;
  const T** next_;
};

// How a kernel asks: in bursts; or by place, where samples are a matrix, and there the ends of rows with the rest or a
// sample before it. The first access to a row looks its page up. A core does that for few rows at once and waits for
// more, so it had better be spread over a sample: but not in training, where the core is busy with more lines.
enum class Ask { kInBursts, kByPlace, kByPlaceEndsFirst };

// Of the interaction and its gradient, which say where they are for the sum.
template <Output kOutput>
constexpr Ask kAskFor = kOutput == Output::kSum ? Ask::kByPlaceEndsFirst : Ask::kInBursts;

// Those of the table. Given fields, only the columns for these are asked for. Given also(e), entry e needs another row,
// which that asks for, in bursts; where there are fewer than all fields, for the entries of these.
struct NoOtherRow {
  void operator()(int64_t) const {}
};
template <typename T, typename Also = NoOtherRow>
class RowsAhead {
 public:
  RowsAhead(const Problem& p, Arena& arena, Ask ask, Range samples, Range fields, const Also& also = {})
      : p_(p),
        also_(also),
        entries_(p),
        fields_(fields),
        columns_{fields.begin * p.embed_dim, fields.end * p.embed_dim},
        end_(samples.end),
        last_(p.entries_begin(end_)),
        burst_(rows_of(kBurstBytes)),
        window_(rows_of(kWindowBytes)),
        requested_(p.entries_begin(samples.begin)),
        is_by_place_(ask != Ask::kInBursts && !p.fields),
        asks_ends_first_(is_by_place_ && ask == Ask::kByPlaceEndsFirst),
        distance_(is_by_place_ ? std::max<int64_t>(1, window_ / p.num_fields) : 1),
        ends_a_field_((p.num_fields - 1) / std::max<int64_t>(1, fields.end - fields.begin) + 1),
        places_(p, arena, fields.begin, columns_.end) {
    if (samples.begin >= end_) return;
    const int64_t first = std::min(end_, samples.begin + distance_);
    request(p.entries_begin(first));
    if (!asks_ends_first_ || first == end_) return;
    set_next(first);
    for (int64_t f = 0; f < p.num_fields; ++f) places_.ask_next_end(f);
  }

  bool is_by_place() const { return is_by_place_; }
  // How many samples ahead rows are asked for, by place.
  int64_t distance() const { return distance_; }

  // Sample b is next, and takes `work` units of step().
  void at_sample(int64_t b, int64_t work) {
    if (is_by_place_) {
      next_row_ = 0;
      next_column_ = fields_.begin;
      const int64_t later = b + distance_;
      has_later_ = later < end_;
      has_next_ = asks_ends_first_ && later + 1 < end_;
      if (!has_later_) return;
      const int64_t first = p_.entries_begin(later);
      if (asks_ends_first_) {
        places_.turn_to_next();
        if (has_next_) set_next(later + 1);
      } else {
        for (int64_t f = 0; f < p_.num_fields; ++f) places_.set_row(f, entries_.row(first + f));
      }
      return;
    }
    work_a_burst_ = burst_ * work / std::max<int64_t>(1, p_.entries_begin(b + 1) - p_.entries_begin(b));
    next_sample_end_ = b + 2 <= end_ ? p_.entries_begin(b + 2) : last_;
    limit_ = std::min(last_, std::max(next_sample_end_, p_.entries_begin(b) + window_));
  }
  void step(int64_t work) {
    if (is_by_place_) return;
    work_done_ += work;
    if (work_done_ < work_a_burst_) return;
    work_done_ -= work_a_burst_;
    request(std::min(limit_, requested_ + burst_));
  }
  void after_sample() {
    if (!is_by_place_) request(next_sample_end_);
  }

  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_tile(int64_t f, int64_t g, Range fields, int64_t embed_dim) const {
    if (has_later_) places_.template ask_tile<kEmbedDim, kFields>(f, g, fields, embed_dim);
    if (f == g) ask_ends(f, f + kFields);
  }
  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_last_tile(int64_t f, int64_t g) const {
    if (has_later_) places_.template ask_last_tile<kEmbedDim, kFields>(f, g);
    if (f == g) ask_ends(f, f + kFields);
  }
  template <int kEmbedDim, int kFields, bool kAlways = false, int kRows = kFields>
  __attribute__((always_inline)) void ask_vectors(int64_t f, int64_t g, int64_t embed_dim) const {
    if (has_later_) places_.template ask_vectors<kEmbedDim, kFields, kAlways, kRows>(f, g, embed_dim);
  }
  // For who goes over the squares (f, g) column by column, kFields of their own fields f for all g: as many of these
  // fields' columns, row by row.
  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_square(int64_t, int64_t, int64_t embed_dim) {
    if (!has_later_) return;
    places_.template ask_vectors<kEmbedDim, kFields>(next_row_, next_column_, embed_dim);
    next_column_ += kFields;
    if (next_column_ + kFields <= fields_.end) return;
    next_row_ += kFields;
    next_column_ = fields_.begin;
  }
  // Field f is done, by who does not ask for tiles.
  __attribute__((always_inline)) void pass_field(int64_t f) const {
    const int64_t row = (f - fields_.begin) * ends_a_field_;
    ask_ends(row, std::min(p_.num_fields, row + ends_a_field_));
  }
  // All at once, by who does not go from place to place.
  void ask_rows() const {
    for (int64_t f = 0; has_later_ && f < p_.num_fields; ++f) {
      prefetch(places_.row(f) + columns_.begin, columns_.end - columns_.begin);
    }
  }

 private:
  // Those of the next rows, of fields [begin, end).
  __attribute__((always_inline)) void ask_ends(int64_t begin, int64_t end) const {
    for (int64_t f = begin; has_next_ && f < end; ++f) places_.ask_next_end(f);
  }
  void set_next(int64_t b) {
    const int64_t first = p_.entries_begin(b);
    for (int64_t f = 0; f < p_.num_fields; ++f) places_.set_next_row(f, entries_.row(first + f));
  }
  int64_t rows_of(int64_t bytes) const {
    return rows_in(bytes, (columns_.end - columns_.begin) * static_cast<int64_t>(sizeof(T)));
  }
  void request(int64_t limit) {
    for (; requested_ < limit; ++requested_) {
      prefetch(entries_.row(requested_) + columns_.begin, columns_.end - columns_.begin);
      if (fields_.begin <= field_ && field_ < fields_.end) also_(requested_);
      if (++field_ == p_.num_fields) field_ = 0;
    }
  }

  const Problem& p_;
  const Also also_;
  Entries<T> entries_;
  const Range fields_, columns_;
  int64_t end_, last_, burst_, window_, requested_;
  // The field of the entry that comes next, if the samples are a matrix.
  int64_t field_ = 0;
  int64_t next_sample_end_ = 0, limit_ = 0, work_done_ = 0, work_a_burst_ = 0;

  int64_t next_row_ = 0, next_column_ = 0;  // by ask_square

  bool is_by_place_, asks_ends_first_, has_later_ = false, has_next_ = false;
  int64_t distance_, ends_a_field_;
  Places<T> places_;
};
