// SPDX-License-Identifier: MIT
// Forward operators on CUDA: arguments -> checks -> params.h -> kernels, on torch's current stream.

#include <torch/csrc/stable/library.h>

#include "contents.h"

namespace ffm::cuda {
namespace {

Tensor ffm_forward(const Tensor& weight, const Tensor& indices, const OptionalTensor& fields,
                   const OptionalTensor& values, const OptionalTensor& offsets, const std::string& output,
                   bool within_field) {
  const char* op = "ffm_forward";
  const Batch batch(op, weight, indices, fields, values, offsets, output, within_field);
  const OnDevice on(op, weight);
  check_contents(op, batch.problem, weight, on);
  Tensor out =
      batch.has_wide_output() ? new_wide_output(batch) : torch::stable::new_empty(weight, batch.output_shape());
  on.check(forward(batch.problem, out.mutable_data_ptr(), on.stream()));
  return out;
}

Tensor ffm_gather_sum(const Tensor& weight, const Tensor& indices) {
  const char* op = "gather_sum";
  const Batch batch(op, weight, indices, std::nullopt, std::nullopt, std::nullopt, "sum", false);
  const OnDevice on(op, weight);
  check_contents(op, batch.problem, weight, on);
  Tensor out = torch::stable::new_empty(weight, batch.output_shape());
  on.check(gather_sum(batch.problem, out.mutable_data_ptr(), on.stream()));
  return out;
}

}  // namespace
}  // namespace ffm::cuda

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CUDA, m) {
  m.impl("ffm_forward", TORCH_BOX(&ffm::cuda::ffm_forward));
  m.impl("gather_sum", TORCH_BOX(&ffm::cuda::ffm_gather_sum));
}
