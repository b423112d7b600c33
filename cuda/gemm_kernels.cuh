// What the choosers (gemm.cu, gemm_ampere.cu) know of the products' kernels.
#pragma once
#include "activation.cuh"
#include "fused_mlp.h"
#include <cuda_runtime.h>

namespace fused_mlp {

// What happens to a sum before it is rounded.
enum class Finish { None, Swish, Gelu, GeluTanh, Relu };

// The finish of an activation, if it is one of those.
inline bool finish_of(int activation, Finish *finish, float *slope) {
  *slope = static_cast<Activation>(activation) == Activation::QuickGelu ? float(QUICK_GELU_SLOPE) : 1.f;
  switch (static_cast<Activation>(activation)) {
  case Activation::Silu:
  case Activation::QuickGelu: *finish = Finish::Swish; return true;
  case Activation::Gelu: *finish = Finish::Gelu; return true;
  case Activation::GeluTanh: *finish = Finish::GeluTanh; return true;
  case Activation::Relu: *finish = Finish::Relu; return true;
  default: return false;
  }
}

constexpr int MEETINGS = 1024; // flags at which the clusters of a tile meet

// One product: out = finish(rows weights^T + bias), or of a gated tile finish(...) * (rows up^T + bias_up).
struct Operands {
  const void *rows, *weights, *up, *bias, *bias_up; // biases may be null
  void *out;
  void *meeting; // `meeting_bytes` of memory that begin with MEETINGS flags at 0, for tiles of two clusters; or null
  void *clear;   // the flags of the next product, or null
  long long rows_stride, weights_stride, up_stride, out_stride; // elements
  int tokens, depth, columns;                                   // of the output; the weights have `columns` rows
  int dtype;
  Finish finish;
  float slope;        // of Swish: v / (1 + exp(-slope v))
  bool weights_early; // the kernel before does not write the weights, and ran after all that may
};

// One shape of tiles, as in gemm_hopper.cuh and gemm_ampere.cuh.
struct Variant {
  bool gated, pingpong;
  int rows, weights, columns; // of a tile: tokens, rows of weights, columns of the output
  int share, peers, split, links;
  int (*resident)(int *blocks); // that the device runs at once, in whole clusters
  int (*enqueue)(const Operands &operands, cudaStream_t stream);
  bool turned = false; // tokens are the products' columns
};

// All of a dtype.
const Variant *gemm_variants_bf16(int *count);
const Variant *gemm_variants_f16(int *count);
const Variant *gemm_variants_f32(int *count);
// The architecture that the kernels' code for the current device was compiled for, and the one that it runs as.
int gemm_compiled_for(int *source, int *binary);

} // namespace fused_mlp
