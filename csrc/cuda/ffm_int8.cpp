// SPDX-License-Identifier: MIT
// Packed int8 tables on CUDA: made from float tables, turned back, and read by the interaction.

#include <torch/csrc/stable/library.h>

#include "contents.h"

namespace ffm::cuda {
namespace {

// Waits for the device, to say whether every element could be packed.
Tensor ffm_quantize(const Tensor& weight) {
  const char* op = "ffm_quantize";
  const Table table = float_table(op, weight);
  const Problem& p = table.problem;
  const OnDevice on(op, weight);
  const int64_t row_bytes = packed_row_bytes(p.num_fields, p.embed_dim);
  Tensor packed = torch::stable::new_empty(weight, std::vector<int64_t>{p.num_features, row_bytes}, ScalarType::Byte);
  const Tensor memory = torch::stable::new_empty(weight, std::vector<int64_t>{1}, ScalarType::Long);
  int64_t* const first_bad = static_cast<int64_t*>(memory.mutable_data_ptr());
  on.check(quantize(p, packed.mutable_data_ptr(), first_bad, on.stream()));
  int64_t bad = kNoFault;
  on.check(read_back(&bad, first_bad, sizeof(bad), on.stream()));
  if (bad != kNoFault) fail_element(op, p, bad, read_number(on, p.weight, p.dtype, bad));
  return packed;
}

Tensor ffm_dequantize(const Tensor& packed, int64_t num_fields, int64_t embed_dim) {
  const char* op = "ffm_dequantize";
  const Table table = packed_table(op, packed, num_fields, embed_dim);
  const OnDevice on(op, packed);
  Tensor weight = torch::stable::new_empty(
      packed, std::vector<int64_t>{table.problem.num_features, num_fields, embed_dim}, ScalarType::Float);
  on.check(dequantize(table.problem, static_cast<float*>(weight.mutable_data_ptr()), on.stream()));
  return weight;
}

Tensor ffm_forward_int8(const Tensor& packed, const Tensor& indices, const OptionalTensor& fields,
                        const OptionalTensor& values, const OptionalTensor& offsets, int64_t num_fields,
                        int64_t embed_dim, const std::string& output, bool within_field) {
  const char* op = "ffm_forward_int8";
  const Batch batch(op, packed_table(op, packed, num_fields, embed_dim), indices, fields, values, offsets, output,
                    within_field);
  const OnDevice on(op, packed);
  check_contents(op, batch.problem, packed, on);
  Tensor out = torch::stable::new_empty(packed, batch.output_shape(), ScalarType::Float);
  on.check(forward_int8(batch.problem, static_cast<float*>(out.mutable_data_ptr()), on.stream()));
  return out;
}

}  // namespace
}  // namespace ffm::cuda

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CUDA, m) {
  m.impl("ffm_quantize", TORCH_BOX(&ffm::cuda::ffm_quantize));
  m.impl("ffm_dequantize", TORCH_BOX(&ffm::cuda::ffm_dequantize));
  m.impl("ffm_forward_int8", TORCH_BOX(&ffm::cuda::ffm_forward_int8));
}
