// The products of an MLP of many tokens by the tensor cores of sm_80 and newer: a kernel for a few shapes of tiles.
//
// Rows (tokens) times weights' rows, both with their depth contiguous. A ring of stages in shared memory is kept filled by
// asynchronous copies of 16 bytes, which go on from one tile to a block's next one; each warp multiplies its part of a tile
// out of registers that are loaded a product ahead. What the sums go through before they are written happens where they
// are: bias, activation, the product of gate and up, rounding. A gated tile's weights are as many rows of the gate as of
// up, and a warp has both of its columns.
//
// A sum's products are added in the order of the depth, whatever the tile, so a row's bits depend on nothing but the number
// of parts that the depth is split into; those are added in their order by whichever block is last.
#pragma once
#include "decode_common.cuh"
#include "finish.cuh"
#include "gemm_ampere.h"
#include "host.cuh"

namespace fused_mlp {
namespace {

// A product as the kernel takes it.
struct Product {
  const char *rows, *weights, *up;
  long long rows_stride, weights_stride, up_stride; // bytes
  char *out;
  long long out_stride;       // bytes
  const void *bias, *bias_up; // or null
  unsigned *clear;            // flags that this kernel puts to 0 for the next, or null
  unsigned *flags;            // for each tile of a split depth: how many of its parts there are
  float *sums;                // the parts
  int tokens, columns;        // of the output
  int depth, stages;
  int row_tiles, column_tiles;
  int group; // row tiles that share the weights they read from L2
  int split;
  bool weights_early; // the kernel before does not write the weights, and ran after all that may
  Finish finish;
  float slope; // of Swish: v / (1 + exp(-slope v))
};

// Which way a tile is computed.
//   ROWS, WEIGHTS: tokens and weights' rows of a tile; a gated tile's output has half as many columns
//   DEPTH: elements of a stage
//   WARP_ROWS, WARP_WEIGHTS: of a warp
//   STAGES: of the ring
//   BLOCKS: that share a multiprocessor's registers
template <typename T_, bool GATED_, int ROWS_, int WEIGHTS_, int DEPTH_, int WARP_ROWS_, int WARP_WEIGHTS_, int STAGES_,
          int BLOCKS_>
struct Tile {
  using T = T_;
  static constexpr bool GATED = GATED_;
  static constexpr int ROWS = ROWS_, WEIGHTS = WEIGHTS_, DEPTH = DEPTH_, STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int WARP_ROWS = WARP_ROWS_, WARP_WEIGHTS = WARP_WEIGHTS_;
  static constexpr int ROW_WARPS = ROWS / WARP_ROWS, WARPS = ROW_WARPS * (WEIGHTS / WARP_WEIGHTS), THREADS = 32 * WARPS;
  static constexpr int COLUMNS = GATED ? WEIGHTS / 2 : WEIGHTS, WARP_COLUMNS = GATED ? WARP_WEIGHTS / 2 : WARP_WEIGHTS;
  static constexpr int PRODUCTS = DEPTH / 16;                        // of a stage, 16 elements deep
  static constexpr int MT = WARP_ROWS / 16, NT = WARP_WEIGHTS / 8;   // of each, a warp's 16 x 8
  static constexpr int PIECES = DEPTH / 8, LINE = 16 * PIECES;       // of 16 bytes in a row of a stage, and its bytes
  static constexpr int STEP = THREADS / PIECES;                      // rows of a stage that the block copies at once
  static constexpr int COPIES = (ROWS + WEIGHTS) / STEP, ROW_COPIES = ROWS / STEP, GATE_COPIES = COLUMNS / STEP;
  static constexpr int STAGE_BYTES = (ROWS + WEIGHTS) * LINE;
  static constexpr int OUTBOX_BYTES = 16 * WARP_COLUMNS * 2; // of a warp
  static constexpr int BIAS_BYTES = WEIGHTS * 2;             // of a tile; there are two
  static constexpr int TOTAL_BYTES = STAGES * STAGE_BYTES + WARPS * OUTBOX_BYTES + 2 * BIAS_BYTES + 16;
  static_assert(WARP_ROWS % 16 == 0 && WARP_COLUMNS % 16 == 0, "a warp's part is whole products");
  static_assert(ROWS % STEP == 0 && COLUMNS % STEP == 0 && STEP % 8 == 0, "a block's copies are whole rows");
  static_assert(WEIGHTS <= THREADS && COPIES <= 32, "a thread has a bias, and a bit for each of its copies");
};

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ void load_matrices(unsigned address, unsigned &a, unsigned &b, unsigned &c, unsigned &d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_shared_4(unsigned address, unsigned v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// Where a row's piece of 16 bytes lies among rows of so many: swizzled, so that the same piece of eight rows lies in all
// banks.
template <int PIECES> __device__ __forceinline__ unsigned swizzled(int row, int piece) {
  return 16 * (row * PIECES + (piece ^ row / (8 / PIECES) % PIECES));
}

// One part of one tile's depth: rows fastest within a group of row tiles, whose rows stay in L2 while the weights go by.
struct Place {
  int tile, part, row_tile, column_tile;
  __device__ Place(const Product &p, int item) : tile(item / p.split), part(item % p.split) {
    const int per_group = p.group * p.column_tiles, group = tile / per_group * p.group, in_group = tile % per_group;
    const int height = min(p.group, p.row_tiles - group);
    row_tile = group + in_group % height;
    column_tile = in_group / height;
  }
  __device__ int first_stage(const Product &p) const { return part * p.stages / p.split; }
  __device__ int end_stage(const Product &p) const { return (part + 1) * p.stages / p.split; }
};
__device__ __forceinline__ int items_of(const Product &p) { return p.row_tiles * p.column_tiles * p.split; }

// What a thread copies: one piece of every STEP-th row, stage after stage, of all that the block computes.
template <class K> struct Loader {
  const Product &p;
  const char *rows, *weights, *up; // its piece of its first row of each
  unsigned there;                  // a bit for each of its rows: whether it exists
  unsigned to;                     // where its first row's piece is in a stage
  int element;                     // of the depth, where its pieces start
  int item, left;                  // stages of the item that it has not asked for

  __device__ Loader(const Product &p, unsigned base) : p(p), item(blockIdx.x) {
    to = base + swizzled<K::PIECES>(threadIdx.x / K::PIECES, threadIdx.x % K::PIECES);
    place();
  }
  __device__ void place() {
    left = 0;
    if (item >= items_of(p))
      return;
    const Place at(p, item);
    left = at.end_stage(p) - at.first_stage(p);
    element = at.first_stage(p) * K::DEPTH + threadIdx.x % K::PIECES * 8;
    const int row = at.row_tile * K::ROWS + threadIdx.x / K::PIECES;
    const int column = at.column_tile * K::COLUMNS + threadIdx.x / K::PIECES;
    const long long offset = 2ll * element;
    rows = p.rows + row * p.rows_stride + offset;
    weights = p.weights + column * p.weights_stride + offset;
    up = K::GATED ? p.up + column * p.up_stride + offset : nullptr;
    there = 0;
#pragma unroll
    for (int i = 0; i < K::COPIES; ++i)
      if (i < K::ROW_COPIES ? row + i * K::STEP < p.tokens
                            : column + (i - K::ROW_COPIES) % K::GATE_COPIES * K::STEP < p.columns)
        there |= 1u << i;
  }
  __device__ bool more() const { return left > 0; }
  __device__ const char *source(int i) const {
    constexpr int UP = K::ROW_COPIES + K::GATE_COPIES;
    return i < K::ROW_COPIES ? rows + i * K::STEP * p.rows_stride
           : i < UP          ? weights + (i - K::ROW_COPIES) * K::STEP * p.weights_stride
                             : up + (i - UP) * K::STEP * p.up_stride;
  }
  // Copies `FIRST` to `END` of the stage to a place in the ring; zeros where there is nothing.
  template <int FIRST, int END> __device__ void copy(int slot) const {
    const bool deep = element < p.depth;
#pragma unroll
    for (int i = FIRST; i < END; ++i)
      copy_async_16(to + slot * K::STAGE_BYTES + i * K::STEP * K::LINE, source(i), deep && (there >> i & 1));
  }
  // Brings the stage's weights to L2.
  __device__ void prefetch_weights() const {
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (int i = K::ROW_COPIES; i < K::COPIES; ++i)
      if (threadIdx.x % K::PIECES == 0 && (there >> i & 1))
        asm volatile("prefetch.global.L2 [%0];" ::"l"(source(i)));
#endif
  }
  __device__ void advance() {
    rows += K::LINE;
    weights += K::LINE;
    up += K::LINE;
    element += K::DEPTH;
    if (--left <= 0 && item < items_of(p)) {
      item += gridDim.x;
      place();
    }
  }
};

// A warp's operands of a product 16 elements deep.
template <class K> struct Operand {
  unsigned rows[K::MT][4], weights[K::NT][2];
};

template <class K> struct Multiplier {
  unsigned rows, weights; // a lane's row of the first matrices in a stage, with its swizzled piece
  __device__ explicit Multiplier(unsigned base) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp % K::ROW_WARPS * K::WARP_ROWS + lane % 16;
    const int weight = warp / K::ROW_WARPS * K::WARP_COLUMNS + lane / 16 * 8 + lane % 8;
    rows = base + swizzled<K::PIECES>(row, lane / 16);
    weights = base + K::ROWS * K::LINE + swizzled<K::PIECES>(weight, lane / 8 % 2);
  }
  // The pieces of a product lie where the first product's do, but for bits of the address that its number flips.
  __device__ void load(Operand<K> &o, int slot, int product) const {
    const unsigned r = (rows ^ 32 * product) + slot * K::STAGE_BYTES, w = (weights ^ 32 * product) + slot * K::STAGE_BYTES;
#pragma unroll
    for (int m = 0; m < K::MT; ++m)
      load_matrices(r + 16 * m * K::LINE, o.rows[m][0], o.rows[m][1], o.rows[m][2], o.rows[m][3]);
#pragma unroll
    for (int n = 0; n < K::NT; n += 2) {
      const int weight = K::GATED && n >= K::NT / 2 ? K::COLUMNS + 8 * (n - K::NT / 2) : 8 * n;
      load_matrices(w + weight * K::LINE, o.weights[n][0], o.weights[n][1], o.weights[n + 1][0], o.weights[n + 1][1]);
    }
  }
  __device__ void multiply(float (&sums)[K::MT][K::NT][4], const Operand<K> &o) const {
#pragma unroll
    for (int m = 0; m < K::MT; ++m)
#pragma unroll
      for (int i = 0; i < K::NT; ++i) {
        const int n = m % 2 ? K::NT - 1 - i : i;
        mma_16x8x16<typename K::T>(sums[m][n], o.rows[m][0], o.rows[m][1], o.rows[m][2], o.rows[m][3], o.weights[n][0],
                                   o.weights[n][1]);
      }
  }
};

// Writes a warp's part of a tile, 16 rows at a time: there is code for one such strip, to which the others' sums are moved.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_tile(const Product &p, const Place &at, float (&sums)[K::MT][K::NT][4], unsigned outbox,
                                           unsigned biases) {
  constexpr int PIECES = K::WARP_COLUMNS / 8; // of a row
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_column = warp / K::ROW_WARPS * K::WARP_COLUMNS;
  const int row = at.row_tile * K::ROWS + warp % K::ROW_WARPS * K::WARP_ROWS + lane / PIECES;
  const int column = at.column_tile * K::COLUMNS + warp_column + lane % PIECES * 8;
  char *out = p.out + row * p.out_stride + column * 2ll;
  biases += 2 * (warp_column + 2 * (lane % 4));
#pragma unroll 1
  for (int m = 0; m < K::MT; ++m) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const float2 bias = unpack(typename K::T(), load_shared_4(biases + 16 * i));
      float2 bias_up = {0.f, 0.f};
      if (K::GATED)
        bias_up = unpack(typename K::T(), load_shared_4(biases + 16 * i + 2 * K::COLUMNS));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float low = finished<FINISH>(sums[0][i][2 * r] + bias.x, p.slope);
        float high = finished<FINISH>(sums[0][i][2 * r + 1] + bias.y, p.slope);
        if (K::GATED) {
          low *= sums[0][(i + PIECES) % K::NT][2 * r] + bias_up.x;
          high *= sums[0][(i + PIECES) % K::NT][2 * r + 1] + bias_up.y;
        }
        store_shared_4(outbox + swizzled<PIECES>(lane / 4 + 8 * r, i) + 4 * (lane % 4), pack(typename K::T(), low, high));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PIECES / 2; ++i) {
      constexpr int STEP = 32 / PIECES; // rows that a warp writes at once
      if (row + 16 * m + i * STEP < p.tokens && column < p.columns)
        *reinterpret_cast<uint4 *>(out + i * STEP * p.out_stride) =
            load_shared_16(outbox + swizzled<PIECES>(lane / PIECES + i * STEP, lane % PIECES));
    }
    __syncwarp();
    out += 16 * p.out_stride;
#pragma unroll
    for (int next = 1; next < K::MT; ++next)
#pragma unroll
      for (int n = 0; n < K::NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[next - 1][n][i] = sums[next][n][i];
  }
}

template <class K> __device__ __forceinline__ void clear(float (&sums)[K::MT][K::NT][4]) {
#pragma unroll
  for (int m = 0; m < K::MT; ++m)
#pragma unroll
    for (int n = 0; n < K::NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[m][n][i] = 0.f;
}

// Puts a block's sums of a part of the depth beside the tile's other ones. The block that finds all there takes the sum of
// them, in their order, and the others have no more to do with the tile.
template <class K>
__device__ __forceinline__ bool meet(const Product &p, const Place &at, float (&sums)[K::MT][K::NT][4], unsigned answer) {
  constexpr int PART = K::ROWS * K::WEIGHTS;
  float *const parts = p.sums + static_cast<long long>(at.tile) * p.split * PART + threadIdx.x * 4;
#pragma unroll
  for (int m = 0; m < K::MT; ++m)
#pragma unroll
    for (int n = 0; n < K::NT; ++n)
      __stcg(reinterpret_cast<float4 *>(parts + at.part * PART + (m * K::NT + n) * K::THREADS * 4),
             make_float4(sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    store_shared_4(answer, atomicInc(p.flags + at.tile, p.split - 1) == p.split - 1);
  __syncthreads();
  if (!load_shared_4(answer))
    return false;
  __threadfence();
  clear<K>(sums);
#pragma unroll 1
  for (int part = 0; part < p.split; ++part)
#pragma unroll
    for (int m = 0; m < K::MT; ++m)
#pragma unroll
      for (int n = 0; n < K::NT; ++n) {
        const float4 v = __ldcg(reinterpret_cast<const float4 *>(parts + part * PART + (m * K::NT + n) * K::THREADS * 4));
        sums[m][n][0] += v.x;
        sums[m][n][1] += v.y;
        sums[m][n][2] += v.z;
        sums[m][n][3] += v.w;
      }
  return true;
}

// A thread's bias of a tile, 0 where there is none.
template <class K> __device__ __forceinline__ unsigned short bias_of(const Product &p, const Place &at) {
  const int i = threadIdx.x;
  const bool second = K::GATED && i >= K::COLUMNS;
  const void *const bias = second ? p.bias_up : p.bias;
  const int column = at.column_tile * K::COLUMNS + (second ? i - K::COLUMNS : i);
  return bias && i < K::WEIGHTS && column < p.columns ? static_cast<const unsigned short *>(bias)[column] : 0;
}

#endif // __CUDA_ARCH__ >= 800

template <class K> __global__ void __launch_bounds__(K::THREADS, K::BLOCKS) product_kernel(const __grid_constant__ Product p) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned base = shared_address(shared);
  const unsigned outbox = base + K::STAGES * K::STAGE_BYTES + threadIdx.x / 32 * K::OUTBOX_BYTES;
  const unsigned all_biases = base + K::STAGES * K::STAGE_BYTES + K::WARPS * K::OUTBOX_BYTES;
  const unsigned answer = all_biases + 2 * K::BIAS_BYTES;

  Loader<K> loader(p, base);
  // What can be asked for before the kernel before is over.
  Loader<K> early = loader;
  for (int stage = 0; stage < K::STAGES - 1; ++stage) {
    if (early.more() && p.weights_early)
      early.template copy<K::ROW_COPIES, K::COPIES>(stage);
    else if (early.more())
      early.prefetch_weights();
    early.advance();
  }
  wait_for_previous_kernel();
  release_next_kernel();
  for (int stage = 0; stage < K::STAGES - 1; ++stage) {
    if (loader.more()) {
      loader.template copy<0, K::ROW_COPIES>(stage);
      if (!p.weights_early)
        loader.template copy<K::ROW_COPIES, K::COPIES>(stage);
    }
    loader.advance();
    commit_copies();
  }
  if (p.clear && blockIdx.x == 0)
    for (int i = threadIdx.x; i < MEETINGS; i += K::THREADS)
      p.clear[i] = 0;

  const Multiplier<K> multiplier(base);
  Operand<K> operands[2];
  int slot = 0, turn = 0;
  wait_copies<K::STAGES - 2>();
  __syncthreads();
  for (int item = blockIdx.x; item < items_of(p); item += gridDim.x) {
    const Place at(p, item);
    const unsigned biases = all_biases + turn * K::BIAS_BYTES;
    // Asked for before the products, put in shared memory before the last ones.
    const unsigned short bias = bias_of<K>(p, at);
    float sums[K::MT][K::NT][4];
    clear<K>(sums);
    multiplier.load(operands[0], slot, 0); // again: while a tile is written there are no registers for it
    for (int left = at.end_stage(p) - at.first_stage(p); left > 0; --left) {
      if (left == 1 && threadIdx.x < K::WEIGHTS)
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(biases + 2 * threadIdx.x), "h"(bias) : "memory");
      const bool more = loader.more();
      const int free_slot = slot == 0 ? K::STAGES - 1 : slot - 1;
#pragma unroll
      for (int product = 0; product < K::PRODUCTS; ++product) {
        if (product == K::PRODUCTS - 1) {
          // The next stage has come, and nobody reads this one any more.
          wait_copies<K::STAGES - 2>();
          __syncthreads();
          slot = slot + 1 == K::STAGES ? 0 : slot + 1;
        }
        multiplier.load(operands[(product + 1) % 2], slot, (product + 1) % K::PRODUCTS);
        if (product == 0 && more)
          loader.template copy<0, K::ROW_COPIES>(free_slot);
        if (product == (K::PRODUCTS > 2 ? 1 : 0) && more)
          loader.template copy<K::ROW_COPIES, K::COPIES>(free_slot);
        multiplier.multiply(sums, operands[product % 2]);
        if (product == K::PRODUCTS - 2) {
          loader.advance();
          commit_copies();
        }
      }
    }
    if constexpr (!K::GATED)
      if (p.split > 1 && !meet<K>(p, at, sums, answer))
        continue;
    with_finish<K::GATED>(p.finish, [&](auto finish) { write_tile<K, finish>(p, at, sums, outbox, biases); });
    turn ^= 1;
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Row tiles of so many tokens take turns with the weights that go by.
constexpr int GROUP_TOKENS = 2048;

// Blocks that the device runs at once, asked for once; 0 of those that do not fit.
template <class K> int resident_blocks(int *blocks) {
  static PerDevice<int> known;
  return known.get(blocks, [](int device, int *found) -> int {
    int limit = 0, multiprocessors = 0, each = 0;
    cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess && K::TOTAL_BYTES <= limit) {
      error = cudaFuncSetAttribute(product_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, K::TOTAL_BYTES);
      if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, product_kernel<K>, K::THREADS, K::TOTAL_BYTES);
    }
    *found = each * multiprocessors;
    return error;
  });
}

// Whether the kernel waits for the one before itself: as code for sm_90 does, on such a device. Asked for once.
template <class K> int launches_dependently(bool *does) {
  static PerDevice<bool> known;
  return known.get(does, [](int device, bool *found) -> int {
    int major = 0;
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaFuncGetAttributes(&attributes, product_kernel<K>);
    *found = major >= 9 && attributes.ptxVersion >= 90;
    return error;
  });
}

template <class K, int SPLIT> int enqueue(const Operands &o, cudaStream_t stream) {
  int blocks = 0, status = resident_blocks<K>(&blocks);
  bool dependent = false;
  if (status == FUSED_MLP_OK)
    status = blocks > 0 ? launches_dependently<K>(&dependent) : FUSED_MLP_UNSUPPORTED;
  if (status != FUSED_MLP_OK)
    return status;
  Product p;
  p.rows = static_cast<const char *>(o.rows);
  p.weights = static_cast<const char *>(o.weights);
  p.up = static_cast<const char *>(o.up);
  p.rows_stride = 2 * o.rows_stride;
  p.weights_stride = 2 * o.weights_stride;
  p.up_stride = 2 * o.up_stride;
  p.out = static_cast<char *>(o.out);
  p.out_stride = 2 * o.out_stride;
  p.bias = o.bias;
  p.bias_up = o.bias_up;
  p.clear = static_cast<unsigned *>(o.clear);
  p.flags = static_cast<unsigned *>(o.meeting);
  p.sums = reinterpret_cast<float *>(p.flags + MEETINGS);
  p.tokens = o.tokens;
  p.columns = o.columns;
  p.depth = o.depth;
  p.stages = divide_up(o.depth, K::DEPTH);
  p.row_tiles = divide_up(o.tokens, K::ROWS);
  p.column_tiles = divide_up(o.columns, K::COLUMNS);
  p.group = GROUP_TOKENS / K::ROWS;
  p.split = SPLIT < p.stages ? SPLIT : p.stages;
  p.weights_early = o.weights_early;
  p.finish = o.finish;
  p.slope = o.slope;

  const int items = p.row_tiles * p.column_tiles * p.split;
  return launch_kernel(product_kernel<K>, {blocks < items ? blocks : items, K::THREADS, K::TOTAL_BYTES, dependent}, stream, p);
}

template <class K, int SPLIT = 1> constexpr Variant variant() {
  static_assert(SPLIT == 1 || !K::GATED, "a split tile's sums are those of one product");
  return {K::GATED, false, K::ROWS, K::WEIGHTS, K::COLUMNS, 1, 1, SPLIT, 1, resident_blocks<K>, enqueue<K, SPLIT>};
}

// Rows, weights' rows, depth of a stage, rows and weights' rows of a warp, stages, blocks of a multiprocessor.
template <typename T, bool GATED> using Largest = Tile<T, GATED, 128, 256, 64, 64, 64, 3, 1>;
template <typename T, bool GATED> using Large = Tile<T, GATED, 128, 128, 64, 64, 32, 4, 1>;
template <typename T, bool GATED> using Shallow = Tile<T, GATED, 128, 128, 32, 64, 32, 4, 1>; // fits 99 KB
template <typename T> using Narrow = Tile<T, false, 128, 64, 64, 32, 64, 6, 1>;
template <typename T> using Deep = Tile<T, false, 64, 64, 64, 32, 32, 8, 1>;
template <typename T, bool GATED> using Small = Tile<T, GATED, 64, 64, 64, 32, 32, 4, 3>; // fits 99 KB

// The tiles that were fastest for some shape on an H100, and two that any device has room for.
template <typename T> const Variant *variants_of(int *count) {
  static const Variant variants[] = {
      variant<Largest<T, true>>(),     variant<Large<T, true>>(),       variant<Shallow<T, true>>(),
      variant<Small<T, true>>(),       variant<Largest<T, false>>(),    variant<Largest<T, false>, 2>(),
      variant<Largest<T, false>, 4>(), variant<Large<T, false>>(),      variant<Large<T, false>, 2>(),
      variant<Large<T, false>, 4>(),   variant<Large<T, false>, 8>(),   variant<Shallow<T, false>>(),
      variant<Shallow<T, false>, 2>(), variant<Shallow<T, false>, 4>(), variant<Narrow<T>>(),
      variant<Narrow<T>, 2>(),         variant<Narrow<T>, 4>(),         variant<Deep<T>>(),
      variant<Small<T, false>>(),      variant<Small<T, false>, 2>(),   variant<Small<T, false>, 4>(),
      variant<Small<T, false>, 8>(),
  };
  *count = sizeof(variants) / sizeof(variants[0]);
  return variants;
}

} // namespace
} // namespace fused_mlp
