// SPDX-License-Identifier: MIT
// Plain descriptions of a problem: pointers and sizes, no torch. Device adapters fill them, kernels read them.
#pragma once

#include <cstdint>

// A function of a shared header that kernels call, on whatever device they are built for. Inlined by force: no object
// that is built for one ISA may carry a copy that the linker could keep for all.
#ifdef __CUDACC__
#define FFM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FFM_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace ffm {

// What tables, values, outputs and gradients are stored in.
enum class ScalarKind : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

FFM_HOST_DEVICE constexpr bool is_narrow(ScalarKind dtype) {
  return dtype == ScalarKind::kBFloat16 || dtype == ScalarKind::kFloat16;
}
// Of a number as it is summed, and as it is stored.
FFM_HOST_DEVICE constexpr int64_t sum_bytes(ScalarKind dtype) { return dtype == ScalarKind::kFloat64 ? 8 : 4; }
FFM_HOST_DEVICE constexpr int64_t element_bytes(ScalarKind dtype) { return is_narrow(dtype) ? 2 : sum_bytes(dtype); }

// Half-precision numbers as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What an interaction returns for the P = F(F-1)/2 pairs of fields f < g, in the order (0,1), (0,2), ... (F-2,F-1).
enum class Output : int8_t {
  kSum,       // [B]        sum over pairs and factors
  kDot,       // [B, P]     sum over factors
  kHadamard,  // [B, P, K]
};

// Ids as the caller has them, int32 or int64.
struct Ids {
  const void* data = nullptr;
  bool is_int64 = true;

  FFM_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  FFM_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  int64_t element_bytes() const { return is_int64 ? 8 : 4; }
  // Those from number `first` on.
  Ids from(int64_t first) const { return {static_cast<const char*>(data) + first * element_bytes(), is_int64}; }
};

// A table and a batch of samples. All arrays are dense and row-major. Every offset into the table is 64-bit:
// N * F * K passes 2^31 in real use.
//
// Sample b owns the entries [offsets[b], offsets[b + 1]); without offsets, the entries [b * F, (b + 1) * F), of which
// entry i belongs to field i % F. On the CPU the adapter has checked that ids lie in [0, N), fields in [0, F), and that
// offsets rise from 0 to nnz; CUDA kernels take whatever they hold (cuda/ffm_kernels.h).
struct Problem {
  const void* weight = nullptr;  // [N, F, K]
  Ids indices;                   // [nnz]
  Ids fields;                    // [nnz], or none
  const void* values = nullptr;  // [nnz], the dtype of weight, or none: all are 1
  Ids offsets;                   // [B + 1], or none

  int64_t num_features = 0;  // N
  int64_t num_fields = 0;    // F
  int64_t embed_dim = 0;     // K
  int64_t batch_size = 0;    // B
  int64_t num_entries = 0;   // nnz

  ScalarKind dtype = ScalarKind::kFloat32;
  Output output = Output::kSum;
  bool within_field = false;  // kSum adds the pairs inside a field; the others append F of them: [B, P + F(, K)]

  FFM_HOST_DEVICE int64_t entries_begin(int64_t b) const { return offsets ? offsets[b] : b * num_fields; }
  // The row length F * K.
  FFM_HOST_DEVICE int64_t row_size() const { return num_fields * embed_dim; }
};

// Where the pair (f, g), f < g, stands among all pairs.
FFM_HOST_DEVICE constexpr int64_t pair_index(int64_t f, int64_t g, int64_t F) {
  return f * (2 * F - f - 1) / 2 + g - f - 1;
}

// A packed table holds int8 numbers with a bfloat16 scale for each K-vector: weight[a, g, k] = scale[a, g] * number[a,
// g, k]. A row is one piece of memory: its F scales, then its F vectors, filled up with zeros to packed_embed_dim(K)
// numbers. A Problem on such a table has it as `weight`, and float32, the type of values and outputs, as `dtype`.
FFM_HOST_DEVICE constexpr int64_t packed_embed_dim(int64_t embed_dim) {
  return embed_dim <= 4 ? 4 : embed_dim <= 8 ? 8 : (embed_dim + 15) / 16 * 16;
}

// Rows begin at multiples of the smallest power of two that holds what a row leaves for its last cache line: then no
// row touches one line more than it must, wherever it lies in a table that begins on a line.
FFM_HOST_DEVICE constexpr int64_t packed_row_bytes(int64_t num_fields, int64_t embed_dim) {
  const int64_t bytes = num_fields * (2 + packed_embed_dim(embed_dim)), rest = (bytes - 1) % 64 + 1;
  int64_t step = 1;
  while (step < rest) step *= 2;
  return (bytes + step - 1) / step * step;
}

// The bfloat16 scale, as bits, for numbers up to 127: the largest magnitude / 127, rounded up, so that no number
// becomes larger. Never so small that its inverse is not finite.
FFM_HOST_DEVICE uint16_t packed_scale_bits(float largest) {
  if (largest == 0) return 0;
  constexpr float kSmallest = 0x1p-126f;
  const float exact = largest / 127, scale = exact < kSmallest ? kSmallest : exact;
  uint32_t bits;
  __builtin_memcpy(&bits, &scale, sizeof(bits));
  return static_cast<uint16_t>((bits + 0xffff) >> 16);
}

struct Update;

// What is done with the gradient of an entry's row.
enum class Put : uint8_t {
  kStore,  // stored: the entry is the first of its row in the batch
  kAdd,    // added
  kStage,  // stored elsewhere, without its factor x, for a later pass that adds: another thread is at work on the row
};

// Gradients of a Problem. The gradient of entry e's row goes to row slots[e] of `grad_rows`, as put[e] says; what is
// staged to row stage_slots[e] of `stage`. Every row is summed in the order of its entries, whatever the number of
// threads.
//
// With sum_slots, a row with one entry is stored as above; of any other, the sum is made in row sum_slots[e] of `sums`,
// in float32 or float64, and stored once at the end. So it is for half precision, which is rounded only then, and with
// `update`: there is no gradient, what would be stored moves the row of the table itself (optimizer.h), and rows that
// several samples read must not move before all have.
struct Gradient {
  const void* grad_output = nullptr;     // the shape that the output has
  void* grad_rows = nullptr;             // [R, F, K], or none
  Ids slots;                             // [nnz]: entry -> row of grad_rows
  const Put* put = nullptr;              // [nnz], with grad_rows
  bool is_streamed = false;              // whether rows are stored past the caches
  const int64_t* sum_slots = nullptr;    // [nnz]: entry -> row of sums, -1 for the only entry of a row; or none
  void* sums = nullptr;                  // [., F, K]
  void* stage = nullptr;                 // [., F, K] in the type of sums
  const int64_t* stage_slots = nullptr;  // [nnz], where put[e] is kStage
  void* grad_values = nullptr;           // [nnz], or none
  const Update* update = nullptr;        // instead of grad_rows
  bool most_are_asked = false;           // whether most entries need a row to be in cache when they are put
};

}  // namespace ffm
