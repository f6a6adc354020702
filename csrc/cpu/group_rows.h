// SPDX-License-Identifier: MIT
// Which rows a batch touches, and which entries touch the same one.
#pragma once

#include <cstdint>
#include <memory>

#include "../params.h"

namespace ffm {

struct RowGroups {
  int64_t num_rows = 0;              // R
  std::unique_ptr<int64_t[]> rows;   // [R] the touched rows, rising
  std::unique_ptr<int64_t[]> slots;  // [nnz] entry -> position of its row in `rows`
  std::unique_ptr<Put[]> put;        // [nnz] kStore for the first entry of a row, else kAdd
};

// Ids lie in [0, num_features). Linear in the number of entries.
RowGroups group_rows(const Ids& indices, int64_t num_entries, int64_t num_features);

// The rows that have several entries, numbered in the order of `rows`.
struct SharedRows {
  int64_t count = 0;
  std::unique_ptr<int64_t[]> slots;          // [nnz] entry -> that number, -1 for the only entry of a row
  std::unique_ptr<int64_t[]> first_entries;  // [count]
};
SharedRows shared_rows(const RowGroups& groups, int64_t num_entries);

}  // namespace ffm
