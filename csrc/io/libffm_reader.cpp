// SPDX-License-Identifier: MIT
#include "libffm_reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cfloat>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace ffm::io {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw std::system_error(errno, std::generic_category());
    struct stat info;
    int error = ::fstat(file, &info) ? errno : S_ISDIR(info.st_mode) ? EISDIR : 0;
    const bool is_regular = error == 0 && S_ISREG(info.st_mode);
    if (is_regular && info.st_size > 0) {
      size_ = info.st_size;
      data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
      if (data_ == MAP_FAILED) {
        error = errno;
        size_ = 0;
      } else {
        ::madvise(data_, size_, MADV_SEQUENTIAL);  // read ahead further; advice, which may fail
      }
    }
    ::close(file);
    if (error) throw std::system_error(error, std::generic_category());
    if (!is_regular) throw std::invalid_argument(path + ": it is not a regular file, which could be mapped");
  }
  ~MappedFile() {
    if (size_) ::munmap(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view text() const { return {static_cast<const char*>(data_), static_cast<size_t>(size_)}; }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// A stretch of whole lines, each of which ends in '\n': parsing needs no other guard to stay inside.
struct Part {
  const char *begin, *end;

  int64_t num_lines = 0, max_entries = 0;                    // counted
  int64_t first_line = 0, first_label = 0, first_entry = 0;  // sums over the parts before

  struct Content {
    int64_t num_labels = 0, num_entries = 0, max_field = -1, max_index = -1;
    bool has_values = false;  // one that is not 1
  };
  Content content = {};
  bool needs_int64 = false;
  int64_t num_faults = 0;
  std::vector<Fault> faults = {};
};

// Calls function(i) for i in [0, n), each once, from up to num_threads threads.
template <typename Function>
void parallel_for(size_t n, int num_threads, const Function& function) {
  std::atomic<size_t> next = 0;
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    try {
      for (size_t i; (i = next++) < n;) function(i);
    } catch (...) {
      next = n;
      std::lock_guard lock(error_mutex);
      error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    try {
      for (size_t i = 1; i < std::min<size_t>(num_threads, n); ++i) others.emplace_back(work);
    } catch (const std::system_error&) {
      // The system has no more threads to give: those that run do it all.
    }
    work();
  }
  if (error) std::rethrow_exception(error);
}

// The start of the first line that begins at p or later; `end` if there is none.
const char* line_start(const char* begin, const char* p, const char* end) {
  if (p == begin || p >= end || p[-1] == '\n') return std::min(p, end);
  const void* found = std::memchr(p, '\n', end - p);
  return found ? static_cast<const char*>(found) + 1 : end;
}

void count(Part& part, TextFormat format) {
  constexpr int kLanes = 32;  // bytes that are added up side by side: the compiler makes vectors of them
  int64_t lines = 0, colons = 0;
  const char* p = part.begin;
  while (part.end - p >= kLanes) {
    uint8_t line_lanes[kLanes] = {}, colon_lanes[kLanes] = {};
    for (int64_t block = std::min<int64_t>((part.end - p) / kLanes, 255); block > 0; --block, p += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        line_lanes[i] += p[i] == '\n';
        colon_lanes[i] += p[i] == ':';
      }
    }
    for (int i = 0; i < kLanes; ++i) {
      lines += line_lanes[i];
      colons += colon_lanes[i];
    }
  }
  for (; p != part.end; ++p) {
    lines += *p == '\n';
    colons += *p == ':';
  }
  part.num_lines = lines;
  part.max_entries = format == TextFormat::kLibffm ? colons / 2 : colons;
}

bool is_digit(char c) { return static_cast<unsigned char>(c - '0') < 10; }
bool is_blank(char c) { return c == ' ' || c == '\t'; }
bool ends_line(const char* p) { return *p == '\n' || (*p == '\r' && p[1] == '\n'); }
bool ends_token(const char* p) { return is_blank(*p) || ends_line(p); }

std::string got(const char* p) {
  if (ends_line(p)) return ", got the end of the line";
  if (is_blank(*p)) return *p == ' ' ? ", got a space" : ", got a tab";
  char text[16];
  const unsigned char c = *p;
  std::snprintf(text, sizeof(text), c > ' ' && c < 0x7f ? ", got '%c'" : ", got byte 0x%02X", c);
  return text;
}

// Powers of ten that a double holds exactly.
constexpr double kPowersOfTen[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                   1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

// digits · 10^exponent to the nearest float, if two roundings do it: to double, which is right once (both operands are
// exact), and to float, which is right unless the double lies halfway between two floats.
inline bool nearest_float(uint64_t digits, int64_t exponent, float& result) {
  if (exponent == 0 && digits <= uint64_t{1} << 24) {  // a float holds it exactly
    result = static_cast<float>(static_cast<int64_t>(digits));
    return true;
  }
  if (digits > uint64_t{1} << 53 || exponent < -22 || exponent > 22) return false;
  const double wide = exponent < 0 ? static_cast<double>(digits) / kPowersOfTen[-exponent]
                                   : static_cast<double>(digits) * kPowersOfTen[exponent];
  constexpr uint64_t kDropped = (uint64_t{1} << 29) - 1;
  if ((std::bit_cast<uint64_t>(wide) & kDropped) == uint64_t{1} << 28) return false;
  if (digits != 0 && (wide < FLT_MIN || wide > FLT_MAX)) return false;
  result = static_cast<float>(wide);
  return true;
}

// The nearest float of a well-formed decimal; false if it is too large. All its digits stand `magnitude` places before
// the point.
bool nearest_float(const char* begin, const char* end, int64_t magnitude, float& result) {
  if (*begin == '+') ++begin;
  if (std::from_chars(begin, end, result).ec == std::errc()) return true;
  double wide = 0;  // in GCC 11, subnormal floats are out of range too
  if (std::from_chars(begin, end, wide).ec != std::errc()) {
    for (const char* p = begin; *p == '-' || *p == '0' || *p == '.'; ++p) magnitude -= *p == '0';
    if (magnitude > 0) return false;  // too large, not too small
  }
  result = static_cast<float>(wide);
  return wide >= -FLT_MAX && wide <= FLT_MAX;
}

template <typename Index>
struct Arrays {
  Array<float> labels;
  Array<int64_t> offsets;
  Array<int32_t> fields;
  Array<Index> indices;
  Array<float> values;
};

// Parses the lines of one part into its stretch of the arrays. Functions that parse take a position and return the one
// after, or nullptr: then `fault_at_` and `what_` say why.
template <TextFormat kFormat, typename Index>
class PartParser {
 public:
  PartParser(Part& part, const ReadOptions& options, const Arrays<Index>& arrays)
      : part_(part),
        content_(part.content),
        options_(options),
        labels_(arrays.labels.get() + part.first_label),
        offsets_(arrays.offsets.get() + part.first_label + 1),
        fields_(arrays.fields.get() + part.first_entry),
        indices_(arrays.indices.get() + part.first_entry),
        values_(arrays.values.get() + part.first_entry) {}

  // Until `stop` says so after a line.
  template <typename Stop>
  void parse(const Stop& stop) {
    int64_t number = part_.first_line;
    for (const char* line = part_.begin; line != part_.end && !stop(); ++number) {
      const Part::Content before = content_;
      if (const char* next = parse_line(line)) {
        line = next;
        continue;
      }
      if (part_.needs_int64) return;
      if (part_.num_faults++ < options_.max_faults) part_.faults.push_back({number, fault_at_ - line + 1, what_});
      if (!options_.lenient) return;
      content_ = before;
      line = static_cast<const char*>(std::memchr(line, '\n', part_.end - line)) + 1;
    }
  }

 private:
  const char* parse_line(const char* p) {
    while (is_blank(*p)) ++p;
    if (!ends_line(p)) {
      const char* const begin = p;
      float label;
      if (!(p = parse_float(p, "label", label))) return nullptr;
      if (*p == ':') return fail(begin, "label expected, got a feature");
      if (!ends_token(p)) return fail(p, "space expected after the label" + got(p));
      while (is_blank(*p)) ++p;
      while (!ends_line(p)) {
        if (!(p = parse_entry(p))) return nullptr;
        while (is_blank(*p)) ++p;
      }
      labels_[content_.num_labels] = label;
      offsets_[content_.num_labels++] = part_.first_entry + content_.num_entries;
    }
    return p + (*p == '\r') + 1;
  }

  const char* parse_entry(const char* p) {
    int64_t field = 0, index = 0;
    float value;
    if constexpr (kFormat == TextFormat::kLibffm) {
      if (!(p = parse_id(p, "field", options_.num_fields, field))) return nullptr;
      if (*p != ':') return fail(p, "':' expected after the field" + got(p));
      ++p;
    }
    if (!(p = parse_id(p, "feature", options_.num_features, index))) return nullptr;
    if (*p != ':') return fail(p, "':' expected after the feature" + got(p));
    if (!(p = parse_float(p + 1, "value", value))) return nullptr;
    if (!ends_token(p)) return fail(p, "space expected after the value" + got(p));
    if (sizeof(Index) < sizeof(int64_t) && index > kMaxInt32) {
      part_.needs_int64 = true;
      return nullptr;
    }

    // The colons that were passed are those that were counted, so there is room.
    const int64_t i = content_.num_entries++;
    if constexpr (kFormat == TextFormat::kLibffm) fields_[i] = static_cast<int32_t>(field);
    indices_[i] = static_cast<Index>(index);
    content_.max_field = std::max(content_.max_field, field);
    content_.max_index = std::max(content_.max_index, index);
    if (value != 1 && !content_.has_values) {
      std::fill_n(values_, i, 1.0f);
      content_.has_values = true;
    }
    if (content_.has_values) values_[i] = value;
    return p;
  }

  // An id in [0, limit).
  __attribute__((always_inline)) inline const char* parse_id(const char* p, const char* name, int64_t limit,
                                                             int64_t& id) {
    const char* const begin = p;
    uint64_t number = 0;
    while (is_digit(*p)) number = number * 10 + (*p++ - '0');
    if (p - begin > 18) number = long_number(begin, p);  // more digits than surely fit
    if (p == begin || number >= static_cast<uint64_t>(limit)) return fail_id(begin, p, name, limit);
    id = static_cast<int64_t>(number);
    return p;
  }

  __attribute__((cold)) static uint64_t long_number(const char* begin, const char* end) {
    uint64_t number = 0;
    const bool fits = std::from_chars(begin, end, number).ec == std::errc();
    return fits ? number : std::numeric_limits<uint64_t>::max();
  }

  __attribute__((cold)) const char* fail_id(const char* begin, const char* end, const char* name, int64_t limit) {
    std::string what = name;
    if (*begin == '-' && is_digit(begin[1])) return fail(begin, what + " is negative");
    if (begin == end) return fail(begin, what + " expected" + got(begin));
    what += " " + std::string(begin, std::min<size_t>(end - begin, 32)) + (end - begin > 32 ? "..." : "");
    return fail(begin, what + " is too large, it must be below " + std::to_string(limit));
  }

  __attribute__((always_inline)) inline const char* parse_float(const char* p, const char* name, float& result) {
    const char* const begin = p;
    if (*p == '-' || *p == '+') ++p;
    uint64_t digits = 0;
    const char* const first_digit = p;
    while (is_digit(*p)) digits = digits * 10 + (*p++ - '0');
    int64_t num_digits = p - first_digit, exponent = 0;
    if (*p == '.') {
      const char* const point = p++;
      while (is_digit(*p)) digits = digits * 10 + (*p++ - '0');
      exponent = point + 1 - p;
      num_digits -= exponent;
    }
    if (num_digits == 0) return fail_float(begin, first_digit, name);
    if (*p == 'e' || *p == 'E') {
      const bool negative = p[1] == '-';
      const char* q = p + 1 + (negative || p[1] == '+');
      if (is_digit(*q)) {  // else 'e' is what follows the number
        int64_t power = 0;
        for (; is_digit(*q); ++q) power = std::min<int64_t>(power * 10 + (*q - '0'), int64_t{1} << 48);
        exponent += negative ? -power : power;
        p = q;
      }
    }
    if (num_digits <= 18 && nearest_float(digits, exponent, result)) {
      if (*begin == '-') result = -result;
      return p;
    }
    return nearest_float(begin, p, exponent + num_digits, result) ? p : fail_large(begin, name);
  }

  __attribute__((cold)) const char* fail_large(const char* begin, const char* name) {
    return fail(begin, std::string(name) + " is too large for float32");
  }

  __attribute__((cold)) const char* fail_float(const char* begin, const char* p, const char* name) {
    char word[4] = {};
    for (int i = 0; i < 3 && p[i] != '\n'; ++i) word[i] = static_cast<char>(p[i] | 0x20);
    const bool not_finite = std::strcmp(word, "nan") == 0 || std::strcmp(word, "inf") == 0;
    return fail(begin,
                not_finite ? std::string(name) + " is not finite" : std::string(name) + " expected" + got(begin));
  }

  __attribute__((cold)) const char* fail(const char* at, std::string what) {
    fault_at_ = at;
    what_ = std::move(what);
    return nullptr;
  }

  Part& part_;
  Part::Content& content_;
  const ReadOptions& options_;
  float* const labels_;
  int64_t* const offsets_;
  int32_t* const fields_;
  Index* const indices_;
  float* const values_;
  const char* fault_at_ = nullptr;
  std::string what_;
};

// Moves what the parts hold to where nothing lies between. Lines that are blank or were left out make gaps.
template <typename Index>
void close_gaps(const std::vector<Part>& parts, Arrays<Index>& arrays) {
  int64_t labels = 0, entries = 0;
  auto move = [](auto& array, int64_t to, int64_t from, int64_t n) {
    if (array.size && to != from) std::memmove(array.get() + to, array.get() + from, n * sizeof(*array.get()));
  };
  for (const Part& part : parts) {
    move(arrays.labels, labels, part.first_label, part.content.num_labels);
    move(arrays.offsets, labels + 1, part.first_label + 1, part.content.num_labels);
    if (const int64_t gap = part.first_entry - entries) {
      for (int64_t i = 0; i < part.content.num_labels; ++i) arrays.offsets.get()[labels + 1 + i] -= gap;
    }
    move(arrays.fields, entries, part.first_entry, part.content.num_entries);
    move(arrays.indices, entries, part.first_entry, part.content.num_entries);
    move(arrays.values, entries, part.first_entry, part.content.num_entries);
    labels += part.content.num_labels;
    entries += part.content.num_entries;
  }
  arrays.labels.size = labels;
  arrays.offsets.size = labels + 1;
  if (arrays.fields.size) arrays.fields.size = entries;
  arrays.indices.size = entries;
  if (arrays.values.size) arrays.values.size = entries;
}

// False if an id does not fit Index.
template <TextFormat kFormat, typename Index>
bool fill(std::vector<Part>& parts, const ReadOptions& options, Samples& samples) {
  int64_t max_labels = 0, max_entries = 0, line = options.first_line;
  for (Part& part : parts) {
    part.first_line = line;
    part.first_label = max_labels;
    part.first_entry = max_entries;
    line += part.num_lines;
    max_labels += part.num_lines;
    max_entries += part.max_entries;
  }
  samples.num_lines = line - options.first_line;
  if (sizeof(Index) < sizeof(int64_t) && max_entries > kMaxInt32) return false;

  Arrays<Index> arrays{Array<float>(max_labels), Array<int64_t>(max_labels + 1),
                       Array<int32_t>(kFormat == TextFormat::kLibffm ? max_entries : 0), Array<Index>(max_entries),
                       Array<float>(max_entries)};
  arrays.offsets.get()[0] = 0;
  // What lies behind the first part that stops is of no use.
  std::atomic<size_t> first_stopped = parts.size();
  parallel_for(parts.size(), options.num_threads, [&](size_t i) {
    Part& part = parts[i];
    PartParser<kFormat, Index>(part, options, arrays).parse([&] {
      return first_stopped.load(std::memory_order_relaxed) < i;
    });
    if (part.needs_int64 || (part.num_faults && !options.lenient)) {
      size_t seen = first_stopped;
      while (i < seen && !first_stopped.compare_exchange_weak(seen, i)) {
      }
    }
  });
  if (first_stopped < parts.size()) {
    const Part& stopped = parts[first_stopped];
    if (stopped.needs_int64) return false;
    samples.faults = stopped.faults;
    samples.num_faults = 1;
    return true;
  }

  bool has_values = false;
  for (Part& part : parts) {
    samples.max_field = std::max(samples.max_field, part.content.max_field);
    samples.max_index = std::max(samples.max_index, part.content.max_index);
    samples.num_faults += part.num_faults;
    for (Fault& fault : part.faults) {
      if (static_cast<int64_t>(samples.faults.size()) < options.max_faults) samples.faults.push_back(std::move(fault));
    }
    has_values |= part.content.has_values;
  }
  if (has_values) {
    for (const Part& part : parts) {
      if (!part.content.has_values) std::fill_n(arrays.values.get() + part.first_entry, part.content.num_entries, 1.0f);
    }
  } else {
    arrays.values = {};
  }
  close_gaps(parts, arrays);
  samples.labels = std::move(arrays.labels);
  samples.offsets = std::move(arrays.offsets);
  samples.fields = std::move(arrays.fields);
  samples.indices = std::move(arrays.indices);
  samples.values = std::move(arrays.values);
  return true;
}

template <TextFormat kFormat>
void fill(std::vector<Part>& parts, const ReadOptions& options, Samples& samples) {
  const std::vector<Part> counted = parts;
  if (fill<kFormat, int32_t>(parts, options, samples)) return;
  parts = counted;
  fill<kFormat, int64_t>(parts, options, samples);
}

}  // namespace

Samples read_file(const std::string& path, const ReadOptions& options) {
  const MappedFile file(path);
  return read_text(file.text(), options);
}

Samples read_text(std::string_view text, const ReadOptions& options) {
  const char *const text_begin = text.data(), *const text_end = text_begin + text.size();
  auto first_line_from = [&](int64_t at) {
    return line_start(text_begin, text_begin + std::clamp<int64_t>(at, 0, text.size()), text_end);
  };
  const char* const begin = first_line_from(options.begin);
  const char* const end = std::max(begin, first_line_from(options.end));

  // What follows the last '\n' is a line of its own, which lacks its end: it gets one in a copy.
  const char* tail_begin = end;
  while (tail_begin != begin && tail_begin[-1] != '\n') --tail_begin;
  const std::string tail = tail_begin == end ? std::string() : std::string(tail_begin, end) + '\n';

  // A few parts for each thread, so that none waits long for the last one.
  const int64_t most = (tail_begin - begin) / options.min_part_bytes + 1;
  const int64_t num_parts = options.num_threads > 1 ? std::min(int64_t{4} * options.num_threads, most) : 1;
  std::vector<Part> parts;
  const char* part_begin = begin;
  for (int64_t i = 1; i <= num_parts; ++i) {
    const char* cut = begin + (tail_begin - begin) / num_parts * i;
    const char* part_end = i == num_parts ? tail_begin : line_start(begin, std::max(cut, part_begin), tail_begin);
    if (part_end != part_begin) parts.push_back({part_begin, part_end});
    part_begin = part_end;
  }
  if (!tail.empty()) parts.push_back({tail.data(), tail.data() + tail.size()});
  parallel_for(parts.size(), options.num_threads, [&](size_t i) { count(parts[i], options.format); });

  Samples samples;
  samples.end = end - text_begin;
  if (options.format == TextFormat::kLibffm) {
    fill<TextFormat::kLibffm>(parts, options, samples);
  } else {
    fill<TextFormat::kLibsvm>(parts, options, samples);
  }
  return samples;
}

}  // namespace ffm::io
