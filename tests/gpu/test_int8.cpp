// SPDX-License-Identifier: MIT
#include "testing.h"

namespace ffm {
namespace {

// A number of the table, as it is packed: see packed_scale_bits and the CPU's quantize_rows.
template <typename T>
std::vector<char> quantize_by_definition(const Batch<T>& batch) {
  const Problem& p = batch.problem;
  const int64_t F = p.num_fields, K = p.embed_dim;
  std::vector<char> packed(p.num_features * packed_row_bytes(F, K));
  for (int64_t i = 0; i < p.num_features * F; ++i) {
    char* const row = packed.data() + i / F * packed_row_bytes(F, K);
    float largest = 0;
    const auto number = [&](int64_t k) { return static_cast<float>(decode(batch.weight[i * K + k])); };
    for (int64_t k = 0; k < K; ++k) largest = std::max(largest, std::abs(number(k)));
    const BFloat16 scale = {packed_scale_bits(largest)};
    std::memcpy(row + 2 * (i % F), &scale, sizeof(scale));
    const float inverse = scale.bits ? 1 / static_cast<float>(decode(scale)) : 0.0f;
    for (int64_t k = 0; k < K; ++k) {
      row[2 * F + i % F * packed_embed_dim(K) + k] = static_cast<char>(std::nearbyint(number(k) * inverse));
    }
  }
  return packed;
}

}  // namespace

void test_int8(const Coverage& coverage) {
  for_problems(coverage, [&]<typename T>(const Batch<T>& given, uint64_t number) {
    const Problem& given_problem = given.problem;
    if (given_problem.output == Output::kSum) {
      // A vector of zeros, and a number that float32 cannot hold.
      Batch<T> batch = given;
      std::fill_n(batch.weight.begin(), given_problem.embed_dim, T{});
      const DeviceBatch<T> on_device(batch, number % 5 != 0);
      DeviceArray<char> packed(given_problem.num_features *
                               packed_row_bytes(given_problem.num_fields, given_problem.embed_dim));
      DeviceArray<int64_t> first_bad(1);
      const std::string what = "quantize" + given.name;
      const auto run = [&] {
        packed.clear();
        first_bad.clear();
        launched(what, cuda::quantize(on_device.problem, packed.data(), first_bad.data(), nullptr));
        return packed.read();
      };
      check(under_schedules(coverage, number, what, run) == quantize_by_definition(batch), what);
      check(first_bad.read()[0] == cuda::kNoFault, what + ": a number that is not bad");
      const int64_t last = static_cast<int64_t>(batch.weight.size()) - 1, bad = last - number % 3;
      on_device.weight.data()[last] = on_device.weight.data()[bad] = unwritten<T>(1)[0];
      run();
      check(first_bad.read()[0] == std::min(last, bad), what + ": where the first bad number is");
    }

    if constexpr (std::is_same_v<T, float>) {
      Batch<float> batch = given;
      const Problem& p = batch.problem;
      const std::vector<char> packed = pack_table(batch);
      const Truth truth = find_truth(batch, std::vector<float>(batch.output_size(), 1.0f));
      DeviceBatch<float> on_device(batch);
      const DeviceArray<char> table(packed);
      on_device.problem.weight = table.data();

      DeviceArray<float> rows(p.num_features * p.row_size());
      const std::string dequantize = "dequantize" + batch.name;
      const std::vector<float> found = under_schedules(coverage, number, dequantize, [&] {
        rows.clear();
        launched(dequantize, cuda::dequantize(on_device.problem, rows.data(), nullptr));
        return rows.read();
      });
      check(found == batch.weight, dequantize);

      DeviceArray<float> out(batch.output_size());
      const std::string forward = "forward_int8" + batch.name;
      compare(forward,
              under_schedules(coverage, number, forward,
                              [&] {
                                out.clear();
                                launched(forward, cuda::forward_int8(on_device.problem, out.data(), nullptr));
                                return out.read();
                              }),
              truth.out);
    }
  });
}

}  // namespace ffm
