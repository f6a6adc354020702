// SPDX-License-Identifier: MIT
// Copies of frequent rows, for each thread of those that train one table without locks.
//
// Where several threads change a row, its cache lines go from core to core with every sample, and each thread waits for
// them. So each changes a copy of its own, and after some updates adds to the table what it has changed.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "../optimizer.h"
#include "ffm_kernels.h"
#include "parallel.h"

namespace ffm {

// The rows that are copied, each to a slot of its own.
class FrequentRows {
 public:
  // Of the samples numbers[0 .. n), by a look at some.
  FrequentRows(const Problem& p, const UpdatedTable& table, const int64_t* numbers, int64_t n);

  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  int64_t row(int64_t slot) const { return rows_[slot]; }
  // The only one that a row may have.
  int64_t slot(int64_t row) const { return slots_[bucket(row)]; }

  // Only one thread at a time may add to a row of the table.
  bool try_lock(int64_t slot) const { return !locks_[slot].exchange(true, std::memory_order_acquire); }
  void lock(int64_t slot) const;
  void unlock(int64_t slot) const { locks_[slot].store(false, std::memory_order_release); }

 private:
  static constexpr int kBits = 13;
  static size_t bucket(int64_t row) { return static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u >> (64 - kBits); }

  std::vector<int64_t> rows_;
  // A bucket has one row. One that has none leads to slot 0, whose row is in another.
  std::vector<uint16_t> slots_;
  std::unique_ptr<std::atomic<bool>[]> locks_;
};

// A thread's copies.
class OwnRows {
 public:
  OwnRows(const FrequentRows& rows, const Problem& p, const Update& update, const TrainKernels& kernels);

  // Rows [n] -> those that this thread updates in their place, as rows of the table and as rows of its states: own rows
  // lie outside of these, where such numbers lead.
  void take(const Ids& rows, int64_t n, int64_t* table_rows, int64_t* state_rows);

  // Adds to the table, before update number `step`, the rows with `fewest` updates or more since the last time. Unless
  // `waits`, not those that another thread is at; they come later.
  void join(int64_t step, int64_t fewest, bool waits);

 private:
  const FrequentRows& rows_;
  const Problem& p_;
  Update update_;
  const TrainKernels& kernels_;
  AlignedBuffer memory_;
  UpdatedTable own_, before_;
  int64_t first_table_row_ = 0, first_state_row_ = 0;  // the numbers of slot 0
  std::vector<int64_t> updates_;                       // [count]
};

}  // namespace ffm
