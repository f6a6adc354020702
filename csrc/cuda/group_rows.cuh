// SPDX-License-Identifier: MIT
// Which entries of a batch share a row of the table, as kernels see it (group_rows.cu makes it).
//
// Entries are sorted by row, those of one row in their order: each has a place. Entries that count for nothing come
// last.
#pragma once

#include "scalars.cuh"

namespace ffm::cuda {

// An entry's place, and who else has its row.
struct alignas(8) Place {
  // The most entries of a row whose gradients the last of their samples adds up.
  static constexpr int kFew = 8;
  static constexpr int16_t kMany = INT16_MAX;

  int32_t first = 0;  // of the row's places, where it has few
  int16_t count = 0;  // of the row's entries; 0: the entry counts for nothing; kMany: more than kFew
  int16_t rank = 0;   // the place is first + rank; with kMany, first is the place

  __device__ __forceinline__ bool is_shared_by_few() const { return count > 1 && count <= kFew; }
  __device__ __forceinline__ int64_t own() const { return int64_t{first} + rank; }
};

// Where rows of many entries begin and end, a bit for each place.
struct Heads {
  const uint32_t* words;

  // Whether such a row begins at a place, or none goes on there: the place is that of an entry of another row, of one
  // that counts for nothing, or behind the last.
  __device__ __forceinline__ bool at(int64_t place) const { return words[place / 32] >> place % 32 & 1; }
  // The bits of 64 places, from a multiple of 64 on.
  __device__ __forceinline__ uint64_t of_64(int64_t place) const {
    return static_cast<uint64_t>(words[place / 32 + 1]) << 32 | words[place / 32];
  }
};

// *is_falling becomes 1 where offsets fall anywhere, else 0.
const char* find_falling_offsets(const Problem&, int32_t* is_falling, cudaStream_t stream);

// Pieces of a workspace, each aligned to 256 bytes; without memory it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename U>
  U* take(size_t n) {
    unsigned char* const piece = memory_ ? memory_ + used_ : nullptr;
    used_ += (n * sizeof(U) + 255) / 256 * 256;
    return reinterpret_cast<U*>(piece);
  }
  size_t used() const { return used_; }

 private:
  unsigned char* memory_;
  size_t used_ = 0;
};

}  // namespace ffm::cuda
