// What an MLP's arguments are to its two products: which of them the kernels for many tokens take, and as which operands.
#pragma once
#include "activation.cuh"
#include "gemm_kernels.cuh"
#include "host.cuh"

namespace fused_mlp {

inline int element_bytes(int dtype) { return dtype == FUSED_MLP_F32 ? 4 : 2; }

// A matrix whose rows lie on 16 bytes: what a tensor map describes, and copies of 16 bytes take.
inline bool describable(const void *matrix, long long stride, int dtype) {
  return reinterpret_cast<unsigned long long>(matrix) % 16 == 0 && stride * element_bytes(dtype) % 16 == 0 && stride > 0;
}

// The stride of one row alone means nothing; a tensor map has one all the same.
inline long long x_stride(const FusedMlpArgs &args) {
  return args.tokens > 1 ? args.x_stride : (args.hidden_size + 7ll) / 8 * 8;
}

inline bool takes(const FusedMlpArgs &args) {
  Finish finish;
  float slope;
  const bool known = args.dtype == FUSED_MLP_BF16 || args.dtype == FUSED_MLP_F16 || args.dtype == FUSED_MLP_F32;
  // Gate and up leave no room to keep sums of so great a depth accurate.
  const bool too_deep = args.dtype == FUSED_MLP_F32 && args.gated && args.hidden_size > 8192;
  return known && !too_deep && args.tokens > 0 && args.hidden_size > 0 && args.intermediate_size > 0 && args.output_size > 0 &&
         args.intermediate_size * element_bytes(args.dtype) % 16 == 0 &&
         args.output_size * element_bytes(args.dtype) % 16 == 0 && args.x && args.gate && args.down &&
         (!args.gated || args.up) && finish_of(args.activation, &finish, &slope) &&
         describable(args.x, x_stride(args), args.dtype) && describable(args.gate, args.gate_stride, args.dtype) &&
         (!args.gated || describable(args.up, args.up_stride, args.dtype)) &&
         describable(args.down, args.down_stride, args.dtype);
}

// Bytes of the hidden rows, to where the next thing in the workspace may begin.
inline unsigned long long hidden_bytes(const FusedMlpArgs &args) {
  return (1ull * element_bytes(args.dtype) * args.tokens * args.intermediate_size + 255) / 256 * 256;
}

// The first product; false if the kernels do not have its activation.
inline bool first_product(const FusedMlpArgs &args, Operands *first) {
  *first = {};
  first->rows = args.x;
  first->weights = args.gate;
  first->up = args.up;
  first->bias = args.bias_gate;
  first->bias_up = args.gated ? args.bias_up : nullptr;
  first->out = args.workspace;
  first->rows_stride = x_stride(args);
  first->weights_stride = args.gate_stride;
  first->up_stride = args.up_stride;
  first->out_stride = args.intermediate_size;
  first->tokens = args.tokens;
  first->depth = args.hidden_size;
  first->columns = args.intermediate_size;
  first->dtype = args.dtype;
  first->weights_early = false;
  return finish_of(args.activation, &first->finish, &first->slope);
}

// The second product, without what depends on the workspace's size.
inline Operands second_product(const FusedMlpArgs &args) {
  Operands second = {};
  second.rows = args.workspace;
  second.weights = args.down;
  second.bias = args.bias_down;
  second.out = args.out;
  second.rows_stride = args.intermediate_size;
  second.weights_stride = args.down_stride;
  second.out_stride = args.output_size;
  second.tokens = args.tokens;
  second.depth = args.intermediate_size;
  second.columns = args.output_size;
  second.dtype = args.dtype;
  second.finish = Finish::None;
  // The first product waits for all before it, and this one begins only when that has waited.
  second.weights_early = true;
  return second;
}

} // namespace fused_mlp
