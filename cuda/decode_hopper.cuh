// What Hopper's decode kernels share: how weights and tokens lie in shared memory, how a layer's sums are cut, and the tensor
// maps of a call.
//
// Sums are cut by the weights' shape and the GPU alone, so that these kernels give a row the same bits, whatever is beside
// it: the first layer's into even and odd chunks of 128 bytes of depth, the second layer's into one, two or four parts of
// its depth, each of even and odd chunks, added in order.
#pragma once
#include "decode_kernels.cuh"
#include "hopper.cuh"

namespace fused_mlp {

constexpr int GROUP = 8;                           // rows of one copy
constexpr int CHUNK = SWIZZLE_BYTES / 2;           // elements of depth, of 16 bits each
constexpr int CHUNK_GROUP = GROUP * SWIZZLE_BYTES; // bytes of one chunk of one group
constexpr int MOST_PARTS = 4;                      // of the second layer's depth
constexpr int MOST_DECODE_BLOCKS = 256;            // no Hopper GPU has more multiprocessors

// How the second layer's depth is cut: the parts are different blocks', which together have rows for a product's 64, but
// adding them costs a meeting of these blocks at the end.
inline int depth_parts(int blocks, int output_size, int depth) {
  const int block_groups = divide_up(divide_up(output_size, GROUP), blocks);
  return block_groups < 4 ? 4 : depth <= 4096 ? 1 : 2;
}
// A part, in chunks. Long ones are a multiple of four chunks, to be cut well into stages.
inline int part_chunks(int chunks, int parts) {
  const int part = divide_up(chunks, parts);
  return part < 16 ? part : divide_up(part, 4) * 4;
}
inline int decode_blocks(const DeviceFacts &device) {
  return device.multiprocessors < MOST_DECODE_BLOCKS ? device.multiprocessors : MOST_DECODE_BLOCKS;
}

// The tokens that a kernel is made for, to take so many.
inline int token_rows_of(int tokens) { return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

// Of an MLP whose output is as wide as its input.
inline long long weights_of(bool gated, int hidden_size, int intermediate_size) {
  return (gated ? 3ll : 2ll) * hidden_size * intermediate_size;
}
// Whether a block has few weights: what they take from memory hides little of a launch's latencies.
inline bool is_small(const Shape &shape, int dtype, int blocks) {
  constexpr long long MOST_BLOCK_BYTES = 208 * 1024;
  const long long weights = weights_of(shape.gated, shape.hidden_size, shape.intermediate_size);
  return weights * map_element_bytes(dtype) < MOST_BLOCK_BYTES * blocks;
}

#ifdef FUSED_MLP_HOPPER

// The same in all lanes, said so that the compiler knows it: products must not look divergent.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }

// A warp gives a stage back, when all its lanes have read it, what is to be done with it included.
__device__ __forceinline__ void give_back(unsigned empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    barrier_arrive(empty);
}

// The products of one chunk: 64 rows, whose groups lie so many bytes apart, with all tokens, whose groups do likewise.
template <typename T, int NT>
__device__ __forceinline__ void multiply(float (&acc)[NT / 2], unsigned weights, unsigned group_bytes, unsigned tokens,
                                         unsigned token_group_bytes, bool accumulate) {
  const unsigned long long a = tile_descriptor(weights, group_bytes), b = tile_descriptor(tokens, token_group_bytes);
#pragma unroll
  for (int k = 0; k < CHUNK / 16; ++k)
    WarpgroupProduct<T, NT>::add(acc, a + 2 * k, b + 2 * k, k > 0 || accumulate);
}

#endif // FUSED_MLP_HOPPER

// What a tensor map is made of: one matrix or two that lie `distance` bytes apart, and the boxes that copies bring.
struct MapKey {
  const void *matrix;
  long long rows, columns, stride, distance;
  int dtype, box_rows, box_chunks, matrices;
  bool operator==(const MapKey &o) const {
    return matrix == o.matrix && rows == o.rows && columns == o.columns && stride == o.stride && distance == o.distance &&
           dtype == o.dtype && box_rows == o.box_rows && box_chunks == o.box_chunks && matrices == o.matrices;
  }
};

// encode_chunk_map, remembered: a map is a function of its key alone, and a model asks for the same ones in every step.
inline int chunk_map(CUtensorMap *map, const MapKey &key) {
  static thread_local Memory<MapKey, CUtensorMap, 10> memory;
  return memory.get(key, map_hash(key.matrix, key.box_rows, key.box_chunks), map, [&](CUtensorMap *found) {
    return encode_chunk_map(found, key.dtype, key.matrix, key.rows, key.columns, key.stride, key.box_rows, key.box_chunks,
                            key.matrices, key.distance);
  });
}

} // namespace fused_mlp
