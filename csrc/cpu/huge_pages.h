// SPDX-License-Identifier: MIT
// Large arrays on large pages: fewer page faults when they are new, fewer TLB misses when rows are read at random.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ffm {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks the kernel to back whole huge pages inside [data, data + bytes) with such. Advice: it changes no content, and
// nothing happens where the system has none or was told not to give them. Returns the bytes that were asked for.
inline size_t advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0) return end - begin;
#endif
  (void)data, (void)bytes;
  return 0;
}

}  // namespace ffm
