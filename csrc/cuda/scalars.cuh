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

// Bits as numbers and back, one by one: what is copied as a whole, nvcc moves byte by byte.
template <typename T>
__device__ __forceinline__ void unpack_word(uint32_t bits, Sum<T>* x) {
  if constexpr (sizeof(T) == 4) {
    *x = __uint_as_float(bits);
  } else {
    const float2 two = unpack(bits, T{});
    x[0] = two.x;
    x[1] = two.y;
  }
}
template <typename T>
__device__ __forceinline__ uint32_t pack_word(const Sum<T>* x) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(*x);
  } else {
    return pack(x[0], x[1], T{});
  }
}

template <typename T, int kBytes>
__device__ __forceinline__ Unit<T, kBytes> unpack_unit(typename Bits<kBytes>::type raw) {
  constexpr int kPerWord = sizeof(T) < 4 ? 2 : 1;
  const auto unpack_double = [](uint32_t low, uint32_t high) {
    return __longlong_as_double(static_cast<long long>(static_cast<uint64_t>(high) << 32 | low));
  };
  Unit<T, kBytes> unit;
  if constexpr (kBytes == 2) {
    const T one = {raw};
    unit.x[0] = load(&one);
  } else if constexpr (kBytes == 4) {
    unpack_word<T>(raw, unit.x);
  } else if constexpr (sizeof(T) == 8) {
    unit.x[0] = unpack_double(raw.x, raw.y);
    if constexpr (kBytes == 16) unit.x[1] = unpack_double(raw.z, raw.w);
  } else {
    unpack_word<T>(raw.x, unit.x);
    unpack_word<T>(raw.y, unit.x + kPerWord);
    if constexpr (kBytes == 16) {
      unpack_word<T>(raw.z, unit.x + 2 * kPerWord);
      unpack_word<T>(raw.w, unit.x + 3 * kPerWord);
    }
  }
  return unit;
}

// Not by unpack_unit: nvcc would read it in halves.
template <typename T, int kBytes>
__device__ __forceinline__ Unit<T, kBytes> load_unit(const void* p) {
  constexpr int kPerWord = sizeof(T) < 4 ? 2 : 1;
  Unit<T, kBytes> unit;
  if constexpr (kBytes == sizeof(T)) {
    unit.x[0] = load(static_cast<const T*>(p));
  } else if constexpr (sizeof(T) == 8) {
    const double2 two = *static_cast<const double2*>(p);
    unit.x[0] = two.x;
    unit.x[1] = two.y;
  } else if constexpr (kBytes == 4) {
    unpack_word<T>(*static_cast<const uint32_t*>(p), unit.x);
  } else if constexpr (kBytes == 8) {
    const uint2 words = *static_cast<const uint2*>(p);
    unpack_word<T>(words.x, unit.x);
    unpack_word<T>(words.y, unit.x + kPerWord);
  } else {
    const uint4 words = *static_cast<const uint4*>(p);
    unpack_word<T>(words.x, unit.x);
    unpack_word<T>(words.y, unit.x + kPerWord);
    unpack_word<T>(words.z, unit.x + 2 * kPerWord);
    unpack_word<T>(words.w, unit.x + 3 * kPerWord);
  }
  return unit;
}

template <typename T, int kBytes>
__device__ __forceinline__ void store_unit(void* p, const Unit<T, kBytes>& unit) {
  constexpr int kPerWord = sizeof(T) < 4 ? 2 : 1;
  if constexpr (kBytes == sizeof(T)) {
    store(static_cast<T*>(p), unit.x[0]);
  } else if constexpr (sizeof(T) == 8) {
    *static_cast<double2*>(p) = make_double2(unit.x[0], unit.x[1]);
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(p) = pack_word<T>(unit.x);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(p) = make_uint2(pack_word<T>(unit.x), pack_word<T>(unit.x + kPerWord));
  } else {
    *static_cast<uint4*>(p) = make_uint4(pack_word<T>(unit.x), pack_word<T>(unit.x + kPerWord),
                                         pack_word<T>(unit.x + 2 * kPerWord), pack_word<T>(unit.x + 3 * kPerWord));
  }
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
