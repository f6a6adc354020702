// SPDX-License-Identifier: MIT
// What the CPU adapters do with every batch: check what its tensors hold, and cut it into parts for threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../batch.h"
#include "../dispatch.h"
#include "parallel.h"

namespace ffm {

// A thread is worth its start for this many table elements.
constexpr int64_t kGrainElements = 1 << 15;

// A thread is worth its start for a look at this many entries.
constexpr int64_t kGrainEntries = 1 << 15;

// Whether fn(begin, end) holds for all parts of n things with `entries` entries.
template <typename Fn>
bool all_parts(int64_t n, int64_t entries, const Fn& fn) {
  const int64_t parts = std::min(std::max<int64_t>(1, n), num_parts(entries, kGrainEntries));
  if (parts == 1) return fn(0, n);
  std::atomic<bool> holds = true;
  parallel_ranges(parts, n, [&](int64_t, int64_t begin, int64_t end) {
    if (!fn(begin, end)) holds = false;
  });
  return holds;
}

inline bool all_in_range(const Ids& ids, int64_t n, int64_t limit) {
  auto scan = [&]<typename Id>(const Id* data) {
    // The sign of x, or of last - x, is set where x is outside: many at a time, on every ISA.
    using Unsigned = std::make_unsigned_t<Id>;
    const auto last = static_cast<Unsigned>(std::min<int64_t>(limit - 1, std::numeric_limits<Id>::max()));
    Unsigned signs = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto x = static_cast<Unsigned>(data[i]);
      signs |= x | (last - x);
    }
    return static_cast<Id>(signs) >= 0;
  };
  return ids.is_int64 ? scan(static_cast<const int64_t*>(ids.data)) : scan(static_cast<const int32_t*>(ids.data));
}
inline bool all_in_range_by_threads(const Ids& ids, int64_t n, int64_t limit) {
  return all_parts(n, n, [&](int64_t begin, int64_t end) { return all_in_range(ids.from(begin), end - begin, limit); });
}

// The first of n ids that is outside [0, limit), n where there is none.
inline int64_t first_outside(const Ids& ids, int64_t n, int64_t limit) {
  if (all_in_range_by_threads(ids, n, limit)) return n;
  int64_t i = 0;
  while (ids[i] >= 0 && ids[i] < limit) ++i;
  return i;
}

// As torch has it, with its conversions to float.
template <typename T>
struct TorchScalar {
  using type = T;
};
template <>
struct TorchScalar<BFloat16> {
  using type = torch::headeronly::BFloat16;
};
template <>
struct TorchScalar<Float16> {
  using type = torch::headeronly::Half;
};

// Calls fn with the numbers as a pointer to their type.
template <typename Fn>
void with_numbers(ScalarKind dtype, const void* numbers, const Fn& fn) {
  dispatch_dtype(dtype, [&](auto scalar) {
    fn(static_cast<const typename TorchScalar<typename decltype(scalar)::type>::type*>(numbers));
  });
}

template <typename T>
bool all_finite(const T* numbers, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  // Infinities and NaNs are the numbers whose exponent is all ones.
  const Bits exponent = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= (std::bit_cast<Bits>(numbers[i]) & exponent) == exponent;
  return !bad;
}

// The values of `count` entries from number `first` on.
inline bool all_finite(const Problem& p, int64_t first, int64_t count) {
  bool holds = false;
  with_numbers(p.dtype, p.values, [&](const auto* values) { holds = all_finite(values + first, count); });
  return holds;
}

inline double number_at(ScalarKind dtype, const void* numbers, int64_t i) {
  double number = 0;
  with_numbers(dtype, numbers, [&](const auto* typed) { number = static_cast<double>(typed[i]); });
  return number;
}

inline void check_values(const char* op, const Problem& p) {
  const int64_t n = p.num_entries;
  if (all_parts(n, n, [&](int64_t begin, int64_t end) { return all_finite(p, begin, end - begin); })) return;
  for (int64_t e = 0; e < n; ++e) {
    const double value = number_at(p.dtype, p.values, e);
    if (!std::isfinite(value)) fail_value(op, p, e, value);
  }
}

// What the kernels rely on: that nothing is read out of bounds.
inline void check_contents(const char* op, const Problem& p) {
  if (p.offsets) {
    const int64_t B = p.batch_size;
    if (p.offsets[0] != 0) fail_offset(op, p, 0, p.offsets[0], 0);
    for (int64_t b = 1; b <= B; ++b) {
      if (p.offsets[b] < p.offsets[b - 1]) fail_offset(op, p, b, p.offsets[b], p.offsets[b - 1]);
    }
    if (p.offsets[B] != p.num_entries) fail_offset(op, p, B + 1, p.offsets[B], 0);
  }
  const int64_t index = first_outside(p.indices, p.num_entries, p.num_features);
  if (index < p.num_entries) fail_index(op, p, index, p.indices[index]);
  if (p.fields) {
    const int64_t field = first_outside(p.fields, p.num_entries, p.num_fields);
    if (field < p.num_entries) fail_field(op, p, field, p.fields[field]);
  }
  if (p.values) check_values(op, p);
}

// One entry a field, in the order of the fields.
inline bool is_plain(const Problem& p, int64_t b) {
  if (!p.fields) return true;
  const int64_t F = p.num_fields, first = p.entries_begin(b);
  if (p.entries_begin(b + 1) != first + F) return false;
  auto scan = [&]<typename Id>(const Id* fields) {
    bool other = false;
    for (int64_t f = 0; f < F; ++f) other |= fields[first + f] != static_cast<Id>(f);
    return !other;
  };
  return p.fields.is_int64 ? scan(static_cast<const int64_t*>(p.fields.data))
                           : scan(static_cast<const int32_t*>(p.fields.data));
}

// Whether the samples of a list are plain, all of them: a matrix [B, F] without saying so. Offsets may hold anything.
inline bool is_matrix(const Problem& p) {
  const int64_t F = p.num_fields;
  if (!p.fields || p.num_entries != p.batch_size * F) return false;
  return all_parts(p.batch_size, p.num_entries, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (p.offsets[b] != b * F || !is_plain(p, b)) return false;
    }
    return true;
  });
}

// The samples of a part of a range of samples, such that parts hold about the same number of entries.
inline int64_t part_begin(const Problem& p, int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const int64_t first = p.entries_begin(begin), last = p.entries_begin(end);
  const int64_t target = first + (last - first) * part / parts;
  if (part == parts) return end;
  if (!p.offsets) return std::min(end, begin + (target - first) / p.num_fields);
  int64_t low = begin, high = end;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    (p.offsets[middle] < target ? low = middle + 1 : high = middle);
  }
  return low;
}

inline int64_t sample_parts(const Problem& p, int64_t begin, int64_t end) {
  const int64_t entries = p.entries_begin(end) - p.entries_begin(begin);
  return std::min(std::max<int64_t>(1, end - begin), num_parts(entries * p.row_size(), kGrainElements));
}

}  // namespace ffm
