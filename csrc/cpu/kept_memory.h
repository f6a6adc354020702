// SPDX-License-Identifier: MIT
// Blocks of memory for large results, kept when they are freed and given to the next one. A training step makes a
// gradient of about the same size as the step before; in new memory, the system would first clear every page of it.
#pragma once

#include <cstddef>

#include "../export.h"

namespace ffm {

struct KeptBlock {
  void* data;
  size_t bytes;
};

// From this size on blocks are kept. The allocator keeps smaller ones itself; larger ones it may give back to the
// system after every step.
constexpr size_t kSmallestBlock = 1 << 20;

// At least so many bytes, on huge pages, as they come; throws std::bad_alloc.
KeptBlock take_block(size_t bytes);
void give_back(KeptBlock block);

// What is kept and not in use: nothing with FFM_EXT_KEEP_MEMORY=0, and at most what was in use at the same time lately.
FFM_API size_t kept_bytes();
FFM_API void release_kept_memory();

}  // namespace ffm
