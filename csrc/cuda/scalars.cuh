// SPDX-License-Identifier: MIT
// Numbers as they are stored, as they are summed, and read several at a time.
#pragma once

#include "../params.h"
#include "cuda/gpu_compat.h"

namespace ffm::cuda {

// What numbers of a type are summed in.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ double load(const double* p) { return *p; }
__device__ __forceinline__ float load(const BFloat16* p) { return gpu::bfloat16_to_float(p->bits); }
__device__ __forceinline__ float load(const Float16* p) { return gpu::float16_to_float(p->bits); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(BFloat16* p, float x) { p->bits = gpu::float_to_bfloat16(x); }
__device__ __forceinline__ void store(Float16* p, float x) { p->bits = gpu::float_to_float16(x); }

// So many bytes, aligned to as many, in one access.
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

// The numbers of kBytes of T, as they are summed.
template <typename T, int kBytes>
struct Unit {
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(T));
  Sum<T> x[kCount];
};

__device__ __forceinline__ float2 unpack(uint32_t bits, BFloat16) { return gpu::bfloat16x2_to_floats(bits); }
__device__ __forceinline__ float2 unpack(uint32_t bits, Float16) { return gpu::float16x2_to_floats(bits); }
__device__ __forceinline__ uint32_t pack(float a, float b, BFloat16) { return gpu::floats_to_bfloat16x2(a, b); }
__device__ __forceinline__ uint32_t pack(float a, float b, Float16) { return gpu::floats_to_float16x2(a, b); }

template <typename T, int kBytes>
__device__ __forceinline__ Unit<T, kBytes> unpack_unit(const typename Bits<kBytes>::type& raw) {
  Unit<T, kBytes> unit;
  if constexpr (sizeof(T) > 2) {
    __builtin_memcpy(unit.x, &raw, kBytes);
  } else if constexpr (kBytes == 2) {
    T one;
    __builtin_memcpy(&one, &raw, kBytes);
    unit.x[0] = load(&one);
  } else {
    uint32_t words[kBytes / 4];
    __builtin_memcpy(words, &raw, kBytes);
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      const float2 two = unpack(words[i], T{});
      unit.x[2 * i] = two.x;
      unit.x[2 * i + 1] = two.y;
    }
  }
  return unit;
}

template <typename T, int kBytes>
__device__ __forceinline__ Unit<T, kBytes> load_unit(const void* p) {
  return unpack_unit<T, kBytes>(*static_cast<const typename Bits<kBytes>::type*>(p));
}

template <typename T, int kBytes>
__device__ __forceinline__ void store_unit(void* p, const Unit<T, kBytes>& unit) {
  using Raw = typename Bits<kBytes>::type;
  Raw raw;
  if constexpr (sizeof(T) > 2) {
    __builtin_memcpy(&raw, unit.x, kBytes);
  } else if constexpr (kBytes == 2) {
    T one;
    store(&one, unit.x[0]);
    __builtin_memcpy(&raw, &one, kBytes);
  } else {
    uint32_t words[kBytes / 4];
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words[i] = pack(unit.x[2 * i], unit.x[2 * i + 1], T{});
    __builtin_memcpy(&raw, words, kBytes);
  }
  *static_cast<Raw*>(p) = raw;
}

// The sum of a * b, added to `sum` in the order of the numbers.
template <typename T, int kBytes>
__device__ __forceinline__ Sum<T> dot(const Unit<T, kBytes>& a, const Unit<T, kBytes>& b, Sum<T> sum = 0) {
#pragma unroll
  for (int i = 0; i < Unit<T, kBytes>::kCount; ++i) sum += a.x[i] * b.x[i];
  return sum;
}

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(__int_as_float(0x7fc00000));
}

// Over `kLanes` neighbouring lanes, in all of them. Every lane of the warp takes part.
template <typename A>
__device__ __forceinline__ A sum_lanes(A x, int lanes = 32) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

}  // namespace ffm::cuda
