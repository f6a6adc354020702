// SPDX-License-Identifier: MIT
// The gradient of the interaction on a table of FFM_DTYPE. For an entry of field f,
//   d[g] = dL/dS[f, g] = grad_output(f, g) * S[g, f],   grad_row = x * d,   grad_x = <row, d>.
//
// 1. backward_samples: a block works on a sample. Its field sums S come into shared memory, each row read once, and are
//    read column by column. An entry that has its row to itself stores its gradient, or updates its row at once: no
//    other sample reads it, and of its own sample all has been read. All other entries put their gradients down, each
//    at its place among the entries of all rows (group_rows.cuh). Where a row has few entries, the last of their
//    samples to come adds up what the others have put down, and finishes the row; it does not put down its own.
// 2. reduce_places, reduce_partials: the gradients of rows of many entries, which lie side by side, are summed, a unit
//    of a row by one thread: 64 places at a time, then what goes on from one 64 to the next, 64 of them at a time, and
//    so on. So the longest row takes no longer than many short ones.
//
// Whoever adds, and whenever: the order of a sum depends on places alone.
//
// A sample that does not fit into shared memory is worked on in tiles: columns J of the rows of fields I, and columns I
// of the rows of fields J, are all that the gradients of just these numbers need.
#include <type_traits>

#include "ffm_kernels.h"
#include "group_rows.cuh"
#include "launch.h"
#include "pairs.cuh"
#include "stage_rows.cuh"
#include "update_rules.cuh"

namespace ffm::cuda {

// What becomes of the gradients of rows.
enum class Rows {
  kStored,
  kUpdated,  // the table moves instead
  kAdded,    // to zeros, by whoever comes: in any order
};

// Of a sample's block. Registers are what limits the blocks of a multiprocessor: two of the largest, at 64 or 80 of
// them a thread for one-hot samples, and at 96 for others.
template <typename T, bool kRagged>
constexpr int kMaxSampleThreads = kRagged          ? 320
                                  : sizeof(T) == 2 ? 384
                                                   : 512;
// Places, or partial sums, that one thread adds up.
constexpr int64_t kPlaces = 64;

struct SampleLayout {
  int tile = 0;  // fields a side
  int num_tiles = 0;
  int squares = 0;         // in shared memory: 1, or 2 where there are several tiles
  int stride = 0;          // numbers from row to row of a square
  int copy_bytes = 0;      // of an asynchronous copy; 2: rows are copied number by number
  int order_capacity = 0;  // entries whose order fits into shared memory
  int threads = 0;
  size_t bytes = 0;
};

template <typename T>
struct BackwardTask {
  using A = Sum<T>;
  Problem p;
  SampleLayout layout;
  const T* grad_output = nullptr;
  T* grad_values = nullptr;
  A* value_sums = nullptr;  // [nnz], where there are several tiles
  T* grad_rows = nullptr;   // or an update
  RowUpdate<T> update;
  RowGroups groups;                     // without places: values alone
  A* stage = nullptr;                   // place -> gradient
  int64_t stage_stride = 0;             // numbers from row to row of it
  int32_t* order = nullptr;             // [nnz] the entries of a sample by field, counted from its first
  const int32_t* is_falling = nullptr;  // whether offsets fall
};

// A thread's turns over the units of rows that lie side by side.
struct Turns {
  __device__ __forceinline__ explicit Turns(int units)
      : width(units),
        step_rows(static_cast<int>(blockDim.x) / units),
        step_units(static_cast<int>(blockDim.x) % units),
        row(static_cast<int>(threadIdx.x) / units),
        unit(static_cast<int>(threadIdx.x) % units) {}
  __device__ __forceinline__ void next() {
    row += step_rows;
    unit += step_units;
    if (unit < width) return;
    unit -= width;
    ++row;
  }
  int width, step_rows, step_units, row, unit;
};

// Sums that are read and written once: past what the cache should keep. One by one, as in load_unit.
template <int kCount>
__device__ __forceinline__ Numbers<float, kCount> load_staged(const float* p) {
  if constexpr (kCount == 4) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(p));
    return {four.x, four.y, four.z, four.w};
  } else {
    return {__ldcs(p)};
  }
}
template <int kCount>
__device__ __forceinline__ Numbers<double, kCount> load_staged(const double* p) {
  if constexpr (kCount == 2) {
    const double2 two = __ldcs(reinterpret_cast<const double2*>(p));
    return {two.x, two.y};
  } else {
    return {__ldcs(p)};
  }
}
template <int kCount>
__device__ __forceinline__ void store_staged(float* p, const Numbers<float, kCount>& numbers) {
  if constexpr (kCount == 4) {
    __stcs(reinterpret_cast<float4*>(p), make_float4(numbers.x[0], numbers.x[1], numbers.x[2], numbers.x[3]));
  } else {
    __stcs(p, numbers.x[0]);
  }
}
template <int kCount>
__device__ __forceinline__ void store_staged(double* p, const Numbers<double, kCount>& numbers) {
  if constexpr (kCount == 2) {
    __stcs(reinterpret_cast<double2*>(p), make_double2(numbers.x[0], numbers.x[1]));
  } else {
    __stcs(p, numbers.x[0]);
  }
}

template <typename A, int kCount>
__device__ __forceinline__ void add_atomically(A* p, const Numbers<A, kCount>& numbers) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<A, float> && kCount == 4) {
    atomicAdd(reinterpret_cast<float4*>(p), make_float4(numbers.x[0], numbers.x[1], numbers.x[2], numbers.x[3]));
  } else
#endif
  {
#pragma unroll
    for (int k = 0; k < kCount; ++k) atomicAdd(p + k, numbers.x[k]);
  }
}

// The sum of a row is known: `place` is any of its entries', `last` that of the last, at which the sum is left for
// update_sums where that is to update the row. w: its weights, for an update.
template <typename T, int kCount, Rows kRows>
__device__ __forceinline__ void finish_row(const BackwardTask<T>& t, int64_t row, int64_t place, int64_t last,
                                           int64_t i, const Numbers<T, kCount>& w, const Numbers<Sum<T>, kCount>& sum) {
  if constexpr (kRows == Rows::kUpdated) {
    if (t.update.lanes == 0) return store_staged<kCount>(t.stage + last * t.stage_stride + i, sum);
    update_unit<kCount>(t.update, row, i, w, sum);
  } else {
    Numbers<T, kCount> numbers;
#pragma unroll
    for (int k = 0; k < kCount; ++k) numbers.x[k] = sum.x[k];
    const int64_t to = t.groups.numbers ? t.groups.numbers[place] - 1 : row;
    store_global<kCount>(t.grad_rows + to * t.p.row_size() + i, numbers);
  }
}

template <typename A, int kCount>
__device__ __forceinline__ void add(Numbers<A, kCount>& sum, const Numbers<A, kCount>& other) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum.x[k] += other.x[k];
}

// The field sums of a sample and what becomes of them. kCount numbers are worked on at a time. One-hot samples lie in
// shared memory as they do in the table; of others, the sums of fields that have several entries.
template <typename T, int kCount, bool kRagged, Rows kRows>
class SampleGradients {
 public:
  using A = Sum<T>;
  using Kept = std::conditional_t<kRagged, A, T>;

  // came_last: a word for each warp.
  __device__ SampleGradients(const BackwardTask<T>& task, unsigned char* shared, unsigned* came_last)
      : t_(task),
        F_(static_cast<int>(task.p.num_fields)),
        K_(static_cast<int>(task.p.embed_dim)),
        units_(K_ / kCount),
        b_(blockIdx.x),
        came_last_(came_last) {
    const SampleLayout& layout = t_.layout;
    ids_ = reinterpret_cast<int64_t*>(shared);
    places_ = reinterpret_cast<Place*>(ids_ + F_ + F_ % 2);
    scale_ = reinterpret_cast<A*>(places_ + (kRagged ? 0 : F_ + F_ % 2));
    squares_ = reinterpret_cast<Kept*>(scale_ + (F_ + 3) / 4 * 4);
    ends_ = reinterpret_cast<int*>(squares_ + layout.squares * layout.tile * layout.stride);
    order_ = ends_ + F_;
  }

  __device__ void run() {
    // The gradients of the values of a sample that cannot be used are zeros already.
    if (!(kRagged ? list_entries() : list_fields())) return;
    if constexpr (kRagged && kRows == Rows::kUpdated) {
      for (int i = threadIdx.x; i < size_; i += blockDim.x) {
        const Entry entry = this->entry(i);
        if (place(entry, i).count == 1) prefetch_states(entry.id);
      }
    }
    const SampleLayout& layout = t_.layout;
    for (int i = 0; i < layout.num_tiles; ++i) {
      for (int j = i; j < layout.num_tiles; ++j) {
        const int i0 = i * layout.tile, ni = min(layout.tile, F_ - i0);
        const int j0 = j * layout.tile, nj = min(layout.tile, F_ - j0);
        // The gradients of entries of the fields I need columns I of the rows J, and the other way round.
        Kept* const second = squares_ + (i == j ? 0 : layout.tile * layout.stride);
        const Square of_i = {j0, nj, i0, ni, squares_, second}, of_j = {i0, ni, j0, nj, second, squares_};
        if (j > 0) __syncthreads();
        fill(of_i);
        if (i != j) fill(of_j);
        if constexpr (!kRagged && kRows != Rows::kAdded) {
          if (j == 0) see_arrivals();
        }
        gpu::copy_async_commit();
        gpu::copy_async_wait<0>();
        __syncthreads();
        if (t_.grad_values) {
          put_values(of_i);
          if (i != j) put_values(of_j);
          // Weights may move from here on.
          if (kRows == Rows::kUpdated) __syncthreads();
        }
        if (kRows != Rows::kAdded && !t_.groups.places) continue;
        put_rows(of_i);
        if (i != j) put_rows(of_j);
      }
    }
    if (t_.grad_values && layout.num_tiles > 1) {
      __syncthreads();
      for (int64_t e = begin_ + threadIdx.x; e < begin_ + size_; e += blockDim.x) {
        store(t_.grad_values + e, t_.value_sums[e]);
      }
    }
    if constexpr (kRows != Rows::kAdded) {
      if (t_.groups.places) arrive();
    }
  }

 private:
  // Numbers of the rows of nr fields from r0 on, those that meet nc fields from c0 on. `own`: the rows of these.
  struct Square {
    int r0, nr, c0, nc;
    Kept* numbers;
    const Kept* own;
  };

  // An entry as its gradient needs it.
  struct Entry {
    int64_t e;
    int64_t id;
    int field;
    A x;
  };

  // What is known of a one-hot sample's fields. Whether all ids are in the table: the same for all threads.
  __device__ bool list_fields() {
    begin_ = b_ * F_;
    size_ = F_;
    bool is_bad = false;
    for (int f = threadIdx.x; f < F_; f += blockDim.x) {
      const int64_t id = t_.p.indices[begin_ + f];
      is_bad |= static_cast<uint64_t>(id) >= static_cast<uint64_t>(t_.p.num_features);
      ids_[f] = id;
      scale_[f] = value(begin_ + f);
      if (kRows != Rows::kAdded && t_.groups.places) places_[f] = t_.groups.places[begin_ + f];
    }
    start_value_sums();
    return __syncthreads_or(is_bad) == 0;
  }

  // The entries of any other sample, by field, those of a field in their order.
  __device__ bool list_entries() {
    const Problem& p = t_.p;
    // Samples may overlap.
    if (*t_.is_falling != 0) return false;
    begin_ = min(max(p.offsets[b_], int64_t{0}), p.num_entries);
    const int64_t end = max(begin_, min(p.offsets[b_ + 1], p.num_entries));
    size_ = static_cast<int>(end - begin_);
    bool is_bad = false;
    for (int f = threadIdx.x; f < F_; f += blockDim.x) ends_[f] = 0;
    start_value_sums();
    for (int64_t e = begin_ + threadIdx.x; e < end; e += blockDim.x) {
      is_bad |= static_cast<uint64_t>(p.indices[e]) >= static_cast<uint64_t>(p.num_features);
      is_bad |= static_cast<uint64_t>(p.fields[e]) >= static_cast<uint64_t>(F_);
    }
    if (__syncthreads_or(is_bad)) return false;
    for (int64_t e = begin_ + threadIdx.x; e < end; e += blockDim.x) atomicAdd(ends_ + p.fields[e], 1);
    __syncthreads();
    if (size_ > t_.layout.order_capacity) order_ = t_.order + begin_;
    // One warp: where each field begins, then each entry to the end of its field.
    if (threadIdx.x < 32) {
      const int lane = static_cast<int>(threadIdx.x);
      int before = 0;
      for (int first = 0; first < F_; first += 32) {
        const int f = first + lane, count = f < F_ ? ends_[f] : 0;
        int sum = count;
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, sum, step);
          if (lane >= step) sum += other;
        }
        if (f < F_) ends_[f] = before + sum - count;
        before += __shfl_sync(0xffffffffu, sum, 31);
      }
      __syncwarp();
      for (int first = 0; first < size_; first += 32) {
        const int i = first + lane;
        const int f = i < size_ ? static_cast<int>(p.fields[begin_ + i]) : -1;
        const unsigned same = __match_any_sync(0xffffffffu, f);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int start = f >= 0 ? ends_[f] : 0;
        __syncwarp();
        if (f >= 0) {
          order_[start + rank] = i;
          if (rank == 0) ends_[f] = start + __popc(same);
        }
        __syncwarp();
      }
    }
    __syncthreads();
    for (int f = threadIdx.x; f < F_; f += blockDim.x) {
      const bool is_one = count(f) == 1;
      const int64_t e = begin_ + (is_one ? order_[start(f)] : 0);
      ids_[f] = is_one ? p.indices[e] : -1;
      scale_[f] = is_one ? value(e) : A(1);
    }
    __syncthreads();
    return true;
  }

  // Asks for the states of a row that moves at once, so that they come along with the weights.
  __device__ void prefetch_states(int64_t id) const {
    constexpr int64_t kLine = 128;
    const UpdatedTable& table = t_.update.table;
    const int64_t row_bytes = table.state_row_size * static_cast<int64_t>(sizeof(A));
    for (const void* states : table.states) {
      if (!states) continue;
      for (int64_t at = 0; at < row_bytes + kLine - 1; at += kLine) {
        gpu::prefetch(static_cast<const char*>(states) + id * row_bytes + min(at, row_bytes - 1));
      }
    }
  }

  // Rows of few entries of which this is the last to come: their count is negative from here on. By the threads that
  // listed the fields; a barrier has to follow.
  __device__ void see_arrivals() {
    if (!t_.groups.places) return;
    for (int f = threadIdx.x; f < F_; f += blockDim.x) {
      Place& place = places_[f];
      if (place.is_shared_by_few() && atomicAdd(t_.groups.arrivals + place.first, 0) == place.count - 1) {
        place.count = static_cast<int16_t>(-place.count);
      }
    }
    __threadfence();
  }

  // Asks for what unit `unit` of entry i, if its row is finished here, needs beside its weights. Not long before it is
  // needed: what comes early has left the cache again.
  __device__ __forceinline__ void prefetch_unit(int i, int64_t at) const {
    const Place place = places_[i];
    if (!is_finished_here(place)) return;
    if constexpr (kRows == Rows::kUpdated) {
      const UpdatedTable& table = t_.update.table;
      if (table.state_row_size == table.row_size) {
        for (const void* states : table.states) {
          if (states) gpu::prefetch(static_cast<const A*>(states) + ids_[i] * table.row_size + at);
        }
      }
    }
    for (int rank = 0; rank < -place.count; ++rank) {
      if (rank != place.rank) gpu::prefetch(t_.stage + (place.first + rank) * t_.stage_stride + at);
    }
  }

  // Rows of few entries: whoever comes last finishes the row of those who have put their gradients down.
  __device__ void arrive() {
    __syncthreads();
    for (int first = 0; first < size_; first += static_cast<int>(blockDim.x)) {
      const int i = first + static_cast<int>(threadIdx.x);
      bool is_last = false;
      if (i < size_) {
        const Place place = kRagged ? t_.groups.places[begin_ + i] : places_[i];
        if (place.is_shared_by_few()) {
          __threadfence();
          is_last = atomicAdd(t_.groups.arrivals + place.first, 1) == place.count - 1;
          if (is_last) __threadfence();
        }
      }
      const unsigned last = __ballot_sync(0xffffffffu, is_last);
      if (threadIdx.x % 32 == 0) came_last_[threadIdx.x / 32] = last;
      __syncthreads();
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
        for (unsigned bits = came_last_[warp]; bits != 0; bits &= bits - 1) {
          const int at = first + 32 * warp + __ffs(static_cast<int>(bits)) - 1;
          finish(kRagged ? t_.groups.places[begin_ + at] : places_[at]);
        }
      }
      if (first + static_cast<int>(blockDim.x) < size_) __syncthreads();
    }
  }

  // A row whose gradients have all been put down.
  __device__ void finish(Place place) {
    const int64_t row = t_.groups.rows[place.first];
    const auto weights = [&](int64_t i) { return load_numbers<kCount>(weight(row, i)); };
    const auto sum = [&](int64_t i) {
      Numbers<A, kCount> own = {};
      return sum_of_few<false>(place, i, own);
    };
    if constexpr (kRows == Rows::kUpdated) {
      if (t_.update.lanes == 0) {
        for (int f = threadIdx.x; f < F_; f += blockDim.x) {
          const int64_t i = int64_t{f} * K_;
          update_vector<kCount>(t_.update, row, i, [&](int k, Numbers<T, kCount>& w, Numbers<A, kCount>& g) {
            w = weights(i + k);
            g = sum(i + k);
          });
        }
        return;
      }
    }
    for (int u = threadIdx.x; u < F_ * units_; u += blockDim.x) {
      const int64_t i = int64_t{u} * kCount;
      Numbers<T, kCount> w = {};
      if (kRows == Rows::kUpdated) w = weights(i);
      finish_row<T, kCount, kRows>(t_, row, place.first, 0, i, w, sum(i));
    }
  }

  // The sum, from number i on, of what the entries of a row have put down; without this one's, which is `own`.
  template <bool kHasOwn>
  __device__ __forceinline__ Numbers<A, kCount> sum_of_few(Place place, int64_t i,
                                                           const Numbers<A, kCount>& own) const {
    const A* const stage = t_.stage + place.first * t_.stage_stride + i;
    const auto of = [&](int rank) {
      return kHasOwn && rank == place.rank ? own : load_staged<kCount>(stage + rank * t_.stage_stride);
    };
    Numbers<A, kCount> sum = of(0);
    for (int rank = 1; rank < abs(place.count); ++rank) add<A, kCount>(sum, of(rank));
    return sum;
  }

  // Whether the entry has its row to itself, or is the last to come.
  static __device__ __forceinline__ bool is_finished_here(Place place) { return place.count == 1 || place.count < 0; }

  // Of entry i of the sample.
  __device__ __forceinline__ Place place(const Entry& entry, int i) const {
    if constexpr (kRagged) {
      return t_.groups.places[entry.e];
    } else {
      return places_[i];
    }
  }

  __device__ void start_value_sums() {
    if (!t_.value_sums) return;
    for (int64_t e = begin_ + threadIdx.x; e < begin_ + size_; e += blockDim.x) t_.value_sums[e] = 0;
  }

  __device__ __forceinline__ A value(int64_t e) const {
    return t_.p.values ? load(static_cast<const T*>(t_.p.values) + e) : A(1);
  }
  __device__ __forceinline__ const T* weight(int64_t id, int64_t i) const {
    return static_cast<const T*>(t_.p.weight) + id * t_.p.row_size() + i;
  }

  // Entries of field f: [start(f), start(f) + count(f)) of order_.
  __device__ __forceinline__ int start(int f) const {
    if constexpr (kRagged) {
      return f == 0 ? 0 : ends_[f - 1];
    } else {
      return f;
    }
  }
  __device__ __forceinline__ int end(int f) const {
    if constexpr (kRagged) {
      return ends_[f];
    } else {
      return f + 1;
    }
  }
  __device__ __forceinline__ int count(int f) const { return end(f) - start(f); }

  __device__ __forceinline__ Entry entry(int i) const {
    if constexpr (!kRagged) {
      return {begin_ + i, ids_[i], i, scale_[i]};
    } else {
      const int64_t e = begin_ + order_[i];
      return {e, t_.p.indices[e], static_cast<int>(t_.p.fields[e]), value(e)};
    }
  }

  __device__ void fill(const Square& s) {
    if constexpr (kRagged) {
      sum_rows(s);
    } else {
      switch (t_.layout.copy_bytes) {
        case 16: return copy_rows<16>(s);
        case 8: return copy_rows<8>(s);
        case 4: return copy_rows<4>(s);
        default: break;
      }
      for (Turns turns(s.nc * K_); turns.row < s.nr; turns.next()) {
        s.numbers[turns.row * t_.layout.stride + turns.unit] = *weight(ids_[s.r0 + turns.row], s.c0 * K_ + turns.unit);
      }
    }
  }

  __device__ __forceinline__ void sum_rows(const Square& s) {
    for (Turns turns(s.nc * units_); turns.row < s.nr; turns.next()) {
      const int f = s.r0 + turns.row, from = s.c0 * K_ + turns.unit * kCount;
      Kept* const to = s.numbers + turns.row * t_.layout.stride + turns.unit * kCount;
      const int first = start(f), n = end(f) - first;
      if (n == 0) continue;
      if (n == 1) {
        const T* const row = weight(ids_[f], from);
        if constexpr (std::is_same_v<T, Kept>) {
          gpu::copy_async<kCount * sizeof(T)>(to, row);
        } else {
          store_numbers<kCount>(to, widened(load_numbers<kCount>(row)));
        }
        continue;
      }
      Numbers<A, kCount> sum = {};
#pragma unroll 2
      for (int i = first; i < first + n; ++i) {
        const int64_t e = begin_ + order_[i];
        const A x = value(e);
        const Numbers<T, kCount> row = load_numbers<kCount>(weight(t_.p.indices[e], from));
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum.x[k] += x * row.x[k];
      }
      store_numbers<kCount>(to, sum);
    }
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_rows(const Square& s) {
    constexpr int kNumbers = kBytes < static_cast<int>(sizeof(T)) ? 1 : kBytes / static_cast<int>(sizeof(T));
    for (Turns turns(s.nc * K_ / kNumbers); turns.row < s.nr; turns.next()) {
      gpu::copy_async<kBytes>(s.numbers + turns.row * t_.layout.stride + turns.unit * kNumbers,
                              weight(ids_[s.r0 + turns.row], s.c0 * K_ + turns.unit * kNumbers));
    }
  }

  static __device__ __forceinline__ Numbers<A, kCount> widened(const Numbers<T, kCount>& numbers) {
    Numbers<A, kCount> wide;
#pragma unroll
    for (int k = 0; k < kCount; ++k) wide.x[k] = numbers.x[k];
    return wide;
  }

  // Number k of grad_output for a term, from its first on.
  __device__ __forceinline__ int64_t num_terms() const {
    const int64_t pairs = static_cast<int64_t>(F_) * (F_ - 1) / 2;
    return pairs + (t_.p.within_field ? F_ : 0);
  }
  __device__ __forceinline__ Numbers<A, kCount> term(int f, int g, int k) const {
    Numbers<A, kCount> numbers;
    const int64_t at = f == g ? static_cast<int64_t>(F_) * (F_ - 1) / 2 + f : pair_index(min(f, g), max(f, g), F_);
    if (t_.p.output == Output::kHadamard) {
      return widened(load_numbers<kCount>(t_.grad_output + (b_ * num_terms() + at) * K_ + k));
    }
    const A one = load(t_.grad_output + (t_.p.output == Output::kSum ? b_ : b_ * num_terms() + at));
#pragma unroll
    for (int i = 0; i < kCount; ++i) numbers.x[i] = one;
    return numbers;
  }

  // The weights of an entry, those that meet field s.r0 + r, from number k of them on.
  __device__ __forceinline__ Numbers<T, kCount> own_weights(const Square& s, const Entry& entry, int r, int k) const {
    if (kRagged && count(entry.field) > 1) {
      return load_numbers<kCount>(weight(entry.id, (s.r0 + r) * K_ + k));
    }
    const Numbers<Kept, kCount> kept =
        load_numbers<kCount>(s.own + (entry.field - s.c0) * t_.layout.stride + r * K_ + k);
    Numbers<T, kCount> numbers;
#pragma unroll
    for (int i = 0; i < kCount; ++i) numbers.x[i] = kept.x[i];
    return numbers;
  }

  // d[g, k:] of an entry, g = s.r0 + r.
  __device__ __forceinline__ Numbers<A, kCount> gradient(const Square& s, const Entry& entry, int r, int k) const {
    const int g = s.r0 + r;
    Numbers<A, kCount> d = {};
    const bool is_own = g == entry.field;
    if (is_own && !(kRagged && t_.p.within_field && count(g) > 1)) return d;
    if (kRagged && count(g) == 0) return d;
    const Numbers<Kept, kCount> sum =
        load_numbers<kCount>(s.numbers + r * t_.layout.stride + (entry.field - s.c0) * K_ + k);
    d = term(entry.field, g, k);
    if (is_own) {
      const Numbers<T, kCount> w = own_weights(s, entry, r, k);
#pragma unroll
      for (int i = 0; i < kCount; ++i) d.x[i] *= sum.x[i] - entry.x * w.x[i];
      return d;
    }
    const A scale = scale_[g];
#pragma unroll
    for (int i = 0; i < kCount; ++i) d.x[i] *= scale * sum.x[i];
    return d;
  }

  // A warp an entry, of the fields of the columns.
  __device__ void put_values(const Square& s) {
    const int lane = static_cast<int>(threadIdx.x) % 32, last = end(s.c0 + s.nc - 1);
    for (int i = start(s.c0) + static_cast<int>(threadIdx.x) / 32; i < last; i += static_cast<int>(blockDim.x) / 32) {
      const Entry entry = this->entry(i);
      A sum = 0;
      for (int u = lane; u < s.nr * units_; u += 32) {
        const int r = u / units_, k = (u - r * units_) * kCount;
        const Numbers<A, kCount> d = gradient(s, entry, r, k);
        const Numbers<T, kCount> w = own_weights(s, entry, r, k);
#pragma unroll
        for (int n = 0; n < kCount; ++n) sum += w.x[n] * d.x[n];
      }
      sum = sum_lanes(sum);
      if (lane != 0) continue;
      if (t_.layout.num_tiles == 1) {
        store(t_.grad_values + entry.e, sum);
      } else {
        t_.value_sums[entry.e] += sum;
      }
    }
  }

  __device__ void put_rows(const Square& s) {
    const int first = start(s.c0), n = end(s.c0 + s.nc - 1) - first;
    Turns ahead(s.nr * units_);
    const auto prefetch_ahead = [&] {
      if constexpr (!kRagged && kRows != Rows::kAdded) {
        if (ahead.row < n) prefetch_unit(first + ahead.row, s.r0 * K_ + ahead.unit * kCount);
        ahead.next();
      }
    };
    prefetch_ahead();
    for (Turns turns(s.nr * units_); turns.row < n; turns.next()) {
      prefetch_ahead();
      const Entry entry = this->entry(first + turns.row);
      Place place;
      if constexpr (kRows != Rows::kAdded) {
        place = this->place(entry, first + turns.row);
        if (place.count == 0) continue;
        if (kRows == Rows::kUpdated && t_.update.lanes == 0 && is_finished_here(place)) continue;
      }
      const int r = turns.unit / units_, k = (turns.unit - r * units_) * kCount;
      Numbers<A, kCount> d = gradient(s, entry, r, k);
#pragma unroll
      for (int j = 0; j < kCount; ++j) d.x[j] *= entry.x;
      const int64_t at = (s.r0 + r) * K_ + k;
      if constexpr (kRows == Rows::kAdded) {
        add_atomically<A, kCount>(t_.grad_rows + entry.id * t_.p.row_size() + at, d);
      } else if (!is_finished_here(place)) {
        store_staged<kCount>(t_.stage + place.own() * t_.stage_stride + at, d);
      } else {
        if (!kRagged && place.count < 0) d = sum_of_few<true>(place, at, d);
        Numbers<T, kCount> w = {};
        if (kRows == Rows::kUpdated) w = own_weights(s, entry, r, k);
        finish_row<T, kCount, kRows>(t_, entry.id, place.own(), 0, at, w, d);
      }
    }
    if constexpr (kRows == Rows::kUpdated) {
      if (t_.update.lanes == 0) update_vectors(s, first, n);
    }
  }

  // What put_rows has left: K-vectors of rows that are finished here, each by one thread.
  __device__ __forceinline__ void update_vectors(const Square& s, int first, int n) {
    for (Turns turns(s.nr); turns.row < n; turns.next()) {
      const Entry entry = this->entry(first + turns.row);
      const Place place = this->place(entry, first + turns.row);
      if (!is_finished_here(place)) continue;
      const int64_t at = (s.r0 + turns.unit) * K_;
      const auto unit = [&](int k, Numbers<T, kCount>& w, Numbers<A, kCount>& g) {
        w = own_weights(s, entry, turns.unit, k);
        g = gradient(s, entry, turns.unit, k);
#pragma unroll
        for (int j = 0; j < kCount; ++j) g.x[j] *= entry.x;
        if (!kRagged && place.count < 0) g = sum_of_few<true>(place, at + k, g);
      };
      update_vector<kCount>(t_.update, entry.id, at, unit);
    }
  }

  const BackwardTask<T>& t_;
  int F_, K_, units_;
  int64_t b_;
  int64_t begin_ = 0;
  int size_ = 0;
  unsigned* came_last_;  // [warps]
  int64_t* ids_;         // [F] the row of a field's only entry
  Place* places_;        // [F] of one-hot samples
  A* scale_;             // [F] its value; 1 for a sum
  Kept* squares_;        // [squares, tile, stride]
  int* ends_;            // [F] where a field's entries end
  int32_t* order_;       // the sample's entries by field
};

template <typename T, int kCount, bool kRagged, Rows kRows>
__global__ void __launch_bounds__(kMaxSampleThreads<T, kRagged>, sizeof(T) > 4 ? 1 : 2)
    backward_samples(const BackwardTask<T> task) {
  GPU_DYNAMIC_SHARED(shared);
  constexpr int kWarps = kMaxSampleThreads<T, kRagged> / 32;
  GPU_SHARED(unsigned[kWarps], came_last);
  SampleGradients<T, kCount, kRagged, kRows>(task, shared, came_last).run();
}

// Sums the entries of each row among 64 places. What a row has here that began before, or goes on behind, is left as a
// partial sum: at the first place where it began before, else at the last.
template <typename T, int kCount, Rows kRows>
__global__ void __launch_bounds__(kUnitThreads) reduce_places(const BackwardTask<T> t) {
  using A = Sum<T>;
  const OwnUnit own(t.p.row_size() / kCount);
  const int64_t begin = own.row * kPlaces, i = own.unit * kCount;
  if (begin >= t.p.num_entries || *t.groups.has_many == 0) return;
  A* const stage = t.stage + i;
  const Heads heads{t.groups.heads};
  const uint64_t bits = heads.of_64(begin);
  const bool ends_here = heads.at(begin + kPlaces);
  if (ends_here && bits == ~uint64_t{0}) return;
  for (int j = 0, next = 0; j < kPlaces; j = next) {
    const uint64_t later = j + 1 < kPlaces ? bits >> (j + 1) : 0;
    next = later ? j + __ffsll(static_cast<long long>(later)) : static_cast<int>(kPlaces);
    const bool begins = bits >> j & 1, ends = next < kPlaces || ends_here;
    // It has its row to itself, or counts for nothing.
    if (begins && ends && next == j + 1) continue;
    // What is needed at last is on its way while the sum is made.
    const int64_t row = t.groups.rows[begin + j];
    Numbers<T, kCount> w = {};
    if (kRows == Rows::kUpdated && begins && ends) w = load_numbers<kCount>(t.update.weight(row, i));
    Numbers<A, kCount> sum = load_staged<kCount>(stage + (begin + j) * t.stage_stride);
#pragma unroll 4
    for (int place = j + 1; place < next; ++place) {
      add<A, kCount>(sum, load_staged<kCount>(stage + (begin + place) * t.stage_stride));
    }
    if (begins && ends) {
      finish_row<T, kCount, kRows>(t, row, begin + j, begin + next - 1, i, w, sum);
    } else {
      const int64_t at = begins ? begin + kPlaces - 1 : begin;
      store_staged<kCount>(stage + at * t.stage_stride, sum);
    }
  }
}

// The same for 64 neighbouring pieces of `step` places each, whose partial sums are left.
template <typename T, int kCount, Rows kRows>
__global__ void __launch_bounds__(kUnitThreads) reduce_partials(const BackwardTask<T> t, int64_t step) {
  using A = Sum<T>;
  const OwnUnit own(t.p.row_size() / kCount);
  const int64_t n = t.p.num_entries, begin = own.row * kPlaces * step, i = own.unit * kCount;
  if (begin >= n || *t.groups.has_many == 0) return;
  A* const stage = t.stage + i;
  const Heads heads{t.groups.heads};
  const uint32_t* const rows = t.groups.rows;
  // Bit j: whether a row goes on from piece j to the next. All are asked for at once.
  uint64_t going_on = 0;
#pragma unroll 16
  for (int j = 0; j < kPlaces; ++j) {
    const int64_t behind = begin + (j + 1) * step;
    if (behind < n && !heads.at(behind)) going_on |= uint64_t{1} << j;
  }
  Numbers<A, kCount> sum = {};
  bool is_open = false, began = false, goes_on = !heads.at(begin);
  if (!goes_on && going_on == 0) return;
  int64_t place = begin;
  for (; place < min(begin + kPlaces * step, n); place += step, going_on >>= 1) {
    const int64_t behind = place + step;
    const bool came = goes_on;
    goes_on = going_on & 1;
    if (!came && !goes_on) continue;
    const bool goes_through = came && goes_on && rows[place] == rows[behind - 1];
    if (came) {
      const Numbers<A, kCount> partial = load_staged<kCount>(stage + place * t.stage_stride);
      if (is_open) {
        add<A, kCount>(sum, partial);
      } else {
        sum = partial;
      }
      is_open = true;
      if (goes_through) continue;
      if (began) {
        int64_t last = place;
        if (kRows == Rows::kUpdated && t.update.lanes == 0) {
          while (!heads.at(last + 1)) ++last;
        }
        Numbers<T, kCount> w = {};
        if (kRows == Rows::kUpdated) w = load_numbers<kCount>(t.update.weight(rows[place], i));
        finish_row<T, kCount, kRows>(t, rows[place], place, last, i, w, sum);
      } else {
        store_staged<kCount>(stage + begin * t.stage_stride, sum);
      }
      is_open = began = false;
    }
    if (!goes_on) continue;
    sum = load_staged<kCount>(stage + (behind - 1) * t.stage_stride);
    is_open = began = true;
  }
  if (is_open) store_staged<kCount>(stage + (began ? place - 1 : begin) * t.stage_stride, sum);
}

// The rows whose sums lie at the places of their last entries: a K-vector by one thread.
template <typename T, int kCount>
__global__ void __launch_bounds__(kUnitThreads, 4) update_sums(const BackwardTask<T> t) {
  const OwnUnit own(t.p.num_fields);
  if (own.row >= t.p.num_entries || *t.groups.has_many == 0) return;
  const Heads heads{t.groups.heads};
  if (heads.at(own.row) || !heads.at(own.row + 1)) return;
  const int64_t row = t.groups.rows[own.row], i = own.unit * t.p.embed_dim;
  const Sum<T>* const sum = t.stage + own.row * t.stage_stride + i;
  update_vector<kCount>(t.update, row, i, [&](int k, Numbers<T, kCount>& w, Numbers<Sum<T>, kCount>& g) {
    w = load_numbers<kCount>(t.update.weight(row, i + k));
    g = load_staged<kCount>(sum + k);
  });
}

// How samples lie in shared memory; false: they do not fit.
template <typename T>
bool sample_layout(const Device& device, const Problem& p, int count, SampleLayout* layout) {
  const int64_t F = p.num_fields, K = p.embed_dim;
  const int64_t number_bytes = p.fields ? sizeof(Sum<T>) : sizeof(T), unit_bytes = count * number_bytes;
  layout->copy_bytes = common_alignment(K * static_cast<int64_t>(sizeof(T)), p.weight);
  const int unit = static_cast<int>(std::max<int64_t>(unit_bytes, p.fields ? 0 : layout->copy_bytes));
  const int64_t row_limit = device.shared_bytes;
  const auto fit = [&](int64_t tile, int64_t squares, int64_t limit) {
    const int64_t row_bytes = tile * K * number_bytes;
    if (row_bytes > row_limit) return false;
    const int lanes = lanes_a_vector(K * number_bytes / unit);
    const int64_t stride = (conflict_free_stride(static_cast<int>(row_bytes), unit, lanes) + unit - 1) / unit * unit;
    layout->tile = static_cast<int>(tile);
    layout->squares = static_cast<int>(squares);
    layout->num_tiles = static_cast<int>((F + tile - 1) / tile);
    layout->stride = static_cast<int>(stride / number_bytes);
    layout->order_capacity = p.fields ? static_cast<int>(2 * F) : 0;
    const int64_t bytes = squares * tile * stride + (F + F % 2) * 8 + (F + 3) / 4 * 4 * sizeof(Sum<T>) +
                          (p.fields ? (F + layout->order_capacity) * 4 : (F + F % 2) * 8);
    layout->bytes = static_cast<size_t>(bytes);
    // A thread has about a dozen units of a tile.
    const int64_t threads = (squares * tile * tile * (K / count) / 12 + 31) / 32 * 32;
    const int64_t most = p.fields ? kMaxSampleThreads<T, true> : kMaxSampleThreads<T, false>;
    layout->threads = static_cast<int>(std::min(most, std::max<int64_t>(64, threads)));
    return bytes <= limit;
  };
  // Two blocks a multiprocessor at least: one copies while the other works.
  if (fit(F, 1, device.shared_bytes / 2)) return true;
  for (int64_t tiles = 2; tiles < F; ++tiles) {
    if (fit((F + tiles - 1) / tiles, 2, device.shared_bytes / 3)) return true;
  }
  return fit(1, F > 1 ? 2 : 1, device.shared_bytes);
}

template <typename T>
struct BackwardWorkspace {
  BackwardWorkspace(const Problem& p, bool has_groups, void* memory) {
    Pieces pieces(memory);
    const size_t n = static_cast<size_t>(p.num_entries);
    // Rows begin at sectors of the cache.
    constexpr int64_t kSector = 32 / sizeof(Sum<T>);
    stage_stride = (p.row_size() + kSector - 1) / kSector * kSector;
    if (has_groups) stage = pieces.take<Sum<T>>(n * stage_stride);
    value_sums = pieces.take<Sum<T>>(n);
    if (p.fields) order = pieces.take<int32_t>(n);
    is_falling = pieces.take<int32_t>(1);
    bytes = pieces.used();
  }
  Sum<T>*stage = nullptr, *value_sums;
  int64_t stage_stride;
  int32_t *order = nullptr, *is_falling;
  size_t bytes;
};

template <typename T, int kCount, Rows kRows>
cudaError_t launch_reduction(const BackwardTask<T>& task, cudaStream_t stream) {
  const Problem& p = task.p;
  const int64_t units = p.row_size() / kCount;
  cudaError_t error =
      GPU_LAUNCH((reduce_places<T, kCount, kRows>), unit_blocks((p.num_entries + kPlaces - 1) / kPlaces, units),
                 kUnitThreads, 0, stream, task);
  for (int64_t step = kPlaces; error == cudaSuccess && step < p.num_entries; step *= kPlaces) {
    const int64_t pieces = (p.num_entries + step * kPlaces - 1) / (step * kPlaces);
    error = GPU_LAUNCH((reduce_partials<T, kCount, kRows>), unit_blocks(pieces, units), kUnitThreads, 0, stream, task,
                       step);
  }
  if constexpr (kRows == Rows::kUpdated) {
    if (error == cudaSuccess && task.update.lanes == 0) {
      error =
          GPU_LAUNCH((update_sums<T, kCount>), unit_blocks(p.num_entries, p.num_fields), kUnitThreads, 0, stream, task);
    }
  }
  return error;
}

template <typename T, int kCount, Rows kRows>
cudaError_t launch_backward(const BackwardTask<T>& task, cudaStream_t stream) {
  const Problem& p = task.p;
  const auto launch = [&](auto* kernel) {
    const cudaError_t error = use_shared_memory(kernel, task.layout.bytes);
    if (error != cudaSuccess) return error;
    return GPU_LAUNCH(kernel, static_cast<unsigned>(p.batch_size), task.layout.threads, task.layout.bytes, stream,
                      task);
  };
  cudaError_t error =
      p.fields ? launch(backward_samples<T, kCount, true, kRows>) : launch(backward_samples<T, kCount, false, kRows>);
  if constexpr (kRows == Rows::kAdded) {
    return error;
  } else {
    return error != cudaSuccess || !task.groups.places ? error : launch_reduction<T, kCount, kRows>(task, stream);
  }
}

template <typename T>
size_t backward_bytes(const Problem& p, bool has_groups) {
  return BackwardWorkspace<T>(p, has_groups, nullptr).bytes;
}

template <typename T>
const char* backward(const Problem& p, const Gradient& grad, const RowGroups* groups, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Device device;
  cudaError_t error = current_device(&device);
  const bool is_added = grad.grad_rows && groups == nullptr;
  if (is_added && sizeof(T) == 2) return "gradients of half precision are not added atomically";
  if (error == cudaSuccess && grad.grad_rows && (is_added || !groups->numbers)) {
    error = cudaMemsetAsync(grad.grad_rows, 0, p.num_features * p.row_size() * sizeof(T), stream);
  }
  if (error == cudaSuccess && grad.grad_values) {
    error = cudaMemsetAsync(grad.grad_values, 0, p.num_entries * sizeof(T), stream);
  }
  if (error != cudaSuccess || p.batch_size == 0 || p.num_entries == 0) return error_text(error);
  if (p.batch_size > INT32_MAX || p.num_entries > INT32_MAX) return "a batch of 2^31 or more samples or entries";

  // How many numbers are worked on at a time: 16 bytes of their sums, where everything is aligned to that.
  constexpr int kWide = kWideCount<T>;
  const bool is_wide = p.embed_dim % kWide == 0 && is_aligned(p.weight, kWide * sizeof(T)) &&
                       (p.output != Output::kHadamard || is_aligned(grad.grad_output, kWide * sizeof(T))) &&
                       is_aligned(grad.grad_rows, kWide * sizeof(T)) &&
                       (grad.update == nullptr || has_aligned_states(*grad.update));
  const int count = is_wide ? kWide : 1;

  BackwardTask<T> task;
  task.p = p;
  if (!sample_layout<T>(device, p, count, &task.layout)) {
    return "so many fields or such long K-vectors do not fit into shared memory";
  }
  task.grad_output = static_cast<const T*>(grad.grad_output);
  task.grad_values = static_cast<T*>(grad.grad_values);
  task.grad_rows = static_cast<T*>(grad.grad_rows);
  if (grad.update) task.update = RowUpdate<T>(*grad.update, p.embed_dim / count);
  if (groups) task.groups = *groups;
  const BackwardWorkspace<T> lists(p, groups != nullptr, workspace);
  task.stage = lists.stage;
  task.stage_stride = lists.stage_stride;
  task.order = lists.order;
  if (grad.grad_values && task.layout.num_tiles > 1) task.value_sums = lists.value_sums;
  if (p.offsets) {
    task.is_falling = lists.is_falling;
    if (const char* text = find_falling_offsets(p, lists.is_falling, stream)) return text;
  }
  const auto launch = [&](auto numbers) {
    if (grad.update) return launch_backward<T, numbers(), Rows::kUpdated>(task, stream);
    if constexpr (sizeof(T) > 2) {
      if (is_added) return launch_backward<T, numbers(), Rows::kAdded>(task, stream);
    }
    return launch_backward<T, numbers(), Rows::kStored>(task, stream);
  };
  return error_text(is_wide ? launch(std::integral_constant<int, kWide>{}) : launch(std::integral_constant<int, 1>{}));
}

template size_t backward_bytes<FFM_DTYPE>(const Problem&, bool);
template const char* backward<FFM_DTYPE>(const Problem&, const Gradient&, const RowGroups*, void*, void*);

}  // namespace ffm::cuda
