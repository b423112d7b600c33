// Reads memory and nothing else: the bandwidth that floors are computed from. benches/read.ptx is this file, by
//   nvcc -ptx -O3 -arch=compute_75 read.cu
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4 *p, unsigned long long n, unsigned *sink) {
  unsigned v = 0;
  const unsigned long long step = gridDim.x * 512ull;
  for (unsigned long long i = blockIdx.x * 512ull + threadIdx.x; i + 7 * step < n; i += 8 * step) {
    uint4 r[8];
#pragma unroll
    for (int u = 0; u < 8; ++u)
      r[u] = __ldcs(p + i + u * step);
#pragma unroll
    for (int u = 0; u < 8; ++u)
      v ^= r[u].x ^ r[u].y ^ r[u].z ^ r[u].w;
  }
  if (v == 0x12345678u)
    *sink = v;
}
