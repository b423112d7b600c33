// The kernels' C interface. Nothing here synchronises, copies or clears; every launch is on the stream given, and a null
// stream is the legacy default stream. Functions that return int return 0, a FusedMlpStatus or a cudaError_t.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Element types of x, weights, biases and output (all of one type).
enum FusedMlpDtype {
  FUSED_MLP_BF16 = 0,
  FUSED_MLP_F16 = 1,
  FUSED_MLP_F32 = 2,
  FUSED_MLP_F64 = 3,
};

// Which kernel family runs. AUTO picks; the others exist so that tests reach a path on any GPU.
enum FusedMlpPath {
  FUSED_MLP_PATH_AUTO = 0,
  FUSED_MLP_PATH_PORTABLE = 1,  // any alignment, any type, sm_75 up
  FUSED_MLP_PATH_DIRECT = 2,    // as sm_80 runs it: no programmatic dependent launch
  FUSED_MLP_PATH_DIRECT_PDL = 3, // as sm_90 runs it
  FUSED_MLP_PATH_HOPPER = 4,     // sm_90a, bf16, f16 and f32: tensor copies and tensor cores
  FUSED_MLP_PATH_RESIDENT = 5,   // bf16 and f16: few tokens of small models, whose weights fit in shared memory at once
  FUSED_MLP_PATH_CLUSTER = 6,    // sm_90 up, any alignment, any type: models so small that one cluster of blocks is enough
  FUSED_MLP_PATH_GEMM_AMPERE = 7, // of fused_mlp_gemm alone: bf16 and f16, as sm_80 to sm_89 run it; AUTO there is for sm_90a
  FUSED_MLP_PATH_WIDE = 8        // bf16 and f16: some dozens of tokens as the rows of a product
};

// Own status codes are negative; a positive status is a cudaError_t.
enum FusedMlpStatus {
  FUSED_MLP_OK = 0,
  FUSED_MLP_BAD_ARGUMENT = -1,
  FUSED_MLP_WORKSPACE_TOO_SMALL = -2,
  FUSED_MLP_UNSUPPORTED = -3, // the path asked for cannot take these pointers, strides, type or GPU
};

// out[t] = down * hidden[t] + bias_down, with
//   gated:     hidden[t] = act(gate * x[t] + bias_gate) * (up * x[t] + bias_up)
//   not gated: hidden[t] = act(gate * x[t] + bias_gate)
// Weights are row-major (out features, in features). A packed gate-up tensor is two pointers into one allocation.
typedef struct FusedMlpArgs {
  const void *x;         // tokens rows of hidden_size
  const void *gate;      // intermediate_size rows of hidden_size
  const void *up;        // the same; ignored unless gated
  const void *down;      // output_size rows of intermediate_size
  const void *bias_gate; // intermediate_size, or null
  const void *bias_up;   // intermediate_size, or null
  const void *bias_down; // output_size, or null
  void *out;             // tokens rows of output_size, contiguous
  void *workspace;       // zeroed once when allocated; one per device and stream
  uint64_t workspace_bytes;
  int64_t x_stride; // strides between rows, in elements
  int64_t gate_stride;
  int64_t up_stride;
  int64_t down_stride;
  int32_t tokens;
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t output_size;
  int32_t dtype;      // FusedMlpDtype
  int32_t gated;      // 0 or 1
  int32_t activation; // Activation in activation.cuh
  int32_t path; // FusedMlpPath
  double activation_param;
} FusedMlpArgs;

// Bytes of workspace that a call with these sizes needs, whatever the token count.
uint64_t fused_mlp_decode_workspace_bytes(const FusedMlpArgs *args);

// The path that AUTO takes for these arguments on the current device. Workspace and out are not looked at.
int fused_mlp_decode_path(const FusedMlpArgs *args, int *path);

// Enqueues the MLP; 1 to 64 tokens are one kernel launch, more are one per 64.
int fused_mlp_decode(const FusedMlpArgs *args, cudaStream_t stream);

// Whether fused_mlp_gemm takes these arguments on the current device: bf16, f16 or f32, x and all weights with rows on 16 bytes,
// one of the activations whose arithmetic its kernels have, sm_90a; on FUSED_MLP_PATH_GEMM_AMPERE bf16 or f16, sm_80 up.
// Workspace and out are not looked at.
int fused_mlp_gemm_takes(const FusedMlpArgs *args, int *takes);

// Bytes of workspace with which fused_mlp_gemm is fastest for these sizes. With the tokens x intermediate_size elements of the
// hidden rows alone, it does without tiles whose depth several groups of blocks share.
int fused_mlp_gemm_workspace_bytes(const FusedMlpArgs *args, uint64_t *bytes);

// Enqueues an MLP of any number of tokens as two launches. The workspace, on 16 bytes, need not be cleared.
int fused_mlp_gemm(const FusedMlpArgs *args, cudaStream_t stream);

// The elementwise parts of an MLP whose products others compute. All matrices are contiguous.
typedef struct FusedMlpHiddenArgs {
  const void *gate; // rows of `cols`
  const void *up;   // the same, or null
  const void *bias_gate; // cols, or null
  const void *bias_up;   // cols, or null
  const void *gradient;  // of the hidden rows; null in the forward pass
  void *hidden; // may be gate
  void *d_gate; // the backward pass's results
  void *d_up;
  int64_t rows;
  int64_t cols;
  int32_t dtype;
  int32_t activation;
  double activation_param;
} FusedMlpHiddenArgs;

// hidden = act(gate + bias_gate) * (up + bias_up)
int fused_mlp_hidden(const FusedMlpHiddenArgs *args, cudaStream_t stream);

// The same hidden rows, and d_gate = gradient * up * act'(gate), d_up = gradient * act(gate). Biases are not looked at.
int fused_mlp_hidden_gradients(const FusedMlpHiddenArgs *args, cudaStream_t stream);

// Adds the bias of `cols` elements to each row of out.
int fused_mlp_add_bias(void *out, const void *bias, int64_t rows, int64_t cols, int32_t dtype, cudaStream_t stream);

// What a status says, in words; never null.
const char *fused_mlp_status_text(int status);

#ifdef __cplusplus
}
#endif
