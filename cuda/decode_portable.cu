// The whole MLP for 1 to 64 tokens in one launch, for whatever the streaming kernel does not take: any alignment and
// stride, f64, GPUs before sm_80. Correct first, but still one warp per row with coalesced loads.
//
// Work is handed out by a ticket: first all groups of hidden units, then all groups of output rows. A block that holds
// a down ticket waits for the hidden units only, whose tickets were all taken by blocks that run and that wait for
// nothing: no deadlock, however few blocks are resident.
//
// A lane sums every 32nd element, then lanes are added as a tree: the same order for any number of tokens.
#include "decode_kernels.cuh"

namespace fused_mlp {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int TOKENS_AT_ONCE = 8;

template <typename T>
__device__ __forceinline__ typename Sum<T>::type bias_of(const void *bias, int i) {
  return bias ? widen(static_cast<const T *>(bias)[i]) : typename Sum<T>::type(0);
}

// Products of one weight row with up to TOKENS_AT_ONCE token rows; every lane gets the sums. Rows are read past L1,
// since the hidden rows were written by other blocks of this launch.
template <typename T>
__device__ __forceinline__ void row_products(const T *weights, const T *rows, long long stride, int tokens, int inner,
                                             typename Sum<T>::type (&sum)[TOKENS_AT_ONCE]) {
  using F = typename Sum<T>::type;
  F running[TOKENS_AT_ONCE];
#pragma unroll
  for (int t = 0; t < TOKENS_AT_ONCE; ++t)
    running[t] = sum[t] = F(0);
  int steps = 0;
  for (int k = threadIdx.x & 31; k < inner; k += 32) {
    const F w = widen(weights[k]);
#pragma unroll
    for (int t = 0; t < TOKENS_AT_ONCE; ++t)
      if (t < tokens)
        running[t] += w * widen(__ldcg(rows + t * stride + k));
    // Sixteen at a time, so that the error of a long row stays near that of a pairwise sum.
    if ((++steps & 15) == 0)
#pragma unroll
      for (int t = 0; t < TOKENS_AT_ONCE; ++t) {
        sum[t] += running[t];
        running[t] = F(0);
      }
  }
#pragma unroll
  for (int t = 0; t < TOKENS_AT_ONCE; ++t) {
    sum[t] += running[t];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1)
      sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], lanes);
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    decode_portable_kernel(const Shape shape, const int units_per_ticket, const int rows_per_ticket) {
  using F = typename Sum<T>::type;
  __shared__ unsigned next;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const unsigned first_tickets = (shape.intermediate_size + units_per_ticket - 1) / units_per_ticket;
  const unsigned second_tickets = (shape.output_size + rows_per_ticket - 1) / rows_per_ticket;
  const F param = F(shape.activation_param);
  bool hidden_complete = false;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0)
      next = atomicAdd(&shape.counters->ticket, 1u);
    __syncthreads();
    const unsigned ticket = next;
    if (ticket >= first_tickets + second_tickets)
      break;
    if (ticket < first_tickets) {
      const int begin = ticket * units_per_ticket, end = min(begin + units_per_ticket, shape.intermediate_size);
      for (int unit = begin + warp; unit < end; unit += WARPS)
        for (int token = 0; token < shape.tokens; token += TOKENS_AT_ONCE) {
          const int tokens = min(TOKENS_AT_ONCE, shape.tokens - token);
          const T *x = static_cast<const T *>(shape.x) + token * shape.x_stride;
          F gate[TOKENS_AT_ONCE], up[TOKENS_AT_ONCE];
          row_products(static_cast<const T *>(shape.gate) + unit * shape.gate_stride, x, shape.x_stride, tokens,
                       shape.hidden_size, gate);
          if (shape.gated)
            row_products(static_cast<const T *>(shape.up) + unit * shape.up_stride, x, shape.x_stride, tokens,
                         shape.hidden_size, up);
#pragma unroll
          for (int t = 0; t < TOKENS_AT_ONCE; ++t)
            if (t < tokens && lane == t) {
              F value = activate(shape.activation, param, gate[t] + bias_of<T>(shape.bias_gate, unit));
              if (shape.gated)
                value *= up[t] + bias_of<T>(shape.bias_up, unit);
              static_cast<T *>(shape.hidden)[(token + t) * shape.hidden_stride + unit] = narrow<T>(value);
            }
        }
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&shape.counters->arrived, 1u);
      }
      continue;
    }
    if (!hidden_complete) {
      if (threadIdx.x == 0)
        while (load_acquire(&shape.counters->arrived) < first_tickets) {
        }
      __syncthreads();
      hidden_complete = true;
    }
    const int begin = (ticket - first_tickets) * rows_per_ticket, end = min(begin + rows_per_ticket, shape.output_size);
    for (int row = begin + warp; row < end; row += WARPS)
      for (int token = 0; token < shape.tokens; token += TOKENS_AT_ONCE) {
        const int tokens = min(TOKENS_AT_ONCE, shape.tokens - token);
        F sum[TOKENS_AT_ONCE];
        row_products(static_cast<const T *>(shape.down) + row * shape.down_stride,
                     static_cast<const T *>(shape.hidden) + token * shape.hidden_stride, shape.hidden_stride, tokens,
                     shape.intermediate_size, sum);
#pragma unroll
        for (int t = 0; t < TOKENS_AT_ONCE; ++t)
          if (t < tokens && lane == t)
            static_cast<T *>(shape.out)[static_cast<long long>(token + t) * shape.output_size + row] =
                narrow<T>(sum[t] + bias_of<T>(shape.bias_down, row));
      }
  }
  // The last block to find no ticket is the last to need the counters.
  if (threadIdx.x == 0 && atomicInc(&shape.counters->passed, gridDim.x - 1) == gridDim.x - 1) {
    shape.counters->ticket = 0u;
    shape.counters->arrived = 0u;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Rows of one ticket; never none, also of a layer that has none.
int share(int total, int blocks) {
  const int part = total > 0 ? (total + blocks - 1) / blocks : 1;
  return (part + WARPS - 1) / WARPS * WARPS;
}

template <typename T> int launch(const Shape &shape, int blocks, cudaStream_t stream) {
  // Four tickets a block and layer, in whole rounds of its warps.
  decode_portable_kernel<T><<<blocks, THREADS, 0, stream>>>(shape, share(shape.intermediate_size, 4 * blocks),
                                                            share(shape.output_size, 4 * blocks));
  return cudaGetLastError();
}

} // namespace

int launch_decode_portable(const Shape &shape, int dtype, const DeviceFacts &device, cudaStream_t stream) {
  const int blocks = device.multiprocessors * 4;
  switch (dtype) {
  case FUSED_MLP_BF16: return launch<__nv_bfloat16>(shape, blocks, stream);
  case FUSED_MLP_F16: return launch<__half>(shape, blocks, stream);
  case FUSED_MLP_F32: return launch<float>(shape, blocks, stream);
  default: return launch<double>(shape, blocks, stream);
  }
}

} // namespace fused_mlp
