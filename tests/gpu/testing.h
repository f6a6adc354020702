// SPDX-License-Identifier: MIT
// What the tests of the CUDA kernels share: memory of the emulated device, problems that lie in it, and results that
// are the same under every schedule.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../kernels/problems.h"
#include "cuda/ffm_kernels.h"
#include "emulator.h"

namespace ffm {

// What of everything is tested: one problem of `stride`, up to the last, each under so many schedules.
struct Coverage {
  uint64_t stride = 1;
  uint64_t last = UINT64_MAX;
  uint64_t num_schedules = std::size(gpu::emulator::kSchedules);
};

void test_forward(const Coverage& coverage);
void test_int8(const Coverage& coverage);
void test_contents(const Coverage& coverage);
void test_backward(const Coverage& coverage);

// Numbers in the memory of the device, all bits set at first, and not one byte more: whoever reads or writes past them
// meets the address sanitizer, or a page that must not be used. Aligned to 16 bytes as tensors are, or, as a view of a
// tensor may be, to one number alone.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t n, bool is_aligned = true) : n_(n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T), align = is_aligned ? 16 : sizeof(T);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const size_t before = is_aligned ? 0 : sizeof(T);
    if (posix_memalign(&memory_, 256, bytes + before) != 0) std::abort();
    data_ = reinterpret_cast<T*>(static_cast<char*>(memory_) + before);
    (void)align;
#else
    memory_bytes_ = (bytes + 16 + kPageBytes - 1) / kPageBytes * kPageBytes + kPageBytes;
    memory_ = mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) std::abort();
    char* const end = static_cast<char*>(memory_) + memory_bytes_ - kPageBytes;
    mprotect(end, kPageBytes, PROT_NONE);
    data_ = reinterpret_cast<T*>(end - (bytes + align - 1) / align * align);
    if (!is_aligned && reinterpret_cast<uintptr_t>(data_) % 16 == 0) --data_;
#endif
    clear();
    gpu::emulator::add_global_memory(data_, bytes);
  }
  explicit DeviceArray(const std::vector<T>& numbers, bool is_aligned = true)
      : DeviceArray(static_cast<int64_t>(numbers.size()), is_aligned) {
    std::copy(numbers.begin(), numbers.end(), data_);
  }
  ~DeviceArray() {
    gpu::emulator::remove_global_memory(data_);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    std::free(memory_);
#else
    munmap(memory_, memory_bytes_);
#endif
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void clear() { std::memset(static_cast<void*>(data_), 0xff, static_cast<size_t>(n_) * sizeof(T)); }
  T* data() const { return data_; }
  std::vector<T> read() const { return std::vector<T>(data_, data_ + n_); }

 private:
  static constexpr size_t kPageBytes = 4096;
  int64_t n_;
  void* memory_ = nullptr;
  [[maybe_unused]] size_t memory_bytes_ = 0;
  T* data_ = nullptr;
};

class DeviceIds {
 public:
  explicit DeviceIds(const IdArray& ids) : wide_(ids.wide), narrow_(ids.narrow) {}
  Ids as(const Ids& host) const {
    if (!host) return {};
    if (host.is_int64) return {wide_.data(), true};
    return {narrow_.data(), false};
  }

 private:
  DeviceArray<int64_t> wide_;
  DeviceArray<int32_t> narrow_;
};

// A batch whose problem points into the device.
template <typename T>
struct DeviceBatch {
  DeviceIds indices, fields, offsets;
  DeviceArray<T> weight, values;
  Problem problem;

  explicit DeviceBatch(const Batch<T>& batch, bool is_aligned = true)
      : indices(batch.indices),
        fields(batch.fields),
        offsets(batch.offsets),
        weight(batch.weight, is_aligned),
        values(batch.values, is_aligned),
        problem(batch.problem) {
    problem.indices = indices.as(problem.indices);
    problem.fields = fields.as(problem.fields);
    problem.offsets = offsets.as(problem.offsets);
    problem.weight = weight.data();
    if (problem.values) problem.values = values.data();
  }
};

template <typename T>
bool same_bits(const std::vector<T>& one, const std::vector<T>& two) {
  if (one.size() != two.size()) return false;
  return one.empty() || std::memcmp(one.data(), two.data(), one.size() * sizeof(T)) == 0;
}

// Fails where a launcher says that something went wrong.
inline void launched(const std::string& what, const char* error) {
  if (error) check(false, what + ": " + error);
}

// The problem of this number on the devices of this number: one that can do bulk copies, one that cannot, one with so
// little shared memory that large samples go in pieces.
inline void choose_device(uint64_t number) {
#ifdef __SANITIZE_THREAD__
  constexpr int kMany = 1;
#else
  constexpr int kMany = 2;
#endif
  const gpu::emulator::Device devices[] = {{kMany, 1, 227 << 10, 90},
                                           {kMany, 1, 227 << 10, 80},
                                           {1, 1, 16 << 10, 90},
                                           {1, kMany, 24 << 10, 80},
                                           {2, kMany, 99 << 10, 90}};
  gpu::emulator::device = devices[number % std::size(devices)];
}

// What runs, for the message of a crash.
inline char running[256];

inline std::vector<gpu::emulator::Schedule> chosen_schedules(const Coverage& coverage, uint64_t number) {
  constexpr uint64_t kAll = std::size(gpu::emulator::kSchedules);
  std::vector<gpu::emulator::Schedule> chosen;
  for (uint64_t i = 0; i < std::min(coverage.num_schedules, kAll); ++i) {
    chosen.push_back(gpu::emulator::kSchedules[(number / coverage.stride + i) % kAll]);
  }
  return chosen;
}

// What run() gives, a vector of numbers, under the first schedule; under the others it must have the same bits.
template <typename Run>
auto under_schedules(const Coverage& coverage, uint64_t number, const std::string& what, Run&& run) {
  std::snprintf(running, sizeof(running), "%s", what.c_str());
  decltype(run()) first;
  bool is_first = true;
  for (const gpu::emulator::Schedule& schedule : chosen_schedules(coverage, number)) {
    gpu::emulator::set_schedule(schedule);
    auto found = run();
    if (!is_first) check(same_bits(first, found), what + ": other bits with the schedule " + schedule.name);
    if (is_first) first = std::move(found);
    is_first = false;
  }
  return first;
}

// Samples: so many that blocks take several, one after the other, and use the memory of the first ones again. With TSan
// a thread is dear: fewer blocks, and fewer samples.
#ifdef __SANITIZE_THREAD__
constexpr int64_t kBatchSizes[] = {9, 6, 5, 6};
#else
constexpr int64_t kBatchSizes[] = {18, 7, 6, 7};
#endif

// Calls fn(batch, number) for every `coverage.stride`-th problem, on a device of some kind.
template <typename Fn>
void for_problems(const Coverage& coverage, Fn&& fn) {
  const auto batch_size = [](uint64_t number) { return kBatchSizes[number % 4]; };
  for_kernel_problems(coverage.stride, coverage.last, batch_size, [&](auto& batch, uint64_t number) {
    choose_device(random_bits());
    batch.name += " on a device of " + std::to_string(gpu::emulator::device.compute_capability) + " with " +
                  std::to_string(gpu::emulator::device.shared_bytes >> 10) + " KiB";
    fn(batch, number);
  });
}

}  // namespace ffm
