// Checks and times the products for many tokens on a GPU, tile by tile, without Rust between. From the folder `cuda`:
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -I. -o harness/gemm harness/gemm.cu gemm.cu gemm_hopper_bf16.cu
//     gemm_hopper_f16.cu gemm_hopper_f32.cu gemm_ampere.cu gemm_ampere_bf16.cu gemm_ampere_f16.cu elementwise.cu -lcublas
//
//   gemm check [quick] [ampere] [bf16] [f16] [f32]
//                       every tile against f64, poisoned outputs, twice the same bits, and those of a row also elsewhere;
//                       with `ampere` the tiles of gemm_ampere.cuh, in bf16 and f16
//   gemm accuracy       a product in f32 beside SGEMM, errors against f64, random and badly scaled inputs
//   gemm sweep bf16|f32|ampere SHAPE|all WINDOW_US TOKENS...
//                       every tile on the shapes of PERFORMANCE.md: each product alone and beside the other, the choice of
//                       gemm.cu, cuBLAS with one elementwise launch; a cold stack of weights, in CUDA graphs
//   gemm chosen bf16|f32|ampere SHAPE|all WINDOW_US TOKENS...
//                       the choice and cuBLAS only, turn after turn and each after a pause
#include "activation.cuh"
#include "element.cuh"
#include "gemm_ampere.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cublas_v2.h>
#include <functional>
#include <string>
#include <unistd.h>
#include <vector>

#define CUDA_OK(call)                                                                                                  \
  do {                                                                                                                 \
    const int error_ = static_cast<int>(call);                                                                         \
    if (error_ != 0) {                                                                                                 \
      std::printf("%s:%d: %s: %d %s\n", __FILE__, __LINE__, #call, error_,                                             \
                  error_ > 0 ? cudaGetErrorString(static_cast<cudaError_t>(error_)) : "");                             \
      std::fflush(stdout);                                                                                             \
      std::exit(2);                                                                                                    \
    }                                                                                                                  \
  } while (0)

namespace fused_mlp {
namespace {

using B = __nv_bfloat16;

template <typename T> constexpr bool IS_F32 = std::is_same_v<T, float>;
template <typename T> constexpr bool IS_F16 = std::is_same_v<T, __half>;
template <typename T> constexpr int DTYPE = IS_F32<T> ? FUSED_MLP_F32 : IS_F16<T> ? FUSED_MLP_F16 : FUSED_MLP_BF16;

template <typename T> std::vector<Variant> all_variants(bool ampere) {
  int count = 0;
  const Variant *const v = IS_F32<T>   ? gemm_variants_f32(&count)
                           : IS_F16<T> ? (ampere ? gemm_ampere_variants_f16 : gemm_variants_f16)(&count)
                                       : (ampere ? gemm_ampere_variants_bf16 : gemm_variants_bf16)(&count);
  return std::vector<Variant>(v, v + count);
}

std::string name_of(const Variant &v) {
  char text[64];
  std::snprintf(text, sizeof text, "%s %dx%d%s%s%s%s%s%s", v.gated ? "gated" : "plain", v.rows, v.weights,
                v.turned ? " turned" : "", v.pingpong ? " pp" : "", v.share > 1 ? " share2" : "", v.peers > 1 ? " peers2" : "",
                v.split > 1 ? (v.split == 2 ? " split2" : v.split == 4 ? " split4" : " split8") : "",
                v.links > 1 ? " links2" : "");
  return text;
}

__device__ unsigned mix(unsigned v) {
  v ^= v >> 16;
  v *= 0x7feb352dU;
  v ^= v >> 15;
  v *= 0x846ca68bU;
  return v ^ (v >> 16);
}
enum class Kind { Normal, Positive, Scaled, Offset };

template <typename T> __global__ void fill(T *p, long long n, unsigned seed, float scale, Kind kind) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const unsigned a = mix(unsigned(i) * 2654435761U + mix(seed + unsigned(i >> 32))), b = mix(a + 0x9e3779b9U);
    const float r = sqrtf(-2.f * logf((a + 1.f) * (1.f / 4294967808.f)));
    const float normal = r * cospif(b * (2.f / 4294967296.f));
    float v = normal;
    if (kind == Kind::Positive)
      v = a * (1.f / 4294967296.f);
    if (kind == Kind::Scaled)
      v = normal * exp2f(40.f * (mix(b) * (1.f / 4294967296.f)) - 20.f);
    if (kind == Kind::Offset)
      v = normal + 1000.f;
    p[i] = from_float<T>(scale * v);
  }
}
template <typename T = B> T *normal(long long n, float scale, Kind kind = Kind::Normal) {
  static unsigned seed = 1;
  T *p;
  CUDA_OK(cudaMalloc(&p, n * sizeof(T)));
  fill<<<1024, 256>>>(p, n, seed++, scale, kind);
  return p;
}

// One product in f64, an element a thread.
template <typename T> __global__ void reference(Operands o, bool gated, Activation activation, bool none, double *out) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= (long long)o.tokens * o.columns)
    return;
  const int row = i / o.columns, column = i % o.columns;
  const T *x = (const T *)o.rows + row * o.rows_stride, *w = (const T *)o.weights + column * o.weights_stride;
  const T *u = gated ? (const T *)o.up + column * o.up_stride : nullptr;
  double g = o.bias ? (double)to_float(((const T *)o.bias)[column]) : 0;
  double v = o.bias_up ? (double)to_float(((const T *)o.bias_up)[column]) : 0;
  for (int k = 0; k < o.depth; ++k) {
    g += (double)to_float(x[k]) * to_float(w[k]);
    if (gated)
      v += (double)to_float(x[k]) * to_float(u[k]);
  }
  if (!none)
    g = activate(activation, 0.0, g);
  out[i] = gated ? g * v : g;
}
template <typename T>
__global__ void compare(const T *out, long long stride, const double *reference, int tokens, int columns, double *sums) {
  double difference = 0, norm = 0, bad = 0;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (long long)tokens * columns;
       i += (long long)gridDim.x * blockDim.x) {
    const double v = to_float(out[i / columns * stride + i % columns]), r = reference[i];
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

template <typename T> double error_of(const Operands &o, bool gated, Activation activation, bool none) {
  double *r, *sums, h[3];
  const long long n = (long long)o.tokens * o.columns;
  CUDA_OK(cudaMalloc(&r, n * 8));
  CUDA_OK(cudaMalloc(&sums, 24));
  CUDA_OK(cudaMemset(sums, 0, 24));
  reference<T><<<(n + 255) / 256, 256>>>(o, gated, activation, none, r);
  compare<<<256, 256>>>((const T *)o.out, o.out_stride, r, o.tokens, o.columns, sums);
  CUDA_OK(cudaMemcpy(h, sums, 24, cudaMemcpyDeviceToHost));
  cudaFree(r);
  cudaFree(sums);
  return h[2] > 0 ? INFINITY : std::sqrt(h[0] / h[1]);
}

// Room for the sums that any tiles hand over.
long long meeting_bytes(int tokens, int columns, bool ampere) {
  return 4 * MEETINGS + (ampere ? 8 : 1) * 4ll * (tokens + 512) * (columns + 512);
}
void *meeting_for(int tokens, int columns, bool ampere) {
  void *p;
  CUDA_OK(cudaMalloc(&p, meeting_bytes(tokens, columns, ampere)));
  return p;
}

template <typename T> int check(bool quick, bool ampere) {
  int failures = 0, cases = 0;
  double worst = 0;
  const struct {
    int tokens, depth, columns, pad;
  } sizes[] = {{70, 72, 200, 0}, {129, 576, 520, 8},   {300, 1024, 1536, 0},
               {1, 64, 8, 0},    {515, 1544, 1000, 0}, {2100, 576, 4104, 0}, {130, 8200, 264, 0}};
  const Activation activations[] = {Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu,
                                    Activation::QuickGelu};
  for (const Variant &v : all_variants<T>(ampere)) {
    for (int s = 0; s < (quick ? 2 : 7); ++s) {
      const auto &size = sizes[s];
      // There are no more flags for tiles whose depth is split.
      const int tiles = ((size.tokens + v.rows - 1) / v.rows) * ((size.columns + v.columns - 1) / v.columns);
      if (ampere && v.split > 1 && tiles > MEETINGS)
        continue;
      const Activation activation = activations[(s + cases) % 5];
      Operands o = {};
      o.tokens = size.tokens;
      o.depth = size.depth;
      o.columns = size.columns;
      o.rows_stride = o.weights_stride = o.up_stride = size.depth + size.pad;
      o.out_stride = size.columns + (s == 2 ? 8 : 0);
      o.dtype = DTYPE<T>;
      const bool none = !v.gated && s % 2 == 1;
      if (!finish_of(static_cast<int>(activation), &o.finish, &o.slope))
        return 1;
      if (none)
        o.finish = Finish::None;
      const float scale = 1.f / std::sqrt(float(size.depth));
      o.rows = normal<T>(o.tokens * o.rows_stride, 1.f);
      o.weights = normal<T>(o.columns * o.weights_stride, scale);
      o.up = v.gated ? normal<T>(o.columns * o.up_stride, scale) : nullptr;
      o.bias = s % 3 != 1 ? normal<T>(o.columns, 0.5f) : nullptr;
      o.bias_up = v.gated && s % 2 == 0 ? normal<T>(o.columns, 0.5f) : nullptr;
      const size_t bytes = o.tokens * o.out_stride * sizeof(T);
      std::vector<char> first(bytes), second(bytes);
      CUDA_OK(cudaMalloc(&o.out, bytes));
      void *const meeting = meeting_for(o.tokens, o.columns, ampere);
      for (int run = 0; run < 2; ++run) {
        o.weights_early = run;
        CUDA_OK(cudaMemset(o.out, 0xff, bytes));
        CUDA_OK(cudaMemset(meeting, 0, 4 * MEETINGS));
        o.meeting = meeting;
        CUDA_OK(v.enqueue(o, 0));
        CUDA_OK(cudaMemcpy((run ? second : first).data(), o.out, bytes, cudaMemcpyDeviceToHost));
      }
      const double error = error_of<T>(o, v.gated, activation, none);
      bool same = first == second;
      if (o.tokens > 37) {
        // The last rows alone, in other places of other tiles.
        constexpr int BEFORE = 37;
        Operands last = o;
        last.rows = (const T *)o.rows + BEFORE * o.rows_stride;
        last.tokens -= BEFORE;
        CUDA_OK(cudaMemset(o.out, 0xff, bytes));
        CUDA_OK(cudaMemset(meeting, 0, 4 * MEETINGS));
        CUDA_OK(v.enqueue(last, 0));
        CUDA_OK(cudaMemcpy(second.data(), o.out, bytes, cudaMemcpyDeviceToHost));
        const size_t before = BEFORE * o.out_stride * sizeof(T);
        same = same && std::equal(first.begin() + before, first.end(), second.begin());
      }
      ++cases;
      worst = std::max(worst, error);
      if (error > (IS_F32<T> ? 2e-6 : 4e-3) || !same) {
        ++failures;
        std::printf("FAILED %s %dx%dx%d activation %d: error %g, %s\n", name_of(v).c_str(), o.tokens, o.depth, o.columns,
                    int(activation), error, same ? "same bits" : "bits differ");
      }
      for (const void *p : {o.rows, o.weights, o.up, o.bias, o.bias_up, (const void *)o.out, (const void *)meeting})
        cudaFree(const_cast<void *>(p));
    }
  }
  std::printf("check %s%s: %d cases, %d failures, largest error %.2e\n", ampere ? "ampere " : "",
              IS_F32<T>   ? "f32"
              : IS_F16<T> ? "f16"
                          : "bf16",
              cases, failures, worst);
  return failures != 0;
}

// A product in f32 beside SGEMM: both errors against f64, over the norm of the result.
int accuracy() {
  cublasHandle_t blas;
  CUDA_OK(cublasCreate(&blas));
  const Variant v = [] {
    for (const Variant &v : all_variants<float>(false))
      if (!v.gated && v.weights == 128)
        return v;
    std::exit(1);
  }();
  const struct {
    const char *name;
    Kind rows, weights;
  } inputs[] = {{"normal", Kind::Normal, Kind::Normal},
                {"positive", Kind::Positive, Kind::Positive},
                {"2^-20 to 2^20", Kind::Scaled, Kind::Scaled},
                {"rows 2^-20 to 2^20", Kind::Scaled, Kind::Normal},
                {"rows + 1000", Kind::Offset, Kind::Normal}};
  for (const auto &input : inputs)
    for (int depth : {64, 384, 768, 4096, 14336}) {
      Operands o = {};
      o.tokens = 512;
      o.columns = 512;
      o.depth = depth;
      o.rows_stride = o.weights_stride = depth;
      o.out_stride = o.columns;
      o.dtype = FUSED_MLP_F32;
      o.finish = Finish::None;
      o.rows = normal<float>(o.tokens * o.rows_stride, 1.f, input.rows);
      o.weights = normal<float>(o.columns * o.weights_stride, 1.f, input.weights);
      CUDA_OK(cudaMalloc(&o.out, o.tokens * o.out_stride * 4));
      CUDA_OK(v.enqueue(o, 0));
      const double own = error_of<float>(o, false, Activation::Relu, true);
      const float one = 1, zero = 0;
      CUDA_OK(cublasSgemm(blas, CUBLAS_OP_T, CUBLAS_OP_N, o.columns, o.tokens, depth, &one, (const float *)o.weights, depth,
                          (const float *)o.rows, depth, &zero, (float *)o.out, o.columns));
      const double sgemm = error_of<float>(o, false, Activation::Relu, true);
      std::printf("accuracy %-20s depth %5d: own %.2e SGEMM %.2e ratio %.2f\n", input.name, depth, own, sgemm, own / sgemm);
      for (const void *p : {o.rows, o.weights, (const void *)o.out})
        cudaFree(const_cast<void *>(p));
    }
  return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Timing

struct Shape2 {
  const char *name;
  int gated, hidden, intermediate;
};
const Shape2 SHAPES[] = {{"swiglu 4096x14336", 1, 4096, 14336}, {"swiglu 8192x28672", 1, 8192, 28672},
                         {"swiglu 2048x8192", 1, 2048, 8192},   {"swiglu 2048x5632", 1, 2048, 5632},
                         {"swiglu 576x1536", 1, 576, 1536},     {"mlp 4096x4096", 0, 4096, 4096},
                         {"mlp 1280x5120", 0, 1280, 5120},      {"mlp 768x3072", 0, 768, 3072}};

struct Graph {
  cudaGraphExec_t exec = nullptr;
  Graph(int launches, const std::function<void(int)> &launch) {
    CUDA_OK(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i)
      launch(i);
    cudaGraph_t graph;
    CUDA_OK(cudaStreamEndCapture(stream(), &graph));
    CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
  }
  Graph(const Graph &) = delete;
  Graph(Graph &&o) : exec(o.exec) { o.exec = nullptr; }
  ~Graph() {
    if (exec)
      cudaGraphExecDestroy(exec);
  }
  static cudaStream_t stream() {
    static cudaStream_t s = [] {
      cudaStream_t made;
      CUDA_OK(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
      return made;
    }();
    return s;
  }
};

float elapsed_of(const Graph &graph) {
  static cudaEvent_t a = nullptr, b = nullptr;
  if (!a) {
    CUDA_OK(cudaEventCreate(&a));
    CUDA_OK(cudaEventCreate(&b));
  }
  CUDA_OK(cudaEventRecord(a, Graph::stream()));
  CUDA_OK(cudaGraphLaunch(graph.exec, Graph::stream()));
  CUDA_OK(cudaEventRecord(b, Graph::stream()));
  CUDA_OK(cudaEventSynchronize(b));
  float ms;
  CUDA_OK(cudaEventElapsedTime(&ms, a, b));
  return ms * 1e3f;
}

struct Candidate {
  std::string name;
  std::function<void(int)> launch;
  std::vector<float> times;
  float median() {
    std::sort(times.begin(), times.end());
    return times.empty() ? INFINITY : times[times.size() / 2];
  }
};

void time_all(std::vector<Candidate> &all, float window_us, int turns, int rest_us = 0) {
  std::vector<int> launches(all.size());
  std::vector<Graph> graphs;
  for (size_t i = 0; i < all.size(); ++i) {
    std::fprintf(stderr, "# %s\n", all[i].name.c_str());
    const Graph two(2, all[i].launch);
    elapsed_of(two);
    launches[i] = std::max(2, std::min(200, int(2 * window_us / elapsed_of(two))));
    graphs.emplace_back(launches[i], all[i].launch);
  }
  for (int turn = 0; turn < turns; ++turn)
    for (size_t i = 0; i < all.size(); ++i) {
      usleep(rest_us);
      all[i].times.push_back(elapsed_of(graphs[i]) / launches[i]);
    }
}

std::function<void(int)> launch_of(const std::vector<Candidate> &list, const std::string &name) {
  return std::find_if(list.begin(), list.end(), [&](const Candidate &c) { return c.name == name; })->launch;
}

// Between tables: the clock is as it was again.
constexpr int pause_us = 60000;

template <typename T>
void sweep(const char *filter, const std::vector<int> &token_counts, float window_us, bool all_tiles, bool ampere) {
  constexpr int ELEMENT = sizeof(T);
  constexpr double RATE = IS_F32<T> ? 50e6 : 781.6e6; // operations a microsecond, of the floors
  const std::vector<Variant> variants = all_variants<T>(ampere);
  cublasHandle_t blas;
  CUDA_OK(cublasCreate(&blas));
  CUDA_OK(cublasSetStream(blas, Graph::stream()));
  void *blas_workspace;
  CUDA_OK(cudaMalloc(&blas_workspace, 32 << 20));
  CUDA_OK(cublasSetWorkspace(blas, blas_workspace, 32 << 20));
  for (const Shape2 &shape : SHAPES) {
    if (filter && !std::strstr(shape.name, filter))
      continue;
    const long long h = shape.hidden, n = shape.intermediate, weights = (shape.gated ? 3 : 2) * h * n;
    const int layers = int(200000000 / (weights * ELEMENT)) + 1 > 2 ? int(200000000 / (weights * ELEMENT)) + 1 : 2;
    int most = 0;
    for (int t : token_counts)
      most = std::max(most, t);
    std::vector<T *> gate, up, down;
    for (int l = 0; l < layers; ++l) {
      gate.push_back(normal<T>(h * n, 1.f / std::sqrt(float(h))));
      up.push_back(shape.gated ? normal<T>(h * n, 1.f / std::sqrt(float(h))) : nullptr);
      down.push_back(normal<T>(h * n, 1.f / std::sqrt(float(n))));
    }
    T *x = normal<T>(most * h, 1.f), *hidden = normal<T>(most * n, 0.5f), *hidden2 = normal<T>(most * n, 0.5f),
      *out = normal<T>(most * h, 1.f), *bias_n = normal<T>(n, 0.5f), *bias_h = normal<T>(h, 0.5f);
    const uint64_t workspace_bytes = most * n * ELEMENT + meeting_bytes(most, h, ampere);
    void *const meeting = meeting_for(most, h, ampere), *workspace;
    CUDA_OK(cudaMalloc(&workspace, workspace_bytes));
    CUDA_OK(cudaMemset(meeting, 0, 4 * MEETINGS));
    CUDA_OK(cudaDeviceSynchronize());
    for (int tokens : token_counts) {
      const double flops1 = 2.0 * tokens * h * n * (shape.gated ? 2 : 1), flops2 = 2.0 * tokens * h * n;
      const double floor1 = std::max(flops1 / RATE, h * n * double(ELEMENT) * (shape.gated ? 2 : 1) / 3.08e6);
      const double floor2 = std::max(flops2 / RATE, h * n * double(ELEMENT) / 3.08e6);
      const auto operands = [&](bool first, int i) {
        Operands o = {};
        const int l = i % layers;
        o.rows = first ? x : hidden;
        o.weights = first ? gate[l] : down[l];
        o.up = up[l];
        o.bias = shape.gated ? nullptr : first ? bias_n : bias_h;
        o.out = first ? hidden : out;
        o.rows_stride = o.weights_stride = o.up_stride = first ? h : n;
        o.out_stride = first ? n : h;
        o.tokens = tokens;
        o.depth = first ? h : n;
        o.columns = first ? n : h;
        o.dtype = DTYPE<T>;
        o.finish = !first ? Finish::None : shape.gated ? Finish::Swish : Finish::Gelu;
        o.slope = 1.f;
        o.weights_early = !first;
        (first ? o.clear : o.meeting) = meeting;
        return o;
      };
      const auto blas_product = [&](const T *w, const T *rows, T *to, int columns, int depth) {
        constexpr cudaDataType TYPE = IS_F32<T> ? CUDA_R_32F : CUDA_R_16BF;
        const float one = 1, zero = 0;
        CUDA_OK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, columns, tokens, depth, &one, w, TYPE, depth, rows,
                             TYPE, depth, &zero, to, TYPE, columns, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT));
      };
      const auto elementwise = [&](int) {
        FusedMlpHiddenArgs a = {};
        a.gate = hidden;
        a.up = shape.gated ? hidden2 : nullptr;
        a.bias_gate = shape.gated ? nullptr : bias_n;
        a.hidden = hidden;
        a.rows = tokens;
        a.cols = n;
        a.dtype = DTYPE<T>;
        a.activation = int(shape.gated ? Activation::Silu : Activation::Gelu);
        CUDA_OK(fused_mlp_hidden(&a, Graph::stream()));
      };
      std::vector<Candidate> firsts, seconds, blas_parts;
      for (const Variant &v : variants) {
        if (!all_tiles)
          break;
        if ((v.split > 1 || v.links > 1) && tokens > 512)
          continue;
        // What blocks meet at is cleared by a first product.
        if (v.gated == !!shape.gated && v.links == 1 && !(ampere && v.split > 1))
          firsts.push_back({name_of(v), [&](int i) { CUDA_OK(v.enqueue(operands(true, i), Graph::stream())); }, {}});
        if (!v.gated)
          seconds.push_back({name_of(v), [&](int i) { CUDA_OK(v.enqueue(operands(false, i), Graph::stream())); }, {}});
      }
      blas_parts.push_back({"cublas gate", [&](int i) { blas_product(gate[i % layers], x, hidden, n, h); }, {}});
      blas_parts.push_back({"cublas down", [&](int i) { blas_product(down[i % layers], hidden, out, h, n); }, {}});
      blas_parts.push_back({"elementwise", elementwise, {}});
      usleep(pause_us);
      time_all(blas_parts, window_us, 3);
      time_all(firsts, window_us, 3);
      time_all(seconds, window_us, 3);
      const auto best = [](std::vector<Candidate> &c) {
        std::sort(c.begin(), c.end(), [](Candidate &a, Candidate &b) { return a.median() < b.median(); });
      };
      best(firsts);
      best(seconds);
      // Alone a product overlaps with itself, launch by launch. So each once more beside the best of the other kind.
      const auto beside = [&](std::vector<Candidate> &list, const std::function<void(int)> &other, bool before) {
        std::vector<Candidate> pairs;
        for (const Candidate &c : list)
          pairs.push_back({c.name, {}, {}});
        for (size_t i = 0; i < list.size(); ++i)
          pairs[i].launch = [one = list[i].launch, other, before](int l) {
            if (before)
              other(l);
            one(l);
            if (!before)
              other(l);
          };
        time_all(pairs, window_us, 3);
        best(pairs);
        return pairs;
      };
      std::vector<Candidate> with_second, with_first;
      if (all_tiles) {
        with_second = beside(firsts, seconds[0].launch, false);
        with_first = beside(seconds, launch_of(firsts, with_second[0].name), true);
      }
      // Both together, by turns with cuBLAS and one elementwise launch.
      std::vector<Candidate> whole;
      if (all_tiles)
        whole.push_back({"both: " + with_second[0].name + " + " + with_first[0].name,
                       [one = launch_of(firsts, with_second[0].name), two = launch_of(seconds, with_first[0].name)](int i) {
                         one(i);
                         two(i);
                       },
                       {}});
      whole.push_back({"as chosen",
                       [&](int i) {
                         const Operands first = operands(true, i), second = operands(false, i);
                         FusedMlpArgs a = {};
                         a.x = first.rows;
                         a.gate = first.weights;
                         a.up = first.up;
                         a.down = second.weights;
                         a.bias_gate = first.bias;
                         a.bias_down = second.bias;
                         a.out = out;
                         a.workspace = workspace;
                         a.workspace_bytes = workspace_bytes;
                         a.x_stride = a.gate_stride = a.up_stride = h;
                         a.down_stride = n;
                         a.tokens = tokens;
                         a.hidden_size = a.output_size = int(h);
                         a.intermediate_size = int(n);
                         a.gated = shape.gated;
                         a.dtype = DTYPE<T>;
                         a.activation = int(shape.gated ? Activation::Silu : Activation::Gelu);
                         a.path = ampere ? FUSED_MLP_PATH_GEMM_AMPERE : FUSED_MLP_PATH_AUTO;
                         CUDA_OK(fused_mlp_gemm(&a, Graph::stream()));
                       },
                       {}});
      whole.push_back({"cublas + elementwise",
                       [&](int i) {
                         blas_product(gate[i % layers], x, hidden, n, h);
                         if (shape.gated)
                           blas_product(up[i % layers], x, hidden2, n, h);
                         elementwise(0);
                         blas_product(down[i % layers], hidden, out, h, n);
                         if (!shape.gated)
                           CUDA_OK(fused_mlp_add_bias(out, bias_h, tokens, h, DTYPE<T>, Graph::stream()));
                       },
                       {}});
      time_all(whole, 4 * window_us, 3);
      std::vector<Candidate> rested;
      if (!all_tiles) {
        for (const Candidate &c : whole)
          rested.push_back({c.name + ", rested", c.launch, {}});
        time_all(rested, 2500, 3, pause_us);
      }
      std::printf("== %s, %d tokens: floors %.1f + %.1f = %.1f us\n", shape.name, tokens, floor1, floor2,
                  floor1 + floor2);
      for (auto &c : blas_parts)
        std::printf("     %8.1f  %s\n", c.median(), c.name.c_str());
      for (size_t i = 0; i < firsts.size() && i < 5; ++i)
        std::printf("  1: %8.1f  %5.1f TF  %s\n", firsts[i].median(), flops1 / firsts[i].median() * 1e-6,
                    firsts[i].name.c_str());
      for (size_t i = 0; i < seconds.size() && i < 5; ++i)
        std::printf("  2: %8.1f  %5.1f TF  %s\n", seconds[i].median(), flops2 / seconds[i].median() * 1e-6,
                    seconds[i].name.c_str());
      for (size_t i = 0; i < with_second.size() && i < 4; ++i)
        std::printf(" 1+: %8.1f  %s\n", with_second[i].median(), with_second[i].name.c_str());
      for (size_t i = 0; i < with_first.size() && i < 4; ++i)
        std::printf(" +2: %8.1f  %s\n", with_first[i].median(), with_first[i].name.c_str());
      for (auto &c : rested)
        whole.push_back(c);
      for (auto &c : whole)
        std::printf("  =  %8.1f  %s\n", c.median(), c.name.c_str());
      std::fflush(stdout);
      // Everything, for the cost model.
      const auto record = [&](const char *kind, std::vector<Candidate> &list) {
        for (auto &c : list)
          std::fprintf(stderr, "%s,%d,%s,%s,%.2f\n", shape.name, tokens, kind, c.name.c_str(), c.median());
      };
      record("1", firsts);
      record("2", seconds);
      record("1+", with_second);
      record("+2", with_first);
    }
    for (auto *list : {&gate, &up, &down})
      for (T *p : *list)
        cudaFree(p);
    cudaFree(meeting);
    cudaFree(workspace);
    for (T *p : {x, hidden, hidden2, out, bias_n, bias_h})
      cudaFree(p);
  }
}

} // namespace
} // namespace fused_mlp

int main(int argc, char **argv) {
  using namespace fused_mlp;
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check") {
    const auto has = [&](const char *word) {
      return std::any_of(argv + 2, argv + argc, [&](const char *a) { return !std::strcmp(a, word); });
    };
    const bool quick = has("quick"), ampere = has("ampere"), all = !has("bf16") && !has("f16") && !has("f32");
    int failed = all || has("bf16") ? check<B>(quick, ampere) : 0;
    failed += all || has("f16") ? check<__half>(quick, ampere) : 0;
    return failed + (!ampere && (all || has("f32")) ? check<float>(quick, false) : 0);
  }
  if (mode == "accuracy")
    return accuracy();
  if ((mode == "sweep" || mode == "chosen") && argc > 4) {
    std::vector<int> tokens;
    for (int i = 5; i < argc; ++i)
      tokens.push_back(std::atoi(argv[i]));
    const char *const filter = std::strcmp(argv[3], "all") ? argv[3] : nullptr;
    (std::strcmp(argv[2], "f32") ? sweep<B> : sweep<float>)(filter, tokens, std::atof(argv[4]), mode == "sweep",
                                                            !std::strcmp(argv[2], "ampere"));
    return 0;
  }
  std::printf("usage: gemm check [quick] [ampere] [bf16] [f16] [f32] | accuracy | sweep|chosen bf16|f32|ampere SHAPE|all WINDOW_US TOKENS...\n");
  return 2;
}
