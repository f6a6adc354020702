// SPDX-License-Identifier: MIT
#include "kept_memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "huge_pages.h"

namespace ffm {
namespace {

class KeptMemory {
 public:
  KeptBlock take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    ++time_;
    // What so many results found no use for is of no use.
    constexpr uint64_t kPatience = 16;
    std::erase_if(free_, [&](const Free& block) {
      const bool old = block.since + kPatience < time_;
      if (old) release(block);
      return old;
    });
    // The smallest that fits; of equal ones that last used, so that the others grow old.
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      const bool fits = bytes <= block->bytes && block->bytes <= 2 * bytes;
      if (fits && (best == free_.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best != free_.end()) {
      const KeptBlock block = *best;
      free_.erase(best);
      return block;
    }
    // An eighth more than is asked for, so that it also serves a somewhat larger result; pages that are never touched
    // cost nothing.
    bytes = (bytes + bytes / 8 + kHugePage - 1) / kHugePage * kHugePage;
    void* const data = ::operator new(bytes, kAlignment);
    advise_huge_pages(data, bytes);
    return {data, bytes};
  }

  void give_back(KeptBlock block) {
    if (!is_on_) return release(block);
    const std::lock_guard lock(mutex_);
    free_.push_back({block, time_});
  }

  size_t bytes() {
    const std::lock_guard lock(mutex_);
    size_t sum = 0;
    for (const Free& block : free_) sum += block.bytes;
    return sum;
  }

  void release_all() {
    const std::lock_guard lock(mutex_);
    for (const Free& block : free_) release(block);
    free_.clear();
  }

 private:
  struct Free : KeptBlock {
    uint64_t since;
  };
  static constexpr std::align_val_t kAlignment{kHugePage};
  static void release(const KeptBlock& block) { ::operator delete(block.data, kAlignment); }

  static bool is_on() {
    const char* setting = std::getenv("FFM_EXT_KEEP_MEMORY");
    return setting == nullptr || std::strcmp(setting, "0") != 0;
  }

  const bool is_on_ = is_on();
  std::mutex mutex_;
  std::vector<Free> free_;
  uint64_t time_ = 0;
};

// Never destroyed: tensors may outlive whatever is destroyed at exit.
KeptMemory& kept_memory() {
  static KeptMemory* const memory = new KeptMemory;
  return *memory;
}

}  // namespace

KeptBlock take_block(size_t bytes) { return kept_memory().take(bytes); }
void give_back(KeptBlock block) { kept_memory().give_back(block); }
size_t kept_bytes() { return kept_memory().bytes(); }
void release_kept_memory() { kept_memory().release_all(); }

}  // namespace ffm
