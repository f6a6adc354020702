// SPDX-License-Identifier: MIT
// The fibers behind emulator.h. With the thread sanitizer this file is compiled without it, and with GPU_EMULATOR_TSAN
// instead: barriers are told to the sanitizer, what the emulator does for itself is not.

#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef GPU_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace gpu::emulator {
namespace {

// ---- What the thread sanitizer is told.

#ifdef GPU_EMULATOR_TSAN
constexpr bool kIsTsan = true;
constexpr unsigned kNoSync = 1;
void acquire(char* sync) { __tsan_acquire(sync); }
void release(char* sync) { __tsan_release(sync); }
void mark_read(const void* begin, size_t bytes) { __tsan_read_range(const_cast<void*>(begin), bytes); }
void mark_write(void* begin, size_t bytes) { __tsan_write_range(begin, bytes); }
#else
constexpr bool kIsTsan = false;
void acquire(char*) {}
void release(char*) {}
void mark_read(const void*, size_t) {}
void mark_write(void*, size_t) {}
#endif

// A place of its own for every meeting of threads, so that who is late learns nothing of the next meeting.
struct SyncPlaces {
  static constexpr unsigned kNumPlaces = 64;
  char places[8 * kNumPlaces];
  unsigned next = 0;

  char* take() { return &places[8 * (next++ % kNumPlaces)]; }
};

// ---- State.

void* new_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    std::perror("gpu emulator: mmap");
    _exit(kErrorExit);
  }
  return pages;
}

constexpr size_t kPageBytes = 4096, kStackBytes = 256 << 10;
constexpr unsigned kMaxCopies = 4096;  // in flight, of a thread
constexpr size_t kMaxBulkCopies = 65536, kMaxBarriers = 1024;

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint32_t next;  // of a barrier
};

// Copies of a thread, and an unused page before its stack.
struct FiberMemory {
  Copy copies[kMaxCopies];
  unsigned group_ends[kMaxCopies];
  alignas(kPageBytes) unsigned char guard[kPageBytes];
  unsigned char stack[kStackBytes];
};

enum class State { kReady, kInWarp, kInBlock, kAtBarrier, kDone };

struct Warp;

struct Fiber {
  FiberMemory* memory;
  uint3 thread;
  Warp* warp;
  unsigned lane;
  State state = State::kReady;

  // What it waits for, brings and gets.
  const char* what = "";
  Location at;
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int operand = 0, width = 32;
  char* sync = nullptr;
  Fiber* next = nullptr;  // in a list of those who wait

  // Copies [begin, end), those before `open` in groups.
  unsigned begin = 0, open = 0, end = 0, first_group = 0, end_group = 0;

#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

struct Meeting {
  unsigned mask, arrived = 0;
  Collective kind;
  const char* name;
  char* sync;
};

struct Warp {
  unsigned lanes = 0, alive = 0;
  unsigned expected = 0;  // the masks of meetings that have begun
  Fiber* fibers[32];
  Meeting meetings[32];  // by the lowest lane of the mask
  SyncPlaces sync;
};

struct SharedVariable {
  const void* key;
  unsigned char* begin;
  size_t bytes;
};

struct BulkBarrier {
  uint64_t* address;
  unsigned arrivals, pending;
  int64_t expected, in_flight;  // bytes
  uint32_t first_copy;
  unsigned phase;
  Fiber* waiting;
  char sync[8 * 8];  // by phase
};

// Of the block that runs. Vectors are as large as they get before its first fiber starts.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> ready;  // a ring, a power of two
  size_t ready_begin, num_ready;
  int alive, arrived, num_true;
  Fiber* waiting;  // at __syncthreads
  Location barrier_at;
  char* barrier_sync;
  SyncPlaces sync;
  std::vector<SharedVariable> shared;
  size_t static_bytes;
  std::vector<BulkBarrier> barriers;
};

Block block;
Fiber* running = nullptr;
Fiber host;
[[maybe_unused]] const void* host_stack = nullptr;
[[maybe_unused]] size_t host_stack_bytes = 0;
const Launch* launched = nullptr;
Location launched_at;
Copy* bulk_copies = nullptr;
uint32_t num_bulk_copies = 0;  // the first is none

Schedule schedule = kSchedules[0];
uint64_t random_state = 0;
std::map<const void*, int> max_shared_bytes;
std::map<const unsigned char*, size_t> global_memory;
std::vector<FiberMemory*> free_memory, used_memory;
cudaError_t last_error = cudaSuccess;
char launch_sync[8], fence_sync[8];

// What TSan knows is not used twice in a launch. Of memory, it would see a block's access race with another's; of
// fibers, it would take one for what it was before.
std::vector<std::pair<void*, size_t>> kept_pages;
[[maybe_unused]] std::vector<void*> kept_fibers;
// As many threads as TSan can have. Beyond, races between blocks that run far from each other are missed.
[[maybe_unused]] constexpr size_t kMaxKeptFibers = 2048;

// SplitMix64. Not one of the standard library: the linker may take its code from a file that is instrumented.
uint64_t next_random() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// ---- Switching.

#ifdef __x86_64__
asm(R"(
  .text
  .type gpu_emulator_switch, @function
gpu_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size gpu_emulator_switch, .-gpu_emulator_switch
)");
extern "C" void gpu_emulator_switch(void** saved, void* next);
#endif

void switch_to(Fiber& next) {
  Fiber& self = *running;
  running = &next;
  threadIdx = next.thread;
#ifdef GPU_EMULATOR_TSAN
  __tsan_switch_to_fiber(next.tsan_fiber, kNoSync);
#endif
#ifdef __SANITIZE_ADDRESS__
  const bool is_host = &next == &host;
  __sanitizer_start_switch_fiber(self.state == State::kDone ? nullptr : &self.asan_stack,
                                 is_host ? host_stack : next.memory->stack, is_host ? host_stack_bytes : kStackBytes);
#endif
#ifdef __x86_64__
  gpu_emulator_switch(&self.stack_pointer, next.stack_pointer);
#else
  swapcontext(&self.context, &next.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.asan_stack, nullptr, nullptr);
#endif
}

Fiber* next_ready() {
  if (block.num_ready == 0) return &host;
  const size_t last = block.ready.size() - 1;
  size_t at = block.ready_begin;
  if (schedule.order == Order::kDepthFirst) {
    at = (block.ready_begin + block.num_ready - 1) & last;
  } else {
    if (schedule.order == Order::kRandom) {
      const size_t other = (block.ready_begin + next_random() % block.num_ready) & last;
      std::swap(block.ready[at], block.ready[other]);
    }
    block.ready_begin = (block.ready_begin + 1) & last;
  }
  --block.num_ready;
  return block.ready[at];
}

void reschedule() {
  Fiber* next = next_ready();
  if (next != running) switch_to(*next);
}

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  block.ready[(block.ready_begin + block.num_ready++) & (block.ready.size() - 1)] = &fiber;
}

void wait_as(State state) {
  running->state = state;
  reschedule();
}

// Calls function(i) for i in [0, n), so that those who are made ready run forwards, or backwards.
void in_order(int n, auto&& function) {
  const bool is_last_first = schedule.order == Order::kDepthFirst;
  for (int i = 0; i < n; ++i) function(is_last_first != schedule.is_reversed ? n - 1 - i : i);
}

// All of a list that grew at its head.
void make_list_ready(Fiber*& list, auto&& function) {
  // The list is in reverse order of arrival.
  if (schedule.order != Order::kDepthFirst) {
    Fiber* reversed = nullptr;
    while (list) {
      Fiber* next = list->next;
      list->next = reversed;
      reversed = list;
      list = next;
    }
    list = reversed;
  }
  while (list) {
    Fiber& fiber = *list;
    list = fiber.next;
    function(fiber);
    make_ready(fiber);
  }
}

void release_block() {
  block.arrived = 0;
  make_list_ready(block.waiting, [](Fiber& fiber) { fiber.result = static_cast<uint64_t>(block.num_true); });
}

unsigned lane_mask(const Fiber& fiber) { return 1u << fiber.lane; }

// ---- The life of a thread.

void leave() {
  Fiber& self = *running;
  Warp& warp = *self.warp;
  warp.alive &= ~lane_mask(self);
  if (warp.expected & lane_mask(self)) {
    for (const Fiber* other : warp.fibers) {
      if (other == nullptr || other->state != State::kInWarp || !(other->mask & lane_mask(self))) continue;
      fail(other->at, "%s with mask 0x%08x: lane %u, which the mask names, has returned (told for lane %u)",
           other->what, other->mask, self.lane, other->lane);
    }
  }
  if (self.begin != self.end) fail(self.at, "the thread returns before its asynchronous copies have landed");
  --block.alive;
  if (block.arrived > 0 && block.arrived == block.alive) release_block();
  release(launch_sync);
  wait_as(State::kDone);
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (host_stack == nullptr) {
    host_stack = bottom;
    host_stack_bytes = bytes;
  }
#endif
  launched->run(launched->arguments);
  leave();
}

FiberMemory* take_fiber_memory() {
  if (free_memory.empty()) {
    auto* memory = static_cast<FiberMemory*>(new_pages(sizeof(FiberMemory)));
    // Two maps more for each thread, of which there are many at a time with TSan.
    if (!kIsTsan) mprotect(memory->guard, sizeof(memory->guard), PROT_NONE);
    free_memory.push_back(memory);
  }
  FiberMemory* memory = free_memory.back();
  free_memory.pop_back();
  used_memory.push_back(memory);
  return memory;
}

void start(Fiber& fiber) {
  FiberMemory* memory = fiber.memory = take_fiber_memory();
  // Stacks begin at different places of a page, or they would meet in the same sets of the cache.
  const size_t offset = (&fiber - block.fibers.data()) % 64 * 64;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory->stack + kStackBytes - 4 * kPageBytes, 4 * kPageBytes);
#endif
#ifdef __x86_64__
  auto** top = reinterpret_cast<void**>(memory->stack + kStackBytes - 64 - offset);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = memory->stack;
  fiber.context.uc_stack.ss_size = kStackBytes - offset;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
#ifdef GPU_EMULATOR_TSAN
  fiber.tsan_fiber = __tsan_create_fiber(0);
  char name[64];
  std::snprintf(name, sizeof(name), "block %u thread %u", blockIdx.x, fiber.thread.x);
  __tsan_set_fiber_name(fiber.tsan_fiber, name);
#endif
}

// ---- Shared memory.

// Behind every variable, where there is no address sanitizer.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kRedZoneBytes = 0;
#else
constexpr size_t kRedZoneBytes = 256;
#endif

// Not initialized: every byte 0xff is NaN, of any type.
unsigned char* new_shared(size_t bytes, size_t align) {
  void* memory = nullptr;
  if constexpr (kIsTsan) {
    memory = new_pages(bytes + kRedZoneBytes);
    kept_pages.emplace_back(memory, bytes + kRedZoneBytes);
  } else if (posix_memalign(&memory, std::max<size_t>(align, 16), bytes + kRedZoneBytes) != 0) {
    std::abort();
  }
  std::memset(memory, 0xff, bytes + kRedZoneBytes);
  return static_cast<unsigned char*>(memory);
}

void make_shared_memory(size_t dynamic_bytes) {
  block.static_bytes = 0;
  block.shared.clear();
  block.shared.reserve(256);
  block.shared.push_back({nullptr, new_shared(dynamic_bytes, 128), dynamic_bytes});
  // A thread that allocates would race, in TSan's eyes, with those who use it: static variables are in here.
  if constexpr (kIsTsan) block.shared.push_back({&block, new_shared(kStaticSharedBytes, 128), 0});
}

void free_shared_memory() {
  for (const SharedVariable& variable : block.shared) {
    for (size_t i = 0; !kIsTsan && i < kRedZoneBytes; ++i) {
      if (variable.begin[variable.bytes + i] == 0xff) continue;
      fail(launched_at, "block (%u, %u, %u) wrote past the end of %zu bytes of shared memory", blockIdx.x, blockIdx.y,
           blockIdx.z, variable.bytes);
    }
    if (!kIsTsan) std::free(variable.begin);
  }
}

bool is_in(const void* address, size_t bytes, const unsigned char* begin, size_t size) {
  const auto* first = static_cast<const unsigned char*>(address);
  return first >= begin && bytes <= size && static_cast<size_t>(first - begin) <= size - bytes;
}

bool is_shared(const void* address, size_t bytes) {
  for (const SharedVariable& variable : block.shared) {
    if (is_in(address, bytes, variable.begin, variable.bytes)) return true;
  }
  return false;
}

bool is_global(const void* address, size_t bytes) {
  if (global_memory.empty()) return true;
  auto after = global_memory.upper_bound(static_cast<const unsigned char*>(address));
  if (after == global_memory.begin()) return false;
  --after;
  return is_in(address, bytes, after->first, after->second);
}

void check_copy(const char* name, const void* to, const void* from, size_t bytes, size_t align, const Location& at) {
  if (reinterpret_cast<uintptr_t>(to) % align || reinterpret_cast<uintptr_t>(from) % align) {
    fail(at, "%s of %zu bytes from %p to %p: both must be aligned to %zu bytes", name, bytes, from, to, align);
  }
  if (!is_shared(to, bytes)) fail(at, "%s of %zu bytes does not land in the block's shared memory", name, bytes);
  if (!is_global(from, bytes)) fail(at, "%s of %zu bytes reads past what lies in global memory", name, bytes);
  mark_read(from, bytes);
  mark_write(const_cast<void*>(to), bytes);
}

// TSan is told of a copy both where it begins and at the wait, so that it needs no other landing.
bool lands_at_once() {
  if (kIsTsan) return false;
  return schedule.landing == Landing::kAtOnce || (schedule.landing == Landing::kRandom && next_random() % 2);
}

// ---- Running blocks.

void explain_deadlock() {
  std::fprintf(stderr, "gpu emulator: deadlock in block (%u, %u, %u): no thread can go on\n", blockIdx.x, blockIdx.y,
               blockIdx.z);
  int num_told = 0;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kDone || ++num_told > 8) continue;
    std::fprintf(stderr, "  %s:%u: thread (%u, %u, %u) waits in %s", fiber.at.file_name(), fiber.at.line(),
                 fiber.thread.x, fiber.thread.y, fiber.thread.z, fiber.what);
    if (fiber.state == State::kInWarp) std::fprintf(stderr, " with mask 0x%08x", fiber.mask);
    std::fprintf(stderr, "\n");
  }
  if (num_told > 8) std::fprintf(stderr, "  and %d more\n", num_told - 8);
  _exit(kErrorExit);
}

// What is kept for TSan; memory that is unmapped is as good as new.
[[maybe_unused]] void forget_fibers() {
  for (auto [pages, bytes] : kept_pages) munmap(pages, bytes);
  kept_pages.clear();
  for (FiberMemory* memory : used_memory) munmap(memory, sizeof(FiberMemory));
  used_memory.clear();
#ifdef GPU_EMULATOR_TSAN
  for (void* fiber : kept_fibers) __tsan_destroy_fiber(fiber);
  kept_fibers.clear();
#endif
}

void run_block(size_t dynamic_bytes) {
  const unsigned num_threads = blockDim.x * blockDim.y * blockDim.z;
  block.fibers.assign(num_threads, Fiber{});
  block.warps.assign((num_threads + 31) / 32, Warp{});
  block.ready.assign(std::bit_ceil(num_threads), nullptr);
  block.barriers.clear();
  block.barriers.reserve(kMaxBarriers);
  block.ready_begin = block.num_ready = 0;
  block.alive = static_cast<int>(num_threads);
  block.arrived = 0;
  block.waiting = nullptr;
  num_bulk_copies = 0;
  make_shared_memory(dynamic_bytes);
  for (unsigned i = 0; i < num_threads; ++i) {
    Fiber& fiber = block.fibers[i];
    Warp& warp = block.warps[i / 32];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.warp = &warp;
    fiber.lane = i % 32;
    warp.fibers[fiber.lane] = &fiber;
    warp.lanes |= lane_mask(fiber);
    warp.alive = warp.lanes;
    start(fiber);
  }
  in_order(static_cast<int>(num_threads), [](int i) { make_ready(block.fibers[i]); });
  running = &host;
  host.state = State::kReady;
#ifdef GPU_EMULATOR_TSAN
  host.tsan_fiber = __tsan_get_current_fiber();
#endif
  reschedule();
  if (block.alive > 0) explain_deadlock();
  running = nullptr;
  free_shared_memory();
  for (const BulkBarrier& barrier : block.barriers) {
    if (barrier.in_flight > 0) fail(launched_at, "a block ends before its bulk copies have landed");
  }
#ifdef GPU_EMULATOR_TSAN
  for (Fiber& fiber : block.fibers) kept_fibers.push_back(fiber.tsan_fiber);
  if (kept_fibers.size() >= kMaxKeptFibers) forget_fibers();
#else
  free_memory.insert(free_memory.end(), used_memory.begin(), used_memory.end());
  used_memory.clear();
#endif
}

}  // namespace

void fail(const Location& at, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  std::fflush(stdout);
  std::fprintf(stderr, "gpu emulator: %s:%u: ", at.file_name(), at.line());
  if (running && running != &host) {
    const uint3 thread = running->thread;
    std::fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z, thread.x,
                 thread.y, thread.z);
  }
  std::fprintf(stderr, "%s [%s]\n", text, schedule.name);
  _exit(kErrorExit);
}

void set_schedule(const Schedule& next) {
  schedule = next;
  random_state = next.seed;
}

void add_global_memory(const void* begin, size_t bytes) {
  global_memory[static_cast<const unsigned char*>(begin)] = bytes;
}
void remove_global_memory(const void* begin) { global_memory.erase(static_cast<const unsigned char*>(begin)); }

void set_max_shared_bytes(const void* kernel, int bytes, const Location& at) {
  if (bytes < 0 || bytes > device.shared_bytes) {
    fail(at, "%d bytes of shared memory are asked for, the device has %d", bytes, device.shared_bytes);
  }
  max_shared_bytes[kernel] = bytes;
}

cudaError_t launch(const Launch& launch, const Location& at) {
  const dim3 grid = launch.grid, threads = launch.block;
  if (running) fail(at, "a kernel launches another");
  const uint64_t num_threads = uint64_t{threads.x} * threads.y * threads.z;
  if (num_threads == 0 || num_threads > 1024)
    fail(at, "a block of %u x %u x %u threads", threads.x, threads.y, threads.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x >> 31 || grid.y >> 16 || grid.z >> 16) {
    fail(at, "a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  }
  const auto opted = max_shared_bytes.find(launch.kernel);
  const size_t allowed =
      opted == max_shared_bytes.end() ? kStaticSharedBytes : std::max(opted->second, kStaticSharedBytes);
  if (launch.shared_bytes > allowed) {
    fail(at, "%zu bytes of shared memory for a kernel that may have %zu: see cudaFuncSetAttribute", launch.shared_bytes,
         allowed);
  }
  if (bulk_copies == nullptr) bulk_copies = static_cast<Copy*>(new_pages(sizeof(Copy) * kMaxBulkCopies));
  launched = &launch;
  launched_at = at;
  blockDim = threads;
  gridDim = grid;
  const int64_t num_blocks = int64_t{grid.x} * grid.y * grid.z;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t b = schedule.is_reversed ? num_blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(launch.shared_bytes);
  }
  launched = nullptr;
  acquire(launch_sync);
  if constexpr (kIsTsan) forget_fibers();
  return cudaSuccess;
}

// ---- Warps.

uint64_t warp_collective(Collective kind, const char* name, unsigned mask, uint64_t value, int operand, int width,
                         const Location& at) {
  Fiber& self = *running;
  Warp& warp = *self.warp;
  const unsigned given_mask = mask;
  mask &= warp.lanes;
  if (!(mask & lane_mask(self))) fail(at, "%s with mask 0x%08x, which lane %u is not in", name, given_mask, self.lane);
  if (const unsigned gone = mask & ~warp.alive) {
    fail(at, "%s with mask 0x%08x: lane %d, which the mask names, has returned", name, given_mask,
         std::countr_zero(gone));
  }
  if (width < 1 || width > 32 || (width & (width - 1))) fail(at, "%s with width %d", name, width);

  Meeting& meeting = warp.meetings[std::countr_zero(mask)];
  const bool is_first = meeting.arrived == 0;
  if (is_first ? (warp.expected & mask) != 0 : meeting.mask != mask || std::strcmp(meeting.name, name) != 0) {
    for (const Fiber* other : warp.fibers) {
      if (other == nullptr || other->state != State::kInWarp || !(other->mask & mask)) continue;
      fail(at, "lane %u is in %s with mask 0x%08x, but lane %u in %s with mask 0x%08x, %s:%u", self.lane, name,
           given_mask, other->lane, other->what, other->mask, other->at.file_name(), other->at.line());
    }
  }
  if (is_first) {
    meeting = {mask, 0, kind, name, warp.sync.take()};
    warp.expected |= mask;
  }
  meeting.arrived |= lane_mask(self);
  self.what = name;
  self.at = at;
  self.mask = given_mask;
  self.value = value;
  self.operand = operand;
  self.width = width;
  self.sync = meeting.sync;
  self.state = State::kInWarp;
  release(self.sync);
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    warp.expected &= ~mask;
    uint64_t ballot = 0;
    if (kind == Collective::kBallot) {
      for (int lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) ballot |= warp.fibers[lane]->value << lane;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& fiber = *warp.fibers[lane];
      const int segment = fiber.width - 1;
      int from = lane;
      switch (kind) {
        case Collective::kSync: break;
        case Collective::kBallot: fiber.result = ballot; break;
        case Collective::kMatchAny:
          fiber.result = 0;
          for (int other = 0; other < 32; ++other) {
            if ((mask >> other & 1) && warp.fibers[other]->value == fiber.value) fiber.result |= 1u << other;
          }
          break;
        case Collective::kShuffle: from = (lane & ~segment) | (fiber.operand & segment); break;
        case Collective::kShuffleUp:
          if ((lane & segment) >= fiber.operand) from = lane - fiber.operand;
          break;
        case Collective::kShuffleDown:
          if ((lane & segment) + fiber.operand <= segment) from = lane + fiber.operand;
          break;
        case Collective::kShuffleXor:
          if ((lane ^ fiber.operand) <= (lane | segment)) from = lane ^ fiber.operand;
          break;
      }
      if (kind >= Collective::kShuffle && kind <= Collective::kShuffleXor) {
        if (!(mask >> from & 1)) {
          fail(fiber.at, "%s with mask 0x%08x: lane %d reads from lane %d, which is not in the mask", name, fiber.mask,
               lane, from);
        }
        fiber.result = warp.fibers[from]->value;
      }
    }
    in_order(32, [&](int lane) {
      if (mask >> lane & 1) make_ready(*warp.fibers[lane]);
    });
  }
  reschedule();
  acquire(self.sync);
  return self.result;
}

// ---- Blocks.

int block_barrier(bool value, const Location& at) {
  Fiber& self = *running;
  if (block.arrived == 0) {
    block.barrier_at = at;
    block.barrier_sync = block.sync.take();
    block.num_true = 0;
  } else if (block.barrier_at.line() != at.line() || std::strcmp(block.barrier_at.file_name(), at.file_name()) != 0) {
    const uint3 other = block.waiting->thread;
    fail(at, "__syncthreads here, but thread (%u, %u, %u) is in that of %s:%u", other.x, other.y, other.z,
         block.barrier_at.file_name(), block.barrier_at.line());
  }
  self.what = "__syncthreads";
  self.at = at;
  self.sync = block.barrier_sync;
  self.state = State::kInBlock;
  self.next = block.waiting;
  block.waiting = &self;
  block.num_true += value;
  release(self.sync);
  if (++block.arrived == block.alive) release_block();
  reschedule();
  acquire(self.sync);
  return static_cast<int>(self.result);
}

unsigned char* dynamic_shared_memory() { return block.shared[0].begin; }

void* shared_variable(const void* key, size_t bytes, size_t align, const Location& at) {
  for (const SharedVariable& variable : block.shared) {
    if (variable.key == key) return variable.begin;
  }
  const size_t begin = (block.static_bytes + align - 1) / align * align;
  block.static_bytes = begin + bytes;
  const size_t all = block.static_bytes + block.shared[0].bytes;
  if (block.static_bytes > kStaticSharedBytes || all > static_cast<size_t>(device.shared_bytes)) {
    fail(at, "%zu bytes of static shared memory, %zu in all", block.static_bytes, all);
  }
  if (block.shared.size() == block.shared.capacity()) fail(at, "too many shared variables for the emulator");
  unsigned char* memory = kIsTsan ? block.shared[1].begin + begin : new_shared(bytes, align);
  block.shared.push_back({key, memory, bytes});
  return memory;
}

void preempt() {
  if (schedule.order != Order::kRandom || next_random() % 2) return;
  make_ready(*running);
  reschedule();
}

void fence() {
  acquire(fence_sync);
  release(fence_sync);
  preempt();
}

// ---- Asynchronous copies of a thread.

void copy_async(void* shared, const void* global, int bytes, const Location& at) {
  Fiber& self = *running;
  self.at = at;
  check_copy("an asynchronous copy", shared, global, static_cast<size_t>(bytes), static_cast<size_t>(bytes), at);
  if (lands_at_once()) {
    std::memcpy(shared, global, static_cast<size_t>(bytes));
    return;
  }
  if (self.end - self.begin == kMaxCopies) fail(at, "more than %u copies of a thread in flight", kMaxCopies);
  self.memory->copies[self.end++ % kMaxCopies] = {shared, global, static_cast<uint32_t>(bytes), 0};
}

void copy_async_commit() {
  Fiber& self = *running;
  if (self.end_group - self.first_group == kMaxCopies) fail(self.at, "more than %u groups of copies", kMaxCopies);
  self.memory->group_ends[self.end_group++ % kMaxCopies] = self.end;
}

void copy_async_wait(int groups) {
  Fiber& self = *running;
  while (self.end_group - self.first_group > static_cast<unsigned>(groups)) {
    const unsigned end = self.memory->group_ends[self.first_group++ % kMaxCopies];
    for (; self.begin != end; ++self.begin) {
      const Copy& copy = self.memory->copies[self.begin % kMaxCopies];
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

// ---- Bulk copies and their barriers.

namespace {

constexpr uint64_t kBarrierMagic = 0x6d62617272696572;

BulkBarrier& find_barrier(const char* name, uint64_t* address, const Location& at) {
  const uint64_t index = *address ^ kBarrierMagic;
  if (index >= block.barriers.size() || block.barriers[index].address != address) {
    fail(at, "%s: the barrier is not initialized", name);
  }
  mark_read(address, sizeof(*address));
  running->at = at;
  running->what = name;
  return block.barriers[index];
}

char* phase_sync(BulkBarrier& barrier, unsigned phase) { return &barrier.sync[8 * (phase % 8)]; }

bool is_complete(const BulkBarrier& barrier) { return barrier.pending == 0 && barrier.expected == barrier.in_flight; }

void wake(BulkBarrier& barrier) {
  if (is_complete(barrier)) make_list_ready(barrier.waiting, [](Fiber&) {});
}

void end_phase(BulkBarrier& barrier) {
  acquire(phase_sync(barrier, barrier.phase));
  for (uint32_t c = barrier.first_copy; c != 0; c = bulk_copies[c].next) {
    std::memcpy(bulk_copies[c].to, bulk_copies[c].from, bulk_copies[c].bytes);
  }
  release(phase_sync(barrier, barrier.phase));
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  barrier.expected = barrier.in_flight = 0;
  barrier.first_copy = 0;
}

}  // namespace

void barrier_init(uint64_t* address, unsigned arrivals, const Location& at) {
  if (!is_shared(address, sizeof(*address))) fail(at, "a barrier that is not in shared memory");
  if (reinterpret_cast<uintptr_t>(address) % 8) fail(at, "a barrier must be aligned to 8 bytes");
  if (arrivals == 0) fail(at, "a barrier for no arrivals");
  if (block.barriers.size() == kMaxBarriers) fail(at, "too many barriers for the emulator");
  mark_write(address, sizeof(*address));
  *address = block.barriers.size() ^ kBarrierMagic;
  block.barriers.push_back({address, arrivals, arrivals, 0, 0, 0, 0, nullptr, {}});
}

void barrier_arrive(uint64_t* address, unsigned bytes, const Location& at) {
  BulkBarrier& barrier = find_barrier("arrive", address, at);
  if (is_complete(barrier)) end_phase(barrier);  // for which none has waited
  if (barrier.pending == 0) fail(at, "more than %u arrivals in a phase", barrier.arrivals);
  --barrier.pending;
  barrier.expected += bytes;
  release(phase_sync(barrier, barrier.phase));
  wake(barrier);
}

void barrier_wait(uint64_t* address, unsigned parity, const Location& at) {
  BulkBarrier& barrier = find_barrier("wait of a barrier", address, at);
  if (parity > 1) fail(at, "a parity of %u", parity);
  const unsigned phase = barrier.phase % 2 == parity ? barrier.phase : barrier.phase - 1;
  if (phase == barrier.phase && !is_complete(barrier)) {
    running->next = barrier.waiting;
    barrier.waiting = running;
    wait_as(State::kAtBarrier);
  }
  if (phase == barrier.phase) end_phase(barrier);
  acquire(phase_sync(barrier, phase));
}

void copy_bulk_async(void* shared, const void* global, unsigned bytes, uint64_t* address, const Location& at) {
  BulkBarrier& barrier = find_barrier("a bulk copy", address, at);
  if (bytes % 16) fail(at, "a bulk copy of %u bytes, which is not a multiple of 16", bytes);
  check_copy("a bulk copy", shared, global, bytes, 16, at);
  release(phase_sync(barrier, barrier.phase));
  if (lands_at_once()) {
    std::memcpy(shared, global, bytes);
    barrier.expected -= bytes;
  } else {
    if (num_bulk_copies + 1 == kMaxBulkCopies) fail(at, "too many bulk copies for the emulator");
    bulk_copies[++num_bulk_copies] = {shared, global, bytes, barrier.first_copy};
    barrier.first_copy = num_bulk_copies;
    barrier.in_flight += bytes;
  }
  wake(barrier);
}

}  // namespace gpu::emulator

// ---- The runtime.

cudaError_t cudaPeekAtLastError() { return gpu::emulator::last_error; }
cudaError_t cudaGetLastError() { return std::exchange(gpu::emulator::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace gpu::emulator;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kStaticSharedBytes; break;
    case cudaDevAttrMultiProcessorCount: *value = device.num_multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.compute_capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.compute_capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_bytes + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_bytes; break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
