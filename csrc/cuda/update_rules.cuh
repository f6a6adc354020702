// SPDX-License-Identifier: MIT
// How rows of a table are updated: a unit of neighbouring weights at a time, by one thread.
#pragma once

#include "../optimizer.h"
#include "scalars.cuh"

namespace ffm::cuda {

constexpr int kUnitThreads = 256;

// 1 / sqrt(v) for v >= 0, to the last bit or two; a large finite number where v is 0.
__device__ __forceinline__ float inverse_sqrt(float v) { return rsqrtf(v < 0x1p-126f ? 0x1p-126f : v); }
__device__ __forceinline__ double inverse_sqrt(double v) { return 1 / sqrt(v < 0x1p-1022 ? 0x1p-1022 : v); }
template <typename A>
__device__ __forceinline__ A twice_inverse_sqrt(A v) {
  return 2 * inverse_sqrt(v);
}
template <typename A>
__device__ __forceinline__ A square_root(A v) {
  return v * inverse_sqrt(v);
}

#include "../update_rules.h"

// kCount numbers of a table of T, or of its sums and states, as they are summed.
template <typename T, int kCount>
using Numbers = Unit<T, kCount* static_cast<int>(sizeof(T))>;

template <int kCount, typename T>
__device__ __forceinline__ Numbers<T, kCount> load_numbers(const T* p) {
  return load_unit<T, kCount* static_cast<int>(sizeof(T))>(p);
}
template <int kCount, typename T>
__device__ __forceinline__ void store_numbers(T* p, const Numbers<T, kCount>& numbers) {
  store_unit<T, kCount* static_cast<int>(sizeof(T))>(p, numbers);
}

// To global memory, in one access for certain: what nvcc takes apart it does not always put together again.
template <int kCount, typename T>
__device__ __forceinline__ void store_global(T* p, const Numbers<T, kCount>& numbers) {
  if constexpr (kCount == 1) {
    store(p, numbers.x[0]);
  } else if constexpr (std::is_same_v<T, float>) {
    static_assert(kCount == 4);
    __stwb(reinterpret_cast<float4*>(p), make_float4(numbers.x[0], numbers.x[1], numbers.x[2], numbers.x[3]));
  } else if constexpr (std::is_same_v<T, double>) {
    static_assert(kCount == 2);
    __stwb(reinterpret_cast<double2*>(p), make_double2(numbers.x[0], numbers.x[1]));
  } else {
    static_assert(kCount == 4);
    __stwb(reinterpret_cast<uint2*>(p), make_uint2(pack_word<T>(numbers.x), pack_word<T>(numbers.x + 2)));
  }
}

// A table in place, its optimizer and its numbers, made on the host.
template <typename T>
struct RowUpdate {
  using A = Sum<T>;

  RowUpdate() = default;
  // Vectors of so many units.
  RowUpdate(const Update& update, int64_t units)
      : table(update.table),
        optimizer(update.optimizer),
        sgd(update.optimizer),
        ada_grad(update.optimizer),
        adam(update.optimizer),
        ftrl(update.optimizer) {
    if (optimizer.kind != OptimizerKind::kVectorAdaGrad) return;
    const bool fits_warp = units <= 32 && (units & (units - 1)) == 0;
    lanes = fits_warp ? static_cast<int>(units) : 0;
  }

  UpdatedTable table;
  Optimizer optimizer;
  Sgd<A> sgd{Optimizer()};
  AdaGrad<A> ada_grad{Optimizer()};
  Adam<A> adam{Optimizer()};
  Ftrl<A> ftrl{Optimizer()};
  // Neighbouring threads that update a K-vector together; 0: one thread does it, with update_vector.
  int lanes = 1;

  __device__ __forceinline__ T* weight(int64_t row, int64_t i) const {
    return static_cast<T*>(table.weight) + row * table.row_size + i;
  }
  // That of the K-vector that number i of a row belongs to.
  __device__ __forceinline__ A* vector_state(int64_t row, int64_t i) const {
    return static_cast<A*>(table.states[0]) + row * table.state_row_size + i / table.embed_dim;
  }
};

// Weights from place i of their row on.
template <int kCount, typename T>
__device__ __forceinline__ void store_weights(T* p, const Numbers<T, kCount>& w, const Rounding& rounding, int64_t i) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (rounding.is_stochastic()) {
      // Numbers that bfloat16 holds: storing them rounds no more.
      Numbers<T, kCount> rounded;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const uint32_t place = static_cast<uint32_t>(i) + static_cast<uint32_t>(k);
        const uint32_t random = rounding.random_bits(place * Rounding::kSpread) >> 16;
        rounded.x[k] = __uint_as_float(round_at_random(__float_as_uint(w.x[k]), random) & 0xffff0000u);
      }
      store_global<kCount>(p, rounded);
      return;
    }
  }
  store_global<kCount>(p, w);
}

template <int kCount, typename T, typename Rule>
__device__ __forceinline__ void update_numbers(const RowUpdate<T>& u, const Rule& rule, int64_t row, int64_t i,
                                               Numbers<T, kCount> w, const Numbers<Sum<T>, kCount>& g) {
  using A = Sum<T>;
  const int64_t at = row * u.table.row_size + i;
  A* const first = static_cast<A*>(u.table.states[0]) + at;
  A* const second = static_cast<A*>(u.table.states[1]) + at;
  Numbers<A, kCount> s0 = {}, s1 = {};
  if constexpr (Rule::kStates > 0) s0 = load_numbers<kCount>(first);
  if constexpr (Rule::kStates > 1) s1 = load_numbers<kCount>(second);
#pragma unroll
  for (int k = 0; k < kCount; ++k) rule.update(w.x[k], s0.x[k], s1.x[k], g.x[k]);
  store_weights<kCount>(u.weight(row, i), w, Rounding(u.optimizer, row), i);
  if constexpr (Rule::kStates > 0) store_global<kCount>(first, s0);
  if constexpr (Rule::kStates > 1) store_global<kCount>(second, s1);
}

// Weights w = weight[row, i:] move against the gradient g. Where several lanes share a K-vector, all of them come here
// together.
template <int kCount, typename T>
__device__ __forceinline__ void update_unit(const RowUpdate<T>& u, int64_t row, int64_t i, Numbers<T, kCount> w,
                                            const Numbers<Sum<T>, kCount>& g) {
  using A = Sum<T>;
  switch (u.optimizer.kind) {
    case OptimizerKind::kSgd: return update_numbers<kCount>(u, u.sgd, row, i, w, g);
    case OptimizerKind::kAdaGrad: return update_numbers<kCount>(u, u.ada_grad, row, i, w, g);
    case OptimizerKind::kAdam: return update_numbers<kCount>(u, u.adam, row, i, w, g);
    case OptimizerKind::kFtrl: return update_numbers<kCount>(u, u.ftrl, row, i, w, g);
    case OptimizerKind::kVectorAdaGrad: break;
  }
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const unsigned mask = (0xffffffffu >> (32 - u.lanes)) << (lane & ~(u.lanes - 1));
  A* const state = u.vector_state(row, i);
  const A before = *state;
  Numbers<A, kCount> gradient;
  A squares = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    gradient.x[k] = g.x[k] + u.sgd.weight_decay * w.x[k];
    squares += gradient.x[k] * gradient.x[k];
  }
  for (int step = 1; step < u.lanes; step *= 2) squares += __shfl_xor_sync(mask, squares, step);
  // All have read the state before one writes it.
  __syncwarp(mask);
  const A sum = squares * (A(1) / static_cast<A>(u.table.embed_dim)) + before;
  if ((lane & (u.lanes - 1)) == 0) *state = sum;
  const A rate = inverse_sqrt(sum);
#pragma unroll
  for (int k = 0; k < kCount; ++k) w.x[k] -= u.sgd.lr * gradient.x[k] * rate;
  store_weights<kCount>(u.weight(row, i), w, Rounding(u.optimizer, row), i);
}

// The K-vector weight[row, i:] by one thread, vector-wise: unit(j, w, g) gives its weights and its gradient from number
// j on, twice the same.
template <int kCount, typename T, typename GetUnit>
__device__ __forceinline__ void update_vector(const RowUpdate<T>& u, int64_t row, int64_t i, const GetUnit& unit) {
  using A = Sum<T>;
  const int K = static_cast<int>(u.table.embed_dim);
  Numbers<T, kCount> w;
  Numbers<A, kCount> g;
  A squares = 0;
  for (int j = 0; j < K; j += kCount) {
    unit(j, w, g);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const A gradient = g.x[k] + u.sgd.weight_decay * w.x[k];
      squares += gradient * gradient;
    }
  }
  A* const state = u.vector_state(row, i);
  const A sum = squares / static_cast<A>(K) + *state;
  *state = sum;
  const A rate = u.sgd.lr * inverse_sqrt(sum);
  const Rounding rounding(u.optimizer, row);
  for (int j = 0; j < K; j += kCount) {
    unit(j, w, g);
#pragma unroll
    for (int k = 0; k < kCount; ++k) w.x[k] -= rate * (g.x[k] + u.sgd.weight_decay * w.x[k]);
    store_weights<kCount>(u.weight(row, i + j), w, rounding, i + j);
  }
}

// Blocks of kUnitThreads, whose threads have the units of rows side by side: row `row`, unit `unit` of it.
struct OwnUnit {
  __device__ __forceinline__ explicit OwnUnit(int64_t units) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    row = thread / units;
    unit = thread - row * units;
  }
  int64_t row, unit;
};

inline unsigned unit_blocks(int64_t rows, int64_t units) {
  return static_cast<unsigned>((rows * units + kUnitThreads - 1) / kUnitThreads);
}

// How many numbers a thread works on at a time, 16 bytes of their sums, where all that it reads is aligned to as many.
template <typename T>
constexpr int kWideCount = 16 / static_cast<int>(sizeof(Sum<T>));
inline bool is_aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }
inline bool has_aligned_states(const Update& update) {
  const auto& states = update.table.states;
  return traits(update.optimizer.kind).is_vector_wise || (is_aligned(states[0], 16) && is_aligned(states[1], 16));
}

}  // namespace ffm::cuda
