// SPDX-License-Identifier: MIT
// The check of what a batch's tensors hold, on CUDA: it waits for the device, so it is off unless asked for.
#pragma once

#include "../batch.h"
#include "../check_contents.h"
#include "ffm_kernels.h"
#include "stream.h"

namespace ffm::cuda {

// Where the check is on: raises what the CPU raises.
void check_contents(const char* op, const Problem& p, const Tensor& like, const OnDevice& on);

// Number i of an array on the device.
double read_number(const OnDevice& on, const void* device, ScalarKind dtype, int64_t i);

}  // namespace ffm::cuda
