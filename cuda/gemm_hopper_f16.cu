// The products' kernels in f16.
#include "gemm_hopper.cuh"

namespace fused_mlp {

const Variant *gemm_variants_f16(int *count) { return variants_of<__half>(count); }

} // namespace fused_mlp
