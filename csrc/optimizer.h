// SPDX-License-Identifier: MIT
// What an optimizer is told and what it keeps: plain numbers and pointers, no torch. Its arithmetic is a struct of
// update_rules.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "params.h"

namespace ffm {

enum class OptimizerKind : int8_t { kSgd, kAdaGrad, kVectorAdaGrad, kAdam, kFtrl };

struct Optimizer {
  OptimizerKind kind = OptimizerKind::kSgd;
  double lr = 0;
  double weight_decay = 0;  // L2: added to the gradient, as torch.optim does
  double beta1 = 0;         // Adam; FTRL's beta
  double beta2 = 0;         // Adam
  double eps = 0;           // Adam
  double l1 = 0;            // FTRL
  // bfloat16 only: weights are rounded up or down at random, by numbers that seed, step, row and place decide.
  bool is_stochastic = false;
  uint64_t seed = 0;

  int64_t step = 0;        // of this update, from 1
  double correction1 = 1;  // Adam's 1 - beta^step
  double correction2 = 1;

  __attribute__((always_inline)) inline void set_step(int64_t new_step) {
    step = new_step;
    if (kind != OptimizerKind::kAdam) return;
    correction1 = 1 - std::pow(beta1, static_cast<double>(step));
    correction2 = 1 - std::pow(beta2, static_cast<double>(step));
  }
};

// What sets an optimizer apart, beside its arithmetic.
struct OptimizerTraits {
  OptimizerKind kind;
  const char* name;     // in schemas
  int num_states;       // tensors that it keeps for a table, of a number for each weight
  bool is_vector_wise;  // or for each K-vector
  bool adds_up;         // two threads may each change copies of a row and of its states, and what both changed be added
};
constexpr OptimizerTraits kOptimizers[] = {
    {OptimizerKind::kSgd, "sgd", 0, false, true},
    {OptimizerKind::kAdaGrad, "adagrad", 1, false, true},
    {OptimizerKind::kVectorAdaGrad, "vector_adagrad", 1, true, true},
    {OptimizerKind::kAdam, "adam", 2, false, false},
    {OptimizerKind::kFtrl, "ftrl", 2, false, false},
};
inline const OptimizerTraits& traits(OptimizerKind kind) { return kOptimizers[static_cast<int>(kind)]; }

// A table that is updated in place, with the states of its optimizer, which are of the type that sums have.
struct UpdatedTable {
  void* weight = nullptr;      // [N, F, K], or none
  void* states[2] = {};        // [N, F, K], or [N, F] of a vector-wise one
  int64_t row_size = 0;        // F * K
  int64_t embed_dim = 0;       // K
  int64_t state_row_size = 0;  // F * K or F
};

struct Update {
  UpdatedTable table;
  Optimizer optimizer;
};

enum class Loss : int8_t {
  kLogistic,  // log(1 + exp(-y t)), y = 1 for labels > 0, else -1
  kSquared,   // (t - y)^2 / 2
};

// What a pass over samples does besides the table's own Problem (see ffm_train_kernels.cpp).
struct Training {
  UpdatedTable table;
  UpdatedTable linear;  // [N, 1], or none
  Ids state_rows;       // [nnz]: entry -> row of the table's states
  Ids linear_rows;      // [nnz]: entry -> row of linear and of its states
  UpdatedTable bias;    // [1], or none
  Optimizer optimizer;
  Loss loss = Loss::kLogistic;
  bool normalize = false;  // values are divided by the norm of their sample
};

}  // namespace ffm
