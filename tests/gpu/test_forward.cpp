// SPDX-License-Identifier: MIT
#include "testing.h"

namespace ffm {

void test_forward(const Coverage& coverage) {
  for_problems(coverage, [&]<typename T>(const Batch<T>& batch, uint64_t number) {
    const Problem& p = batch.problem;
    const DeviceBatch<T> on_device(batch, number % 5 != 0);
    const Truth truth = find_truth(batch, unwritten<T>(batch.output_size()));
    const std::string what = "forward" + batch.name;
    with_output_type(batch, [&]<typename Out>() {
      DeviceArray<Out> out(batch.output_size());
      compare(what,
              under_schedules(coverage, number, what,
                              [&] {
                                out.clear();
                                launched(what, cuda::forward(on_device.problem, out.data(), nullptr));
                                return out.read();
                              }),
              truth.out);
    });

    if (p.output != Output::kSum || p.fields) return;
    DeviceArray<T> sums(p.batch_size);
    const std::string sum = "gather_sum" + batch.name;
    compare(sum,
            under_schedules(coverage, number, sum,
                            [&] {
                              sums.clear();
                              launched(sum, cuda::gather_sum(on_device.problem, sums.data(), nullptr));
                              return sums.read();
                            }),
            truth.row_sums);
  });
}

}  // namespace ffm
