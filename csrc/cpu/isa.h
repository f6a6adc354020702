// SPDX-License-Identifier: MIT
// Which build of the kernels runs: the best one that this CPU has, or the one that FFM_EXT_ISA names.
#pragma once

#include "../export.h"
#include "ffm_kernels.h"

namespace ffm {

// Throw std::runtime_error where FFM_EXT_ISA names an ISA that is unknown or that this CPU lacks. Decided once.
const ForwardKernels& forward_kernels(ScalarKind dtype);
const BackwardKernels& backward_kernels(ScalarKind dtype);
const TrainKernels& train_kernels(ScalarKind dtype);
const Int8Kernels& int8_kernels();

// "baseline", "avx2" or "avx512" on x86-64, "neon" on AArch64, "baseline" elsewhere.
FFM_API const char* cpu_isa();

}  // namespace ffm
