// SPDX-License-Identifier: MIT
// The interaction on packed tables (packed_row_bytes says what a row is).
//
// The pairs of a sample are met in tiles, fields f by fields g: the numbers of all pairs of a tile are read once along
// the rows f, and once along the rows g and transposed. Products of numbers are summed exactly, in int32, before they
// meet the two scales of their pair.

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
#include "rows_ahead.h"

// A packed table and the entries of a batch that name its rows. A row begins with its scales.
class PackedEntries {
 public:
  explicit PackedEntries(const Problem& p)
      : p_(p),
        table_(static_cast<const char*>(p.weight)),
        values_(static_cast<const float*>(p.values)),
        row_bytes_(packed_row_bytes(p.num_fields, p.embed_dim)) {}

  const char* table_row(int64_t feature) const { return table_ + feature * row_bytes_; }
  const char* row(int64_t e) const { return table_row(p_.indices[e]); }
  // From entry e on, or none.
  const float* values(int64_t e) const { return values_ ? values_ + e : nullptr; }

  // Asks the second-level cache for the rows of the entries [begin, end): more lines than the first level can wait for.
  // Inlined by force, as prefetch is.
  __attribute__((always_inline)) void prefetch_rows(int64_t begin, int64_t end) const {
    for (int64_t e = begin; e < end; ++e) prefetch(row(e), row_bytes_);
  }

 private:
  const Problem& p_;
  const char* table_;
  const float* values_;
  int64_t row_bytes_;
};

// N units from each of the addresses at(kFirst), at(kFirst + 1), ... `Count` of them, side by side.
template <typename U, int N, int Count, int kFirst = 0, typename At>
inline Vec<U, N * Count> load_pieces(At at) {
  if constexpr (Count == 1) {
    Vec<U, N> v;
    __builtin_memcpy(&v, at(kFirst), sizeof(v));
    return v;
  } else {
    constexpr int kHalf = Count / 2;
    return concat<U, N * kHalf>(load_pieces<U, N, kHalf, kFirst>(at), load_pieces<U, N, kHalf, kFirst + kHalf>(at),
                                std::make_integer_sequence<int, N * Count>{});
  }
}

// A matrix [Rows, Columns] of elements of N units each, transposed.
template <int Rows, int Columns, int N, typename V>
inline V transpose(V v) {
  if constexpr (Rows == 1 || Columns == 1) {
    return v;
  } else {
    return [&]<int... I>(std::integer_sequence<int, I...>) {
      return __builtin_shufflevector(v, v, (I / N % Rows * Columns + I / N / Rows) * N + I % N...);
    }(std::make_integer_sequence<int, Rows * Columns * N>{});
  }
}

// Sums of two adjacent elements, those of a before those of b.
template <typename V>
inline V add_adjacent(V a, V b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, 2 * I...) + __builtin_shufflevector(a, b, 2 * I + 1 ...);
  }(std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

// Sums of four adjacent products of int8 numbers in [-127, 127]. An int16 holds a sum of two: 2 * 127^2 < 2^15.
template <int N>
inline Vec<int32_t, N> dot4(Vec<int32_t, N> a, Vec<int32_t, N> b) {
#if defined(__AVX512BW__)
  if constexpr (N == 16) {
    // The instruction multiplies unsigned by signed numbers, so a's signs go to b.
    const __m512i a_ = bit_copy<__m512i>(a), b_ = bit_copy<__m512i>(b);
    const __m512i signed_b = _mm512_mask_sub_epi8(b_, _mm512_movepi8_mask(a_), _mm512_setzero_si512(), b_);
    const __m512i sums = _mm512_maddubs_epi16(_mm512_abs_epi8(a_), signed_b);
    return bit_copy<Vec<int32_t, N>>(_mm512_madd_epi16(sums, _mm512_set1_epi16(1)));
  }
#elif defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i a_ = bit_copy<__m256i>(a), b_ = bit_copy<__m256i>(b);
    const __m256i sums = _mm256_maddubs_epi16(_mm256_abs_epi8(a_), _mm256_sign_epi8(b_, a_));
    return bit_copy<Vec<int32_t, N>>(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
  }
#endif
  using Int16 = Vec<int16_t, 2 * N>;
  const Int16 a2 = bit_copy<Int16>(a), b2 = bit_copy<Int16>(b);
  const Int16 sums = (a2 << 8 >> 8) * (b2 << 8 >> 8) + (a2 >> 8) * (b2 >> 8);
  const Vec<int32_t, N> pairs = bit_copy<Vec<int32_t, N>>(sums);
  return (pairs << 16 >> 16) + (pairs >> 16);
}

// N numbers, each an int16.
template <int N>
inline Vec<int16_t, N> load_words(const char* numbers) {
  return __builtin_convertvector(load_bits<N>(reinterpret_cast<const int8_t*>(numbers)), Vec<int16_t, N>);
}

// x times each; to float by way of int32, as GCC has instructions for it.
template <int N>
inline Vec<float, N> scaled(float x, Vec<int16_t, N> words) {
  return x * __builtin_convertvector(__builtin_convertvector(words, Vec<int32_t, N>), Vec<float, N>);
}

// Stores v at out + i, as far as the array of n reaches. What is more of it than wanted, what follows will overwrite.
template <int N>
inline void store_below(float* out, int64_t i, int64_t n, Vec<float, N> v) {
  if (i + N <= n) return store<N>(out + i, v);
  for (int64_t j = i; j < n; ++j) out[j] = v[j - i];
}

// Asks for the rows of later samples, as many lines with every tile that is met as bring a sample's before its end: two
// samples ahead at least, as they are small. A row is too few lines for a tile to be the cue for its own place
// (rows_ahead.h).
class PackedRowsAhead {
 public:
  PackedRowsAhead(const Problem& p, const PackedEntries& entries, Range samples, int64_t tiles)
      : p_(p),
        entries_(entries),
        row_bytes_(packed_row_bytes(p.num_fields, p.embed_dim)),
        last_sample_(samples.end),
        distance_(std::max<int64_t>(2, rows_in(kWindowBytes, row_bytes_) / p.num_fields)),
        lines_a_tile_(((row_bytes_ + kCacheLine - 1) / kCacheLine * p.num_fields + tiles - 1) / tiles),
        next_(p.entries_begin(samples.begin)) {
    set_end(samples.begin);
    after_sample();
  }

  void at_sample(int64_t b) { set_end(b + 1); }
  __attribute__((always_inline)) void at_tile() {
    for (int64_t i = 0; i < lines_a_tile_; ++i) ask_line();
  }
  void after_sample() {
    while (next_ < end_ || line_ < row_end_) ask_line();
  }

 private:
  void set_end(int64_t b) { end_ = p_.entries_begin(std::min(last_sample_, b + distance_)); }
  __attribute__((always_inline)) void ask_line() {
    if (line_ >= row_end_) {
      if (next_ == end_) return;
      const char* const row = entries_.row(next_++);
      line_ = row - reinterpret_cast<uintptr_t>(row) % kCacheLine;
      row_end_ = row + row_bytes_;
    }
    prefetch_line(line_);
    line_ += kCacheLine;
  }

  const Problem& p_;
  const PackedEntries& entries_;
  int64_t row_bytes_, last_sample_, distance_, lines_a_tile_;
  int64_t next_, end_ = 0;  // entries
  const char *line_ = nullptr, *row_end_ = nullptr;
};

// The pairs of samples that have one entry a field, in the order of the fields. kEmbedDim is what a packed row has, 4,
// 8 or 16; 0 is a multiple of 16.
template <int kEmbedDim>
class PairTiles {
 public:
  // A tile: as many pairs as a register has floats.
  static constexpr int kPairs = kLanes<float>;
  static constexpr int kColumns = 4;
  static constexpr int kRows = kPairs / kColumns;
  static constexpr int kMinFields = kRows > kColumns ? kRows : kColumns;
  using Floats = Vec<float, kPairs>;

  PairTiles(const Problem& p, Arena& arena)
      : F_(p.num_fields),
        K_(packed_embed_dim(p.embed_dim)),
        embed_dim_(p.embed_dim),
        is_sum_(p.output == Output::kSum),
        row_blocks_((F_ + kRows - 1) / kRows),
        column_blocks_((F_ + kColumns - 1) / kColumns),
        rows_(arena.take<const char*>(F_)),
        left_(arena.take<float>(row_blocks_ * kPairs)),
        right_(arena.take<float>(column_blocks_ * kPairs)) {
    if (rows_ != nullptr) set_values(nullptr);
  }

  void set_row(int64_t f, const char* row) { rows_[f] = row; }

  // The values of a sample, 1 without any, spread as a tile has them. The last blocks begin early enough to be whole;
  // for a sum, what they share with the blocks before them is 0.
  void set_values(const float* x) {
    x_ = x;
    auto value = [&](int64_t f, int64_t begin) { return f < begin && is_sum_ ? 0.0f : x ? x[f] : 1.0f; };
    for (int64_t i = 0; i < row_blocks_; ++i) {
      for (int t = 0; t < kPairs; ++t) left_[i * kPairs + t] = value(row_begin(i) + t / kColumns, i * kRows);
    }
    for (int64_t j = 0; j < column_blocks_; ++j) {
      for (int t = 0; t < kPairs; ++t) right_[j * kPairs + t] = value(column_begin(j) + t % kColumns, j * kColumns);
    }
  }

  int64_t num_tiles() const {
    int64_t n = 0;
    for (int64_t i = 0; i < row_blocks_; ++i) n += column_blocks_ - i * kRows / kColumns;
    return n;
  }

  // The sum of all; `ahead` is told of every tile.
  float sum(PackedRowsAhead& ahead) const {
    Floats total = {};
    for (int64_t i = 0; i < row_blocks_; ++i) {
      int64_t j = i * kRows / kColumns;
      total += tile(i, j, ahead) * upper(row_begin(i), column_begin(j));
      for (++j; j < column_blocks_; ++j) total += tile(i, j, ahead);
    }
    return FFM_ISA::sum<float, kPairs>(total);
  }

  // The dot products of the pairs in their order, terms [P].
  void dots(float* terms, PackedRowsAhead& ahead) const {
    for (int64_t i = 0; i < row_blocks_; ++i) {
      for (int64_t j = i * kRows / kColumns; j < column_blocks_; ++j) {
        const Floats pairs = tile(i, j, ahead);
        for (int r = 0; r < kRows; ++r) {
          const int64_t f = row_begin(i) + r, g = column_begin(j);
          float* const row = terms + pair_index(f, g, F_);
          if (f < g) {
            __builtin_memcpy(row, reinterpret_cast<const char*>(&pairs) + sizeof(float) * kColumns * r,
                             sizeof(float) * kColumns);
          } else {
            for (int c = 0; c < kColumns; ++c) {
              if (f < g + c) row[c] = pairs[r * kColumns + c];
            }
          }
        }
      }
    }
  }

  // The Hadamard products of the pairs, terms [P, K].
  void products(float* terms) const {
    const int64_t n = F_ * (F_ - 1) / 2 * embed_dim_;
    int64_t t = 0;
    for (int64_t f = 0; f < F_; ++f) {
      for (int64_t g = f + 1; g < F_; ++g, t += embed_dim_) {
        float x = load_scale(f, g) * load_scale(g, f);
        if (x_) x *= x_[f] * x_[g];
        for (int64_t k = 0; k < (kEmbedDim ? kEmbedDim : K_); k += kChunk) {
          const auto words = load_words<kChunk>(numbers(f, g) + k) * load_words<kChunk>(numbers(g, f) + k);
          store_below<kChunk>(terms, t + k, n, scaled<kChunk>(x, words));
        }
      }
    }
  }

 private:
  using Ints = Vec<int32_t, kPairs>;
  // Numbers are read 4, 8 or 16 of a K-vector at a time; those are so many int32, and so many registers a tile.
  static constexpr int kChunk = kEmbedDim ? kEmbedDim : 16;
  static constexpr int kUnits = kChunk / 4;
  // The part of a tile whose numbers fill one register.
  static constexpr int kPartPairs = kPairs / kUnits;
  static constexpr int kPartColumns = kPartPairs < kColumns ? kPartPairs : kColumns;
  static constexpr int kPartRows = kPartPairs / kPartColumns;

  int64_t row_begin(int64_t i) const { return (i + 1) * kRows <= F_ ? i * kRows : F_ - kRows; }
  int64_t column_begin(int64_t j) const { return (j + 1) * kColumns <= F_ ? j * kColumns : F_ - kColumns; }
  // In the row of field f: the scale and the numbers of its vector for field g.
  const char* scale(int64_t f, int64_t g) const { return rows_[f] + 2 * g; }
  float load_scale(int64_t f, int64_t g) const { return load(reinterpret_cast<const BFloat16*>(rows_[f]) + g); }
  const char* numbers(int64_t f, int64_t g) const { return rows_[f] + 2 * F_ + g * (kEmbedDim ? kEmbedDim : K_); }

  // 1 where a pair of the tile that begins at (f, g) has the smaller field on the left, else 0.
  static Floats upper(int64_t f, int64_t g) {
    Floats v;
    for (int t = 0; t < kPairs; ++t) v[t] = f + t / kColumns < g + t % kColumns ? 1.0f : 0.0f;
    return v;
  }

  // The pairs of the rows of block i and the columns of block j.
  __attribute__((always_inline)) Floats tile(int64_t i, int64_t j, PackedRowsAhead& ahead) const {
    ahead.at_tile();
    const int64_t f = row_begin(i), g = column_begin(j);
    const auto left = load_pieces<uint16_t, kColumns, kRows>([&](int n) { return scale(f + n, g); });
    const auto right = load_pieces<uint16_t, kRows, kColumns>([&](int n) { return scale(g + n, f); });
    const Floats x = load<kPairs>(left_ + i * kPairs) * load<kPairs>(right_ + j * kPairs);
    return x * widen<BFloat16, kPairs>(left) * widen<BFloat16, kPairs>(transpose<kColumns, kRows, 1>(right)) *
           __builtin_convertvector(part_dots<0, kUnits>(f, g), Floats);
  }
  // The products of the parts [kPart, kPart + kCount) of the tile that begins at (f, g), kUnits / kCount sums a pair.
  template <int kPart, int kCount>
  Ints part_dots(int64_t f, int64_t g) const {
    if constexpr (kCount > 1) {
      return add_adjacent(part_dots<kPart, kCount / 2>(f, g), part_dots<kPart + kCount / 2, kCount / 2>(f, g));
    } else {
      f += kPart * kPartPairs / kColumns;
      g += kPart * kPartPairs % kColumns;
      Ints dots = {};
      for (int64_t k = 0; k < (kEmbedDim ? kEmbedDim : K_); k += kChunk) {
        // The vectors of a row follow each other, unless they are longer than what is read.
        constexpr int kTogether = kEmbedDim ? kPartColumns : 1;
        const auto left = load_pieces<int32_t, kTogether * kUnits, kPartPairs / kTogether>(
            [&](int n) { return kEmbedDim ? numbers(f + n, g) : numbers(f, g + n) + k; });
        const auto right =
            load_pieces<int32_t, kPartRows * kUnits, kPartColumns>([&](int n) { return numbers(g + n, f) + k; });
        dots += dot4<kPairs>(left, transpose<kPartColumns, kPartRows, kUnits>(right));
      }
      return dots;
    }
  }

  int64_t F_, K_, embed_dim_;
  bool is_sum_;
  int64_t row_blocks_, column_blocks_;
  const char** rows_;
  float* left_;
  float* right_;
  const float* x_ = nullptr;
};

template <int kEmbedDim>
void forward(const Problem& p, float* out, int64_t begin, int64_t end, void* scratch) {
  const int64_t F = p.num_fields, P = F * (F - 1) / 2, width = p.output == Output::kHadamard ? p.embed_dim : 1;
  const int64_t num_terms = P + (p.within_field ? F : 0);
  const PackedEntries entries(p);
  Arena arena(scratch);
  PairTiles<kEmbedDim> pairs(p, arena);
  PackedRowsAhead ahead(p, entries, {begin, end}, pairs.num_tiles());
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = p.entries_begin(b);
    ahead.at_sample(b);
    for (int64_t f = 0; f < F; ++f) pairs.set_row(f, entries.row(first + f));
    if (p.values) pairs.set_values(entries.values(first));
    if (p.output == Output::kSum) {
      out[b] = pairs.sum(ahead);
    } else {
      float* const terms = out + b * num_terms * width;
      p.output == Output::kDot ? pairs.dots(terms, ahead) : pairs.products(terms);
      for (int64_t t = P * width; t < num_terms * width; ++t) terms[t] = 0;
    }
    ahead.after_sample();
  }
}

// x * a row as floats [F, K].
template <int kEmbedDim>
void dequantize_row(const Problem& p, const char* row, float x, float* out) {
  constexpr int kChunk = kEmbedDim ? kEmbedDim : 16;
  const int64_t F = p.num_fields, K = p.embed_dim, row_size = p.row_size();
  const int64_t packed_K = kEmbedDim ? kEmbedDim : packed_embed_dim(K);
  const char* numbers = row + 2 * F;
  for (int64_t f = 0; f < F; ++f) {
    const float scale = x * load(reinterpret_cast<const BFloat16*>(row) + f);
    for (int64_t k = 0; k < packed_K; k += kChunk, numbers += kChunk) {
      store_below<kChunk>(out, f * K + k, row_size, scaled<kChunk>(scale, load_words<kChunk>(numbers)));
    }
  }
}

template <int kEmbedDim>
void field_sums(const Problem& p, int64_t b, int64_t* counts, float* sums, float* within, void* scratch) {
  constexpr int64_t kRowsAhead = 16;
  const int64_t F = p.num_fields, K = p.embed_dim, row_size = p.row_size();
  const PackedEntries entries(p);
  float* const row = static_cast<float*>(scratch);
  const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
  for (int64_t f = 0; f < F; ++f) counts[f] = 0;
  if (p.within_field) {
    for (int64_t i = 0; i < row_size; ++i) within[i] = 0;
  }
  for (int64_t e = first; e < last; ++e) {
    if (e % kRowsAhead == 0) {
      const int64_t end = e + 2 * kRowsAhead;
      entries.prefetch_rows(e + kRowsAhead, end < p.num_entries ? end : p.num_entries);
    }
    const int64_t f = p.fields ? p.fields[e] : e - first;
    const float x = p.values ? *entries.values(e) : 1.0f;
    float* const sum = sums + f * row_size;
    if (counts[f]++ == 0) {
      dequantize_row<kEmbedDim>(p, entries.row(e), x, sum);
      continue;
    }
    dequantize_row<kEmbedDim>(p, entries.row(e), x, row);
    if (p.within_field) {
      for (int64_t i = f * K; i < (f + 1) * K; ++i) within[i] += row[i] * sum[i];
    }
    add_scaled(sum, 1.0f, row, row_size);
  }
}

bool has_forward(const Problem& p) { return p.num_fields >= PairTiles<4>::kMinFields; }

// Calls fn(std::integral_constant<int, kEmbedDim>{}) as PairTiles takes it.
template <typename Fn>
inline void dispatch_packed(const Problem& p, Fn&& fn) {
  dispatch_embed_dim(packed_embed_dim(p.embed_dim), fn);
}

size_t scratch_bytes(const Problem& p) {
  size_t bytes = sizeof(float) * static_cast<size_t>(p.row_size());
  if (has_forward(p)) {
    dispatch_packed(p, [&](auto embed_dim) {
      Arena arena(nullptr);
      PairTiles<embed_dim()> pairs(p, arena);
      if (bytes < arena.used()) bytes = arena.used();
    });
  }
  return bytes;
}

void dispatch_forward(const Problem& p, float* out, int64_t begin, int64_t end, void* scratch) {
  dispatch_packed(p, [&](auto embed_dim) { forward<embed_dim()>(p, out, begin, end, scratch); });
}

void dispatch_field_sums(const Problem& p, int64_t b, int64_t* counts, float* sums, float* within, void* scratch) {
  dispatch_packed(p, [&](auto embed_dim) { field_sums<embed_dim()>(p, b, counts, sums, within, scratch); });
}

void dispatch_dequantize(const Problem& p, float* rows, int64_t begin, int64_t end) {
  const PackedEntries entries(p);
  dispatch_packed(p, [&](auto embed_dim) {
    for (int64_t a = begin; a < end; ++a) {
      dequantize_row<embed_dim()>(p, entries.table_row(a), 1.0f, rows + (a - begin) * p.row_size());
    }
  });
}

}  // namespace

extern const Int8Kernels int8_kernels;
const Int8Kernels int8_kernels = {has_forward, scratch_bytes, dispatch_forward, dispatch_field_sums,
                                  dispatch_dequantize};

}  // namespace ffm::FFM_ISA
