// SPDX-License-Identifier: MIT
#include "own_rows.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

namespace ffm {
namespace {

// Rows are counted in one of so many samples, in so many at most, with so many entries in all.
constexpr int64_t kOneOf = 32, kMostSamples = 1024, kMostEntries = 1 << 16;
// What is worth a copy: a row with so many entries among them, the most frequent first, while the copies of a thread
// take so many bytes.
constexpr int64_t kFewestEntries = 4, kMostBytes = 2 << 20;

int64_t state_bytes(const Problem& p, const UpdatedTable& table) {
  return (table.states[0] != nullptr) * table.state_row_size * sum_bytes(p.dtype);
}
int64_t weight_bytes(const Problem& p, const UpdatedTable& table) { return table.row_size * element_bytes(p.dtype); }

// The first row from `at` on, as a row of the table `rows`, wherever that is.
int64_t first_row_from(const void* at, const void* rows, int64_t bytes) {
  const intptr_t distance = reinterpret_cast<intptr_t>(at) - reinterpret_cast<intptr_t>(rows);
  return distance / bytes + (distance % bytes > 0);
}

}  // namespace

FrequentRows::FrequentRows(const Problem& p, const UpdatedTable& table, const int64_t* numbers, int64_t n)
    : slots_(size_t{1} << kBits) {
  std::vector<int64_t> ids;
  const int64_t samples = std::min(n / kOneOf, kMostSamples);
  for (int64_t i = 0; i < samples && static_cast<int64_t>(ids.size()) < kMostEntries; ++i) {
    const int64_t b = numbers[n * i / samples];
    for (int64_t e = p.entries_begin(b); e < p.entries_begin(b + 1); ++e) ids.push_back(p.indices[e]);
  }
  std::sort(ids.begin(), ids.end());
  std::vector<std::pair<int64_t, int64_t>> counts;  // of entries, and their row
  for (size_t begin = 0, end = 0; begin < ids.size(); begin = end) {
    while (end < ids.size() && ids[end] == ids[begin]) ++end;
    if (static_cast<int64_t>(end - begin) >= kFewestEntries) counts.emplace_back(end - begin, ids[begin]);
  }
  std::sort(counts.begin(), counts.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  const size_t most = kMostBytes / std::max<int64_t>(1, weight_bytes(p, table) + state_bytes(p, table));
  std::vector<bool> is_taken(slots_.size());
  for (const auto& [count, row] : counts) {
    const size_t at = bucket(row);
    if (rows_.size() == most || is_taken[at]) continue;
    is_taken[at] = true;
    slots_[at] = static_cast<uint16_t>(rows_.size());
    rows_.push_back(row);
  }
  locks_.reset(new std::atomic<bool>[rows_.size()]());
}

void FrequentRows::lock(int64_t slot) const {
  while (!try_lock(slot)) std::this_thread::yield();
}

OwnRows::OwnRows(const FrequentRows& rows, const Problem& p, const Update& update, const TrainKernels& kernels)
    : rows_(rows),
      p_(p),
      update_(update),
      kernels_(kernels),
      // A row more, since the first begins where a row of the table would.
      memory_((2 * rows.count() + 1) * (weight_bytes(p, update.table) + state_bytes(p, update.table))),
      own_(update.table),
      before_(update.table),
      updates_(rows.count()) {
  const UpdatedTable& table = update.table;
  const int64_t count = rows.count();
  char* free = memory_.data();
  const auto copy = [&](void* shared, void*& own, void*& before, int64_t bytes, int64_t& first_row) {
    if (bytes == 0) return;
    first_row = first_row_from(free, shared, bytes);
    char* const first = reinterpret_cast<char*>(reinterpret_cast<intptr_t>(shared) + first_row * bytes);
    own = first;
    before = first + count * bytes;
    free = first + 2 * count * bytes;
    for (int64_t slot = 0; slot < count; ++slot) {
      rows.lock(slot);
      for (void* const to : {own, before}) {
        std::memcpy(static_cast<char*>(to) + slot * bytes, static_cast<char*>(shared) + rows.row(slot) * bytes, bytes);
      }
      rows.unlock(slot);
    }
  };
  copy(table.weight, own_.weight, before_.weight, weight_bytes(p, table), first_table_row_);
  copy(table.states[0], own_.states[0], before_.states[0], state_bytes(p, table), first_state_row_);
}

void OwnRows::take(const Ids& rows, int64_t n, int64_t* table_rows, int64_t* state_rows) {
  int64_t* const updates = updates_.data();
  const auto take_all = [&, in_table = first_table_row_, in_states = first_state_row_]<typename Id>(const Id* given) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = given[i], slot = rows_.slot(row);
      // No jump, which would be guessed wrong half of the time.
      const int64_t is_copied = rows_.row(slot) == row;
      updates[slot] += is_copied;
      table_rows[i] = row + (-is_copied & (in_table + slot - row));
      state_rows[i] = row + (-is_copied & (in_states + slot - row));
    }
  };
  rows.is_int64 ? take_all(static_cast<const int64_t*>(rows.data)) : take_all(static_cast<const int32_t*>(rows.data));
}

void OwnRows::join(int64_t step, int64_t fewest, bool waits) {
  update_.optimizer.set_step(step);
  for (int64_t slot = 0; slot < rows_.count(); ++slot) {
    if (updates_[slot] < fewest) continue;
    if (waits) {
      rows_.lock(slot);
    } else if (!rows_.try_lock(slot)) {
      continue;
    }
    kernels_.join_row(update_, rows_.row(slot), own_, before_, slot);
    rows_.unlock(slot);
    updates_[slot] = 0;
  }
}

}  // namespace ffm
