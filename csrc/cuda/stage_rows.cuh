// SPDX-License-Identifier: MIT
// The table's rows that samples name, in shared memory: copied asynchronously, several samples ahead.
//
// One-hot samples. A block works on one sample after the other, and keeps as many slots as it has samples in flight; a
// slot is a sample's F rows, whole as they lie in the table, so that each byte is read once and 16 of them at a time. A
// row is one bulk copy that ends at a barrier (sm_90), or many cp.async by neighbouring threads. Where rows lie, and
// how they are copied, is decided on the host: RingLayout.
#pragma once

#include <cstddef>

#include "launch.h"
#include "scalars.cuh"

namespace ffm::cuda {

struct RingLayout {
  int num_rows = 0;  // a sample
  int row_bytes = 0;
  int stride = 0;      // bytes from row to row
  int copy_bytes = 0;  // of a cp.async; 2 where rows are not even aligned to 4; 0: bulk copies
  int copy_lanes = 0;  // threads that copy a row; a power of two
  int stages = 0;      // slots, 1 to 4
  int sum_bytes = 0;   // of a value

  int slot_bytes() const { return num_rows * stride; }
  size_t bytes() const {
    return static_cast<size_t>(stages) * (slot_bytes() + 8 + num_rows * sum_bytes + sizeof(int)) + 32;
  }
};

// So that rows which are read `column by column` meet no bank twice: neighbouring lanes read `lanes` units of `unit`
// bytes in a row, then as many of the next row.
inline int conflict_free_stride(int row_bytes, int unit, int lanes) {
  const int round = std::max(unit, 4);
  int units = (row_bytes + round - 1) / round;
  if (lanes * round < 128) {
    while (units % (2 * lanes) != lanes) ++units;
  }
  return units * round;
}

// Threads a row for cp.async, by `threads` threads in all: the number that needs the fewest turns.
inline int best_copy_lanes(int num_rows, int pieces_a_row, int threads) {
  int best = 1;
  int64_t fewest = INT64_MAX;
  for (int lanes = 1; lanes <= 32; lanes *= 2) {
    const int64_t rows_a_turn = threads / lanes;
    const int64_t turns = (num_rows + rows_a_turn - 1) / rows_a_turn * ((pieces_a_row + lanes - 1) / lanes);
    if (turns <= fewest) {
      fewest = turns;
      best = lanes;
    }
  }
  return best;
}

// Rows of row_bytes, with spare_bytes behind each, that are read in units of `unit` bytes, `lanes` of them to a
// K-vector. No slot fits: stages is 0.
inline RingLayout ring_layout(const Device& device, const void* table, int64_t num_rows, int64_t row_bytes,
                              int spare_bytes, int unit, int lanes, int threads, int sum_bytes, size_t other_bytes) {
  RingLayout layout;
  if (num_rows * row_bytes > device.shared_bytes) return layout;
  layout.num_rows = static_cast<int>(num_rows);
  layout.row_bytes = static_cast<int>(row_bytes);
  layout.stride = conflict_free_stride(layout.row_bytes + spare_bytes, unit, lanes);
  layout.sum_bytes = sum_bytes;
  layout.copy_bytes = common_alignment(row_bytes, table);
  // Copies want their alignment of the rows in shared memory too.
  layout.stride = (layout.stride + layout.copy_bytes - 1) / layout.copy_bytes * layout.copy_bytes;
  if (device.has_bulk_copies && layout.copy_bytes == 16) {
    layout.copy_bytes = 0;
    layout.copy_lanes = 1;
  } else {
    layout.copy_lanes = best_copy_lanes(layout.num_rows, layout.row_bytes / layout.copy_bytes, threads);
  }
  // Two slots keep copies going while one is worked on; more where even all blocks together have little in flight.
  constexpr int64_t kInFlight = 64 << 10;
  const int64_t blocks = std::min(32, 2048 / threads);
  const auto fits = [&](int stages) {
    layout.stages = stages;
    return layout.bytes() + other_bytes <= static_cast<size_t>(device.shared_bytes);
  };
  int stages = 2;
  while (stages < 4 && stages * blocks * layout.slot_bytes() < kInFlight) ++stages;
  while (stages > 0 && !fits(stages)) --stages;
  layout.stages = stages;
  return layout;
}

// T: what values are stored in.
template <typename T>
class SampleRing {
 public:
  using A = Sum<T>;

  __device__ SampleRing(const Problem& p, const RingLayout& layout, unsigned char* shared)
      : p_(p), layout_(layout), slots_(shared) {
    unsigned char* rest = shared + static_cast<size_t>(layout.stages) * layout.num_rows * layout.stride;
    rest += -reinterpret_cast<uintptr_t>(rest) & 15;
    barriers_ = reinterpret_cast<uint64_t*>(rest);
    values_ = reinterpret_cast<A*>(barriers_ + layout.stages);
    bad_turns_ = reinterpret_cast<int*>(values_ + layout.stages * layout.num_rows);
  }
  // What shared memory has behind, aligned to 4 bytes.
  __device__ unsigned char* end() const { return reinterpret_cast<unsigned char*>(bad_turns_ + layout_.stages); }

  // By all threads, before anything else. What they wrote to shared memory before is there for all afterwards.
  __device__ void start() {
    for (int i = threadIdx.x; i < layout_.stages; i += blockDim.x) {
      bad_turns_[i] = -1;
#if GPU_HAS_BULK_COPIES
      // Every 32 rows arrive once.
      if (is_bulk()) barrier(i).init((layout_.num_rows + 31) / 32);
#endif
    }
    __syncthreads();
  }

  // Asks for the ids and values of sample b, for the copy that follows. No sample from B on.
  __device__ __forceinline__ void fetch(int64_t b) {
    sample_ = b;
    if (b >= p_.batch_size) return;
#pragma unroll
    for (int i = 0; i < kFetched; ++i) {
      const int r = row_of_turn(i);
      if (r < layout_.num_rows) fetch_row(r, ids_[i], x_[i]);
    }
  }

  // Begins to copy the sample that was fetched, the turn-th of this block (from 0). All threads are done with what the
  // slot held.
  __device__ __forceinline__ void copy(int slot, int turn) {
    if (sample_ < p_.batch_size) {
      int i = 0;
#pragma unroll
      for (; i < kFetched; ++i) {
        if (first_row_of_turn(i) < layout_.num_rows) copy_row(slot, turn, row_of_turn(i), ids_[i], x_[i]);
      }
      for (; first_row_of_turn(i) < layout_.num_rows; ++i) {
        const int r = row_of_turn(i);
        int64_t id = 0;
        A x = 0;
        if (r < layout_.num_rows) fetch_row(r, id, x);
        copy_row(slot, turn, r, id, x);
      }
    }
    if (!is_bulk()) gpu::copy_async_commit();
  }

  // Until the next sample is in its slot, for all threads. Slots come in turn, and each had its copy, even past the
  // last sample.
  __device__ __forceinline__ void wait(int slot) {
#if GPU_HAS_BULK_COPIES
    if (is_bulk()) {
      barrier(slot).wait(parity_);
      if (slot + 1 == layout_.stages) parity_ ^= 1;
      return;
    }
#endif
    switch (layout_.stages) {
      case 1: gpu::copy_async_wait<0>(); break;
      case 2: gpu::copy_async_wait<1>(); break;
      case 3: gpu::copy_async_wait<2>(); break;
      default: gpu::copy_async_wait<3>(); break;
    }
    __syncthreads();
  }

  __device__ __forceinline__ const unsigned char* rows(int slot) const {
    return slots_ + static_cast<size_t>(slot) * layout_.num_rows * layout_.stride;
  }
  // Only where the batch has values.
  __device__ __forceinline__ const A* values(int slot) const { return values_ + slot * layout_.num_rows; }
  // Whether an id of the sample is outside the table; its row was not copied.
  __device__ __forceinline__ bool is_bad(int slot, int turn) const { return bad_turns_[slot] == turn; }

 private:
  static constexpr int kFetched = 4;

  __device__ __forceinline__ bool is_bulk() const {
#if GPU_HAS_BULK_COPIES
    return layout_.copy_bytes == 0;
#else
    return false;
#endif
  }
  __device__ __forceinline__ int first_row_of_turn(int i) const {
    return static_cast<int>(i * blockDim.x + threadIdx.x / 32 * 32) / layout_.copy_lanes;
  }
  __device__ __forceinline__ int row_of_turn(int i) const {
    return static_cast<int>(i * blockDim.x + threadIdx.x) / layout_.copy_lanes;
  }

  __device__ __forceinline__ void fetch_row(int r, int64_t& id, A& x) const {
    const int64_t e = sample_ * layout_.num_rows + r;
    id = p_.indices[e];
    if (p_.values) x = load(static_cast<const T*>(p_.values) + e);
  }

  // By a whole warp; r may be past the last row.
  __device__ __forceinline__ void copy_row(int slot, int turn, int r, int64_t id, A x) {
    const bool is_row = r < layout_.num_rows;
    const bool is_good = is_row && static_cast<uint64_t>(id) < static_cast<uint64_t>(p_.num_features);
    const int lane = static_cast<int>(threadIdx.x) & (layout_.copy_lanes - 1);
    if (is_row && lane == 0) {
      if (!is_good) atomicExch(bad_turns_ + slot, turn);
      if (p_.values) values_[slot * layout_.num_rows + r] = x;
    }
    unsigned char* const to = slots_ + (static_cast<size_t>(slot) * layout_.num_rows + r) * layout_.stride;
    const unsigned char* const from =
        static_cast<const unsigned char*>(p_.weight) + (is_good ? id : 0) * layout_.row_bytes;
#if GPU_HAS_BULK_COPIES
    if (is_bulk()) {
      const int num_good = __popc(__ballot_sync(0xffffffffu, is_good));
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier(slot).arrive_expect_bytes(num_good * layout_.row_bytes);
      __syncwarp();
      if (is_good) gpu::copy_bulk_async(to, from, layout_.row_bytes, barrier(slot));
      return;
    }
#endif
    if (!is_good) return;
    const int step = layout_.copy_lanes;
    switch (layout_.copy_bytes) {
      case 16:
        for (int i = 16 * lane; i < layout_.row_bytes; i += 16 * step) gpu::copy_async<16>(to + i, from + i);
        break;
      case 8:
        for (int i = 8 * lane; i < layout_.row_bytes; i += 8 * step) gpu::copy_async<8>(to + i, from + i);
        break;
      case 4:
        for (int i = 4 * lane; i < layout_.row_bytes; i += 4 * step) gpu::copy_async<4>(to + i, from + i);
        break;
      default:
        for (int i = 2 * lane; i < layout_.row_bytes; i += 2 * step) {
          *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
        }
    }
  }

#if GPU_HAS_BULK_COPIES
  __device__ __forceinline__ gpu::Barrier& barrier(int slot) const {
    return reinterpret_cast<gpu::Barrier*>(barriers_)[slot];
  }
#endif

  const Problem& p_;
  const RingLayout& layout_;
  unsigned char* slots_;
  uint64_t* barriers_;
  A* values_;
  int* bad_turns_;
  int64_t sample_ = 0;
  unsigned parity_ = 0;
  int64_t ids_[kFetched];
  A x_[kFetched];
};

}  // namespace ffm::cuda
