// SPDX-License-Identifier: MIT
// The interaction of one-hot samples whose rows fit into shared memory. See stage_rows.cuh for how they get there.
//
// What is done with the pairs of a sample is a class: TablePairs for rows of numbers; of packed rows, see
// ffm_int8_kernels.cu.
#pragma once

#include "pairs.cuh"
#include "stage_rows.cuh"

namespace ffm::cuda {

// What the kernel is told beside the Problem.
struct OneHot {
  RingLayout ring;
  int units = 0;  // of a K-vector
  int lanes = 0;  // lanes_a_vector(units)
  int num_pairs = 0;
};

// kBytes: of a unit, that is of a read from shared memory: the largest power of two that divides a K-vector's bytes, up
// to 16. kUnits: units of a K-vector, 0 where they are known at run time only.
template <typename T, int kBytes, int kUnits>
class TablePairs {
 public:
  using Value = T;
  using A = Sum<T>;

  __device__ TablePairs(const Problem& p, const OneHot& one_hot, const Pair* pairs)
      : p_(p),
        pairs_(pairs),
        stride_(one_hot.ring.stride),
        lanes_(kUnits ? kUnits : one_hot.lanes),
        units_(kUnits ? kUnits : one_hot.units),
        num_pairs_(one_hot.num_pairs),
        lane_(static_cast<int>(threadIdx.x) % lanes_) {}

  // This thread's part of the sum over all pairs.
  __device__ __forceinline__ A sum(const unsigned char* rows, const A* values) const {
    A total = 0;
    const int step = static_cast<int>(blockDim.x) / lanes_;
#pragma unroll 4
    for (int t = static_cast<int>(threadIdx.x) / lanes_; t < num_pairs_; t += step) {
      const Pair pair = pairs_[t];
      const A d = part_of_dot(rows, pair, total, values == nullptr);
      total = values ? total + values[pair.f] * values[pair.g] * d : d;
    }
    return total;
  }

  // All pairs -> terms [P] or [P, K].
  __device__ __forceinline__ void store_terms(const unsigned char* rows, const A* values, bool is_bad, T* terms) const {
    const int step = static_cast<int>(blockDim.x) / lanes_;
    const bool is_dot = p_.output == Output::kDot;
    // Whole warps, as they add up their lanes.
    const int whole = (num_pairs_ + step - 1) / step * step;
    for (int t = static_cast<int>(threadIdx.x) / lanes_; t < whole; t += step) {
      const bool is_pair = t < num_pairs_;
      const Pair pair = pairs_[is_pair ? t : 0];
      A x = values ? values[pair.f] * values[pair.g] : A(1);
      if (is_bad) x = not_a_number<A>();
      if (is_dot) {
        const A d = sum_lanes(part_of_dot(rows, pair, 0, true), lanes_);
        if (is_pair && lane_ == 0) store(terms + t, is_bad ? x : x * d);
      } else if (is_pair) {
        T* const term = terms + static_cast<int64_t>(t) * p_.embed_dim;
        for (int u = lane_; u < units_; u += lanes_) {
          const auto a = load_unit<T, kBytes>(left(rows, pair) + u * kBytes);
          const auto b = load_unit<T, kBytes>(right(rows, pair) + u * kBytes);
          Unit<T, kBytes> h;
#pragma unroll
          for (int i = 0; i < h.kCount; ++i) h.x[i] = is_bad ? x : x * (a.x[i] * b.x[i]);
          store_unit(term + u * h.kCount, h);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ const unsigned char* left(const unsigned char* rows, Pair pair) const {
    return rows + pair.f * stride_ + pair.g * units_ * kBytes;
  }
  __device__ __forceinline__ const unsigned char* right(const unsigned char* rows, Pair pair) const {
    return rows + pair.g * stride_ + pair.f * units_ * kBytes;
  }
  // The products of this lane's units, added to `total` where they may be.
  __device__ __forceinline__ A part_of_dot(const unsigned char* rows, Pair pair, A total, bool adds) const {
    A d = adds ? total : A(0);
    const unsigned char *a = left(rows, pair), *b = right(rows, pair);
    if constexpr (kUnits > 0) {
      return dot<T, kBytes>(load_unit<T, kBytes>(a + lane_ * kBytes), load_unit<T, kBytes>(b + lane_ * kBytes), d);
    } else {
      for (int u = lane_; u < units_; u += lanes_) {
        d = dot<T, kBytes>(load_unit<T, kBytes>(a + u * kBytes), load_unit<T, kBytes>(b + u * kBytes), d);
      }
      return d;
    }
  }

  const Problem& p_;
  const Pair* pairs_;
  int stride_, lanes_, units_, num_pairs_, lane_;
};

// out as that of field_sums_forward.
template <typename Pairs, bool kIsSum>
__global__ void __launch_bounds__(256, 2) one_hot_forward(const Problem p, const OneHot one_hot, void* out) {
  using T = typename Pairs::Value;
  using A = Sum<T>;
  GPU_DYNAMIC_SHARED(shared);
  GPU_SHARED(A[2 * BlockSum<A>::kMaxWarps], warp_sums);
  SampleRing<T> ring(p, one_hot.ring, shared);
  Pair* const pair_list = reinterpret_cast<Pair*>(ring.end());
  list_pairs(pair_list, one_hot.ring.num_rows);
  ring.start();
  const Pairs pairs(p, one_hot, pair_list);
  BlockSum<A> block_sum(warp_sums);
  const int64_t step = gridDim.x, ahead = step * one_hot.ring.stages;
  for (int s = 0; s < one_hot.ring.stages; ++s) {
    ring.fetch(blockIdx.x + s * step);
    ring.copy(s, s);
  }
  int slot = 0, turn = 0;
  for (int64_t b = blockIdx.x; b < p.batch_size; b += step, ++turn) {
    ring.fetch(b + ahead);
    ring.wait(slot);
    const bool is_bad = ring.is_bad(slot, turn);
    const A* const values = p.values ? ring.values(slot) : nullptr;
    if constexpr (kIsSum) {
      block_sum.add(pairs.sum(ring.rows(slot), values), turn);
    } else {
      const int64_t width = p.output == Output::kDot ? 1 : p.embed_dim;
      const int64_t within = p.within_field ? p.num_fields : 0;
      T* const terms = static_cast<T*>(out) + b * (one_hot.num_pairs + within) * width;
      pairs.store_terms(ring.rows(slot), values, is_bad, terms);
      // No field has two entries.
      for (int64_t i = threadIdx.x; i < within * width; i += blockDim.x) {
        store(terms + one_hot.num_pairs * width + i, is_bad ? not_a_number<A>() : A(0));
      }
    }
    __syncthreads();
    ring.copy(slot, turn + one_hot.ring.stages);
    if constexpr (kIsSum) {
      if (threadIdx.x == 0) static_cast<A*>(out)[b] = is_bad ? not_a_number<A>() : block_sum.total(turn);
    }
    slot = slot + 1 == one_hot.ring.stages ? 0 : slot + 1;
  }
}

// Rows of row_bytes, whose K-vectors are `units` reads of unit_bytes each; spare_bytes: that such a read may take
// behind a row. Whether it was launched, or went wrong: the rows of a sample fit.
template <typename Pairs>
bool launch_one_hot(const Device& device, const Problem& p, int64_t row_bytes, int unit_bytes, int64_t units,
                    int spare_bytes, void* out, cudaStream_t stream, cudaError_t* error) {
  using T = typename Pairs::Value;
  const int64_t F = p.num_fields, P = F * (F - 1) / 2;
  if (P * static_cast<int64_t>(sizeof(Pair)) > device.shared_bytes) return false;
  const size_t list_bytes = static_cast<size_t>(P) * sizeof(Pair);
  const int threads = threads_for(P * units);
  OneHot one_hot;
  one_hot.lanes = lanes_a_vector(units);
  one_hot.ring = ring_layout(device, p.weight, F, row_bytes, spare_bytes, unit_bytes, one_hot.lanes, threads,
                             static_cast<int>(sizeof(Sum<T>)), list_bytes);
  if (one_hot.ring.stages == 0) return false;
  one_hot.units = static_cast<int>(units);
  one_hot.num_pairs = static_cast<int>(P);
  const auto kernel = p.output == Output::kSum ? one_hot_forward<Pairs, true> : one_hot_forward<Pairs, false>;
  const size_t shared_bytes = one_hot.ring.bytes() + list_bytes;
  unsigned blocks = 0;
  *error = resident_blocks(device, kernel, threads, shared_bytes, p.batch_size, &blocks);
  if (*error == cudaSuccess) {
    *error = GPU_LAUNCH(kernel, blocks, threads, shared_bytes, stream, p, one_hot, out);
  }
  return true;
}

}  // namespace ffm::cuda
