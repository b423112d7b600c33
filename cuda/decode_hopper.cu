// The whole MLP for 1 to 64 tokens in one launch on Hopper: a ring of tensor copies feeds warpgroup products.
//
// One block per multiprocessor. One thread, the producer, keeps a ring of stages in shared memory full; two warpgroups,
// the consumers, multiply what has come. A stage is some chunks of 128 bytes of depth: of each, the block's
// weight rows and the tokens' rows. A copy brings eight weight rows of a stage's chunks: neighbours in memory are asked
// for together, which memory rewards.
//
// The first layer's units (a hidden element: its gate row, and its up row) are divided among blocks in groups of eight, then
// the down projection's rows. When the producer has asked for its last gate and up rows it goes on to ask for down rows,
// which depend on nothing: the one grid-wide wait, for the hidden rows, passes while they are on the way. Only the hidden
// rows themselves are asked for after it. The second layer's depth may be cut into parts, each a block's, so that blocks
// read a part of the hidden rows for so many times as many down rows; the last block to be done adds the parts.
//
// Weights are the M operand of the products and tokens the N operand: the price of 8 tokens is that of one, and a
// token's column is computed alike whatever is beside it. So a row has the same bits in any company, and on any run
// (decode_hopper.cuh says how sums are cut).
//
// f32 is multiplied on tensor cores, too, which take 11 bits of a fraction: each number is the sum of a high part of so many
// bits and a low one, and a product is low high + high low + high high; low low, 2^-22 of it, is left out. Tensor cores cut
// off bits where they add, so each chunk's sums start from zero, small terms by themselves, and are added in f32.
//
// No deadlock, whatever is resident: a block waits for the hidden rows only. Slice b of the first layer belongs to
// whoever claims it with an atomic, normally block b, whose first copies are under way meanwhile. A block whose wait is
// longer than its own share took empties its ring and computes slices that nobody has claimed. So each slice is either
// held by a block that runs, and that waits for nothing before it has delivered it, or free for the waiting block to take.
//
// Dependent launch: the next launch's blocks may start while this one ends. Before wait_for_previous_kernel they only
// ask for their first weights to be brought as far as L2, where a copy made after the wait reads what memory then holds.
// Counters, hidden rows and partial sums are touched after it, when the launch before has ended and put the
// counters back to zero: one workspace per stream is enough. Every block waits, so a launch ends after the one before it, and
// launches of one stream form a chain. A block says that the next launch may be scheduled right after its own wait: by
// the time that all blocks have said so, all are resident.
#include "decode_hopper.cuh"
#include <type_traits>

namespace fused_mlp {
namespace {

constexpr int WARPGROUPS = 2; // that multiply
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int THREADS = CONSUMERS + 32;
constexpr int TILE_GROUPS = 8;
[[maybe_unused]] constexpr int TILE_ROWS = GROUP * TILE_GROUPS;
constexpr int PASS_GROUPS = WARPGROUPS * TILE_GROUPS;
constexpr int MAX_SLOTS = 16;
constexpr int MOST_F32_TOKENS = 32; // more are the many-token kernels'
constexpr int MOST_SHARED_TOKENS = 16; // up to which a pass of the first layer has 64 rows: wider ones leave short copies
constexpr int ROUND_TOKENS = 16; // that the first layer rounds off at a time
constexpr int ROUND_PITCH = CONSUMERS + 4; // floats of one token's sums; 4 mod 32 keeps the stores off one bank
constexpr int MOST_STAGE_BYTES = 90 * 1024; // larger stages leave too few for the ring
constexpr int MOST_STAGE_CHUNKS = 8;
constexpr int MOST_BLOCK_BYTES_OF_SMALL = 208 * 1024, MOST_RING_BYTES_OF_SMALL = 128 * 1024;
constexpr int PREFETCHED_STAGES = 2; // more delay the wait for the kernel before
[[maybe_unused]] constexpr long long PATIENCE = 60000; // cycles, beyond twice what the block's own share took

// How one layer is cut among blocks, and into stages. Units are counted in groups.
struct LayerPlan {
  int rows;             // units in all
  int share, remainder; // groups of every part; the first `remainder` parts have one more
  int passes, pass_groups;
  int chunk_bytes;  // of one chunk's tokens and weights
  int chunks;       // of the whole depth
  int sum_chunks;   // of one sum: the depth, or a part of it
  int stage_chunks;
  int sum_stages;
  int group_distance; // bytes between two groups
};

struct HopperPlan {
  LayerPlan first, second;
  int slices; // of the first layer, each a block's
  int parts; // of the second layer's depth: the blocks of a set
  int sets;     // of blocks that share down-projection rows
  int slots, slot_bytes;
  int prefetched_stages;
};

struct Maps {
  CUtensorMap x, gate, up, hidden, down;
};

#ifdef FUSED_MLP_HOPPER

__device__ __forceinline__ int part_begin(const LayerPlan &plan, int part) {
  return part * plan.share + min(part, plan.remainder);
}

// What the consumers are to do with a stage.
enum StageFlags : int {
  SECOND_LAYER = 1,
  PASS_BEGINS = 2,
  PASS_ENDS = 4,
  DELIVER = 8, // the slice is ours, and complete
  LAST = 16,
};
struct __align__(16) Stage {
  int flags;
  int first_chunk_and_chunks; // in the upper and lower half
  int begin, end;             // rows of the pass
  __device__ __forceinline__ Stage uniform() const {
    return {fused_mlp::uniform(flags), fused_mlp::uniform(first_chunk_and_chunks), fused_mlp::uniform(begin),
            fused_mlp::uniform(end)};
  }
};

__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// What an atomic returned, looked at only where this stands: until then nothing waits for it.
__device__ __forceinline__ unsigned by_now(unsigned returned) {
  asm volatile("" : "+r"(returned));
  return returned;
}

// The ring, as the producer walks it.
struct Ring {
  unsigned memory, full, empty;
  int slots, slot_bytes;
  int slot;
  unsigned parity; // of the phase of `empty` to wait for
  __device__ __forceinline__ void next() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void wait_until_empty() const { barrier_wait(empty + 8 * slot, parity); }
  __device__ __forceinline__ unsigned barrier() const { return full + 8 * slot; }
  __device__ __forceinline__ unsigned at() const { return memory + slot * slot_bytes; }
};

// atomicInc that shows others what this thread knows of, and this thread what they knew of.
__device__ __forceinline__ unsigned count_in_order(unsigned *p, unsigned most) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(most) : "memory");
  return before;
}

// d (16 x 8) += a (16 x 8) b (8 x 8)^T; a thread holds of d what a warpgroup's product gives it.
__device__ __forceinline__ void add_product(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The products of one chunk of f32 for each of some tiles: 64 rows with all tokens, whose sums are of that chunk alone. Of
// fewer groups of rows than eight the last stands for those that are not there, and its sums go nowhere. A
// warpgroup's products of so few columns take as long as those of many, and its warps' own do not.
template <int NT, int TILES>
__device__ __forceinline__ void multiply_f32(float (&sums)[TILES][NT / 2], const unsigned (&weights)[TILES],
                                             unsigned group_bytes, int groups, const unsigned (&tokens)[TILES]) {
  constexpr int COLUMNS = NT / GROUP;
  const int warp = threadIdx.x >> 5 & 3, row = threadIdx.x >> 2 & 7, column = threadIdx.x & 3;
  float large[TILES][COLUMNS][4] = {}, small[TILES][COLUMNS][4] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) // eight elements of depth: two pieces of 16 bytes
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      auto at = [&](unsigned group, int piece) {
        return group + row * SWIZZLE_BYTES + ((2 * k + piece) ^ row) * 16 + column * 4;
      };
      unsigned high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = load_shared(at(weights[tile] + min(2 * warp + (i & 1), groups - 1) * group_bytes, i >> 1));
        high[i] = __float_as_uint(high_part(v));
        low[i] = low_part(v);
      }
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        unsigned b[2], low_b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float v = load_shared(at(tokens[tile] + j * CHUNK_GROUP, i));
          b[i] = __float_as_uint(high_part(v));
          low_b[i] = low_part(v);
        }
        add_product(small[tile][j], low, b);
        add_product(small[tile][j], high, low_b);
        add_product(large[tile][j], high, b);
      }
    }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < NT / 2; ++i)
      sums[tile][i] = large[tile][i / 4][i % 4] + small[tile][i / 4][i % 4];
}

// Asks for the weights of one stage, `groups` groups from `row` on: gate rows, then up rows.
__device__ __forceinline__ void copy_weights(const Ring &ring, unsigned to, const LayerPlan &layer, const CUtensorMap *map,
                                             int row, int groups, int chunk, unsigned long long policy) {
  for (int g = 0; g < groups; ++g)
    copy_chunks(to + g * layer.group_distance, map, row + g * GROUP, chunk, ring.barrier(), policy);
}

template <int NT>
__device__ __forceinline__ void produce(const Shape &shape, const HopperPlan &plan, const Maps &maps, Stage *stages,
                                        Ring ring) {
  const LayerPlan &first = plan.first;
  const LayerPlan &second = plan.second;
  const unsigned long long weights_policy = evict_first_policy(), tokens_policy = evict_last_policy();
  const int set = blockIdx.x / plan.parts, part = blockIdx.x - set * plan.parts;
  const bool has_rows = set < plan.sets;
  const int first_token_bytes = first.stage_chunks * NT * SWIZZLE_BYTES;
  const int second_token_bytes = second.stage_chunks * NT * SWIZZLE_BYTES;

  // Asks for the passes over groups [group, end) of the first layer.
  auto produce_first = [&](int group, int end, unsigned claimed_before) {
    while (group < end) {
      const int groups = min(first.pass_groups, end - group);
      const bool ends = group + groups == end;
      for (int s = 0; s < first.sum_stages; ++s, ring.next()) {
        const int chunk = s * first.stage_chunks;
        ring.wait_until_empty();
        Stage &stage = stages[ring.slot];
        stage.flags = s == 0 ? PASS_BEGINS : 0;
        if (s + 1 == first.sum_stages)
          stage.flags |= PASS_ENDS | (ends && by_now(claimed_before) == 0u ? DELIVER : 0);
        stage.first_chunk_and_chunks = chunk << 16 | min(first.stage_chunks, first.chunks - chunk);
        stage.begin = group * GROUP;
        stage.end = min((group + groups) * GROUP, first.rows);
        const int matrices = shape.gated ? 2 : 1;
        barrier_arrive_expect(ring.barrier(), first_token_bytes + matrices * groups * first.group_distance);
        copy_chunks(ring.at(), &maps.x, 0, chunk, ring.barrier(), tokens_policy);
        const unsigned to = ring.at() + first_token_bytes;
        copy_weights(ring, to, first, &maps.gate, group * GROUP, groups, chunk, weights_policy);
        if (shape.gated)
          copy_weights(ring, to + groups * first.group_distance, first, &maps.up, group * GROUP, groups, chunk,
                       weights_policy);
      }
      group += groups;
    }
  };

  prefetch_map(&maps.x);
  prefetch_map(&maps.gate);
  prefetch_map(&maps.up);
  prefetch_map(&maps.hidden);
  prefetch_map(&maps.down);
  const bool has_slice = blockIdx.x < plan.slices;
  const int own_begin = has_slice ? part_begin(first, blockIdx.x) : 0;
  const int own_end = has_slice ? part_begin(first, blockIdx.x + 1) : 0;
  for (int s = 0; s < plan.prefetched_stages; ++s)
    for (int g = own_begin; g < min(own_end, own_begin + first.pass_groups); ++g) {
      prefetch_chunks(&maps.gate, g * GROUP, s * first.stage_chunks);
      if (shape.gated)
        prefetch_chunks(&maps.up, g * GROUP, s * first.stage_chunks);
    }
  wait_for_previous_kernel();
  release_next_kernel();
  const long long start = clock64();
  if (has_slice)
    produce_first(own_begin, own_end, atomicExch(&shape.counters->claim[blockIdx.x], 1u));
  // The second layer's stages: pass by pass this block's part of the depth.
  const int row_begin = has_rows ? part_begin(second, set) : 0, row_end = has_rows ? part_begin(second, set + 1) : 0;
  const int depth_begin = part * second.sum_chunks, depth_end = min(depth_begin + second.sum_chunks, second.chunks);
  struct Cursor {
    int group, stage;
  };
  auto advance = [&](Cursor &at) {
    if (++at.stage == second.sum_stages)
      at = {at.group + second.pass_groups, 0};
  };
  auto groups_of = [&](const Cursor &at) { return min(second.pass_groups, row_end - at.group); };
  auto chunk_of = [&](const Cursor &at) { return depth_begin + at.stage * second.stage_chunks; };
  auto ask_weights = [&](const Cursor &at) {
    ring.wait_until_empty();
    barrier_expect(ring.barrier(), groups_of(at) * second.group_distance);
    copy_weights(ring, ring.at() + second_token_bytes, second, &maps.down, at.group * GROUP, groups_of(at), chunk_of(at),
                 weights_policy);
  };
  auto ask_tokens = [&](const Cursor &at) {
    const int chunk = chunk_of(at);
    const bool pass_ends = at.stage + 1 == second.sum_stages;
    Stage &stage = stages[ring.slot];
    stage.flags = SECOND_LAYER | (at.stage == 0 ? PASS_BEGINS : 0) | (pass_ends ? PASS_ENDS : 0) |
                  (pass_ends && at.group + second.pass_groups >= row_end ? LAST : 0);
    stage.first_chunk_and_chunks = chunk << 16 | max(0, min(second.stage_chunks, depth_end - chunk));
    stage.begin = at.group * GROUP;
    stage.end = min((at.group + groups_of(at)) * GROUP, second.rows);
    barrier_arrive_expect(ring.barrier(), second_token_bytes);
    copy_chunks(ring.at(), &maps.hidden, 0, chunk, ring.barrier(), tokens_policy);
  };
  const int stages_in_all = divide_up(row_end - row_begin, second.pass_groups) * second.sum_stages;
  const int ahead = min(plan.slots, stages_in_all);
  bool own = true;
  // A block without down rows waits for nobody.
  while (has_rows) {
    const Ring before = ring;
    Cursor at = {row_begin, 0};
    for (int i = 0; i < ahead; ++i, advance(at), ring.next())
      ask_weights(at);
    int rescue = -1;
    // Once a block has had to help, it helps on without waiting again.
    const long long since = clock64(), patience = own ? 2 * (since - start) + PATIENCE : 0;
    bool all_claimed = false;
    while (rescue < 0 && load_acquire(&shape.counters->arrived) < plan.slices) {
      if (all_claimed || clock64() - since <= patience)
        continue;
      all_claimed = true;
      for (int i = 0; i < plan.slices && rescue < 0; ++i) {
        const int other = (blockIdx.x + i) % plan.slices;
        if (atomicExch(&shape.counters->claim[other], 1u) == 0u)
          rescue = other;
      }
    }
    ring.slot = before.slot;
    ring.parity = before.parity;
    if (rescue < 0)
      break;
    own = false;
    for (int i = 0; i < ahead; ++i, ring.next()) {
      stages[ring.slot].flags = 0;
      stages[ring.slot].first_chunk_and_chunks = 0; // no chunks: the consumers give the slot back
      barrier_arrive(ring.barrier());
    }
    produce_first(part_begin(first, rescue), part_begin(first, rescue + 1), 0u);
  }
  fence_global_copies();
  const unsigned passed_before = atomicInc(&shape.counters->passed, gridDim.x - 1);
  Cursor at = {row_begin, 0};
  for (int i = 0; i < stages_in_all; ++i, advance(at), ring.next()) {
    if (i >= ahead)
      ask_weights(at);
    ask_tokens(at);
  }
  if (!has_rows) {
    ring.wait_until_empty();
    stages[ring.slot].flags = LAST;
    stages[ring.slot].first_chunk_and_chunks = 0;
    barrier_arrive(ring.barrier());
  }
  // Everybody is past the wait: the counters may go back to zero.
  if (by_now(passed_before) == gridDim.x - 1) {
    for (int i = 0; i < plan.slices; ++i)
      shape.counters->claim[i] = 0u;
    shape.counters->arrived = 0u;
  }
}

#endif // FUSED_MLP_HOPPER

template <typename T, int NT>
__global__ void __launch_bounds__(THREADS, 1)
    decode_hopper_kernel(const __grid_constant__ Shape shape, const __grid_constant__ HopperPlan plan,
                         const __grid_constant__ Maps maps) {
#ifdef FUSED_MLP_HOPPER
  constexpr int SUMS = NT / 2;
  constexpr bool IS_F32 = std::is_same_v<T, float>;
  extern __shared__ __align__(SWIZZLE_ALIGN) unsigned char shared[];
  __shared__ Stage stages[MAX_SLOTS];
  __shared__ __align__(8) unsigned long long full_barriers[MAX_SLOTS], empty_barriers[MAX_SLOTS];
  const unsigned ring = shared_address(shared), full = shared_address(full_barriers),
                 empty = shared_address(empty_barriers);
  const LayerPlan &first = plan.first;
  const LayerPlan &second = plan.second;
  const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < plan.slots; ++slot) {
      barrier_init(full + 8 * slot, 1);
      barrier_init(empty + 8 * slot, CONSUMERS / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp == CONSUMERS / 32) {
    // The first round of the ring finds its slots empty.
    if (lane == 0)
      produce<NT>(shape, plan, maps, stages, {ring, full, empty, plan.slots, plan.slot_bytes, 0, 1});
    return;
  }

  // The consumers. A thread's rows of a tile are `row` and row + 8, its tokens 8 j + token and + 1.
  const int warpgroup = warp >> 2, thread = threadIdx.x & 127;
  const int row = (warp & 3) * 16 + (lane >> 2), token = (lane & 3) * 2;
  float *const exchange = reinterpret_cast<float *>(shared + plan.slots * plan.slot_bytes);
  // A gated layer whose rows are not shared keeps four sums: gate and up of even chunks, and of odd ones.
  constexpr int KEPT = NT > MOST_SHARED_TOKENS && !IS_F32 ? 4 : 2;
  float acc[KEPT][SUMS] = {};
  bool begun[KEPT] = {}; // whether acc holds a sum
  auto sum_of = [&](int which, int i) { return begun[which] ? acc[which][i] : 0.f; };
  // Of the unit whose sums the thread rounds off in the first layer: of gate, of up; or of two down rows. They stay as they are
  // in memory until they are added: whatever makes a number of them would wait for them.
  T bias[2] = {};
  wait_for_previous_kernel();

  const long long block_sums = static_cast<long long>(second.passes) * WARPGROUPS * (SUMS / 4) * 128;
  float4 *const partial_sums = reinterpret_cast<float4 *>(shape.partial) + blockIdx.x * block_sums + thread;
  // With at most 64 rows in a pass both warpgroups have them, and share the chunks.
  const bool first_shared = first.pass_groups <= TILE_GROUPS, second_shared = second.pass_groups <= TILE_GROUPS;
  // Few enough gate and up rows are one tile.
  const bool packed = shape.gated && 2 * first.pass_groups <= TILE_GROUPS;
  const int set = blockIdx.x / plan.parts;
  // The biases of a thread's down rows in a tile that begins with row `first_row`.
  auto ask_bias_down = [&](int first_row, int end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = first_row + row + 8 * i;
      bias[i] = shape.bias_down && at < end ? static_cast<const T *>(shape.bias_down)[at] : T{};
    }
  };
  // Rounds off and writes the i-th of a thread's sums of such a tile.
  auto write = [&](int i, int first_row, int end, float sum) {
    const int at = first_row + row + 8 * (i >> 1 & 1), t = 8 * (i >> 2) + token + (i & 1);
    if (at < end && t < shape.tokens)
      static_cast<T *>(shape.out)[static_cast<long long>(t) * shape.output_size + at] =
          from_float<T>(sum + to_float(bias[i >> 1 & 1]));
  };
  int slot = 0, pass = 0;
  unsigned parity = 0;
  for (;;) {
    barrier_wait(full + 8 * slot, parity);
    const Stage stage = stages[slot].uniform();
    const bool is_second = stage.flags & SECOND_LAYER;
    const LayerPlan &layer = is_second ? second : first;
    const bool chunks_shared = is_second ? second_shared : first_shared;
    const int row_tile = chunks_shared ? 0 : warpgroup * TILE_ROWS;
    const int begin = stage.begin, end = stage.end;
    // A thread rounds off every so many tokens' sums of one unit.
    const int unit_bits = 32 - __clz(max(end - begin, GROUP) - 1), unit_column = threadIdx.x & ((1 << unit_bits) - 1);
    const int unit = begin + unit_column;
    if ((stage.flags & PASS_BEGINS) && is_second)
      ask_bias_down(begin + row_tile, end);
    if ((stage.flags & PASS_BEGINS) && !is_second) {
      // Wanted only when the pass ends, and here by then.
      bias[0] = shape.bias_gate && unit < end ? static_cast<const T *>(shape.bias_gate)[unit] : T{};
      bias[1] = shape.bias_up && unit < end ? static_cast<const T *>(shape.bias_up)[unit] : T{};
    }
    // One tile's sums are in acc[0], two tiles' or two parities' in acc[0] and acc[1], two tiles' of two parities in all four.
    const int first_chunk = stage.first_chunk_and_chunks >> 16, chunks = stage.first_chunk_and_chunks & 0xffff;
    const unsigned tokens = ring + slot * plan.slot_bytes,
                   weights = tokens + layer.stage_chunks * NT * SWIZZLE_BYTES + row_tile / GROUP * layer.group_distance;
    const bool one_matrix = is_second || !shape.gated || packed;
    const int up = (end - begin + GROUP - 1) / GROUP * layer.group_distance;
    const int mine = (chunks_shared ? first_chunk ^ warpgroup : first_chunk) & 1;
    if constexpr (IS_F32) {
      // Two tiles' products at a time: of one chunk gate and up, or else of two chunks.
      auto add_parts = [&](float(&sums)[SUMS], const float(&part)[SUMS], bool &has_begun) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i)
          sums[i] = has_begun ? sums[i] + part[i] : part[i];
        has_begun = true;
      };
      // Groups of rows in the warpgroup's tile; in a pass's last tile there may be none.
      const int pass_groups = divide_up(end - begin, GROUP);
      const int groups = packed && !is_second ? 2 * pass_groups : min(TILE_GROUPS, pass_groups - row_tile / GROUP);
      auto rows_at = [&](int c) { return weights + c * CHUNK_GROUP; };
      auto tokens_at = [&](int c) { return tokens + c * NT * SWIZZLE_BYTES; };
      auto add_chunks = [&](float(&sums)[SUMS], int from, bool &has_begun) {
        int c = from;
        for (; c + 2 < chunks; c += 4) {
          float part[2][SUMS];
          multiply_f32<NT, 2>(part, {rows_at(c), rows_at(c + 2)}, layer.group_distance, groups,
                              {tokens_at(c), tokens_at(c + 2)});
          add_parts(sums, part[0], has_begun);
          add_parts(sums, part[1], has_begun);
        }
        if (c < chunks) {
          float part[1][SUMS];
          multiply_f32<NT, 1>(part, {rows_at(c)}, layer.group_distance, groups, {tokens_at(c)});
          add_parts(sums, part[0], has_begun);
        }
      };
      if (one_matrix && groups > 0) {
        add_chunks(acc[0], mine, begun[0]);
        if (!chunks_shared)
          add_chunks(acc[1], 1 - mine, begun[1]);
      } else if (!one_matrix) {
        for (int c = mine; c < chunks; c += 2) {
          float part[2][SUMS];
          multiply_f32<NT, 2>(part, {rows_at(c), rows_at(c) + up}, layer.group_distance, groups,
                              {tokens_at(c), tokens_at(c)});
          add_parts(acc[0], part[0], begun[0]);
          add_parts(acc[1], part[1], begun[1]);
        }
      }
    } else {
      auto add = [&](float(&sums)[SUMS], int c, int offset, bool &has_begun) {
        multiply<T, NT>(sums, weights + c * CHUNK_GROUP + offset, layer.group_distance, tokens + c * NT * SWIZZLE_BYTES,
                        CHUNK_GROUP, has_begun);
        has_begun = true;
      };
      products_begin();
      if (one_matrix) {
        // Even chunks, odd chunks: one warpgroup each, or one sum each.
        for (int c = mine; c < chunks; c += 2)
          add(acc[0], c, 0, begun[0]);
        if (!chunks_shared)
          for (int c = 1 - mine; c < chunks; c += 2)
            add(acc[1], c, 0, begun[1]);
      } else {
        for (int c = mine; c < chunks; c += 2) {
          add(acc[0], c, 0, begun[0]);
          add(acc[1], c, up, begun[1]);
        }
        if constexpr (KEPT == 4)
          if (!chunks_shared)
            for (int c = 1 - mine; c < chunks; c += 2) {
              add(acc[2], c, 0, begun[2]);
              add(acc[3], c, up, begun[3]);
            }
      }
      products_commit();
      products_wait<0>();
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      pin(acc[i]);
    __syncwarp(); // f32 was read by the lanes themselves
    if (lane == 0)
      barrier_arrive(empty + 8 * slot);
    if (++slot == plan.slots) {
      slot = 0;
      parity ^= 1;
    }
    if ((stage.flags & PASS_ENDS) && !is_second) {
      // Sums go through shared memory, so that each thread rounds off some tokens of one unit.
      constexpr int TOKENS = NT < ROUND_TOKENS ? NT : ROUND_TOKENS;
      const float *const sums = exchange + unit_column;
      const int up_column = packed ? divide_up(end - begin, GROUP) * GROUP : 2 * TILE_ROWS;
#pragma unroll
      for (int t0 = 0; t0 < NT; t0 += TOKENS) {
        if (t0 >= shape.tokens)
          break;
#pragma unroll
        for (int i = t0 / 2; i < (t0 + TOKENS) / 2; ++i) {
          float *const to =
              exchange + (8 * (i >> 2) - t0 + token + (i & 1)) * ROUND_PITCH + warpgroup * TILE_ROWS + row + 8 * (i >> 1 & 1);
          const float odd = shape.gated ? sum_of(KEPT - 2, i) : sum_of(1, i); // of rows that are not shared
          to[0] = chunks_shared ? sum_of(0, i) : sum_of(0, i) + odd;
          if (shape.gated && !packed)
            to[2 * TILE_ROWS] = chunks_shared ? sum_of(1, i) : sum_of(1, i) + sum_of(KEPT - 1, i);
        }
        consumers_meet();
        if (unit < end) {
          constexpr int AT_ONCE = NT > 8 ? 2 : 1;
          const int step = CONSUMERS >> unit_bits, tokens = min(TOKENS, shape.tokens - t0);
#pragma unroll 1
          for (int t = threadIdx.x >> unit_bits; t < tokens; t += AT_ONCE * step) {
            auto sum = [&](int i, int column) {
              const float *const at = sums + min(t + i * step, TOKENS - 1) * ROUND_PITCH + column;
              return chunks_shared ? at[0] + at[TILE_ROWS] : at[0];
            };
            float value[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
              value[i] = sum(i, 0) + to_float(bias[0]);
            activate_all(shape.activation, float(shape.activation_param), value);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
              if (shape.gated)
                value[i] *= sum(i, up_column) + to_float(bias[1]);
              if (t + i * step < tokens)
                static_cast<T *>(shape.hidden)[(t0 + t + i * step) * shape.hidden_stride + unit] = from_float<T>(value[i]);
            }
          }
        }
        consumers_meet();
      }
      if (threadIdx.x == 0 && (stage.flags & DELIVER))
        add_release(&shape.counters->arrived);
#pragma unroll
      for (int i = 0; i < KEPT; ++i)
        begun[i] = false;
    } else if (stage.flags & PASS_ENDS) {
      // The part's sums, even + odd: where those of the set's other blocks are, or rounded off.
      float *const odd = exchange + thread;
      if (chunks_shared) {
        if (warpgroup == 1)
#pragma unroll
          for (int i = 0; i < SUMS; ++i)
            odd[i * 128] = sum_of(0, i);
        consumers_meet();
      }
      if (!chunks_shared || warpgroup == 0) {
        float4 *const to = partial_sums + (pass * WARPGROUPS + warpgroup) * (SUMS / 4) * 128;
        auto sum = [&](int i) { return sum_of(0, i) + (chunks_shared ? odd[i * 128] : sum_of(1, i)); };
        if (plan.parts > 1) {
#pragma unroll
          for (int i = 0; i < SUMS; i += 4)
            to[i / 4 * 128] = make_float4(sum(i), sum(i + 1), sum(i + 2), sum(i + 3));
        } else {
#pragma unroll
          for (int i = 0; i < SUMS; ++i)
            write(i, begin + row_tile, end, sum(i));
        }
      }
      if (chunks_shared && !(stage.flags & LAST))
        consumers_meet(); // before the other warpgroup's next sums
      ++pass;
#pragma unroll
      for (int i = 0; i < KEPT; ++i)
        begun[i] = false;
    }
    if (stage.flags & LAST)
      break;
  }
  if (plan.parts == 1 || set >= plan.sets || (second_shared && warpgroup == 1))
    return;

  // A warp's rows are the same warp's in the blocks that share them: the last of these adds all sums, always in the same
  // order.
  int finishes = 0;
  __syncwarp();
  if (lane == 0)
    finishes = count_in_order(&shape.counters->group_done[set * (CONSUMERS / 32) + warp], plan.parts - 1) == plan.parts - 1;
  __syncwarp();
  if (!__shfl_sync(0xffffffffu, finishes, 0))
    return;
  const int row_tile = second_shared ? 0 : warpgroup * TILE_ROWS;
  const int row_end = min(part_begin(second, set + 1) * GROUP, second.rows);
  for (pass = 0; pass < second.passes; ++pass) {
    const int begin = (part_begin(second, set) + pass * second.pass_groups) * GROUP;
    const int end = min(begin + second.pass_groups * GROUP, row_end);
    const float4 *const from = reinterpret_cast<const float4 *>(shape.partial) + set * plan.parts * block_sums +
                               (pass * WARPGROUPS + warpgroup) * (SUMS / 4) * 128 + thread;
    ask_bias_down(begin + row_tile, end);
    constexpr int AT_ONCE = SUMS < 16 ? SUMS : 16;
#pragma unroll
    for (int i0 = 0; i0 < SUMS; i0 += AT_ONCE) {
      float4 v[MOST_PARTS][AT_ONCE / 4];
#pragma unroll
      for (int s = 0; s < MOST_PARTS; ++s)
#pragma unroll
        for (int i = 0; i < AT_ONCE / 4; ++i)
          v[s][i] = s < plan.parts ? __ldcg(from + s * block_sums + (i0 / 4 + i) * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        auto part = [&](int s) { return reinterpret_cast<const float *>(&v[s][i / 4])[i % 4]; };
        float sum = part(0);
#pragma unroll
        for (int s = 1; s < MOST_PARTS; ++s)
          if (s < plan.parts)
            sum += part(s);
        write(i0 + i, begin + row_tile, end, sum);
      }
    }
  }
#endif // FUSED_MLP_HOPPER
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

LayerPlan plan_layer(int rows, int parts, int matrices, int chunks, int sum_chunks, int token_bytes, int most_pass_groups) {
  LayerPlan plan;
  plan.rows = rows;
  const int groups = divide_up(rows, GROUP), most = divide_up(groups, parts);
  plan.share = groups / parts;
  plan.remainder = groups % parts;
  plan.passes = divide_up(most, most_pass_groups);
  plan.pass_groups = divide_up(most, plan.passes);
  plan.chunks = chunks;
  plan.sum_chunks = sum_chunks;
  plan.chunk_bytes = token_bytes + matrices * plan.pass_groups * CHUNK_GROUP;
  // As many chunks as fit, if a divisor of their number is near; or else stages of one size, as few as can be.
  const int fit = MOST_STAGE_BYTES / plan.chunk_bytes;
  const int most_chunks = fit < 1 ? 1 : fit > MOST_STAGE_CHUNKS ? MOST_STAGE_CHUNKS : fit;
  plan.stage_chunks = most_chunks < plan.sum_chunks ? most_chunks : plan.sum_chunks;
  while (plan.sum_chunks % plan.stage_chunks != 0)
    --plan.stage_chunks;
  if (2 * plan.stage_chunks < most_chunks && plan.stage_chunks < plan.sum_chunks)
    plan.stage_chunks = divide_up(plan.sum_chunks, divide_up(plan.sum_chunks, most_chunks));
  plan.sum_stages = divide_up(plan.sum_chunks, plan.stage_chunks);
  plan.group_distance = plan.stage_chunks * CHUNK_GROUP;
  return plan;
}

// What the last tile of a pass reads behind its groups: it is multiplied as one of 64 rows.
int overread(const LayerPlan &plan) { return (PASS_GROUPS - plan.pass_groups) % TILE_GROUPS * plan.group_distance; }

using Kernel = void (*)(Shape, HopperPlan, Maps);

template <typename T> Kernel kernel_of(int token_rows) {
  switch (token_rows) {
  case 8: return decode_hopper_kernel<T, 8>;
  case 16: return decode_hopper_kernel<T, 16>;
  case 32: return decode_hopper_kernel<T, 32>;
  default: return decode_hopper_kernel<T, 64>;
  }
}
template <> Kernel kernel_of<float>(int token_rows) {
  return token_rows == 8    ? decode_hopper_kernel<float, 8>
         : token_rows == 16 ? decode_hopper_kernel<float, 16>
                            : decode_hopper_kernel<float, MOST_F32_TOKENS>;
}
Kernel kernel_of(int dtype, int token_rows) {
  return dtype == FUSED_MLP_BF16  ? kernel_of<__nv_bfloat16>(token_rows)
         : dtype == FUSED_MLP_F16 ? kernel_of<__half>(token_rows)
                                  : kernel_of<float>(token_rows);
}

int most_tokens(int dtype) { return dtype == FUSED_MLP_F32 ? MOST_F32_TOKENS : MAX_TOKENS; }
int token_rows_of(int tokens) { return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

int dynamic_limit(const DeviceFacts &device) { return device.shared_bytes_per_block - 1024; }

} // namespace

bool can_decode_hopper(const DeviceFacts &device, int dtype, int tokens, int hidden_size, int intermediate_size) {
  const int chunk = SWIZZLE_BYTES / map_element_bytes(dtype);
  return device.hopper && (dtype != FUSED_MLP_F32 || tokens <= MOST_F32_TOKENS) && hidden_size % chunk == 0 &&
         intermediate_size % chunk == 0;
}

unsigned long long decode_hopper_partial_elements(int output_size) {
  return 1ull * MAX_TOKENS * (MOST_PARTS * (output_size + GROUP) + MOST_DECODE_BLOCKS * PASS_GROUPS * GROUP);
}

int prepare_decode_hopper(DeviceFacts &device) {
  // Compiled for anything else the kernels are empty, and use no shared memory of their own.
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(kernel_of(FUSED_MLP_BF16, 8)));
  if (error != cudaSuccess)
    return error;
  device.hopper = attributes.sharedSizeBytes > 0 && tensor_map_encoder();
  if (!device.hopper)
    return FUSED_MLP_OK;
  for (int dtype = FUSED_MLP_BF16; dtype <= FUSED_MLP_F32; ++dtype)
    for (int rows = 8; rows <= most_tokens(dtype); rows *= 2) {
      const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel_of(dtype, rows)),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_limit(device));
      if (error != cudaSuccess)
        return error;
    }
  return FUSED_MLP_OK;
}

int launch_decode_hopper(const Shape &shape, int dtype, const DeviceFacts &device, cudaStream_t stream) {
  const int blocks = decode_blocks(device);
  const int token_rows = token_rows_of(shape.tokens);
  const bool is_f32 = dtype == FUSED_MLP_F32;
  const int chunk = SWIZZLE_BYTES / map_element_bytes(dtype);
  HopperPlan plan;
  // Functions of the weights' shape and the GPU alone: they decide the order of the additions.
  const int token_bytes = token_rows * SWIZZLE_BYTES;
  const int first_chunks = shape.hidden_size / chunk;
  plan.first = plan_layer(shape.intermediate_size, blocks, shape.gated ? 2 : 1, first_chunks, first_chunks, token_bytes,
                          token_rows > MOST_SHARED_TOKENS && !is_f32 ? PASS_GROUPS : TILE_GROUPS);
  plan.slices = plan.first.share > 0 ? blocks : plan.first.remainder;
  const int chunks = shape.intermediate_size / chunk;
  const int part = part_chunks(chunks, depth_parts(blocks, shape.output_size, shape.intermediate_size));
  plan.parts = divide_up(chunks, part);
  plan.sets = blocks / plan.parts;
  if (plan.sets < 1)
    return FUSED_MLP_UNSUPPORTED;
  plan.second = plan_layer(shape.output_size, plan.sets, 1, chunks, part, token_bytes, PASS_GROUPS);
  if (plan.second.share == 0)
    plan.sets = plan.second.remainder;

  const int first_bytes = plan.first.stage_chunks * plan.first.chunk_bytes;
  const int second_bytes = plan.second.stage_chunks * plan.second.chunk_bytes;
  plan.slot_bytes = first_bytes > second_bytes ? first_bytes : second_bytes;
  int after_ring = (token_rows < ROUND_TOKENS ? token_rows : ROUND_TOKENS) * ROUND_PITCH * int(sizeof(float));
  after_ring = overread(plan.first) > after_ring ? overread(plan.first) : after_ring;
  after_ring = overread(plan.second) > after_ring ? overread(plan.second) : after_ring;
  plan.slots = (dynamic_limit(device) - after_ring) / plan.slot_bytes;
  if (plan.slots > MAX_SLOTS)
    plan.slots = MAX_SLOTS;
  // A ring that held nearly all of a block's weights would ask for down rows while others still wait for their first ones.
  const long long block_bytes = 1ll * map_element_bytes(dtype) * (shape.gated ? 3 : 2) * shape.hidden_size *
                                shape.intermediate_size / blocks;
  const int few = MOST_RING_BYTES_OF_SMALL / plan.slot_bytes < 3 ? 3 : MOST_RING_BYTES_OF_SMALL / plan.slot_bytes;
  if (token_rows <= MOST_SHARED_TOKENS && block_bytes < MOST_BLOCK_BYTES_OF_SMALL && plan.slots > few)
    plan.slots = few;
  // No more slots than one block has stages: beside a small ring there is room for a block of the next launch.
  const int stages = plan.first.passes * plan.first.sum_stages + plan.second.passes * plan.second.sum_stages;
  if (plan.slots > stages)
    plan.slots = stages;
  if (plan.slots < 2)
    return FUSED_MLP_UNSUPPORTED;
  plan.prefetched_stages = plan.first.sum_stages < PREFETCHED_STAGES ? plan.first.sum_stages : PREFETCHED_STAGES;

  Maps maps;
  const long long x_stride = shape.tokens > 1 ? shape.x_stride : shape.hidden_size;
  const int h = shape.hidden_size, n = shape.intermediate_size;
  const int first_box = plan.first.stage_chunks, second_box = plan.second.stage_chunks;
  int status = chunk_map(&maps.x, {shape.x, shape.tokens, h, x_stride, 0, dtype, token_rows, first_box, 1});
  if (status == FUSED_MLP_OK)
    status = chunk_map(&maps.gate, {shape.gate, n, h, shape.gate_stride, 0, dtype, GROUP, first_box, 1});
  if (status == FUSED_MLP_OK && shape.gated)
    status = chunk_map(&maps.up, {shape.up, n, h, shape.up_stride, 0, dtype, GROUP, first_box, 1});
  if (status == FUSED_MLP_OK)
    status = chunk_map(&maps.hidden, {shape.hidden, shape.tokens, n, shape.hidden_stride, 0, dtype, token_rows, second_box, 1});
  if (status == FUSED_MLP_OK)
    status = chunk_map(&maps.down, {shape.down, shape.output_size, n, shape.down_stride, 0, dtype, GROUP, second_box, 1});
  if (status != FUSED_MLP_OK)
    return status;
  if (!shape.gated)
    maps.up = maps.gate;

  return launch_decode(kernel_of(dtype, token_rows), blocks, THREADS, plan.slots * plan.slot_bytes + after_ring, true, stream,
                       shape, plan, maps);
}

} // namespace fused_mlp
