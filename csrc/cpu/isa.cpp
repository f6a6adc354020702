// SPDX-License-Identifier: MIT
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ffm {

namespace baseline {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  bool (*is_supported)();
};

// Best last.
constexpr Isa kIsas[] = {
    {"baseline", &baseline::kernels, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {"avx512", &avx512::kernels,
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

const CpuKernels& cpu_kernels() { return *chosen().kernels; }
const char* cpu_isa() { return chosen().name; }

}  // namespace ffm
