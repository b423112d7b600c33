// The whole MLP for 1 to 64 tokens in one launch: weights go from memory straight into the registers that multiply them.
//
// One block of 8 warps per multiprocessor. The first layer's units (a hidden element: its gate row, and its up row) are
// divided evenly among blocks, then the down projection's rows. A warp owns a tile of 16 or 32 rows and one segment of
// their elements, and keeps DEPTH chunks of 128 bytes of each row on the way into registers: 128 KB a multiprocessor.
// The tokens' rows pass through shared memory in windows that all warps share.
// When a warp has asked for its last gate and up chunks it goes on to ask for down chunks, which depend on nothing: the
// one grid-wide wait, for the hidden rows, passes while they are on the way.
//
// Weights are the M operand of the tensor cores' products and tokens the N operand. The price of 8 tokens is that of
// one, and a token's column is computed alike whatever is beside it. With the segments fixed by the weights' shape and
// the GPU alone, a row has the same bits in any company, and on any run: chunks of a segment in order, segments of a
// quarter in order, quarters in order.
//
// No deadlock, whatever is resident: a block waits for the hidden rows only. Slice b of the first layer belongs to
// whoever claims it with an atomic, normally block b, whose first loads are under way meanwhile. A block whose wait is
// longer than its own share took computes slices that nobody has claimed. So each slice is either claimed by a block
// that runs, and that waits for nothing before it has delivered it, or free for the waiting block to take.
//
// Dependent launch: the next launch's blocks may start while this one ends, but before wait_for_previous_kernel they
// only work out addresses. Weights, counters, hidden rows and partial sums are touched after it, when the launch before
// has ended and put the counters back to zero: one workspace per stream is enough. Every block waits, so a launch ends
// after the one before it, and launches of one stream form a chain. A block says that the next launch may be scheduled
// only after its own wait, when all blocks of this launch but late ones are resident already.
#include "decode_kernels.cuh"

namespace fused_mlp {
namespace {

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK_BYTES = 128;
[[maybe_unused]] constexpr int PIECE_BYTES = 16; // one load of one thread
constexpr int MAX_ROWS = 32 * WARPS;
constexpr int SMALL_WINDOW = 32 * 1024;
constexpr int SUM_STRIDE = MAX_ROWS + 4; // floats of one token's sums; 4 mod 32 keeps the stores off one bank

// How one layer is cut. A chunk is 128 bytes of a row; a segment is a run of chunks; a pass is a run of rows.
struct LayerPlan {
  int inner_bytes;        // of a row
  int segments;           // that one block sums: all, or a quarter when blocks share the layer's rows
  int chunks_per_segment; //
  int window_chunks;      // of each segment, of the tokens' rows in shared memory at a time
  int passes;
  int units_per_pass;
  int tiles; // of a pass; rows past the last unit are neither loaded nor stored
  int units, remainder; // of every part; the first `remainder` parts have one more
  unsigned window_reciprocal, token_reciprocal; // of window_chunks and of the tokens, see divide
  // A warp's work; segments past the last for a warp without any.
  unsigned char tile_of[WARPS], segment_of[WARPS], token_group_of[WARPS];
};

struct DirectPlan {
  LayerPlan first, second;
  int split, split_log2, groups; // blocks that share a down-projection row: 1, 2 or 4; how many such groups
  int quarter;      // segments of the second layer per quarter
  int token_rows;   // rows of a window
  int token_groups; // of 8 * NT tokens, each a warp's
  int window_bytes; // of one of two buffers
  int spread_log2;  // of how many tokens the block rounds off at a time
};

// Divisions are slow enough to show at the start of a small layer, so the host does them.
[[maybe_unused]] __device__ __forceinline__ int part_begin(const LayerPlan &plan, int part) {
  return part * plan.units + min(part, plan.remainder);
}
// v / d for v and d below 65536, given ceil(2^32 / d), or 0 for d = 1.
[[maybe_unused]] __device__ __forceinline__ int divide(int v, unsigned reciprocal) {
  return reciprocal ? static_cast<int>(__umulhi(static_cast<unsigned>(v), reciprocal)) : v;
}

#if __CUDA_ARCH__ >= 800

// 16 bytes of weights, past L1 and first to leave L2: no other block wants them. Zeros where there are none.
__device__ __forceinline__ uint4 load_weights(const char *from, bool valid, unsigned long long policy) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (valid)
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from), "l"(policy));
  return v;
}

// A chunk's products in one warp: 16 * MT weight rows with 8 * NT tokens.
//
// Thread (g, t) = (lane / 4, lane % 4) holds pieces 2t and 2t + 1 of rows g + 8 i. A product of 16 elements may give
// each thread any of them, if weights and tokens agree: so 16 bytes make two products, and nothing is shuffled.
template <typename T, int MT, int NT> struct Product {
  static constexpr int TOKENS = 8 * NT;
  static constexpr int SUMS = 4 * MT * NT;
  static __device__ __forceinline__ void add(const uint4 (&a)[2 * MT][2], unsigned tokens_at, int pitch, int last,
                                             float (&acc)[SUMS]) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const int token = NT == 1 ? min(g, last) : g; // absent tokens of a lone tile repeat one that is there
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned at = tokens_at + token * pitch + (((2 * t + half) ^ (token & 7)) * PIECE_BYTES);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 b = load_shared_16(at + n * 8 * pitch);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          float(&d)[4] = *reinterpret_cast<float(*)[4]>(&acc[(m * NT + n) * 4]);
          const uint4 &low = a[2 * m][half], &high = a[2 * m + 1][half];
          mma_16x8x16<T>(d, low.x, high.x, low.y, high.y, b.x, b.y);
          mma_16x8x16<T>(d, low.z, high.z, low.w, high.w, b.z, b.w);
        }
      }
    }
  }
  static __device__ __forceinline__ void store(float *sums, int tokens, float (&acc)[SUMS]) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n * 8 + 2 * t + (e & 1) < tokens)
            sums[(n * 8 + 2 * t + (e & 1)) * SUM_STRIDE + m * 16 + g + (e >> 1) * 8] = acc[(m * NT + n) * 4 + e];
  }
};

// f32 keeps full precision on the ordinary units: thread (g, t) multiplies its pieces with all the tokens, and the four
// threads of a row are added at the end. A chunk's products are summed apart before they join the running sum, which
// keeps the error near that of a pairwise sum.
template <int MT, int NT> struct Product<float, MT, NT> {
  static constexpr int ROWS = 2 * MT;
  static constexpr int TOKENS = NT == 0 ? 2 : 8 * NT; // NT 0: for one or two tokens
  static constexpr int SUMS = ROWS * TOKENS;
  static __device__ __forceinline__ void add(const uint4 (&a)[ROWS][2], unsigned tokens_at, int pitch, int last,
                                             float (&acc)[SUMS]) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
      const int row = min(token, last);
      float part[ROWS];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 b = load_shared_16(tokens_at + row * pitch + (((2 * t + half) ^ (row & 7)) * PIECE_BYTES));
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          part[i] = half == 0 ? __uint_as_float(a[i][half].x) * __uint_as_float(b.x)
                              : fmaf(__uint_as_float(a[i][half].x), __uint_as_float(b.x), part[i]);
          part[i] = fmaf(__uint_as_float(a[i][half].y), __uint_as_float(b.y), part[i]);
          part[i] = fmaf(__uint_as_float(a[i][half].z), __uint_as_float(b.z), part[i]);
          part[i] = fmaf(__uint_as_float(a[i][half].w), __uint_as_float(b.w), part[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        acc[i * TOKENS + token] += part[i];
    }
  }
  static __device__ __forceinline__ void store(float *sums, int tokens, float (&acc)[SUMS]) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        float v = acc[i * TOKENS + token];
        v += __shfl_xor_sync(0xffffffffu, v, 1);
        v += __shfl_xor_sync(0xffffffffu, v, 2);
        if (t == 0 && token < tokens)
          sums[token * SUM_STRIDE + g + 8 * i] = v;
      }
  }
};

// Segments' sums of one row, quarter by quarter: the order in which blocks that share a row add them.
__device__ __forceinline__ float add_segments(const float *sums, int rows, int segments, int quarter) {
  float total = 0.f;
  for (int s = 0; s < segments; s += quarter) {
    float sum = sums[s * rows];
    for (int i = 1; i < quarter; ++i)
      sum += sums[(s + i) * rows];
    total = s == 0 ? sum : total + sum;
  }
  return total;
}

// Asks for window `window` of the tokens' rows (x, or the hidden rows): [segment][token][chunk], pieces swizzled so that
// eight threads which read two tokens' rows meet eight different bank groups. Hidden rows come from other blocks, hence
// from L2, where these copies read.
__device__ __forceinline__ void copy_window(unsigned to, const LayerPlan &plan, int first_segment, int window,
                                            const char *rows, long long stride, int tokens, int token_rows) {
  const int piece = threadIdx.x & 7;
  const int first_chunk = window * plan.window_chunks;
  const int chunks = min(plan.window_chunks, plan.chunks_per_segment - first_chunk);
  const int pitch = plan.window_chunks * CHUNK_BYTES;
  const int lines = plan.segments * tokens * plan.window_chunks;
  for (int v = threadIdx.x >> 3; v < lines; v += THREADS / 8) {
    const int row = divide(v, plan.window_reciprocal), c = v - row * plan.window_chunks;
    if (c >= chunks)
      continue;
    const int segment = divide(row, plan.token_reciprocal), token = row - segment * tokens;
    const int at =
        ((first_segment + segment) * plan.chunks_per_segment + first_chunk + c) * CHUNK_BYTES + piece * PIECE_BYTES;
    const bool valid = at < plan.inner_bytes;
    copy_async_16(to + (segment * token_rows + token) * pitch + c * CHUNK_BYTES +
                      ((piece ^ (token & 7)) * PIECE_BYTES),
                  rows + token * stride + (valid ? at : 0), valid);
  }
}

#endif // __CUDA_ARCH__ >= 800

template <typename T, int MT, int NT, int DEPTH>
__global__ void __launch_bounds__(THREADS, 1)
    decode_direct_kernel(const __grid_constant__ Shape shape, const __grid_constant__ DirectPlan plan) {
#if __CUDA_ARCH__ >= 800
  using P = Product<T, MT, NT>;
  constexpr int TILE = 16 * MT;
  constexpr int ROWS = 2 * MT; // of one thread
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float bias[3 * MAX_ROWS]; // gate, up, down
  __shared__ int claimed, rescue;
  const unsigned windows = shared_address(shared);
  float *const sums = reinterpret_cast<float *>(shared + 2 * plan.window_bytes);
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const unsigned long long policy = evict_first_policy();
  const LayerPlan &first = plan.first;
  const LayerPlan &second = plan.second;
  const int groups = plan.groups;
  const int group = blockIdx.x >> plan.split_log2, share = blockIdx.x & (plan.split - 1);
  const int row_begin = group < groups ? part_begin(second, group) : 0;
  const int row_end = group < groups ? part_begin(second, group + 1) : 0;
  int slice = blockIdx.x;

  // A thread's rows of one pass, from its first piece on; null where there is no row. `left`: bytes from there on.
  struct Rows {
    const char *at[ROWS];
    int left;
  };
  auto segment_of = [&](const LayerPlan &layer) { return int(layer.segment_of[warp]); };
  auto active = [&](const LayerPlan &layer) { return segment_of(layer) < layer.segments; };
  auto start_of = [&](const LayerPlan &layer, int first_segment) {
    return (first_segment + segment_of(layer)) * layer.chunks_per_segment * CHUNK_BYTES + t * 2 * PIECE_BYTES;
  };
  int slice_begin = part_begin(first, slice), slice_end = part_begin(first, slice + 1);
  auto first_begin = [&](int pass) { return slice_begin + pass * first.units_per_pass; };
  auto first_count = [&](int pass) { return min(slice_end - first_begin(pass), first.units_per_pass); };
  auto second_begin = [&](int pass) { return row_begin + pass * second.units_per_pass; };
  auto second_count = [&](int pass) { return min(row_end - second_begin(pass), second.units_per_pass); };
  // With gate and up, each tile of 16 rows is 8 gate rows over the same 8 units' up rows.
  auto first_rows = [&](Rows &rows, int pass) {
    const int start = start_of(first, 0);
    rows.left = active(first) ? first.inner_bytes - start : 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = first.tile_of[warp] * TILE + g + 8 * i;
      const int unit = shape.gated ? ((row >> 4) << 3) + (row & 7) : row;
      const bool up = shape.gated && (i & 1);
      rows.at[i] = unit < first_count(pass)
                       ? static_cast<const char *>(up ? shape.up : shape.gate) +
                             (first_begin(pass) + unit) * (up ? shape.up_stride : shape.gate_stride) * int(sizeof(T)) +
                             start
                       : nullptr;
    }
  };
  auto second_rows = [&](Rows &rows, int pass) {
    const int start = start_of(second, share * second.segments);
    rows.left = active(second) ? second.inner_bytes - start : 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = second.tile_of[warp] * TILE + g + 8 * i;
      rows.at[i] = row < second_count(pass) ? static_cast<const char *>(shape.down) +
                                                  (second_begin(pass) + row) * shape.down_stride * int(sizeof(T)) + start
                                            : nullptr;
    }
  };
  uint4 weights[DEPTH][ROWS][2]; // chunks on their way, oldest next to be multiplied
  auto load = [&](uint4 (&to)[ROWS][2], const Rows &rows, int chunks_per_segment, int chunk) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = chunk * CHUNK_BYTES + half * PIECE_BYTES;
        to[i][half] =
            load_weights(rows.at[i] + at, rows.at[i] && chunk < chunks_per_segment && at < rows.left, policy);
      }
  };
  float acc[P::SUMS];
  unsigned claim_before = 0; // thread 0: the claim word as it was
  // Multiplies one pass. `weights` holds its first DEPTH chunks, and in the end those of the next.
  auto multiply = [&](const LayerPlan &layer, int first_segment, const Rows &rows, const Rows &next, int next_chunks,
                      const void *token_data, long long stride) {
    const int pitch = layer.window_chunks * CHUNK_BYTES;
    const int chunks = layer.chunks_per_segment;
    const int padded = (chunks + DEPTH - 1) / DEPTH * DEPTH;
    const int first_token = layer.token_group_of[warp] * P::TOKENS;
    const bool works = active(layer);
    const unsigned tokens_at = (segment_of(layer) * plan.token_rows + first_token) * pitch;
    const int last = shape.tokens - 1 - first_token;
#pragma unroll
    for (int i = 0; i < P::SUMS; ++i)
      acc[i] = 0.f;
    int window = 0, in_window = 0;
    copy_window(windows, layer, first_segment, 0, static_cast<const char *>(token_data), stride, shape.tokens,
                plan.token_rows);
    commit_copies();
    unsigned buffer = windows;
#pragma unroll 1
    for (int chunk = 0; chunk < padded; chunk += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        if (chunk + d < chunks) {
          if (in_window == 0) {
            wait_copies<0>();
            __syncthreads();
            buffer = windows + (window & 1) * plan.window_bytes;
            if (++window * layer.window_chunks < chunks) {
              copy_window(windows + (window & 1) * plan.window_bytes, layer, first_segment, window,
                          static_cast<const char *>(token_data), stride, shape.tokens, plan.token_rows);
              commit_copies();
            }
          }
          if (works)
            P::add(weights[d], buffer + tokens_at + in_window * CHUNK_BYTES, pitch, last, acc);
          if (++in_window == layer.window_chunks)
            in_window = 0;
        }
        const int ahead = chunk + DEPTH + d;
        if (ahead < padded)
          load(weights[d], rows, chunks, ahead);
        else
          load(weights[d], next, next_chunks, ahead - padded);
      }
    }
    // Each (token, row) gets its segments' sums side by side.
    if (works)
      P::store(sums + first_token * SUM_STRIDE + (segment_of(layer) * layer.tiles + layer.tile_of[warp]) * TILE,
               last + 1, acc);
    if (threadIdx.x == 0)
      claimed = claim_before == 0u;
    __syncthreads();
  };
  auto load_first_bias = [&](int pass) {
    for (int u = threadIdx.x; u < first_count(pass); u += THREADS) {
      bias[u] = shape.bias_gate ? to_float(static_cast<const T *>(shape.bias_gate)[first_begin(pass) + u]) : 0.f;
      bias[MAX_ROWS + u] =
          shape.gated && shape.bias_up ? to_float(static_cast<const T *>(shape.bias_up)[first_begin(pass) + u]) : 0.f;
    }
  };
  auto load_second_bias = [&](int pass) {
    for (int r = threadIdx.x; r < second_count(pass); r += THREADS)
      bias[2 * MAX_ROWS + r] =
          shape.bias_down ? to_float(static_cast<const T *>(shape.bias_down)[second_begin(pass) + r]) : 0.f;
  };

  // How threads share a (token, column) rectangle: 1 to 8 tokens at a time, warps' lanes along the columns.
  const struct {
    int token, token_step, column, column_step;
  } spread = {warp & ((1 << plan.spread_log2) - 1), 1 << plan.spread_log2,
              (warp >> plan.spread_log2) * 32 + int(threadIdx.x & 31), THREADS >> plan.spread_log2};
  Rows rows, next;
  first_rows(rows, 0);
  wait_for_previous_kernel();
  const long long start = clock64();
  bool own = true;
  for (;;) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
      load(weights[d], rows, first.chunks_per_segment, d);
    // The answer is not looked at before the products are done.
    if (threadIdx.x == 0 && own)
      claim_before = atomicExch(&shape.counters->claim[slice], 1u);
#pragma unroll 1
    for (int pass = 0; pass < first.passes; ++pass) {
      const bool more = pass + 1 < first.passes;
      if (more)
        first_rows(next, pass + 1);
      else
        second_rows(next, 0);
      load_first_bias(pass);
      if (pass == 0)
        load_second_bias(0);
      multiply(first, 0, rows, next, more ? first.chunks_per_segment : second.chunks_per_segment, shape.x,
               shape.x_stride * int(sizeof(T)));
      rows = next;
      const int count = first_count(pass), begin = first_begin(pass), fragment_rows = first.tiles * TILE;
      if (claimed)
        for (int token = spread.token; token < shape.tokens; token += spread.token_step)
#pragma unroll 2
          for (int u = spread.column; u < count; u += spread.column_step) {
            const int row = shape.gated ? ((u >> 3) << 4) + (u & 7) : u;
            const float *mine = sums + token * SUM_STRIDE + row;
            float value = activate(shape.activation, float(shape.activation_param),
                                   add_segments(mine, fragment_rows, first.segments, 1) + bias[u]);
            if (shape.gated)
              value *= add_segments(mine + 8, fragment_rows, first.segments, 1) + bias[MAX_ROWS + u];
            static_cast<T *>(shape.hidden)[token * shape.hidden_stride + begin + u] = from_float<T>(value);
          }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      if (claimed) {
        __threadfence();
        atomicAdd(&shape.counters->arrived, 1u);
      }
      // Once a block has had to help, it helps on without waiting again.
      const long long since = clock64(), patience = own ? 2 * (since - start) + 8000 : 0;
      rescue = -1;
      bool all_claimed = false;
      while (load_acquire(&shape.counters->arrived) < gridDim.x) {
        if (all_claimed || clock64() - since <= patience)
          continue;
        all_claimed = true;
        for (int i = 1; i < gridDim.x; ++i) {
          const int other = (blockIdx.x + i) % gridDim.x;
          if (atomicExch(&shape.counters->claim[other], 1u) == 0u) {
            rescue = other;
            break;
          }
        }
        if (rescue >= 0)
          break;
      }
      claimed = 1;
    }
    __syncthreads();
    if (rescue < 0)
      break;
    slice = rescue;
    slice_begin = part_begin(first, slice);
    slice_end = part_begin(first, slice + 1);
    claim_before = 0;
    own = false;
    first_rows(rows, 0);
  }
  release_next_kernel();

  unsigned passed = 0;
  if (threadIdx.x == 0)
    passed = atomicInc(&shape.counters->passed, gridDim.x - 1);
#pragma unroll 1
  for (int pass = 0; pass < second.passes; ++pass) {
    const bool more = pass + 1 < second.passes;
    if (more)
      second_rows(next, pass + 1);
    if (pass > 0)
      load_second_bias(pass);
    multiply(second, share * second.segments, rows, next, more ? second.chunks_per_segment : 0, shape.hidden,
             shape.hidden_stride * int(sizeof(T)));
    rows = next;
    const int count = second_count(pass), begin = second_begin(pass);
    for (int token = spread.token; token < shape.tokens; token += spread.token_step)
#pragma unroll 2
      for (int r = spread.column; r < count; r += spread.column_step) {
        const float sum =
            add_segments(sums + token * SUM_STRIDE + r, second.tiles * TILE, second.segments, plan.quarter);
        const long long at = static_cast<long long>(token) * shape.output_size + begin + r;
        if (plan.split == 1)
          static_cast<T *>(shape.out)[at] = from_float<T>(sum + bias[2 * MAX_ROWS + r]);
        else
          shape.partial[static_cast<long long>(share) * shape.tokens * shape.output_size + at] = sum;
      }
    __syncthreads();
  }
  // Everybody is past the wait: the counters may go back to zero.
  if (threadIdx.x == 0)
    rescue = passed == gridDim.x - 1;
  __syncthreads();
  if (rescue) {
    for (int i = threadIdx.x; i < gridDim.x; i += THREADS)
      shape.counters->claim[i] = 0u;
    if (threadIdx.x == 0)
      shape.counters->arrived = 0u;
  }
  if (plan.split == 1 || group >= groups)
    return;
  // The last of the blocks that share these rows adds their sums, always in the same order.
  if (threadIdx.x == 0) {
    __threadfence();
    claimed = atomicInc(&shape.counters->group_done[group], plan.split - 1) == plan.split - 1;
    __threadfence();
  }
  __syncthreads();
  if (!claimed)
    return;
  const long long layer = static_cast<long long>(shape.tokens) * shape.output_size;
  for (int token = spread.token; token < shape.tokens; token += spread.token_step)
#pragma unroll 4
    for (int row = row_begin + spread.column; row < row_end; row += spread.column_step) {
    const long long at = static_cast<long long>(token) * shape.output_size + row;
    float part[4];
#pragma unroll
    for (int s = 0; s < 4; ++s)
      part[s] = s < plan.split ? __ldcg(shape.partial + s * layer + at) : 0.f;
    float sum = part[0];
#pragma unroll
    for (int s = 1; s < 4; ++s)
      if (s < plan.split)
        sum += part[s];
    if (shape.bias_down)
      sum += to_float(static_cast<const T *>(shape.bias_down)[row]);
    static_cast<T *>(shape.out)[at] = from_float<T>(sum);
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers


// How many segments a row's sum is cut into. Depends on the weights' shape and the GPU alone, never on the tokens:
// it decides the order of the additions. More segments occupy more warps when a block has few rows.
int segments_for(int fragment_rows, int chunks, int most) {
  const int tiles = divide_up(fragment_rows, 32);
  int segments = 1;
  while (2 * segments <= most && 2 * segments * tiles <= WARPS && 2 * segments <= chunks)
    segments *= 2;
  return segments;
}

unsigned reciprocal(int d) { return d <= 1 ? 0u : static_cast<unsigned>((0x100000000ull + d - 1) / d); }

// Cuts a layer of `total_units` into `parts`. `segments` of the canonical `all_segments` are one block's.
LayerPlan plan_layer(int total_units, int parts, bool paired, int inner_bytes, int segments, int all_segments, int tile_rows,
                     int token_groups, int token_rows, int tokens, int window_bytes) {
  LayerPlan plan;
  const int units = divide_up(total_units, parts);
  const int units_per_tile = paired ? tile_rows / 2 : tile_rows;
  const int tiles = divide_up(units, units_per_tile);
  const int most = WARPS / (segments * token_groups) > 1 ? WARPS / (segments * token_groups) : 1;
  plan.passes = divide_up(tiles, most);
  plan.tiles = divide_up(tiles, plan.passes);
  plan.units_per_pass = plan.tiles * units_per_tile;
  plan.inner_bytes = inner_bytes;
  plan.segments = segments;
  plan.chunks_per_segment = divide_up(divide_up(inner_bytes, CHUNK_BYTES), all_segments);
  plan.window_chunks = window_bytes / (segments * token_rows * CHUNK_BYTES);
  if (plan.window_chunks > plan.chunks_per_segment)
    plan.window_chunks = plan.chunks_per_segment;
  plan.window_reciprocal = reciprocal(plan.window_chunks);
  plan.token_reciprocal = reciprocal(tokens);
  plan.units = total_units / parts;
  plan.remainder = total_units % parts;
  for (int warp = 0; warp < WARPS; ++warp) {
    const int rest = warp / plan.tiles, group = rest / segments;
    plan.tile_of[warp] = warp % plan.tiles;
    plan.segment_of[warp] = group < token_groups ? rest % segments : 255;
    plan.token_group_of[warp] = group < token_groups ? group : 0;
  }
  return plan;
}

struct Variant {
  void (*kernel)(Shape, DirectPlan);
  int tile_rows, tokens; // of a warp
};

template <typename T> Variant half_variant(int tokens) {
  if (tokens <= 8)
    return {decode_direct_kernel<T, 2, 1, 4>, 32, 8};
  if (tokens <= 16)
    return {decode_direct_kernel<T, 2, 2, 4>, 32, 16};
  if (tokens <= 32)
    return {decode_direct_kernel<T, 2, 4, 3>, 32, 32};
  return {decode_direct_kernel<T, 2, 8, 3>, 32, 64};
}

Variant variant_for(int dtype, int tokens) {
  if (dtype == FUSED_MLP_BF16)
    return half_variant<__nv_bfloat16>(tokens);
  if (dtype == FUSED_MLP_F16)
    return half_variant<__half>(tokens);
  if (tokens <= 2)
    return {decode_direct_kernel<float, 2, 0, 4>, 32, 2};
  if (tokens <= 8)
    return {decode_direct_kernel<float, 2, 1, 3>, 32, 8};
  if (tokens <= 16)
    return {decode_direct_kernel<float, 2, 2, 2>, 32, 16};
  return {decode_direct_kernel<float, 1, 4, 2>, 16, 32};
}

int dynamic_limit(const DeviceFacts &device) { return device.shared_bytes_per_block - 3 * MAX_ROWS * 4 - 256; }

} // namespace

unsigned long long decode_direct_partial_elements(int output_size) {
  return 4ull * MAX_TOKENS * static_cast<unsigned long long>(output_size);
}

int compiled_architecture(int *compute_capability) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void *>(variant_for(FUSED_MLP_BF16, 1).kernel));
  *compute_capability = attributes.ptxVersion;
  return error;
}

int prepare_decode_direct(const DeviceFacts &device) {
  for (int dtype = FUSED_MLP_BF16; dtype <= FUSED_MLP_F32; ++dtype)
    for (int tokens = 2; tokens <= MAX_TOKENS; tokens *= 2) {
      const cudaError_t error =
          cudaFuncSetAttribute(reinterpret_cast<const void *>(variant_for(dtype, tokens).kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_limit(device));
      if (error != cudaSuccess)
        return error;
    }
  return FUSED_MLP_OK;
}

int launch_decode_direct(const Shape &shape, int dtype, const DeviceFacts &device, bool programmatic,
                         cudaStream_t stream) {
  int blocks = device.multiprocessors < MAX_BLOCKS ? device.multiprocessors : MAX_BLOCKS;
  const int element = dtype == FUSED_MLP_F32 ? 4 : 2;
  const Variant variant = variant_for(dtype, shape.tokens);
  const int units = divide_up(shape.intermediate_size, blocks);
  // f32 needs warps for groups of 32 tokens too.
  const int most_segments = dtype == FUSED_MLP_F32 ? 4 : 8;
  int segments1 = segments_for(divide_up(units, shape.gated ? 8 : 16) * 16,
                               divide_up(1ll * shape.hidden_size * element, CHUNK_BYTES), most_segments);
  int segments2 = segments_for(divide_up(shape.output_size, blocks),
                               divide_up(1ll * shape.intermediate_size * element, CHUNK_BYTES), most_segments);
  DirectPlan plan;
  plan.quarter = segments2 < 4 ? 1 : segments2 / 4;
  // With many tokens each block would read all hidden rows for its few down rows: four blocks share more rows instead.
  plan.split = shape.tokens > 8 ? (segments2 < 4 ? segments2 : 4) : 1;
  if (plan.split > blocks)
    plan.split = 1;
  plan.split_log2 = plan.split == 4 ? 2 : plan.split - 1;
  plan.groups = blocks / plan.split;
  plan.spread_log2 = shape.tokens >= 8 ? 3 : shape.tokens >= 4 ? 2 : shape.tokens >= 2 ? 1 : 0;
  plan.token_groups = divide_up(shape.tokens, variant.tokens);
  plan.token_rows = variant.tokens <= 8 ? shape.tokens : plan.token_groups * variant.tokens;
  const int sum_bytes = plan.token_rows * SUM_STRIDE * int(sizeof(float));
  int window_bytes = (dynamic_limit(device) - sum_bytes) / 2 / CHUNK_BYTES * CHUNK_BYTES;
  // A window must have come before its first product: small ones start sooner.
  const int least = 8 * plan.token_rows * CHUNK_BYTES, small = least > SMALL_WINDOW ? least : SMALL_WINDOW;
  window_bytes = window_bytes < small ? window_bytes : small;
  plan.first = plan_layer(shape.intermediate_size, blocks, shape.gated != 0, shape.hidden_size * element, segments1,
                          segments1, variant.tile_rows, plan.token_groups, plan.token_rows, shape.tokens, window_bytes);
  plan.second = plan_layer(shape.output_size, plan.groups, false, shape.intermediate_size * element,
                           segments2 / plan.split, segments2, variant.tile_rows, plan.token_groups, plan.token_rows,
                           shape.tokens, window_bytes);
  if (plan.first.window_chunks < 1 || plan.second.window_chunks < 1)
    return FUSED_MLP_UNSUPPORTED;
  const int first_bytes = plan.first.segments * plan.token_rows * plan.first.window_chunks * CHUNK_BYTES;
  const int second_bytes = plan.second.segments * plan.token_rows * plan.second.window_chunks * CHUNK_BYTES;
  plan.window_bytes = first_bytes > second_bytes ? first_bytes : second_bytes;

  return launch_kernel(variant.kernel, {blocks, THREADS, 2 * plan.window_bytes + sum_bytes, programmatic}, stream, shape, plan);
}

} // namespace fused_mlp
