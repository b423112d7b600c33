// The decode kernels' C interface: checks arguments, lays out the workspace, chooses the kernel.
#include "decode_kernels.cuh"

namespace fused_mlp {
namespace {

int facts_of(int device, DeviceFacts *facts) {
  int major = 0, minor = 0, compiled = 0;
  cudaError_t error = cudaDeviceGetAttribute(&facts->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&facts->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess)
    return error;
  int status = compiled_architecture(&compiled);
  // Code for an older architecture, translated for this device when it was loaded, lacks what came later.
  const int capability = major * 10 + minor;
  facts->compute_capability = compiled < capability ? compiled : capability;
  if (status != FUSED_MLP_OK || facts->compute_capability < 80)
    return status;
  status = prepare_decode_direct(*facts);
  if (status == FUSED_MLP_OK)
    status = prepare_decode_hopper(*facts);
  if (status == FUSED_MLP_OK && facts->hopper)
    status = prepare_decode_resident(*facts);
  return status;
}

int current_device(DeviceFacts *facts) {
  static PerDevice<DeviceFacts> devices;
  return devices.get(facts, facts_of);
}

unsigned long long element_bytes(int dtype) {
  return dtype == FUSED_MLP_F64 ? 8 : dtype == FUSED_MLP_F32 ? 4 : 2;
}

unsigned long long round_up(unsigned long long v, unsigned long long to) { return (v + to - 1) / to * to; }

struct WorkspaceLayout {
  unsigned long long hidden_stride; // elements
  unsigned long long exchange, hidden, partial, bytes; // offsets, total
};

WorkspaceLayout layout_of(const FusedMlpArgs &args) {
  WorkspaceLayout layout;
  layout.hidden_stride = round_up(args.intermediate_size, 64);
  // What outlives a launch has the same place whatever the sizes are; the rest is any launch's to write over.
  layout.exchange = round_up(sizeof(Counters), 256);
  layout.hidden = round_up(layout.exchange + 2 * RESIDENT_ELEMENTS * sizeof(unsigned short), 256);
  layout.partial =
      round_up(layout.hidden + MAX_TOKENS * layout.hidden_stride * element_bytes(args.dtype), 256);
  const unsigned long long direct = decode_direct_partial_elements(args.output_size),
                           hopper = decode_hopper_partial_elements(args.output_size);
  layout.bytes = layout.partial + sizeof(float) * (direct > hopper ? direct : hopper);
  return layout;
}

bool known_sizes(const FusedMlpArgs &args) {
  return args.hidden_size >= 0 && args.intermediate_size >= 0 && args.output_size >= 1 && args.tokens >= 0 &&
         args.dtype >= FUSED_MLP_BF16 && args.dtype <= FUSED_MLP_F64;
}

bool on_16_bytes(const void *pointer, long long stride, unsigned long long element) {
  return reinterpret_cast<unsigned long long>(pointer) % 16 == 0 && stride * static_cast<long long>(element) % 16 == 0;
}

// The direct kernel reads 16 bytes at a time and never past a row's end.
bool aligned(const FusedMlpArgs &args) {
  const unsigned long long element = element_bytes(args.dtype);
  return args.dtype != FUSED_MLP_F64 && args.hidden_size > 0 && args.intermediate_size > 0 &&
         args.hidden_size * element % 16 == 0 &&
         args.intermediate_size * element % 16 == 0 &&
         on_16_bytes(args.x, args.tokens > 1 ? args.x_stride : 0, element) &&
         on_16_bytes(args.gate, args.gate_stride, element) &&
         (!args.gated || on_16_bytes(args.up, args.up_stride, element)) &&
         on_16_bytes(args.down, args.down_stride, element);
}

int check(const FusedMlpArgs &args) {
  if (!known_sizes(args) || !args.x || !args.gate || !args.down || (args.gated && !args.up) || args.activation < 0 ||
      args.activation >= static_cast<int>(Activation::Count) || args.path < FUSED_MLP_PATH_AUTO ||
      (args.path > FUSED_MLP_PATH_CLUSTER && args.path != FUSED_MLP_PATH_WIDE))
    return FUSED_MLP_BAD_ARGUMENT;
  return FUSED_MLP_OK;
}

// What AUTO means here; or whether the path asked for can be taken.
int resolve_path(const FusedMlpArgs &args, const DeviceFacts &device, int *path) {
  const bool can_direct = device.compute_capability >= 80 && aligned(args);
  const bool can_depend = can_direct && device.compute_capability >= 90;
  // A tensor map has no rows that overlap.
  const bool apart = (args.tokens <= 1 || args.x_stride >= args.hidden_size) && args.gate_stride >= args.hidden_size &&
                     (!args.gated || args.up_stride >= args.hidden_size) && args.down_stride >= args.intermediate_size;
  const bool can_hopper =
      can_depend && apart && can_decode_hopper(device, args.dtype, args.hidden_size, args.intermediate_size);
  const bool can_resident = can_hopper && can_decode_resident(device, args);
  const bool can_cluster = can_decode_cluster(device, args);
  bool can_wide = false;
  if (can_depend && apart &&
      (args.path == FUSED_MLP_PATH_WIDE || (args.path == FUSED_MLP_PATH_AUTO && decode_wide_is_chosen(device, args)))) {
    const int status = can_decode_wide(device, args, &can_wide);
    if (status != FUSED_MLP_OK)
      return status;
  }
  const bool resident_is_best = args.path != FUSED_MLP_PATH_AUTO || decode_resident_is_chosen(args);
  const int best = can_resident && resident_is_best ? FUSED_MLP_PATH_RESIDENT
                   : can_hopper ? FUSED_MLP_PATH_HOPPER
                   : can_depend ? FUSED_MLP_PATH_DIRECT_PDL
                   : can_direct ? FUSED_MLP_PATH_DIRECT
                                : FUSED_MLP_PATH_PORTABLE;
  *path = args.path != FUSED_MLP_PATH_AUTO ? args.path
          : can_cluster                    ? FUSED_MLP_PATH_CLUSTER
          : can_wide                       ? FUSED_MLP_PATH_WIDE
                                           : best;
  const bool can = *path == FUSED_MLP_PATH_CLUSTER ? can_cluster
                   : *path == FUSED_MLP_PATH_WIDE  ? can_wide
                                                   : *path <= best;
  return can ? FUSED_MLP_OK : FUSED_MLP_UNSUPPORTED;
}

} // namespace
} // namespace fused_mlp

extern "C" uint64_t fused_mlp_decode_workspace_bytes(const FusedMlpArgs *args) {
  return fused_mlp::known_sizes(*args) ? fused_mlp::layout_of(*args).bytes : 0;
}

extern "C" int fused_mlp_decode_path(const FusedMlpArgs *args, int *path) {
  using namespace fused_mlp;
  int status = check(*args);
  DeviceFacts device = {};
  if (status == FUSED_MLP_OK)
    status = current_device(&device);
  return status == FUSED_MLP_OK ? resolve_path(*args, device, path) : status;
}

extern "C" int fused_mlp_decode(const FusedMlpArgs *args, cudaStream_t stream) {
  using namespace fused_mlp;
  int status = check(*args);
  DeviceFacts device = {};
  if (status == FUSED_MLP_OK)
    status = current_device(&device);
  int path = FUSED_MLP_PATH_AUTO;
  if (status == FUSED_MLP_OK)
    status = resolve_path(*args, device, &path);
  if (status != FUSED_MLP_OK)
    return status;
  if (!args->out || !args->workspace || reinterpret_cast<unsigned long long>(args->workspace) % 256 != 0)
    return FUSED_MLP_BAD_ARGUMENT;
  if (args->workspace_bytes < layout_of(*args).bytes)
    return FUSED_MLP_WORKSPACE_TOO_SMALL;
  if (!stream)
    stream = cudaStreamLegacy;

  const WorkspaceLayout layout = layout_of(*args);
  char *const workspace = static_cast<char *>(args->workspace);
  Shape shape;
  shape.gate = args->gate;
  shape.up = args->up;
  shape.down = args->down;
  shape.bias_gate = args->bias_gate;
  shape.bias_up = args->bias_up;
  shape.bias_down = args->bias_down;
  shape.counters = reinterpret_cast<Counters *>(workspace);
  shape.hidden = workspace + layout.hidden;
  shape.exchange = reinterpret_cast<unsigned short *>(workspace + layout.exchange);
  shape.partial = reinterpret_cast<float *>(workspace + layout.partial);
  shape.x_stride = args->x_stride;
  shape.gate_stride = args->gate_stride;
  shape.up_stride = args->up_stride;
  shape.down_stride = args->down_stride;
  shape.hidden_stride = static_cast<long long>(layout.hidden_stride);
  shape.hidden_size = args->hidden_size;
  shape.intermediate_size = args->intermediate_size;
  shape.output_size = args->output_size;
  shape.gated = args->gated;
  shape.activation = static_cast<Activation>(args->activation);
  shape.activation_param = args->activation_param;

  const unsigned long long element = element_bytes(args->dtype);
  for (int token = 0; token < args->tokens; token += MAX_TOKENS) {
    shape.x = static_cast<const char *>(args->x) + token * args->x_stride * static_cast<long long>(element);
    shape.out = static_cast<char *>(args->out) +
                static_cast<unsigned long long>(token) * args->output_size * element;
    shape.tokens = args->tokens - token < MAX_TOKENS ? args->tokens - token : MAX_TOKENS;
    status = path == FUSED_MLP_PATH_PORTABLE
                 ? launch_decode_portable(shape, args->dtype, device, stream)
             : path == FUSED_MLP_PATH_CLUSTER
                 ? launch_decode_cluster(shape, args->dtype, stream)
             : path == FUSED_MLP_PATH_WIDE
                 ? launch_decode_wide(shape, *args, device, stream)
             : path == FUSED_MLP_PATH_RESIDENT
                 ? launch_decode_resident(shape, args->dtype, device, stream)
             : path == FUSED_MLP_PATH_HOPPER
                 ? launch_decode_hopper(shape, args->dtype, device, stream)
                 : launch_decode_direct(shape, args->dtype, device, path == FUSED_MLP_PATH_DIRECT_PDL, stream);
    if (status != FUSED_MLP_OK)
      return status;
  }
  return FUSED_MLP_OK;
}

extern "C" const char *fused_mlp_status_text(int status) {
  switch (status) {
  case FUSED_MLP_BAD_ARGUMENT: return "an argument that the kernels do not know";
  case FUSED_MLP_WORKSPACE_TOO_SMALL: return "a workspace that is too small";
  case FUSED_MLP_UNSUPPORTED: return "a kernel that does not take this dtype, alignment or GPU";
  default: return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}
