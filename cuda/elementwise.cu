// What an MLP has beside its products: the hidden layer out of the preactivations, its gradients, the output's bias.
// For many tokens, where the products are a library's.
//
// A thread takes 16 bytes of a row at a time where rows lie on 16 bytes, one element elsewhere.
#include "activation.cuh"
#include "element.cuh"
#include "fused_mlp.h"
#include <cuda_runtime.h>

namespace fused_mlp {
namespace {

constexpr int THREADS = 256;
constexpr long long MAX_GRID_ROWS = 65535;

template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T, int N> __device__ __forceinline__ Pack<T, N> load(const void *from, long long at) {
  return *reinterpret_cast<const Pack<T, N> *>(static_cast<const T *>(from) + at);
}
template <typename T, int N> __device__ __forceinline__ void store(void *to, long long at, const Pack<T, N> &pack) {
  *reinterpret_cast<Pack<T, N> *>(static_cast<T *>(to) + at) = pack;
}
template <typename T> __device__ __forceinline__ typename Sum<T>::type bias_of(const void *bias, long long i) {
  return bias ? widen(static_cast<const T *>(bias)[i]) : typename Sum<T>::type(0);
}

template <typename T, int N> __global__ void __launch_bounds__(THREADS) hidden_kernel(const FusedMlpHiddenArgs args) {
  using F = typename Sum<T>::type;
  const long long col = (blockIdx.x * static_cast<long long>(THREADS) + threadIdx.x) * N;
  if (col >= args.cols)
    return;
  const Activation activation = static_cast<Activation>(args.activation);
  for (long long row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const long long at = row * args.cols + col;
    Pack<T, N> out = load<T, N>(args.gate, at), up = out;
    if (args.up)
      up = load<T, N>(args.up, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      F value = activate(activation, F(args.activation_param), widen(out.value[i]) + bias_of<T>(args.bias_gate, col + i));
      if (args.up)
        value *= widen(up.value[i]) + bias_of<T>(args.bias_up, col + i);
      out.value[i] = narrow<T>(value);
    }
    store(args.hidden, at, out);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) hidden_gradients_kernel(const FusedMlpHiddenArgs args) {
  using F = typename Sum<T>::type;
  const long long col = (blockIdx.x * static_cast<long long>(THREADS) + threadIdx.x) * N;
  if (col >= args.cols)
    return;
  const Activation activation = static_cast<Activation>(args.activation);
  const F param = F(args.activation_param);
  for (long long row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const long long at = row * args.cols + col;
    const Pack<T, N> gate = load<T, N>(args.gate, at), gradient = load<T, N>(args.gradient, at);
    Pack<T, N> up = gate, hidden, d_gate, d_up;
    if (args.up)
      up = load<T, N>(args.up, at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const F g = widen(gate.value[i]), d = widen(gradient.value[i]), u = args.up ? widen(up.value[i]) : F(1);
      const F value = activate(activation, param, g);
      hidden.value[i] = narrow<T>(value * u);
      d_gate.value[i] = narrow<T>(d * u * activation_slope(activation, param, g));
      d_up.value[i] = narrow<T>(d * value);
    }
    store(args.hidden, at, hidden);
    store(args.d_gate, at, d_gate);
    if (args.up)
      store(args.d_up, at, d_up);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    add_bias_kernel(void *out, const void *bias, const long long rows, const long long cols) {
  const long long col = (blockIdx.x * static_cast<long long>(THREADS) + threadIdx.x) * N;
  if (col >= cols)
    return;
  for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
    Pack<T, N> pack = load<T, N>(out, row * cols + col);
#pragma unroll
    for (int i = 0; i < N; ++i)
      pack.value[i] = narrow<T>(widen(pack.value[i]) + bias_of<T>(bias, col + i));
    store(out, row * cols + col, pack);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <int N> dim3 grid(long long rows, long long cols) {
  const long long per_block = static_cast<long long>(THREADS) * N;
  return dim3(static_cast<unsigned>((cols + per_block - 1) / per_block),
              static_cast<unsigned>(rows < MAX_GRID_ROWS ? rows : MAX_GRID_ROWS));
}

template <typename... P> bool on_16_bytes(P... pointers) {
  return ((reinterpret_cast<unsigned long long>(pointers) % 16 == 0) && ...);
}

struct HiddenKernel {
  template <typename T, int N> static void launch(const FusedMlpHiddenArgs &args, cudaStream_t stream) {
    hidden_kernel<T, N><<<grid<N>(args.rows, args.cols), THREADS, 0, stream>>>(args);
  }
};
struct HiddenGradientsKernel {
  template <typename T, int N> static void launch(const FusedMlpHiddenArgs &args, cudaStream_t stream) {
    hidden_gradients_kernel<T, N><<<grid<N>(args.rows, args.cols), THREADS, 0, stream>>>(args);
  }
};

template <typename Kernel, typename T> int launch_hidden(const FusedMlpHiddenArgs &args, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  if (args.cols % N == 0 && on_16_bytes(args.gate, args.up, args.gradient, args.hidden, args.d_gate, args.d_up))
    Kernel::template launch<T, N>(args, stream);
  else
    Kernel::template launch<T, 1>(args, stream);
  return cudaGetLastError();
}

template <typename Kernel> int launch_hidden(const FusedMlpHiddenArgs &args, cudaStream_t stream) {
  if (args.activation < 0 || args.activation >= static_cast<int>(Activation::Count) || args.rows < 0 || args.cols < 0)
    return FUSED_MLP_BAD_ARGUMENT;
  if (args.rows == 0 || args.cols == 0)
    return FUSED_MLP_OK;
  if (!stream)
    stream = cudaStreamLegacy;
  switch (args.dtype) {
  case FUSED_MLP_BF16: return launch_hidden<Kernel, __nv_bfloat16>(args, stream);
  case FUSED_MLP_F16: return launch_hidden<Kernel, __half>(args, stream);
  case FUSED_MLP_F32: return launch_hidden<Kernel, float>(args, stream);
  case FUSED_MLP_F64: return launch_hidden<Kernel, double>(args, stream);
  default: return FUSED_MLP_BAD_ARGUMENT;
  }
}

template <typename T>
int launch_add_bias(void *out, const void *bias, long long rows, long long cols, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  if (cols % N == 0 && on_16_bytes(out))
    add_bias_kernel<T, N><<<grid<N>(rows, cols), THREADS, 0, stream>>>(out, bias, rows, cols);
  else
    add_bias_kernel<T, 1><<<grid<1>(rows, cols), THREADS, 0, stream>>>(out, bias, rows, cols);
  return cudaGetLastError();
}

} // namespace
} // namespace fused_mlp

extern "C" int fused_mlp_hidden(const FusedMlpHiddenArgs *args, cudaStream_t stream) {
  return fused_mlp::launch_hidden<fused_mlp::HiddenKernel>(*args, stream);
}

extern "C" int fused_mlp_hidden_gradients(const FusedMlpHiddenArgs *args, cudaStream_t stream) {
  return fused_mlp::launch_hidden<fused_mlp::HiddenGradientsKernel>(*args, stream);
}

extern "C" int fused_mlp_add_bias(void *out, const void *bias, int64_t rows, int64_t cols, int32_t dtype,
                                  cudaStream_t stream) {
  using namespace fused_mlp;
  if (rows < 0 || cols < 0)
    return FUSED_MLP_BAD_ARGUMENT;
  if (rows == 0 || cols == 0)
    return FUSED_MLP_OK;
  if (!stream)
    stream = cudaStreamLegacy;
  switch (dtype) {
  case FUSED_MLP_BF16: return launch_add_bias<__nv_bfloat16>(out, bias, rows, cols, stream);
  case FUSED_MLP_F16: return launch_add_bias<__half>(out, bias, rows, cols, stream);
  case FUSED_MLP_F32: return launch_add_bias<float>(out, bias, rows, cols, stream);
  case FUSED_MLP_F64: return launch_add_bias<double>(out, bias, rows, cols, stream);
  default: return FUSED_MLP_BAD_ARGUMENT;
  }
}
