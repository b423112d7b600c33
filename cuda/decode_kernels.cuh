// What the chooser (decode.cu) knows of the kernel families.
#pragma once
#include "decode_common.cuh"
#include "host.cuh"

namespace fused_mlp {

// What a device offers, looked up once.
struct DeviceFacts {
  int multiprocessors;
  int shared_bytes_per_block; // opt-in maximum
  int compute_capability;     // 90 for 9.0, or less: what this library's code was compiled for
  bool hopper;                // whether the code for sm_90a is there and runs here
};

// 1 to 64 tokens of bf16, f16 or f32; every row and x must lie on 16 bytes. `programmatic` asks for dependent launch.
int launch_decode_direct(const Shape &shape, int dtype, const DeviceFacts &device, bool programmatic,
                         cudaStream_t stream);
// Raises the kernels' shared-memory limit on the current device; once per device.
int prepare_decode_direct(const DeviceFacts &device);
// The architecture that the code which runs on the current device was compiled for: it may be older than the device.
int compiled_architecture(int *compute_capability);
// Most f32 values of `partial` that a call can need.
unsigned long long decode_direct_partial_elements(int output_size);

// 1 to 64 tokens of bf16, f16 or f32 on sm_90a; every row and x must lie on 16 bytes, and sizes be what can_decode_hopper
// takes.
bool can_decode_hopper(const DeviceFacts &device, int dtype, int hidden_size, int intermediate_size);
int launch_decode_hopper(const Shape &shape, int dtype, const DeviceFacts &device, cudaStream_t stream);
// Raises the kernels' shared-memory limit on the current device, and says whether they are there; once per device.
int prepare_decode_hopper(DeviceFacts &device);
unsigned long long decode_hopper_partial_elements(int output_size);

// 1 to RESIDENT_TOKENS tokens of bf16 or f16 on sm_90a, of sizes whose weights fit in the blocks' shared memory; every row
// and x must lie on 16 bytes.
bool can_decode_resident(const DeviceFacts &device, const FusedMlpArgs &args);
// Whether AUTO takes it: where it is faster than launch_decode_hopper, whose bits are the same.
bool decode_resident_is_chosen(const FusedMlpArgs &args);
int launch_decode_resident(const Shape &shape, int dtype, const DeviceFacts &device, cudaStream_t stream);
// Raises the kernels' shared-memory limit on the current device, where prepare_decode_hopper found them; once per device.
int prepare_decode_resident(const DeviceFacts &device);

// 1 to 64 tokens of the smallest models, of any dtype and alignment, from sm_90 on.
bool can_decode_cluster(const DeviceFacts &device, const FusedMlpArgs &args);
int launch_decode_cluster(const Shape &shape, int dtype, cudaStream_t stream);

// 1 to 64 tokens of bf16 or f16 on sm_90a; rows as for launch_decode_hopper, whose bits are the same. Whether it takes these sizes.
int can_decode_wide(const DeviceFacts &device, const FusedMlpArgs &args, bool *can);
// Whether AUTO takes it: where it is faster than launch_decode_hopper (PERFORMANCE.md).
bool decode_wide_is_chosen(const DeviceFacts &device, const FusedMlpArgs &args);
int launch_decode_wide(const Shape &shape, const FusedMlpArgs &args, const DeviceFacts &device, cudaStream_t stream);

// 1 to 64 tokens of anything.
int launch_decode_portable(const Shape &shape, int dtype, const DeviceFacts &device, cudaStream_t stream);

} // namespace fused_mlp
