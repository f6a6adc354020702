// SPDX-License-Identifier: MIT
#include "group_rows.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "parallel.h"

namespace ffm {
namespace {

// Up to so many rows of the table an entry, a bit for each of them is cheaper than sorting the entries.
constexpr int64_t kMaxRowsPerEntry = 1024;

// Entries that are worth a thread.
constexpr int64_t kGrainEntries = 1 << 13;

// A bit a row: an entry is the first of its row where no bit is set before it; the number of bits before that of its
// row is its slot. Each part of the entries sets bits of its own, which are then joined, in the order of the parts.
void group_by_bits(const Ids& indices, int64_t num_entries, int64_t num_features, RowGroups& groups) {
  struct Word {
    uint64_t bits;
    int64_t bits_before;
  };
  const int64_t num_words = (num_features + 63) / 64;
  // No more words than entries, so that joining them takes no longer than setting their bits.
  const int64_t parts =
      std::clamp<int64_t>(num_entries / std::max<int64_t>(1, num_words), 1, num_parts(num_entries, kGrainEntries));
  const auto words = std::make_unique_for_overwrite<Word[]>(num_words);
  // The rows of each part's entries, and later those of the parts before it.
  const auto marks = std::make_unique<uint64_t[]>(parts * num_words);
  parallel_ranges(parts, num_entries, [&](int64_t part, int64_t begin, int64_t end) {
    uint64_t* const own = marks.get() + part * num_words;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t row = indices[e];
      const uint64_t bit = uint64_t{1} << (row % 64);
      uint64_t& bits = own[row / 64];
      groups.put[e] = bits & bit ? Put::kAdd : Put::kStore;
      bits |= bit;
    }
  });
  std::vector<int64_t> first_slots(parts + 1, 0);
  parallel_ranges(parts, num_words, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      uint64_t bits = 0;
      for (int64_t p = 0; p < parts; ++p) bits |= std::exchange(marks[p * num_words + i], bits);
      words[i] = {bits, count};
      count += std::popcount(bits);
    }
    first_slots[part + 1] = count;
  });
  for (int64_t part = 0; part < parts; ++part) first_slots[part + 1] += first_slots[part];
  groups.num_rows = first_slots[parts];
  parallel_ranges(parts, num_words, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      words[i].bits_before += first_slots[part];
      int64_t* row = groups.rows.get() + words[i].bits_before;
      for (uint64_t bits = words[i].bits; bits != 0; bits &= bits - 1) *row++ = i * 64 + std::countr_zero(bits);
    }
  });
  parallel_ranges(parts, num_entries, [&](int64_t part, int64_t begin, int64_t end) {
    const uint64_t* const earlier = marks.get() + part * num_words;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t row = indices[e];
      const Word& word = words[row / 64];
      const uint64_t bit = uint64_t{1} << (row % 64);
      groups.slots[e] = word.bits_before + std::popcount(word.bits & (bit - 1));
      if (part > 0 && earlier[row / 64] & bit) groups.put[e] = Put::kAdd;
    }
  });
}

// Radix sort, least significant digit first: stable, so the entries of a row keep their order.
void group_by_sorting(const Ids& indices, int64_t num_entries, int64_t num_features, RowGroups& groups) {
  struct Entry {
    int64_t row, index;
  };
  std::vector<Entry> entries(num_entries), sorted(num_entries);
  for (int64_t e = 0; e < num_entries; ++e) entries[e] = {indices[e], e};
  constexpr int kDigitBits = 11;
  constexpr int64_t kDigits = int64_t{1} << kDigitBits;
  for (int shift = 0; shift < 63 && (num_features - 1) >> shift > 0; shift += kDigitBits) {
    std::vector<int64_t> starts(kDigits, 0);
    for (const Entry& entry : entries) ++starts[(entry.row >> shift) & (kDigits - 1)];
    int64_t start = 0;
    for (int64_t& s : starts) start += std::exchange(s, start);
    for (const Entry& entry : entries) sorted[starts[(entry.row >> shift) & (kDigits - 1)]++] = entry;
    entries.swap(sorted);
  }
  for (const Entry& entry : entries) {
    const bool first = groups.num_rows == 0 || groups.rows[groups.num_rows - 1] != entry.row;
    if (first) groups.rows[groups.num_rows++] = entry.row;
    groups.slots[entry.index] = groups.num_rows - 1;
    groups.put[entry.index] = first ? Put::kStore : Put::kAdd;
  }
}

}  // namespace

RowGroups group_rows(const Ids& indices, int64_t num_entries, int64_t num_features) {
  RowGroups groups;
  groups.rows = std::make_unique_for_overwrite<int64_t[]>(num_entries);
  groups.slots = std::make_unique_for_overwrite<int64_t[]>(num_entries);
  groups.put = std::make_unique_for_overwrite<Put[]>(num_entries);
  const bool few_rows = num_features / kMaxRowsPerEntry <= num_entries;
  (few_rows ? group_by_bits : group_by_sorting)(indices, num_entries, num_features, groups);
  return groups;
}

// Which entries are the first of their row, and which rows have several, cannot be foreseen: nothing here branches on
// it, and GCC makes a branch of a choice, but not of masks. What has no place goes to one of its thread's own, behind
// the others.
SharedRows shared_rows(const RowGroups& groups, int64_t num_entries) {
  const int64_t parts = num_parts(num_entries, kGrainEntries);
  const auto for_entries = [&](const auto& fn) {
    parallel_ranges(parts, num_entries, [&](int64_t part, int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) fn(part, e);
    });
  };
  const auto choose = [](bool condition, int64_t yes, int64_t no) {
    const int64_t mask = -static_cast<int64_t>(condition);
    return (yes & mask) | (no & ~mask);
  };
  // -1 where a row has one entry.
  std::vector<int64_t> number(groups.num_rows + parts, -1);
  for_entries([&](int64_t part, int64_t e) {
    const int64_t slot = choose(groups.put[e] == Put::kAdd, groups.slots[e], groups.num_rows + part);
    __atomic_store_n(&number[slot], 0, __ATOMIC_RELAXED);  // others may do so too
  });
  int64_t count = 0;
  for (int64_t i = 0; i < groups.num_rows; ++i) {
    const bool is_shared = number[i] == 0;
    number[i] = choose(is_shared, count, -1);
    count += is_shared;
  }
  SharedRows shared;
  shared.count = count;
  shared.slots = std::make_unique_for_overwrite<int64_t[]>(num_entries);
  shared.first_entries = std::make_unique_for_overwrite<int64_t[]>(count + parts);
  for_entries([&](int64_t part, int64_t e) {
    const int64_t slot = number[groups.slots[e]];
    shared.slots[e] = slot;
    const bool is_first = (slot >= 0) & (groups.put[e] == Put::kStore);
    shared.first_entries[choose(is_first, slot, count + part)] = e;
  });
  return shared;
}

}  // namespace ffm
