// The C interface of the kernels for many tokens: checks arguments, chooses each product's tiles, launches both.
#include "gemm_ampere.h"
#include "gemm_arguments.cuh"
#include <cmath>

namespace fused_mlp {
namespace {

// Whether the kernels' code is for the current device. Asked for once.
int runs_here(bool *runs) {
  static PerDevice<bool> known;
  return known.get(runs, [](int device, bool *found) -> int {
    int major = 0, minor = 0, source = 0, binary = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess)
      return error;
    // No other GPU has sm_90a's instructions, and code compiled for older ones has no body here.
    const bool hopper = major == 9 && minor == 0;
    const int status = hopper ? gemm_compiled_for(&source, &binary) : FUSED_MLP_OK;
    *found = hopper && source >= 90 && binary == 90;
    return status;
  });
}

// About how long a product takes with these tiles, in microseconds on an H100: waves of tiles, each as long as its products, what
// they read of shared memory or its copies from L2, whichever takes longest, and then its finish; or as long as its weights take
// from memory, where few blocks read more slowly. Only differences between tiles count. The numbers were fitted to
// pairs of products of eight MLPs at 29 token counts, where the choice costs 0.6% on average (`harness/gemm sweep`).
double cost(const Variant &v, const Operands &o, int resident) {
  const int clusters = divide_up(o.tokens, v.rows * v.share) * divide_up(o.columns, v.columns * v.peers);
  const int of_cluster = v.share * v.peers * v.split;
  const int blocks = clusters * of_cluster * v.links, waves = divide_up(blocks, resident);
  const double busy = std::fmin(1., static_cast<double>(blocks) / resident);
  const double tile = static_cast<double>(v.rows) * v.weights, width = v.turned ? v.rows : v.weights;
  const double multiply = 1.931e-5 * tile;
  // Each product of 64 rows reads them and its columns; copies write both once.
  const double read = 4.277e-6 * (2. * tile * (64. + width) / width + 128. * (v.rows + v.weights));
  // Rows are in L2 already.
  const double copy = 1.884e-3 * (0.699 * v.rows / v.peers + static_cast<double>(v.weights) / v.share) * std::pow(busy, 0.336);
  const double products = divide_up(o.depth, 64) / static_cast<double>(v.split * v.links) *
                          (std::fmax(std::fmax(multiply, read), copy) + 0.215 * copy);
  const double finish = 7.26e-5 * tile + (v.turned ? 4.18e-5 * tile : 0.) + (v.split > 1 ? 1.6 + 1.06e-4 * tile : 0.) +
                        (v.links > 1 ? 4. + 3.1e-4 * tile : 0.);
  const double time = v.pingpong ? (waves - 1) * std::fmax(products, finish / 2) + products + finish : waves * (products + finish);
  const double bytes = 2. * o.depth * o.columns * (v.gated ? 2 : 1);
  return std::fmax(time, bytes / 3.2e6 / std::fmin(1., 1.4 * busy)) + 0.78 * busy + (of_cluster > 2 ? 0.96 : 0.);
}

// The same in f32, where a stage is three products of 32 elements.
double cost_f32(const Variant &v, const Operands &o, int resident) {
  const int stages = divide_up(divide_up(o.depth, 32), v.split);
  // Of more, the sums would be rounded too often.
  if (v.split > 1 && stages > 128 * v.split)
    return HUGE_VAL;
  const int blocks = divide_up(o.tokens, v.rows) * divide_up(o.columns, v.columns) * v.split;
  const int waves = divide_up(blocks, resident);
  const double tile = static_cast<double>(v.rows) * v.weights;
  const double multiply = 5.8e-5 * tile + 0.4, copy = 2.1e-3 * (v.rows + v.weights);
  const double finish = 1.15e-4 * tile + (v.split > 1 ? 0.12 + 1.55e-4 * tile : 0.);
  const double busy = std::fmin(1., static_cast<double>(blocks) / resident);
  const double bytes = 4. * o.depth * o.columns * (v.gated ? 2 : 1);
  return std::fmax(waves * (stages * std::fmax(multiply, copy) + finish), bytes / 3.42e6 / std::sqrt(busy)) + 2.3 * busy;
}

// Blocks that hand over their sums, and the memory for that.
int meetings(const Variant &v, const Operands &o) {
  return divide_up(o.tokens, v.rows * v.share) * divide_up(o.columns, v.columns * v.peers) * v.share * v.peers;
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

int hopper_takes(const FusedMlpArgs &args, bool *takes_it) {
  *takes_it = false;
  return takes(args) ? runs_here(takes_it) : FUSED_MLP_OK;
}

// The kernels for sm_90a, or those of gemm_ampere.cu.
struct Family {
  // Whether they are for the current device and take these arguments.
  int (*takes)(const FusedMlpArgs &args, bool *takes_it);
  // The tiles of least cost; those whose blocks meet in memory only where there is `o.meeting`.
  int (*choose)(const Operands &o, bool gated, const Variant **best);
  // What these need of it.
  unsigned long long (*meeting_bytes)(const Variant &tiles, const Operands &o);
};
Family family_of(const FusedMlpArgs &args) {
  return args.path == FUSED_MLP_PATH_GEMM_AMPERE
             ? Family{gemm_ampere_takes, gemm_ampere_choose, gemm_ampere_meeting_bytes}
             : Family{hopper_takes, choose, meeting_bytes};
}

// A family's choice, remembered: going through all tiles takes microseconds.
int remembered_choice(const Family &family, const Operands &o, bool gated, const Variant **best) {
  struct Key {
    int (*choose)(const Operands &, bool, const Variant **);
    int device, dtype, tokens, depth, columns;
    bool gated, meets;
    bool operator==(const Key &k) const {
      return choose == k.choose && device == k.device && dtype == k.dtype && tokens == k.tokens && depth == k.depth &&
             columns == k.columns && gated == k.gated && meets == k.meets;
    }
  };
  static thread_local Memory<Key, const Variant *, 6> memory;
  Key key = {family.choose, 0, o.dtype, o.tokens, o.depth, o.columns, gated, o.meeting != nullptr};
  const cudaError_t error = cudaGetDevice(&key.device);
  if (error != cudaSuccess)
    return error;
  // Sizes are multiples of powers of two, and both products of a square MLP have the same: all of a key's bits count.
  const unsigned hash = o.tokens * 0x9e3779b1u ^ o.depth * 0x85ebca77u ^ o.columns * 0xc2b2ae3du ^
                        (key.meets ? 0x27d4eb2fu : 0u) ^ (gated ? 0x165667b1u : 0u);
  return memory.get(key, hash, best, [&](const Variant **found) { return family.choose(o, gated, found); });
}

int enqueue(const Family &family, const Operands &o, bool gated, cudaStream_t stream) {
  const Variant *tiles = nullptr;
  const int status = remembered_choice(family, o, gated, &tiles);
  return status == FUSED_MLP_OK ? tiles->enqueue(o, stream) : status;
}

// What the second product needs besides the hidden rows.
int meeting_bytes_of(const Family &family, const FusedMlpArgs &args, unsigned long long *bytes) {
  Operands second = second_product(args);
  second.meeting = &second; // there would be one
  const Variant *tiles = nullptr;
  const int status = remembered_choice(family, second, false, &tiles);
  if (status == FUSED_MLP_OK)
    *bytes = family.meeting_bytes(*tiles, second);
  return status;
}

} // namespace
} // namespace fused_mlp

extern "C" int fused_mlp_gemm_takes(const FusedMlpArgs *args, int *takes) {
  bool answer = false;
  const int status = fused_mlp::family_of(*args).takes(*args, &answer);
  *takes = answer;
  return status;
}

extern "C" int fused_mlp_gemm_workspace_bytes(const FusedMlpArgs *args, uint64_t *bytes) {
  using namespace fused_mlp;
  unsigned long long meeting = 0;
  const int status = meeting_bytes_of(family_of(*args), *args, &meeting);
  *bytes = hidden_bytes(*args) + meeting;
  return status;
}

extern "C" int fused_mlp_gemm(const FusedMlpArgs *args, cudaStream_t stream) {
  using namespace fused_mlp;
  const Family family = family_of(*args);
  bool taken = false;
  int status = family.takes(*args, &taken);
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
  Operands first, second = second_product(*args);
  if (!first_product(*args, &first))
    return FUSED_MLP_UNSUPPORTED;
  unsigned long long meeting = 0;
  status = meeting_bytes_of(family, *args, &meeting);
  if (status != FUSED_MLP_OK)
    return status;
  if (meeting > 0 && args->workspace_bytes >= hidden_bytes(*args) + meeting)
    first.clear = second.meeting = static_cast<char *>(args->workspace) + hidden_bytes(*args);
  status = enqueue(family, first, args->gated, stream);
  return status == FUSED_MLP_OK ? enqueue(family, second, false, stream) : status;
}
