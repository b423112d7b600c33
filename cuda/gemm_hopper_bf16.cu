// The products' kernels in bf16: a file of its own, so that both compile at once.
#include "gemm_hopper.cuh"

namespace fused_mlp {

const Variant *gemm_variants_bf16(int *count) { return variants_of<__nv_bfloat16>(count); }

int gemm_compiled_for(int *source, int *binary) {
  return compiled_for<Tile<__nv_bfloat16, false, 128, 128, false, 2, 1, 1>>(source, binary);
}

} // namespace fused_mlp
