// The products' kernels in f32, on tensor cores that take 11 bits of a fraction: each element as the sum of two such
// numbers, high and low, and each product as high low + low high + high high.
//
// What a product leaves out, low low, is some 2^-23 of it. The tensor cores cut off bits where they add, so a stage's sums
// start from zero, small terms first, and are added to the tile's sums in f32; of a great depth, those are added to the output
// now and then. A consumer parts the rows in its registers; the weights' low parts are put beside the weights in shared memory
// by three warps of their own. Shared memory is what limits these kernels: both consumers read all weights of a stage.
#include "activation.cuh"
#include "gemm_hopper.cuh"

namespace fused_mlp {
namespace {

template <bool GATED_, int COLUMNS_, int SPLIT_> struct PartedTile : Warpgroups<2> {
  using T = float;
  using Bits = float;
  static constexpr bool GATED = GATED_, PINGPONG = false, TURNED = false;
  static constexpr int ROWS = 64 * CONSUMERS, COLUMNS = COLUMNS_, SHARE = 1, PEERS = 1, SPLIT = SPLIT_, HELD = 1, LINKS = 1,
                       CLUSTER = SPLIT;
  static constexpr int DEPTH = SWIZZLE_BYTES / sizeof(T);
  static constexpr int OUT_COLUMNS = GATED ? COLUMNS / 2 : COLUMNS, SUMS = COLUMNS / 2;
  static constexpr int BOXES = 2;
  static constexpr int ROW_BYTES = ROWS * SWIZZLE_BYTES, BOX_BYTES = COLUMNS / BOXES * SWIZZLE_BYTES;
  static constexpr int STAGE_BYTES = ROW_BYTES + 2 * BOXES * BOX_BYTES;
  static constexpr int CHUNK = 0, CHUNK_BYTES = 16 * CHUNK * 4; // written from registers
  static constexpr int OUT_BOX_ROWS = 0, OUT_BOX_BYTES = 0;
  static constexpr int BIAS_BYTES = CONSUMERS * COLUMNS * sizeof(T);
  static constexpr int FIT = (SHARED_BYTES - SWIZZLE_ALIGN - BIAS_BYTES - 256) / STAGE_BYTES;
  static constexpr int STAGES = FIT < 8 ? FIT : 8;
  static constexpr int TOTAL_BYTES = SWIZZLE_ALIGN + STAGES * STAGE_BYTES + 8 * CHUNK_BYTES + BIAS_BYTES + 24 * STAGES;
  static_assert(SPLIT == 1 || HELD * CONSUMERS * WARPGROUP * SUMS * 4 <= STAGES * STAGE_BYTES, "sums meet in the stages");
};

#ifdef FUSED_MLP_HOPPER

constexpr int PARTERS = 3;  // warps, beside the producer's
constexpr int SEGMENT = 64; // stages whose sums stay in registers, where there are more than twice as many

__device__ __forceinline__ float4 load_shared_16(unsigned address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

template <Finish FINISH> __device__ __forceinline__ float finished_exactly(float v, float slope) {
  if constexpr (FINISH == Finish::Swish)
    return v / (1.f + exp_of(-slope * v));
  if constexpr (FINISH == Finish::GeluTanh)
    return v * sigmoid_of(gelu_tanh_argument(v));
  if constexpr (FINISH == Finish::Gelu)
    return v * normal_cdf_of(v);
  if constexpr (FINISH == Finish::Relu)
    return relu_of(v);
  return v;
}

// Finishes and writes eight columns of the rows `row` and `row` + 8 of a thread, from the `first`th of the tile on: values[2 r
// + e] is row + 8 r, column 2 (lane % 4) + e.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_eight(const Product &p, int row, int column, int first, unsigned biases,
                                            const float (&values)[4], const float (&up)[4]) {
  const int own = first + 2 * (threadIdx.x % 4);
  float bias[2] = {0.f, 0.f}, bias_up[2] = {0.f, 0.f}, out[4];
  if (biases)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      bias[e] = load_shared(biases + 4 * (own + e));
      if (K::GATED)
        bias_up[e] = load_shared(biases + 4 * (own + e + K::OUT_COLUMNS));
    }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = finished_exactly<FINISH>(values[i] + bias[i % 2], p.slope);
    if (K::GATED)
      out[i] *= up[i] + bias_up[i % 2];
  }
  float *const to = static_cast<float *>(p.out_rows) + row * p.out_stride + column + own;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (row + 8 * r < p.tokens && column + own < p.columns)
      *reinterpret_cast<float2 *>(to + 8 * r * p.out_stride) = make_float2(out[2 * r], out[2 * r + 1]);
}

// A thread's sums of a tile, eight columns at a time: as in `write_tile`.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_rows(const Product &p, float (&sums)[K::SUMS], int row, int column,
                                           unsigned biases) {
  constexpr int HALF = K::GATED ? K::SUMS / 2 : K::SUMS;
#pragma unroll 1
  for (int first = 0; first < K::OUT_COLUMNS; first += 8) {
    float values[4], up[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = sums[i];
      up[i] = sums[K::SUMS / 2 + i];
    }
    write_eight<K, FINISH>(p, row, column, first, biases, values, up);
#pragma unroll
    for (int half = 0; half < K::SUMS; half += HALF)
#pragma unroll
      for (int i = 0; i + 4 < HALF; ++i)
        sums[half + i] = sums[half + i + 4];
  }
}

// The same of a tile whose sums are in as many parts as the cluster has blocks; each block writes a share of the columns.
template <class K, Finish FINISH>
__device__ __forceinline__ void write_split_rows(const Product &p, unsigned sums_at, const Place<K> &at, int row,
                                                 int column, unsigned biases) {
  constexpr int UNITS = K::OUT_COLUMNS / 8;
  for (int unit = at.split * UNITS / K::SPLIT; unit < (at.split + 1) * UNITS / K::SPLIT; ++unit) {
    float values[4], up[4];
    add_parts<K>(sums_at, at, unit, values);
    if (K::GATED)
      add_parts<K>(sums_at, at, unit + K::SUMS / 8, up);
    write_eight<K, FINISH>(p, row, column, 8 * unit, biases, values, up);
  }
}

// Adds what a thread's part of the output has to its sums, or the other way round.
template <class K, bool STORE>
__device__ __forceinline__ void exchange(const Product &p, float (&sums)[K::SUMS], int row, int column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int own = column + 2 * (threadIdx.x % 4);
    float *const at = static_cast<float *>(p.out_rows) + (row + 8 * r) * p.out_stride + own;
#pragma unroll
    for (int i = 0; i < K::SUMS / 4; ++i)
      if (row + 8 * r < p.tokens && own + 8 * i < p.columns) {
        float2 *const there = reinterpret_cast<float2 *>(at + 8 * i);
        float &low = sums[4 * i + 2 * r], &high = sums[4 * i + 2 * r + 1];
        if (STORE) {
          *there = make_float2(low, high);
        } else {
          const float2 v = *there;
          low += v.x;
          high += v.y;
        }
      }
  }
}

// The barrier of a stage whose weights' low parts are there.
template <class K> __device__ __forceinline__ unsigned parted(const Ring<K> &ring, int stage) {
  return ring.empty(stage) + 8 * K::STAGES;
}

template <class K>
__device__ __forceinline__ void part_weights(const Product &p, const Ring<K> &ring, const Place<K> &at) {
  constexpr int PIECES = K::COLUMNS * SWIZZLE_BYTES / 16, THREADS_HERE = PARTERS * 32, AT_ONCE = 4;
  const int tiles = p.row_tiles * p.column_tiles;
  const int stages = (tiles - at.first_tile + at.step - 1) / at.step * (at.end_stage(p.stages) - at.first_stage(p.stages));
  const int thread = threadIdx.x - 32;
  int stage = 0;
  unsigned parity = 0;
  for (int i = 0; i < stages; ++i) {
    barrier_wait(ring.full(stage), parity);
    const unsigned from = ring.weights(stage), to = from + K::COLUMNS * SWIZZLE_BYTES;
    for (int first = thread; first < PIECES; first += AT_ONCE * THREADS_HERE) {
      float4 v[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        if (first + j * THREADS_HERE < PIECES)
          v[j] = load_shared_16(from + 16 * (first + j * THREADS_HERE));
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        if (first + j * THREADS_HERE < PIECES)
          store_shared_16(to + 16 * (first + j * THREADS_HERE), low_part(v[j].x),
                          low_part(v[j].y), low_part(v[j].z), low_part(v[j].w));
    }
    fence_shared_copies();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      barrier_arrive(parted(ring, stage));
    if (++stage == K::STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
}

template <class K>
__device__ __forceinline__ void multiply_parted(const Product &p, const Ring<K> &ring, const Place<K> &at) {
  using Step = WarpgroupProductTf32<K::COLUMNS>;
  constexpr int STEPS = K::DEPTH / 8;
  wait_for_previous_kernel();
  const int consumer = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, lane = thread % 32;
  const int tiles = p.row_tiles * p.column_tiles;
  // Where a thread's row starts in a stage, its swizzle's part included.
  const int own_row = consumer * 64 + thread / 32 * 16 + lane / 4;
  const unsigned own = own_row * SWIZZLE_BYTES + lane / 4 * 16 + lane % 4 * 4;
  const int stages = at.end_stage(p.stages) - at.first_stage(p.stages);
  int stage = 0;
  unsigned parity = 0;
  for (int tile = at.first_tile; tile < tiles; tile += at.step) {
    int row, column;
    at.locate(p, tile, row, column);
    row += own_row;
    float sums[K::SUMS], stage_sums[K::SUMS];
#pragma unroll
    for (int i = 0; i < K::SUMS; ++i)
      sums[i] = 0.f;
    bool parted_sums = false; // some are in the output
    for (int depth = 0; depth < stages; ++depth) {
      unsigned high[STEPS][4], low[STEPS][4];
      barrier_wait(ring.full(stage), parity);
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float v = load_shared(((ring.rows(stage) + own) ^ (2 * k + i / 2) * 16) + i % 2 * 8 * SWIZZLE_BYTES);
          high[k][i] = rounded(v);
          low[k][i] = rounded(v - __uint_as_float(high[k][i]));
        }
      barrier_wait(parted(ring, stage), parity);
      const unsigned long long weights = tile_descriptor(ring.weights(stage)),
                               weights_low = tile_descriptor(ring.weights(stage) + K::COLUMNS * SWIZZLE_BYTES);
      products_begin();
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
        Step::add(stage_sums, low[k], weights + 2 * k, k > 0);
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
        Step::add(stage_sums, high[k], weights_low + 2 * k, 1);
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
        Step::add(stage_sums, high[k], weights + 2 * k, 1);
      products_commit();
      products_wait<0>();
      pin(stage_sums);
      if (lane == 0)
        barrier_arrive(ring.empty(stage)); // each warp for itself: it has read rows of its own
      if (++stage == K::STAGES) {
        stage = 0;
        parity ^= 1;
      }
#pragma unroll
      for (int i = 0; i < K::SUMS; ++i)
        sums[i] += stage_sums[i];
      // Adding to a sum that grew rounds off more and more.
      if constexpr (!K::GATED && K::SPLIT == 1)
        if (depth % SEGMENT == SEGMENT - 1 && depth + 1 + SEGMENT < stages) {
          if (parted_sums)
            exchange<K, false>(p, sums, row, column);
          exchange<K, true>(p, sums, row, column);
          parted_sums = true;
#pragma unroll
          for (int i = 0; i < K::SUMS; ++i)
            sums[i] = 0.f;
        }
    }
    if constexpr (!K::GATED && K::SPLIT == 1)
      if (parted_sums)
        exchange<K, false>(p, sums, row, column);
    const unsigned biases = put_biases<K>(p, ring.biases(consumer), consumer,
                                          [&](int i) { return bias_of<K>(p, column, thread + i * WARPGROUP); });
    if constexpr (K::SPLIT == 1) {
      with_finish<K::GATED>(p.finish, [&](auto finish) { write_rows<K, finish>(p, sums, row, column, biases); });
    } else {
      consumers_meet<K>(); // both are done with the stages
      leave_parts<K>(ring.base, sums);
      cluster_sync();
      with_finish<K::GATED>(
          p.finish, [&](auto finish) { write_split_rows<K, finish>(p, ring.base, at, row, column, biases); });
    }
  }
}

#endif // FUSED_MLP_HOPPER

template <class K> __global__ void __launch_bounds__(K::THREADS, 1) parted_kernel(const __grid_constant__ Product p) {
#ifdef FUSED_MLP_HOPPER
  extern __shared__ unsigned char shared[];
  const Ring<K> ring{(shared_address(shared) + SWIZZLE_ALIGN - 1) / SWIZZLE_ALIGN * SWIZZLE_ALIGN};
  const Place<K> at(K::CLUSTER == 1 ? 0 : cluster_rank());
  if (threadIdx.x == 0) {
    prefetch_map(&p.rows);
    prefetch_map(&p.weights);
    prefetch_map(&p.up);
    for (int stage = 0; stage < K::STAGES; ++stage) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), 4 * K::CONSUMERS);
      barrier_init(parted(ring, stage), PARTERS);
    }
    publish_barriers();
  }
  if constexpr (K::CLUSTER == 1)
    __syncthreads();
  else
    cluster_meet();
  if (threadIdx.x < WARPGROUP) {
    give_registers<K::PRODUCER_REGISTERS>();
    const int warp = warp_of_block();
    if (warp == 0) {
      if (elected()) {
        Copies<K> copies(p, ring, at);
        produce_early(copies);
        produce(copies);
      }
    } else
      part_weights(p, ring, at);
    __syncwarp();
    if (K::SPLIT > 1)
      cluster_sync(); // where the consumers exchange sums
  } else {
    take_registers<K::CONSUMER_REGISTERS>();
    multiply_parted(p, ring, at);
  }
  if (K::CLUSTER > 1)
    cluster_meet(); // nobody reads or copies into a block that has ended
#endif
}

template <bool GATED, int COLUMNS, int SPLIT> constexpr Variant parted_variant() {
  using K = PartedTile<GATED, COLUMNS, SPLIT>;
  return variant_of<K, parted_kernel<K>>();
}

} // namespace

const Variant *gemm_variants_f32(int *count) {
  static const Variant variants[] = {
      // Gated: weights' rows, split.
      parted_variant<true, 128, 1>(),
      parted_variant<true, 160, 1>(),
      parted_variant<true, 64, 2>(),
      parted_variant<true, 128, 2>(),
      // Plain.
      parted_variant<false, 64, 1>(),
      parted_variant<false, 96, 1>(),
      parted_variant<false, 128, 1>(),
      parted_variant<false, 160, 1>(),
      parted_variant<false, 64, 2>(),
      parted_variant<false, 128, 2>(),
      parted_variant<false, 64, 4>(),
      parted_variant<false, 128, 4>(),
      parted_variant<false, 64, 8>(),
  };
  *count = sizeof(variants) / sizeof(variants[0]);
  return variants;
}

} // namespace fused_mlp
