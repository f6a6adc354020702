// SPDX-License-Identifier: MIT
// Rows of a table, updated with gradients that are given.

#include <type_traits>

#include "../dispatch.h"
#include "ffm_kernels.h"
#include "launch.h"
#include "update_rules.cuh"

namespace ffm::cuda {
namespace {

template <typename T>
struct UpdateTask {
  RowUpdate<T> update;
  int64_t num_features = 0;
  int64_t num_fields = 0;
  const int64_t* rows = nullptr;
  int64_t num_rows = 0;
  const T* grad_rows = nullptr;
};

template <typename T, int kCount>
__global__ void __launch_bounds__(kUnitThreads, 4) update_rows_kernel(const UpdateTask<T> t) {
  const RowUpdate<T>& u = t.update;
  const bool by_vectors = u.lanes == 0;
  const OwnUnit own(by_vectors ? t.num_fields : u.table.row_size / kCount);
  if (own.row >= t.num_rows) return;
  const int64_t row = t.rows ? t.rows[own.row] : own.row;
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(t.num_features)) return;
  const auto gradient = [&](int64_t i) {
    const Numbers<T, kCount> stored = load_numbers<kCount>(t.grad_rows + own.row * u.table.row_size + i);
    Numbers<Sum<T>, kCount> g;
#pragma unroll
    for (int k = 0; k < kCount; ++k) g.x[k] = stored.x[k];
    return g;
  };
  if (by_vectors) {
    const int64_t i = own.unit * u.table.embed_dim;
    return update_vector<kCount>(u, row, i, [&](int k, Numbers<T, kCount>& w, Numbers<Sum<T>, kCount>& g) {
      w = load_numbers<kCount>(u.weight(row, i + k));
      g = gradient(i + k);
    });
  }
  const int64_t i = own.unit * kCount;
  update_unit<kCount>(u, row, i, load_numbers<kCount>(u.weight(row, i)), gradient(i));
}

__global__ void find_row_faults_kernel(const int64_t* rows, int64_t n, int64_t num_features, RowFaults* faults) {
  const auto at_first = [](int64_t* fault, int64_t i) {
    atomicMin(reinterpret_cast<unsigned long long*>(fault), static_cast<unsigned long long>(i));
  };
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  if (static_cast<uint64_t>(rows[i]) >= static_cast<uint64_t>(num_features)) at_first(&faults->range, i);
  if (i > 0 && rows[i] <= rows[i - 1]) at_first(&faults->order, i);
}

}  // namespace

const char* update_rows(const Update& update, ScalarKind dtype, int64_t num_features, const int64_t* rows, int64_t n,
                        const void* grad_rows, void* stream) {
  if (n == 0) return nullptr;
  cudaError_t error = cudaSuccess;
  const int64_t K = update.table.embed_dim;
  dispatch_dtype(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    constexpr int kWide = kWideCount<T>;
    const bool is_wide = K % kWide == 0 && is_aligned(update.table.weight, kWide * sizeof(T)) &&
                         is_aligned(grad_rows, kWide * sizeof(T)) && has_aligned_states(update);
    UpdateTask<T> task;
    task.num_features = num_features;
    task.num_fields = update.table.row_size / K;
    task.rows = rows;
    task.num_rows = n;
    task.grad_rows = static_cast<const T*>(grad_rows);
    const auto launch = [&](auto count) {
      task.update = RowUpdate<T>(update, K / count());
      const int64_t units = task.update.lanes == 0 ? task.num_fields : update.table.row_size / count();
      return GPU_LAUNCH((update_rows_kernel<T, count()>), unit_blocks(n, units), kUnitThreads, 0,
                        static_cast<cudaStream_t>(stream), task);
    };
    error = is_wide ? launch(std::integral_constant<int, kWide>{}) : launch(std::integral_constant<int, 1>{});
  });
  return error_text(error);
}

const char* find_row_faults(const int64_t* rows, int64_t n, int64_t num_features, RowFaults* faults, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  static_assert(kNoFault == 0x7f7f7f7f7f7f7f7f, "as cudaMemset writes it");
  cudaError_t error = cudaMemsetAsync(faults, 0x7f, sizeof(RowFaults), stream);
  if (error == cudaSuccess && n > 0) {
    error =
        GPU_LAUNCH(find_row_faults_kernel, unit_blocks(n, 1), kUnitThreads, 0, stream, rows, n, num_features, faults);
  }
  return error_text(error);
}

}  // namespace ffm::cuda
