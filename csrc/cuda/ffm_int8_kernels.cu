// SPDX-License-Identifier: MIT
// Packed int8 tables (packed_row_bytes says what a row is): the interaction on them, and the ways there and back.

#include "../dispatch.h"
#include "ffm_kernels.h"
#include "field_sums_forward.cuh"
#include "one_hot_forward.cuh"

namespace ffm::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float load_scale(const unsigned char* row, int64_t g) {
  return load(reinterpret_cast<const BFloat16*>(row) + g);
}

// kWords: four numbers each, of a K-vector; 0: known at run time. Products of numbers are summed exactly, in int32,
// before they meet the two scales of their pair.
template <int kWords>
class PackedPairs {
 public:
  using Value = float;

  __device__ PackedPairs(const Problem& p, const OneHot& one_hot, const Pair* pairs)
      : p_(p),
        pairs_(pairs),
        stride_(one_hot.ring.stride),
        lanes_(kWords ? kWords : one_hot.lanes),
        words_(kWords ? kWords : one_hot.units),
        num_pairs_(one_hot.num_pairs),
        lane_(static_cast<int>(threadIdx.x) % lanes_),
        begin_(2 * one_hot.ring.num_rows) {}

  __device__ __forceinline__ float sum(const unsigned char* rows, const float* values) const {
    float total = 0;
    const int step = static_cast<int>(blockDim.x) / lanes_;
#pragma unroll 2
    for (int t = static_cast<int>(threadIdx.x) / lanes_; t < num_pairs_; t += step) {
      const Pair pair = pairs_[t];
      total += scale(rows, values, pair) * static_cast<float>(part_of_dot(rows, pair));
    }
    return total;
  }

  __device__ __forceinline__ void store_terms(const unsigned char* rows, const float* values, bool is_bad,
                                              float* terms) const {
    const int step = static_cast<int>(blockDim.x) / lanes_, K = static_cast<int>(p_.embed_dim);
    const bool is_dot = p_.output == Output::kDot;
    // Whole warps, as they add up their lanes.
    const int whole = (num_pairs_ + step - 1) / step * step;
    for (int t = static_cast<int>(threadIdx.x) / lanes_; t < whole; t += step) {
      const bool is_pair = t < num_pairs_;
      const Pair pair = pairs_[is_pair ? t : 0];
      const float x = is_bad ? not_a_number<float>() : scale(rows, values, pair);
      if (is_dot) {
        const int d = sum_lanes(part_of_dot(rows, pair), lanes_);
        if (is_pair && lane_ == 0) store(terms + t, x * static_cast<float>(d));
      } else if (is_pair) {
        float* const term = terms + static_cast<int64_t>(t) * K;
        for (int w = lane_; w < words_; w += lanes_) {
          const uint32_t a = word(rows, pair.f, pair.g, w), b = word(rows, pair.g, pair.f, w);
          for (int i = 0; i < 4 && 4 * w + i < K; ++i) {
            const int product = static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
            store(term + 4 * w + i, x * static_cast<float>(product));
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ float scale(const unsigned char* rows, const float* values, Pair pair) const {
    const float x = load_scale(rows + pair.f * stride_, pair.g) * load_scale(rows + pair.g * stride_, pair.f);
    return values ? values[pair.f] * values[pair.g] * x : x;
  }
  // Four numbers of the vector of row f for field g. With an odd F they lie across two words.
  __device__ __forceinline__ uint32_t word(const unsigned char* rows, int f, int g, int w) const {
    const int at = f * stride_ + begin_ + 4 * (g * words_ + w);
    const uint32_t* const p = reinterpret_cast<const uint32_t*>(rows + (at & ~3));
    if ((begin_ & 3) == 0) return p[0];
    return p[0] >> 16 | p[1] << 16;
  }
  __device__ __forceinline__ int part_of_dot(const unsigned char* rows, Pair pair) const {
    int d = 0;
    for (int w = lane_; w < words_; w += lanes_) {
      d = __dp4a(static_cast<int>(word(rows, pair.f, pair.g, w)), static_cast<int>(word(rows, pair.g, pair.f, w)), d);
    }
    return d;
  }

  const Problem& p_;
  const Pair* pairs_;
  int stride_, lanes_, words_, num_pairs_, lane_, begin_;
};

// Packed rows, for field_sums_forward.
struct PackedRows {
  using Value = float;
  const unsigned char* table;
  int64_t row_bytes;
  int num_fields, embed_dim;

  template <int kCount>
  __device__ __forceinline__ Unit<float, kCount* static_cast<int>(sizeof(float))> numbers(int64_t id, int64_t i) const {
    const unsigned char* const row = table + id * row_bytes;
    const int g = static_cast<int>(i) / embed_dim, k = static_cast<int>(i) % embed_dim;
    const float scale = load_scale(row, g);
    const unsigned char* const vector = row + 2 * num_fields + g * packed_embed_dim(embed_dim) + k;
    Unit<float, kCount* static_cast<int>(sizeof(float))> unit;
#pragma unroll
    for (int j = 0; j < kCount; ++j) unit.x[j] = scale * static_cast<float>(static_cast<int8_t>(vector[j]));
    return unit;
  }
};

// A thread a K-vector. Padding is zero already.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const Problem p, unsigned char* packed, unsigned long long* first_bad) {
  constexpr float kMax = 0x1.fffffep127f;
  // Added, it leaves a number rounded to the nearest integer, ties to even, in the last bits of the sum.
  constexpr float kRound = 0x1.8p23f;
  const int64_t F = p.num_fields, K = p.embed_dim, row_bytes = packed_row_bytes(F, K);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < p.num_features * F; v += step) {
    const T* const vector = static_cast<const T*>(p.weight) + v * K;
    float largest = 0;
    for (int64_t k = 0; k < K; ++k) {
      const float magnitude = fabsf(static_cast<float>(load(vector + k)));
      if (!(magnitude <= kMax)) {
        atomicMin(first_bad, static_cast<unsigned long long>(v * K + k));
      } else if (largest < magnitude) {
        largest = magnitude;
      }
    }
    const uint16_t scale = packed_scale_bits(largest);
    const float inverse = scale ? 1 / gpu::bfloat16_to_float(scale) : 0.0f;
    unsigned char* const row = packed + v / F * row_bytes;
    reinterpret_cast<BFloat16*>(row)[v % F] = {scale};
    unsigned char* const numbers = row + 2 * F + v % F * packed_embed_dim(K);
    for (int64_t k = 0; k < K; ++k) {
      const float rounded = __fadd_rn(__fmul_rn(static_cast<float>(load(vector + k)), inverse), kRound);
      numbers[k] = static_cast<unsigned char>(__float_as_int(rounded) - __float_as_int(kRound));
    }
  }
}

__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Problem p, const PackedRows rows, float* weight) {
  const int64_t n = p.num_features * p.row_size(), step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    weight[i] = rows.numbers<1>(i / p.row_size(), i % p.row_size()).x[0];
  }
}

PackedRows packed_rows(const Problem& p) {
  return {static_cast<const unsigned char*>(p.weight), packed_row_bytes(p.num_fields, p.embed_dim),
          static_cast<int>(p.num_fields), static_cast<int>(p.embed_dim)};
}

template <int kWords>
bool launch_packed_pairs(const Device& device, const Problem& p, float* out, cudaStream_t stream, cudaError_t* error) {
  return launch_one_hot<PackedPairs<kWords>>(device, p, packed_row_bytes(p.num_fields, p.embed_dim), 4,
                                             packed_embed_dim(p.embed_dim) / 4, 4, out, stream, error);
}

}  // namespace

const char* forward_int8(const Problem& p, float* out, void* stream_) {
  if (p.batch_size == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error_text(error);
  // Rows that a view begins at an odd address have no words.
  if (!p.fields && common_alignment(packed_row_bytes(p.num_fields, p.embed_dim), p.weight) >= 4) {
    const auto launch = [&](auto words) { return launch_packed_pairs<words()>(device, p, out, stream, &error); };
    bool is_launched = false;
    dispatch_embed_dim(packed_embed_dim(p.embed_dim),
                       [&](auto K) { is_launched = launch(std::integral_constant<int, K() / 4>{}); });
    if (is_launched) return error_text(error);
  }
  const PackedRows rows = packed_rows(p);
  switch (common_alignment(p.embed_dim, nullptr, 4)) {
    case 4: return error_text(launch_field_sums<PackedRows, 4>(device, p, rows, out, stream));
    case 2: return error_text(launch_field_sums<PackedRows, 2>(device, p, rows, out, stream));
    default: return error_text(launch_field_sums<PackedRows, 1>(device, p, rows, out, stream));
  }
}

const char* quantize(const Problem& p, void* packed, int64_t* first_bad, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  cudaError_t error = cudaMemsetAsync(first_bad, 0x7f, sizeof(*first_bad), stream);
  const size_t bytes = static_cast<size_t>(p.num_features * packed_row_bytes(p.num_fields, p.embed_dim));
  if (bytes == 0) return error_text(error);
  if (error == cudaSuccess) error = cudaMemsetAsync(packed, 0, bytes, stream);
  Device device;
  if (error == cudaSuccess) error = current_device(&device);
  if (error != cudaSuccess) return error_text(error);
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    unsigned blocks = 0;
    const int64_t work = (p.num_features * p.num_fields + kThreads - 1) / kThreads;
    error = resident_blocks(device, quantize_kernel<T>, kThreads, 0, work, &blocks);
    if (error != cudaSuccess) return;
    error = GPU_LAUNCH(quantize_kernel<T>, blocks, kThreads, 0, stream, p, static_cast<unsigned char*>(packed),
                       reinterpret_cast<unsigned long long*>(first_bad));
  });
  return error_text(error);
}

const char* dequantize(const Problem& p, float* weight, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t work = (p.num_features * p.row_size() + kThreads - 1) / kThreads;
  if (work == 0) return nullptr;
  Device device;
  cudaError_t error = current_device(&device);
  unsigned blocks = 0;
  if (error == cudaSuccess) error = resident_blocks(device, dequantize_kernel, kThreads, 0, work, &blocks);
  if (error == cudaSuccess) {
    error = GPU_LAUNCH(dequantize_kernel, blocks, kThreads, 0, stream, p, packed_rows(p), weight);
  }
  return error_text(error);
}

}  // namespace ffm::cuda
