// The whole MLP for 1 to 64 tokens of f32 in one launch on Hopper: the ring (decode_ring.cuh) feeds warps' own products.
//
// Tensor cores take 11 bits of a fraction: each number is the sum of a high part of so many bits and a low one, and a product is
// low high + high low + high high; low low, 2^-22 of it, is left out. Tensor cores cut off bits where they add, so each
// chunk's sums start from zero, small terms by themselves, and are added in f32.
//
// Weights are the M operand and tokens the N operand, in f32 as they lie in memory: whoever multiplies splits them. A warp has a
// pair of tiles of 16 rows that share the split tokens: gate and up rows of the same units, or else 32 rows. Warps with the
// same rows take chunks by turns: how many there are is a function of the weights' shape and the GPU alone, as all else
// that cuts sums. So a row has the same bits in any company, and on any run.
#include "decode_ring.cuh"

namespace fused_mlp {
namespace {

// The producer has a warpgroup for itself, to leave its registers to the others.
constexpr int THREADS = CONSUMERS + WARPGROUP;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
static_assert(PRODUCER_REGISTERS * (THREADS - CONSUMERS) + CONSUMER_REGISTERS * CONSUMERS <= 65536 / THREADS / 8 * 8 * THREADS,
              "a block has no more than it was launched with");
constexpr int TILE_GROUPS = 2;     // of rows in a tile
[[maybe_unused]] constexpr int TILE_ROWS = TILE_GROUPS * GROUP;
constexpr int GATED_GROUPS = 8;    // of units in a pass: four warps have a pair of tiles each
constexpr int TOGETHER_TOKENS = 64; // from which on warpgroups' products are the faster ones
[[maybe_unused]] constexpr int COLUMNS_AT_ONCE = 4; // groups of tokens whose sums of a chunk are in registers

// Bytes of the low parts of tokens: of two chunks of each warpgroup.
__host__ __device__ constexpr int low_bytes(int token_rows) {
  return token_rows < TOGETHER_TOKENS ? 0 : 2 * (CONSUMERS / WARPGROUP) * token_rows * SWIZZLE_BYTES;
}

#ifdef FUSED_MLP_HOPPER

// d (16 x 8) += a (16 x 8) b (8 x 8)^T. A thread has a's rows lane / 4 and + 8 at columns lane % 4 and + 4, b's row lane / 4, and
// d's rows like a's at columns 2 (lane % 4) and + 1.
__device__ __forceinline__ void add_product(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void split(float v, unsigned &high, unsigned &low) {
  high = __float_as_uint(high_part(v));
  low = low_part(v);
}

// Where a thread's elements of a group's row are: one of each of its eight pieces of 16 bytes.
__device__ __forceinline__ unsigned element_of(unsigned group, unsigned piece) {
  const unsigned row = threadIdx.x >> 2 & 7, column = threadIdx.x & 3;
  return group + row * SWIZZLE_BYTES + (piece ^ row) * 16 + column * 4;
}

// A thread's elements of eight columns of a tile whose groups of rows begin at `rows`.
__device__ __forceinline__ void split_rows(const unsigned (&rows)[TILE_GROUPS], int k, unsigned (&high)[4], unsigned (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    split(load_shared(element_of(rows[i & 1], 2 * k + (i >> 1))), high[i], low[i]);
}

// Adds the products of one chunk: of two tiles, whose groups of rows begin at `rows`, with all tokens.
template <int NT>
__device__ __forceinline__ void add_chunk(float (&sums)[2][NT / GROUP][4], const unsigned (&rows)[2][TILE_GROUPS],
                                          unsigned tokens) {
  constexpr int COLUMNS = NT / GROUP < COLUMNS_AT_ONCE ? NT / GROUP : COLUMNS_AT_ONCE;
#pragma unroll
  for (int j0 = 0; j0 < NT / GROUP; j0 += COLUMNS) {
    float large[2][COLUMNS][4] = {}, small[2][COLUMNS][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) { // eight elements of depth: two pieces
      unsigned high[2][4], low[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        split_rows(rows[tile], k, high[tile], low[tile]);
      unsigned token[COLUMNS][2], low_token[COLUMNS][2];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          split(load_shared(element_of(tokens + (j0 + j) * CHUNK_GROUP, 2 * k + i)), token[j][i], low_token[j][i]);
      // What adds to the same sums lies far apart.
      const auto each = [&](auto add) {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
          for (int tile = 0; tile < 2; ++tile)
            add(j, tile);
      };
      each([&](int j, int tile) { add_product(small[tile][j], low[tile], token[j]); });
      each([&](int j, int tile) { add_product(large[tile][j], high[tile], token[j]); });
      each([&](int j, int tile) { add_product(small[tile][j], high[tile], low_token[j]); });
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[tile][j0 + j][i] += large[tile][j][i] + small[tile][j][i];
  }
}

// The low parts of a chunk's tokens, by a warpgroup for itself, where its products of the chunk before do not read.
template <int NT> __device__ __forceinline__ void part_tokens(unsigned tokens, unsigned low_tokens) {
  constexpr int PIECES = NT * SWIZZLE_BYTES / 16 / WARPGROUP;
  const unsigned own = threadIdx.x % WARPGROUP * 16;
  const auto low = [](unsigned bits) { return low_part(__uint_as_float(bits)); };
  uint4 v[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
    v[i] = load_shared_16(tokens + own + i * WARPGROUP * 16);
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
    store_shared_16(low_tokens + own + i * WARPGROUP * 16, low(v[i].x), low(v[i].y), low(v[i].z), low(v[i].w));
  fence_shared_copies();
  asm volatile("bar.sync %0, %1;" ::"r"(2 + threadIdx.x / WARPGROUP), "n"(WARPGROUP) : "memory");
}

// add_chunk for one tile of each warp by the warpgroup's products, which are twice as fast for many tokens and have the same
// bits: they, too, add eight products at a time. Tensor cores leave out by themselves what is not of a high part.
// What adds to the same sums comes one after the other: changing between the two takes time.
template <int NT>
__device__ __forceinline__ void add_chunk_together(float (&sums)[NT / GROUP][4], const unsigned (&rows)[TILE_GROUPS],
                                                   unsigned tokens, unsigned low_tokens) {
  using Step = WarpgroupProductTf32<NT>;
  const unsigned long long high_b = tile_descriptor(tokens), low_b = tile_descriptor(low_tokens);
  unsigned high[4][4], low[4][4];
  float large[NT / 2], small[NT / 2];
#pragma unroll
  for (int k = 0; k < 4; ++k)
    split_rows(rows, k, high[k], low[k]);
  products_begin();
#pragma unroll
  for (int k = 0; k < 4; ++k) { // 32 bytes of depth
    Step::add(small, low[k], high_b + 2 * k, k > 0);
    Step::add(small, high[k], low_b + 2 * k, 1);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    Step::add(large, high[k], high_b + 2 * k, k > 0);
  products_commit();
  products_wait<0>();
  pin(large);
  pin(small);
#pragma unroll
  for (int i = 0; i < NT / 2; ++i)
    sums[i / 4][i % 4] += large[i] + small[i];
}

// How a pass's rows are divided: `warps` warps have a pair of tiles each, and so often are there such warps, which take chunks
// by turns. Both are powers of two.
struct Division {
  bool paired; // a pair is gate and up rows of the same 16 units
  int warps, turns;
  __device__ __forceinline__ Division(const LayerPlan &layer, bool paired) : paired(paired) {
    const int pairs = divide_up(layer.pass_groups, paired ? TILE_GROUPS : 2 * TILE_GROUPS);
    warps = pairs > 2 ? 4 : pairs;
    turns = CONSUMERS / 32 / warps;
  }
  // Whether a warpgroup multiplies together: it has all of a turn's rows in two tiles of each warp (four warps), or in one, and the
  // other tile's sums are of the turn after the next (two warps).
  template <int NT> __device__ __forceinline__ bool together() const { return NT >= TOGETHER_TOKENS && warps > 1; }
  // The first group of units in a tile; of a pair that is one of gate rows, one of up rows, the same.
  __device__ __forceinline__ int first_group(int tile) const { return (paired ? tile / 2 : tile) * TILE_GROUPS; }
  // Where the sums of a pass's unit are among those of a turn; a paired one's up is TILE_ROWS further.
  __device__ __forceinline__ int column(int unit) const {
    return paired ? unit / TILE_ROWS * 2 * TILE_ROWS + unit % TILE_ROWS : unit;
  }
};

// Bits of an index below `rows`, of which there are eight or more.
__device__ __forceinline__ int bits_of(int rows) { return 32 - __clz(max(rows, GROUP) - 1); }

#endif // FUSED_MLP_HOPPER

template <int NT>
__global__ void __launch_bounds__(THREADS, 1)
    decode_hopper_f32_kernel(const __grid_constant__ Shape shape, const __grid_constant__ RingPlan plan,
                             const __grid_constant__ Maps maps) {
#ifdef FUSED_MLP_HOPPER
  extern __shared__ __align__(SWIZZLE_ALIGN) unsigned char shared[];
  __shared__ Stage stages[MAX_SLOTS];
  __shared__ __align__(8) unsigned long long full_barriers[MAX_SLOTS], empty_barriers[MAX_SLOTS];
  Ring ring{plan, shared_address(shared), shared_address(full_barriers), shared_address(empty_barriers), 0, 0};
  const LayerPlan &first = plan.first;
  const LayerPlan &second = plan.second;
  if (!start_ring<NT, PRODUCER_REGISTERS>(shape, plan, maps, stages, ring))
    return;

  // The consumers.
  take_registers<CONSUMER_REGISTERS>();
  const int warp = warp_of_block(), lane = threadIdx.x & 31, set = blockIdx.x / plan.parts;
  const int warpgroup = warp / 4;
  const Division first_division(first, shape.gated), second_division(second, false);
  float sums[2][NT / GROUP][4] = {};
  // Sums are rounded off through shared memory, TOKENS tokens at a time: a thread does every so many tokens of one unit, whose
  // biases it asks for when a pass begins.
  constexpr int TOKENS = NT < ROUND_TOKENS ? NT : ROUND_TOKENS;
  float *const exchange = reinterpret_cast<float *>(shared + plan.slots * plan.slot_bytes); // where low parts were
  float bias[2] = {};
  const auto put_sums = [&](const Division &division, int t0) {
    const bool one_tile = division.together<NT>() && division.warps == 2;
    float *const to = exchange + 2 * (lane & 3) * ROUND_PITCH + (lane >> 2) +
                      (one_tile ? warpgroup * 4 + warp % 4 : warp * 2) * TILE_ROWS;
    const int tile_distance = (one_tile ? 8 : 1) * TILE_ROWS;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int j = 0; j < TOKENS / GROUP; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          to[(GROUP * j + (i & 1)) * ROUND_PITCH + tile * tile_distance + (i >> 1) * GROUP] = sums[tile][t0 / GROUP + j][i];
  };
  const auto total = [&](const Division &division, int token, int column) {
    const float *const from = exchange + token * ROUND_PITCH + column;
    float sum = from[0];
    for (int turn = 1; turn < division.turns; ++turn)
      sum += from[turn * division.warps * 2 * TILE_ROWS];
    return sum;
  };
  const auto forget_sums = [&] {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int j = 0; j < NT / GROUP; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[tile][j][i] = 0.f;
  };
  const auto bias_of = [](const void *bias, int i, int end) {
    return bias && i < end ? static_cast<const float *>(bias)[i] : 0.f;
  };
  // Of the second layer: a thread's row in each pass, and where its tokens' sums of this block are.
  const int row_bits = bits_of(second.pass_groups * GROUP), row_column = threadIdx.x & ((1 << row_bits) - 1);
  const int row_step = CONSUMERS >> row_bits, row_token = threadIdx.x >> row_bits;
  const long long block_sums = static_cast<long long>(second.passes) * NT << row_bits;
  float *const partial = shape.partial + blockIdx.x * block_sums + row_column;
  const auto write = [&](int token, int row, float sum) {
    static_cast<float *>(shape.out)[static_cast<long long>(token) * shape.output_size + row] = sum + bias[0];
  };
  wait_for_previous_kernel();

  int pass = 0, low_slot = 0;
  for (;;) {
    ring.wait_until_full();
    const Stage stage = stages[ring.slot].uniform();
    const bool is_second = stage.flags & SECOND_LAYER;
    const LayerPlan &layer = is_second ? second : first;
    const Division division = is_second ? second_division : first_division;
    const int begin = stage.begin, end = stage.end, groups = divide_up(end - begin, GROUP);
    const int unit_bits = bits_of(end - begin), unit_column = threadIdx.x & ((1 << unit_bits) - 1), unit = begin + unit_column;
    if (stage.flags & PASS_BEGINS) {
      bias[0] = is_second ? bias_of(shape.bias_down, begin + row_column, end) : bias_of(shape.bias_gate, unit, end);
      bias[1] = is_second ? 0.f : bias_of(shape.bias_up, unit, end);
    }
    const int first_chunk = stage.first_chunk_and_chunks >> 16, chunks = stage.first_chunk_and_chunks & 0xffff;
    const unsigned tokens = ring.at(), weights = tokens + layer.stage_chunks * NT * SWIZZLE_BYTES;
    const bool together = division.together<NT>();
    const bool one_tile = together && division.warps == 2;
    // Of fewer groups than the tiles have, the last stands for those that are not there, and its sums go nowhere.
    unsigned rows[2][TILE_GROUPS];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int i = 0; i < TILE_GROUPS; ++i) {
        const int own = one_tile ? warp % 4 : warp % division.warps * 2 + tile;
        const int group = min(division.first_group(own) + i, groups - 1) + (division.paired && own % 2 != 0 ? groups : 0);
        rows[tile][i] = weights + group * layer.group_distance;
      }
    const auto rows_of = [&](int tile, int c, unsigned(&at)[TILE_GROUPS]) {
#pragma unroll
      for (int i = 0; i < TILE_GROUPS; ++i)
        at[i] = rows[tile][i] + c * CHUNK_GROUP;
    };
    if (together) {
      if constexpr (NT >= TOGETHER_TOKENS)
        for (int c = (warpgroup - first_chunk) & 1; c < chunks; c += 2, low_slot ^= 1) {
          const unsigned chunk_tokens = tokens + c * NT * SWIZZLE_BYTES;
          const unsigned low_tokens = ring.memory + plan.slots * plan.slot_bytes + (2 * warpgroup + low_slot) * NT * SWIZZLE_BYTES;
          part_tokens<NT>(chunk_tokens, low_tokens);
#pragma unroll
          for (int tile = 0; tile < 2; ++tile)
            if (!one_tile || ((first_chunk + c) >> 1 & 1) == tile) {
              unsigned at[TILE_GROUPS];
              rows_of(tile, c, at);
              add_chunk_together<NT>(sums[tile], at, chunk_tokens, low_tokens);
            }
        }
    } else if (division.first_group(warp % division.warps * 2) < groups) {
      for (int c = (warp / division.warps - first_chunk) & (division.turns - 1); c < chunks; c += division.turns) {
        unsigned at[2][TILE_GROUPS];
        rows_of(0, c, at[0]);
        rows_of(1, c, at[1]);
        add_chunk<NT>(sums, at, tokens + c * NT * SWIZZLE_BYTES);
      }
    }
    ring.give_back();
    ring.next();
    if ((stage.flags & PASS_ENDS) && together)
      consumers_meet(); // all are done with the low parts
    if ((stage.flags & PASS_ENDS) && !is_second) {
      const int column = division.column(unit_column), step = CONSUMERS >> unit_bits;
#pragma unroll
      for (int t0 = 0; t0 < NT; t0 += TOKENS) {
        if (t0 >= shape.tokens)
          break;
        put_sums(division, t0);
        consumers_meet();
        if (unit < end) {
          constexpr int AT_ONCE = NT > GROUP ? 2 : 1;
          const int here = min(TOKENS, shape.tokens - t0);
#pragma unroll 1
          for (int t = threadIdx.x >> unit_bits; t < here; t += AT_ONCE * step) {
            float value[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
              value[i] = total(division, min(t + i * step, TOKENS - 1), column) + bias[0];
            activate_all(shape.activation, float(shape.activation_param), value);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
              if (shape.gated)
                value[i] *= total(division, min(t + i * step, TOKENS - 1), column + TILE_ROWS) + bias[1];
              if (t + i * step < here)
                static_cast<float *>(shape.hidden)[(t0 + t + i * step) * shape.hidden_stride + unit] = value[i];
            }
          }
        }
        consumers_meet();
      }
      if (threadIdx.x == 0 && (stage.flags & DELIVER))
        add_release(&shape.counters->arrived);
      forget_sums();
    } else if (stage.flags & PASS_ENDS) {
      // The part's sums: where those of the set's other blocks are, or rounded off.
#pragma unroll
      for (int t0 = 0; t0 < NT; t0 += TOKENS) {
        if (t0 >= shape.tokens)
          break;
        put_sums(division, t0);
        consumers_meet();
        if (begin + row_column < end)
          for (int t = t0 + row_token; t < min(t0 + TOKENS, shape.tokens); t += row_step) {
            const float sum = total(division, t - t0, row_column);
            if (plan.parts > 1)
              partial[static_cast<long long>(pass * NT + t) << row_bits] = sum;
            else
              write(t, begin + row_column, sum);
          }
        consumers_meet();
      }
      ++pass;
      forget_sums();
    }
    if (stage.flags & LAST)
      break;
  }
  if (plan.parts == 1 || set >= plan.sets)
    return;

  // A warp's elements are the same warp's in the blocks that share them: the last of these adds all sums, always in the same
  // order.
  if (!is_last_of_set(shape, plan, set, warp))
    return;
  const int row_end = min(part_begin(second, set + 1) * GROUP, second.rows);
  const float *const parts = shape.partial + set * plan.parts * block_sums + row_column;
  for (pass = 0; pass < second.passes; ++pass) {
    const int begin = (part_begin(second, set) + pass * second.pass_groups) * GROUP, row = begin + row_column;
    const int end = min(begin + second.pass_groups * GROUP, row_end);
    if (row >= end)
      continue;
    bias[0] = bias_of(shape.bias_down, row, end);
    for (int t0 = 0; t0 < shape.tokens; t0 += TOKENS)
#pragma unroll 4
      for (int t = t0 + row_token; t < min(t0 + TOKENS, shape.tokens); t += row_step) {
        float v[MOST_PARTS];
#pragma unroll
        for (int s = 0; s < MOST_PARTS; ++s)
          v[s] = s < plan.parts ? __ldcg(parts + s * block_sums + (static_cast<long long>(pass * NT + t) << row_bits)) : 0.f;
        float sum = v[0];
#pragma unroll
        for (int s = 1; s < MOST_PARTS; ++s)
          if (s < plan.parts)
            sum += v[s];
        write(t, row, sum);
      }
  }
#endif // FUSED_MLP_HOPPER
}

int bytes_after_ring(const RingPlan &, int token_rows) {
  const int low = low_bytes(token_rows), exchange = exchange_bytes(token_rows);
  return low > exchange ? low : exchange;
}

} // namespace

RingKernel decode_hopper_f32_kernel_of(int token_rows) {
  return token_rows == 8    ? decode_hopper_f32_kernel<8>
         : token_rows == 16 ? decode_hopper_f32_kernel<16>
         : token_rows == 32 ? decode_hopper_f32_kernel<32>
                            : decode_hopper_f32_kernel<64>;
}

int launch_decode_hopper_f32(const Shape &shape, const DeviceFacts &device, cudaStream_t stream) {
  const int token_rows = token_rows_of(shape.tokens);
  return launch_ring(decode_hopper_f32_kernel_of(token_rows), THREADS, shape, FUSED_MLP_F32, token_rows,
                     shape.gated ? GATED_GROUPS : PASS_GROUPS, bytes_after_ring, device, stream);
}

} // namespace fused_mlp
