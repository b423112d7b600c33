// Elements and what they are summed in: f32 for bf16, f16 and f32, f64 for f64.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fused_mlp {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <typename T> struct Sum {
  using type = float;
};
template <> struct Sum<double> {
  using type = double;
};

template <typename T> __device__ __forceinline__ typename Sum<T>::type widen(T v) { return to_float(v); }
template <> __device__ __forceinline__ double widen<double>(double v) { return v; }
template <typename T> __device__ __forceinline__ T narrow(typename Sum<T>::type v) { return from_float<T>(v); }
template <> __device__ __forceinline__ double narrow<double>(double v) { return v; }

} // namespace fused_mlp
