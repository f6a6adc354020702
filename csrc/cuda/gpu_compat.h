// SPDX-License-Identifier: MIT
// The only system include of kernels: CUDA under nvcc, and elsewhere an emulator of it (tests/gpu/emulator.h) in which
// the tests run the same source on the CPU. Where the source itself would differ, it uses what this file defines:
//
//   GPU_DYNAMIC_SHARED(name);       unsigned char* name: the block's dynamic shared memory, 128-byte aligned
//   GPU_SHARED(float[32], sums);    a static shared variable, not initialized
//   GPU_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)    -> cudaError_t
//   GPU_HAS_BULK_COPIES             in device code: whether gpu::Barrier and gpu::copy_bulk_async are there (sm_90 on)
//
// and the namespace gpu: asynchronous copies, and half-precision numbers as bits, rounded to the nearest, ties to even.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define GPU_DYNAMIC_SHARED(name)                                              \
  extern __shared__ __align__(128) unsigned char gpu_dynamic_shared_memory[]; \
  unsigned char* const name = gpu_dynamic_shared_memory

// clang-format off: it does not know <<< >>> in macros.
#define GPU_SHARED(type, name) __shared__ ::gpu::SameType<type> name

#define GPU_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())
// clang-format on

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define GPU_HAS_BULK_COPIES 1
#else
#define GPU_HAS_BULK_COPIES 0
#endif

namespace gpu {

template <typename T>
using SameType = T;

// Copies `Bytes` from global to shared memory, both aligned to as many. What was copied is there after
// copy_async_wait, for this thread; for others, after a barrier that follows it.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
  }
}

// Brings the line of an address into the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

// Makes a group of this thread's copies since the last one.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last N.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#if GPU_HAS_BULK_COPIES

// In shared memory. A phase ends when `arrivals` threads have arrived and all the bytes that they announced are there.
struct Barrier {
  uint64_t state;

  // By one thread; others, and copies, may use the barrier after the next __syncthreads.
  __device__ __forceinline__ void init(unsigned arrivals) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], %1;\n\t"
        "fence.proxy.async.shared::cta;" ::"r"(address()),
        "r"(arrivals)
        : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }

  // Arrives, and announces bytes that copies bring in this phase. Before the copies are begun.
  __device__ __forceinline__ void arrive_expect_bytes(unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }

  // Until the phase of this parity has ended: 0 for the first, 1 for the second, 0 for the third and so on.
  __device__ __forceinline__ void wait(unsigned parity) {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t"
        "}" ::"r"(address()),
        "r"(parity)
        : "memory");
  }

  __device__ __forceinline__ unsigned address() const { return static_cast<unsigned>(__cvta_generic_to_shared(this)); }
};

// Copies from global to shared memory, both aligned to 16 bytes, a multiple of 16 bytes.
__device__ __forceinline__ void copy_bulk_async(void* shared, const void* global, unsigned bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier.address())
               : "memory");
}

#endif  // GPU_HAS_BULK_COPIES

__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ uint16_t float_to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Two numbers as they lie in memory: the first in the low bits.
__device__ __forceinline__ float2 bfloat16x2_to_floats(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
__device__ __forceinline__ float2 float16x2_to_floats(uint32_t bits) {
  return make_float2(float16_to_float(static_cast<uint16_t>(bits)),
                     float16_to_float(static_cast<uint16_t>(bits >> 16)));
}
__device__ __forceinline__ uint32_t floats_to_bfloat16x2(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
}
__device__ __forceinline__ uint32_t floats_to_float16x2(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16 | __half_as_ushort(pair.x);
}

}  // namespace gpu

#else

#include "emulator.h"

#endif  // __CUDACC__
