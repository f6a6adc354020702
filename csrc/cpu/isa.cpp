// SPDX-License-Identifier: MIT
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ffm {

namespace baseline {
extern const ForwardKernels forward_kernels;
extern const BackwardKernels backward_kernels;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const ForwardKernels forward_kernels;
extern const BackwardKernels backward_kernels;
}  // namespace avx2
namespace avx512 {
extern const ForwardKernels forward_kernels;
extern const BackwardKernels backward_kernels;
}  // namespace avx512
#endif

namespace {

struct Isa {
  const char* name;
  const ForwardKernels* forward;
  const BackwardKernels* backward;
  bool (*is_supported)();
};

// Best last.
constexpr Isa kIsas[] = {
    {"baseline", &baseline::forward_kernels, &baseline::backward_kernels, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::forward_kernels, &avx2::backward_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {"avx512", &avx512::forward_kernels, &avx512::backward_kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
};

const Isa& choose() {
  const char* forced = std::getenv("FFM_EXT_ISA");
  const Isa* best = nullptr;
  std::string known;
  for (const Isa& isa : kIsas) {
    known += std::string(known.empty() ? "" : ", ") + isa.name;
    if (forced == nullptr || *forced == '\0') {
      if (isa.is_supported()) best = &isa;
    } else if (std::strcmp(forced, isa.name) == 0) {
      if (!isa.is_supported()) throw std::runtime_error(std::string("FFM_EXT_ISA = ") + forced + ": this CPU lacks it");
      return isa;
    }
  }
  if (best == nullptr) throw std::runtime_error(std::string("FFM_EXT_ISA = ") + forced + " is not one of " + known);
  return *best;
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const ForwardKernels& forward_kernels() { return *chosen().forward; }
const BackwardKernels& backward_kernels() { return *chosen().backward; }
const char* cpu_isa() { return chosen().name; }

}  // namespace ffm
