// Hopper's own instructions: barriers in shared memory, tensor copies, warpgroup products; and, for the host, the
// tensor maps that the copies read. Device code exists for sm_90a only.
//
// A tile in shared memory is rows of 128 bytes whose eight pieces of 16 bytes are swizzled by the row's number (the
// tensor copy's 128-byte swizzle): what a warpgroup's product reads as a matrix with its depth contiguous. Tiles start on 1024
// bytes.
#pragma once
#include "element.cuh"
#include "fused_mlp.h"
#include "host.cuh"
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

namespace fused_mlp {

constexpr int SWIZZLE_BYTES = 128; // of one row of a tile
constexpr int SWIZZLE_ALIGN = 1024;
constexpr int WARPGROUP = 128; // threads

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FUSED_MLP_HOPPER 1
#endif

#ifdef FUSED_MLP_HOPPER

// ---------------------------------------------------------------------------------------------------------------------
// Barriers. Addresses are of shared memory, as `shared_address` gives them.

__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to the copies' unit (and, within a cluster, to its other blocks).
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Announces bytes that copies will bring, without arriving.
__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns when the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@done bra.uni over;\n"
               "bra.uni again;\n"
               "over:\n"
               "}\n" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor copies

// True in one thread of a warp, always the same one. The compiler knows that it is one: a copy's operands, which the hardware takes
// from registers of the warp, are then put there once and not in a loop over the threads that might differ.
__device__ __forceinline__ bool elected() {
  unsigned chosen;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}\n" : "=r"(chosen)::"memory");
  return chosen;
}
// The number of a thread's warp in its block, which the compiler knows to be the same for all of the warp.
__device__ __forceinline__ int warp_of_block() { return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0); }
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// A box of the matrix, from `column` and `row` on, to shared memory; zeros outside the matrix. The barrier gets the box's bytes.
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap *map, int column, int row, unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}
// The same as far as L2: nothing that this kernel reads before it has to, should another kernel be writing it.
__device__ __forceinline__ void prefetch_box(const CUtensorMap *map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}
// The same of a matrix that is described as chunks of columns: a box of several chunks, one after the other.
__device__ __forceinline__ void copy_chunks(unsigned to, const CUtensorMap *map, int row, int chunk, unsigned barrier,
                                         unsigned long long policy) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
               "l"(map), "r"(0), "r"(row), "r"(chunk), "r"(barrier), "l"(policy)
               : "memory");
}
// The same as far as L2: nothing that this kernel reads before it has to, should another kernel be writing it.
__device__ __forceinline__ void prefetch_chunks(const CUtensorMap *map, int row, int chunk) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(0), "r"(row), "r"(chunk)
               : "memory");
}
// Between ordinary stores to global memory and copies out of it.
__device__ __forceinline__ void fence_global_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A box to the same place in every block of the cluster that `blocks` has a bit for; each block's barrier at the same place
// gets the bytes.
__device__ __forceinline__ void copy_box_to_cluster(unsigned to, const CUtensorMap *map, int column, int row,
                                                    unsigned barrier, unsigned short blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
               "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
               : "memory");
}

// From shared memory to a box of the matrix; nothing outside the matrix is written. Belongs to the calling thread's group.
__device__ __forceinline__ void copy_box_out(const CUtensorMap *map, int column, int row, unsigned from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
__device__ __forceinline__ void copies_out_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns when shared memory has been read for all of the calling thread's groups but the last `PENDING`.
template <int PENDING> __device__ __forceinline__ void copies_out_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Returns when all of the calling thread's groups have been written.
__device__ __forceinline__ void copies_out_end() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Between a thread's ordinary stores to shared memory and copies of what it stored.
__device__ __forceinline__ void fence_shared_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A warp's four matrices of 8 x 8 elements of 16 bits, as a product's sums lie in it; lane i gives the address of row i % 8
// of matrix i / 8.
__device__ __forceinline__ void store_matrices(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// The same of the matrices' columns: lane i gives the address of column i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices_turned(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Waits for every thread of the cluster, and says nothing of what they wrote.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}
// The same, and what they wrote to shared memory before is visible after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Where another block of the cluster has what this block has at `address`.
__device__ __forceinline__ unsigned cluster_address(unsigned address, unsigned rank) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// For a barrier that guards no ordinary stores: releasing those to the cluster would take a microsecond.
__device__ __forceinline__ void barrier_arrive_in_cluster(unsigned there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}
__device__ __forceinline__ float4 load_from_cluster_16(unsigned there) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// Ordinary accesses to shared memory, and numbers as tensor cores take them

__device__ __forceinline__ float load_shared(unsigned address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared_16(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// The nearest number of 11 bits.
__device__ __forceinline__ unsigned rounded(float v) {
  unsigned r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}
// What a product takes of an f32 as it is, and the nearest such number to the rest of it.
__device__ __forceinline__ float high_part(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
__device__ __forceinline__ unsigned low_part(float v) { return rounded(v - high_part(v)); }

// ---------------------------------------------------------------------------------------------------------------------
// Registers of a warpgroup

template <int COUNT> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---------------------------------------------------------------------------------------------------------------------
// Warpgroup products: d (64 x N, f32) = a (64 x 16) b (N x 16)^T, plus what d was unless `accumulate` is 0; both tiles in
// shared memory.
//
// Thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4 (+ 8) and columns 8 j + 2 (t % 4) (+ 1):
// d[4 j + 2 i + e] is row + 8 i, column + e.

// What a product needs to know of a tile: where it starts, and how far apart its groups of eight rows are; 16 elements
// further are 32 bytes further.
__device__ __forceinline__ unsigned long long tile_descriptor(unsigned address,
                                                              unsigned group_bytes = SWIZZLE_ALIGN) {
  constexpr unsigned long long SWIZZLE_128 = 1ull << 62;
  return SWIZZLE_128 | static_cast<unsigned long long>(group_bytes >> 4) << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving reads and writes of the sums across a wait.
template <int COUNT> __device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    asm volatile("" : "+f"(d[i])::"memory");
}

template <typename T, int N> struct WarpgroupProduct;

#define FUSED_MLP_TEN(tens)                                                                                            \
  "%" #tens "0,%" #tens "1,%" #tens "2,%" #tens "3,%" #tens "4,%" #tens "5,%" #tens "6,%" #tens "7,%" #tens            \
  "8,%" #tens "9,"
#define FUSED_MLP_FORTY FUSED_MLP_TEN() FUSED_MLP_TEN(1) FUSED_MLP_TEN(2) FUSED_MLP_TEN(3)
#define FUSED_MLP_SEVENTY FUSED_MLP_FORTY FUSED_MLP_TEN(4) FUSED_MLP_TEN(5) FUSED_MLP_TEN(6)
#define FUSED_MLP_HUNDRED FUSED_MLP_SEVENTY FUSED_MLP_TEN(7) FUSED_MLP_TEN(8) FUSED_MLP_TEN(9)
#define FUSED_MLP_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FUSED_MLP_F8(i) FUSED_MLP_F4(i), FUSED_MLP_F4(i + 4)
#define FUSED_MLP_F16(i) FUSED_MLP_F8(i), FUSED_MLP_F8(i + 8)
#define FUSED_MLP_F32(i) FUSED_MLP_F16(i), FUSED_MLP_F16(i + 16)
#define FUSED_MLP_F64(i) FUSED_MLP_F32(i), FUSED_MLP_F32(i + 32)
#define FUSED_MLP_PRODUCT(T, NAME, N, LIST, A, B, FLAG, ...)                                                                 \
  template <> struct WarpgroupProduct<T, N> {                                                                          \
    static __device__ __forceinline__ void add(float (&d)[N / 2], unsigned long long a, unsigned long long b,          \
                                               int accumulate = 1) {                                                   \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " FLAG ", 0;\n"                               \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" LIST "}, " A ", " B           \
                   ", accumulate, 1, 1, 0, 0;\n}\n"                                                                   \
                   : __VA_ARGS__                                                                                       \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                                  \
    }                                                                                                                  \
  };
#define FUSED_MLP_PRODUCTS(T, NAME)                                                                                    \
  FUSED_MLP_PRODUCT(T, NAME, 8, "%0,%1,%2,%3", "%4", "%5", "%6", FUSED_MLP_F4(0))                                            \
  FUSED_MLP_PRODUCT(T, NAME, 16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8", "%9", "%10", FUSED_MLP_F8(0))                               \
  FUSED_MLP_PRODUCT(T, NAME, 32, FUSED_MLP_TEN() "%10,%11,%12,%13,%14,%15", "%16", "%17", "%18", FUSED_MLP_F16(0))            \
  FUSED_MLP_PRODUCT(T, NAME, 48, FUSED_MLP_TEN() FUSED_MLP_TEN(1) "%20,%21,%22,%23", "%24", "%25", "%26", FUSED_MLP_F16(0),   \
                    FUSED_MLP_F8(16))                                                                                  \
  FUSED_MLP_PRODUCT(T, NAME, 64, FUSED_MLP_TEN() FUSED_MLP_TEN(1) FUSED_MLP_TEN(2) "%30,%31", "%32", "%33", "%34",            \
                    FUSED_MLP_F32(0))                                                                                  \
  FUSED_MLP_PRODUCT(T, NAME, 96, FUSED_MLP_FORTY "%40,%41,%42,%43,%44,%45,%46,%47", "%48", "%49", "%50", FUSED_MLP_F32(0),    \
                    FUSED_MLP_F16(32))                                                                                 \
  FUSED_MLP_PRODUCT(T, NAME, 112, FUSED_MLP_FORTY FUSED_MLP_TEN(4) "%50,%51,%52,%53,%54,%55", "%56", "%57", "%58",            \
                    FUSED_MLP_F32(0), FUSED_MLP_F16(32), FUSED_MLP_F8(48))                                             \
  FUSED_MLP_PRODUCT(T, NAME, 128, FUSED_MLP_FORTY FUSED_MLP_TEN(4) FUSED_MLP_TEN(5) "%60,%61,%62,%63", "%64", "%65", "%66",   \
                    FUSED_MLP_F64(0))                                                                                  \
  FUSED_MLP_PRODUCT(T, NAME, 144, FUSED_MLP_SEVENTY "%70,%71", "%72", "%73", "%74", FUSED_MLP_F64(0), FUSED_MLP_F8(64))       \
  FUSED_MLP_PRODUCT(T, NAME, 160, FUSED_MLP_SEVENTY "%70,%71,%72,%73,%74,%75,%76,%77,%78,%79", "%80", "%81", "%82",           \
                    FUSED_MLP_F64(0), FUSED_MLP_F16(64))                                                               \
  FUSED_MLP_PRODUCT(T, NAME, 176, FUSED_MLP_SEVENTY FUSED_MLP_TEN(7) "%80,%81,%82,%83,%84,%85,%86,%87", "%88", "%89", "%90",   \
                    FUSED_MLP_F64(0), FUSED_MLP_F16(64), FUSED_MLP_F8(80))                                             \
  FUSED_MLP_PRODUCT(T, NAME, 192, FUSED_MLP_SEVENTY FUSED_MLP_TEN(7) FUSED_MLP_TEN(8) "%90,%91,%92,%93,%94,%95",       \
                    "%96", "%97", "%98", FUSED_MLP_F64(0), FUSED_MLP_F32(64))                                                 \
  FUSED_MLP_PRODUCT(T, NAME, 208, FUSED_MLP_HUNDRED "%100,%101,%102,%103", "%104", "%105", "%106", FUSED_MLP_F64(0),           \
                    FUSED_MLP_F32(64), FUSED_MLP_F8(96))                                                               \
  FUSED_MLP_PRODUCT(T, NAME, 224, FUSED_MLP_HUNDRED FUSED_MLP_TEN(10) "%110,%111", "%112", "%113", "%114", FUSED_MLP_F64(0),   \
                    FUSED_MLP_F32(64), FUSED_MLP_F16(96))                                                              \
  FUSED_MLP_PRODUCT(T, NAME, 256, FUSED_MLP_HUNDRED FUSED_MLP_TEN(10) FUSED_MLP_TEN(11)                                \
                    "%120,%121,%122,%123,%124,%125,%126,%127", "%128", "%129", "%130", FUSED_MLP_F64(0), FUSED_MLP_F64(64))
FUSED_MLP_PRODUCTS(__nv_bfloat16, "bf16")
FUSED_MLP_PRODUCTS(__half, "f16")
#undef FUSED_MLP_PRODUCTS
#undef FUSED_MLP_PRODUCT

// d (64 x N, f32) = a (64 x 8) b (N x 8)^T, plus what d was unless `accumulate` is 0, with 11 bits of each element's fraction. b is
// in shared memory; of a thread t has rows 16 (t / 32) + t % 32 / 4 (+ 8 for odd i) and columns t % 4 (+ 4 for i of 2 and 3).
template <int N> struct WarpgroupProductTf32;

#define FUSED_MLP_PRODUCT(N, LIST, A, B, FLAG, ...)                                                                    \
  template <> struct WarpgroupProductTf32<N> {                                                                         \
    static __device__ __forceinline__ void add(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b,        \
                                               int accumulate) {                                                       \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " FLAG ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" LIST "}, {" A "}, " B                   \
                   ", accumulate, 1, 1;\n}\n"                                                                          \
                   : __VA_ARGS__                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                             \
    }                                                                                                                  \
  };
FUSED_MLP_PRODUCT(64, FUSED_MLP_TEN() FUSED_MLP_TEN(1) FUSED_MLP_TEN(2) "%30,%31", "%32,%33,%34,%35", "%36", "%37",
                  FUSED_MLP_F32(0))
FUSED_MLP_PRODUCT(96, FUSED_MLP_FORTY "%40,%41,%42,%43,%44,%45,%46,%47", "%48,%49,%50,%51", "%52", "%53",
                  FUSED_MLP_F32(0), FUSED_MLP_F16(32))
FUSED_MLP_PRODUCT(128, FUSED_MLP_FORTY FUSED_MLP_TEN(4) FUSED_MLP_TEN(5) "%60,%61,%62,%63", "%64,%65,%66,%67", "%68",
                  "%69", FUSED_MLP_F64(0))
FUSED_MLP_PRODUCT(160, FUSED_MLP_SEVENTY "%70,%71,%72,%73,%74,%75,%76,%77,%78,%79", "%80,%81,%82,%83", "%84", "%85",
                  FUSED_MLP_F64(0), FUSED_MLP_F16(64))
#undef FUSED_MLP_PRODUCT
#undef FUSED_MLP_F64
#undef FUSED_MLP_F32
#undef FUSED_MLP_F16
#undef FUSED_MLP_F8
#undef FUSED_MLP_F4
#undef FUSED_MLP_HUNDRED
#undef FUSED_MLP_SEVENTY
#undef FUSED_MLP_FORTY
#undef FUSED_MLP_TEN

#endif // FUSED_MLP_HOPPER

// ---------------------------------------------------------------------------------------------------------------------
// Tensor maps, made on the host

// The driver's function that makes tensor maps, looked up once; null on a driver that has none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found)
               : nullptr;
  }();
  return encoder;
}

inline int map_element_bytes(int dtype) { return dtype == FUSED_MLP_F32 ? 4 : 2; }
inline CUtensorMapDataType map_type(int dtype) {
  return dtype == FUSED_MLP_F32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : dtype == FUSED_MLP_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Describes a matrix whose rows are `stride` elements apart, to be copied in boxes of `box_rows` rows and 128 bytes of columns,
// or of 64 or 32 bytes, swizzled over as many.
inline int encode_tensor_map(CUtensorMap *map, int dtype, const void *matrix, long long rows, long long columns,
                             long long stride, int box_rows, int box_bytes = SWIZZLE_BYTES) {
  const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  if (!encode)
    return FUSED_MLP_UNSUPPORTED;
  const int element = map_element_bytes(dtype);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * element};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes / element), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, map_type(dtype), 2, const_cast<void *>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
             : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                               : CU_TENSOR_MAP_SWIZZLE_32B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? FUSED_MLP_OK : FUSED_MLP_UNSUPPORTED;
}

// What encode_tensor_map is given.
struct BoxKey {
  const void *matrix;
  long long rows, columns, stride;
  int dtype, box_rows, box_bytes;
  bool operator==(const BoxKey &o) const {
    return matrix == o.matrix && rows == o.rows && columns == o.columns && stride == o.stride && dtype == o.dtype &&
           box_rows == o.box_rows && box_bytes == o.box_bytes;
  }
};

// Tensors lie on multiples of 256 bytes at least, most of them far apart; of one there are some maps.
inline unsigned long long map_hash(const void *matrix, int box_rows, int box_columns) {
  return reinterpret_cast<unsigned long long>(matrix) >> 4 ^ static_cast<unsigned long long>(box_columns * 31 + box_rows) << 40;
}

// encode_tensor_map, remembered: a map is a function of its key alone, and a model asks for the same ones in every step.
inline int box_map(CUtensorMap *map, const BoxKey &key) {
  static thread_local Memory<BoxKey, CUtensorMap, 10> memory;
  return memory.get(key, map_hash(key.matrix, key.box_rows, key.box_bytes), map, [&](CUtensorMap *found) {
    return encode_tensor_map(found, key.dtype, key.matrix, key.rows, key.columns, key.stride, key.box_rows, key.box_bytes);
  });
}

constexpr int MOST_BOX_CHUNKS = 256;
constexpr long long MOST_MAP_STRIDE = 1ll << 40; // bytes

// Describes the same matrix as chunks of 128 bytes of columns, to be copied in boxes of `box_chunks` chunks of `box_rows` rows;
// or two such matrices (or one) that lie `distance` bytes apart, in boxes that have a chunk's rows of both, then the next
// chunk's. The columns are whole chunks.
inline int encode_chunk_map(CUtensorMap *map, int dtype, const void *matrix, long long rows, long long columns,
                            long long stride, int box_rows, int box_chunks, int matrices = 1, long long distance = 0) {
  const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  if (!encode)
    return FUSED_MLP_UNSUPPORTED;
  constexpr int MOST = 4;
  const int element = map_element_bytes(dtype);
  const cuuint32_t chunk = SWIZZLE_BYTES / element;
  const int between = distance > 0 ? 1 : 0, dimensions = 3 + between;
  cuuint64_t sizes[MOST] = {chunk, static_cast<cuuint64_t>(rows), 0, 0}, strides[MOST - 1] = {};
  cuuint32_t box[MOST] = {chunk, static_cast<cuuint32_t>(box_rows), 0, 0}, steps[MOST] = {1, 1, 1, 1};
  strides[0] = static_cast<cuuint64_t>(stride) * element;
  if (between) {
    sizes[2] = box[2] = static_cast<cuuint32_t>(matrices);
    strides[1] = static_cast<cuuint64_t>(distance);
  }
  sizes[2 + between] = static_cast<cuuint64_t>(columns) / chunk;
  box[2 + between] = static_cast<cuuint32_t>(box_chunks);
  strides[1 + between] = SWIZZLE_BYTES;
  const CUresult result =
      encode(map, map_type(dtype), dimensions, const_cast<void *>(matrix), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? FUSED_MLP_OK : FUSED_MLP_UNSUPPORTED;
}

} // namespace fused_mlp
