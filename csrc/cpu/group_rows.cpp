// SPDX-License-Identifier: MIT
#include "group_rows.h"

#include <utility>

namespace ffm {

RowGroups group_rows(const Ids& indices, int64_t num_entries, int64_t num_features) {
  struct Entry {
    int64_t row, index;
  };
  std::vector<Entry> entries(num_entries), sorted(num_entries);
  for (int64_t e = 0; e < num_entries; ++e) entries[e] = {indices[e], e};

  // Radix sort, least significant digit first: stable, so the entries of a row keep their order.
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

  RowGroups groups;
  groups.slots.resize(num_entries);
  groups.is_first.resize(num_entries);
  for (const Entry& entry : entries) {
    const bool first = groups.rows.empty() || groups.rows.back() != entry.row;
    if (first) groups.rows.push_back(entry.row);
    groups.slots[entry.index] = static_cast<int64_t>(groups.rows.size()) - 1;
    groups.is_first[entry.index] = first;
  }
  return groups;
}

SharedRows shared_rows(const RowGroups& groups) {
  std::vector<int64_t> number(groups.rows.size(), 0);
  for (const int64_t slot : groups.slots) ++number[slot];
  SharedRows shared;
  for (int64_t& n : number) n = n > 1 ? shared.count++ : -1;
  shared.slots.reserve(groups.slots.size());
  for (const int64_t slot : groups.slots) shared.slots.push_back(number[slot]);
  return shared;
}

}  // namespace ffm
