// SPDX-License-Identifier: MIT

#include "check_contents.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ffm {

std::atomic<bool>& checks_device_contents() {
  static std::atomic<bool> is_on = [] {
    const char* const set = std::getenv("FFM_EXT_CHECK_CONTENTS");
    if (set == nullptr || *set == '\0' || std::strcmp(set, "0") == 0) return false;
    if (std::strcmp(set, "1") == 0) return true;
    throw std::runtime_error(std::string("FFM_EXT_CHECK_CONTENTS = ") + set + " is not one of 0, 1");
  }();
  return is_on;
}

}  // namespace ffm
