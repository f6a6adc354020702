// SPDX-License-Identifier: MIT

#include "check_contents.h"

#include <cstdlib>
#include <cstring>

namespace ffm {

std::atomic<bool>& checks_device_contents() {
  static std::atomic<bool> is_on = [] {
    const char* const set = std::getenv("FFM_EXT_CHECK_CONTENTS");
    return set != nullptr && std::strcmp(set, "1") == 0;
  }();
  return is_on;
}

}  // namespace ffm
