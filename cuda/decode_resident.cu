// The whole MLP for 1 to 32 tokens of a small model in one launch on Hopper: all weights that a block multiplies are in its
// shared memory at once, so nothing is waited for twice, and the layers meet through the hidden rows themselves.
//
// A slice of the first layer (some groups of eight hidden elements: their gate rows, and their up rows) is a block's, from
// the first block on; a group of eight down rows over their whole depth is a block's, from the last block on. Blocks with
// down rows read all hidden rows, as soon as their elements come.
//
// Hidden rows are their own flags: an element is stored with its bits inverted, and a zero means that it has not come. (A
// result is never the NaN whose bits are all ones: conversions make another one.) So a store and a load lie between the
// layers, and no fence, counter or barrier. Two buffers take turns, and a launch clears the one that the launch before it
// used. Whose turn it is, each block counts for itself: all blocks run in every launch.
//
// A slice's gate and up rows are one copy: one tensor map describes both matrices, whatever is between them in memory. Their
// place is the hidden rows' after their products, so that little memory is needed, and the next launch's block fits beside.
//
// The products have 64 rows of weights, a block has eight. So the second layer's tile is the four quarters of the depth,
// one above the other, and its tokens are those of four quarters side by side: of the 4 x 4 blocks of sums the diagonal
// is wanted, and a quarter of the products makes them.
//
// Here nothing hides behind the weights, so that instructions between the layers cost time: hidden rows are gathered by
// shifts and constant steps, and the block's own slice and those that it has to take over go through the same code.
//
// No deadlock, whatever is resident: a block waits for hidden elements only. If they are long in coming it computes
// their slices itself and stores them, the same bits as the block whose they are, which may have stored them or may still.
//
// Dependent launch: as in decode_hopper.cu.
#include "decode_hopper.cuh"
#include <type_traits>

namespace fused_mlp {
namespace {

constexpr int THREADS = 256; // two warpgroups: even and odd chunks
constexpr int TILE_ROWS = 64;
constexpr int TILE_GROUPS = TILE_ROWS / GROUP;
constexpr int PARTS = 4; // of the second layer's depth
[[maybe_unused]] constexpr int FEW_PIECES = 2, MANY_PIECES = 6; // of hidden rows, that a thread asks for together
[[maybe_unused]] constexpr long long PATIENCE = 60000; // cycles
// No less than the kernel's arrays and what the system takes.
constexpr int static_bytes(int token_rows) { return 2 * 1024 + 2 * token_rows * (TILE_ROWS + 4 + PARTS * GROUP) * 4; }

struct ResidentPlan {
  int share; // groups of a slice
  int slices;
  int first_chunks, second_chunks; // of the depth
  int first_at, x_at;              // bytes, of the first layer's weights, and later of the hidden rows; down rows are at 0
  int gate_row, up_row;            // of a slice's tile
};

struct ResidentMaps {
  CUtensorMap x, first, down;
};

#ifdef FUSED_MLP_HOPPER

// Relaxed and seen by every block: each element says of itself that it is there.
__device__ __forceinline__ void store_element(unsigned short *to, unsigned short bits) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(bits) : "memory");
}
__device__ __forceinline__ uint4 load_piece(const uint4 *from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
// Some of these bits of `zero_halves` are set if a half is zero, and only then.
constexpr unsigned ZERO_HALVES = 0x80008000u;
__device__ __forceinline__ unsigned zero_halves(unsigned v) { return (v - 0x00010001u) & ~v; }
__device__ __forceinline__ unsigned zero_halves(const uint4 &v) {
  return zero_halves(v.x) | zero_halves(v.y) | zero_halves(v.z) | zero_halves(v.w);
}
template <typename T> __device__ __forceinline__ unsigned short bits_of(T v) {
  return *reinterpret_cast<const unsigned short *>(&v);
}
// The gate and up rows of a slice, from `row` on: a chunk's rows of both, then the next chunk's.
__device__ __forceinline__ void copy_slice(unsigned to, const CUtensorMap *map, int row, unsigned barrier,
                                           unsigned long long policy) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
               "l"(map), "r"(0), "r"(row), "r"(0), "r"(0), "r"(barrier), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void prefetch_slice(const CUtensorMap *map, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(0), "r"(row), "r"(0),
               "r"(0)
               : "memory");
}

#endif // FUSED_MLP_HOPPER

// TOKENS: of a tile, however many there are
template <typename T, int TOKENS>
__global__ void __launch_bounds__(THREADS, 1)
    decode_resident_kernel(const __grid_constant__ Shape shape, const __grid_constant__ ResidentPlan plan,
                           const __grid_constant__ ResidentMaps maps) {
#ifdef FUSED_MLP_HOPPER
  extern __shared__ __align__(SWIZZLE_ALIGN) unsigned char shared[];
  __shared__ __align__(8) unsigned long long barriers[2];
  __shared__ float sums[2][TOKENS][TILE_ROWS + 4]; // 4 mod 32 keeps the stores off one bank
  __shared__ float quarter_sums[2][PARTS][TOKENS][GROUP];
  __shared__ unsigned turn_here;
  __shared__ int used_here[2];
  __shared__ int missing;
  const unsigned down = shared_address(shared), weights = down + plan.first_at, x = down + plan.x_at, hidden = weights;
  const unsigned first_barrier = shared_address(barriers), down_barrier = first_barrier + 8;
  const int warp = warp_of_block(), lane = threadIdx.x & 31, warpgroup = warp >> 2;
  constexpr int TOKEN_GROUPS = TOKENS / GROUP;
  constexpr int CHUNK_TOKEN_BYTES = TOKENS * SWIZZLE_BYTES; // of a chunk of all tokens
  // A thread's rows of a tile are `row` and row + 8, its tokens 8 j + token and + 1.
  const int row = (warp & 3) * 16 + (lane >> 2), token = (lane & 3) * 2;
  const int chunk_bytes = (shape.gated ? 2 : 1) * plan.share * CHUNK_GROUP; // of a slice's weights
  const bool has_slice = blockIdx.x < plan.slices;
  const int down_row = (gridDim.x - 1 - blockIdx.x) * GROUP;
  const bool has_rows = down_row < shape.output_size;

  if (threadIdx.x == 0) {
    barrier_init(first_barrier, 1);
    barrier_init(down_barrier, 1);
    publish_barriers();
    if (has_slice)
      prefetch_slice(&maps.first, blockIdx.x * plan.share * GROUP);
    if (has_rows)
      prefetch_chunks(&maps.down, down_row, 0);
  } else if (has_slice) {
    const int unit = blockIdx.x * plan.share * GROUP + (threadIdx.x & 63);
    if (unit < shape.intermediate_size && (threadIdx.x & 31) % 16 == 0) {
      if (shape.bias_gate)
        prefetch_line(static_cast<const T *>(shape.bias_gate) + unit);
      if (shape.bias_up)
        prefetch_line(static_cast<const T *>(shape.bias_up) + unit);
    }
  }
  if (threadIdx.x == 96 && has_rows && shape.bias_down)
    prefetch_line(static_cast<const T *>(shape.bias_down) + down_row);
  __syncthreads();
  wait_for_previous_kernel();
  release_next_kernel();

  const unsigned long long weights_policy = evict_first_policy(), tokens_policy = evict_last_policy();
  auto ask_slice = [&](int slice) {
    barrier_arrive_expect(first_barrier, plan.first_chunks * (chunk_bytes + CHUNK_TOKEN_BYTES));
    copy_slice(weights, &maps.first, slice * plan.share * GROUP, first_barrier, weights_policy);
    copy_chunks(x, &maps.x, 0, 0, first_barrier, tokens_policy);
  };
  if (threadIdx.x == 0) {
    if (has_slice)
      ask_slice(blockIdx.x);
    if (has_rows) {
      barrier_arrive_expect(down_barrier, plan.second_chunks * CHUNK_GROUP);
      copy_chunks(down, &maps.down, down_row, 0, down_barrier, weights_policy);
    }
  } else if (threadIdx.x == 32) {
    turn_here = shape.counters->turn[blockIdx.x];
    used_here[0] = shape.counters->used[0];
    used_here[1] = shape.counters->used[1];
  }
  // Biases stay as they are in memory until they are added: whatever makes a number of them would wait for them.
  const T bias_down = shape.bias_down && has_rows && down_row + (threadIdx.x & 7) < shape.output_size
                          ? static_cast<const T *>(shape.bias_down)[down_row + (threadIdx.x & 7)]
                          : T{};

  // The products of a slice's copies, and its hidden elements.
  unsigned short *buffer = nullptr;
  const float activation_param = static_cast<float>(shape.activation_param);
  const auto finish_slice = [&](int slice, unsigned parity) {
    // A thread rounds off every so many tokens' sums of one unit.
    const int unit_bits = 32 - __clz(plan.share * GROUP - 1);
    const int begin = slice * plan.share * GROUP, unit = begin + (threadIdx.x & ((1 << unit_bits) - 1));
    const int end = min(begin + plan.share * GROUP, shape.intermediate_size);
    const T bias = shape.bias_gate && unit < end ? static_cast<const T *>(shape.bias_gate)[unit] : T{};
    const T bias_up = shape.bias_up && unit < end ? static_cast<const T *>(shape.bias_up)[unit] : T{};
    barrier_wait(first_barrier, parity);
    float acc[TOKENS / 2] = {};
    pin(acc);
    products_begin();
    for (int c = warpgroup; c < plan.first_chunks; c += 2)
      multiply<T, TOKENS>(acc, weights + c * chunk_bytes, CHUNK_GROUP, x + c * CHUNK_TOKEN_BYTES, CHUNK_GROUP,
                          c != warpgroup);
    products_commit();
    products_wait<0>();
    pin(acc);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i)
      sums[warpgroup][8 * (i >> 2) + token + (i & 1)][row + 8 * (i >> 1 & 1)] = acc[i];
    __syncthreads();
    if (unit < end)
      for (int t = threadIdx.x >> unit_bits; t < shape.tokens; t += THREADS >> unit_bits) {
        auto sum = [&](int r) { return sums[0][t][r] + sums[1][t][r]; };
        const float gate = sum(plan.gate_row + unit - begin) + to_float(bias);
        float value = activate(shape.activation, activation_param, gate);
        if (shape.gated)
          value *= sum(plan.up_row + unit - begin) + to_float(bias_up);
        const unsigned bits = ~bits_of(from_float<T>(value));
        store_element(buffer + t * shape.intermediate_size + unit, static_cast<unsigned short>(bits));
      }
  };

  // Hidden rows to shared memory, as a tensor copy of each group of tokens would lay them out. A thread brings the same 16
  // bytes of a token's every chunk, or every second, every fourth... Where they are long in coming, the result is the group of
  // some that are missing; or else -1.
  const int token_bits = 32 - __clz(shape.tokens - 1), chunk_step = THREADS / GROUP >> token_bits;
  const int piece = threadIdx.x & 7, piece_token = threadIdx.x >> 3 & ((1 << token_bits) - 1);
  const int first_chunk = piece_token < shape.tokens ? threadIdx.x >> (3 + token_bits) : plan.second_chunks;
  const auto gather = [&](auto pieces, long long patience) {
    constexpr int PIECES = decltype(pieces)::value;
    const long long since = clock64();
    const unsigned short *const row = buffer + piece_token * shape.intermediate_size;
    const uint4 *from = reinterpret_cast<const uint4 *>(row + first_chunk * CHUNK) + piece;
    unsigned to = hidden + (piece_token / GROUP * plan.second_chunks + first_chunk) * CHUNK_GROUP +
                  piece_token % GROUP * SWIZZLE_BYTES + ((piece ^ piece_token) & 7) * 16;
    int late = -1;
    for (int chunk = first_chunk; chunk < plan.second_chunks && late < 0; chunk += PIECES * chunk_step) {
      uint4 v[PIECES];
      unsigned zeros;
      do {
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
          v[i] = chunk + i * chunk_step < plan.second_chunks ? load_piece(from + i * chunk_step * 8)
                                                             : make_uint4(~0u, ~0u, ~0u, ~0u);
        zeros = 0;
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
          zeros |= zero_halves(v[i]);
        zeros &= ZERO_HALVES;
      } while (zeros && clock64() - since <= patience);
      if (zeros)
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
          if (zero_halves(v[i]) & ZERO_HALVES)
            late = (chunk + i * chunk_step) * 8 + piece;
#pragma unroll
      for (int i = 0; i < PIECES; ++i)
        if (chunk + i * chunk_step < plan.second_chunks)
          store_shared_16(to + i * chunk_step * CHUNK_GROUP, ~v[i].x, ~v[i].y, ~v[i].z, ~v[i].w);
      from += PIECES * chunk_step * 8;
      to += PIECES * chunk_step * CHUNK_GROUP;
    }
    return late;
  };
  __syncthreads();
  const unsigned turn = turn_here;
  buffer = shape.exchange + (turn & 1) * RESIDENT_ELEMENTS;

  // The block's own slice, and then those that are long in coming. Who has had to help once helps on without waiting.
  int slice = blockIdx.x;
  unsigned parity = 0;
  long long patience = PATIENCE;
  bool again = false; // leaving the loop in its middle would make the products' warps look divergent
  do {
    if (slice < plan.slices) {
      finish_slice(slice, parity);
      parity ^= 1;
    }
    if (has_rows) {
      const int late = plan.second_chunks <= FEW_PIECES * chunk_step
                           ? gather(std::integral_constant<int, FEW_PIECES>(), patience)
                           : gather(std::integral_constant<int, MANY_PIECES>(), patience);
      fence_shared_copies();
      if (threadIdx.x == 0)
        missing = plan.slices;
      again = __syncthreads_or(late >= 0);
      // The nearest missing slice from here on, so that blocks which wait for many do not all begin with the same one.
      if (late >= 0)
        atomicMin(&missing, (late / plan.share + plan.slices - blockIdx.x % plan.slices) % plan.slices);
    }
    if (again) {
      __syncthreads();
      slice = uniform((missing + blockIdx.x) % plan.slices);
      if (threadIdx.x == 0)
        ask_slice(slice);
      patience = 0;
    }
  } while (again);

  if (has_rows) {
    barrier_wait(down_barrier, 0);
    const int quarter = plan.second_chunks / PARTS;
    const unsigned quarter_bytes = quarter * CHUNK_GROUP;
    float acc[PARTS * TOKENS / 2] = {};
    pin(acc);
    products_begin();
    for (int c = warpgroup; c < quarter; c += 2)
      multiply<T, PARTS * TOKENS>(acc, down + c * CHUNK_GROUP, quarter_bytes, hidden + c * CHUNK_GROUP, quarter_bytes,
                                     c != warpgroup);
    products_commit();
    products_wait<0>();
    pin(acc);
    // The diagonal: a warp has the rows of two quarters.
    const int pair = warp & 3;
    if (pair < PARTS / 2) {
#pragma unroll
      for (int group = 0; group < TOKEN_GROUPS; ++group)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const auto of_pair = [&](int pair) { return acc[4 * (group * PARTS + 2 * pair + i) + 2 * i + e]; };
            quarter_sums[warpgroup][2 * pair + i][group * GROUP + token + e][lane >> 2] =
                pair == 0 ? of_pair(0) : of_pair(1);
          }
    }
    __syncthreads();
    const int t = threadIdx.x >> 3, r = threadIdx.x & 7;
    if (t < shape.tokens && down_row + r < shape.output_size) {
      auto part = [&](int q) { return quarter_sums[0][q][t][r] + quarter_sums[1][q][t][r]; };
      float sum = part(0);
#pragma unroll
      for (int q = 1; q < PARTS; ++q)
        sum += part(q);
      static_cast<T *>(shape.out)[static_cast<long long>(t) * shape.output_size + down_row + r] =
          from_float<T>(sum + to_float(bias_down));
    }
  }

  // For the launch after the next: its buffer is cleared of what the launch before this one stored.
  uint4 *const other = reinterpret_cast<uint4 *>(shape.exchange + (~turn & 1) * RESIDENT_ELEMENTS);
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < used_here[~turn & 1]; i += gridDim.x * THREADS)
    other[i] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x == 0) {
    shape.counters->turn[blockIdx.x] = turn + 1;
    if (blockIdx.x == 0)
      shape.counters->used[turn & 1] = shape.tokens * shape.intermediate_size / 8;
  }
#endif // FUSED_MLP_HOPPER
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

using Kernel = void (*)(Shape, ResidentPlan, ResidentMaps);

template <typename T> Kernel kernel_of(int token_rows) {
  switch (token_rows) {
  case 8: return decode_resident_kernel<T, 8>;
  case 16: return decode_resident_kernel<T, 16>;
  default: return decode_resident_kernel<T, 32>;
  }
}
Kernel kernel_of(int dtype, int token_rows) {
  return dtype == FUSED_MLP_BF16 ? kernel_of<__nv_bfloat16>(token_rows) : kernel_of<__half>(token_rows);
}

// Bytes of shared memory of each block.
int plan_of(int blocks, int token_rows, int hidden_size, int intermediate_size, bool gated, bool up_first,
            ResidentPlan *plan) {
  const int groups = divide_up(intermediate_size, GROUP);
  plan->share = divide_up(groups, blocks);
  plan->slices = divide_up(groups, plan->share);
  plan->first_chunks = hidden_size / CHUNK;
  plan->second_chunks = intermediate_size / CHUNK;
  plan->gate_row = up_first ? plan->share * GROUP : 0;
  plan->up_row = up_first ? 0 : plan->share * GROUP;
  plan->first_at = plan->second_chunks * CHUNK_GROUP;
  plan->x_at = plan->first_at + (gated ? 2 : 1) * plan->share * plan->first_chunks * CHUNK_GROUP;
  const int token_groups = token_rows / GROUP;
  const int hidden_end = plan->first_at + token_groups * plan->second_chunks * CHUNK_GROUP;
  // Both tiles are read as 64 rows, however many there are: the last chunk of the first one, and four quarters of down rows
  // behind the four; those end where the hidden rows do.
  const int first_end = plan->x_at + TILE_GROUPS * CHUNK_GROUP;
  const int x_end = plan->x_at + token_groups * plan->first_chunks * CHUNK_GROUP;
  const int end = first_end > x_end ? first_end : x_end;
  return end > hidden_end ? end : hidden_end;
}

// A map of gate and up, or of the one matrix: chunks of both matrices' rows.
int slice_map(CUtensorMap *map, const Shape &shape, int dtype, const ResidentPlan &plan) {
  const char *const gate = static_cast<const char *>(shape.gate), *const up = static_cast<const char *>(shape.up);
  const char *const from = shape.gated && up < gate ? up : gate;
  const long long distance = !shape.gated ? SWIZZLE_BYTES : up < gate ? gate - up : up - gate;
  const MapKey key = {from, shape.intermediate_size, shape.hidden_size, shape.gate_stride, distance, dtype,
                      plan.share * GROUP, plan.first_chunks, shape.gated ? 2 : 1};
  return chunk_map(map, key);
}

} // namespace

bool can_decode_resident(const DeviceFacts &device, const FusedMlpArgs &args) {
  const int hidden_size = args.hidden_size, intermediate_size = args.intermediate_size;
  if (!device.hopper || args.dtype == FUSED_MLP_F32 || args.tokens > RESIDENT_TOKENS || hidden_size % CHUNK != 0 ||
      intermediate_size % CHUNK != 0 || 1ll * args.tokens * intermediate_size > RESIDENT_ELEMENTS ||
      hidden_size > MOST_BOX_CHUNKS * CHUNK)
    return false;
  if (args.gated) {
    const long long distance = static_cast<const char *>(args.up) - static_cast<const char *>(args.gate);
    if (args.up_stride != args.gate_stride || distance == 0 || distance <= -MOST_MAP_STRIDE || distance >= MOST_MAP_STRIDE)
      return false;
  }
  const int blocks = decode_blocks(device), chunks = intermediate_size / CHUNK;
  const int token_rows = token_rows_of(args.tokens);
  ResidentPlan plan;
  const int bytes = plan_of(blocks, token_rows, hidden_size, intermediate_size, args.gated, false, &plan);
  return depth_parts(blocks, args.output_size, intermediate_size) == PARTS &&
         PARTS * part_chunks(chunks, PARTS) == chunks && (args.gated ? 2 : 1) * plan.share <= TILE_GROUPS &&
         divide_up(args.output_size, GROUP) <= blocks && bytes <= device.shared_bytes_per_block - static_bytes(token_rows);
}

bool decode_resident_is_chosen(const FusedMlpArgs &args) {
  // Each block reads all hidden rows, which takes long where many weights leave room for one block alone.
  constexpr long long MOST_WEIGHTS = 7 << 20;
  constexpr int FEW_TOKENS = 8;
  return args.tokens <= FEW_TOKENS || weights_of(args.gated, args.hidden_size, args.intermediate_size) <= MOST_WEIGHTS;
}

int prepare_decode_resident(const DeviceFacts &device) {
  for (int dtype = FUSED_MLP_BF16; dtype <= FUSED_MLP_F16; ++dtype)
    for (int token_rows = 8; token_rows <= RESIDENT_TOKENS; token_rows *= 2) {
      const cudaError_t error = cudaFuncSetAttribute(
          reinterpret_cast<const void *>(kernel_of(dtype, token_rows)), cudaFuncAttributeMaxDynamicSharedMemorySize,
          device.shared_bytes_per_block - static_bytes(token_rows));
      if (error != cudaSuccess)
        return error;
    }
  return FUSED_MLP_OK;
}

int launch_decode_resident(const Shape &shape, int dtype, const DeviceFacts &device, cudaStream_t stream) {
  const int blocks = decode_blocks(device), token_rows = token_rows_of(shape.tokens);
  ResidentPlan plan;
  const int bytes = plan_of(blocks, token_rows, shape.hidden_size, shape.intermediate_size, shape.gated,
                            shape.gated && shape.up < shape.gate, &plan);
  ResidentMaps maps;
  const long long x_stride = shape.tokens > 1 ? shape.x_stride : shape.hidden_size;
  const int h = shape.hidden_size, n = shape.intermediate_size;
  int status = chunk_map(&maps.x, {shape.x, shape.tokens, h, x_stride, 0, dtype, token_rows, plan.first_chunks, 1});
  if (status == FUSED_MLP_OK)
    status = slice_map(&maps.first, shape, dtype, plan);
  if (status == FUSED_MLP_OK)
    status = chunk_map(&maps.down,
                       {shape.down, shape.output_size, n, shape.down_stride, 0, dtype, GROUP, plan.second_chunks, 1});
  if (status != FUSED_MLP_OK)
    return status;

  return launch_kernel(kernel_of(dtype, token_rows), {blocks, THREADS, bytes, true}, stream, shape, plan, maps);
}

} // namespace fused_mlp
