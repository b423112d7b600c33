// The products' kernels for sm_80 and newer in f16.
#include "gemm_ampere.cuh"

namespace fused_mlp {

const Variant *gemm_ampere_variants_f16(int *count) { return variants_of<__half>(count); }

} // namespace fused_mlp
