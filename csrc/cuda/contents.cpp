// SPDX-License-Identifier: MIT
// Faults of a batch, found on the device and told on the host.

#include "contents.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ffm::cuda {
namespace {

class Reader {
 public:
  explicit Reader(const OnDevice& on) : on_(on) {}

  template <typename T>
  T at(const void* device, int64_t i) const {
    T value;
    on_.check(read_back(&value, static_cast<const T*>(device) + i, sizeof(T), on_.stream()));
    return value;
  }
  int64_t id(const Ids& ids, int64_t i) const {
    return ids.is_int64 ? at<int64_t>(ids.data, i) : at<int32_t>(ids.data, i);
  }
  double number(const void* device, ScalarKind dtype, int64_t i) const {
    switch (dtype) {
      case ScalarKind::kFloat32: return at<float>(device, i);
      case ScalarKind::kFloat64: return at<double>(device, i);
      case ScalarKind::kBFloat16: return static_cast<float>(at<torch::headeronly::BFloat16>(device, i));
      case ScalarKind::kFloat16: return static_cast<float>(at<torch::headeronly::Half>(device, i));
    }
    return 0;
  }

 private:
  const OnDevice& on_;
};

}  // namespace

double read_number(const OnDevice& on, const void* device, ScalarKind dtype, int64_t i) {
  return Reader(on).number(device, dtype, i);
}

void check_contents(const char* op, const Problem& p, const Tensor& like, const OnDevice& on) {
  if (!checks_device_contents()) return;
  const Tensor memory =
      torch::stable::new_empty(like, std::vector<int64_t>{static_cast<int64_t>(sizeof(Faults))}, ScalarType::Byte);
  Faults* const faults = static_cast<Faults*>(memory.mutable_data_ptr());
  on.check(find_faults(p, faults, on.stream()));
  const Reader read(on);
  const Faults found = read.at<Faults>(faults, 0);
  if (found.offset != kNoFault) {
    const int64_t i = found.offset, B = p.batch_size;
    const int64_t before = 0 < i && i <= B ? read.id(p.offsets, i - 1) : 0;
    fail_offset(op, p, i, read.id(p.offsets, i <= B ? i : B), before);
  }
  if (found.index != kNoFault) fail_index(op, p, found.index, read.id(p.indices, found.index));
  if (found.field != kNoFault) fail_field(op, p, found.field, read.id(p.fields, found.field));
  if (found.value != kNoFault) fail_value(op, p, found.value, read.number(p.values, p.dtype, found.value));
}

}  // namespace ffm::cuda
