// The whole MLP for up to 64 tokens in one launch on Hopper, with the tokens as a product's 64 rows: for some dozens of them.
// (For few tokens decode_hopper.cu has weights as the rows of a product, and reads them a little faster.)
//
// One block per multiprocessor. One thread, the producer, keeps a ring of stages in shared memory full, a warpgroup multiplies
// what has come. A stage is some chunks of 128 bytes of depth: of each, all tokens' rows and a tile's weight
// rows. A tile's sums of gate and up of a hidden element are in one thread, which finishes them. When the producer has asked
// for its last gate and up rows it goes on to ask for down rows, which depend on nothing: the one grid-wide wait, for the
// hidden rows, passes while they are on the way. The parts of the second layer's depth are the blocks' of a cluster, which add
// their sums in order.
//
// No deadlock, whatever is resident, as in decode_hopper.cu: a block waits for the hidden rows only, and each tile of the first
// layer is either held by a block that runs, or free for a block whose wait is long to claim. A tile that somebody else claimed
// is computed by its owner in vain, and not written. Dependent launch and counters are as there, too.
//
// A row has the bits that decode_hopper.cu gives it, whatever is beside it: sums are cut as there (decode_hopper.cuh), a product's
// sums are the same whichever operand the weights are, and what becomes of a sum is computed by the same functions.
#include "decode_hopper.cuh"
#include "gemm_hopper.cuh"

namespace fused_mlp {
namespace {

// One layer's tiles.
//   COLUMNS: weights' rows of a tile; a gated tile's output has half as many columns
//   SPLIT: blocks of a cluster that share a tile's depth
//   HELD: parts of the depth that each of them has
//   CHUNKS: of a stage
template <typename T_, bool GATED_, int COLUMNS_, int SPLIT_, int HELD_, int CHUNKS_> struct WideTile {
  using T = T_;
  using Bits = unsigned short; // of an element
  static constexpr bool GATED = GATED_;
  static constexpr int ROWS = MAX_TOKENS, COLUMNS = COLUMNS_, SPLIT = SPLIT_, HELD = HELD_, CHUNKS = CHUNKS_;
  static constexpr int CONSUMERS = 1, PARTS = 1, SHARE = 1, PEERS = 1, LINKS = 1, CLUSTER = SPLIT;
  static constexpr int MATRICES = GATED ? 2 : 1; // each by itself in a stage
  static constexpr int OUT_COLUMNS = COLUMNS / MATRICES;
  static constexpr int SUMS = COLUMNS / 2; // of a thread
  // Columns that a warp writes at once; where blocks share the writing, as few as can be.
  static constexpr int CHUNK = SPLIT > 1 ? 16 : OUT_COLUMNS % 64 == 0 ? 64 : OUT_COLUMNS % 32 == 0 ? 32 : 16;
  static constexpr int CHUNK_BYTES = 16 * CHUNK * 2;
  static constexpr int ROW_BYTES = CHUNKS * ROWS * SWIZZLE_BYTES, WEIGHT_BYTES = CHUNKS * COLUMNS * SWIZZLE_BYTES;
  static_assert(ROWS == 64 * CONSUMERS && ROWS * COLUMNS == PARTS * SUMS * WARPGROUP, "a warpgroup's product has 64 rows");
  static_assert(SHARE * PEERS * LINKS == 1 && CLUSTER == SPLIT, "blocks of a cluster share a tile's depth alone");
  static_assert(CHUNKS <= 2, "a stage that is not whole has one chunk");
  static_assert(HELD == 1 || (HELD == 2 && SPLIT > 1), "parts are added where blocks' are");
};

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Shared memory of a kernel with tiles `First` and `Second`: the ring, each warp's outbox, biases, the ring's barriers and what
// the consumers are to do with a stage.
template <class First_, class Second_> struct WideRing {
  using First = First_;
  using Second = Second_;
  static constexpr int THREADS = (1 + First::CONSUMERS) * WARPGROUP, CLUSTER = Second::SPLIT;
  static constexpr int SLOT_BYTES = larger(First::ROW_BYTES + First::WEIGHT_BYTES, Second::ROW_BYTES + Second::WEIGHT_BYTES);
  static constexpr int OUTBOX_BYTES = 2 * larger(First::CHUNK_BYTES, Second::CHUNK_BYTES); // of a warp
  static constexpr int BIAS_BYTES = 2 * larger(First::COLUMNS, Second::COLUMNS);
  static constexpr int AFTER_BYTES = 4 * OUTBOX_BYTES + BIAS_BYTES, COMMAND_BYTES = 8;
  static constexpr int FIT = (SHARED_BYTES - SWIZZLE_ALIGN - AFTER_BYTES) / (SLOT_BYTES + 16 + COMMAND_BYTES);
  static constexpr int SLOTS = FIT < 16 ? FIT : 16;
  static constexpr int TOTAL_BYTES = SWIZZLE_ALIGN + SLOTS * (SLOT_BYTES + 16 + COMMAND_BYTES) + AFTER_BYTES;
  static_assert(Second::HELD * Second::ROWS * Second::COLUMNS * 4 <= SLOTS * SLOT_BYTES, "sums meet in the ring");
  static_assert(BIAS_BYTES % 8 == 0, "barriers lie on 8 bytes");

  unsigned base;
  int slot;
  unsigned parity;

  __device__ unsigned rows() const { return base + slot * SLOT_BYTES; }
  __device__ unsigned outbox(int warp) const { return base + SLOTS * SLOT_BYTES + warp * OUTBOX_BYTES; }
  __device__ unsigned biases() const { return outbox(4); }
  __device__ unsigned full(int slot) const { return biases() + BIAS_BYTES + 8 * slot; }
  __device__ unsigned empty(int slot) const { return full(SLOTS) + 8 * slot; }
  // With the first stage of a tile or with one for itself: a tile of the first layer, or one of WideCommand.
  __device__ unsigned command() const { return empty(SLOTS) + COMMAND_BYTES * slot; }
  // With the last stage of a tile of the first layer: whether the tile is ours.
  __device__ unsigned ours() const { return command() + 4; }
  // For the producer, whose parity is that of `empty`: until what it asked for last has come.
  __device__ void wait_until_all_come() const {
    const bool first_slot = slot == 0;
    barrier_wait(full(first_slot ? SLOTS - 1 : slot - 1), first_slot ? parity : parity ^ 1);
  }
  __device__ void next() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

enum WideCommand : int {
  SKIP = -1,   // give the stage back
  SECOND = -2, // the second layer begins
  END = -3,
};

// A layer as its kernel takes it: boxes of its rows' and weights' chunks, and what tiles are written by.
struct WideLayer {
  CUtensorMap rows, weights, up;
  Product product; // of this only what is needed to finish tiles
  int tiles, chunks;
  int part_chunks; // of a part of the depth, but the last one's, which has the rest
};

struct WideArgs {
  WideLayer first, second;
  Counters *counters;
  int box_rows; // tokens, rounded up
  bool first_layer_first; // as in decode_ring.cuh: a producer asks for down rows when its own gate and up rows have come
  Activation activation;
  float activation_param;
};

#ifdef FUSED_MLP_HOPPER

// Chunks of a part of the depth: none of a short depth's last ones.
__device__ __forceinline__ int chunks_of(const WideLayer &layer, int part) {
  return min(max(layer.chunks - part * layer.part_chunks, 0), layer.part_chunks);
}
template <class K> __device__ __forceinline__ int stages_of(int chunks) { return divide_up(chunks, K::CHUNKS); }

constexpr int WIDE_PREFETCHED_STAGES = 2;
constexpr long long WIDE_PATIENCE = 60000; // cycles, beyond twice what the block's own tiles took

__device__ __forceinline__ void store_shared(unsigned address, int v) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
// What the producer tells a warp with a stage. The lane that gives the stage back is the one that reads it.
__device__ __forceinline__ int told(unsigned address) {
  return uniform(threadIdx.x % 32 == 0 ? static_cast<int>(load_shared_4(address)) : 0);
}

template <class R> __device__ __forceinline__ void produce_wide(const WideArgs &args, R ring) {
  using A = typename R::First;
  using B = typename R::Second;
  const WideLayer &first = args.first, &second = args.second;
  const unsigned long long once = evict_first_policy(), again = evict_last_policy();
  const unsigned row_bytes = args.box_rows * SWIZZLE_BYTES;
  Counters *const counters = args.counters;
  const int first_stages = stages_of<A>(first.chunks);

  const auto ask_first = [&](int tile, bool ours) {
    for (int s = 0; s < first_stages; ++s, ring.next()) {
      const unsigned full = ring.full(ring.slot), weights = ring.rows() + A::ROW_BYTES;
      barrier_wait(ring.empty(ring.slot), ring.parity);
      if (s == 0)
        store_shared(ring.command(), tile);
      if (s == first_stages - 1)
        store_shared(ring.ours(), static_cast<int>(ours));
      barrier_arrive_expect(full, A::CHUNKS * row_bytes + A::WEIGHT_BYTES);
      copy_chunks(ring.rows(), &first.rows, 0, s * A::CHUNKS, full, again);
      copy_chunks(weights, &first.weights, tile * A::OUT_COLUMNS, s * A::CHUNKS, full, once);
      if (A::GATED)
        copy_chunks(weights + A::WEIGHT_BYTES / 2, &first.up, tile * A::OUT_COLUMNS, s * A::CHUNKS, full, once);
    }
  };
  const int ahead_of_wait = static_cast<int>(blockIdx.x) < first.tiles ? min(first_stages, WIDE_PREFETCHED_STAGES) : 0;
  for (int s = 0; s < ahead_of_wait; ++s) {
    prefetch_chunks(&first.weights, blockIdx.x * A::OUT_COLUMNS, s * A::CHUNKS);
    if (A::GATED)
      prefetch_chunks(&first.up, blockIdx.x * A::OUT_COLUMNS, s * A::CHUNKS);
  }
  wait_for_previous_kernel();
  release_next_kernel();
  const long long start = clock64();
  for (int tile = blockIdx.x; tile < first.tiles; tile += gridDim.x)
    ask_first(tile, atomicExch(&counters->claim[tile], 1u) == 0u);

  const Place<B> at(blockIdx.x % B::SPLIT);
  const bool has_tile = at.first_tile < second.tiles;
  const int first_part = at.split * B::HELD, part_stages = stages_of<B>(second.part_chunks);
  int stages = 0;
  for (int held = 0; held < B::HELD; ++held)
    stages += stages_of<B>(chunks_of(second, first_part + held));
  // A part begins with a stage.
  const auto chunk_of = [&](int s) {
    const int left_out = B::HELD > 1 && s >= part_stages ? part_stages * B::CHUNKS - second.part_chunks : 0;
    return first_part * second.part_chunks + s * B::CHUNKS - left_out;
  };
  const auto ask_weights = [&](int s) {
    barrier_wait(ring.empty(ring.slot), ring.parity);
    barrier_expect(ring.full(ring.slot), B::WEIGHT_BYTES);
    copy_chunks(ring.rows() + B::ROW_BYTES, &second.weights, at.first_tile * B::OUT_COLUMNS, chunk_of(s), ring.full(ring.slot),
                once);
  };
  const auto ask_rows = [&](int s) {
    if (s == 0)
      store_shared(ring.command(), static_cast<int>(SECOND));
    barrier_arrive_expect(ring.full(ring.slot), B::CHUNKS * row_bytes);
    copy_chunks(ring.rows(), &second.rows, 0, chunk_of(s), ring.full(ring.slot), again);
  };
  const int ahead = min(stages, static_cast<int>(R::SLOTS));
  if (args.first_layer_first && has_tile && static_cast<int>(blockIdx.x) < first.tiles)
    ring.wait_until_all_come();
  bool own = true;
  // A block without down rows waits for nobody.
  while (has_tile) {
    const R before = ring;
    for (int s = 0; s < ahead; ++s, ring.next())
      ask_weights(s);
    int rescue = -1;
    // Once a block has had to help, it helps on without waiting again.
    const long long since = clock64(), patience = own ? 2 * (since - start) + WIDE_PATIENCE : 0;
    bool all_claimed = false;
    while (rescue < 0 && load_acquire(&counters->arrived) < static_cast<unsigned>(first.tiles)) {
      if (all_claimed || clock64() - since <= patience)
        continue;
      all_claimed = true;
      for (int i = 0; i < first.tiles && rescue < 0; ++i) {
        const int other = (blockIdx.x + i) % first.tiles;
        if (atomicExch(&counters->claim[other], 1u) == 0u)
          rescue = other;
      }
    }
    ring = before;
    if (rescue < 0)
      break;
    own = false;
    for (int s = 0; s < ahead; ++s, ring.next()) {
      store_shared(ring.command(), static_cast<int>(SKIP));
      barrier_arrive(ring.full(ring.slot));
    }
    ask_first(rescue, true);
  }
  fence_global_copies();
  const bool all_passed = atomicInc(&counters->passed, gridDim.x - 1) == gridDim.x - 1;
  for (int s = 0; has_tile && s < stages; ++s, ring.next()) {
    if (s >= ahead)
      ask_weights(s);
    ask_rows(s);
  }
  if (!has_tile || stages == 0) { // the parts of a short depth may be nothing
    barrier_wait(ring.empty(ring.slot), ring.parity);
    store_shared(ring.command(), static_cast<int>(has_tile ? SECOND : END));
    barrier_arrive(ring.full(ring.slot));
  }
  // Everybody is past the wait: the counters may go back to zero.
  if (all_passed) {
    for (int i = 0; i < first.tiles; ++i)
      counters->claim[i] = 0u;
    counters->arrived = 0u;
  }
}

// A tile's sums over so many chunks, those of even and of odd ones added, and whether the tile is ours.
template <class K, class R>
__device__ __forceinline__ bool multiply_wide(R &ring, int chunks, unsigned row_bytes, float (&sums)[K::SUMS]) {
  constexpr int OWN_SUMS = K::OUT_COLUMNS / 2;        // of one matrix
  constexpr int TURNS = K::CHUNKS % 2 == 0 ? 1 : 2;   // stages until an even chunk has the same place again
  float parts[2][K::MATRICES][OWN_SUMS];              // of even and of odd chunks
#pragma unroll
  for (int i = 0; i < 2 * K::MATRICES * OWN_SUMS; ++i)
    (&parts[0][0][0])[i] = 0.f;
  const int whole = chunks / K::CHUNKS, stages = stages_of<K>(chunks);
  int before = 0, ours = 0;
  const auto add = [&](int c, float(&to)[K::MATRICES][OWN_SUMS]) {
#pragma unroll
    for (int k = 0; k < SWIZZLE_BYTES / 32; ++k)
#pragma unroll
      for (int m = 0; m < K::MATRICES; ++m)
        WarpgroupProduct<typename K::T, K::OUT_COLUMNS>::add(
            to[m], tile_descriptor(ring.rows() + c * row_bytes) + 2 * k,
            tile_descriptor(ring.rows() + K::ROW_BYTES + (m * K::CHUNKS + c) * K::OUT_COLUMNS * SWIZZLE_BYTES) + 2 * k);
  };
  const auto end = [&] {
    products_wait<0>();
#pragma unroll
    for (int parity = 0; parity < 2; ++parity)
#pragma unroll
      for (int m = 0; m < K::MATRICES; ++m)
        pin(parts[parity][m]);
  };
  for (int s = 0; s < whole;)
#pragma unroll
    for (int turn = 0; turn < TURNS && s < whole; ++turn, ++s, ring.next()) {
      barrier_wait(ring.full(ring.slot), ring.parity);
      if (s == stages - 1)
        ours = told(ring.ours());
      products_begin();
#pragma unroll
      for (int c = 0; c < K::CHUNKS; ++c)
        add(c, parts[(turn * K::CHUNKS + c) % 2]);
      products_commit();
      if (s > 0) {
        products_wait<1>();
        give_back(ring.empty(before));
      }
      before = ring.slot;
    }
  end();
  if (whole > 0)
    give_back(ring.empty(before));
  if constexpr (K::CHUNKS > 1) {
    // What else lies in the last stage belongs to another part.
    if (whole < stages) {
      barrier_wait(ring.full(ring.slot), ring.parity);
      ours = told(ring.ours());
      products_begin();
      add(0, parts[0]);
      products_commit();
    }
    end();
    if (whole < stages) {
      give_back(ring.empty(ring.slot));
      ring.next();
    }
  }
#pragma unroll
  for (int m = 0; m < K::MATRICES; ++m)
#pragma unroll
    for (int i = 0; i < OWN_SUMS; ++i)
      sums[m * OWN_SUMS + i] = parts[0][m][i] + parts[1][m][i];
  return ours;
}

// Finishes and writes a warp's rows of a tile of the first layer, 16 columns at a time: as `write_tile`, but by the functions
// that decode_hopper.cu calls. Rows behind those that were copied are whatever was in shared memory: extreme numbers would
// take long.
template <class K>
__device__ __forceinline__ void write_hidden(const WideArgs &args, Outbox<K> &outbox, float (&sums)[K::SUMS], int row,
                                             int column, unsigned biases) {
  constexpr int STEP = K::CHUNK / 16, UNITS = K::OUT_COLUMNS / 16, HALF = K::OUT_COLUMNS / 2;
  if (row >= args.box_rows)
    return;
  const bool all_copied = row + GROUP < args.box_rows; // of a thread's two rows
#pragma unroll 1
  for (int unit = 0; unit < UNITS; ++unit) {
    float values[8], factors[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = all_copied || i % 4 < 2 ? sums[i] : 0.f;
      factors[i] = K::GATED ? sums[K::SUMS - HALF + i] : 1.f;
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const unsigned at = biases + 2 * (16 * unit + i / 4 * 8 + 2 * (threadIdx.x % 4));
      const float2 bias = unpack(typename K::T(), biases ? load_shared_4(at) : 0u);
      values[i] += bias.x;
      values[i + 1] += bias.y;
      if (K::GATED) {
        const float2 bias_up = unpack(typename K::T(), biases ? load_shared_4(at + 2 * K::OUT_COLUMNS) : 0u);
        factors[i] += bias_up.x;
        factors[i + 1] += bias_up.y;
      }
    }
    activate_all(args.activation, args.activation_param, values);
    unsigned packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      packed[i] = K::GATED ? pack(typename K::T(), values[2 * i] * factors[2 * i], values[2 * i + 1] * factors[2 * i + 1])
                           : pack(typename K::T(), values[2 * i], values[2 * i + 1]);
    if (unit % STEP == 0)
      outbox.open();
    store_matrices(outbox.place(unit % STEP), packed[0], packed[1], packed[2], packed[3]);
    if (unit % STEP == STEP - 1)
      outbox.send(args.first.product, row, column + 16 * (unit - unit % STEP));
#pragma unroll
    for (int half = 0; half < K::SUMS; half += HALF)
#pragma unroll
      for (int i = 0; i + 8 < HALF; ++i)
        sums[half + i] = sums[half + i + 8];
  }
}

template <class R> __device__ __forceinline__ void consume_wide(const WideArgs &args, R ring) {
  using A = typename R::First;
  using B = typename R::Second;
  wait_for_previous_kernel();
  const Product &first = args.first.product, &second = args.second.product;
  const int warp = threadIdx.x / 32 - 4, row = 16 * warp;
  const unsigned row_bytes = args.box_rows * SWIZZLE_BYTES;
  const auto biases_of = [&](auto tile, const Product &p, int column) {
    using K = decltype(tile);
    return put_biases<K>(p, ring.biases(), 0,
                         [&](int i) { return bias_of<K>(p, column, threadIdx.x % WARPGROUP + i * WARPGROUP); });
  };
  Outbox<A> hidden(ring.outbox(warp));
  int command;
  for (;;) {
    barrier_wait(ring.full(ring.slot), ring.parity);
    command = told(ring.command());
    if (command == SECOND || command == END)
      break;
    if (command == SKIP) {
      give_back(ring.empty(ring.slot));
      ring.next();
      continue;
    }
    float sums[A::SUMS];
    if (!multiply_wide<A>(ring, args.first.chunks, row_bytes, sums))
      continue;
    const int column = command * A::OUT_COLUMNS;
    const unsigned biases = biases_of(A(), first, column);
    write_hidden<A>(args, hidden, sums, row, column, biases);
    if (elected()) { // as sent them
      copies_out_end();
      fence_global_copies();
      __threadfence();
    }
    consumers_meet<A>();
    if (threadIdx.x == WARPGROUP)
      add_release(&args.counters->arrived);
  }
  if (command == END) // in the whole cluster
    return;
  const Place<B> at(blockIdx.x % B::SPLIT);
  float sums[B::HELD][B::SUMS];
#pragma unroll
  for (int held = 0; held < B::HELD; ++held)
    multiply_wide<B>(ring, chunks_of(args.second, at.split * B::HELD + held), row_bytes, sums[held]);
  const int column = at.first_tile * B::OUT_COLUMNS;
  const unsigned biases = biases_of(B(), second, column);
  Outbox<B> out(ring.outbox(warp));
  if constexpr (B::SPLIT == 1) {
    write_tile<B, Finish::None>(second, out, sums, row, column, biases);
  } else {
    consumers_meet<B>(); // all are done with the stages
#pragma unroll
    for (int held = 0; held < B::HELD; ++held)
      leave_parts<B>(ring.base, sums[held], held * B::SUMS);
    cluster_sync();
    write_split_tile<B, Finish::None>(second, out, ring.base, at, row, column, biases);
  }
  out.close();
}

#endif // FUSED_MLP_HOPPER

template <class R> __global__ void __launch_bounds__(R::THREADS, 1) wide_kernel(const __grid_constant__ WideArgs args) {
#ifdef FUSED_MLP_HOPPER
  extern __shared__ unsigned char shared[];
  // The first round of the ring finds its slots empty.
  const unsigned base = (shared_address(shared) + SWIZZLE_ALIGN - 1) / SWIZZLE_ALIGN * SWIZZLE_ALIGN;
  const R filled{base, 0, 1}, emptied{base, 0, 0};
  if (threadIdx.x == 0) {
    for (const WideLayer *layer : {&args.first, &args.second}) {
      prefetch_map(&layer->rows);
      prefetch_map(&layer->weights);
      prefetch_map(&layer->up);
      prefetch_map(&layer->product.out);
    }
    for (int slot = 0; slot < R::SLOTS; ++slot) {
      barrier_init(filled.full(slot), 1);
      barrier_init(filled.empty(slot), 4); // each warp for itself
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    if (warp_of_block() == 0 && elected())
      produce_wide(args, filled);
    __syncwarp();
    if (R::CLUSTER > 1 && static_cast<int>(blockIdx.x) / R::CLUSTER < args.second.tiles)
      cluster_sync(); // where the consumers exchange sums
  } else {
    consume_wide(args, emptied);
  }
  if (R::CLUSTER > 1)
    cluster_meet(); // nobody reads of a block that has ended
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

struct WideVariant {
  bool gated;
  int first_columns, first_tile_columns, second_columns, split, parts;
  int (*resident)(int *blocks);
  int (*enqueue)(const Shape &shape, int dtype, bool first_layer_first, cudaStream_t stream);
};

template <class R> int enqueue_wide(const Shape &shape, int dtype, bool first_layer_first, cudaStream_t stream) {
  using A = typename R::First;
  using B = typename R::Second;
  int resident = 0, status = resident_blocks<R, wide_kernel<R>>(&resident);
  WideArgs args = {};
  WideLayer &first = args.first, &second = args.second;
  args.box_rows = divide_up(shape.tokens, GROUP) * GROUP;
  const int h = shape.hidden_size, n = shape.intermediate_size, o = shape.output_size;
  const long long x_stride = shape.tokens > 1 ? shape.x_stride : h;
  if (status == FUSED_MLP_OK)
    status = chunk_map(&first.rows, {shape.x, shape.tokens, h, x_stride, 0, dtype, args.box_rows, A::CHUNKS, 1});
  if (status == FUSED_MLP_OK)
    status = chunk_map(&first.weights, {shape.gate, n, h, shape.gate_stride, 0, dtype, A::OUT_COLUMNS, A::CHUNKS, 1});
  if (status == FUSED_MLP_OK && A::GATED)
    status = chunk_map(&first.up, {shape.up, n, h, shape.up_stride, 0, dtype, A::OUT_COLUMNS, A::CHUNKS, 1});
  if (status == FUSED_MLP_OK)
    status = chunk_map(&second.rows,
                       {shape.hidden, shape.tokens, n, shape.hidden_stride, 0, dtype, args.box_rows, B::CHUNKS, 1});
  if (status == FUSED_MLP_OK)
    status = chunk_map(&second.weights, {shape.down, o, n, shape.down_stride, 0, dtype, B::OUT_COLUMNS, B::CHUNKS, 1});
  if (status == FUSED_MLP_OK)
    status = box_map(&first.product.out, {shape.hidden, shape.tokens, n, shape.hidden_stride, dtype, 16, 2 * A::CHUNK});
  if (status == FUSED_MLP_OK)
    status = box_map(&second.product.out, {shape.out, shape.tokens, o, o, dtype, 16, 2 * B::CHUNK});
  if (status != FUSED_MLP_OK)
    return status;
  if (!A::GATED)
    first.up = first.weights;
  second.up = second.weights;
  first.product.bias = shape.bias_gate;
  first.product.bias_up = A::GATED ? shape.bias_up : nullptr;
  second.product.bias = shape.bias_down;
  first.product.tokens = second.product.tokens = shape.tokens;
  first.product.columns = n;
  second.product.columns = o;
  first.tiles = divide_up(n, A::OUT_COLUMNS);
  second.tiles = divide_up(o, B::OUT_COLUMNS);
  first.chunks = first.part_chunks = h / CHUNK;
  second.chunks = n / CHUNK;
  constexpr int PARTS = B::SPLIT * B::HELD;
  second.part_chunks = part_chunks(second.chunks, PARTS);
  args.counters = shape.counters;
  args.first_layer_first = first_layer_first;
  args.activation = shape.activation;
  args.activation_param = static_cast<float>(shape.activation_param);

  const int blocks = divide_up(larger(first.tiles, second.tiles * B::SPLIT), B::SPLIT) * B::SPLIT;
  const int launched = blocks < resident ? blocks : resident;
  return launch_kernel(wide_kernel<R>, {launched, R::THREADS, R::TOTAL_BYTES, true, R::CLUSTER}, stream, args);
}

template <typename T, bool GATED, int COLUMNS, int CHUNKS, int SECOND_COLUMNS, int SPLIT, int HELD, int SECOND_CHUNKS>
constexpr WideVariant wide_variant() {
  using A = WideTile<T, GATED, COLUMNS, 1, 1, CHUNKS>;
  using R = WideRing<A, WideTile<T, false, SECOND_COLUMNS, SPLIT, HELD, SECOND_CHUNKS>>;
  return {GATED, COLUMNS,      A::OUT_COLUMNS,                     SECOND_COLUMNS,
          SPLIT, SPLIT * HELD, resident_blocks<R, wide_kernel<R>>, enqueue_wide<R>};
}

// The tiles that were fastest for some shape.
template <typename T> const WideVariant *wide_variants(int *count) {
  static const WideVariant variants[] = {
      // Gated: weights' rows and chunks of a stage; of the second layer weights' rows, split, held, chunks.
      wide_variant<T, true, 32, 2, 32, 4, 1, 2>(),
      wide_variant<T, true, 64, 2, 48, 4, 1, 2>(),
      wide_variant<T, true, 96, 2, 64, 4, 1, 2>(),
      wide_variant<T, true, 96, 2, 32, 2, 2, 2>(),
      wide_variant<T, true, 128, 1, 32, 2, 2, 2>(),
      wide_variant<T, true, 64, 2, 48, 2, 2, 2>(),
      wide_variant<T, true, 96, 2, 48, 2, 2, 2>(),
      wide_variant<T, true, 96, 2, 64, 2, 1, 2>(),
      wide_variant<T, true, 128, 1, 64, 2, 1, 2>(),
      wide_variant<T, true, 128, 1, 128, 2, 1, 1>(),
      wide_variant<T, true, 96, 2, 32, 1, 1, 2>(),
      // Plain.
      wide_variant<T, false, 32, 2, 32, 4, 1, 2>(),
      wide_variant<T, false, 48, 2, 48, 4, 1, 2>(),
      wide_variant<T, false, 64, 2, 64, 4, 1, 2>(),
      wide_variant<T, false, 64, 2, 32, 2, 2, 2>(),
      wide_variant<T, false, 48, 2, 48, 2, 2, 2>(),
      wide_variant<T, false, 64, 2, 64, 2, 1, 2>(),
      wide_variant<T, false, 128, 1, 128, 2, 1, 1>(),
      wide_variant<T, false, 32, 2, 32, 1, 1, 2>(),
  };
  *count = sizeof(variants) / sizeof(variants[0]);
  return variants;
}

// About how long a kernel takes, in microseconds on an H100, but for what is the same with all tiles: each layer as long as
// its waves' copies from L2 or as its weights take from memory, which fewer blocks read more slowly. The numbers were fitted
// to 340 times of 20 MLPs; the choice costs 0.5% on average.
double wide_cost(const WideVariant &v, const FusedMlpArgs &args, int resident) {
  const auto layer = [&](int tiles, int blocks, int chunks, int columns, double bytes) {
    const int waves = divide_up(blocks, resident);
    const double chunk = std::fmax((MAX_TOKENS + columns) * SWIZZLE_BYTES / 63e3, 0.12);
    const double copies = waves * (chunks * chunk + 4.7e-5 * columns * MAX_TOKENS);
    return std::fmax(copies, bytes / 3.17e6 * std::sqrt(static_cast<double>(waves) * resident / blocks));
  };
  const int first_tiles = divide_up(args.intermediate_size, v.first_tile_columns);
  const int tiles = divide_up(args.output_size, v.second_columns);
  const double bytes = 2. * args.intermediate_size;
  return layer(first_tiles, first_tiles, args.hidden_size / CHUNK, v.first_columns,
               bytes * args.hidden_size * (args.gated ? 2 : 1)) +
         layer(tiles, tiles * v.split, args.intermediate_size / CHUNK / v.split, v.second_columns, bytes * args.output_size) +
         (v.split == 4 ? 1.6 : 0.);
}

// The tiles of least cost, of those that cut the second layer's depth as decode_hopper.cu does; none where no tiles of the second
// layer are one wave.
int choose_wide(const DeviceFacts &facts, const FusedMlpArgs &args, const WideVariant **best) {
  const int parts = depth_parts(decode_blocks(facts), args.output_size, args.intermediate_size);
  int count = 0;
  const WideVariant *const all =
      args.dtype == FUSED_MLP_F16 ? wide_variants<__half>(&count) : wide_variants<__nv_bfloat16>(&count);
  double least = HUGE_VAL;
  *best = nullptr;
  for (const WideVariant *v = all; v != all + count; ++v) {
    if (v->gated != (args.gated != 0) || v->parts != parts)
      continue;
    int resident = 0;
    const int status = v->resident(&resident);
    if (status != FUSED_MLP_OK)
      return status;
    const int blocks = divide_up(args.output_size, v->second_columns) * v->split;
    if (blocks > resident || divide_up(args.intermediate_size, v->first_tile_columns) > MAX_BLOCKS)
      continue;
    const double cost = wide_cost(*v, args, resident);
    if (cost < least) {
      least = cost;
      *best = v;
    }
  }
  return FUSED_MLP_OK;
}

// The same, remembered.
int remembered_choice(const DeviceFacts &facts, const FusedMlpArgs &args, const WideVariant **best) {
  struct Key {
    int device, dtype, gated, hidden_size, intermediate_size, output_size;
    bool operator==(const Key &k) const {
      return device == k.device && dtype == k.dtype && gated == k.gated && hidden_size == k.hidden_size &&
             intermediate_size == k.intermediate_size && output_size == k.output_size;
    }
  };
  static thread_local Memory<Key, const WideVariant *, 4> memory;
  Key key = {0, args.dtype, args.gated != 0, args.hidden_size, args.intermediate_size, args.output_size};
  const cudaError_t error = cudaGetDevice(&key.device);
  if (error != cudaSuccess)
    return error;
  return memory.get(key, args.hidden_size / CHUNK * 7u + args.intermediate_size / CHUNK, best,
                    [&](const WideVariant **found) { return choose_wide(facts, args, found); });
}

} // namespace

int can_decode_wide(const DeviceFacts &device, const FusedMlpArgs &args, bool *can) {
  *can = false;
  if (!device.hopper || (args.dtype != FUSED_MLP_BF16 && args.dtype != FUSED_MLP_F16) || args.hidden_size % CHUNK != 0 ||
      args.intermediate_size % CHUNK != 0 || args.output_size % 8 != 0)
    return FUSED_MLP_OK;
  const WideVariant *tiles = nullptr;
  const int status = remembered_choice(device, args, &tiles);
  *can = tiles;
  return status;
}

bool decode_wide_is_chosen(const DeviceFacts &device, const FusedMlpArgs &args) {
  constexpr int FEWEST_TOKENS = 33, MOST_COLUMNS = 32; // of the output, for each multiprocessor
  return args.tokens >= FEWEST_TOKENS && args.tokens <= MAX_TOKENS &&
         args.output_size <= MOST_COLUMNS * device.multiprocessors;
}

int launch_decode_wide(const Shape &shape, const FusedMlpArgs &args, const DeviceFacts &device, cudaStream_t stream) {
  const WideVariant *tiles = nullptr;
  const int status = remembered_choice(device, args, &tiles);
  if (status != FUSED_MLP_OK)
    return status;
  if (!tiles)
    return FUSED_MLP_UNSUPPORTED;
  return tiles->enqueue(shape, args.dtype, !is_small(shape, args.dtype, decode_blocks(device)), stream);
}

} // namespace fused_mlp
