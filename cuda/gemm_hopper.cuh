// The products of an MLP of many tokens, on Hopper's tensor cores: a kernel for many shapes of tiles.
//
// Rows (tokens) times weights' rows, both with their depth contiguous, in tiles. A producer thread keeps a ring of
// stages in shared memory filled by tensor copies, two or three warpgroups multiply, and what a tile's sums go through before
// they are written happens in the registers that hold them: bias, activation, the product of gate and up, rounding. A
// gated tile's weights are as many rows of the gate as of up, so both sums of a hidden element are in one thread.
// Launches are programmatically dependent: one begins while the one before ends, and waits for it only where it reads
// what that writes.
#pragma once
#include "decode_common.cuh"
#include "finish.cuh"
#include "gemm_kernels.cuh"
#include "hopper.cuh"

namespace fused_mlp {
namespace {

constexpr int SHARED_BYTES = 227 * 1024; // of one block, at most

// The warpgroups of a block: the producer's and some consumers'. A multiprocessor has 512 registers for each thread of one.
template <int CONSUMERS_> struct Warpgroups {
  static_assert(CONSUMERS_ == 2 || CONSUMERS_ == 3, "registers for two or three");
  static constexpr int CONSUMERS = CONSUMERS_, THREADS = (1 + CONSUMERS) * WARPGROUP;
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
};

// A product as the kernel takes it.
struct Product {
  CUtensorMap rows;    // tokens x depth, in boxes of what a block copies of a tile's rows
  CUtensorMap last_rows; // the same in one box of the last tile's tokens, where they are fewer
  CUtensorMap weights; // of a gated tile: the gate
  CUtensorMap up;      // the other half of a tile's weights: up, or the same weights
  CUtensorMap out;     // in boxes of what is written at once, if the kernel writes by copies
  void *out_rows;
  long long out_stride;
  const void *bias, *bias_up; // or null
  unsigned *clear;     // flags that this kernel puts to 0 for the next, or null
  unsigned *flags;     // of blocks that have handed over their sums, and those sums
  float *sums;
  int tokens, columns; // of the output
  int stages;          // of the whole depth
  int row_tiles, column_tiles; // row tiles of a cluster
  int group;           // row tiles that share the weights they read from L2
  int weights_early;   // the kernel before does not write the weights, and ran after all that may
  Finish finish;
  float slope;         // of Swish: v / (1 + exp(-slope v))
};

// Which way a tile is computed.
//   ROWS: tokens of a tile, 64 per 64-row product of a warpgroup; three warpgroups share 192, two any other number
//   COLUMNS: weights' rows of a tile; a gated tile's output has half as many columns
//   PINGPONG: each warpgroup computes a tile of its own and finishes it while the other one multiplies; else they share
//   a tile's rows
//   SHARE: blocks of a cluster, with different rows, that share the copies of their weights
//   PEERS: blocks of a cluster, with different columns, that share the copies of their rows
//   SPLIT: parts of a tile's depth, a block of the cluster each, whose sums are added in the order of the blocks
//   HELD: parts that each of these blocks has, where a warpgroup has one product of 64 rows
//   LINKS: two clusters for a tile, the first of which hands its sums of half of the depth to the second through memory: a
//   multiprocessor in ten is left over by clusters of four
//   TURNED: the weights' rows are a product's 64, and the tokens its columns, so that a tile has any 16 tokens
template <typename T_, bool GATED_, int ROWS_, int COLUMNS_, bool PINGPONG_, int SHARE_, int PEERS_, int SPLIT_,
          int LINKS_ = 1, bool TURNED_ = false>
struct Tile : Warpgroups<ROWS_ == 192 && !TURNED_ ? 3 : 2> {
  using Warpgroups<ROWS_ == 192 && !TURNED_ ? 3 : 2>::CONSUMERS;
  using T = T_;
  using Bits = unsigned short; // of an element
  static constexpr bool GATED = GATED_, PINGPONG = PINGPONG_, TURNED = TURNED_;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, SHARE = SHARE_, PEERS = PEERS_, SPLIT = SPLIT_, HELD = 1, LINKS = LINKS_;
  static constexpr int DEPTH = SWIZZLE_BYTES / sizeof(T); // of a stage
  static constexpr int CLUSTER = SHARE * PEERS * SPLIT;
  static constexpr int OUT_COLUMNS = GATED ? COLUMNS / 2 : COLUMNS;
  static constexpr int PARTS = (TURNED ? COLUMNS : ROWS) / (PINGPONG ? 64 : 64 * CONSUMERS); // products of 64 rows in a warpgroup
  static constexpr int WIDTH = TURNED ? ROWS : COLUMNS; // of such a product
  static constexpr int SUMS = WIDTH / 2;                // of a thread, per part
  static constexpr int BOXES = GATED || SHARE > 1 ? 2 : 1; // in which a tile's weights are copied
  static constexpr int ROW_BYTES = ROWS * SWIZZLE_BYTES, BOX_BYTES = COLUMNS / BOXES * SWIZZLE_BYTES;
  static constexpr int STAGE_BYTES = ROW_BYTES + BOXES * BOX_BYTES;
  // Columns that a warp writes at once, of 16 tokens, from one of two buffers of its own; of a turned tile the tokens that a
  // warpgroup writes at once, of 64 columns, from its warps' buffers.
  static constexpr int WRITTEN = (TURNED ? ROWS : OUT_COLUMNS) / SPLIT; // by a block
  static constexpr int CHUNK = WRITTEN % 64 == 0 && !TURNED ? 64 : WRITTEN % 32 == 0 ? 32 : 16;
  static constexpr int CHUNK_BYTES = 16 * CHUNK * 2;
  static constexpr int OUT_BOX_ROWS = TURNED ? CHUNK : 16, OUT_BOX_BYTES = TURNED ? SWIZZLE_BYTES : 2 * CHUNK;
  static constexpr int WRITE_BYTES = CONSUMERS * 4 * 2 * CHUNK_BYTES;
  static constexpr int BIAS_BYTES = CONSUMERS * COLUMNS * 2;
  static constexpr int FIT = (SHARED_BYTES - SWIZZLE_ALIGN - WRITE_BYTES - BIAS_BYTES - 128) / STAGE_BYTES;
  static constexpr int STAGES = FIT < 8 ? FIT : 8;
  static constexpr int TOTAL_BYTES = SWIZZLE_ALIGN + STAGES * STAGE_BYTES + WRITE_BYTES + BIAS_BYTES + 16 * STAGES;
  static_assert((PARTS == 1 || PARTS == 2) && COLUMNS % 16 == 0 && OUT_COLUMNS % 16 == 0,
                "a tile is whole products and whole stores");
  static_assert(!TURNED || (ROWS % 16 == 0 && COLUMNS == 128 * PARTS && PARTS == (GATED ? 2 : PARTS) && !PINGPONG),
                "gate and up are a warpgroup's two parts");
  static_assert(SHARE <= BOXES && PEERS <= 2, "a block copies a box at least");
  static_assert(LINKS == 1 || (LINKS == 2 && SPLIT == 1 && !PINGPONG), "one tile a block, all warpgroups at it");
  static_assert(SPLIT == 1 || (!PINGPONG && ROWS * COLUMNS * 4 <= STAGES * STAGE_BYTES), "sums meet in the stages");
};

#ifdef FUSED_MLP_HOPPER

__device__ __forceinline__ void store_shared(unsigned address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
__device__ __forceinline__ void store_shared(unsigned address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void store_shared(unsigned address, unsigned short v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
__device__ __forceinline__ float float_of_bits(__nv_bfloat16, unsigned short v) { return to_float(__ushort_as_bfloat16(v)); }
__device__ __forceinline__ float float_of_bits(__half, unsigned short v) { return to_float(__ushort_as_half(v)); }

// A warp's two buffers for what it writes, each the 16 rows of a chunk of columns, and which of them is next.
template <class K> struct Outbox {
  unsigned buffers;
  unsigned turn = 0;
  __device__ explicit Outbox(unsigned buffers) : buffers(buffers) {}
  // Where a lane puts its row of a unit's matrices: 16 bytes of a row, swizzled as the copy out reads them.
  __device__ unsigned place(int unit) const {
    constexpr unsigned SWIZZLED = K::CHUNK * 2 - 16;
    const unsigned lane = threadIdx.x % 32, piece = (lane % 16 * K::CHUNK * 2) | lane / 16 * 16;
    return buffers + turn * K::CHUNK_BYTES + ((piece ^ (piece >> 3 & SWIZZLED)) ^ 32 * unit);
  }
  // Waits until the buffer that is next may be written.
  __device__ void open() const {
    if (elected())
      copies_out_wait<1>();
    __syncwarp();
  }
  // Sends it to `row` and `column` of the output.
  __device__ void send(const Product &p, int row, int column) {
    fence_shared_copies();
    __syncwarp();
    if (elected()) {
      if (row < p.tokens && column < p.columns)
        copy_box_out(&p.out, column, row, buffers + turn * K::CHUNK_BYTES);
      copies_out_commit();
    }
    turn ^= 1;
  }
  // Waits until all has been sent.
  __device__ void close() const {
    if (elected())
      copies_out_wait<0>();
  }
};

// Biases of a thread's columns of a unit of 16: [0] of the gate, or of plain columns, [1] of up; zeros where there are none.
template <class K> struct UnitBiases {
  float2 of[2][2];
  // `biases` is the tile's in shared memory, or 0.
  __device__ UnitBiases(unsigned biases, int unit) : of{} {
    if (biases)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned at = biases + 2 * (16 * unit + 8 * i + 2 * (threadIdx.x % 4));
        of[0][i] = unpack(typename K::T(), load_shared_4(at));
        if (K::GATED)
          of[1][i] = unpack(typename K::T(), load_shared_4(at + 2 * K::OUT_COLUMNS));
      }
  }
};

// Finishes 16 columns of a tile: values[i][2 r + e] is row lane / 4 + 8 r, column 8 i + 2 (lane % 4) + e.
template <class K, Finish FINISH>
__device__ __forceinline__ void finish_columns(const Product &p, const UnitBiases<K> &biases, const float (&values)[2][4],
                                               const float (&up)[2][4], unsigned (&packed)[2][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 bias = biases.of[0][i], bias_up = biases.of[1][i];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float low = finished<FINISH>(values[i][2 * r] + bias.x, p.slope);
      float high = finished<FINISH>(values[i][2 * r + 1] + bias.y, p.slope);
      if (K::GATED) {
        low *= up[i][2 * r] + bias_up.x;
        high *= up[i][2 * r + 1] + bias_up.y;
      }
      packed[i][r] = pack(typename K::T(), low, high);
    }
  }
}

// Finishes a chunk of a warp's rows, whose first unit of 16 columns is the tile's `first`th, and sends it to `row` and `column` of the
// output. `sum(unit, i)` gives the thread's i-th sum of a unit of the chunk, of the gate or of plain columns, and from 8 on of
// up. All is finished before any of it is stored: loads and stores of shared memory keep their order, and
// between them there would be too little to do at once.
template <class K, Finish FINISH, typename Sum>
__device__ __forceinline__ void write_chunk(const Product &p, Outbox<K> &outbox, int first, int row, int column,
                                            unsigned biases, Sum sum) {
  constexpr int STEP = K::CHUNK / 16;
  unsigned packed[STEP][2][2];
#pragma unroll
  for (int unit = 0; unit < STEP; ++unit) {
    float values[2][4], up[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[i][j] = sum(unit, 4 * i + j);
        if (K::GATED)
          up[i][j] = sum(unit, 4 * i + j + 8);
      }
    finish_columns<K, FINISH>(p, UnitBiases<K>(biases, first + unit), values, up, packed[unit]);
  }
  outbox.open();
#pragma unroll
  for (int unit = 0; unit < STEP; ++unit)
    store_matrices(outbox.place(unit), packed[unit][0][0], packed[unit][0][1], packed[unit][1][0], packed[unit][1][1]);
  outbox.send(p, row, column + 16 * first);
}

// Writes a warp's rows of a tile. Registers have no index at run time, so code for every unit of a tile would be tens of
// kilobytes, which a multiprocessor fetches anew whenever other kernels ran in between. These loops have code for one chunk,
// and move the others' sums to where those were.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_tile(const Product &p, Outbox<K> &outbox, float (&sums)[K::PARTS][K::SUMS], int row,
                                           int column, unsigned biases) {
  constexpr int STEP = K::CHUNK / 16, UNITS = K::OUT_COLUMNS / 16, HALF = K::GATED ? K::SUMS / 2 : K::SUMS;
#pragma unroll 1
  for (int part = 0; part < K::PARTS; ++part) {
#pragma unroll 1
    for (int first = 0; first < UNITS; first += STEP) {
      write_chunk<K, FINISH>(p, outbox, first, row + 64 * part, column, biases, [&](int unit, int i) {
        return sums[0][8 * unit + i % 8 + i / 8 * (K::SUMS / 2)];
      });
#pragma unroll
      for (int half = 0; half < K::SUMS; half += HALF)
#pragma unroll
        for (int i = 0; i + 8 * STEP < HALF; ++i)
          sums[0][half + i] = sums[0][half + i + 8 * STEP];
    }
#pragma unroll
    for (int i = 0; K::PARTS == 2 && i < K::SUMS; ++i)
      sums[0][i] = sums[K::PARTS - 1][i];
  }
}

template <class K> struct Ring {
  unsigned base; // of the stages, then each warp's outbox, each consumer's biases of a tile, the barriers
  __device__ unsigned rows(int stage) const { return base + stage * K::STAGE_BYTES; }
  __device__ unsigned weights(int stage) const { return rows(stage) + K::ROW_BYTES; }
  __device__ unsigned outbox(int warp) const { return rows(K::STAGES) + warp * 2 * K::CHUNK_BYTES; }
  __device__ unsigned biases(int consumer) const {
    return outbox(4 * K::CONSUMERS) + consumer * K::COLUMNS * static_cast<int>(sizeof(typename K::T));
  }
  __device__ unsigned full(int stage) const { return biases(K::CONSUMERS) + 8 * stage; }
  __device__ unsigned empty(int stage) const { return full(stage) + 8 * K::STAGES; }
};

// The tile of a number: rows fastest within a group of row tiles, whose rows stay in L2 while the weights go by.
struct TilePlace {
  int row_tile, column_tile;
};
__device__ __forceinline__ TilePlace tile_place(const Product &p, int tile) {
  unsigned first = 0, height = p.row_tiles, within = tile;
  if (p.row_tiles > p.group) {
    const unsigned per_group = p.group * p.column_tiles, group = within / per_group;
    within -= group * per_group;
    first = group * p.group;
    height = min(static_cast<unsigned>(p.group), p.row_tiles - first);
  }
  const unsigned column_tile = within / height;
  return {static_cast<int>(first + within - column_tile * height), static_cast<int>(column_tile)};
}

// A block's place in its cluster.
template <class K> struct Place {
  int share, peer, split, link, first_tile, step; // every `step`th tile from the first one on
  __device__ explicit Place(unsigned rank)
      : share(rank % K::SHARE), peer(rank / K::SHARE % K::PEERS), split(rank / K::SHARE / K::PEERS),
        link(blockIdx.x / K::CLUSTER % K::LINKS), first_tile(blockIdx.x / K::CLUSTER / K::LINKS),
        step(gridDim.x / K::CLUSTER / K::LINKS) {}
  __device__ unsigned rank_of(int share, int peer, int split) const {
    return (split * K::PEERS + peer) * K::SHARE + share;
  }
  // The first row and the first column of the output, of a tile of the cluster.
  __device__ void locate(const Product &p, int tile, int &row, int &column) const {
    const TilePlace found = tile_place(p, tile);
    row = (found.row_tile * K::SHARE + share) * K::ROWS;
    column = (found.column_tile * K::PEERS + peer) * K::OUT_COLUMNS;
  }
  // Its part of a tile's stages. The first of two clusters has fewer: the other one waits for its sums.
  __device__ int first_stage(int stages) const {
    return K::LINKS == 1 ? split * stages / K::SPLIT : link == 0 ? 0 : max(stages / 2 - 1, 0);
  }
  __device__ int end_stage(int stages) const {
    return K::LINKS == 1 ? (split + 1) * stages / K::SPLIT : link == 0 ? max(stages / 2 - 1, 0) : stages;
  }
};

// A split tile's sums meet in shared memory, where each block of the cluster leaves its parts of them, four and four, and each
// adds up all parts of a share of the columns in the order of the blocks, and of each block's parts.
template <class K> __device__ __forceinline__ unsigned part_address(unsigned sums_at, int four) {
  return sums_at + 16 * (K::CONSUMERS * WARPGROUP * four + threadIdx.x - WARPGROUP);
}
template <class K, int COUNT>
__device__ __forceinline__ void leave_parts(unsigned sums_at, const float (&sums)[COUNT], int first = 0) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4)
    store_shared(part_address<K>(sums_at, (first + i) / 4), make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
}
template <class K> __device__ __forceinline__ void add_parts(unsigned sums_at, const Place<K> &at, int four, float (&sums)[4]) {
  float4 parts[K::SPLIT][K::HELD];
#pragma unroll
  for (int block = 0; block < K::SPLIT; ++block)
#pragma unroll
    for (int held = 0; held < K::HELD; ++held)
      parts[block][held] = load_from_cluster_16(cluster_address(part_address<K>(sums_at, held * (K::SUMS / 4) + four),
                                                                at.rank_of(at.share, at.peer, block)));
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sums[i] = 0.f;
#pragma unroll
  for (int block = 0; block < K::SPLIT; ++block)
#pragma unroll
    for (int held = 0; held < K::HELD; ++held) {
      sums[0] += parts[block][held].x;
      sums[1] += parts[block][held].y;
      sums[2] += parts[block][held].z;
      sums[3] += parts[block][held].w;
    }
}

// As `write_tile`, of a split tile.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_split_tile(const Product &p, Outbox<K> &outbox, unsigned sums_at,
                                                 const Place<K> &at, int row, int column, unsigned biases) {
  static_assert(K::PARTS == 1, "a part's sums begin the tile's");
  constexpr int STEP = K::CHUNK / 16, CHUNKS = K::OUT_COLUMNS / K::CHUNK, HALVES = K::GATED ? 2 : 1;
#pragma unroll 1
  for (int chunk = at.split * CHUNKS / K::SPLIT; chunk < (at.split + 1) * CHUNKS / K::SPLIT; ++chunk) {
    float sums[STEP][HALVES][2][4];
#pragma unroll
    for (int unit = 0; unit < STEP; ++unit)
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          add_parts<K>(sums_at, at, 2 * (STEP * chunk + unit) + i + half * (K::SUMS / 8), sums[unit][half][i]);
    write_chunk<K, FINISH>(p, outbox, STEP * chunk, row, column, biases,
                           [&](int unit, int i) { return sums[unit][i / 8][i / 4 % 2][i % 4]; });
  }
}

// A warpgroup's two buffers for what it writes of a turned tile, each a chunk of tokens of 64 columns, and which of them is next.
template <class K> struct TurnedOutbox {
  unsigned buffers;
  int consumer;
  unsigned turn = 0;
  __device__ TurnedOutbox(unsigned buffers, int consumer) : buffers(buffers), consumer(consumer) {}
  // Where a lane puts its column of a pair of units' matrices: 16 bytes of a token, swizzled as the copy out reads them.
  __device__ unsigned place(int pair) const {
    const unsigned lane = threadIdx.x % 32, token = lane / 16 * 8 + lane % 8, piece = threadIdx.x / 32 % 4 * 2 + lane / 8 % 2;
    return buffers + turn * (4 * K::CHUNK_BYTES) + (16 * pair + token) * SWIZZLE_BYTES + ((piece ^ lane % 8) * 16);
  }
  // Sends what all have put there to `row` and `column` of the output; the other buffer may be written then.
  __device__ void send(const Product &p, int row, int column) {
    fence_shared_copies();
    const bool sends = warp_of_block() % 4 == 0 && elected();
    if (sends)
      copies_out_wait<0>();
    asm volatile("bar.sync %0, %1;" ::"r"(4 + consumer), "n"(WARPGROUP) : "memory");
    if (sends) {
      if (row < p.tokens && column < p.columns)
        copy_box_out(&p.out, column, row, buffers + turn * (4 * K::CHUNK_BYTES));
      copies_out_commit();
    }
    turn ^= 1;
  }
  __device__ void close() const {
    if (warp_of_block() % 4 == 0 && elected())
      copies_out_wait<0>();
  }
};

// Biases of a thread's two rows of weights, of each part of a turned tile.
template <class K> struct TurnedBiases {
  float of[K::PARTS][2];
};

// Finishes a chunk of a warpgroup's tokens and sends it. `sum(part, i)` gives the thread's i-th sum of the chunk: of unit i / 4 of 8
// tokens, of the weights' row lane / 4 + i % 4 / 2 * 8, of token 2 (lane % 4) + i % 2.
template <class K, Finish FINISH, typename Sum>
__device__ __forceinline__ void write_turned_chunk(const Product &p, TurnedOutbox<K> &outbox, int row, int column,
                                                   const float (&bias)[2], const float (&bias_up)[2], Sum sum) {
  constexpr int UNITS = K::CHUNK / 8;
  unsigned packed[UNITS][2];
#pragma unroll
  for (int unit = 0; unit < UNITS; ++unit)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float out[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 4 * unit + 2 * r + e;
        out[e] = finished<FINISH>(sum(0, i) + bias[r], p.slope);
        if (K::GATED)
          out[e] *= sum(1, i) + bias_up[r];
      }
      packed[unit][r] = pack(typename K::T(), out[0], out[1]);
    }
#pragma unroll
  for (int unit = 0; unit < UNITS; unit += 2)
    store_matrices_turned(outbox.place(unit / 2), packed[unit][0], packed[unit][1], packed[unit + 1][0], packed[unit + 1][1]);
  outbox.send(p, row, column);
}

// As `write_tile`, of a turned tile.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_turned_tile(const Product &p, TurnedOutbox<K> &outbox, float (&sums)[K::PARTS][K::SUMS],
                                                  int row, int column, const TurnedBiases<K> &biases) {
  constexpr int STEP = K::CHUNK / 2;
  float bias[2] = {biases.of[0][0], biases.of[0][1]};
  const float bias_next[2] = {biases.of[K::PARTS - 1][0], biases.of[K::PARTS - 1][1]};
#pragma unroll 1
  for (int part = 0; part < (K::GATED ? 1 : K::PARTS); ++part) {
#pragma unroll 1
    for (int first = 0; first < K::ROWS; first += K::CHUNK) {
      write_turned_chunk<K, FINISH>(p, outbox, row + first, column + 128 * part, bias, bias_next,
                                    [&](int half, int i) { return sums[half][i]; });
#pragma unroll
      for (int half = 0; half < (K::GATED ? 2 : 1); ++half)
#pragma unroll
        for (int i = 0; i + STEP < K::SUMS; ++i)
          sums[half][i] = sums[half][i + STEP];
    }
#pragma unroll
    for (int i = 0; !K::GATED && K::PARTS == 2 && i < K::SUMS; ++i)
      sums[0][i] = sums[K::PARTS - 1][i];
    bias[0] = bias_next[0];
    bias[1] = bias_next[1];
  }
}

// The same of a split tile: each block writes a share of the tokens.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_split_turned_tile(const Product &p, TurnedOutbox<K> &outbox, unsigned sums_at,
                                                        const Place<K> &at, int row, int column,
                                                        const TurnedBiases<K> &biases) {
  static_assert(!K::GATED || K::SPLIT == 1, "the second product's");
  constexpr int CHUNKS = K::ROWS / K::CHUNK, FOURS = K::CHUNK / 8;
#pragma unroll
  for (int part = 0; part < K::PARTS; ++part)
#pragma unroll 1
    for (int chunk = at.split * CHUNKS / K::SPLIT; chunk < (at.split + 1) * CHUNKS / K::SPLIT; ++chunk) {
      float sums[FOURS][4];
#pragma unroll
      for (int i = 0; i < FOURS; ++i)
        add_parts<K>(sums_at, at, part * (K::SUMS / 4) + FOURS * chunk + i, sums[i]);
      write_turned_chunk<K, FINISH>(p, outbox, row + K::CHUNK * chunk, column + 128 * part, biases.of[part], biases.of[part],
                                    [&](int, int i) { return sums[i / 4][i % 4]; });
    }
}

// What a producer asks for: a stage of a tile.
template <class K> struct Copies {
  const Product &p;
  const Ring<K> &ring;
  const Place<K> &at;
  int row, column, count; // of a tile's rows that are tokens: the others' sums go nowhere

  __device__ Copies(const Product &p, const Ring<K> &ring, const Place<K> &at) : p(p), ring(ring), at(at) {
    locate(at.first_tile);
  }
  __device__ void locate(int tile) {
    at.locate(p, tile, row, column);
    count = min(max(p.tokens - row, 0), K::ROWS);
  }
  __device__ void expect(int stage) const {
    barrier_arrive_expect(ring.full(stage), count * SWIZZLE_BYTES + K::BOXES * K::BOX_BYTES);
  }
  // Part of a tile's weights: the gate's or up's rows, or rows of the one weight.
  __device__ const CUtensorMap *part_map(int part) const { return K::GATED && part > 0 ? &p.up : &p.weights; }
  __device__ int part_row(int part) const { return K::GATED ? column : column + part * (K::COLUMNS / K::BOXES); }
  __device__ void weights(int stage, int depth) const {
    if constexpr (K::SHARE == 1) {
#pragma unroll
      for (int part = 0; part < K::BOXES; ++part)
        copy_box(ring.weights(stage) + part * K::BOX_BYTES, part_map(part), depth * K::DEPTH, part_row(part),
                 ring.full(stage));
    } else {
      copy_box_to_cluster(ring.weights(stage) + at.share * K::BOX_BYTES, part_map(at.share), depth * K::DEPTH,
                          part_row(at.share), ring.full(stage),
                          ((1 << K::SHARE) - 1) << at.rank_of(0, at.peer, at.split));
    }
  }
  // The same as far as L2.
  __device__ void prefetch_weights(int depth) const {
    if constexpr (K::SHARE == 1) {
#pragma unroll
      for (int part = 0; part < K::BOXES; ++part)
        prefetch_box(part_map(part), depth * K::DEPTH, part_row(part));
    } else {
      prefetch_box(part_map(at.share), depth * K::DEPTH, part_row(at.share));
    }
  }
  __device__ void row_box(const CUtensorMap *map, int stage, int depth, int first) const {
    const unsigned to = ring.rows(stage) + first * SWIZZLE_BYTES;
    if constexpr (K::PEERS == 1) {
      copy_box(to, map, depth * K::DEPTH, row + first, ring.full(stage));
    } else {
      static_assert(K::PEERS == 2, "the blocks of the mask");
      copy_box_to_cluster(to, map, depth * K::DEPTH, row + first, ring.full(stage),
                          (1 << at.rank_of(at.share, 0, at.split)) | (1 << at.rank_of(at.share, 1, at.split)));
    }
  }
  __device__ void rows(int stage, int depth) const {
    // Nothing that lies outside the matrix: a box of that takes longer.
    if (count == K::ROWS)
      row_box(&p.rows, stage, depth, at.peer * (K::ROWS / K::PEERS));
    else if (count > 0 && at.peer == 0)
      row_box(&p.last_rows, stage, depth, 0);
  }
  // Stages that can be asked for, but for their rows, before the kernel before is over.
  __device__ int early() const {
    return min(at.end_stage(p.stages) - at.first_stage(p.stages), static_cast<int>(K::STAGES));
  }
};

// Asks for the first tile's weights: as far as L2 where the kernel before may write them.
template <class K> __device__ __forceinline__ void produce_early(const Copies<K> &copies) {
  const int first_stage = copies.at.first_stage(copies.p.stages), early = copies.early();
#pragma unroll 1
  for (int i = 0; i < early; ++i) {
    if (copies.p.weights_early) {
      copies.expect(i);
      copies.weights(i, first_stage + i);
    } else {
      copies.prefetch_weights(first_stage + i);
    }
  }
}

// Asks for all else. A stage's rows may arrive before its bytes are expected.
template <class K> __device__ __forceinline__ void produce(Copies<K> &copies) {
  const Product &p = copies.p;
  const Ring<K> &ring = copies.ring;
  const int tiles = p.row_tiles * p.column_tiles;
  const int first_stage = copies.at.first_stage(p.stages), end_stage = copies.at.end_stage(p.stages);
  int tile = copies.at.first_tile, depth = first_stage;
  wait_for_previous_kernel();
  release_next_kernel();
  int stage = 0;
  unsigned parity = 1;
  if (p.weights_early) {
    const int early = copies.early();
#pragma unroll 1
    for (; stage < early; ++stage)
      copies.rows(stage, first_stage + stage);
    depth += early;
    if (stage == K::STAGES) {
      stage = 0;
      parity = 0;
    }
  }
  for (;;) {
#pragma unroll 1
    for (; depth < end_stage; ++depth) {
      barrier_wait(ring.empty(stage), parity);
      copies.expect(stage);
      copies.rows(stage, depth);
      copies.weights(stage, depth);
      if (++stage == K::STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
    tile += copies.at.step;
    if (tile >= tiles)
      return;
    copies.locate(tile);
    depth = first_stage;
  }
}

// A tile's bias of its i-th row of weights; 0 where there is none.
template <class K> __device__ __forceinline__ typename K::Bits bias_of(const Product &p, int column, int i) {
  const bool second = K::GATED && i >= K::OUT_COLUMNS;
  const void *const bias = second ? p.bias_up : p.bias;
  const int at = column + (second ? i - K::OUT_COLUMNS : i);
  return bias && i < K::COLUMNS && at < p.columns ? static_cast<const typename K::Bits *>(bias)[at] : typename K::Bits(0);
}

__device__ __forceinline__ void meet_warpgroup(int consumer) {
  asm volatile("bar.sync %0, %1;" ::"r"(4 + consumer), "n"(WARPGROUP) : "memory");
}
template <class K> __device__ __forceinline__ void consumers_meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(K::CONSUMERS * WARPGROUP) : "memory");
}

// Where a consumer has a tile's biases in shared memory: there, or nowhere (0) if there are none. `bias` gives the one of the
// thread's i-th row of weights, which is row thread + i WARPGROUP of the tile.
template <class K, typename Bias>
__device__ __forceinline__ unsigned put_biases(const Product &p, unsigned there, int consumer, Bias bias) {
  if (!p.bias && !p.bias_up)
    return 0;
  const int thread = threadIdx.x % WARPGROUP;
  meet_warpgroup(consumer); // nobody reads the last tile's any more
#pragma unroll
  for (int i = 0; i * WARPGROUP < K::COLUMNS; ++i)
    if (thread + i * WARPGROUP < K::COLUMNS)
      store_shared(there + static_cast<int>(sizeof(typename K::Bits)) * (thread + i * WARPGROUP), bias(i));
  meet_warpgroup(consumer);
  return there;
}

// Hands a block's sums to the one of the other cluster that finishes the tile, or takes them. Blocks start in order, so the
// one that takes finds the other one started.
template <class K>
__device__ __forceinline__ void hand_over(const Product &p, const Place<K> &at, int tile,
                                          float (&sums)[K::PARTS][K::SUMS]) {
  constexpr int WIDTH = K::CONSUMERS * WARPGROUP;
  const long long block = tile * K::CLUSTER + at.rank_of(at.share, at.peer, at.split);
  float4 *const own = reinterpret_cast<float4 *>(p.sums + block * (K::ROWS * K::COLUMNS)) + threadIdx.x - WARPGROUP;
  if (at.link == 0) {
#pragma unroll
    for (int part = 0; part < K::PARTS; ++part)
#pragma unroll
      for (int i = 0; i < K::SUMS; i += 4)
        __stcg(own + WIDTH * ((part * K::SUMS + i) / 4),
               make_float4(sums[part][i], sums[part][i + 1], sums[part][i + 2], sums[part][i + 3]));
    __threadfence();
    consumers_meet<K>();
    if (threadIdx.x == WARPGROUP)
      asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.flags + block) : "memory");
    return;
  }
  if (threadIdx.x % 32 == 0) {
    unsigned there = 0;
    while (there == 0)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(p.flags + block) : "memory");
  }
  __syncwarp();
#pragma unroll
  for (int part = 0; part < K::PARTS; ++part)
#pragma unroll
    for (int i = 0; i < K::SUMS; i += 4) {
      const float4 v = __ldcg(own + WIDTH * ((part * K::SUMS + i) / 4));
      sums[part][i] += v.x;
      sums[part][i + 1] += v.y;
      sums[part][i + 2] += v.z;
      sums[part][i + 3] += v.w;
    }
}

template <class K> __device__ __forceinline__ void consume(const Product &p, const Ring<K> &ring, const Place<K> &at) {
  using T = typename K::T;
  wait_for_previous_kernel();
  const int consumer = warp_of_block() / 4 - 1, thread = threadIdx.x % WARPGROUP;
  const int step = at.step, tiles = p.row_tiles * p.column_tiles;
  const int stages = at.end_stage(p.stages) - at.first_stage(p.stages);
  const bool has_biases = p.bias || p.bias_up;
  const int rows_from = K::PINGPONG || K::TURNED ? 0 : consumer * 64 * K::PARTS;
  const auto release = [&](int stage) {
    if constexpr (K::SHARE * K::PEERS == 1) {
      if (thread == 0)
        barrier_arrive(ring.empty(stage));
    } else if (thread < K::SHARE + K::PEERS - 1) {
      // Every block that copies into this one's stages.
      const unsigned block = thread < K::SHARE
                                 ? at.rank_of(thread, at.peer, at.split)
                                 : at.rank_of(at.share, (at.peer + thread - K::SHARE + 1) % K::PEERS, at.split);
      barrier_arrive_in_cluster(cluster_address(ring.empty(stage), block));
    }
  };
  auto outbox = [&] {
    if constexpr (K::TURNED)
      return TurnedOutbox<K>(ring.outbox(4 * consumer), consumer);
    else
      return Outbox<K>(ring.outbox(threadIdx.x / 32 - 4));
  }();
  if (p.clear && blockIdx.x == 0)
    for (int i = threadIdx.x - WARPGROUP; i < MEETINGS; i += K::CONSUMERS * WARPGROUP)
      p.clear[i] = 0;
  int tile = at.first_tile, count = 0; // stages that this block's consumers have gone through
  if (K::PINGPONG && consumer == 1) {
    tile += step;
    count = stages;
  }
  for (; tile < tiles; tile += K::PINGPONG ? 2 * step : step) {
    int row, column;
    at.locate(p, tile, row, column);
    asm volatile("" : "+r"(row), "+r"(column)); // here, and not between a tile's products and the next's
    // Asked for before the products, put in shared memory after them. While a warpgroup of a pair waits the other
    // multiplies, so there it keeps no registers for that.
    typename K::Bits bias[(K::COLUMNS + WARPGROUP - 1) / WARPGROUP];
    const auto load_biases = [&] {
      if (has_biases && !K::TURNED)
#pragma unroll
        for (int i = 0; i * WARPGROUP < K::COLUMNS; ++i)
          bias[i] = bias_of<K>(p, column, thread + i * WARPGROUP);
    };
    if (!K::PINGPONG)
      load_biases();
    TurnedBiases<K> turned_biases;
    if constexpr (K::TURNED)
#pragma unroll
      for (int part = 0; part < K::PARTS; ++part)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          turned_biases.of[part][r] =
              float_of_bits(T(), bias_of<K>(p, column, 128 * part + 64 * consumer + thread / 32 * 16 + thread % 32 / 4 + 8 * r));
    float sums[K::PARTS][K::SUMS];
#pragma unroll
    for (int part = 0; part < K::PARTS; ++part)
#pragma unroll
      for (int i = 0; i < K::SUMS; ++i)
        sums[part][i] = 0.f;
    int stage = count % K::STAGES, before = 0;
    unsigned parity = count / K::STAGES % 2;
    // A barrier tells one phase from the next, not from the one after that: the other warpgroup's stages come first.
    if (K::PINGPONG && tile != at.first_tile)
      asm volatile("bar.sync %0, %1;" ::"r"(2 + consumer), "n"(K::CONSUMERS * WARPGROUP) : "memory");
    // A warpgroup that has no rows multiplies nothing.
    const bool idle = !K::PINGPONG && row + rows_from >= p.tokens;
    for (int depth = 0; idle && depth < stages; ++depth) {
      barrier_wait(ring.full(stage), parity);
      release(stage);
      if (++stage == K::STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
    for (int depth = idle ? stages : 0; depth < stages; ++depth) {
      barrier_wait(ring.full(stage), parity);
      products_begin();
      // A product's rows of 64 and its columns: tokens and weights, or the other way round.
      const unsigned long long right = tile_descriptor(K::TURNED ? ring.rows(stage) : ring.weights(stage));
#pragma unroll
      for (int k = 0; k < K::DEPTH / 16; ++k)
#pragma unroll
        for (int part = 0; part < K::PARTS; ++part) {
          const unsigned left = K::TURNED ? ring.weights(stage) + (64 * consumer + 128 * part) * SWIZZLE_BYTES
                                          : ring.rows(stage) + (rows_from + 64 * part) * SWIZZLE_BYTES;
          WarpgroupProduct<T, K::WIDTH>::add(sums[part], tile_descriptor(left) + 2 * k, right + 2 * k);
        }
      products_commit();
      if (depth > 0) {
        products_wait<1>();
        release(before);
      }
      before = stage;
      if (++stage == K::STAGES) {
        stage = 0;
        parity ^= 1;
      }
    }
    if (K::PINGPONG && tile + step < tiles)
      asm volatile("bar.arrive %0, %1;" ::"r"(3 - consumer), "n"(K::CONSUMERS * WARPGROUP) : "memory");
    products_wait<0>();
#pragma unroll
    for (int part = 0; part < K::PARTS; ++part)
      pin(sums[part]);
    if (!idle)
      release(before);
    count += K::PINGPONG ? 2 * stages : stages;

    if constexpr (K::LINKS > 1) {
      hand_over(p, at, tile, sums);
      if (at.link == 0)
        break;
    }
    if constexpr (K::SPLIT > 1) {
      consumers_meet<K>(); // all are done with the stages
#pragma unroll
      for (int part = 0; part < K::PARTS; ++part)
        leave_parts<K>(ring.base, sums[part], part * K::SUMS);
      cluster_sync();
    }
    if constexpr (K::TURNED) {
      column += 64 * consumer;
      with_finish<K::GATED>(p.finish, [&](auto finish) {
        if constexpr (K::SPLIT == 1)
          write_turned_tile<K, finish>(p, outbox, sums, row, column, turned_biases);
        else
          write_split_turned_tile<K, finish>(p, outbox, ring.base, at, row, column, turned_biases);
      });
    } else {
      row += rows_from + thread / 32 * 16;
      if (K::PINGPONG)
        load_biases();
      const unsigned biases = put_biases<K>(p, ring.biases(consumer), consumer, [&](int i) { return bias[i]; });
      with_finish<K::GATED>(p.finish, [&](auto finish) {
        if constexpr (K::SPLIT == 1)
          write_tile<K, finish>(p, outbox, sums, row, column, biases);
        else
          write_split_tile<K, finish>(p, outbox, ring.base, at, row, column, biases);
      });
    }
  }
  outbox.close();
}

#endif // FUSED_MLP_HOPPER

template <class K> __global__ void __launch_bounds__(K::THREADS, 1) product_kernel(const __grid_constant__ Product p) {
#ifdef FUSED_MLP_HOPPER
  extern __shared__ unsigned char shared[];
  const Ring<K> ring{(shared_address(shared) + SWIZZLE_ALIGN - 1) / SWIZZLE_ALIGN * SWIZZLE_ALIGN};
  const Place<K> at(K::CLUSTER == 1 ? 0 : cluster_rank());
  // What a launch begins with is done at once by different warps: until the first stage comes nothing else happens.
  const int warp = warp_of_block();
  if (warp == 2 && elected()) {
    for (int stage = 0; stage < K::STAGES; ++stage) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), (K::PINGPONG ? 1 : K::CONSUMERS) * (K::SHARE + K::PEERS - 1));
    }
    publish_barriers();
  } else if (warp == 3 && elected()) {
    prefetch_map(&p.rows);
    prefetch_map(&p.last_rows);
    prefetch_map(&p.weights);
    prefetch_map(&p.up);
    prefetch_map(&p.out);
  }
  Copies<K> copies(p, ring, at);
  asm volatile("" : "+r"(copies.row), "+r"(copies.column), "+r"(copies.count)); // before the blocks meet
  if constexpr (K::CLUSTER == 1)
    __syncthreads();
  else
    cluster_meet();
  if (threadIdx.x < WARPGROUP) {
    give_registers<K::PRODUCER_REGISTERS>();
    if (warp == 0 && elected())
      produce(copies);
    else if (warp == 1 && elected())
      produce_early(copies);
    __syncwarp();
    if (K::SPLIT > 1)
      cluster_sync(); // where the consumers exchange sums
  } else {
    take_registers<K::CONSUMER_REGISTERS>();
    consume(p, ring, at);
  }
  if (K::CLUSTER > 1)
    cluster_meet(); // nobody reads or copies into a block that has ended
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// Row tiles of so many tokens take turns with the weights that go by: what a wave of blocks reads fits L2.
constexpr int GROUP_TOKENS = 4096;

// Blocks that the device runs at once, in whole clusters; asked for once.
template <class K, auto KERNEL> int resident_blocks(int *blocks) {
  static PerDevice<int> known;
  return known.get(blocks, [](int, int *found) -> int {
    cudaError_t error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, K::TOTAL_BYTES);
    if (error != cudaSuccess)
      return error;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {K::CLUSTER, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(K::CLUSTER);
    config.blockDim = dim3(K::THREADS);
    config.dynamicSmemBytes = K::TOTAL_BYTES;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, KERNEL, &config);
    if (error != cudaSuccess)
      return error;
    *found = clusters * K::CLUSTER;
    return clusters > 0 ? FUSED_MLP_OK : FUSED_MLP_UNSUPPORTED;
  });
}

template <class K, void (*KERNEL)(Product)> int enqueue(const Operands &o, cudaStream_t stream) {
  int blocks = 0, status = resident_blocks<K, KERNEL>(&blocks);
  Product p;
  const int box_columns = K::COLUMNS / K::BOXES, last_rows = o.tokens % K::ROWS == 0 ? 1 : o.tokens % K::ROWS;
  const BoxKey rows = {o.rows, o.tokens, o.depth, o.rows_stride, o.dtype, K::ROWS / K::PEERS, SWIZZLE_BYTES};
  const BoxKey weights = {o.weights, o.columns, o.depth, o.weights_stride, o.dtype, box_columns, SWIZZLE_BYTES};
  if (status == FUSED_MLP_OK)
    status = box_map(&p.rows, rows);
  if (status == FUSED_MLP_OK)
    status = box_map(&p.last_rows, {o.rows, o.tokens, o.depth, o.rows_stride, o.dtype, last_rows, SWIZZLE_BYTES});
  if (status == FUSED_MLP_OK)
    status = box_map(&p.weights, weights);
  if (status == FUSED_MLP_OK && K::GATED)
    status = box_map(&p.up, {o.up, o.columns, o.depth, o.up_stride, o.dtype, box_columns, SWIZZLE_BYTES});
  if (status == FUSED_MLP_OK && K::CHUNK > 0)
    status = box_map(&p.out, {o.out, o.tokens, o.columns, o.out_stride, o.dtype, K::OUT_BOX_ROWS, K::OUT_BOX_BYTES});
  if (status != FUSED_MLP_OK)
    return status;
  if (!K::GATED)
    p.up = p.weights;
  p.out_rows = o.out;
  p.out_stride = o.out_stride;
  p.clear = static_cast<unsigned *>(o.clear);
  p.flags = static_cast<unsigned *>(o.meeting);
  p.sums = reinterpret_cast<float *>(p.flags + MEETINGS);
  p.bias = o.bias;
  p.bias_up = o.bias_up;
  p.tokens = o.tokens;
  p.columns = o.columns;
  p.stages = divide_up(o.depth, K::DEPTH);
  p.row_tiles = divide_up(o.tokens, K::ROWS * K::SHARE);
  p.column_tiles = divide_up(o.columns, K::OUT_COLUMNS * K::PEERS);
  p.group = GROUP_TOKENS / (K::ROWS * K::SHARE);
  p.weights_early = o.weights_early;
  p.finish = o.finish;
  p.slope = o.slope;

  const int tiles = p.row_tiles * p.column_tiles * K::CLUSTER * K::LINKS;
  // Blocks of a split tile do not go on to another one.
  const int launched = K::SPLIT * K::LINKS == 1 && blocks < tiles ? blocks : tiles;
  return launch_kernel(KERNEL, {launched, K::THREADS, K::TOTAL_BYTES, true, K::CLUSTER}, stream, p);
}

template <class K, void (*KERNEL)(Product)> constexpr Variant variant_of() {
  return {K::GATED, K::PINGPONG, K::ROWS,  K::COLUMNS,
          K::OUT_COLUMNS, K::SHARE, K::PEERS, K::SPLIT, K::LINKS, resident_blocks<K, KERNEL>, enqueue<K, KERNEL>,
          K::TURNED};
}
template <class K> constexpr Variant variant() { return variant_of<K, product_kernel<K>>(); }

// The architecture that the code which runs on the current device was compiled for, and the one that it runs as.
template <class K> int compiled_for(int *source, int *binary) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, product_kernel<K>);
  *source = attributes.ptxVersion;
  *binary = attributes.binaryVersion;
  return error;
}

// The tiles that were fastest for some shape, and no slower than others for shapes between (PERFORMANCE.md). Of those that are
// thought to take as long, the first is chosen.
template <typename T> const Variant *variants_of(int *count) {
  static const Variant variants[] = {
      // Gated: tokens, weights' rows, ping-pong, share, peers, split, links if not 1, turned if so.
      variant<Tile<T, true, 128, 96, false, 2, 1, 1>>(),
      variant<Tile<T, true, 128, 128, false, 1, 1, 1>>(),
      variant<Tile<T, true, 128, 128, false, 2, 1, 1>>(),
      variant<Tile<T, true, 128, 160, true, 2, 2, 1>>(),
      variant<Tile<T, true, 128, 192, false, 2, 1, 1>>(),
      variant<Tile<T, true, 128, 192, true, 2, 1, 1>>(),
      variant<Tile<T, true, 128, 224, false, 1, 1, 1>>(),
      variant<Tile<T, true, 128, 256, false, 1, 2, 1>>(),
      variant<Tile<T, true, 192, 128, false, 1, 2, 1>>(),
      variant<Tile<T, true, 192, 160, false, 1, 2, 1>>(),
      variant<Tile<T, true, 192, 192, false, 1, 2, 1>>(),
      variant<Tile<T, true, 256, 128, false, 1, 2, 1>>(),
      variant<Tile<T, true, 112, 256, false, 2, 1, 1, 1, true>>(),
      variant<Tile<T, true, 144, 256, false, 2, 1, 1, 1, true>>(),
      variant<Tile<T, true, 160, 256, false, 1, 2, 1, 1, true>>(),
      variant<Tile<T, true, 176, 256, false, 1, 2, 1, 1, true>>(),
      // Plain.
      variant<Tile<T, false, 128, 64, false, 1, 1, 1>>(),
      variant<Tile<T, false, 128, 64, false, 1, 1, 2>>(),
      variant<Tile<T, false, 128, 64, false, 1, 1, 4>>(),
      variant<Tile<T, false, 128, 64, false, 2, 1, 1>>(),
      variant<Tile<T, false, 128, 96, false, 1, 1, 1>>(),
      variant<Tile<T, false, 128, 96, false, 1, 1, 4>>(),
      variant<Tile<T, false, 128, 96, false, 2, 1, 1>>(),
      variant<Tile<T, false, 128, 96, false, 2, 1, 4>>(),
      variant<Tile<T, false, 128, 96, false, 2, 2, 1>>(),
      variant<Tile<T, false, 128, 128, false, 1, 2, 1>>(),
      variant<Tile<T, false, 128, 128, false, 2, 1, 1>>(),
      variant<Tile<T, false, 128, 128, false, 2, 1, 1, 2>>(),
      variant<Tile<T, false, 128, 128, false, 2, 1, 2>>(),
      variant<Tile<T, false, 128, 160, false, 2, 1, 1>>(),
      variant<Tile<T, false, 128, 192, false, 2, 1, 1>>(),
      variant<Tile<T, false, 128, 192, true, 2, 1, 1>>(),
      variant<Tile<T, false, 192, 128, false, 1, 1, 2>>(),
      variant<Tile<T, false, 256, 128, false, 1, 2, 1>>(),
      variant<Tile<T, false, 256, 160, false, 1, 2, 1>>(),
      variant<Tile<T, false, 144, 128, false, 1, 2, 1, 1, true>>(),
      variant<Tile<T, false, 160, 128, false, 1, 2, 1, 2, true>>(),
      variant<Tile<T, false, 192, 128, false, 1, 2, 1, 1, true>>(),
      variant<Tile<T, false, 208, 128, false, 1, 2, 1, 1, true>>(),
  };
  *count = sizeof(variants) / sizeof(variants[0]);
  return variants;
}

} // namespace
} // namespace fused_mlp
