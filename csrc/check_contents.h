// SPDX-License-Identifier: MIT
// Whether operators on CUDA look at what lists hold before they use them.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace ffm {

// FFM_EXT_CHECK_CONTENTS=1 starts with it on.
inline std::atomic<bool>& checks_device_contents() {
  static std::atomic<bool> is_on = [] {
    const char* const set = std::getenv("FFM_EXT_CHECK_CONTENTS");
    return set != nullptr && std::strcmp(set, "1") == 0;
  }();
  return is_on;
}

}  // namespace ffm
