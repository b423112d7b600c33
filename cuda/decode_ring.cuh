// Hopper's ring, for decode_hopper.cu (16 bits) and decode_hopper_f32.cu: how a layer is cut among blocks and into stages, and
// the thread that keeps the stages coming.
//
// One block per multiprocessor. One thread, the producer, keeps a ring of stages in shared memory full; eight warps, the
// consumers, multiply what has come. A stage is some chunks of 128 bytes of depth: of each, the block's
// weight rows and the tokens' rows. A copy brings eight weight rows of a stage's chunks: neighbours in memory are asked
// for together, which memory rewards.
//
// The first layer's units (a hidden element: its gate row, and its up row) are divided among blocks in groups of eight, then
// the down projection's rows. When the producer has asked for its last gate and up rows it goes on to ask for down rows,
// which depend on nothing: the one grid-wide wait, for the hidden rows, passes while they are on the way. Only the hidden
// rows themselves are asked for after it. The second layer's depth may be cut into parts, each a block's, so that blocks
// read a part of the hidden rows for so many times as many down rows; the last block to be done adds the parts.
//
// Some multiprocessors get a third more of the bandwidth. They should not ask for down rows while others lack the gate and up rows
// that all wait for: except in small models a producer asks for them only when its own gate and up rows have come.
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
#pragma once
#include "decode_hopper.cuh"

namespace fused_mlp {

constexpr int CONSUMERS = 256; // threads that multiply
constexpr int PASS_GROUPS = 16; // of rows, at most
constexpr int MAX_SLOTS = 16;
constexpr int ROUND_TOKENS = 16; // whose sums are in shared memory at a time, to be rounded off
constexpr int ROUND_PITCH = CONSUMERS + 4; // floats of one token's sums; 4 mod 32 keeps the stores off one bank
constexpr int MOST_STAGE_BYTES = 90 * 1024; // larger stages leave too few for the ring
constexpr int ENOUGH_STAGE_BYTES = 32 * 1024; // smaller ones are short copies
constexpr int MOST_STAGE_CHUNKS = 8;
constexpr int MOST_RING_BYTES_OF_SMALL = 128 * 1024, MOST_TOKENS_OF_SMALL = 16;
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

struct RingPlan {
  LayerPlan first, second;
  int slices; // of the first layer, each a block's
  int parts; // of the second layer's depth: the blocks of a set
  int sets;     // of blocks that share down-projection rows
  int slots, slot_bytes;
  int prefetched_stages;
  bool first_layer_first; // no block asks for down rows before its own gate and up rows have come
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

// The ring, as the producer or a consumer walks it.
struct Ring {
  const RingPlan &plan;
  unsigned memory, full, empty;
  int slot;
  unsigned parity; // of the phase to wait for: of `empty` or of `full`
  __device__ __forceinline__ void next() {
    if (++slot == plan.slots) {
      slot = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void wait_until_empty() const { barrier_wait(empty + 8 * slot, parity); }
  __device__ __forceinline__ void wait_until_full() const { barrier_wait(full + 8 * slot, parity); }
  // For the producer, whose parity is that of `empty`: until what it asked for last has come.
  __device__ __forceinline__ void wait_until_all_come() const {
    const int last = slot > 0 ? slot - 1 : plan.slots - 1;
    const unsigned last_parity = slot > 0 ? parity : parity ^ 1;
    barrier_wait(full + 8 * last, last_parity ^ 1);
  }
  __device__ __forceinline__ void give_back() const { fused_mlp::give_back(empty + 8 * slot); }
  __device__ __forceinline__ unsigned barrier() const { return full + 8 * slot; }
  __device__ __forceinline__ unsigned at() const { return memory + slot * plan.slot_bytes; }
};

// atomicInc that shows others what this thread knows of, and this thread what they knew of.
__device__ __forceinline__ unsigned count_in_order(unsigned *p, unsigned most) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(most) : "memory");
  return before;
}

// Whether a warp is the last of those of its number in the blocks of a set. What they stored before they asked is there.
__device__ __forceinline__ bool is_last_of_set(const Shape &shape, const RingPlan &plan, int set, int warp) {
  int last = 0;
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    last = count_in_order(&shape.counters->group_done[set * (CONSUMERS / 32) + warp], plan.parts - 1) == plan.parts - 1;
  __syncwarp();
  return uniform(last);
}

// Asks for the weights of one stage, `groups` groups from `row` on: gate rows, then up rows.
__device__ __forceinline__ void copy_weights(const Ring &ring, unsigned to, const LayerPlan &layer, const CUtensorMap *map,
                                             int row, int groups, int chunk, unsigned long long policy) {
  for (int g = 0; g < groups; ++g)
    copy_chunks(to + g * layer.group_distance, map, row + g * GROUP, chunk, ring.barrier(), policy);
}

template <int NT>
__device__ __forceinline__ void produce(const Shape &shape, const RingPlan &plan, const Maps &maps, Stage *stages,
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
    const int chunk = chunk_of(at);
    copy_weights(ring, ring.at() + second_token_bytes, second, &maps.down, at.group * GROUP, groups_of(at), chunk,
                 weights_policy);
    const bool pass_ends = at.stage + 1 == second.sum_stages;
    Stage &stage = stages[ring.slot];
    stage.flags = SECOND_LAYER | (at.stage == 0 ? PASS_BEGINS : 0) | (pass_ends ? PASS_ENDS : 0) |
                  (pass_ends && at.group + second.pass_groups >= row_end ? LAST : 0);
    stage.first_chunk_and_chunks = chunk << 16 | max(0, min(second.stage_chunks, depth_end - chunk));
    stage.begin = at.group * GROUP;
    stage.end = min((at.group + groups_of(at)) * GROUP, second.rows);
  };
  auto ask_tokens = [&](const Cursor &at) {
    barrier_arrive_expect(ring.barrier(), second_token_bytes);
    copy_chunks(ring.at(), &maps.hidden, 0, chunk_of(at), ring.barrier(), tokens_policy);
  };
  const int stages_in_all = divide_up(row_end - row_begin, second.pass_groups) * second.sum_stages;
  const int ahead = min(plan.slots, stages_in_all);
  if (plan.first_layer_first && has_slice && has_rows)
    ring.wait_until_all_come();
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

// Readies the ring, which is as a consumer walks it first, and runs its producer, behind the consumers. Whether the caller is one
// of these. A producer that has a warpgroup for itself keeps so many registers.
template <int NT, int PRODUCER_REGISTERS = 0>
__device__ __forceinline__ bool start_ring(const Shape &shape, const RingPlan &plan, const Maps &maps, Stage *stages,
                                           Ring ring) {
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < plan.slots; ++slot) {
      barrier_init(ring.full + 8 * slot, 1);
      barrier_init(ring.empty + 8 * slot, CONSUMERS / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  const int warp = warp_of_block();
  if (warp < CONSUMERS / 32)
    return true;
  if constexpr (PRODUCER_REGISTERS > 0)
    give_registers<PRODUCER_REGISTERS>();
  ring.parity = 1; // the first round of the ring finds its slots empty
  if (warp == CONSUMERS / 32 && elected())
    produce<NT>(shape, plan, maps, stages, ring);
  return false;
}

#endif // FUSED_MLP_HOPPER

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

inline LayerPlan plan_layer(int rows, int parts, int matrices, int chunks, int sum_chunks, int token_bytes, int most_pass_groups,
                            int most_stage_bytes) {
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
  const int fit = most_stage_bytes / plan.chunk_bytes;
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

using RingKernel = void (*)(Shape, RingPlan, Maps);

// Shared memory for the sums of ROUND_TOKENS tokens.
inline int exchange_bytes(int token_rows) {
  return (token_rows < ROUND_TOKENS ? token_rows : ROUND_TOKENS) * ROUND_PITCH * static_cast<int>(sizeof(float));
}

inline int dynamic_limit(const DeviceFacts &device) { return device.shared_bytes_per_block - 1024; }

// Launches a kernel of so many threads for `token_rows` tokens that takes at most so many groups of units at a time, and, behind the ring, as many
// bytes of shared memory as `after_ring_bytes` says of a plan.
inline int launch_ring(RingKernel kernel, int threads, const Shape &shape, int dtype, int token_rows,
                       int most_first_groups, int (*after_ring_bytes)(const RingPlan &, int token_rows),
                       const DeviceFacts &device, cudaStream_t stream) {
  const int blocks = decode_blocks(device);
  const int chunk = SWIZZLE_BYTES / map_element_bytes(dtype);
  RingPlan plan;
  // Functions of the weights' shape and the GPU alone: they decide the order of the additions.
  const int token_bytes = token_rows * SWIZZLE_BYTES;
  const int first_chunks = shape.hidden_size / chunk;
  plan.first = plan_layer(shape.intermediate_size, blocks, shape.gated ? 2 : 1, first_chunks, first_chunks, token_bytes,
                          most_first_groups, MOST_STAGE_BYTES);
  plan.slices = plan.first.share > 0 ? blocks : plan.first.remainder;
  const int chunks = shape.intermediate_size / chunk;
  const int part = part_chunks(chunks, depth_parts(blocks, shape.output_size, shape.intermediate_size));
  plan.parts = divide_up(chunks, part);
  plan.sets = blocks / plan.parts;
  if (plan.sets < 1)
    return FUSED_MLP_UNSUPPORTED;
  const int first_bytes = plan.first.stage_chunks * plan.first.chunk_bytes;
  const auto with_second = [&](RingPlan plan, int most_stage_bytes) {
    plan.second = plan_layer(shape.output_size, plan.sets, 1, chunks, part, token_bytes, PASS_GROUPS, most_stage_bytes);
    const int second_bytes = plan.second.stage_chunks * plan.second.chunk_bytes;
    plan.slot_bytes = first_bytes > second_bytes ? first_bytes : second_bytes;
    const int slots = (dynamic_limit(device) - after_ring_bytes(plan, token_rows)) / plan.slot_bytes;
    plan.slots = slots < MAX_SLOTS ? slots : MAX_SLOTS;
    return plan;
  };
  plan = with_second(plan, MOST_STAGE_BYTES);
  // Stages no larger than the first layer's, if that gives the ring a slot; but not with the most tokens, where products take the time.
  const int enough_bytes = first_bytes > ENOUGH_STAGE_BYTES ? first_bytes : ENOUGH_STAGE_BYTES;
  if (plan.slot_bytes > enough_bytes && token_rows < MAX_TOKENS) {
    const RingPlan smaller = with_second(plan, enough_bytes);
    if (smaller.slots > plan.slots)
      plan = smaller;
  }
  if (plan.second.share == 0)
    plan.sets = plan.second.remainder;
  // A ring that held nearly all of a block's weights would ask for down rows while others still wait for their first ones.
  const int few = MOST_RING_BYTES_OF_SMALL / plan.slot_bytes < 3 ? 3 : MOST_RING_BYTES_OF_SMALL / plan.slot_bytes;
  const bool small = token_rows <= MOST_TOKENS_OF_SMALL && is_small(shape, dtype, blocks);
  if (small && plan.slots > few)
    plan.slots = few;
  // For the same reason blocks with more weights wait before they ask for down rows; small ones would ask too late.
  plan.first_layer_first = !small;
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

  const int shared_bytes = plan.slots * plan.slot_bytes + after_ring_bytes(plan, token_rows);
  return launch_kernel(kernel, {blocks, threads, shared_bytes, true}, stream, shape, plan, maps);
}

// The kernel of decode_hopper_f32.cu for so many tokens, and its launcher.
RingKernel decode_hopper_f32_kernel_of(int token_rows);
int launch_decode_hopper_f32(const Shape &shape, const DeviceFacts &device, cudaStream_t stream);

} // namespace fused_mlp
