// The whole MLP of a model so small that one cluster of blocks holds it: hidden rows go from block to block through shared
// memory, so that nothing is waited for but the cluster's own barriers (0.2 us), where kernels of the whole GPU meet in memory.
// From sm_90 on, any dtype, alignment and stride.
//
// A cluster computes up to TOKENS tokens from all weights; more tokens are more clusters, which need nothing of each other.
// A warp takes a row of weights: a lane sums every 32nd product in order, then lanes are added as a tree, the same order for
// any number of tokens.
#include "decode_kernels.cuh"

namespace fused_mlp {
namespace {

constexpr int BLOCKS = 8; // of a cluster: as many as every GPU with clusters takes
constexpr int WARPS = 32;
constexpr int THREADS = 32 * WARPS;
constexpr int TOKENS = 4; // a warp's lanes hand TOKENS values to BLOCKS blocks at once
static_assert(TOKENS * BLOCKS == 32, "a lane for each token and block");

// What x and the hidden rows may take of shared memory without asking for more than every kernel has.
constexpr int SHARED_BYTES = 48 * 1024;
// Elements of all weights up to which this kernel is the faster one (PERFORMANCE.md).
constexpr long long MOST_WEIGHTS = 1 << 17;

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Stores to the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ void store_at(unsigned address, int block, float v) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(v) : "memory");
}
__device__ __forceinline__ void store_at(unsigned address, int block, double v) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(v) : "memory");
}

// Asks for a row of weights as far as L2, 128 bytes a lane.
template <typename T> __device__ __forceinline__ void ask_for(const T *row, int inner, int lane) {
  const char *bytes = reinterpret_cast<const char *>(row);
  for (long long at = 128ll * lane; at < static_cast<long long>(inner) * static_cast<int>(sizeof(T)); at += 128 * 32)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + at));
}

// Adds the lanes' sums; every lane gets the total.
template <typename F> __device__ __forceinline__ F total_of(F sum) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes >>= 1)
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

// What the tokens of a cluster have at one place of their rows.
template <typename F, int N> struct alignas(sizeof(F) * N < 16 ? sizeof(F) * N : 16) Places {
  F of[N];
};

// The products of a row of weights with each token's row.
template <int N, typename T, typename F>
__device__ __forceinline__ void row_products(const T *weights, const Places<F, N> *inputs, int inner, int lane,
                                             F (&sum)[N]) {
#pragma unroll
  for (int t = 0; t < N; ++t)
    sum[t] = F(0);
#pragma unroll 4
  for (int k = lane; k < inner; k += 32) {
    const F w = widen(weights[k]);
    const Places<F, N> input = inputs[k];
#pragma unroll
    for (int t = 0; t < N; ++t)
      sum[t] += w * input.of[t];
  }
#pragma unroll
  for (int t = 0; t < N; ++t)
    sum[t] = total_of(sum[t]);
}

// A lane's token among sums that every lane has.
template <int N, typename F> __device__ __forceinline__ F of_token(const F (&sum)[N], int token) {
  F value = sum[0];
#pragma unroll
  for (int t = 1; t < N; ++t)
    if (t == token)
      value = sum[t];
  return value;
}

template <typename T> __device__ __forceinline__ typename Sum<T>::type bias_of(const void *bias, int i) {
  return bias ? widen(static_cast<const T *>(bias)[i]) : typename Sum<T>::type(0);
}

#define CLUSTER_OF_BLOCKS __cluster_dims__(BLOCKS, 1, 1)
#else
#define CLUSTER_OF_BLOCKS
#endif

// Clusters of `N` tokens each.
template <typename T, int N>
__global__ void __launch_bounds__(THREADS) CLUSTER_OF_BLOCKS decode_cluster_kernel(const Shape shape) {
#if __CUDA_ARCH__ >= 900
  using F = typename Sum<T>::type;
  extern __shared__ uint4 rows[];
  auto *const x = reinterpret_cast<Places<F, N> *>(rows), *const hidden = x + shape.hidden_size;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int first_token = blockIdx.x / BLOCKS * N, tokens = min(N, shape.tokens - first_token);
  // The rows of a warp, the same in both layers.
  const int first_row = blockIdx.x % BLOCKS * WARPS + warp;
  constexpr int STEP = BLOCKS * WARPS;
  const T *const gate = static_cast<const T *>(shape.gate), *const up = static_cast<const T *>(shape.up),
                *const down = static_cast<const T *>(shape.down);

  // Tells the other blocks that this one's shared memory is there to be written to.
  cluster_arrive();
  release_next_kernel();
  for (int unit = first_row; unit < shape.intermediate_size; unit += STEP) {
    ask_for(gate + unit * shape.gate_stride, shape.hidden_size, lane);
    if (shape.gated)
      ask_for(up + unit * shape.up_stride, shape.hidden_size, lane);
  }
  for (int row = first_row; row < shape.output_size; row += STEP)
    ask_for(down + row * shape.down_stride, shape.intermediate_size, lane);
  wait_for_previous_kernel();

#pragma unroll
  for (int t = 0; t < N; ++t)
    for (int k = threadIdx.x; k < shape.hidden_size; k += THREADS)
      x[k].of[t] = t < tokens ? widen(static_cast<const T *>(shape.x)[(first_token + t) * shape.x_stride + k]) : F(0);
  __syncthreads();
  cluster_wait();

  const unsigned hidden_at = shared_address(hidden);
  for (int unit = first_row; unit < shape.intermediate_size; unit += STEP) {
    F sum[N], sum_up[N];
    row_products(gate + unit * shape.gate_stride, x, shape.hidden_size, lane, sum);
    if (shape.gated)
      row_products(up + unit * shape.up_stride, x, shape.hidden_size, lane, sum_up);
    const int token = lane / BLOCKS, block = lane % BLOCKS;
    F value = activate(shape.activation, F(shape.activation_param), of_token(sum, token) + bias_of<T>(shape.bias_gate, unit));
    if (shape.gated)
      value *= of_token(sum_up, token) + bias_of<T>(shape.bias_up, unit);
    const unsigned place = unit * N + token;
    if (token < N)
      store_at(hidden_at + place * static_cast<unsigned>(sizeof(F)), block, widen(narrow<T>(value)));
  }
  cluster_arrive();
  cluster_wait();

  for (int row = first_row; row < shape.output_size; row += STEP) {
    F sum[N];
    row_products(down + row * shape.down_stride, hidden, shape.intermediate_size, lane, sum);
    if (lane < tokens)
      static_cast<T *>(shape.out)[static_cast<long long>(first_token + lane) * shape.output_size + row] =
          narrow<T>(of_token(sum, lane) + bias_of<T>(shape.bias_down, row));
  }
#endif
}

long long shared_bytes(int tokens, long long hidden_size, long long intermediate_size, int dtype) {
  return tokens * (hidden_size + intermediate_size) * (dtype == FUSED_MLP_F64 ? 8 : 4);
}

template <typename T> int launch(const Shape &shape, int dtype, cudaStream_t stream) {
  const bool one = shape.tokens == 1;
  const int clusters = (shape.tokens + TOKENS - 1) / TOKENS;
  const long long bytes = shared_bytes(one ? 1 : TOKENS, shape.hidden_size, shape.intermediate_size, dtype);
  return launch_kernel(one ? decode_cluster_kernel<T, 1> : decode_cluster_kernel<T, TOKENS>,
                       {BLOCKS * clusters, THREADS, static_cast<int>(bytes), true}, stream, shape);
}

} // namespace

bool can_decode_cluster(const DeviceFacts &device, const FusedMlpArgs &args) {
  if (device.compute_capability < 90 ||
      shared_bytes(TOKENS, args.hidden_size, args.intermediate_size, args.dtype) > SHARED_BYTES)
    return false;
  const long long rows = args.gated ? 2ll * args.intermediate_size : args.intermediate_size;
  return rows * args.hidden_size + 1ll * args.output_size * args.intermediate_size <= MOST_WEIGHTS;
}

int launch_decode_cluster(const Shape &shape, int dtype, cudaStream_t stream) {
  switch (dtype) {
  case FUSED_MLP_BF16: return launch<__nv_bfloat16>(shape, dtype, stream);
  case FUSED_MLP_F16: return launch<__half>(shape, dtype, stream);
  case FUSED_MLP_F32: return launch<float>(shape, dtype, stream);
  default: return launch<double>(shape, dtype, stream);
  }
}

} // namespace fused_mlp
