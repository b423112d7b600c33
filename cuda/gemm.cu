// The C interface of the kernels for many tokens: checks arguments, chooses each product's tiles, launches both.
#include "gemm_ampere.h"
#include "gemm_arguments.cuh"
#include <atomic>
#include <cmath>

namespace fused_mlp {
namespace {

constexpr int MAX_DEVICES = 64;

// Whether the kernels' code is for the current device. Asked for once.
int runs_here(bool *runs) {
  enum { UNKNOWN, NO, YES };
  static std::atomic<int> known[MAX_DEVICES];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess)
    return error;
  *runs = false;
  if (device >= MAX_DEVICES)
    return FUSED_MLP_OK;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == UNKNOWN) {
    int major = 0, minor = 0, source = 0, binary = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess)
      return error;
    // No other GPU has sm_90a's instructions, and code compiled for older ones has no body here.
    const bool hopper = major == 9 && minor == 0;
    const int status = hopper ? gemm_compiled_for(&source, &binary) : FUSED_MLP_OK;
    if (status != FUSED_MLP_OK)
      return status;
    answer = hopper && source >= 90 && binary == 90 ? YES : NO;
    known[device].store(answer, std::memory_order_relaxed);
  }
  *runs = answer == YES;
  return FUSED_MLP_OK;
}

// About how long a product takes with these tiles, in microseconds on an H100: waves of tiles, each as long as its products, what
// they read of shared memory or its copies from L2, whichever takes longest, and then its finish; or as long as its weights take
// from memory, where few blocks read more slowly. Only differences between tiles count. The numbers were fitted to
// pairs of products of eight MLPs at 29 token counts, where the choice costs 0.6% on average (`harness/gemm sweep`).
double cost(const Variant &v, const Operands &o, int resident) {
  const int clusters = ceil_div(o.tokens, v.rows * v.share) * ceil_div(o.columns, v.columns * v.peers);
  const int of_cluster = v.share * v.peers * v.split;
  const int blocks = clusters * of_cluster * v.links, waves = ceil_div(blocks, resident);
  const double busy = std::fmin(1., static_cast<double>(blocks) / resident);
  const double tile = static_cast<double>(v.rows) * v.weights, width = v.turned ? v.rows : v.weights;
  const double multiply = 1.931e-5 * tile;
  // Each product of 64 rows reads them and its columns; copies write both once.
  const double read = 4.277e-6 * (2. * tile * (64. + width) / width + 128. * (v.rows + v.weights));
  // Rows are in L2 already.
  const double copy = 1.884e-3 * (0.699 * v.rows / v.peers + static_cast<double>(v.weights) / v.share) * std::pow(busy, 0.336);
  const double products = ceil_div(o.depth, 64) / static_cast<double>(v.split * v.links) *
                          (std::fmax(std::fmax(multiply, read), copy) + 0.215 * copy);
  const double finish = 7.26e-5 * tile + (v.turned ? 4.18e-5 * tile : 0.) + (v.split > 1 ? 1.6 + 1.06e-4 * tile : 0.) +
                        (v.links > 1 ? 4. + 3.1e-4 * tile : 0.);
  const double time = v.pingpong ? (waves - 1) * std::fmax(products, finish / 2) + products + finish : waves * (products + finish);
  const double bytes = 2. * o.depth * o.columns * (v.gated ? 2 : 1);
  return std::fmax(time, bytes / 3.2e6 / std::fmin(1., 1.4 * busy)) + 0.78 * busy + (of_cluster > 2 ? 0.96 : 0.);
}

// The same in f32, where a stage is three products of 32 elements.
double cost_f32(const Variant &v, const Operands &o, int resident) {
  const int stages = ceil_div(ceil_div(o.depth, 32), v.split);
  // Of more, the sums would be rounded too often.
  if (v.split > 1 && stages > 128 * v.split)
    return HUGE_VAL;
  const int blocks = ceil_div(o.tokens, v.rows) * ceil_div(o.columns, v.columns) * v.split;
  const int waves = ceil_div(blocks, resident);
  const double tile = static_cast<double>(v.rows) * v.weights;
  const double multiply = 5.8e-5 * tile + 0.4, copy = 2.1e-3 * (v.rows + v.weights);
  const double finish = 1.15e-4 * tile + (v.split > 1 ? 0.12 + 1.55e-4 * tile : 0.);
  const double busy = std::fmin(1., static_cast<double>(blocks) / resident);
  const double bytes = 4. * o.depth * o.columns * (v.gated ? 2 : 1);
  return std::fmax(waves * (stages * std::fmax(multiply, copy) + finish), bytes / 3.42e6 / std::sqrt(busy)) + 2.3 * busy;
}

// Blocks that hand over their sums, and the memory for that.
int meetings(const Variant &v, const Operands &o) {
  return ceil_div(o.tokens, v.rows * v.share) * ceil_div(o.columns, v.columns * v.peers) * v.share * v.peers;
}
unsigned long long meeting_bytes(const Variant &v, const Operands &o) {
  return v.links == 1 ? 0 : 4ull * MEETINGS + 4ull * meetings(v, o) * v.rows * v.weights;
}

// The tiles of least cost.
int choose(const Operands &o, bool gated, const Variant **best) {
  int count = 0;
  const Variant *const all = o.dtype == FUSED_MLP_F32   ? gemm_variants_f32(&count)
                             : o.dtype == FUSED_MLP_F16 ? gemm_variants_f16(&count)
                                                        : gemm_variants_bf16(&count);
  double least = HUGE_VAL;
  for (const Variant *v = all; v != all + count; ++v) {
    if (v->gated != gated || (v->links > 1 && (!o.meeting || meetings(*v, o) > MEETINGS)))
      continue;
    int resident = 0;
    const int status = v->resident(&resident);
    if (status != FUSED_MLP_OK)
      return status;
    const double time = o.dtype == FUSED_MLP_F32 ? cost_f32(*v, o, resident) : cost(*v, o, resident);
    if (time < least) {
      least = time;
      *best = v;
    }
  }
  return FUSED_MLP_OK;
}

// The same, remembered: a model asks for few sizes again and again, and going through all tiles takes microseconds.
int remembered_choice(const Operands &o, bool gated, const Variant **best) {
  struct Memory {
    int device, dtype, gated, tokens, depth, columns;
    bool meets;
    const Variant *best;
  };
  constexpr int PLACE_BITS = 6;
  static thread_local Memory memories[1 << PLACE_BITS] = {};
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess)
    return error;
  // Sizes are multiples of powers of two, and both products of a square MLP have the same: all of a key's bits count.
  const unsigned key = o.tokens * 0x9e3779b1u ^ o.depth * 0x85ebca77u ^ o.columns * 0xc2b2ae3du ^ (o.meeting ? 0x27d4eb2fu : 0u) ^
                       (gated ? 0x165667b1u : 0u);
  Memory &m = memories[key * 0x9e3779b1u >> (32 - PLACE_BITS)];
  if (!m.best || m.device != device || m.dtype != o.dtype || m.gated != gated || m.tokens != o.tokens ||
      m.depth != o.depth || m.columns != o.columns || m.meets != (o.meeting != nullptr)) {
    const Variant *found = nullptr;
    const int status = choose(o, gated, &found);
    if (status != FUSED_MLP_OK)
      return status;
    m = {device, o.dtype, gated, o.tokens, o.depth, o.columns, o.meeting != nullptr, found};
  }
  *best = m.best;
  return FUSED_MLP_OK;
}

int enqueue(const Operands &o, bool gated, cudaStream_t stream) {
  const Variant *tiles = nullptr;
  const int status = remembered_choice(o, gated, &tiles);
  return status == FUSED_MLP_OK ? tiles->enqueue(o, stream) : status;
}

// What the second product needs besides the hidden rows.
int meeting_bytes_of(const FusedMlpArgs &args, unsigned long long *bytes) {
  Operands second = second_product(args);
  second.meeting = &second; // there would be one
  const Variant *tiles = nullptr;
  const int status = remembered_choice(second, false, &tiles);
  if (status == FUSED_MLP_OK)
    *bytes = meeting_bytes(*tiles, second);
  return status;
}

} // namespace
} // namespace fused_mlp

extern "C" int fused_mlp_gemm_takes(const FusedMlpArgs *args, int *takes) {
  if (args->path == FUSED_MLP_PATH_GEMM_AMPERE)
    return fused_mlp::gemm_ampere_takes(*args, takes);
  bool runs = false;
  const bool described = fused_mlp::takes(*args);
  const int status = described ? fused_mlp::runs_here(&runs) : FUSED_MLP_OK;
  *takes = runs;
  return status;
}

extern "C" int fused_mlp_gemm_workspace_bytes(const FusedMlpArgs *args, uint64_t *bytes) {
  using namespace fused_mlp;
  if (args->path == FUSED_MLP_PATH_GEMM_AMPERE)
    return gemm_ampere_workspace_bytes(*args, bytes);
  unsigned long long meeting = 0;
  const int status = meeting_bytes_of(*args, &meeting);
  *bytes = hidden_bytes(*args) + meeting;
  return status;
}

extern "C" int fused_mlp_gemm(const FusedMlpArgs *args, cudaStream_t stream) {
  using namespace fused_mlp;
  int taken = 0, status = fused_mlp_gemm_takes(args, &taken);
  if (status != FUSED_MLP_OK)
    return status;
  if (!taken)
    return FUSED_MLP_UNSUPPORTED;
  if (!args->out || !args->workspace || reinterpret_cast<unsigned long long>(args->workspace) % 16 != 0 ||
      reinterpret_cast<unsigned long long>(args->out) % 16 != 0)
    return FUSED_MLP_BAD_ARGUMENT;
  if (args->workspace_bytes < 1ull * element_bytes(args->dtype) * args->tokens * args->intermediate_size)
    return FUSED_MLP_WORKSPACE_TOO_SMALL;
  if (!stream)
    stream = cudaStreamLegacy;
  if (args->path == FUSED_MLP_PATH_GEMM_AMPERE)
    return gemm_ampere(*args, stream);
  Operands second = second_product(*args);
  unsigned long long meeting = 0;
  status = meeting_bytes_of(*args, &meeting);
  if (status != FUSED_MLP_OK)
    return status;
  if (meeting > 0 && args->workspace_bytes >= hidden_bytes(*args) + meeting)
    second.meeting = static_cast<char *>(args->workspace) + hidden_bytes(*args);
  Operands first = {};
  if (!first_product(*args, &first))
    return FUSED_MLP_UNSUPPORTED;
  first.clear = second.meeting;
  status = enqueue(first, args->gated, stream);
  if (status != FUSED_MLP_OK)
    return status;
  return enqueue(second, false, stream);
}
