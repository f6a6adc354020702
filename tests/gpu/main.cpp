// SPDX-License-Identifier: MIT
// The CUDA kernels, run by the emulator, against the definition. Arguments: which tests, the stride through the
// problems, the number of schedules, the last problem. Prints what fails, and at last "N passed, N failed".

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <string>

#include "testing.h"

namespace {

// A read or write outside of everything: the guard page of an array, or an address that is not aligned.
[[maybe_unused]] void crash(int) {
  const char text[] = "crash in ";
  (void)!write(2, text, sizeof(text) - 1);
  (void)!write(2, ffm::running, std::strlen(ffm::running));
  (void)!write(2, "\n", 1);
  _exit(gpu::emulator::kErrorExit);
}

void explain_crashes() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  static char stack[64 << 10];
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof(stack);
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_handler = crash;
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  explain_crashes();
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string which = argc > 1 ? argv[1] : "all";
  ffm::Coverage coverage;
  if (argc > 2) coverage.stride = std::stoul(argv[2]);
  if (argc > 3) coverage.num_schedules = std::stoul(argv[3]);
  if (argc > 4) coverage.last = std::stoul(argv[4]);
  const std::pair<const char*, void (*)(const ffm::Coverage&)> tests[] = {{"forward", ffm::test_forward},
                                                                          {"int8", ffm::test_int8},
                                                                          {"contents", ffm::test_contents},
                                                                          {"backward", ffm::test_backward}};
  for (const auto& [name, test] : tests) {
    if (which == "all" || which == name) test(coverage);
  }
  std::printf("%d passed, %d failed\n", ffm::num_passed, ffm::num_failed);
  return ffm::num_failed > 0;
}
