// SPDX-License-Identifier: MIT
// Feeds broken and whole texts to the reader, from memory that ends where the text does, and checks that no number of
// threads, no cut into ranges and no size of parts changes what is found. Meant for sanitizers.

#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "io/libffm_reader.h"

using namespace ffm::io;

namespace {

int num_failed = 0;

void check(bool holds, const char* what, const std::string& text) {
  if (holds) return;
  ++num_failed;
  std::printf("failed: %s\n%s\n", what, text.c_str());
}

struct Found {
  std::vector<float> labels, values;
  std::vector<int64_t> lengths, fields, indices;
  std::vector<std::string> faults;
  int64_t num_faults = 0, num_lines = 0;

  bool operator==(const Found&) const = default;
};

// Adds what lies in a range of the text, which is copied to memory of just its size.
void read(const std::string& text, const ReadOptions& options, Found& found) {
  const std::unique_ptr<char[]> memory(new char[text.size()]);
  std::memcpy(memory.get(), text.data(), text.size());
  const Samples samples = read_text({memory.get(), text.size()}, options);
  found.num_lines += samples.num_lines;
  found.num_faults += samples.num_faults;
  for (const Fault& fault : samples.faults) {
    found.faults.push_back(std::to_string(fault.line) + ":" + std::to_string(fault.column) + ": " + fault.what);
  }
  if (!options.lenient && samples.num_faults) return;
  for (int64_t b = 0; b < samples.labels.size; ++b) {
    found.labels.push_back(samples.labels.get()[b]);
    found.lengths.push_back(samples.offsets.get()[b + 1] - samples.offsets.get()[b]);
  }
  check(samples.offsets.get()[0] == 0, "offsets begin at 0", text);
  check(samples.offsets.size == samples.labels.size + 1, "as many offsets as samples, and one", text);
  std::visit(
      [&](const auto& indices) {
        check(samples.offsets.get()[samples.labels.size] == indices.size, "offsets end at nnz", text);
        for (int64_t i = 0; i < indices.size; ++i) {
          found.indices.push_back(indices.get()[i]);
          if (options.format == TextFormat::kLibffm) found.fields.push_back(samples.fields.get()[i]);
          found.values.push_back(samples.values.get() ? samples.values.get()[i] : 1);
        }
      },
      samples.indices);
}

void check_text(const std::string& text) {
  for (const TextFormat format : {TextFormat::kLibffm, TextFormat::kLibsvm}) {
    for (const bool lenient : {false, true}) {
      ReadOptions options{.format = format, .lenient = lenient, .max_faults = 1000};
      Found whole;
      read(text, options, whole);

      options.num_threads = 3;
      options.min_part_bytes = 7;
      Found parallel;
      read(text, options, parallel);
      check(parallel == whole, "parts change nothing", text);

      if (!lenient && whole.num_faults) continue;  // what comes before a fault is dropped
      options.num_threads = 1;
      Found ranges;
      for (int64_t begin = 0; begin < static_cast<int64_t>(text.size()); begin += 11) {
        options.begin = begin;
        options.end = begin + 11;
        options.first_line = ranges.num_lines + 1;
        read(text, options, ranges);
      }
      check(ranges == whole, "ranges change nothing", text);
    }
  }
}

}  // namespace

int main() {
  const std::string whole =
      "1 0:1:0.5 1:2:1\r\n"
      "\n"
      "-1\t1:3:2e-3 \n"
      "+0.25 0:3000000000:-1 12:0:123456789.123456789e-30\n"
      "0\n"
      "1e0 0:1:1 0:1:1 0:1:1";
  const std::string libsvm = "1 1:0.5 2:1\n\n-1 3:-.5e1\r\n0\n";
  const std::string characters = "0123456789:: \t\r\n\n+-.eEnaif\0x\xff";
  check_text("");
  check_text(whole);
  check_text(libsvm);
  for (size_t n = 0; n <= whole.size(); ++n) check_text(whole.substr(0, n));
  for (size_t n = 0; n <= whole.size(); ++n) check_text(whole.substr(n));

  std::mt19937 random(0);
  auto below = [&](size_t n) { return random() % n; };
  for (int i = 0; i < 1500; ++i) {
    std::string text = i % 3 ? whole : libsvm;
    for (size_t changes = 1 + below(4); changes > 0; --changes) {
      const size_t at = below(text.size());
      const char c = characters[below(characters.size())];
      switch (below(3)) {
        case 0: text[at] = c; break;
        case 1: text.insert(at, 1 + below(24), c); break;
        default: text.erase(at, 1 + below(3)); break;
      }
      if (text.empty()) text = "1";
    }
    check_text(text);
  }
  std::printf("%s: %d failed\n", num_failed ? "failed" : "passed", num_failed);
  return num_failed != 0;
}
