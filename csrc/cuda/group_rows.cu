// SPDX-License-Identifier: MIT
// Which entries of a batch share a row of the table: keys, a stable sort, and marks where rows begin.

#include <algorithm>
#include <bit>

#include "device_sort.h"
#include "ffm_kernels.h"
#include "group_rows.cuh"
#include "launch.h"

namespace ffm::cuda {
namespace {

constexpr int kThreads = 256;

// The key of an entry that counts for nothing: no smaller than N, also in as many bits as N - 1 and N need.
constexpr uint32_t kNoRow = UINT32_MAX;

__global__ void find_falling_offsets_kernel(Problem p, int32_t* is_falling) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b < p.batch_size && p.offsets[b + 1] < p.offsets[b]) atomicOr(is_falling, 1);
}

// The key of an entry is its row, unless its sample cannot be used. A warp works on a sample.
__global__ void make_keys(Problem p, const int32_t* is_falling, uint32_t* keys) {
  const int64_t b = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (b >= p.batch_size || (is_falling && *is_falling)) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t begin = p.entries_begin(b), end = p.entries_begin(b + 1);
  if (p.offsets) {
    begin = min(max(begin, int64_t{0}), p.num_entries);
    end = max(begin, min(end, p.num_entries));
  }
  bool is_bad = false;
  for (int64_t e = begin + lane; e < end; e += 32) {
    is_bad |= static_cast<uint64_t>(p.indices[e]) >= static_cast<uint64_t>(p.num_features);
    if (p.fields) is_bad |= static_cast<uint64_t>(p.fields[e]) >= static_cast<uint64_t>(p.num_fields);
  }
  if (__any_sync(0xffffffffu, is_bad)) return;
  for (int64_t e = begin + lane; e < end; e += 32) keys[e] = static_cast<uint32_t>(p.indices[e]);
}

__global__ void number_entries(int64_t n, int32_t* entries) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < n) entries[e] = static_cast<int32_t>(e);
}

// numbers: 1 where a row begins; or none.
__global__ void mark_rows(int64_t n, int64_t num_words, int64_t num_features, const uint32_t* rows,
                          const int32_t* entries, uint32_t* heads, Place* places, int32_t* has_many, int32_t* numbers) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool counts = i < n && rows[i] < num_features;
  // How many places next to this one have the same row, as far as it matters.
  int before = 0, behind = 0;
  if (counts) {
    while (before < Place::kFew && i - before > 0 && rows[i - before - 1] == rows[i]) ++before;
    while (before + behind < Place::kFew && i + behind + 1 < n && rows[i + behind + 1] == rows[i]) ++behind;
  }
  const int count = before + behind + 1;
  const bool is_one_of_many = counts && count > Place::kFew;
  if (is_one_of_many && before == 0) atomicOr(has_many, 1);
  const uint32_t bits = __ballot_sync(0xffffffffu, !is_one_of_many || before == 0);
  if (threadIdx.x % 32 == 0 && i / 32 < num_words) heads[i / 32] = bits;
  if (i >= n) return;
  Place place;
  if (is_one_of_many) {
    place = {static_cast<int32_t>(i), Place::kMany, 0};
  } else if (counts) {
    place = {static_cast<int32_t>(i - before), static_cast<int16_t>(count), static_cast<int16_t>(before)};
  }
  places[entries[i]] = place;
  if (numbers) numbers[i] = counts && before == 0;
}

__global__ void list_rows_kernel(int64_t n, const uint32_t* rows, const int32_t* numbers, int64_t* list) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n && numbers[i] != (i == 0 ? 0 : numbers[i - 1])) list[numbers[i] - 1] = rows[i];
}

unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

struct Lists {
  Lists(const Problem& p, bool number_rows, void* workspace) {
    Pieces pieces(workspace);
    const size_t n = static_cast<size_t>(p.num_entries);
    rows = pieces.take<uint32_t>(n);
    places = pieces.take<Place>(n);
    arrivals = pieces.take<int32_t>(n + 1);
    has_many = arrivals + n;
    // A level of the reduction reads the bits of whole blocks of 64 places, and of the place behind.
    num_words = n / 64 * 2 + 4;
    heads = pieces.take<uint32_t>(num_words);
    if (number_rows) numbers = pieces.take<int32_t>(n);
    is_falling = pieces.take<int32_t>(1);
    keys = pieces.take<uint32_t>(n);
    entries = pieces.take<int32_t>(n);
    sorted_entries = pieces.take<int32_t>(n);
    sort_bytes = n > 0 ? sort_workspace_bytes(p.num_entries) : 0;
    sort_workspace = pieces.take<unsigned char>(sort_bytes);
    bytes = pieces.used();
  }
  uint32_t *rows, *heads, *keys;
  Place* places;
  int32_t *arrivals, *has_many, *numbers = nullptr, *is_falling, *entries, *sorted_entries;
  void* sort_workspace;
  size_t num_words, sort_bytes, bytes;
};

}  // namespace

const char* find_falling_offsets(const Problem& p, int32_t* is_falling, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(is_falling, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess || p.batch_size == 0) return error_text(error);
  return error_text(
      GPU_LAUNCH(find_falling_offsets_kernel, blocks_for(p.batch_size), kThreads, 0, stream, p, is_falling));
}

size_t group_rows_bytes(const Problem& p, bool number_rows) { return Lists(p, number_rows, nullptr).bytes; }

const char* group_rows(const Problem& p, bool number_rows, void* workspace, RowGroups* groups, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t n = p.num_entries;
  if (n > INT32_MAX - kThreads) return "a batch of 2^31 or more entries";
  if (p.num_features >= kNoRow) return "a table of 2^32 - 1 or more rows";
  const Lists lists(p, number_rows, workspace);
  *groups = {lists.rows, lists.places, lists.arrivals, lists.has_many, lists.heads, lists.numbers};
  if (n == 0) return nullptr;
  const auto check = [](cudaError_t error) { return error_text(error); };

  if (const char* error = check(cudaMemsetAsync(lists.keys, 0xff, n * sizeof(uint32_t), stream))) return error;
  if (const char* error = check(cudaMemsetAsync(lists.arrivals, 0, (n + 1) * sizeof(int32_t), stream))) return error;
  if (p.offsets) {
    if (const char* error = find_falling_offsets(p, lists.is_falling, stream)) return error;
  }
  if (p.batch_size > 0) {
    if (const char* error = check(GPU_LAUNCH(make_keys, blocks_for(p.batch_size * 32), kThreads, 0, stream, p,
                                             p.offsets ? lists.is_falling : nullptr, lists.keys))) {
      return error;
    }
  }
  if (const char* error = check(GPU_LAUNCH(number_entries, blocks_for(n), kThreads, 0, stream, n, lists.entries))) {
    return error;
  }
  const int key_bits = std::bit_width(static_cast<uint64_t>(p.num_features));
  if (const char* error = sort_pairs(lists.keys, lists.entries, lists.rows, lists.sorted_entries, n, key_bits,
                                     lists.sort_workspace, lists.sort_bytes, stream)) {
    return error;
  }
  const int64_t num_words = static_cast<int64_t>(lists.num_words);
  if (const char* error = check(GPU_LAUNCH(mark_rows, blocks_for(num_words * 32), kThreads, 0, stream, n, num_words,
                                           p.num_features, lists.rows, lists.sorted_entries, lists.heads, lists.places,
                                           lists.has_many, lists.numbers))) {
    return error;
  }
  return number_rows ? inclusive_sum(lists.numbers, n, lists.sort_workspace, lists.sort_bytes, stream) : nullptr;
}

const char* list_rows(const Problem& p, const RowGroups& groups, int64_t* rows, void* stream) {
  if (p.num_entries == 0) return nullptr;
  return error_text(GPU_LAUNCH(list_rows_kernel, blocks_for(p.num_entries), kThreads, 0,
                               static_cast<cudaStream_t>(stream), p.num_entries, groups.rows, groups.numbers, rows));
}

}  // namespace ffm::cuda
