// The kernels for many tokens on sm_80 and newer, for gemm.cu: where they run, each product's tiles, both launches.
#include "gemm_ampere.h"
#include "gemm_arguments.cuh"
#include <algorithm>
#include <atomic>
#include <cmath>

namespace fused_mlp {
namespace {

constexpr int MAX_DEVICES = 64;

// What the choice needs to know of the current device. Asked for once.
struct Facts {
  bool runs; // the kernels' code is for it
  int multiprocessors;
};
int facts_of_device(Facts *facts) {
  static std::atomic<int> known[MAX_DEVICES]; // 1, and twice the multiprocessors of one that runs the kernels
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess)
    return error;
  *facts = {};
  if (device >= MAX_DEVICES)
    return FUSED_MLP_OK;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    int major = 0, multiprocessors = 0, source = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess)
      return error;
    // Code compiled for older ones has no body here.
    const int status = major >= 8 ? gemm_ampere_compiled_for(&source) : FUSED_MLP_OK;
    if (status != FUSED_MLP_OK)
      return status;
    answer = 1 + (source >= 80 ? 2 * multiprocessors : 0);
    known[device].store(answer, std::memory_order_relaxed);
  }
  *facts = {answer > 1, answer / 2};
  return FUSED_MLP_OK;
}

int tiles_of(const Variant &v, const Operands &o) { return ceil_div(o.tokens, v.rows) * ceil_div(o.columns, v.columns); }

// About how long a product takes with these tiles, in microseconds on an H100: the tiles of the multiprocessor that has most,
// each as long as its products and its copies from L2 take, and rounds of as many as it runs at once, each with a start and
// a finish; or as long as its weights take from memory, which few blocks read more slowly. Only differences between tiles
// count. The numbers were fitted to pairs of products of seven MLPs at six token counts each, where the choice costs 1.5%
// on average (`harness/gemm sweep`).
double cost(const Variant &v, const Operands &o, int resident, int multiprocessors) {
  const int items = tiles_of(v, o) * v.split, each = ceil_div(items, multiprocessors), most = resident / multiprocessors;
  const double tile = static_cast<double>(v.rows) * v.weights;
  const double stages = ceil_div(o.depth, 64) / static_cast<double>(v.split);
  const double products = each * stages * (4.3e-6 * tile + 2.29e-3 * (v.rows + v.weights));
  const double finish = 6.1 + 6.4e-4 * tile + (v.split > 1 ? 2.3e-5 * tile * v.split : 0.);
  const double rounds = ceil_div(each, most) * (1. + 0.072 * (std::min(each, most) - 1));
  const double busy = std::fmin(1., static_cast<double>(items) / multiprocessors);
  const double bytes = 2. * o.depth * o.columns * (v.gated ? 2 : 1);
  return std::fmax(products + rounds * finish, bytes / 2.6e6 / std::pow(busy, 0.3));
}

// The memory in which the parts of a split depth meet.
unsigned long long meeting_bytes(const Variant &v, const Operands &o) {
  return v.split == 1 ? 0 : 4ull * MEETINGS + 4ull * tiles_of(v, o) * v.split * v.rows * v.weights;
}

// The tiles of least cost, with no more than so many bytes of memory to meet in.
int choose(const Operands &o, bool gated, unsigned long long meeting, const Variant **best) {
  Facts facts;
  int status = facts_of_device(&facts), count = 0;
  if (status != FUSED_MLP_OK)
    return status;
  const Variant *const all =
      o.dtype == FUSED_MLP_F16 ? gemm_ampere_variants_f16(&count) : gemm_ampere_variants_bf16(&count);
  double least = HUGE_VAL;
  *best = nullptr;
  for (const Variant *v = all; v != all + count; ++v) {
    if (v->gated != gated || meeting_bytes(*v, o) > meeting || (v->split > 1 && tiles_of(*v, o) > MEETINGS))
      continue;
    int resident = 0;
    status = v->resident(&resident);
    if (status != FUSED_MLP_OK)
      return status;
    const double time = resident > 0 ? cost(*v, o, resident, facts.multiprocessors) : HUGE_VAL;
    if (time < least) {
      least = time;
      *best = v;
    }
  }
  return *best ? FUSED_MLP_OK : FUSED_MLP_UNSUPPORTED;
}

} // namespace

int gemm_ampere_takes(const FusedMlpArgs &args, int *answer) {
  Facts facts = {};
  const bool described = args.dtype != FUSED_MLP_F32 && takes(args);
  const int status = described ? facts_of_device(&facts) : FUSED_MLP_OK;
  *answer = facts.runs;
  return status;
}

int gemm_ampere_workspace_bytes(const FusedMlpArgs &args, uint64_t *bytes) {
  const Operands second = second_product(args);
  const Variant *tiles = nullptr;
  const int status = choose(second, false, ~0ull, &tiles);
  if (status == FUSED_MLP_OK)
    *bytes = hidden_bytes(args) + meeting_bytes(*tiles, second);
  return status;
}

int gemm_ampere(const FusedMlpArgs &args, cudaStream_t stream) {
  Operands first, second = second_product(args);
  if (!first_product(args, &first))
    return FUSED_MLP_UNSUPPORTED;
  const unsigned long long hidden = hidden_bytes(args);
  const unsigned long long meeting = args.workspace_bytes > hidden ? args.workspace_bytes - hidden : 0;
  const Variant *first_tiles = nullptr, *second_tiles = nullptr;
  int status = choose(first, args.gated, 0, &first_tiles);
  if (status == FUSED_MLP_OK)
    status = choose(second, false, meeting, &second_tiles);
  if (status != FUSED_MLP_OK)
    return status;
  if (second_tiles->split > 1)
    first.clear = second.meeting = static_cast<char *>(args.workspace) + hidden;
  status = first_tiles->enqueue(first, stream);
  return status == FUSED_MLP_OK ? second_tiles->enqueue(second, stream) : status;
}

} // namespace fused_mlp
