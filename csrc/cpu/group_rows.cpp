// SPDX-License-Identifier: MIT
#include "group_rows.h"

#include <bit>
#include <utility>
#include <vector>

namespace ffm {
namespace {

// Up to so many rows of the table an entry, a bit for each of them is cheaper than sorting the entries.
constexpr int64_t kMaxRowsPerEntry = 1024;

// A bit a row: an entry is the first of its row where the bit is not set yet; the number of bits before that of its
// row is its slot.
void group_by_bits(const Ids& indices, int64_t num_entries, int64_t num_features, RowGroups& groups) {
  struct Word {
    uint64_t bits;
    int64_t bits_before;
  };
  std::vector<Word> words((num_features + 63) / 64, Word{0, 0});
  for (int64_t e = 0; e < num_entries; ++e) {
    const int64_t row = indices[e];
    const uint64_t bit = uint64_t{1} << (row % 64);
    uint64_t& bits = words[row / 64].bits;
    groups.put[e] = bits & bit ? Put::kAdd : Put::kStore;
    bits |= bit;
  }
  for (size_t i = 0; i < words.size(); ++i) {
    words[i].bits_before = groups.num_rows;
    for (uint64_t bits = words[i].bits; bits != 0; bits &= bits - 1) {
      groups.rows[groups.num_rows++] = static_cast<int64_t>(i) * 64 + std::countr_zero(bits);
    }
  }
  for (int64_t e = 0; e < num_entries; ++e) {
    const int64_t row = indices[e];
    const Word& word = words[row / 64];
    const uint64_t before = (uint64_t{1} << (row % 64)) - 1;
    groups.slots[e] = word.bits_before + std::popcount(word.bits & before);
  }
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

SharedRows shared_rows(const RowGroups& groups, int64_t num_entries) {
  std::vector<int64_t> number(groups.num_rows, 0);
  for (int64_t e = 0; e < num_entries; ++e) ++number[groups.slots[e]];
  SharedRows shared;
  for (int64_t& n : number) n = n > 1 ? shared.count++ : -1;
  shared.slots = std::make_unique_for_overwrite<int64_t[]>(num_entries);
  shared.first_entries = std::make_unique_for_overwrite<int64_t[]>(shared.count);
  for (int64_t e = 0; e < num_entries; ++e) {
    const int64_t slot = number[groups.slots[e]];
    shared.slots[e] = slot;
    if (slot >= 0 && groups.put[e] == Put::kStore) shared.first_entries[slot] = e;
  }
  return shared;
}

}  // namespace ffm
