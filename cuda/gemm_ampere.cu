// The kernels for many tokens on sm_80 and newer, for gemm.cu: where they run, each product's tiles.
#include "gemm_ampere.h"
#include "gemm_arguments.cuh"
#include <algorithm>
#include <cmath>

namespace fused_mlp {
namespace {

// What the choice needs to know of a device.
struct Facts {
  bool runs; // the kernels' code is for it
  int multiprocessors;
};
int current_device(Facts *facts) {
  static PerDevice<Facts> devices;
  return devices.get(facts, [](int device, Facts *found) -> int {
    int major = 0, source = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess)
      return error;
    const int status = major >= 8 ? gemm_ampere_compiled_for(&source) : FUSED_MLP_OK;
    found->runs = source >= 80; // code compiled for older ones has no body
    return status;
  });
}

int tiles_of(const Variant &v, const Operands &o) { return divide_up(o.tokens, v.rows) * divide_up(o.columns, v.columns); }

// About how long a product takes with these tiles, in microseconds on an H100: the tiles of the multiprocessor that has most,
// each as long as its products and its copies from L2 take, and rounds of as many as it runs at once, each with a start and
// a finish; or as long as its weights take from memory, which few blocks read more slowly. Only differences between tiles
// count. The numbers were fitted to pairs of products of seven MLPs at six token counts each, where the choice costs 1.5%
// on average (`harness/gemm sweep`).
double cost(const Variant &v, const Operands &o, int resident, int multiprocessors) {
  const int items = tiles_of(v, o) * v.split, each = divide_up(items, multiprocessors), most = resident / multiprocessors;
  const double tile = static_cast<double>(v.rows) * v.weights;
  const double stages = divide_up(o.depth, 64) / static_cast<double>(v.split);
  const double products = each * stages * (4.3e-6 * tile + 2.29e-3 * (v.rows + v.weights));
  const double finish = 6.1 + 6.4e-4 * tile + (v.split > 1 ? 2.3e-5 * tile * v.split : 0.);
  const double rounds = divide_up(each, most) * (1. + 0.072 * (std::min(each, most) - 1));
  const double busy = std::fmin(1., static_cast<double>(items) / multiprocessors);
  const double bytes = 2. * o.depth * o.columns * (v.gated ? 2 : 1);
  return std::fmax(products + rounds * finish, bytes / 2.6e6 / std::pow(busy, 0.3));
}

} // namespace

int gemm_ampere_takes(const FusedMlpArgs &args, bool *takes_it) {
  Facts facts = {};
  const bool described = args.dtype != FUSED_MLP_F32 && takes(args);
  const int status = described ? current_device(&facts) : FUSED_MLP_OK;
  *takes_it = facts.runs;
  return status;
}

unsigned long long gemm_ampere_meeting_bytes(const Variant &v, const Operands &o) {
  return v.split == 1 ? 0 : 4ull * MEETINGS + 4ull * tiles_of(v, o) * v.split * v.rows * v.weights;
}

int gemm_ampere_choose(const Operands &o, bool gated, const Variant **best) {
  Facts facts;
  int status = current_device(&facts), count = 0;
  if (status != FUSED_MLP_OK)
    return status;
  const Variant *const all =
      o.dtype == FUSED_MLP_F16 ? gemm_ampere_variants_f16(&count) : gemm_ampere_variants_bf16(&count);
  double least = HUGE_VAL;
  *best = nullptr;
  for (const Variant *v = all; v != all + count; ++v) {
    if (v->gated != gated || (v->split > 1 && (!o.meeting || tiles_of(*v, o) > MEETINGS)))
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

} // namespace fused_mlp
