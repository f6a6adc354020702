// SPDX-License-Identifier: MIT
// Enough of CUDA to run kernels on the CPU, where they are tested (see tests/gpu/test_gpu_kernels.cpp). A thread of a
// block is a fiber; blocks run one after the other. What a GPU leaves undefined, and would often get away with, is an
// error here: it is printed with the place in the kernel and the thread, and the program ends with kErrorExit.
//
// The order in which threads run is a Schedule. A kernel whose barriers are all there gives the same under every one.
// Shared memory is new for every block and filled with NaN. Asynchronous copies land at the wait, or at once, as the
// schedule has it: both are allowed on a GPU.
//
// This header is compiled with the kernels, and so with their sanitizers; what is in emulator.cpp is not instrumented,
// so that TSan sees the memory accesses of the kernels alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

// ---- Types.

#define GPU_VECTOR_TYPES(T, name, align2, align4)                    \
  struct name##1 { T x; };                                           \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

GPU_VECTOR_TYPES(signed char, char, 2, 4)
GPU_VECTOR_TYPES(unsigned char, uchar, 2, 4)
GPU_VECTOR_TYPES(short, short, 4, 8)
GPU_VECTOR_TYPES(unsigned short, ushort, 4, 8)
GPU_VECTOR_TYPES(int, int, 8, 16)
GPU_VECTOR_TYPES(unsigned, uint, 8, 16)
GPU_VECTOR_TYPES(float, float, 8, 16)
GPU_VECTOR_TYPES(double, double, 16, 16)
GPU_VECTOR_TYPES(long long, longlong, 16, 16)
GPU_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
#undef GPU_VECTOR_TYPES

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

// ---- What emulator.cpp does.

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace gpu {

template <typename T>
using SameType = T;

namespace emulator {

using Location = std::source_location;

constexpr int kErrorExit = 3;

constexpr int kStaticSharedBytes = 48 << 10;

// What launchers are told of the device. Few blocks at a time: a grid as large as the device goes round. Little shared
// memory: the paths of samples that do not fit.
struct Device {
  int num_multiprocessors = 2;
  int max_blocks = 1;  // on a multiprocessor
  int shared_bytes = 227 << 10;
  int compute_capability = 90;
};
inline Device device;

enum class Order { kBreadthFirst, kDepthFirst, kRandom };
enum class Landing { kAtWait, kAtOnce, kRandom };

struct Schedule {
  const char* name;
  Order order = Order::kBreadthFirst;
  bool is_reversed = false;  // lanes, warps and blocks
  Landing landing = Landing::kAtWait;
  uint64_t seed = 0;
};

constexpr Schedule kSchedules[] = {
    {"breadth-first", Order::kBreadthFirst, false, Landing::kAtWait},
    {"depth-first, backwards", Order::kDepthFirst, true, Landing::kAtOnce},
    {"random", Order::kRandom, false, Landing::kRandom, 1},
    {"breadth-first, backwards", Order::kBreadthFirst, true, Landing::kAtOnce},
    {"depth-first", Order::kDepthFirst, false, Landing::kAtWait},
    {"random, another seed", Order::kRandom, true, Landing::kRandom, 2},
};

// Of the launches from now on.
void set_schedule(const Schedule& schedule);

// Memory that asynchronous copies may read, beside shared memory. Where none was told, all of it.
void add_global_memory(const void* begin, size_t bytes);
void remove_global_memory(const void* begin);

// Prints what is wrong, where, in which thread, and ends the program.
[[noreturn]] void fail(const Location& at, const char* format, ...) __attribute__((format(printf, 2, 3)));

// What a launch is.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  const void* kernel;
  void (*run)(const void* arguments);  // one thread
  const void* arguments;
};
cudaError_t launch(const Launch& launch, const Location& at);
void set_max_shared_bytes(const void* kernel, int bytes, const Location& at);

enum class Collective { kSync, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kMatchAny };
// Every lane of the mask brings a value; lanes get what the collective is. `operand`: lane, delta or mask.
uint64_t warp_collective(Collective kind, const char* name, unsigned mask, uint64_t value, int operand, int width,
                         const Location& at);
// The number of the block's threads whose value is true.
int block_barrier(bool value, const Location& at);

unsigned char* dynamic_shared_memory();
// The block's variable of this key.
void* shared_variable(const void* key, size_t bytes, size_t align, const Location& at);

// Lets others run, under some schedules.
void preempt();
void fence();

void copy_async(void* shared, const void* global, int bytes, const Location& at);
void copy_async_commit();
void copy_async_wait(int groups);

void barrier_init(uint64_t* barrier, unsigned arrivals, const Location& at);
void barrier_arrive(uint64_t* barrier, unsigned bytes, const Location& at);
void barrier_wait(uint64_t* barrier, unsigned parity, const Location& at);
void copy_bulk_async(void* shared, const void* global, unsigned bytes, uint64_t* barrier, const Location& at);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Location& at, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Arguments&&... arguments) {
  auto bound = [kernel, ... values = static_cast<Parameters>(arguments)] { kernel(values...); };
  using Bound = decltype(bound);
  auto run = [](const void* call) { (*static_cast<const Bound*>(call))(); };
  return launch({grid, block, shared_bytes, reinterpret_cast<const void*>(kernel), run, &bound}, at);
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T update_atomically(T* address, auto&& function) {
  preempt();
  std::atomic_ref<T> at(*address);
  T old = at.load(std::memory_order_relaxed);
  while (!at.compare_exchange_weak(old, function(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace emulator

// ---- The namespace gpu: see csrc/cuda/gpu_compat.h.

template <int Bytes>
void copy_async(void* shared, const void* global, emulator::Location at = emulator::Location::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::copy_async(shared, global, Bytes, at);
}
// Reads what a GPU would bring into its cache, so that the sanitizers see an address that is wrong.
inline void prefetch(const void* global) { (void)*static_cast<const volatile char*>(global); }
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int N>
void copy_async_wait() {
  emulator::copy_async_wait(N);
}

struct Barrier {
  uint64_t state;

  void init(unsigned arrivals, emulator::Location at = emulator::Location::current()) {
    emulator::barrier_init(&state, arrivals, at);
  }
  void arrive(emulator::Location at = emulator::Location::current()) { emulator::barrier_arrive(&state, 0, at); }
  void arrive_expect_bytes(unsigned bytes, emulator::Location at = emulator::Location::current()) {
    emulator::barrier_arrive(&state, bytes, at);
  }
  void wait(unsigned parity, emulator::Location at = emulator::Location::current()) {
    emulator::barrier_wait(&state, parity, at);
  }
};

inline void copy_bulk_async(void* shared, const void* global, unsigned bytes, Barrier& barrier,
                            emulator::Location at = emulator::Location::current()) {
  emulator::copy_bulk_async(shared, global, bytes, &barrier.state, at);
}

inline float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline float float16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float x = exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                     : std::ldexp(static_cast<float>(mantissa), -24);
  if (exponent == 31) x = mantissa ? std::nanf("") : HUGE_VALF;
  return bits & 0x8000 ? -x : x;
}
inline uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_float16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-24f / 2) return sign;
  // A number of half precision is a multiple of this.
  const int exponent = std::max(std::ilogb(size), -14), unit = exponent - 10;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));  // up to 2048, which carries over
  return static_cast<uint16_t>(sign + ((exponent + 14) << 10) + steps);
}
inline float2 bfloat16x2_to_floats(uint32_t bits) {
  return {bfloat16_to_float(static_cast<uint16_t>(bits)), bfloat16_to_float(static_cast<uint16_t>(bits >> 16))};
}
inline float2 float16x2_to_floats(uint32_t bits) {
  return {float16_to_float(static_cast<uint16_t>(bits)), float16_to_float(static_cast<uint16_t>(bits >> 16))};
}
inline uint32_t floats_to_bfloat16x2(float first, float second) {
  return static_cast<uint32_t>(float_to_bfloat16(second)) << 16 | float_to_bfloat16(first);
}
inline uint32_t floats_to_float16x2(float first, float second) {
  return static_cast<uint32_t>(float_to_float16(second)) << 16 | float_to_float16(first);
}

}  // namespace gpu

#define GPU_DYNAMIC_SHARED(name) unsigned char* const name = ::gpu::emulator::dynamic_shared_memory()

#define GPU_SHARED(type, name)                                                        \
  auto& name = *static_cast<::gpu::SameType<type>*>(::gpu::emulator::shared_variable( \
      [] {                                                                            \
        static const char key = 0;                                                    \
        return &key;                                                                  \
      }(),                                                                            \
      sizeof(::gpu::SameType<type>), alignof(::gpu::SameType<type>), std::source_location::current()))

#define GPU_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::gpu::emulator::launch(std::source_location::current(), kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#ifndef GPU_HAS_BULK_COPIES
#define GPU_HAS_BULK_COPIES 1
#endif

// ---- Device functions.

#define GPU_AT ::gpu::emulator::Location at = ::gpu::emulator::Location::current()

inline void __syncthreads(GPU_AT) { ::gpu::emulator::block_barrier(false, at); }
inline int __syncthreads_count(int value, GPU_AT) { return ::gpu::emulator::block_barrier(value != 0, at); }
inline int __syncthreads_or(int value, GPU_AT) { return ::gpu::emulator::block_barrier(value != 0, at) > 0; }
inline int __syncthreads_and(int value, GPU_AT) { return ::gpu::emulator::block_barrier(value == 0, at) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu, GPU_AT) {
  ::gpu::emulator::warp_collective(::gpu::emulator::Collective::kSync, "__syncwarp", mask, 0, 0, 32, at);
}

#define GPU_SHUFFLE(name, kind, Operand)                                                                            \
  template <typename T>                                                                                             \
  T name(unsigned mask, T value, Operand operand, int width = 32, GPU_AT) {                                         \
    static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA has it for 32 and 64 bits");                     \
    return ::gpu::emulator::from_bits<T>(::gpu::emulator::warp_collective(::gpu::emulator::Collective::kind, #name, \
                                                                          mask, ::gpu::emulator::to_bits(value),    \
                                                                          static_cast<int>(operand), width, at));   \
  }
GPU_SHUFFLE(__shfl_sync, kShuffle, int)
GPU_SHUFFLE(__shfl_up_sync, kShuffleUp, unsigned)
GPU_SHUFFLE(__shfl_down_sync, kShuffleDown, unsigned)
GPU_SHUFFLE(__shfl_xor_sync, kShuffleXor, int)
#undef GPU_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int value, GPU_AT) {
  return static_cast<unsigned>(::gpu::emulator::warp_collective(::gpu::emulator::Collective::kBallot, "__ballot_sync",
                                                                mask, value != 0, 0, 32, at));
}
inline int __any_sync(unsigned mask, int value, GPU_AT) {
  return ::gpu::emulator::warp_collective(::gpu::emulator::Collective::kBallot, "__any_sync", mask, value != 0, 0, 32,
                                          at) != 0;
}
inline int __all_sync(unsigned mask, int value, GPU_AT) {
  return ::gpu::emulator::warp_collective(::gpu::emulator::Collective::kBallot, "__all_sync", mask, value == 0, 0, 32,
                                          at) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, GPU_AT) {
  return static_cast<unsigned>(::gpu::emulator::warp_collective(
      ::gpu::emulator::Collective::kMatchAny, "__match_any_sync", mask, ::gpu::emulator::to_bits(value), 0, 32, at));
}
// The least that a GPU may answer: the lane itself.
inline unsigned __activemask() {
  return 1u << (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

#undef GPU_AT

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ::gpu::emulator::update_atomically(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return ::gpu::emulator::update_atomically(address, [=](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return ::gpu::emulator::update_atomically(address, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return ::gpu::emulator::update_atomically(address, [=](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return ::gpu::emulator::update_atomically(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return ::gpu::emulator::update_atomically(address, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence() { ::gpu::emulator::fence(); }
inline void __threadfence_block() { ::gpu::emulator::fence(); }
inline void __nanosleep(unsigned) { ::gpu::emulator::preempt(); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldca(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stwb(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline int __dp4a(int x, int y, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(x >> i) * static_cast<int8_t>(y >> i);
  return sum;
}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }

template <typename T, typename U>
constexpr auto min(T x, U y) -> std::common_type_t<T, U> {
  using Common = std::common_type_t<T, U>;
  return static_cast<Common>(y) < static_cast<Common>(x) ? static_cast<Common>(y) : static_cast<Common>(x);
}
template <typename T, typename U>
constexpr auto max(T x, U y) -> std::common_type_t<T, U> {
  using Common = std::common_type_t<T, U>;
  return static_cast<Common>(x) < static_cast<Common>(y) ? static_cast<Common>(y) : static_cast<Common>(x);
}

inline long long clock64() {
  static std::atomic<long long> now = 0;
  return ++now;
}

// ---- The runtime.

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value,
                                 std::source_location at = std::source_location::current()) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    ::gpu::emulator::set_max_shared_bytes(reinterpret_cast<const void*>(kernel), value, at);
  }
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, Kernel*, int block_size,
                                                          size_t shared_bytes) {
  const ::gpu::emulator::Device& device = ::gpu::emulator::device;
  const size_t by_memory = static_cast<size_t>(device.shared_bytes + 1024) / (shared_bytes + 1024);
  *num_blocks = static_cast<int>(std::min<size_t>(by_memory, std::min(device.max_blocks, 2048 / block_size)));
  return cudaSuccess;
}
