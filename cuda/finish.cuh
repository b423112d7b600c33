// What the products' kernels for many tokens do to a sum before they write it, in registers: activation, rounding.
#pragma once
#include "activation.cuh"
#include "element.cuh"
#include "gemm_kernels.cuh"
#include <type_traits>

namespace fused_mlp {

__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float exp2_of(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// The activations of activation.cuh in few instructions, by the fast exponential and reciprocal (some 3 units in the
// last place of f32): between a tile's products and the next's there is nothing to hide them behind.
template <Finish FINISH> __device__ __forceinline__ float finished(float v, float slope) {
  constexpr float LOG2_E = 1.4426950408889634f;
  if constexpr (FINISH == Finish::Swish)
    return v * reciprocal(1.f + exp2_of(slope * -LOG2_E * v));
  if constexpr (FINISH == Finish::GeluTanh)
    return v * reciprocal(1.f + exp2_of(-LOG2_E * gelu_tanh_argument(v)));
  if constexpr (FINISH == Finish::Gelu) {
    // v at 0 or above is v (1 - tail), v below is v tail, with the normal distribution's tail erfc(|v| / sqrt 2) / 2,
    // which is t (a1 + t (a2 + ...)) exp(-v^2 / 2) with t = 1 / (1 + p |v|) within 1e-7: Abramowitz and Stegun 7.1.26.
    const float t = reciprocal(fmaf(fabsf(v), 0.231641888f, 1.f)), scaled = v * 0.849321800f;
    float tail = fmaf(t, 0.530702715f, -0.726576013f);
    tail = fmaf(t, tail, 0.710706871f);
    tail = fmaf(t, tail, -0.142248368f);
    tail = fmaf(t, tail, 0.127414796f) * t * exp2_of(-scaled * scaled);
    return v * (v < 0.f ? tail : 1.f - tail);
  }
  if constexpr (FINISH == Finish::Relu)
    return relu_of(v);
  return v;
}

// Calls `write` with the finish as a constant: the choice is made once a tile. By comparisons, since the table that a switch would
// jump by comes from memory in every launch.
template <bool GATED, typename Write> __device__ __forceinline__ void with_finish(Finish finish, Write write) {
  if (finish < Finish::Swish) {
    if (!GATED)
      write(std::integral_constant<Finish, Finish::None>());
  } else if (finish < Finish::Gelu) {
    write(std::integral_constant<Finish, Finish::Swish>());
  } else if (finish < Finish::GeluTanh) {
    write(std::integral_constant<Finish, Finish::Gelu>());
  } else if (finish < Finish::Relu) {
    write(std::integral_constant<Finish, Finish::GeluTanh>());
  } else {
    write(std::integral_constant<Finish, Finish::Relu>());
  }
}

__device__ __forceinline__ unsigned pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned *>(&v);
}
__device__ __forceinline__ unsigned pack(__half, float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned *>(&v);
}

__device__ __forceinline__ float2 unpack(__nv_bfloat16, unsigned v) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&v));
}
__device__ __forceinline__ float2 unpack(__half, unsigned v) {
  return __half22float2(*reinterpret_cast<const __half2 *>(&v));
}

} // namespace fused_mlp
