// SPDX-License-Identifier: MIT
// Instructions that the compiler's vector types have no operator for. A kernel file includes this for vec.h, which lies
// inside a namespace.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
