// What gemm.cu and the chooser (gemm_ampere.cu) know of the products' kernels for sm_80 and newer.
#pragma once
#include "gemm_kernels.cuh"

namespace fused_mlp {

// All of a dtype.
const Variant *gemm_ampere_variants_bf16(int *count);
const Variant *gemm_ampere_variants_f16(int *count);
// The architecture that the kernels' code for the current device was compiled for.
int gemm_ampere_compiled_for(int *source);

// The family of FUSED_MLP_PATH_GEMM_AMPERE, as gemm.cu has it.
int gemm_ampere_takes(const FusedMlpArgs &args, bool *takes_it);
int gemm_ampere_choose(const Operands &o, bool gated, const Variant **best);
unsigned long long gemm_ampere_meeting_bytes(const Variant &tiles, const Operands &o);

} // namespace fused_mlp
