// SPDX-License-Identifier: MIT
// Small kernels, most of them wrong, for the test of the emulator itself (tests/test_gpu_emulator.py). Arguments: which
// kernel, and the number of a schedule. Prints what it leaves in memory, or ends as the emulator or a sanitizer does.

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda/gpu_compat.h"

namespace {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

// Neighbours swap numbers by shared memory.
__global__ void swap(const float* in, float* out) {
  GPU_SHARED(float[kThreads], s);
  const int t = static_cast<int>(threadIdx.x);
  s[t] = in[t];
  __syncthreads();
  out[blockIdx.x * kThreads + t] = s[t ^ 1];
}

__global__ void swap_without_barrier(const float* in, float* out) {
  GPU_SHARED(float[kThreads], s);
  const int t = static_cast<int>(threadIdx.x);
  s[t] = in[t];
  out[blockIdx.x * kThreads + t] = s[t ^ 1];
}

// Twice, through the same memory; the second copy must wait until all have read the first.
template <bool kHasBarrier>
__global__ void swap_twice(const float* in, float* out) {
  GPU_SHARED(float[kThreads], s);
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    gpu::copy_async<4>(s + t, in + t + i * kThreads);
    gpu::copy_async_commit();
    gpu::copy_async_wait<0>();
    __syncthreads();
    sum += s[t ^ 1];
    if (kHasBarrier) __syncthreads();
  }
  out[blockIdx.x * kThreads + t] = sum;
}

__global__ void copy_without_wait(const float* in, float* out) {
  GPU_SHARED(float[kThreads], s);
  const int t = static_cast<int>(threadIdx.x);
  gpu::copy_async<4>(s + t, in + t);
  gpu::copy_async_commit();
  gpu::copy_async_wait<1>();
  __syncthreads();
  out[blockIdx.x * kThreads + t] = s[t ^ 1];
  gpu::copy_async_wait<0>();
}

__global__ void copy_never_waited_for(const float* in, float* out) {
  GPU_SHARED(float[kThreads], s);
  gpu::copy_async<4>(s + threadIdx.x, in + threadIdx.x);
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <int kBytes, int kOffset>
__global__ void copy_from(const float* in, float* out) {
  GPU_DYNAMIC_SHARED(s);
  gpu::copy_async<kBytes>(s + kBytes * threadIdx.x, in + kOffset + kBytes / 4 * threadIdx.x);
  gpu::copy_async_commit();
  gpu::copy_async_wait<0>();
  out[blockIdx.x * kThreads + threadIdx.x] = reinterpret_cast<float*>(s)[kBytes / 4 * threadIdx.x];
}

// Twice through the same memory, by one thread for all.
template <bool kHasWait>
__global__ void bulk(const float* in, float* out) {
  GPU_SHARED(gpu::Barrier, barrier);
  GPU_DYNAMIC_SHARED(s);
  if (threadIdx.x == 0) barrier.init(1);
  __syncthreads();
  for (unsigned i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) {
      barrier.arrive_expect_bytes(4 * kThreads);
      gpu::copy_bulk_async(s, in + i * kThreads, 4 * kThreads, barrier);
    }
    if (kHasWait || threadIdx.x == 0) barrier.wait(i & 1);
    out[blockIdx.x * kThreads + threadIdx.x] = reinterpret_cast<float*>(s)[threadIdx.x ^ 1];
    __syncthreads();
  }
}

__global__ void bulk_without_init(const float* in, float* out) {
  GPU_SHARED(gpu::Barrier, barrier);
  GPU_DYNAMIC_SHARED(s);
  if (threadIdx.x == 0) barrier.init(1);
  if (threadIdx.x == kThreads - 1) {
    barrier.arrive_expect_bytes(4 * kThreads);
    gpu::copy_bulk_async(s, in, 4 * kThreads, barrier);
  }
  __syncthreads();
  barrier.wait(0);
  out[blockIdx.x * kThreads + threadIdx.x] = reinterpret_cast<float*>(s)[threadIdx.x ^ 1];
}

__global__ void bulk_bytes_that_never_come(const float* in, float* out) {
  GPU_SHARED(gpu::Barrier, barrier);
  GPU_DYNAMIC_SHARED(s);
  if (threadIdx.x == 0) {
    barrier.init(1);
    barrier.arrive_expect_bytes(8 * kThreads);
    gpu::copy_bulk_async(s, in, 4 * kThreads, barrier);
  }
  __syncthreads();
  barrier.wait(0);
  out[threadIdx.x] = 0;
}

__global__ void early_return(const float* in, float* out) {
  if (threadIdx.x == 3) return;
  out[blockIdx.x * kThreads + threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
}

__global__ void barriers_of_two_lines(const float*, float*) {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_of_some(const float*, float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncwarp(threadIdx.x % 2 ? 0xaaaaaaaau : kAll);
  }
}

__global__ void deadlock(const float*, float*) {
  GPU_SHARED(gpu::Barrier, barrier);
  if (threadIdx.x == 0) barrier.init(2);
  __syncthreads();
  if (threadIdx.x == 0) barrier.arrive();
  barrier.wait(0);
}

__global__ void other_masks(const float*, float*) { __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : kAll); }

__global__ void other_operations(const float*, float*) {
  if (threadIdx.x % 32 < 16) {
    __any_sync(kAll, 1);
  } else {
    __all_sync(kAll, 1);
  }
}

__global__ void lane_outside(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, in[threadIdx.x], 20);
}

__global__ void own_mask(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffff0000u, in[threadIdx.x], 20);
}

__global__ void overrun(const float* in, float* out) {
  GPU_DYNAMIC_SHARED(s);
  reinterpret_cast<float*>(s)[threadIdx.x + 4 * kThreads] = in[threadIdx.x];
  out[threadIdx.x] = 0;
}

__global__ void misaligned(const float* in, float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + 1);
}

__global__ void sum_without_atomic(const float*, float* out) { out[0] += 1; }
__global__ void sum_by_atomic(const float*, float* out) { atomicAdd(out, 1.0f); }

// The last block adds up what the others left.
template <bool kHasFence>
__global__ void last_block(const float*, float* out) {
  GPU_SHARED(bool, is_last);
  if (threadIdx.x == 0) {
    out[1 + blockIdx.x] = 1.0f;
    if (kHasFence) __threadfence();
    is_last = atomicAdd(reinterpret_cast<int*>(out), 1) == static_cast<int>(gridDim.x) - 1;
    if (kHasFence) __threadfence();
    if (is_last) {
      for (unsigned i = 1; i < gridDim.x; ++i) out[1] += out[1 + i];
    }
  }
}

// Every collective, and what it should give.
__global__ void collectives(const float*, float* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  bool ok = __shfl_sync(kAll, t, 5) == t - lane + 5 && __shfl_sync(kAll, t, 3, 8) == t - lane % 8 + 3;
  ok = ok && __shfl_up_sync(kAll, t, 2) == (lane < 2 ? t : t - 2) &&
       __shfl_up_sync(kAll, t, 2, 4) == (lane % 4 < 2 ? t : t - 2);
  ok = ok && __shfl_down_sync(kAll, 1.5 * t, 3) == 1.5 * (lane > 28 ? t : t + 3);
  ok = ok && __shfl_xor_sync(kAll, static_cast<long long>(t) << 40, 9) == static_cast<long long>(t ^ 9) << 40;
  ok = ok && __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u && __any_sync(kAll, lane == 7) && !__any_sync(kAll, 0);
  ok = ok && __all_sync(kAll, 1) && !__all_sync(kAll, lane != 7) && __popc(__match_any_sync(kAll, lane / 4)) == 4;
  ok =
      ok && __syncthreads_count(lane == 1) == kThreads / 32 && __syncthreads_or(t == 40) && !__syncthreads_and(t != 40);
  if (lane % 2) ok = ok && __shfl_down_sync(0xaaaaaaaau, t, 2, 16) == (lane % 16 > 13 ? t : t + 2);
  out[blockIdx.x * kThreads + t] = ok ? 1.0f : 0.0f;
}

__global__ void halves(const float*, float* out) {
  // Every number of half precision, and those in the middle of two neighbours.
  bool ok = true;
  for (unsigned i = threadIdx.x; i < 0x7c00; i += kThreads) {
    const auto half = static_cast<uint16_t>(i);
    const float x = gpu::float16_to_float(half), next = gpu::float16_to_float(static_cast<uint16_t>(half + 1));
    ok = ok && gpu::float_to_float16(-x) == (half | 0x8000) &&
         gpu::float16x2_to_floats(gpu::floats_to_float16x2(1, x)).y == x;
    if (i + 1 < 0x7c00) ok = ok && x < next && gpu::float_to_float16((x + next) / 2) == half + half % 2;
  }
  for (unsigned i = threadIdx.x; i < 0x7f80; i += kThreads) {
    const auto half = static_cast<uint16_t>(i);
    const float x = gpu::bfloat16_to_float(half);
    ok = ok && gpu::float_to_bfloat16(x) == half && gpu::bfloat16x2_to_floats(gpu::floats_to_bfloat16x2(x, 1)).x == x;
    ok = ok && gpu::float_to_bfloat16(__uint_as_float(i << 16 | 0x8000)) == half + half % 2;
  }
  ok = ok && gpu::float16_to_float(gpu::float_to_float16(65519.0f)) == 65504 &&
       gpu::float_to_float16(65520.0f) == 0x7c00;
  ok = ok && gpu::float_to_float16(1e30f) == 0x7c00 && std::isnan(gpu::float16_to_float(gpu::float_to_float16(NAN)));
  ok = ok && std::isnan(gpu::bfloat16_to_float(gpu::float_to_bfloat16(NAN)));
  out[blockIdx.x * kThreads + threadIdx.x] = ok ? 1.0f : 0.0f;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace gpu::emulator;
  const std::string which = argc > 1 ? argv[1] : "";
  const std::pair<const char*, void (*)(const float*, float*)> kernels[] = {
      {"swap", swap},
      {"swap_without_barrier", swap_without_barrier},
      {"swap_twice", swap_twice<true>},
      {"swap_twice_without_barrier", swap_twice<false>},
      {"copy_without_wait", copy_without_wait},
      {"copy_never_waited_for", copy_never_waited_for},
      {"copy", copy_from<16, 0>},
      {"copy_misaligned", copy_from<16, 1>},
      {"copy_past_the_end", copy_from<16, 4>},
      {"copy_past_shared", copy_from<16, 0>},
      {"bulk", bulk<true>},
      {"bulk_without_wait", bulk<false>},
      {"bulk_without_init", bulk_without_init},
      {"bulk_bytes_that_never_come", bulk_bytes_that_never_come},
      {"early_return", early_return},
      {"barriers_of_two_lines", barriers_of_two_lines},
      {"barrier_of_some", barrier_of_some},
      {"deadlock", deadlock},
      {"other_masks", other_masks},
      {"other_operations", other_operations},
      {"lane_outside", lane_outside},
      {"own_mask", own_mask},
      {"overrun", overrun},
      {"misaligned", misaligned},
      {"sum_without_atomic", sum_without_atomic},
      {"sum_by_atomic", sum_by_atomic},
      {"last_block", last_block<true>},
      {"last_block_without_fence", last_block<false>},
      {"too_much_shared", swap},
      {"collectives", collectives},
      {"halves", halves},
  };
  set_schedule(kSchedules[argc > 2 ? std::stoul(argv[2]) : 0]);
  // Aligned to 16 bytes, and not one more.
  const std::vector<float> in = [] {
    std::vector<float> numbers(4 * kThreads);
    for (int i = 0; i < 4 * kThreads; ++i) numbers[i] = static_cast<float>(i);
    return numbers;
  }();
  std::vector<float> out(2 * kThreads);
  add_global_memory(in.data(), in.size() * sizeof(float));
  for (const auto& [name, kernel] : kernels) {
    if (which != name) continue;
    size_t shared_bytes = 16 * kThreads;
    if (which == "copy_past_shared") shared_bytes -= 16;
    if (which == "too_much_shared") shared_bytes = 49 << 10;
    GPU_LAUNCH(kernel, 2, kThreads, shared_bytes, nullptr, in.data(), out.data());
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += static_cast<double>((i % 3 + 1)) * out[i];
    std::printf("%s: %g\n", name, sum);
    return 0;
  }
  return 1;
}
