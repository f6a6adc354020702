// SPDX-License-Identifier: MIT
// Every operator of torch.ops.ffm_ext. Autograd and fake kernels are in Python (ffm_ext/autograd.py, _fake.py).
//
//   FFMInteraction.forward (modules.py) -> functional.ffm_interaction -> FFMFunction (autograd.py)
//     forward:   ffm_forward
//     backward:  ffm_backward | ffm_backward_sparse | ffm_backward_values
//   each dispatched to  cpu/ffm.cpp   : checks.h, tensors -> params.h -> cpu/ffm_*_kernels.cpp, built once an ISA
//                  or   cuda/ffm*.cpp : the same checks                -> cuda/ffm_kernels.h, launchers of cuda/*.cu
//
//   with a fused optimizer (optim.py), backward is ffm_backward_fused_
//
//   Trainer (training.py): ffm_train_ for each 131,072 samples; in batches, ffm_backward_fused_ and ffm_update_
//
//   QuantizedFFMInteraction (quantized.py): ffm_quantize once, then ffm_forward_int8, by way of ffm_int8.cpp
//
// ffm_train_ and ffm_table_ids are for the CPU alone.
//
// Shapes: weight [N, F, K]; indices [B, F] alone, or indices [nnz] with fields [nnz] and offsets [B + 1]; values of the
// shape of indices. output is "sum" | "dot" | "hadamard". Gradients of values are empty where they are not asked for.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ffm_ext, m) {
  // -> [B] of the type that sums have: float32, or float64 of float64 | [B, P] | [B, P, K] of the table's type
  m.def(
      "ffm_forward(Tensor weight, Tensor indices, Tensor? fields, Tensor? values, Tensor? offsets, "
      "str output, bool within_field) -> Tensor");

  // -> grad_weight [N, F, K], grad_values. deterministic=False: CUDA may add the entries of a row in any order.
  m.def(
      "ffm_backward(Tensor grad_output, Tensor weight, Tensor indices, Tensor? fields, Tensor? values, "
      "Tensor? offsets, str output, bool within_field, bool values_grad, bool deterministic=True) -> (Tensor, Tensor)");

  // -> rows [R] the touched rows in rising order, grad_rows [R, F, K], grad_values
  m.def(
      "ffm_backward_sparse(Tensor grad_output, Tensor weight, Tensor indices, Tensor? fields, Tensor? values, "
      "Tensor? offsets, str output, bool within_field, bool values_grad) -> (Tensor, Tensor, Tensor)");

  // -> grad_values
  m.def(
      "ffm_backward_values(Tensor grad_output, Tensor weight, Tensor indices, Tensor? fields, Tensor values, "
      "Tensor? offsets, str output, bool within_field) -> Tensor");

  // Updates the table in place, with the gradient of a batch that is never made: -> grad_values.
  // optimizer: sgd, adagrad, vector_adagrad, adam or ftrl; settings: lr, weight_decay, beta1, beta2, eps, l1; step: of
  // this update, from 1; rounding_seed: rounds a bfloat16 table at random. states: [N, F, K] (vector_adagrad: [N, F])
  // float32, float64 for a float64 table: adagrad's sum, adam's mean and square, ftrl's z and n.
  m.def(
      "ffm_backward_fused_(Tensor grad_output, Tensor(a!) weight, Tensor(b!)[] states, Tensor indices, Tensor? fields, "
      "Tensor? values, Tensor? offsets, str output, bool within_field, bool values_grad, str optimizer, "
      "float[] settings, int step, int? rounding_seed) -> Tensor");

  // Updates rows of a table in place with their gradients grad_rows [R, F, K]; rows [R] int64 rise, None: all
  m.def(
      "ffm_update_(Tensor(a!) weight, Tensor(b!)[] states, Tensor? rows, Tensor grad_rows, str optimizer, "
      "float[] settings, int step, int? rounding_seed) -> ()");

  // Trains a table, and linear [N, 1] and bias [1] where given, with one sample after the other, those that order [n]
  // int64 names. labels, sample_weights [B] float32; loss: logistic or squared. step: of the
  // first sample. parallel: over threads that do not wait for each other. -> the sum of weight * loss, float64
  m.def(
      "ffm_train_(Tensor(a!) weight, Tensor(b!)[] states, Tensor(c!)? linear, Tensor(d!)[] linear_states, "
      "Tensor(e!)? bias, Tensor(f!)[] bias_states, Tensor indices, Tensor? fields, Tensor? values, Tensor? offsets, "
      "Tensor labels, Tensor? sample_weights, Tensor order, str loss, bool within_field, bool normalize, "
      "str optimizer, float[] settings, int step, int? rounding_seed, bool parallel) -> Tensor");

  // weight [N, F, K] of any dtype -> packed [N, R] uint8, R = packed_row_bytes(F, K) (params.h)
  m.def("ffm_quantize(Tensor weight) -> Tensor");

  // packed [N, R] -> float32 [N, F, K]
  m.def("ffm_dequantize(Tensor packed, int num_fields, int embed_dim) -> Tensor");

  // ffm_forward on a packed table; values and result are float32
  m.def(
      "ffm_forward_int8(Tensor packed, Tensor indices, Tensor? fields, Tensor? values, Tensor? offsets, "
      "int num_fields, int embed_dim, str output, bool within_field) -> Tensor");

  // ids [B, F] that count from 0 in every field, starts [F + 1] int64, where each field's features start in the table,
  // and its end -> ids of the table, like ids. Errors speak of `where`. For the CPU alone.
  m.def("ffm_table_ids(Tensor ids, Tensor starts, str where) -> Tensor");

  // The roof that benchmarks compare with: the same rows read and summed, nothing else. indices [B, F] -> [B]
  m.def("gather_sum(Tensor weight, Tensor indices) -> Tensor");
}
