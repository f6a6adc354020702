// SPDX-License-Identifier: MIT
// What the CPU adapters do with every batch: check what its tensors hold, and cut it into parts for threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <limits>

#include "../checks.h"
#include "parallel.h"

namespace ffm {

using OptionalTensor = std::optional<Tensor>;

// A thread is worth its start for this many table elements.
constexpr int64_t kGrainElements = 1 << 15;

// "indices[3, 17]" or "indices[42]".
inline std::string place(const char* name, const Problem& p, int64_t e) {
  std::ostringstream text;
  text << name << '[';
  if (!p.offsets) text << e / p.num_fields << ", " << e % p.num_fields;
  if (p.offsets) text << e;
  text << ']';
  return text.str();
}

inline bool all_in_range(const Ids& ids, int64_t n, int64_t limit) {
  auto scan = [&](const auto* data) {
    bool bad = false;
    for (int64_t i = 0; i < n; ++i)
      bad |= static_cast<uint64_t>(static_cast<int64_t>(data[i])) >= static_cast<uint64_t>(limit);
    return !bad;
  };
  return ids.is_int64 ? scan(static_cast<const int64_t*>(ids.data)) : scan(static_cast<const int32_t*>(ids.data));
}

inline void check_ids(const char* op, const char* name, const Problem& p, const Ids& ids, int64_t limit,
                      const char* owner) {
  if (all_in_range(ids, p.num_entries, limit)) return;
  for (int64_t e = 0; e < p.num_entries; ++e) {
    if (ids[e] < 0 || ids[e] >= limit) {
      fail<std::out_of_range>(op, place(name, p, e), " = ", ids[e], " is out of range for ", owner);
    }
  }
}

template <typename T, typename Bits>
inline void check_finite(const char* op, const Problem& p) {
  const T* const values = static_cast<const T*>(p.values);
  // Infinities and NaNs are the numbers whose exponent is all ones.
  const Bits exponent = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
  bool bad = false;
  for (int64_t e = 0; e < p.num_entries; ++e) bad |= (std::bit_cast<Bits>(values[e]) & exponent) == exponent;
  if (!bad) return;
  for (int64_t e = 0; e < p.num_entries; ++e) {
    const double value = static_cast<double>(values[e]);
    if (!std::isfinite(value)) fail(op, place("values", p, e), " = ", value, " is not finite");
  }
}

inline void check_values(const char* op, const Problem& p) {
  switch (p.dtype) {
    case ScalarKind::kFloat32: return check_finite<float, uint32_t>(op, p);
    case ScalarKind::kFloat64: return check_finite<double, uint64_t>(op, p);
    case ScalarKind::kBFloat16: return check_finite<torch::headeronly::BFloat16, uint16_t>(op, p);
    case ScalarKind::kFloat16: return check_finite<torch::headeronly::Half, uint16_t>(op, p);
  }
}

// What the kernels rely on: that nothing is read out of bounds.
inline void check_contents(const char* op, const Problem& p) {
  if (p.offsets) {
    const int64_t B = p.batch_size;
    if (p.offsets[0] != 0) fail(op, "offsets[0] = ", p.offsets[0], " must be 0");
    for (int64_t b = 0; b < B; ++b) {
      if (p.offsets[b + 1] < p.offsets[b]) {
        fail(op, "offsets[", b + 1, "] = ", p.offsets[b + 1], " is less than offsets[", b, "] = ", p.offsets[b]);
      }
    }
    if (p.offsets[B] != p.num_entries) {
      fail(op, "offsets[", B, "] = ", p.offsets[B], " must be the number of entries, ", p.num_entries);
    }
  }
  check_ids(op, "indices", p, p.indices, p.num_features,
            ("a table of " + std::to_string(p.num_features) + " features").c_str());
  if (p.fields) {
    check_ids(op, "fields", p, p.fields, p.num_fields, (std::to_string(p.num_fields) + " fields").c_str());
  }
  if (p.values) check_values(op, p);
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
