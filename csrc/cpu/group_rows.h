// SPDX-License-Identifier: MIT
// Which rows a batch touches, and which entries touch the same one.
#pragma once

#include <cstdint>
#include <vector>

#include "../params.h"

namespace ffm {

struct RowGroups {
  std::vector<int64_t> rows;            // [R] the touched rows, rising
  std::vector<int64_t> slots;           // [nnz] entry -> position of its row in `rows`
  std::vector<unsigned char> is_first;  // [nnz] the entry is the first of its row
};

// Numbers the rows that have several entries: entry -> that number, -1 for the only entry of a row.
struct SharedRows {
  std::vector<int64_t> slots;  // [nnz]
  int64_t count = 0;
};
SharedRows shared_rows(const RowGroups& groups);

// Ids lie in [0, num_features). Linear in the number of entries.
RowGroups group_rows(const Ids& indices, int64_t num_entries, int64_t num_features);

}  // namespace ffm
