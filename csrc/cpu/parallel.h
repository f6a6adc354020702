// SPDX-License-Identifier: MIT
// Ranges over torch's own thread pool, with scratch memory for each thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "kept_memory.h"

namespace ffm {

// Memory aligned to a cache line, left as it comes; throws std::bad_alloc.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes) : block_{nullptr, bytes} {
    if (is_large()) {
      block_ = take_block(bytes);
    } else if (bytes > 0) {
      block_.data = ::operator new(bytes, kAlignment);
    }
  }
  ~AlignedBuffer() {
    if (is_large()) {
      give_back(block_);
    } else {
      ::operator delete(block_.data, kAlignment);
    }
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  char* data() const { return static_cast<char*>(block_.data); }

 private:
  bool is_large() const { return block_.bytes >= kSmallestBlock; }

  static constexpr std::align_val_t kAlignment{64};
  KeptBlock block_;
};

// How many ranges [0, n) is cut into: one a thread, none shorter than `grain`.
inline int64_t num_parts(int64_t n, int64_t grain) {
  const int64_t most = n / std::max<int64_t>(1, grain);
  return most <= 1 ? 1 : std::clamp<int64_t>(torch::stable::get_num_threads(), 1, most);
}

// Calls fn(part) for every part, side by side.
template <typename Fn>
void parallel_parts(int64_t parts, const Fn& fn) {
  if (parts == 1) return fn(0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) fn(part);
  });
}

// [0, n) cut into even ranges: calls fn(part, begin, end) for every part, side by side.
template <typename Fn>
void parallel_ranges(int64_t parts, int64_t n, const Fn& fn) {
  parallel_parts(parts, [&](int64_t part) { fn(part, n * part / parts, n * (part + 1) / parts); });
}

// Scratch for each part of the work on a batch.
class Scratch {
 public:
  Scratch(int64_t parts, size_t bytes) : stride_((bytes + 63) / 64 * 64), buffer_(stride_ * parts) {}
  void* of(int64_t part) const { return buffer_.data() + stride_ * part; }

 private:
  size_t stride_;
  AlignedBuffer buffer_;
};

}  // namespace ffm
