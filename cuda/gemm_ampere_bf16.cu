// The products' kernels for sm_80 and newer in bf16: a file of its own, so that both compile at once.
#include "gemm_ampere.cuh"

namespace fused_mlp {

const Variant *gemm_ampere_variants_bf16(int *count) { return variants_of<__nv_bfloat16>(count); }

int gemm_ampere_compiled_for(int *source) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, product_kernel<Large<__nv_bfloat16, false>>);
  *source = attributes.ptxVersion;
  return error;
}

} // namespace fused_mlp
