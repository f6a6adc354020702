// SPDX-License-Identifier: MIT
// The CPU kernels as a table of functions, one table an ISA (see isa.h). Each works on a range of samples or entries
// and calls nothing but itself: threads are the adapter's.
#pragma once

#include <cstddef>

#include "../params.h"

namespace ffm {

struct CpuKernels {
  // Bytes of scratch, aligned to 64, that a thread needs for `forward` and `backward`.
  size_t (*scratch_bytes)(const Problem&);

  // Samples [begin, end) -> out (all of it; the kernel writes its own part).
  void (*forward)(const Problem&, void* out, int64_t begin, int64_t end, void* scratch);

  // Samples [begin, end) -> gradients.
  void (*backward)(const Problem&, const Gradient&, int64_t begin, int64_t end, void* scratch);

  // Adds the staged rows of the entries [begin, end) whose slot is `part` modulo `parts`, in the order of the entries.
  void (*add_staged)(const Problem&, const Gradient&, int64_t begin, int64_t end, int64_t part, int64_t parts);

  // Half precision only: rounds the sums of the rows that the entries [begin, end) are the first of.
  void (*round_sums)(const Problem&, const Gradient&, int64_t begin, int64_t end);

  // Sum of the rows of each sample -> out [B].
  void (*gather_sum)(const Problem&, void* out, int64_t begin, int64_t end);
};

}  // namespace ffm
