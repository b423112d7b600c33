// Checks, stresses and times the decode kernels on a GPU, without Rust between. From the folder `cuda`:
//
//   nvcc -std=c++17 -O3 -arch=sm_90a -I. -o harness/harness harness/harness.cu decode*.cu
//
//   harness check [quick|wide]   against an f64 reference, poisoned outputs, determinism, row invariance, the ring's bits
//   harness stress N        N launches on two streams and two threads beside a foreign kernel, outputs compared
//   harness held            launches while a foreign kernel holds 1, 60 or 131 multiprocessors (100 where clusters need some)
//   harness select [PATH]   a small selection for compute-sanitizer, of one path or of all
//   harness soak SECONDS    random shapes against f64, each run twice
//   harness graph N         capture once, replay N times
//   harness time [DTYPE [TOKENS...]]   a cold stack of layers, on a stream and in a graph; the read bandwidth first
//   harness turns PATH PATH [DTYPE [TOKENS...]]   two paths by turns on the same stacks
//   harness host            the host's part of one call, and of launching a kernel that does nothing
#include "activation.cuh"
#include "fused_mlp.h"
#include "host.cuh"
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#define CUDA_OK(call)                                                                                                  \
  do {                                                                                                                 \
    const cudaError_t error_ = (call);                                                                                 \
    if (error_ != cudaSuccess) {                                                                                       \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_));                           \
      std::fflush(stdout);                                                                                             \
      std::exit(2);                                                                                                    \
    }                                                                                                                  \
  } while (0)
#define STATUS_OK(call)                                                                                                \
  do {                                                                                                                 \
    const int status_ = (call);                                                                                        \
    if (status_ != 0) {                                                                                                \
      std::printf("%s:%d: status %d (%s)\n", __FILE__, __LINE__, status_,                                              \
                  status_ > 0 ? cudaGetErrorString(cudaError_t(status_)) : "own");                                     \
      std::fflush(stdout);                                                                                             \
      std::exit(2);                                                                                                    \
    }                                                                                                                  \
  } while (0)

namespace {

const char *const DTYPE_NAMES[] = {"bf16", "f16", "f32", "f64"};
constexpr int ACTIVATIONS = int(fused_mlp::Activation::Count);
size_t element_bytes(int dtype) { return dtype == FUSED_MLP_F64 ? 8 : dtype == FUSED_MLP_F32 ? 4 : 2; }

// ---------------------------------------------------------------------------------------------------------------------
// Random data and the reference

__device__ double read_as_double(const void *p, long long i, int dtype) {
  switch (dtype) {
  case FUSED_MLP_BF16: return __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
  case FUSED_MLP_F16: return __half2float(static_cast<const __half *>(p)[i]);
  case FUSED_MLP_F32: return static_cast<const float *>(p)[i];
  default: return static_cast<const double *>(p)[i];
  }
}

__device__ unsigned mix(unsigned v) {
  v ^= v >> 16;
  v *= 0x7feb352dU;
  v ^= v >> 15;
  v *= 0x846ca68bU;
  return v ^ (v >> 16);
}

__global__ void fill_normal(void *p, long long n, int dtype, unsigned seed, float scale) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const unsigned a = mix(unsigned(i) * 2654435761U + mix(seed + unsigned(i >> 32))), b = mix(a + 0x9e3779b9U);
    const float r = sqrtf(-2.f * logf((a + 1.f) * (1.f / 4294967808.f))), v = scale * r * cospif(b * (2.f / 4294967296.f));
    switch (dtype) {
    case FUSED_MLP_BF16: static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(v); break;
    case FUSED_MLP_F16: static_cast<__half *>(p)[i] = __float2half_rn(v); break;
    case FUSED_MLP_F32: static_cast<float *>(p)[i] = v; break;
    default: static_cast<double *>(p)[i] = v; break;
    }
  }
}

__device__ double block_sum(double v) {
  __shared__ double parts[8];
  for (int lanes = 16; lanes > 0; lanes >>= 1)
    v += __shfl_xor_sync(0xffffffffu, v, lanes);
  __syncthreads();
  if ((threadIdx.x & 31) == 0)
    parts[threadIdx.x >> 5] = v;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < 8; ++i)
    sum += parts[i];
  return sum;
}

__global__ void reference_hidden(FusedMlpArgs a, double *hidden) {
  const int unit = blockIdx.x;
  for (int token = 0; token < a.tokens; ++token) {
    double g = 0, u = 0;
    for (int k = threadIdx.x; k < a.hidden_size; k += blockDim.x) {
      const double x = read_as_double(a.x, token * a.x_stride + k, a.dtype);
      g += x * read_as_double(a.gate, unit * a.gate_stride + k, a.dtype);
      if (a.gated)
        u += x * read_as_double(a.up, unit * a.up_stride + k, a.dtype);
    }
    g = block_sum(g);
    u = a.gated ? block_sum(u) : 0;
    if (threadIdx.x == 0) {
      if (a.bias_gate)
        g += read_as_double(a.bias_gate, unit, a.dtype);
      if (a.gated && a.bias_up)
        u += read_as_double(a.bias_up, unit, a.dtype);
      const double v = fused_mlp::activate(fused_mlp::Activation(a.activation), a.activation_param, g);
      hidden[(long long)token * a.intermediate_size + unit] = a.gated ? v * u : v;
    }
  }
}

__global__ void reference_out(FusedMlpArgs a, const double *hidden, double *out) {
  const int row = blockIdx.x;
  for (int token = 0; token < a.tokens; ++token) {
    double sum = 0;
    for (int k = threadIdx.x; k < a.intermediate_size; k += blockDim.x)
      sum += hidden[(long long)token * a.intermediate_size + k] * read_as_double(a.down, row * a.down_stride + k, a.dtype);
    sum = block_sum(sum);
    if (threadIdx.x == 0)
      out[(long long)token * a.output_size + row] =
          sum + (a.bias_down ? read_as_double(a.bias_down, row, a.dtype) : 0.0);
  }
}

// Adds up squared difference, squared reference, and elements that are not finite or not written.
__global__ void compare(const void *out, const double *reference, long long n, int dtype, double *sums) {
  double difference = 0, norm = 0, bad = 0;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const double v = read_as_double(out, i, dtype), r = reference[i];
    if (!isfinite(v) || !isfinite(r))
      bad += 1;
    else
      difference += (v - r) * (v - r);
    norm += r * r;
  }
  atomicAdd(sums, difference);
  atomicAdd(sums + 1, norm);
  atomicAdd(sums + 2, bad);
}

__global__ void count_different(const unsigned char *a, const unsigned char *b, size_t n, unsigned long long *count) {
  unsigned long long different = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
    different += a[i] != b[i];
  if (different)
    atomicAdd(count, different);
}

struct Buffer {
  void *p = nullptr;
  size_t bytes = 0;
  explicit Buffer(size_t n) : bytes(n) { CUDA_OK(cudaMalloc(&p, n ? n : 1)); }
  Buffer(const Buffer &) = delete;
  Buffer(Buffer &&o) : p(o.p), bytes(o.bytes) { o.p = nullptr; }
  ~Buffer() {
    if (p)
      cudaFree(p);
  }
};

struct Case {
  int dtype, gated, hidden, intermediate, output, tokens, activation;
  float param;
  int biases; // bits: gate, up, down
  int pad;    // extra elements in every row stride
  int offset; // elements by which every pointer is off its allocation
  int path;
  bool packed;
};

struct Problem {
  Case c;
  std::vector<Buffer> owned;
  FusedMlpArgs args = {};
  Problem(const Case &cc, unsigned seed) : c(cc) {
    const size_t e = element_bytes(c.dtype);
    auto tensor = [&](long long rows, long long columns, long long stride, float scale) {
      owned.emplace_back(((rows - 1) * stride + columns + c.offset) * e);
      fill_normal<<<1024, 256>>>(owned.back().p, (rows - 1) * stride + columns + c.offset, c.dtype, seed++, scale);
      return static_cast<void *>(static_cast<char *>(owned.back().p) + c.offset * e);
    };
    args.x_stride = c.hidden + c.pad;
    args.gate_stride = args.up_stride = c.hidden + c.pad;
    args.down_stride = c.intermediate + c.pad;
    args.x = tensor(c.tokens, c.hidden, args.x_stride, 1.f);
    const float in_scale = 1.f / std::sqrt(float(c.hidden));
    if (c.packed && c.gated) {
      args.gate = tensor(2ll * c.intermediate, c.hidden, args.gate_stride, in_scale);
      args.up = static_cast<const char *>(args.gate) + size_t(c.intermediate) * args.gate_stride * e;
    } else {
      args.gate = tensor(c.intermediate, c.hidden, args.gate_stride, in_scale);
      args.up = c.gated ? tensor(c.intermediate, c.hidden, args.up_stride, in_scale) : nullptr;
    }
    args.down = tensor(c.output, c.intermediate, args.down_stride, 1.f / std::sqrt(float(c.intermediate)));
    args.bias_gate = c.biases & 1 ? tensor(1, c.intermediate, c.intermediate, 0.5f) : nullptr;
    args.bias_up = c.biases & 2 ? tensor(1, c.intermediate, c.intermediate, 0.5f) : nullptr;
    args.bias_down = c.biases & 4 ? tensor(1, c.output, c.output, 0.5f) : nullptr;
    args.tokens = c.tokens;
    args.hidden_size = c.hidden;
    args.intermediate_size = c.intermediate;
    args.output_size = c.output;
    args.dtype = c.dtype;
    args.gated = c.gated;
    args.activation = c.activation;
    args.activation_param = c.param;
    args.path = c.path;
    int path;
    if (fused_mlp_decode_path(&args, &path) == FUSED_MLP_UNSUPPORTED)
      args.path = FUSED_MLP_PATH_AUTO; // code for an older GPU has fewer paths
    owned.emplace_back(out_bytes());
    args.out = owned.back().p;
    args.workspace_bytes = fused_mlp_decode_workspace_bytes(&args);
    owned.emplace_back(args.workspace_bytes);
    args.workspace = owned.back().p;
    CUDA_OK(cudaMemset(args.workspace, 0, args.workspace_bytes));
  }
  size_t out_bytes() const { return size_t(c.tokens) * c.output * element_bytes(c.dtype); }
};

double relative_error(const Problem &p) {
  Buffer hidden(size_t(p.c.tokens) * p.c.intermediate * 8), out(size_t(p.c.tokens) * p.c.output * 8), sums(24);
  CUDA_OK(cudaMemset(sums.p, 0, 24));
  reference_hidden<<<p.c.intermediate, 256>>>(p.args, static_cast<double *>(hidden.p));
  reference_out<<<p.c.output, 256>>>(p.args, static_cast<double *>(hidden.p), static_cast<double *>(out.p));
  compare<<<256, 256>>>(p.args.out, static_cast<double *>(out.p), (long long)p.c.tokens * p.c.output, p.c.dtype,
                        static_cast<double *>(sums.p));
  double h[3];
  CUDA_OK(cudaMemcpy(h, sums.p, 24, cudaMemcpyDeviceToHost));
  return h[2] > 0 ? NAN : std::sqrt(h[0] / (h[1] > 0 ? h[1] : 1));
}

unsigned long long differing_bytes(const void *a, const void *b, size_t n) {
  Buffer count(8);
  CUDA_OK(cudaMemset(count.p, 0, 8));
  count_different<<<256, 256>>>(static_cast<const unsigned char *>(a), static_cast<const unsigned char *>(b), n,
                                static_cast<unsigned long long *>(count.p));
  unsigned long long h;
  CUDA_OK(cudaMemcpy(&h, count.p, 8, cudaMemcpyDeviceToHost));
  return h;
}

double tolerance(int dtype) {
  return dtype == FUSED_MLP_BF16 ? 4e-3 : dtype == FUSED_MLP_F16 ? 5e-4 : dtype == FUSED_MLP_F32 ? 1e-6 : 1e-13;
}

std::string describe(const Case &c) {
  char s[256];
  std::snprintf(s, sizeof s, "%s %s %dx%dx%d tokens %d act %d biases %d pad %d offset %d packed %d path %d",
                DTYPE_NAMES[c.dtype], c.gated ? "swiglu" : "mlp", c.hidden, c.intermediate, c.output, c.tokens,
                c.activation, c.biases, c.pad, c.offset, int(c.packed), c.path);
  return s;
}

int failures = 0, checks = 0;
double worst[4] = {};

void check_case(const Case &c, unsigned seed, bool again = true) {
  Problem p(c, seed);
  CUDA_OK(cudaMemset(p.args.out, 0xff, p.out_bytes())); // NaN in every type
  STATUS_OK(fused_mlp_decode(&p.args, 0));
  CUDA_OK(cudaDeviceSynchronize());
  const double error = relative_error(p);
  ++checks;
  if (!(error <= tolerance(c.dtype))) {
    ++failures;
    std::printf("FAIL %s: rel l2 %.3e\n", describe(c).c_str(), error);
  }
  if (error > worst[c.dtype])
    worst[c.dtype] = error;
  if (again) {
    Buffer saved(p.out_bytes());
    CUDA_OK(cudaMemcpy(saved.p, p.args.out, p.out_bytes(), cudaMemcpyDeviceToDevice));
    for (int i = 0; i < 3; ++i) {
      CUDA_OK(cudaMemset(p.args.out, 0xff, p.out_bytes()));
      STATUS_OK(fused_mlp_decode(&p.args, 0));
      if (differing_bytes(saved.p, p.args.out, p.out_bytes())) {
        ++failures;
        std::printf("FAIL %s: run %d differs\n", describe(c).c_str(), i);
        break;
      }
    }
  }
}

// Rows of a call with as many as the kernel takes against calls with fewer of them, at several first rows.
void check_rows(const Case &c, unsigned seed) {
  const int most = c.tokens;
  Problem p(c, seed);
  CUDA_OK(cudaMemset(p.args.out, 0xff, p.out_bytes()));
  STATUS_OK(fused_mlp_decode(&p.args, 0));
  const size_t e = element_bytes(c.dtype), row = size_t(c.output) * e;
  Buffer part(p.out_bytes());
  for (int count : {1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 48, 63}) {
    for (int first : {0, 5, most - count}) {
      if (first < 0 || first + count > most)
        continue;
      FusedMlpArgs a = p.args;
      a.x = static_cast<const char *>(a.x) + first * a.x_stride * e;
      a.tokens = count;
      a.out = part.p;
      CUDA_OK(cudaMemset(part.p, 0xff, part.bytes));
      STATUS_OK(fused_mlp_decode(&a, 0));
      const unsigned long long different =
          differing_bytes(static_cast<char *>(p.args.out) + first * row, part.p, count * row);
      ++checks;
      if (different) {
        ++failures;
        std::printf("FAIL %s: %d rows from %d differ from %d in %llu bytes\n", describe(c).c_str(), count, first, most,
                    different);
      }
    }
  }
}

// The ring's rows and those of the kernel for some dozens of tokens, of calls with any number of them, against each row alone
// on the ring.
void check_bits(Case c, unsigned seed) {
  c.tokens = 64;
  c.path = FUSED_MLP_PATH_HOPPER;
  Problem p(c, seed);
  const size_t e = element_bytes(c.dtype), row = size_t(c.output) * e;
  Buffer alone(p.out_bytes());
  const auto decode = [&](int path, int first, int count, void *out) {
    FusedMlpArgs a = p.args;
    a.x = static_cast<const char *>(a.x) + first * a.x_stride * e;
    a.tokens = count;
    a.path = path;
    a.out = out;
    CUDA_OK(cudaMemset(out, 0xff, count * row));
    STATUS_OK(fused_mlp_decode(&a, 0));
  };
  for (int i = 0; i < c.tokens; ++i)
    decode(FUSED_MLP_PATH_HOPPER, i, 1, static_cast<char *>(alone.p) + i * row);
  for (int path : {FUSED_MLP_PATH_HOPPER, FUSED_MLP_PATH_WIDE})
    for (int count = 1; count <= c.tokens; ++count) {
      const int first = count * 37 % (c.tokens - count + 1);
      decode(path, first, count, p.args.out);
      const unsigned long long different =
          differing_bytes(static_cast<char *>(alone.p) + first * row, p.args.out, count * row);
      ++checks;
      if (different) {
        ++failures;
        std::printf("FAIL %s: on path %d %d rows from %d differ from each alone in %llu bytes\n", describe(c).c_str(), path,
                    count, first, different);
      }
    }
}

// What runs some dozens of tokens.
void check_wide() {
  unsigned seed = 4000;
  const struct {
    int h, i, o;
  } sizes[] = {{64, 64, 8},          {576, 1536, 576},    {768, 3072, 768},    {128, 4864, 896},   {512, 2048, 392},
               {1280, 5120, 1280},   {2048, 5632, 2048},  {1600, 6400, 1600},  {4096, 4096, 4096}, {3072, 8192, 3072},
               {4096, 14336, 4096},  {3584, 18944, 3584}, {8192, 28672, 8192}};
  for (const auto &d : sizes)
    for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16})
      for (int gated : {0, 1})
        for (int t : {1, 7, 33, 64, 100, 200}) {
          if (d.h > 2048 && t != 33 && t != 64)
            continue;
          check_case({dtype, gated, d.h, d.i, d.o, t, int(seed % ACTIVATIONS), 0.3f, int(seed % 8), seed % 3 ? 0 : 8, 0,
                      FUSED_MLP_PATH_WIDE, (seed & 4) != 0},
                     seed * 97, true);
          ++seed;
        }
  for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16}) {
    check_rows({dtype, 1, 576, 1536, 576, 64, 6, 0.f, 7, 0, 0, FUSED_MLP_PATH_WIDE, false}, seed++ * 97);
    check_rows({dtype, 0, 768, 3072, 768, 64, 6, 0.f, 7, 0, 0, FUSED_MLP_PATH_WIDE, false}, seed++ * 97);
    check_rows({dtype, 1, 4096, 14336, 4096, 64, 6, 0.f, 7, 0, 0, FUSED_MLP_PATH_WIDE, false}, seed++ * 97);
  }
  // A second layer of one, two, three and four parts, of odd and even numbers of chunks, the last one shorter or not.
  const struct {
    int h, i, o;
  } parted[] = {{64, 64, 8},         {64, 192, 72},       {192, 320, 200},    {576, 1536, 576},   {768, 3072, 768},
                {1024, 2816, 1000},  {128, 4864, 896},    {1280, 5120, 1280}, {1600, 6400, 1600}, {2048, 5632, 2048},
                {2048, 8192, 2048},  {2560, 6912, 2560},  {3072, 8192, 3072}, {320, 4160, 3584},  {256, 3520, 4096},
                {4096, 4096, 4096},  {4096, 14336, 4096}, {512, 28672, 8192}};
  for (const auto &d : parted)
    for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16})
      for (int gated : {0, 1}) {
        check_bits({dtype, gated, d.h, d.i, d.o, 0, int(seed % ACTIVATIONS), 0.3f, int(seed % 8), seed % 3 ? 0 : 8, 0, 0,
                    (seed & 4) != 0},
                   seed * 97);
        ++seed;
      }
  std::printf("wide: %d checks, %d failures; worst rel l2: bf16 %.2e f16 %.2e\n", checks, failures, worst[0], worst[1]);
}

int run_check(bool quick) {
  const int paths_all[] = {FUSED_MLP_PATH_AUTO, FUSED_MLP_PATH_PORTABLE, FUSED_MLP_PATH_DIRECT_PDL};
  unsigned seed = 1;
  struct Dims {
    int h, i, o;
  };
  const Dims small[] = {{576, 1536, 576}, {64, 172, 64}, {88, 88, 88},   {1, 1, 1},       {7, 3, 5},
                        {512, 2048, 384}, {64, 8, 64},   {8, 64, 8},     {264, 1000, 72}, {768, 3072, 768},
                        {33, 65, 129},    {128, 4864, 896}};
  const int tokens[] = {1, 2, 5, 8, 9, 16, 17, 32, 33, 64, 100};
  for (const Dims &d : small)
    for (int dtype = 0; dtype < 4; ++dtype)
      for (int t : tokens) {
        if (quick && (t != 1 && t != 9 && t != 64 && t != 17))
          continue;
        if (quick && d.i > 2048)
          continue;
        Case c{dtype, int(seed & 1), d.h, d.i, d.o, t, int(seed % ACTIVATIONS), 0.3f, int(seed % 8), 0, 0, 0, (seed & 4) != 0};
        c.path = paths_all[seed % 3 == 2 && (d.h * element_bytes(dtype) % 16 || d.i * element_bytes(dtype) % 16 ||
                                              dtype == 3)
                               ? 1
                               : seed % 3];
        // Sums that cancel make a relative bound meaningless at tiny sizes; the activation may clip nearly everything.
        if (d.h < 16)
          c.activation = 6;
        check_case(c, seed * 97, !quick);
        ++seed;
      }
  if (!quick) {
    check_wide();
    for (int act = 0; act < ACTIVATIONS; ++act)
      for (int dtype = 0; dtype < 3; ++dtype)
        for (int gated = 0; gated < 2; ++gated)
          check_case({dtype, gated, 576, 1536, 576, 3, act, 0.25f, 7, 0, 0, 0, false}, seed++ * 97, false);
    for (int biases = 0; biases < 8; ++biases)
      for (int pad : {0, 8, 1})
        for (int offset : {0, 8, 1})
          check_case({int(biases % 3), 1, 512, 1024, 512, 4, 6, 0.f, biases, pad, offset, 0, (biases & 1) != 0}, seed++ * 97,
                     false);
    const Dims large[] = {{4096, 14336, 4096}, {8192, 28672, 8192}, {2048, 5632, 2048}, {2048, 8192, 2048},
                          {4096, 11008, 4096}, {5120, 13824, 5120}, {3584, 18944, 3584}, {1280, 5120, 1280},
                          {4096, 4096, 4096},  {16384, 53248, 16384}};
    for (const Dims &d : large)
      for (int dtype = 0; dtype < 3; ++dtype)
        for (int t : {1, 8, 16, 32, 64}) {
          if (d.h > 4096 && (t == 8 || t == 32))
            continue;
          if (d.h > 8192 && (dtype || t == 16))
            continue;
          check_case({dtype, d.h != 1280 && !(d.h == 4096 && d.i == 4096), d.h, d.i, d.o, t, t & 1 ? 6 : 0, 0.f, 7, 0, 0,
                      0, false},
                     seed++ * 97, d.h <= 4096);
        }
  }
  for (int dtype = 0; dtype < 4; ++dtype) {
    check_rows({dtype, 1, 576, 1536, 576, 64, 6, 0.f, 7, 0, 0, 0, false}, seed++ * 97);
    check_rows({dtype, 0, 768, 3072, 768, 64, 0, 0.f, 7, 0, 0, 0, false}, seed++ * 97);
    check_rows({dtype, 0, 264, 1000, 72, 64, 0, 0.f, 7, 0, 0, FUSED_MLP_PATH_PORTABLE, false}, seed++ * 97);
    check_rows({dtype, 1, 64, 172, 64, 64, 6, 0.f, 7, 0, 0, FUSED_MLP_PATH_CLUSTER, false}, seed++ * 97);
    if (!quick && dtype < 3) {
      check_rows({dtype, 1, 4096, 14336, 4096, 64, 6, 0.f, 0, 0, 0, 0, false}, seed++ * 97);
      check_rows({dtype, 0, 1280, 5120, 1280, 64, 0, 0.f, 7, 0, 0, 0, false}, seed++ * 97);
      check_rows({dtype, 1, 2048, 5632, 2048, 64, 6, 0.f, 0, 0, 0, FUSED_MLP_PATH_DIRECT, false}, seed++ * 97);
      check_rows({dtype, 1, 8192, 28672, 8192, 64, 6, 0.f, 0, 0, 0, 0, false}, seed++ * 97);
      check_rows({dtype, 0, 4096, 4096, 4096, 64, 0, 0.f, 7, 0, 0, 0, false}, seed++ * 97);
      check_rows({dtype, 1, 2048, 5632, 2048, 64, 6, 0.f, 7, 0, 0, 0, false}, seed++ * 97);
    }
  }
  std::printf("check: %d checks, %d failures; worst rel l2: bf16 %.2e f16 %.2e f32 %.2e f64 %.2e\n", checks, failures,
              worst[0], worst[1], worst[2], worst[3]);
  return failures != 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Stress

// Holds `gridDim.x` multiprocessors' shared memory for a while.
__global__ void hold_multiprocessors(long long cycles) {
  extern __shared__ char held[];
  held[threadIdx.x] = 0;
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

// Holds multiprocessors until the host says so.
__global__ void hold_until(const volatile int *release) {
  extern __shared__ char held[];
  held[threadIdx.x] = 0;
  while (!*release) {
  }
}

// With most multiprocessors held by somebody else, a launch must still end: those blocks that run do all the work.
int run_held() {
  int bad = 0;
  int *release;
  CUDA_OK(cudaHostAlloc(&release, sizeof(int), cudaHostAllocMapped));
  CUDA_OK(cudaFuncSetAttribute(hold_until, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024));
  cudaStream_t holder, stream;
  CUDA_OK(cudaStreamCreateWithFlags(&holder, cudaStreamNonBlocking));
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int path : {FUSED_MLP_PATH_AUTO, FUSED_MLP_PATH_HOPPER, FUSED_MLP_PATH_WIDE, FUSED_MLP_PATH_DIRECT_PDL,
                   FUSED_MLP_PATH_DIRECT, FUSED_MLP_PATH_PORTABLE})
    for (int tokens : {1, 9, 20, 64})
      for (int held : {1, 60, path == FUSED_MLP_PATH_WIDE ? 100 : 131}) {
        // Few tokens of the smaller one run on decode_resident.cu.
        const bool small = path == FUSED_MLP_PATH_AUTO && tokens < 32;
        if (path == FUSED_MLP_PATH_AUTO && !small)
          continue;
        const int hidden = small ? 576 : 2048, intermediate = small ? 1536 : 2816;
        Problem p({FUSED_MLP_BF16, 1, hidden, intermediate, hidden, tokens, 6, 0.f, 7, 0, 0, path, false}, 31);
        CUDA_OK(cudaDeviceSynchronize());
        STATUS_OK(fused_mlp_decode(&p.args, stream));
        CUDA_OK(cudaStreamSynchronize(stream));
        Buffer expected(p.out_bytes());
        CUDA_OK(cudaMemcpy(expected.p, p.args.out, p.out_bytes(), cudaMemcpyDeviceToDevice));
        CUDA_OK(cudaMemset(p.args.out, 0xff, p.out_bytes()));
        CUDA_OK(cudaDeviceSynchronize());
        *release = 0;
        hold_until<<<held, 64, 200 * 1024, holder>>>(release);
        CUDA_OK(cudaGetLastError());
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < 3; ++i)
          STATUS_OK(fused_mlp_decode(&p.args, stream));
        cudaError_t state = cudaErrorNotReady;
        double seconds = 0;
        while (state == cudaErrorNotReady && seconds < 5) {
          state = cudaStreamQuery(stream);
          seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        }
        const bool ended = state == cudaSuccess;
        *release = 1;
        CUDA_OK(cudaDeviceSynchronize());
        const bool right = differing_bytes(expected.p, p.args.out, p.out_bytes()) == 0;
        bad += !ended || !right;
        std::printf("held %d: path %d tokens %d: %s after %.0f us, %s\n", held, path, tokens,
                    ended ? "3 launches ended" : "NOT ENDED", seconds * 1e6, right ? "right" : "WRONG");
      }
  CUDA_OK(cudaStreamDestroy(holder));
  CUDA_OK(cudaStreamDestroy(stream));
  CUDA_OK(cudaFreeHost(release));
  std::printf("held: %d bad\n", bad);
  return bad != 0;
}

// Few and small: for compute-sanitizer. Of one path, by its name, or of all.
const char *const PATH_NAMES[] = {"auto", "portable", "direct", "dependent", "hopper", "resident", "cluster", "gemm-ampere", "wide"};

int run_select(const std::string &name) {
  unsigned seed = 800;
  const auto select = [&](const Case &c) {
    if (name.empty() || name == PATH_NAMES[c.path])
      check_case(c, seed, false);
    ++seed;
  };
  for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16})
    for (int t : {9, 64, 100})
      select({dtype, dtype == FUSED_MLP_BF16, 256, 704, 136, t, 6, 0.f, 7, 0, 0, FUSED_MLP_PATH_WIDE, false});
  for (int dtype = 0; dtype < 4; ++dtype)
    for (int t : {1, 9, 20, 64})
      for (int path : {FUSED_MLP_PATH_AUTO, FUSED_MLP_PATH_PORTABLE})
        select({dtype, int(seed & 1), 264, 600, 136, t, 6, 0.f, int(seed % 8), 0, 0, path, false});
  for (int dtype = 0; dtype < 4; ++dtype)
    for (int t : {1, 6, 64})
      select({dtype, t != 6, 65, 171, 63, t, 6, 0.f, 7, 1, 1, FUSED_MLP_PATH_CLUSTER, false});
  for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16, FUSED_MLP_F32})
    for (int t : {1, 9, 20, 64})
      select({dtype, dtype == FUSED_MLP_BF16, 256, 704, 136, t, 6, 0.f, 7, 0, 0, FUSED_MLP_PATH_HOPPER, false});
  for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16})
    for (int t : {1, 8, 13, 32})
      for (int gated : {0, 1})
        select({dtype, gated, 256, 1024, 136, t, 6, 0.f, 7, 0, 0, FUSED_MLP_PATH_RESIDENT, t == 8});
  select({FUSED_MLP_BF16, 1, 33, 65, 129, 5, 6, 0.f, 7, 1, 1, 0, true});
  std::printf("select: %d checks, %d failures\n", checks, failures);
  return failures != 0 || checks == 0;
}

int run_soak(int seconds) {
  const auto start = std::chrono::steady_clock::now();
  unsigned state = 2463534242u;
  auto below = [&](unsigned n) {
    state = state * 1664525u + 1013904223u;
    return int((state >> 8) % n);
  };
  while (std::chrono::steady_clock::now() - start < std::chrono::seconds(seconds) && failures == 0) {
    const int step = below(2) ? 64 : below(2) ? 8 : 1;
    auto size = [&] { return (1 + below(below(8) ? 1024 / step + 1 : 4096 / step)) * step; };
    // Sums that cancel make a relative bound meaningless at tiny sizes.
    const Case c{below(4), below(2), std::max(16, size()), std::max(16, size()), 64 + below(2000),
                 1 + below(below(2) ? 8 : 80), below(ACTIVATIONS), 0.3f, below(8), below(4) ? 0 : 8, 0,
                 FUSED_MLP_PATH_AUTO, below(2) != 0};
    check_case(c, state, true);
  }
  std::printf("soak: %d checks, %d failures\n", checks, failures);
  return failures != 0;
}

int run_stress(int launches) {
  CUDA_OK(cudaFuncSetAttribute(hold_multiprocessors, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024));
  int bad = 0;
  const Case cases[] = {{FUSED_MLP_BF16, 1, 576, 1536, 576, 1, 6, 0.f, 0, 0, 0, 0, false},
                        {FUSED_MLP_BF16, 1, 2048, 5632, 2048, 3, 6, 0.f, 7, 0, 0, 0, false},
                        {FUSED_MLP_F16, 1, 576, 1536, 576, 20, 6, 0.f, 7, 0, 0, 0, false},
                        {FUSED_MLP_F16, 0, 768, 3072, 768, 64, 0, 0.f, 7, 0, 0, FUSED_MLP_PATH_HOPPER, false},
                        {FUSED_MLP_BF16, 1, 1024, 2816, 1024, 40, 6, 0.f, 7, 0, 0, 0, false},
                        {FUSED_MLP_F16, 0, 768, 3072, 768, 100, 0, 0.f, 7, 0, 0, FUSED_MLP_PATH_WIDE, false},
                        {FUSED_MLP_F32, 1, 576, 1536, 576, 20, 6, 0.f, 7, 0, 0, 0, false},
                        {FUSED_MLP_F32, 1, 64, 172, 64, 5, 6, 0.f, 7, 0, 0, 0, false},
                        {FUSED_MLP_BF16, 0, 264, 1000, 72, 9, 0, 0.f, 7, 0, 0, FUSED_MLP_PATH_PORTABLE, false}};
  auto worker = [&](int index, int *errors) {
    cudaStream_t stream;
    CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    std::vector<Problem> problems;
    problems.reserve(std::size(cases));
    for (const Case &c : cases)
      problems.emplace_back(c, 1000 + index * 50);
    CUDA_OK(cudaDeviceSynchronize());
    size_t most = 0;
    for (Problem &p : problems)
      most = std::max<size_t>(most, p.args.workspace_bytes);
    Buffer workspace(most), count(8);
    CUDA_OK(cudaMemset(workspace.p, 0, most));
    CUDA_OK(cudaMemset(count.p, 0, 8));
    std::vector<Buffer> expected;
    for (Problem &p : problems) {
      p.args.workspace = workspace.p; // one workspace per stream, whatever the shapes
      p.args.workspace_bytes = most;
      STATUS_OK(fused_mlp_decode(&p.args, stream));
      CUDA_OK(cudaStreamSynchronize(stream));
      if (!(relative_error(p) <= tolerance(p.c.dtype)))
        ++*errors;
      expected.emplace_back(p.out_bytes());
      CUDA_OK(cudaMemcpy(expected.back().p, p.args.out, p.out_bytes(), cudaMemcpyDeviceToDevice));
    }
    unsigned random = 12345 + index;
    for (int i = 0; i < launches / 2; ++i) {
      random = random * 1664525u + 1013904223u;
      const size_t k = (random >> 16) % problems.size();
      Problem &p = problems[k];
      STATUS_OK(fused_mlp_decode(&p.args, stream));
      if ((random >> 8) % 16 == 0) {
        count_different<<<8, 256, 0, stream>>>(static_cast<unsigned char *>(p.args.out),
                                               static_cast<unsigned char *>(expected[k].p), p.out_bytes(),
                                               static_cast<unsigned long long *>(count.p));
        CUDA_OK(cudaMemsetAsync(p.args.out, 0xff, p.out_bytes(), stream));
      }
      if (i % 512 == 0) {
        cudaStream_t other;
        CUDA_OK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
        hold_multiprocessors<<<100, 64, 200 * 1024, other>>>(400000);
        CUDA_OK(cudaGetLastError());
        CUDA_OK(cudaStreamDestroy(other));
      }
    }
    CUDA_OK(cudaStreamSynchronize(stream));
    unsigned long long different;
    CUDA_OK(cudaMemcpy(&different, count.p, 8, cudaMemcpyDeviceToHost));
    if (different)
      ++*errors;
    CUDA_OK(cudaStreamDestroy(stream));
  };
  int errors[2] = {};
  const auto start = std::chrono::steady_clock::now();
  std::thread a(worker, 0, &errors[0]), b(worker, 1, &errors[1]);
  a.join();
  b.join();
  bad = errors[0] + errors[1];
  std::printf("stress: %d launches on two streams, %d errors, %.1f s\n", launches, bad,
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return bad != 0;
}

int run_graph(int replays) {
  int bad = 0, graphs = 0;
  for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F32})
    for (int tokens : {1, 16, 40, 64, 100}) {
      if (tokens == 100 && dtype == FUSED_MLP_F32)
        continue;
      ++graphs;
      const int path = tokens == 100  ? FUSED_MLP_PATH_WIDE
                       : tokens == 64 ? FUSED_MLP_PATH_HOPPER
                                      : FUSED_MLP_PATH_AUTO;
      Problem p({dtype, 1, 576, 1536, 576, tokens, 6, 0.f, 7, 0, 0, path, false}, 77);
      cudaStream_t stream;
      CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      STATUS_OK(fused_mlp_decode(&p.args, stream));
      CUDA_OK(cudaStreamSynchronize(stream));
      Buffer expected(p.out_bytes());
      CUDA_OK(cudaMemcpy(expected.p, p.args.out, p.out_bytes(), cudaMemcpyDeviceToDevice));
      CUDA_OK(cudaMemset(p.args.out, 0xff, p.out_bytes()));
      CUDA_OK(cudaDeviceSynchronize()); // the stream does not wait for the other one's memset
      cudaGraph_t graph;
      cudaGraphExec_t exec;
      CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      for (int i = 0; i < 4; ++i)
        STATUS_OK(fused_mlp_decode(&p.args, stream));
      CUDA_OK(cudaStreamEndCapture(stream, &graph));
      CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
      for (int i = 0; i < replays; ++i)
        CUDA_OK(cudaGraphLaunch(exec, stream));
      CUDA_OK(cudaStreamSynchronize(stream));
      bad += differing_bytes(expected.p, p.args.out, p.out_bytes()) != 0;
      CUDA_OK(cudaGraphExecDestroy(exec));
      CUDA_OK(cudaGraphDestroy(graph));
      CUDA_OK(cudaStreamDestroy(stream));
    }
  std::printf("graph: %d x %d replays of 4 launches, %d wrong\n", graphs, replays, bad);
  return bad != 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Timing

__global__ void __launch_bounds__(512) read_all(const uint4 *p, size_t n, unsigned *sink) {
  unsigned v = 0;
  const size_t step = size_t(gridDim.x) * 512;
  size_t i = blockIdx.x * size_t(512) + threadIdx.x;
  for (; i + 7 * step < n; i += 8 * step) {
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

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

double read_bandwidth() { // bytes a second
  const size_t bytes = size_t(4) << 30;
  Buffer data(bytes), sink(4);
  fill_normal<<<4096, 256>>>(data.p, bytes / 4, FUSED_MLP_F32, 5, 1.f);
  cudaEvent_t a, b;
  CUDA_OK(cudaEventCreate(&a));
  CUDA_OK(cudaEventCreate(&b));
  double best = 0;
  for (int blocks : {132, 264, 528, 132 * 16}) {
    std::vector<double> rates;
    for (int i = 0; i < 7; ++i) {
      CUDA_OK(cudaEventRecord(a));
      read_all<<<blocks, 512>>>(static_cast<uint4 *>(data.p), bytes / 16, static_cast<unsigned *>(sink.p));
      CUDA_OK(cudaEventRecord(b));
      CUDA_OK(cudaEventSynchronize(b));
      float ms;
      CUDA_OK(cudaEventElapsedTime(&ms, a, b));
      rates.push_back(bytes / (ms * 1e-3));
    }
    std::printf("read bandwidth, %d blocks: %.3f TB/s\n", blocks, median(rates) * 1e-12);
    best = std::max(best, median(rates));
  }
  return best;
}

struct Stack {
  std::vector<Buffer> owned;
  std::vector<FusedMlpArgs> layers;
  size_t weight_bytes = 0;
  Stack(int dtype, int gated, int hidden, int intermediate, bool biases, size_t l2) {
    const size_t e = element_bytes(dtype);
    weight_bytes = size_t(hidden) * intermediate * (gated ? 3 : 2) * e;
    const int count = std::max<int>(4, int((4 * l2 + weight_bytes - 1) / weight_bytes) + 1);
    unsigned seed = 3;
    auto tensor = [&](size_t n, float scale) {
      owned.emplace_back(n * e);
      fill_normal<<<2048, 256>>>(owned.back().p, n, dtype, seed++, scale);
      return owned.back().p;
    };
    constexpr int MOST_TOKENS = 128;
    void *x = tensor(size_t(MOST_TOKENS) * hidden, 1.f);
    void *const between[2] = {tensor(size_t(MOST_TOKENS) * hidden, 1.f), tensor(size_t(MOST_TOKENS) * hidden, 1.f)};
    FusedMlpArgs a = {};
    a.tokens = MOST_TOKENS;
    a.hidden_size = a.output_size = hidden;
    a.intermediate_size = intermediate;
    a.dtype = dtype;
    a.gated = gated;
    a.activation = gated ? 6 : 0;
    a.x_stride = a.gate_stride = a.up_stride = hidden;
    a.down_stride = intermediate;
    a.workspace_bytes = fused_mlp_decode_workspace_bytes(&a);
    owned.emplace_back(a.workspace_bytes);
    a.workspace = owned.back().p;
    CUDA_OK(cudaMemset(a.workspace, 0, a.workspace_bytes));
    for (int l = 0; l < count; ++l) {
      // Each layer reads what the one before wrote; every fourth starts afresh, so that values neither fade nor grow.
      a.x = l % 4 == 0 ? x : between[(l + 1) % 2];
      a.out = between[l % 2];
      a.gate = tensor(size_t(hidden) * intermediate, 1.3f / std::sqrt(float(hidden)));
      a.up = gated ? tensor(size_t(hidden) * intermediate, 1.3f / std::sqrt(float(hidden))) : nullptr;
      a.down = tensor(size_t(hidden) * intermediate, 1.3f / std::sqrt(float(intermediate)));
      if (biases) {
        a.bias_gate = tensor(intermediate, 0.1f);
        a.bias_down = tensor(hidden, 0.1f);
      }
      layers.push_back(a);
    }
    CUDA_OK(cudaDeviceSynchronize());
  }
  // Microseconds of one layer: median of five loops.
  double time(int tokens, int path, bool in_graph, double floor_us) {
    cudaStream_t stream;
    CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    auto once = [&] {
      for (FusedMlpArgs a : layers) {
        a.tokens = tokens;
        a.path = path;
        STATUS_OK(fused_mlp_decode(&a, stream));
      }
    };
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    once();
    if (in_graph) {
      CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      once();
      CUDA_OK(cudaStreamEndCapture(stream, &graph));
      CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    }
    cudaEvent_t a, b;
    CUDA_OK(cudaEventCreate(&a));
    CUDA_OK(cudaEventCreate(&b));
    const int calls = std::max(3, int(6000. / (std::max(floor_us, 3.) * layers.size())));
    std::vector<double> times;
    for (int loop = 0; loop < 6; ++loop) {
      CUDA_OK(cudaEventRecord(a, stream));
      for (int i = 0; i < calls; ++i)
        if (in_graph)
          CUDA_OK(cudaGraphLaunch(exec, stream));
        else
          once();
      CUDA_OK(cudaEventRecord(b, stream));
      CUDA_OK(cudaEventSynchronize(b));
      float ms;
      CUDA_OK(cudaEventElapsedTime(&ms, a, b));
      if (loop > 0)
        times.push_back(ms * 1e3 / (double(calls) * layers.size()));
    }
    if (exec) {
      CUDA_OK(cudaGraphExecDestroy(exec));
      CUDA_OK(cudaGraphDestroy(graph));
    }
    CUDA_OK(cudaEventDestroy(a));
    CUDA_OK(cudaEventDestroy(b));
    CUDA_OK(cudaStreamDestroy(stream));
    return median(times);
  }
};

struct Model {
  const char *name;
  int gated, hidden, intermediate;
  bool biases;
};
const Model MODELS[] = {{"swiglu 8192x28672", 1, 8192, 28672, false}, {"swiglu 4096x14336", 1, 4096, 14336, false},
                        {"swiglu 2048x8192", 1, 2048, 8192, false},   {"swiglu 2048x5632", 1, 2048, 5632, false},
                        {"swiglu 576x1536", 1, 576, 1536, false},     {"mlp 4096x4096", 0, 4096, 4096, true},
                        {"mlp 1280x5120", 0, 1280, 5120, true},       {"mlp 768x3072", 0, 768, 3072, true}};

// Of one dtype or all, with the tokens named or the usual ones.
int run_time(const std::string &dtypes, std::vector<int> tokens) {
  if (tokens.empty())
    tokens = {1, 8, 16, 32, 64};
  cudaDeviceProp prop;
  CUDA_OK(cudaGetDeviceProperties(&prop, 0));
  std::printf("%s, %d multiprocessors, L2 %d MB\n", prop.name, prop.multiProcessorCount, prop.l2CacheSize >> 20);
  const double bandwidth = read_bandwidth();
  std::printf("| MLP | dtype | tokens | floor us | stream us | graph us | stream/floor | graph/floor | direct, graph us |\n"
              "|---|---|---|---|---|---|---|---|---|\n");
  for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16, FUSED_MLP_F32})
    for (const Model &m : MODELS) {
      if (dtypes == "all" ? dtype == FUSED_MLP_F16 && m.hidden != 4096 : dtypes != DTYPE_NAMES[dtype])
        continue;
      Stack stack(dtype, m.gated, m.hidden, m.intermediate, m.biases, prop.l2CacheSize);
      const double floor_us = stack.weight_bytes / bandwidth * 1e6;
      for (int t : tokens) {
        const double s = stack.time(t, 0, false, floor_us), g = stack.time(t, 0, true, floor_us);
        const double n = stack.time(t, FUSED_MLP_PATH_DIRECT_PDL, true, floor_us);
        std::printf("| %s | %s | %d | %.2f | %.2f | %.2f | %.3f | %.3f | %.2f |\n", m.name, DTYPE_NAMES[dtype], t,
                    floor_us, s, g, s / floor_us, g / floor_us, n);
        std::fflush(stdout);
      }
    }
  return 0;
}

// Each time is the median of three, the paths one after the other in each. MLPs that one of them does not take are left out.
int run_turns(const std::string &a, const std::string &b, const std::string &dtypes, std::vector<int> tokens) {
  if (tokens.empty())
    tokens = {33, 48, 64};
  const auto path_of = [](const std::string &name) {
    const auto at = std::find(std::begin(PATH_NAMES), std::end(PATH_NAMES), name);
    if (at == std::end(PATH_NAMES)) {
      std::printf("no path: %s\n", name.c_str());
      std::exit(1);
    }
    return int(at - std::begin(PATH_NAMES));
  };
  const int paths[2] = {path_of(a), path_of(b)};
  cudaDeviceProp prop;
  CUDA_OK(cudaGetDeviceProperties(&prop, 0));
  std::printf("%s\n| MLP | dtype | tokens | %s, stream us | %s | ratio | %s, graph us | %s | ratio |\n"
              "|---|---|---|---|---|---|---|---|---|\n",
              prop.name, a.c_str(), b.c_str(), a.c_str(), b.c_str());
  for (int dtype : {FUSED_MLP_BF16, FUSED_MLP_F16, FUSED_MLP_F32})
    for (const Model &m : MODELS) {
      if (dtypes != "all" && dtypes != DTYPE_NAMES[dtype])
        continue;
      Stack stack(dtype, m.gated, m.hidden, m.intermediate, m.biases, prop.l2CacheSize);
      const auto takes = [&](int path, int t) {
        FusedMlpArgs args = stack.layers[0];
        args.tokens = t;
        args.path = path;
        return fused_mlp_decode_path(&args, &path) == 0;
      };
      for (int t : tokens) {
        if (!takes(paths[0], t) || !takes(paths[1], t))
          continue;
        double found[2][2]; // in a graph or not, which path
        for (bool in_graph : {false, true}) {
          std::vector<double> times[2];
          for (int turn = 0; turn < 3; ++turn)
            for (int i : {0, 1})
              times[i].push_back(stack.time(t, paths[i], in_graph, stack.weight_bytes / 3.2e6));
          for (int i : {0, 1})
            found[in_graph][i] = median(times[i]);
        }
        std::printf("| %s | %s | %d |", m.name, DTYPE_NAMES[dtype], t);
        for (const auto &f : found)
          std::printf(" %.2f | %.2f | %.3f |", f[0], f[1], f[1] / f[0]);
        std::printf("\n");
        std::fflush(stdout);
      }
    }
  return 0;
}

// As many arguments as the ring's kernel has.
struct Arguments {
  char bytes[1100];
};
__global__ void do_nothing(const __grid_constant__ Arguments) {}

int run_host() {
  Problem p({FUSED_MLP_BF16, 1, 576, 1536, 576, 1, 6, 0.f, 0, 0, 0, 0, false}, 7);
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto time = [&](const auto &call) {
    call();
    CUDA_OK(cudaStreamSynchronize(stream));
    std::vector<double> times;
    for (int loop = 0; loop < 200; ++loop) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < 100; ++i)
        call();
      times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() * 1e4);
      CUDA_OK(cudaStreamSynchronize(stream));
    }
    return median(times);
  };
  const Arguments arguments = {};
  const double nothing = time([&] { STATUS_OK(fused_mlp::launch_kernel(do_nothing, {132, 384, 0, true}, stream, arguments)); });
  const double call = time([&] { STATUS_OK(fused_mlp_decode(&p.args, stream)); });
  std::printf("host: %.2f us a call, %.2f a launch of nothing (medians of 200 loops of 100)\n", call, nothing);
  return 0;
}

} // namespace

int main(int argc, char **argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check" && argc > 2 && std::string(argv[2]) == "wide") {
    check_wide();
    return failures != 0;
  }
  if (mode == "check")
    return run_check(argc > 2 && std::string(argv[2]) == "quick");
  if (mode == "stress")
    return run_stress(argc > 2 ? std::atoi(argv[2]) : 100000);
  if (mode == "held")
    return run_held();
  if (mode == "select")
    return run_select(argc > 2 ? argv[2] : "");
  if (mode == "soak")
    return run_soak(argc > 2 ? std::atoi(argv[2]) : 60);
  if (mode == "graph")
    return run_graph(argc > 2 ? std::atoi(argv[2]) : 10000);
  if (mode == "time") {
    std::vector<int> tokens;
    for (int i = 3; i < argc; ++i)
      tokens.push_back(std::atoi(argv[i]));
    return run_time(argc > 2 ? argv[2] : "all", tokens);
  }
  if (mode == "turns" && argc > 3) {
    std::vector<int> tokens;
    for (int i = 5; i < argc; ++i)
      tokens.push_back(std::atoi(argv[i]));
    return run_turns(argv[2], argv[3], argc > 4 ? argv[4] : "all", tokens);
  }
  if (mode == "host")
    return run_host();
  std::printf("usage: harness check [quick|wide] | stress N | held | select [PATH] | soak SECONDS | graph N | "
              "time [DTYPE [TOKENS...]] | turns PATH PATH [DTYPE [TOKENS...]] | host\n");
  return 1;
}
