// What the decode kernels share: the workspace's layout, memory-ordered atomics, asynchronous copies, dependent launch.
#pragma once
#include "activation.cuh"
#include "element.cuh"
#include "fused_mlp.h"
#include <cuda_runtime.h>

namespace fused_mlp {

constexpr int MAX_TOKENS = 64;   // of one launch
constexpr int MAX_BLOCKS = 1024; // of one launch; each has a claim word
constexpr int RESIDENT_TOKENS = 32;      // of one launch of decode_resident.cu, at most
constexpr int RESIDENT_ELEMENTS = 49152; // of its hidden rows, at most

// Head of the workspace. All zero between launches, but for the last two: whoever is last to need a counter puts it back to
// zero, so a graph replay finds it as the first launch did. Hot counters have a 128-byte line each.
struct Counters {
  unsigned arrived; // slices of the first layer that are complete
  unsigned pad0[31];
  unsigned passed; // blocks that need neither `arrived` nor `claim` any more; wraps to zero by itself
  unsigned pad1[31];
  unsigned ticket; // next unit of work of the portable kernel
  unsigned pad2[31];
  unsigned claim[MAX_BLOCKS];   // 1: some running block computes this slice of the first layer
  unsigned group_done[MAX_BLOCKS]; // partial sums of a down-projection group; wraps to zero by itself
  // Of decode_resident.cu, and not put back to zero: its launches on this workspace, as each block counts them, and how
  // many 16-byte pieces of each exchange buffer its last launch on that buffer used.
  unsigned turn[MAX_BLOCKS];
  int used[2];
};

// The arguments as kernels take them, with what the host derived.
struct Shape {
  const void *x, *gate, *up, *down, *bias_gate, *bias_up, *bias_down;
  void *out;
  Counters *counters;
  void *hidden;   // tokens rows of hidden_stride elements
  float *partial; // group sums of the down projection, [split][tokens][output_size]
  unsigned short *exchange; // two buffers of RESIDENT_ELEMENTS
  long long x_stride, gate_stride, up_stride, down_stride, hidden_stride;
  int tokens, hidden_size, intermediate_size, output_size;
  int gated;
  Activation activation;
  double activation_param;
};

__device__ __forceinline__ unsigned load_acquire(const unsigned *p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Adds 1, for whoever loads it to see all that this thread knows of: less than a fence of all memory and an atomic after it.
__device__ __forceinline__ void add_release(unsigned *p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
// 32 bytes, as far as L2.
__device__ __forceinline__ void prefetch_line(const void *from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// Waits until everything that the stream ran before this kernel is complete and visible. A no-op unless the launch
// was programmatic.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the stream's next programmatic kernel be scheduled once every block has said so (or ended).
__device__ __forceinline__ void release_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ unsigned shared_address(const void *p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

#if __CUDA_ARCH__ >= 800
// 16 bytes from global to shared memory without a register; writes zeros, reading nothing, when `valid` is false.
__device__ __forceinline__ void copy_async_16(unsigned shared, const void *global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
// For weights, which no other launch soon needs: they leave L2 first, and x and the hidden rows stay.
__device__ __forceinline__ unsigned long long evict_first_policy() {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// For what many blocks read.
__device__ __forceinline__ unsigned long long evict_last_policy() {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ unsigned load_shared_4(unsigned address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_shared_16(unsigned address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                            unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4], unsigned a0, unsigned a1, unsigned a2,
                                                           unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                    unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

} // namespace fused_mlp
