// The whole MLP for 1 to 64 tokens of 16 bits in one launch on Hopper: the ring (decode_ring.cuh) feeds warpgroup products.
//
// Weights are the M operand of the products and tokens the N operand: the price of 8 tokens is that of one, and a
// token's column is computed alike whatever is beside it. So a row has the same bits in any company, and on any run
// (decode_hopper.cuh says how sums are cut).
#include "decode_ring.cuh"

namespace fused_mlp {
namespace {

constexpr int THREADS = CONSUMERS + 32;
constexpr int WARPGROUPS = CONSUMERS / 128; // that multiply
constexpr int TILE_GROUPS = PASS_GROUPS / WARPGROUPS;
[[maybe_unused]] constexpr int TILE_ROWS = GROUP * TILE_GROUPS;
constexpr int MOST_SHARED_TOKENS = 16; // up to which a pass of the first layer has 64 rows: wider ones leave short copies

template <typename T, int NT>
__global__ void __launch_bounds__(THREADS, 1)
    decode_hopper_kernel(const __grid_constant__ Shape shape, const __grid_constant__ RingPlan plan,
                         const __grid_constant__ Maps maps) {
#ifdef FUSED_MLP_HOPPER
  constexpr int SUMS = NT / 2;
  extern __shared__ __align__(SWIZZLE_ALIGN) unsigned char shared[];
  __shared__ Stage stages[MAX_SLOTS];
  __shared__ __align__(8) unsigned long long full_barriers[MAX_SLOTS], empty_barriers[MAX_SLOTS];
  Ring ring{plan, shared_address(shared), shared_address(full_barriers), shared_address(empty_barriers), 0, 0};
  const LayerPlan &first = plan.first;
  const LayerPlan &second = plan.second;
  const int warp = warp_of_block(), lane = threadIdx.x & 31;

  if (!start_ring<NT>(shape, plan, maps, stages, ring))
    return;

  // The consumers. A thread's rows of a tile are `row` and row + 8, its tokens 8 j + token and + 1.
  const int warpgroup = warp >> 2, thread = threadIdx.x & 127;
  const int row = (warp & 3) * 16 + (lane >> 2), token = (lane & 3) * 2;
  float *const exchange = reinterpret_cast<float *>(shared + plan.slots * plan.slot_bytes);
  // A gated layer whose rows are not shared keeps four sums: gate and up of even chunks, and of odd ones.
  constexpr int KEPT = NT > MOST_SHARED_TOKENS ? 4 : 2;
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
  int pass = 0;
  for (;;) {
    ring.wait_until_full();
    const Stage stage = stages[ring.slot].uniform();
    const bool is_second = stage.flags & SECOND_LAYER;
    const LayerPlan &layer = is_second ? second : first;
    const bool chunks_shared = is_second ? second_shared : first_shared;
    const int row_tile = chunks_shared ? 0 : warpgroup * TILE_ROWS;
    const int begin = stage.begin, end = stage.end;
    // One tile's sums are in acc[0], two tiles' or two parities' in acc[0] and acc[1], two tiles' of two parities in all four.
    const int first_chunk = stage.first_chunk_and_chunks >> 16, chunks = stage.first_chunk_and_chunks & 0xffff;
    const unsigned tokens = ring.at(),
                   weights = tokens + layer.stage_chunks * NT * SWIZZLE_BYTES + row_tile / GROUP * layer.group_distance;
    const bool one_matrix = is_second || !shape.gated || packed;
    const int mine = (chunks_shared ? first_chunk ^ warpgroup : first_chunk) & 1;
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
      const int up = divide_up(end - begin, GROUP) * layer.group_distance;
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
    // While the tensor cores multiply. A thread rounds off every so many tokens' sums of one unit.
    const int unit_bits = 32 - __clz(max(end - begin, GROUP) - 1), unit_column = threadIdx.x & ((1 << unit_bits) - 1);
    const int unit = begin + unit_column;
    if ((stage.flags & PASS_BEGINS) && is_second)
      ask_bias_down(begin + row_tile, end);
    if ((stage.flags & PASS_BEGINS) && !is_second) {
      // Wanted only when the pass ends, and here by then.
      bias[0] = shape.bias_gate && unit < end ? static_cast<const T *>(shape.bias_gate)[unit] : T{};
      bias[1] = shape.bias_up && unit < end ? static_cast<const T *>(shape.bias_up)[unit] : T{};
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      pin(acc[i]);
    ring.give_back();
    ring.next();
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
  if (!is_last_of_set(shape, plan, set, warp))
    return;
  const int row_tile = second_shared ? 0 : warpgroup * TILE_ROWS;
  const int row_end = min(part_begin(second, set + 1) * GROUP, second.rows);
  for (pass = 0; pass < second.passes; ++pass) {
    const int begin = (part_begin(second, set) + pass * second.pass_groups) * GROUP;
    const int end = min(begin + second.pass_groups * GROUP, row_end);
    const float4 *const from = reinterpret_cast<const float4 *>(shape.partial) + set * plan.parts * block_sums +
                               (pass * WARPGROUPS + warpgroup) * (SUMS / 4) * 128 + thread;
    if (second.passes > 1) // or they are there
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

// What the last tile of a pass reads behind its groups: it is multiplied as one of 64 rows.
int overread(const LayerPlan &plan) { return (PASS_GROUPS - plan.pass_groups) % TILE_GROUPS * plan.group_distance; }

// The exchange of sums; or what is read there.
int bytes_after_ring(const RingPlan &plan, int token_rows) {
  int bytes = exchange_bytes(token_rows);
  for (const LayerPlan *layer : {&plan.first, &plan.second})
    bytes = overread(*layer) > bytes ? overread(*layer) : bytes;
  return bytes;
}

template <typename T> RingKernel kernel_of(int token_rows) {
  switch (token_rows) {
  case 8: return decode_hopper_kernel<T, 8>;
  case 16: return decode_hopper_kernel<T, 16>;
  case 32: return decode_hopper_kernel<T, 32>;
  default: return decode_hopper_kernel<T, 64>;
  }
}
RingKernel kernel_of(int dtype, int token_rows) {
  return dtype == FUSED_MLP_BF16 ? kernel_of<__nv_bfloat16>(token_rows) : kernel_of<__half>(token_rows);
}

} // namespace

bool can_decode_hopper(const DeviceFacts &device, int dtype, int hidden_size, int intermediate_size) {
  const int chunk = SWIZZLE_BYTES / map_element_bytes(dtype);
  return device.hopper && hidden_size % chunk == 0 && intermediate_size % chunk == 0;
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
  for (int rows = 8; rows <= MAX_TOKENS; rows *= 2)
    for (const RingKernel kernel :
         {kernel_of(FUSED_MLP_BF16, rows), kernel_of(FUSED_MLP_F16, rows), decode_hopper_f32_kernel_of(rows)}) {
      const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_limit(device));
      if (error != cudaSuccess)
        return error;
    }
  return FUSED_MLP_OK;
}

int launch_decode_hopper(const Shape &shape, int dtype, const DeviceFacts &device, cudaStream_t stream) {
  if (dtype == FUSED_MLP_F32)
    return launch_decode_hopper_f32(shape, device, stream);
  const int token_rows = token_rows_of(shape.tokens);
  return launch_ring(kernel_of(dtype, token_rows), THREADS, shape, dtype, token_rows,
                     token_rows > MOST_SHARED_TOKENS ? PASS_GROUPS : TILE_GROUPS, bytes_after_ring, device, stream);
}

} // namespace fused_mlp
