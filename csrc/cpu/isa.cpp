// SPDX-License-Identifier: MIT
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../dispatch.h"

namespace ffm {
namespace {

// Of a storage type.
struct Tables {
  const ForwardKernels* forward;
  const BackwardKernels* backward;
  const TrainKernels* train;
};

}  // namespace

// What the kernel files define, once for every ISA and type of setup.py's lists. The linker looks for those of the ISAs
// in kIsas only.
#define FFM_DECLARE_KERNELS(isa)                                                      \
  namespace isa {                                                                     \
  template <typename T>                                                               \
  const ForwardKernels& forward_kernels();                                            \
  template <typename T>                                                               \
  const BackwardKernels& backward_kernels();                                          \
  template <typename T>                                                               \
  const TrainKernels& train_kernels();                                                \
  extern const Int8Kernels int8_kernels;                                              \
                                                                                      \
  [[maybe_unused]] static Tables tables(ScalarKind dtype) {                           \
    Tables of_type = {};                                                              \
    dispatch_dtype(dtype, [&](auto scalar) {                                          \
      using T = typename decltype(scalar)::type;                                      \
      of_type = {&forward_kernels<T>(), &backward_kernels<T>(), &train_kernels<T>()}; \
    });                                                                               \
    return of_type;                                                                   \
  }                                                                                   \
  }
FFM_DECLARE_KERNELS(baseline)
FFM_DECLARE_KERNELS(avx2)
FFM_DECLARE_KERNELS(avx512)
FFM_DECLARE_KERNELS(neon)

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports of Clang does not know the name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

struct Isa {
  const char* name;
  Tables (*tables)(ScalarKind);
  const Int8Kernels* int8;
  bool (*is_supported)();
};

// Best last.
constexpr Isa kIsas[] = {
#if defined(__aarch64__)
    // Every AArch64 CPU has NEON, so nothing lies below it.
    {"neon", neon::tables, &neon::int8_kernels, [] { return true; }},
#else
    {"baseline", baseline::tables, &baseline::int8_kernels, [] { return true; }},
#endif
#if defined(__x86_64__)
    {"avx2", avx2::tables, &avx2::int8_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }},
    {"avx512", avx512::tables, &avx512::int8_kernels,
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

const ForwardKernels& forward_kernels(ScalarKind dtype) { return *chosen().tables(dtype).forward; }
const BackwardKernels& backward_kernels(ScalarKind dtype) { return *chosen().tables(dtype).backward; }
const TrainKernels& train_kernels(ScalarKind dtype) { return *chosen().tables(dtype).train; }
const Int8Kernels& int8_kernels() { return *chosen().int8; }
const char* cpu_isa() { return chosen().name; }

}  // namespace ffm
