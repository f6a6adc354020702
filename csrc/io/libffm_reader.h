// SPDX-License-Identifier: MIT
// Text of libffm (`label field:feature:value ...`) and of libsvm (`label feature:value ...`) to arrays. Knows no torch
// and no Python.
//
//   map the file -> cut it at line ends into parts -> count (lines and colons bound what a part can hold)
//     -> allocate once -> fill (each part parses into a stretch of its own) -> close the gaps of lines that hold no
//     sample
//
// Threads take parts; what comes out does not depend on how many there are.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "../export.h"

namespace ffm::io {

// Memory of malloc, uninitialised: pages that nobody writes cost nothing.
template <typename T>
struct Array {
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data;
  int64_t size = 0;

  Array() = default;
  explicit Array(int64_t n) : data(static_cast<T*>(std::malloc((n ? n : 1) * sizeof(T)))), size(n) {
    if (!data) throw std::bad_alloc();
  }
  T* get() const { return data.get(); }
};

enum class TextFormat { kLibffm, kLibsvm };

struct ReadOptions {
  TextFormat format = TextFormat::kLibffm;
  // Bytes of the file. Read are the lines that begin in [begin, end), whole: ranges that touch share no line.
  int64_t begin = 0;
  int64_t end = std::numeric_limits<int64_t>::max();
  int64_t first_line = 1;  // the number of the first of these lines, for messages
  // Ids from here on are faults of their line.
  int64_t num_features = std::numeric_limits<int64_t>::max();
  int64_t num_fields = int64_t{1} << 31;
  bool lenient = false;     // leave out lines with a fault, instead of stopping at the first
  int64_t max_faults = 10;  // that are described; all are counted
  int num_threads = 1;
  int64_t min_part_bytes = 1 << 16;  // less is not worth a thread
};

// What is wrong with a line, and where: both counted from 1, columns in bytes.
struct Fault {
  int64_t line, column;
  std::string what;
};

struct Samples {
  Array<float> labels{0};                                                   // [B]
  Array<int64_t> offsets{0};                                                // [B + 1]
  Array<int32_t> fields{0};                                                 // [nnz]; empty for libsvm
  std::variant<Array<int32_t>, Array<int64_t>> indices{Array<int32_t>(0)};  // [nnz]; int64 where ids or nnz need it
  Array<float> values;  // [nnz]; no memory (get() is null): all are 1
  int64_t max_field = -1, max_index = -1;

  std::vector<Fault> faults;  // in the order of the file; not lenient: at most one, and then the arrays are empty
  int64_t num_faults = 0;
  int64_t num_lines = 0;  // that were read, blank ones too
  int64_t end = 0;        // where the first line that was not read begins, in bytes
};

// Throws std::system_error if the file cannot be opened or mapped, std::invalid_argument if it is a pipe or a device,
// std::bad_alloc if memory does not suffice.
FFM_API Samples read_file(const std::string& path, const ReadOptions& options);

// The same of text in memory.
Samples read_text(std::string_view text, const ReadOptions& options);

}  // namespace ffm::io
