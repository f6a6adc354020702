// SPDX-License-Identifier: MIT
// Lists that hold what they must not: nothing is read out of bounds, the samples in question are NaN, the others are as
// if nothing were wrong, and find_faults tells where.
#include "testing.h"

namespace ffm {
namespace {

// Spoils some samples of the batch; others may lose or gain nothing. Returns which.
template <typename T>
std::vector<bool> spoil(Batch<T>& batch, cuda::Faults& faults) {
  Problem& p = batch.problem;
  std::vector<bool> is_bad(p.batch_size);
  const int64_t bad_ids[] = {p.num_features, -1, INT32_MAX, INT32_MIN};
  std::vector<int64_t> indices = batch.indices.wide, fields = batch.fields.wide;
  for (int64_t b = 0; b < p.batch_size; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    if (random_bits() % 2 || first == last) continue;
    const int64_t e = first + static_cast<int64_t>(random_bits() % (last - first));
    if (p.fields && random_bits() % 2) {
      fields[e] = random_bits() % 2 ? p.num_fields : -1;
      faults.field = std::min(faults.field, e);
    } else {
      indices[e] = bad_ids[random_bits() % 4];
      faults.index = std::min(faults.index, e);
    }
    is_bad[b] = true;
  }
  if (p.values && random_bits() % 2) {
    const int64_t e = static_cast<int64_t>(random_bits() % std::max<int64_t>(1, p.num_entries));
    if (e < p.num_entries) {
      batch.values[e] = unwritten<T>(1)[0];
      faults.value = e;
      for (int64_t b = 0; b < p.batch_size; ++b) {
        if (p.entries_begin(b) <= e && e < p.entries_begin(b + 1)) is_bad[b] = true;
      }
    }
  }
  batch.indices = std::move(indices);
  batch.fields = std::move(fields);
  return is_bad;
}

// The answer where nothing is wrong, and NaN in the samples that are bad.
template <typename Out, typename T>
void compare_spoiled(const std::string& what, const std::vector<Out>& found, const Batch<T>& good,
                     const std::vector<bool>& is_bad) {
  std::vector<Out> numbers = found;
  std::vector<Number> truth = find_truth(good, unwritten<T>(good.output_size())).out;
  const int64_t size = good.output_size() / good.problem.batch_size;
  bool is_nan = true;
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (!is_bad[i / size]) continue;
    is_nan = is_nan && std::isnan(decode(numbers[i]));
    numbers[i] = Out{};
    truth[i] = {};
  }
  check(is_nan, what + ": a bad sample's output is a number");
  compare(what, numbers, truth);
}

}  // namespace

void test_contents(const Coverage& coverage) {
  for_problems(coverage, [&]<typename T>(const Batch<T>& good, uint64_t number) {
    Batch<T> batch = good;
    Problem& p = batch.problem;
    cuda::Faults expected;
    const std::vector<bool> is_bad = spoil(batch, expected);
    const DeviceBatch<T> on_device(batch);
    const std::string what = "forward of bad lists" + good.name;
    const auto forward = [&]<typename Out>(const Problem& problem, DeviceArray<Out>& out) {
      return under_schedules(coverage, number, what, [&] {
        out.clear();
        launched(what, cuda::forward(problem, out.data(), nullptr));
        return out.read();
      });
    };
    with_output_type(good, [&]<typename Out>() {
      DeviceArray<Out> out(batch.output_size());
      const std::vector<Out> found = forward(on_device.problem, out);
      if (!p.values || expected.value == cuda::kNoFault) compare_spoiled(what, found, good, is_bad);
    });

    DeviceArray<cuda::Faults> faults(1);
    const std::string where = "find_faults" + good.name;
    const auto find = [&](const Problem& problem) {
      return under_schedules(coverage, number, where, [&] {
        faults.clear();
        launched(where, cuda::find_faults(problem, faults.data(), nullptr));
        return faults.read();
      })[0];
    };
    const cuda::Faults found = find(on_device.problem);
    check(found.offset == expected.offset && found.index == expected.index && found.field == expected.field &&
              found.value == expected.value,
          where);

    if (!p.offsets || p.batch_size < 3 || p.num_entries < 2) return;
    // An offset beyond the list or before it, or one that falls: all are clamped.
    const std::pair<int64_t, int64_t> wrong_offsets[] = {{p.batch_size, p.num_entries + 5}, {0, -7}, {2, INT32_MAX}};
    const auto [place, offset] = wrong_offsets[random_bits() % 3];
    Batch<T> wrong = good;
    std::vector<int64_t> offsets = good.offsets.wide;
    offsets[place] = offset;
    wrong.offsets = std::move(offsets);
    const DeviceBatch<T> wrong_on_device(wrong);
    with_output_type(good, [&]<typename Out>() {
      DeviceArray<Out> out(batch.output_size());
      forward(wrong_on_device.problem, out);
    });
    check(find(wrong_on_device.problem).offset != cuda::kNoFault, where + ": offsets");
  });
}

}  // namespace ffm
