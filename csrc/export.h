// SPDX-License-Identifier: MIT
// What bindings.cpp, in a library of its own, calls in libffm_ext_ops.so. All else is hidden.
#pragma once

#define FFM_API __attribute__((visibility("default")))
