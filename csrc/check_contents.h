// SPDX-License-Identifier: MIT
// Whether operators on CUDA look at what lists hold before they use them.
#pragma once

#include <atomic>

#include "export.h"

namespace ffm {

// FFM_EXT_CHECK_CONTENTS=1 starts with it on.
FFM_API std::atomic<bool>& checks_device_contents();

}  // namespace ffm
