// SPDX-License-Identifier: MIT
// Serves a packaged model without Python: lines of libffm on stdin, a probability a line on stdout.
//
//   serve MODEL.pt2 LIBFFM_EXT_OPS.so [BATCH] < samples.ffm
//
// A line is `label field:feature:value ...`; its label is not looked at. The model sees BATCH lines (1024) at a time.
// Exit codes: 0; 1 a line, an id or the package is wrong, or stdout cannot be written; 2 the command line is wrong.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <vector>

namespace {

// Samples end to end, as ffm_ext.SparseBatch has them.
struct Batch {
  std::vector<int64_t> indices, fields, offsets{0};
  std::vector<float> values;

  size_t size() const { return offsets.size() - 1; }
};

[[noreturn]] void fail(int64_t line, const char* at, std::string_view text, const std::string& what) {
  throw std::runtime_error("line " + std::to_string(line) + ", column " + std::to_string(at - text.data() + 1) + ": " +
                           what);
}

// Reads a number at `at` and what has to follow it; '\0' as a follower stands for a blank or the end of the line. The
// text ends in '\0', as that of std::string does.
template <typename T>
const char* read_number(std::string_view text, const char* at, char follower, int64_t line, const char* name, T& to) {
  const char* const end = text.data() + text.size();
  // from_chars knows no plus.
  const bool has_plus = end - at > 1 && *at == '+' && at[1] != '-';
  auto [next, error] = std::from_chars(at + has_plus, end, to);
  if constexpr (std::is_same_v<T, float>) {
    if (error == std::errc::result_out_of_range) {  // too small, which is 0, or too large: `to` does not say which
      to = std::strtof(at, nullptr);
      error = std::errc();
    }
  }
  const bool is_followed = follower ? next != end && *next == follower : next == end || *next == ' ' || *next == '\t';
  if (error != std::errc() || !is_followed)
    fail(line, at, text, std::string(name) + " is not a number in field:feature:value");
  return next + (follower ? 1 : 0);
}

void append_line(std::string_view text, int64_t line, Batch& batch) {
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto skip_blanks = [&] {
    while (at != end && (*at == ' ' || *at == '\t')) ++at;
  };
  skip_blanks();
  while (at != end && *at != ' ' && *at != '\t') ++at;  // the label
  for (skip_blanks(); at != end; skip_blanks()) {
    int64_t field, feature;
    float value;
    const char* const entry = at;
    at = read_number(text, at, ':', line, "the field", field);
    at = read_number(text, at, ':', line, "the feature", feature);
    at = read_number(text, at, '\0', line, "the value", value);
    if (field < 0 || feature < 0 || !std::isfinite(value))
      fail(line, entry, text, "field and feature must not be negative, the value must be finite");
    batch.fields.push_back(field);
    batch.indices.push_back(feature);
    batch.values.push_back(value);
  }
  batch.offsets.push_back(static_cast<int64_t>(batch.indices.size()));
}

// What an error says, without the stack that torch appends.
std::string message_of(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find("\nException raised from"));
}

// A probability a line. The package says which entry is wrong; which lines are at hand is known here.
void predict(torch::inductor::AOTIModelPackageLoader& model, Batch& batch, int64_t first_line) {
  const auto tensor = [](auto& list, at::ScalarType dtype) {
    return at::from_blob(list.data(), {static_cast<int64_t>(list.size())}, dtype);
  };
  at::Tensor probabilities;
  try {
    probabilities = model
                        .run({tensor(batch.indices, at::kLong), tensor(batch.fields, at::kLong),
                              tensor(batch.values, at::kFloat), tensor(batch.offsets, at::kLong)})
                        .at(0)
                        .to(at::kFloat)
                        .contiguous();
  } catch (const std::exception& error) {
    const int64_t last_line = first_line + static_cast<int64_t>(batch.size()) - 1;
    throw std::runtime_error("lines " + std::to_string(first_line) + " to " + std::to_string(last_line) + ": " +
                             message_of(error));
  }
  for (int64_t b = 0; b < probabilities.numel(); ++b) std::printf("%.9g\n", probabilities.data_ptr<float>()[b]);
  batch = Batch();
}

int serve(const char* package, const char* operators, size_t batch_size) {
  // Its constructors register torch.ops.ffm_ext, which the package calls.
  if (!dlopen(operators, RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model = [&] {
    try {
      return torch::inductor::AOTIModelPackageLoader(package);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(package) + ": " + message_of(error));
    }
  }();
  Batch batch;
  std::string text;
  int64_t line = 0;
  while (std::getline(std::cin, text)) {
    ++line;
    if (!text.empty() && text.back() == '\r') text.pop_back();
    append_line(text, line, batch);
    if (batch.size() == batch_size) predict(model, batch, line - static_cast<int64_t>(batch_size) + 1);
  }
  if (batch.size()) predict(model, batch, line - static_cast<int64_t>(batch.size()) + 1);
  if (std::fflush(stdout) || std::ferror(stdout)) throw std::runtime_error("standard output cannot be written");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const long batch_size = argc > 3 ? std::strtol(argv[3], nullptr, 10) : 1024;
  if (argc < 3 || argc > 4 || batch_size <= 0) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 LIBFFM_EXT_OPS.so [BATCH] < samples.ffm\n", argv[0]);
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    return serve(argv[1], argv[2], static_cast<size_t>(batch_size));
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: %s\n", argv[0], message_of(error).c_str());
    return 1;
  }
}
