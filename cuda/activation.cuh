// Activations on the device and their derivatives, in f32 and f64: the formulas of src/activation.rs.
#pragma once

namespace fused_mlp {

// In the order of src/activation.rs, which names them by number. A parameter is in parentheses.
enum class Activation : int {
  Gelu, // by the error function
  GeluTanh,
  QuickGelu,
  Relu,
  Relu2,
  Relu6,
  Silu,
  Sigmoid,
  HardSigmoid,
  HardSwish,
  Mish,
  Elu,       // (alpha)
  LeakyRelu, // (slope)
  Count,
};

__device__ __forceinline__ float exp_of(float v) { return expf(v); }
__device__ __forceinline__ double exp_of(double v) { return exp(v); }
__device__ __forceinline__ float expm1_of(float v) { return expm1f(v); }
__device__ __forceinline__ double expm1_of(double v) { return expm1(v); }
__device__ __forceinline__ float erfc_of(float v) { return erfcf(v); }
__device__ __forceinline__ double erfc_of(double v) { return erfc(v); }

// Comparisons are written so that NaN falls through to a value that is NaN, but for the ReLUs, where candle has 0.
template <typename F> __device__ __forceinline__ F clamp_of(F v, F low, F high) {
  return v < low ? low : (v > high ? high : v);
}
template <typename F> __device__ __forceinline__ F relu_of(F v) { return v > F(0) ? v : F(0); }
template <typename F> __device__ __forceinline__ F sigmoid_of(F v) { return F(1) / (F(1) + exp_of(-v)); }
template <typename F> __device__ __forceinline__ F hard_sigmoid_of(F v) {
  return clamp_of((v + F(3)) / F(6), F(0), F(1));
}
template <typename F> __device__ __forceinline__ F hard_sigmoid_slope_of(F v) {
  return v > F(-3) && v < F(3) ? F(1) / F(6) : F(0);
}

// The normal distribution function; both tails keep their relative accuracy.
template <typename F> __device__ __forceinline__ F normal_cdf_of(F v) {
  return F(0.5) * erfc_of(v * F(-0.70710678118654752440));
}
template <typename F> __device__ __forceinline__ F normal_density_of(F v) {
  return F(0.39894228040143267794) * exp_of(F(-0.5) * v * v);
}

// 2 sqrt(2 / pi) (v + 0.044715 v^3): twice the argument of GELU's tanh, since (1 + tanh(u)) / 2 = sigmoid(2 u).
template <typename F> __device__ __forceinline__ F gelu_tanh_argument(F v) {
  return v * F(1.5957691216057307) * (F(1) + v * v * F(0.044715));
}
template <typename F> __device__ __forceinline__ F gelu_tanh_argument_slope(F v) {
  return F(1.5957691216057307) * (F(1) + v * v * F(3 * 0.044715));
}

// CLIP's GELU is v sigmoid(1.702 v).
constexpr double QUICK_GELU_SLOPE = 1.702;

// tanh(log(1 + e^v)) = n / (n + 2) with n = e^v (e^v + 2); 1 to the last bit from 20 on.
template <typename F> __device__ __forceinline__ F tanh_softplus_of(F v) {
  const F e = exp_of(v > F(20) ? F(20) : v), n = e * (e + F(2));
  return n / (n + F(2));
}

// Called once per hidden element, after the products: the switch is outside every inner loop.
template <typename F> __device__ __forceinline__ F activate(Activation activation, F param, F v) {
  switch (activation) {
  case Activation::Gelu:
    return v * normal_cdf_of(v);
  case Activation::GeluTanh:
    return v * sigmoid_of(gelu_tanh_argument(v));
  case Activation::QuickGelu:
    return v * sigmoid_of(v * F(QUICK_GELU_SLOPE));
  case Activation::Relu:
    return relu_of(v);
  case Activation::Relu2:
    return relu_of(v) * relu_of(v);
  case Activation::Relu6:
    return clamp_of(v, F(0), F(6));
  case Activation::Silu:
    return v / (F(1) + exp_of(-v));
  case Activation::Sigmoid:
    return sigmoid_of(v);
  case Activation::HardSigmoid:
    return hard_sigmoid_of(v);
  case Activation::HardSwish:
    return v * hard_sigmoid_of(v);
  case Activation::Mish:
    return v * tanh_softplus_of(v);
  case Activation::Elu:
    return v > F(0) ? v : param * expm1_of(v);
  case Activation::LeakyRelu:
    return v > F(0) ? v : param * v;
  default:
    return v; // the launchers refuse numbers that are not in the enum
  }
}

// v / d, rounded to nearest, for d of 1 or more. The operator has a branch in each division, for the extreme exponents, and one
// division waits for the other; these are its steps where no exponent is extreme, and one branch for all.
template <int N> __device__ __forceinline__ void divide_all(float (&v)[N], const float (&d)[N]) {
  constexpr float LARGE = 1ull << 60, SMALL = 1.f / LARGE; // no quotient within is extreme
  float quotient[N], largest = 0.f, largest_divisor = 0.f;
  unsigned smallest = ~0u; // of twice the bits less 1: 0, which many a hidden element is, comes last
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d[i]));
    r = fmaf(r, fmaf(-d[i], r, 1.f), r);
    float q = v[i] * r;
    q = fmaf(r, fmaf(-d[i], q, v[i]), q);
    quotient[i] = fmaf(r, fmaf(-d[i], q, v[i]), q);
    largest = fmaxf(largest, fabsf(v[i]));
    smallest = min(smallest, 2 * __float_as_uint(v[i]) - 1);
    largest_divisor = fmaxf(largest_divisor, d[i]);
  }
  if (largest > LARGE || smallest < 2 * __float_as_uint(SMALL) - 1 || largest_divisor > LARGE) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] = v[i] / d[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    v[i] = quotient[i];
}

// `activate` of several values, whose latencies pass together.
template <int A = 0, int N>
__device__ __forceinline__ void activate_all(Activation activation, float param, float (&v)[N]) {
  if constexpr (A + 1 < int(Activation::Count))
    if (int(activation) != A)
      return activate_all<A + 1>(activation, param, v);
  constexpr Activation ACTIVATION = Activation(A);
  if constexpr (ACTIVATION == Activation::Silu) {
    float divisors[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      divisors[i] = 1.f + exp_of(-v[i]);
    divide_all(v, divisors);
  } else if constexpr (ACTIVATION == Activation::GeluTanh || ACTIVATION == Activation::QuickGelu) {
    float sigmoids[N], divisors[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float of = ACTIVATION == Activation::GeluTanh ? gelu_tanh_argument(v[i]) : v[i] * float(QUICK_GELU_SLOPE);
      divisors[i] = 1.f + exp_of(-of);
      sigmoids[i] = 1.f;
    }
    divide_all(sigmoids, divisors);
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] *= sigmoids[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] = activate(ACTIVATION, param, v[i]);
  }
}

// The derivative of `activate` at v.
template <typename F> __device__ __forceinline__ F activation_slope(Activation activation, F param, F v) {
  switch (activation) {
  case Activation::Gelu:
    return normal_cdf_of(v) + v * normal_density_of(v);
  case Activation::GeluTanh: {
    const F s = sigmoid_of(gelu_tanh_argument(v));
    return s + v * s * (F(1) - s) * gelu_tanh_argument_slope(v);
  }
  case Activation::QuickGelu: {
    const F s = sigmoid_of(v * F(QUICK_GELU_SLOPE));
    return s + v * s * (F(1) - s) * F(QUICK_GELU_SLOPE);
  }
  case Activation::Relu:
    return v >= F(0) ? F(1) : F(0);
  case Activation::Relu2:
    return F(2) * relu_of(v);
  case Activation::Relu6:
    return v > F(0) && v < F(6) ? F(1) : F(0);
  case Activation::Silu: {
    const F s = sigmoid_of(v);
    return s + v * s * (F(1) - s);
  }
  case Activation::Sigmoid: {
    const F s = sigmoid_of(v);
    return s * (F(1) - s);
  }
  case Activation::HardSigmoid:
    return hard_sigmoid_slope_of(v);
  case Activation::HardSwish:
    return hard_sigmoid_of(v) + v * hard_sigmoid_slope_of(v);
  case Activation::Mish: {
    const F t = tanh_softplus_of(v);
    return t + v * (F(1) - t * t) * sigmoid_of(v);
  }
  case Activation::Elu:
    return v > F(0) ? F(1) : param * exp_of(v);
  case Activation::LeakyRelu:
    return v > F(0) ? F(1) : param;
  default:
    return F(1);
  }
}

} // namespace fused_mlp
