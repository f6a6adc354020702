// SPDX-License-Identifier: MIT
// The interaction of any samples, by way of their field sums S[f, g, :] in shared memory (see ../params.h). A block
// works on a sample; its entries are read several at a time, all of their numbers side by side, and then added in their
// order: the cost is linear in the number of entries, and the result the same in every run.
//
// Where S does not fit, it is made tile by tile: fields [i0, i0 + ni) by fields [j0, j0 + nj), so that each number of a
// row is still read once (a tile needs columns J of the rows of I, and columns I of the rows of J). Where not even two
// K-vectors fit, tiles of one field by one are cut along K.
#pragma once

#include "pairs.cuh"
#include "stage_rows.cuh"

namespace ffm::cuda {

struct FieldSumsLayout {
  int tile = 0;     // fields a side, F: there is one tile
  int vectors = 0;  // numbers of a K-vector that a tile has: K, or fewer where tile is 1
  int stride = 0;   // numbers from row to row of S
  int chunk = 0;    // entries that are read at a time
  int stage = 0;    // numbers that are read of an entry at most
  int lanes = 0;    // of a pair, see pairs.cuh
  int sides = 0;    // 1: rows I alone, where there is one tile

  size_t numbers() const {
    return static_cast<size_t>(sides) * tile * stride + static_cast<size_t>(tile) * vectors +
           static_cast<size_t>(chunk) * (stage + 1);
  }
};

// Rows as they lie in a table of T.
template <typename T>
struct TableRows {
  using Value = T;
  const unsigned char* table;
  int64_t row_bytes;

  // `kCount` numbers from number i of a row on.
  template <int kCount>
  __device__ __forceinline__ Unit<T, kCount * sizeof(T)> numbers(int64_t id, int64_t i) const {
    return load_unit<T, kCount * sizeof(T)>(table + id * row_bytes + i * static_cast<int64_t>(sizeof(T)));
  }
};

// An entry that was read: which part of the tile its numbers go to.
struct StagedEntry {
  int64_t id;
  int field;
  int side;  // 0: row field - i0 of the first side; 1: row field - j0 of the second; -1: none
};

template <typename Rows, int kCount>
class FieldSumsOfSample {
 public:
  using T = typename Rows::Value;
  using A = Sum<T>;

  __device__ FieldSumsOfSample(const Problem& p, const Rows& rows, const FieldSumsLayout& layout, unsigned char* shared)
      : p_(p), rows_(rows), layout_(layout) {
    sums_ = reinterpret_cast<A*>(shared);
    within_ = sums_ + layout.sides * layout.tile * layout.stride;
    staged_ = within_ + layout.tile * layout.vectors;
    x_ = staged_ + layout.chunk * layout.stage;
    unsigned char* rest = reinterpret_cast<unsigned char*>(x_ + layout.chunk);
    rest += -reinterpret_cast<uintptr_t>(rest) & 7;
    entries_ = reinterpret_cast<StagedEntry*>(rest);
  }

  // Whether all its entries can be used: by all threads, the same for all.
  __device__ bool set_sample(int64_t b) {
    int64_t begin = p_.entries_begin(b), end = p_.entries_begin(b + 1);
    bool is_bad = false;
    if (p_.offsets) {
      is_bad = begin > end;
      begin = min(max(begin, int64_t{0}), p_.num_entries);
      end = max(begin, min(end, p_.num_entries));
    }
    begin_ = begin;
    end_ = end;
    for (int64_t e = begin + threadIdx.x; e < end; e += blockDim.x) {
      is_bad |= static_cast<uint64_t>(p_.indices[e]) >= static_cast<uint64_t>(p_.num_features);
      if (p_.fields) is_bad |= static_cast<uint64_t>(p_.fields[e]) >= static_cast<uint64_t>(p_.num_fields);
    }
    return __syncthreads_or(is_bad) == 0;
  }

  // Of the tile of fields I = [i0, i0 + ni) by J = [j0, j0 + nj), numbers [k0, k0 + nk) of each K-vector. I == J: one
  // side. Ends with a barrier.
  __device__ void make_tile(int i0, int ni, int j0, int nj, int64_t k0, int nk) {
    const bool is_diagonal = i0 == j0;
    second_side_ = is_diagonal ? 0 : layout_.tile;
    const int row_units[2] = {nj * nk / kCount, ni * nk / kCount};
    for (int i = threadIdx.x; i < layout_.sides * layout_.tile * layout_.stride; i += blockDim.x) sums_[i] = 0;
    for (int i = threadIdx.x; i < layout_.tile * layout_.vectors; i += blockDim.x) within_[i] = 0;
    for (int64_t first = begin_; first < end_; first += layout_.chunk) {
      const int n = static_cast<int>(min(end_ - first, static_cast<int64_t>(layout_.chunk)));
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const int64_t e = first + i;
        const int field = static_cast<int>(p_.fields ? p_.fields[e] : e - begin_);
        const int side = i0 <= field && field < i0 + ni ? 0 : !is_diagonal && j0 <= field && field < j0 + nj ? 1 : -1;
        entries_[i] = {p_.indices[e], field, side};
        x_[i] = p_.values ? load(static_cast<const T*>(p_.values) + e) : A(1);
      }
      __syncthreads();
      read(n, row_units, i0, j0, k0);
      __syncthreads();
      add(n, row_units, i0, j0, nk);
      __syncthreads();
    }
    if (begin_ == end_) __syncthreads();
  }

  // S[f, g, k0:], for f in I and g in J, f, g counted from the start of the tile; and S[g, f, k0:].
  __device__ __forceinline__ const A* left(int f, int g, int nk) const { return sums_ + f * layout_.stride + g * nk; }
  __device__ __forceinline__ const A* right(int f, int g, int nk) const {
    return sums_ + (second_side_ + g) * layout_.stride + f * nk;
  }
  // The products of the pairs inside field f of a diagonal tile.
  __device__ __forceinline__ const A* within(int f, int nk) const { return within_ + f * nk; }

 private:
  // x * the numbers that the tile needs of n entries: each thread takes units of any of them.
  __device__ __forceinline__ void read(int n, const int (&row_units)[2], int i0, int j0, int64_t k0) {
    // Several at once, so that a thread does not wait for each.
    constexpr int kAtOnce = 4;
    const int most = max(row_units[0], row_units[1]);
    const int step_entry = static_cast<int>(blockDim.x) / most, step_unit = static_cast<int>(blockDim.x) % most;
    int i = static_cast<int>(threadIdx.x) / most, u = static_cast<int>(threadIdx.x) % most;
    while (i < n) {
      Unit<T, kCount* static_cast<int>(sizeof(T))> units[kAtOnce];
      int entries[kAtOnce], places[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        entries[j] = -1;
        if (i >= n) continue;
        const StagedEntry entry = entries_[i];
        if (entry.side >= 0 && u < row_units[entry.side]) {
          const int64_t first = (entry.side == 0 ? j0 : i0) * p_.embed_dim + k0;
          units[j] = rows_.template numbers<kCount>(entry.id, first + u * kCount);
          entries[j] = i;
          places[j] = i * layout_.stage + u * kCount;
        }
        i += step_entry;
        u += step_unit;
        if (u >= most) {
          u -= most;
          ++i;
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (entries[j] < 0) continue;
        const A x = x_[entries[j]];
#pragma unroll
        for (int k = 0; k < kCount; ++k) staged_[places[j] + k] = x * units[j].x[k];
      }
    }
  }

  // Adds them up, entry by entry. A thread has some numbers of a row, those of every `groups`-th field.
  __device__ __forceinline__ void add(int n, const int (&row_units)[2], int i0, int j0, int nk) {
    const int most = max(row_units[0], row_units[1]) * kCount, threads = static_cast<int>(blockDim.x);
    const int groups = max(1, threads / most), group = static_cast<int>(threadIdx.x) / most;
    if (group >= groups) return;
    for (int c = groups > 1 ? static_cast<int>(threadIdx.x) % most : static_cast<int>(threadIdx.x); c < most;
         c += groups > 1 ? most : threads) {
      for (int i = 0; i < n; ++i) {
        const StagedEntry entry = entries_[i];
        if (entry.side < 0 || entry.field % groups != group || c >= row_units[entry.side] * kCount) continue;
        const int row = entry.side == 0 ? entry.field - i0 : entry.field - j0;
        // The two sides are one where the tile is on the diagonal.
        A& sum = sums_[(entry.side * layout_.tile + row) * layout_.stride + c];
        const A x = staged_[i * layout_.stage + c];
        // An entry meets the sum of those before it: all pairs, and no difference of large squares.
        if (p_.within_field && i0 == j0 && c / nk == row) within_[c] += x * sum;
        sum += x;
      }
    }
  }

  const Problem& p_;
  const Rows& rows_;
  const FieldSumsLayout& layout_;
  A *sums_, *within_, *staged_, *x_;
  StagedEntry* entries_;
  int64_t begin_ = 0, end_ = 0;
  int second_side_ = 0;  // its first row
};

// out: sums of type A, other terms of the type of the values.
template <typename Rows, int kCount>
__global__ void __launch_bounds__(256, 2)
    field_sums_forward(const Problem p, const Rows rows, const FieldSumsLayout layout, void* out) {
  using T = typename Rows::Value;
  using A = Sum<T>;
  constexpr int kUnitBytes = kCount * static_cast<int>(sizeof(A));
  GPU_DYNAMIC_SHARED(shared);
  GPU_SHARED(A[2 * BlockSum<A>::kMaxWarps], warp_sums);
  FieldSumsOfSample<Rows, kCount> sample(p, rows, layout, shared);
  BlockSum<A> block_sum(warp_sums);
  const int F = static_cast<int>(p.num_fields);
  const int64_t K = p.embed_dim, P = static_cast<int64_t>(F) * (F - 1) / 2;
  const int64_t width = p.output == Output::kHadamard ? K : 1, num_terms = P + (p.within_field ? F : 0);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32, part = lane % layout.lanes;
  int turn = 0;
  for (int64_t b = blockIdx.x; b < p.batch_size; b += gridDim.x, ++turn) {
    const bool is_good = sample.set_sample(b);
    const bool is_sum = p.output == Output::kSum;
    A* const sum = static_cast<A*>(out) + b;
    T* const terms = static_cast<T*>(out) + b * num_terms * width;
    if (!is_good) {
      if (is_sum && threadIdx.x == 0) *sum = not_a_number<A>();
      const int64_t n = is_sum ? 0 : num_terms * width;
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) store(terms + i, not_a_number<A>());
      continue;
    }
    A total = 0;
    for (int i0 = 0; i0 < F; i0 += layout.tile) {
      const int ni = min(F - i0, layout.tile);
      for (int j0 = i0; j0 < F; j0 += layout.tile) {
        const int nj = min(F - j0, layout.tile);
        // What is known of a pair, or of the pairs inside a field, where a tile is cut along K.
        A carried = 0, carried_within = 0;
        for (int64_t k0 = 0; k0 < K; k0 += layout.vectors) {
          const int nk = static_cast<int>(min(K - k0, static_cast<int64_t>(layout.vectors)));
          const bool is_last = k0 + nk == K;
          sample.make_tile(i0, ni, j0, nj, k0, nk);
          for (int f = warp; f < ni; f += num_warps) {
            const int first = i0 == j0 ? f + 1 : 0, num_pairs = nj - first, step = 32 / layout.lanes;
            // Whole warps, as they add up their lanes.
            for (int t = lane / layout.lanes; t - lane / layout.lanes < num_pairs; t += step) {
              const bool is_pair = t < num_pairs;
              const int g = first + (is_pair ? t : 0);
              A d = 0;
              const A *a = sample.left(f, g, nk), *c = sample.right(f, g, nk);
              T* const term = terms + pair_index(i0 + f, j0 + g, F) * width;
              for (int u = part * kCount; is_pair && u < nk; u += layout.lanes * kCount) {
                const auto x = load_unit<A, kUnitBytes>(a + u), y = load_unit<A, kUnitBytes>(c + u);
                if (p.output == Output::kHadamard) {
#pragma unroll
                  for (int k = 0; k < kCount; ++k) store(term + k0 + u + k, x.x[k] * y.x[k]);
                } else {
                  d = dot<A, kUnitBytes>(x, y, d);
                }
              }
              if (p.output == Output::kSum) {
                total += d;
              } else if (p.output == Output::kDot) {
                carried += sum_lanes(d, layout.lanes);
                if (is_last) {
                  if (is_pair && part == 0) store(term, carried);
                  carried = 0;
                }
              }
            }
          }
          if (p.within_field && i0 == j0) {
            for (int f = threadIdx.x; f < ni; f += blockDim.x) {
              const A* const products = sample.within(f, nk);
              T* const term = terms + (P + i0 + f) * width;
              for (int k = 0; k < nk; ++k) {
                carried_within += products[k];
                if (p.output == Output::kHadamard) store(term + k0 + k, products[k]);
              }
              if (p.output == Output::kSum) {
                total += carried_within;
                carried_within = 0;
              } else if (is_last) {
                if (p.output == Output::kDot) store(term, carried_within);
                carried_within = 0;
              }
            }
          }
          __syncthreads();
        }
      }
    }
    if (is_sum) {
      block_sum.add(total, turn);
      __syncthreads();
      if (threadIdx.x == 0) *sum = block_sum.total(turn);
    }
  }
}

// kCount numbers are read at once; of a K-vector they are all or a part.
template <typename Rows, int kCount>
cudaError_t launch_field_sums(const Device& device, const Problem& p, const Rows& rows, void* out,
                              cudaStream_t stream) {
  using A = Sum<typename Rows::Value>;
  constexpr int kThreads = 256, kUnitBytes = kCount * static_cast<int>(sizeof(A));
  constexpr int64_t kStageBytes = 16 << 10;
  const int64_t F = p.num_fields, K = p.embed_dim;
  FieldSumsLayout layout;
  const auto set = [&](int64_t tile, int64_t vectors) {
    layout.tile = static_cast<int>(tile);
    layout.vectors = static_cast<int>(vectors);
    layout.sides = tile == F ? 1 : 2;
    layout.lanes = lanes_a_vector(vectors / kCount);
    const int row_bytes = static_cast<int>(tile * vectors * static_cast<int64_t>(sizeof(A)));
    layout.stride = conflict_free_stride(row_bytes, kUnitBytes, layout.lanes) / static_cast<int>(sizeof(A));
    layout.stage = layout.tile * layout.vectors;
    layout.chunk = static_cast<int>(std::clamp<int64_t>(kStageBytes / row_bytes, 1, 64));
  };
  const auto shared_bytes = [&] {
    return layout.numbers() * sizeof(A) + 8 + static_cast<size_t>(layout.chunk) * sizeof(StagedEntry);
  };
  // All of it, or as much as lets two blocks share a multiprocessor.
  const size_t most = static_cast<size_t>(device.shared_bytes), half = most / 2;
  const auto fits = [&](int64_t tile, int64_t vectors, size_t bytes) {
    if (tile * tile * vectors * static_cast<int64_t>(sizeof(A)) > static_cast<int64_t>(bytes)) return false;
    set(tile, vectors);
    return shared_bytes() <= bytes;
  };
  if (!fits(F, K, most)) {
    int64_t tiles = 2;
    while (tiles < F && !fits((F + tiles - 1) / tiles, K, half)) ++tiles;
    int64_t vectors = K;
    while (!fits(tiles < F ? (F + tiles - 1) / tiles : 1, vectors, half)) {
      vectors = std::max<int64_t>(kCount, vectors / 2 / kCount * kCount);
    }
  }
  const auto kernel = field_sums_forward<Rows, kCount>;
  unsigned blocks = 0;
  const cudaError_t error = resident_blocks(device, kernel, kThreads, shared_bytes(), p.batch_size, &blocks);
  if (error != cudaSuccess) return error;
  return GPU_LAUNCH(kernel, blocks, kThreads, shared_bytes(), stream, p, rows, layout, out);
}

}  // namespace ffm::cuda
