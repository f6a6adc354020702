// SPDX-License-Identifier: MIT
// Packed int8 tables on the CPU: made from float tables, turned back, and read by the interaction.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../dispatch.h"
#include "batch.h"
#include "huge_pages.h"
#include "isa.h"

namespace ffm {
namespace {

// Field sums of a block of samples: few enough to stay in the caches of a core.
constexpr int64_t kBlockBytes = 64 << 10;

// ---- Float -> int8.

// Rows [begin, end). Returns where the first of their elements is that float32 cannot hold, -1 where there is none.
template <typename T>
int64_t quantize_rows(const Problem& p, const T* weight, char* packed, int64_t begin, int64_t end) {
  const int64_t F = p.num_fields, K = p.embed_dim, packed_K = packed_embed_dim(K), row_bytes = packed_row_bytes(F, K);
  constexpr float kMax = std::numeric_limits<float>::max();
  // Added, it leaves a number rounded to the nearest integer, ties to even, in the last bits of the sum.
  constexpr float kRound = 0x1.8p23f;
  for (int64_t a = begin; a < end; ++a) {
    char* const row = packed + a * row_bytes;
    std::memset(row, 0, static_cast<size_t>(row_bytes));
    for (int64_t g = 0; g < F; ++g) {
      const T* const vector = weight + (a * F + g) * K;
      float largest = 0;
      bool bad = false;
      for (int64_t k = 0; k < K; ++k) {
        const float magnitude = std::abs(static_cast<float>(vector[k]));
        bad |= !(magnitude <= kMax);
        largest = std::max(largest, magnitude);
      }
      if (bad) {
        for (int64_t k = 0; k < K; ++k) {
          if (!(std::abs(static_cast<float>(vector[k])) <= kMax)) return (a * F + g) * K + k;
        }
      }
      const uint16_t scale = packed_scale_bits(largest);
      const float inverse = scale ? 1 / std::bit_cast<float>(static_cast<uint32_t>(scale) << 16) : 0.0f;
      std::memcpy(row + 2 * g, &scale, sizeof(scale));
      char* const numbers = row + 2 * F + g * packed_K;
      for (int64_t k = 0; k < K; ++k) {
        const float rounded = static_cast<float>(vector[k]) * inverse + kRound;
        numbers[k] = static_cast<char>(std::bit_cast<int32_t>(rounded) - std::bit_cast<int32_t>(kRound));
      }
    }
  }
  return -1;
}

Tensor ffm_quantize(const Tensor& weight) {
  const char* op = "ffm_quantize";
  const Table table = float_table(op, weight);
  const Problem& p = table.problem;
  const int64_t N = p.num_features, row_bytes = packed_row_bytes(p.num_fields, p.embed_dim);
  Tensor packed = torch::stable::new_empty(weight, std::vector<int64_t>{N, row_bytes}, ScalarType::Byte);
  char* const data = static_cast<char*>(packed.mutable_data_ptr());
  const char* const huge_pages = std::getenv("FFM_EXT_HUGE_PAGES");
  if (huge_pages == nullptr || std::strcmp(huge_pages, "0") != 0) {
    advise_huge_pages(data, static_cast<size_t>(N * row_bytes));
  }
  const int64_t parts = num_parts(N * p.row_size(), kGrainElements);
  std::vector<int64_t> bad(parts, -1);
  parallel_ranges(parts, N, [&](int64_t part, int64_t begin, int64_t end) {
    with_numbers(p.dtype, p.weight,
                 [&](const auto* numbers) { bad[part] = quantize_rows(p, numbers, data, begin, end); });
  });
  for (int64_t i : bad) {
    if (i >= 0) fail_element(op, p, i, number_at(p.dtype, p.weight, i));
  }
  return packed;
}

Tensor ffm_dequantize(const Tensor& packed, int64_t num_fields, int64_t embed_dim) {
  const Table table = packed_table("ffm_dequantize", packed, num_fields, embed_dim);
  const Problem& p = table.problem;
  const int64_t N = p.num_features;
  Tensor weight = torch::stable::new_empty(packed, std::vector<int64_t>{N, num_fields, embed_dim}, ScalarType::Float);
  float* const data = static_cast<float*>(weight.mutable_data_ptr());
  const Int8Kernels& kernels = int8_kernels();
  const int64_t parts = num_parts(N * p.row_size(), kGrainElements);
  parallel_ranges(parts, N, [&](int64_t, int64_t begin, int64_t end) {
    kernels.dequantize(p, data + begin * p.row_size(), begin, end);
  });
  return weight;
}

// ---- Interaction.

// The field sums of a block of samples as a float32 table with one row a field and sample, which the float32 kernels
// then take like any other.
class FieldSumsBlock {
 public:
  FieldSumsBlock(const Problem& p, int64_t output_size)
      : p_(p),
        output_size_(output_size),
        max_samples_(std::clamp<int64_t>(kBlockBytes / (p.num_fields * p.row_size() * 4), 1, 64)),
        sums_(sizeof(float) * max_samples_ * p.num_fields * p.row_size()),
        within_(sizeof(float) * max_samples_ * p.row_size()),
        sums_scratch_(int8_kernels().scratch_bytes(p)),
        block_(p),
        counts_(p.num_fields),
        rows_(max_samples_ * p.num_fields),
        fields_(max_samples_ * p.num_fields),
        offsets_(max_samples_ + 1) {
    block_.weight = sums_.data();
    block_.num_features = max_samples_ * p.num_fields;
    block_.indices = {rows_.data(), true};
    block_.values = nullptr;
    if (p.fields) {
      block_.fields = {fields_.data(), true};
      block_.offsets = {offsets_.data(), true};
    }
    forward_scratch_ = std::make_unique<AlignedBuffer>(forward_kernels(block_.dtype).scratch_bytes(block_));
  }

  int64_t max_samples() const { return max_samples_; }

  // Samples [begin, end), no more than max_samples.
  void forward(float* out, int64_t begin, int64_t end) {
    const int64_t F = p_.num_fields, row_size = p_.row_size();
    float* const sums = reinterpret_cast<float*>(sums_.data());
    float* const within = reinterpret_cast<float*>(within_.data());
    int64_t n = 0;
    for (int64_t i = 0; i < end - begin; ++i) {
      int8_kernels().field_sums(p_, begin + i, counts_.data(), sums + i * F * row_size, within + i * row_size,
                                sums_scratch_.data());
      for (int64_t f = 0; f < F; ++f) {
        if (counts_[f] == 0) continue;
        rows_[n] = i * F + f;
        fields_[n++] = f;
      }
      offsets_[i + 1] = n;
    }
    block_.batch_size = end - begin;
    block_.num_entries = n;
    out += begin * output_size_;
    forward_kernels(block_.dtype).forward(block_, out, 0, end - begin, forward_scratch_->data());
    if (!p_.within_field || !p_.fields) return;
    for (int64_t i = 0; i < end - begin; ++i) add_within(out + i * output_size_, within + i * row_size);
  }

 private:
  // The pairs inside fields, of which a table of sums knows nothing.
  void add_within(float* out, const float* within) const {
    const int64_t F = p_.num_fields, K = p_.embed_dim;
    if (p_.output == Output::kHadamard) {
      std::memcpy(out + output_size_ - F * K, within, sizeof(float) * F * K);
      return;
    }
    for (int64_t f = 0; f < F; ++f) {
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += within[f * K + k];
      (p_.output == Output::kSum ? *out : out[output_size_ - F + f]) += sum;
    }
  }

  const Problem& p_;
  int64_t output_size_;  // a sample
  int64_t max_samples_;
  AlignedBuffer sums_, within_, sums_scratch_;
  Problem block_;
  std::vector<int64_t> counts_, rows_, fields_, offsets_;
  std::unique_ptr<AlignedBuffer> forward_scratch_;
};

Tensor ffm_forward_int8(const Tensor& packed, const Tensor& indices, const OptionalTensor& fields,
                        const OptionalTensor& values, const OptionalTensor& offsets, int64_t num_fields,
                        int64_t embed_dim, const std::string& output, bool within_field) {
  const char* op = "ffm_forward_int8";
  const Batch batch(op, packed_table(op, packed, num_fields, embed_dim), indices, fields, values, offsets, output,
                    within_field);
  const Problem& p = batch.problem;
  check_contents(op, p);
  Tensor out = torch::stable::new_empty(packed, batch.output_shape(), ScalarType::Float);
  if (p.batch_size == 0) return out;
  float* const data = static_cast<float*>(out.mutable_data_ptr());

  const Int8Kernels& kernels = int8_kernels();
  const bool has_forward = kernels.has_forward(p), all_plain = has_forward && !p.fields;
  const int64_t parts = sample_parts(p, 0, p.batch_size);
  const Scratch scratch(parts, kernels.scratch_bytes(p));
  std::vector<std::unique_ptr<FieldSumsBlock>> blocks(parts);
  for (auto& block : blocks) {
    if (!all_plain) block = std::make_unique<FieldSumsBlock>(p, out.numel() / p.batch_size);
  }
  parallel_parts(parts, [&](int64_t part) {
    const int64_t end = part_begin(p, 0, p.batch_size, part + 1, parts);
    int64_t begin = part_begin(p, 0, p.batch_size, part, parts);
    while (begin < end) {
      int64_t run = all_plain ? end : begin;
      while (run < end && has_forward && is_plain(p, run)) ++run;
      if (run > begin) {
        kernels.forward(p, data, begin, run, scratch.of(part));
      } else {
        FieldSumsBlock& block = *blocks[part];
        do ++run;
        while (run < end && run - begin < block.max_samples() && !(has_forward && is_plain(p, run)));
        block.forward(data, begin, run);
      }
      begin = run;
    }
  });
  return out;
}

}  // namespace
}  // namespace ffm

STABLE_TORCH_LIBRARY_IMPL(ffm_ext, CPU, m) {
  m.impl("ffm_quantize", TORCH_BOX(&ffm::ffm_quantize));
  m.impl("ffm_dequantize", TORCH_BOX(&ffm::ffm_dequantize));
  m.impl("ffm_forward_int8", TORCH_BOX(&ffm::ffm_forward_int8));
}
