// What gemm.cu and the chooser (gemm_ampere.cu) know of the products' kernels for sm_80 and newer.
#pragma once
#include "gemm_kernels.cuh"

namespace fused_mlp {

// All of a dtype.
const Variant *gemm_ampere_variants_bf16(int *count);
const Variant *gemm_ampere_variants_f16(int *count);
// The architecture that the kernels' code for the current device was compiled for.
int gemm_ampere_compiled_for(int *source);

// What fused_mlp_gemm_takes, fused_mlp_gemm_workspace_bytes and fused_mlp_gemm answer and do on FUSED_MLP_PATH_GEMM_AMPERE.
// The workspace and the output have been checked.
int gemm_ampere_takes(const FusedMlpArgs &args, int *answer);
int gemm_ampere_workspace_bytes(const FusedMlpArgs &args, uint64_t *bytes);
int gemm_ampere(const FusedMlpArgs &args, cudaStream_t stream);

} // namespace fused_mlp
