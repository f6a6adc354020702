// SPDX-License-Identifier: MIT
// What kernels do with the pairs of a sample, whatever its rows are: who works on which pair, and sums over a block.
//
// A K-vector is read in units, its factors by `lanes` neighbouring threads: as many as the largest power of two that
// divides its units, up to a warp. Neighbouring threads then read without bank conflicts, along a row as it lies, and
// across rows as conflict_free_stride lays them out.
#pragma once

#include "scalars.cuh"

namespace ffm::cuda {

inline int lanes_a_vector(int64_t units) {
  int lanes = 1;
  while (lanes < 32 && units % (2 * lanes) == 0) lanes *= 2;
  return lanes;
}

// Threads of a block for samples of so many units of pairs: enough to be quick, few enough to have work each.
inline int threads_for(int64_t units) { return units <= 256 ? 32 : units <= 768 ? 64 : units <= 2048 ? 128 : 256; }

// The fields f < g of a pair.
struct alignas(4) Pair {
  uint16_t f, g;
};

// All pairs of F fields in their order. By all threads; a barrier has to follow.
__device__ __forceinline__ void list_pairs(Pair* pairs, int F) {
  const int warp = static_cast<int>(threadIdx.x) / 32, num_warps = static_cast<int>(blockDim.x) / 32;
  for (int f = warp; f < F - 1; f += num_warps) {
    for (int g = f + 1 + static_cast<int>(threadIdx.x) % 32; g < F; g += 32) {
      pairs[pair_index(f, g, F)] = {static_cast<uint16_t>(f), static_cast<uint16_t>(g)};
    }
  }
}

// The sum over a block, twice: what thread `t` of a warp has is added up by halves, then warp by warp, always in the
// same order. `turn` alternates between two places, so that one barrier a turn is enough.
template <typename A>
class BlockSum {
 public:
  static constexpr int kMaxWarps = 8;

  __device__ explicit BlockSum(A* shared) : warps_(shared) {}

  // By all threads, before a barrier.
  __device__ __forceinline__ void add(A x, int turn) {
    x = sum_lanes(x);
    if (threadIdx.x % 32 == 0) warps_[(turn & 1) * kMaxWarps + threadIdx.x / 32] = x;
  }
  // By one thread, after it.
  __device__ __forceinline__ A total(int turn) const {
    A sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += warps_[(turn & 1) * kMaxWarps + w];
    return sum;
  }

 private:
  A* warps_;
};

}  // namespace ffm::cuda
