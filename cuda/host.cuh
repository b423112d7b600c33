// What launchers share: the launch itself, what they know of devices, and what they remember of calls.
#pragma once
#include "fused_mlp.h"
#include <atomic>
#include <cuda_runtime.h>
#include <memory>
#include <mutex>
#include <new>

namespace fused_mlp {

template <typename A, typename B> __host__ __device__ constexpr int divide_up(A a, B b) {
  return static_cast<int>((a + b - 1) / b);
}

struct Launch {
  int blocks, threads, shared_bytes;
  bool programmatic; // it may begin while the kernel before ends
  int cluster = 0;   // blocks of one, for a kernel that runs in clusters
};

template <typename... Arguments>
int launch_kernel(void (*kernel)(Arguments...), const Launch &launch, cudaStream_t stream, const Arguments &...arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.blocks);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (launch.cluster > 0) {
    cudaLaunchAttribute &attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  }
  if (launch.programmatic) {
    cudaLaunchAttribute &attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// What is known of each device.
template <typename T> class PerDevice {
  struct Entry {
    std::atomic<bool> ready{false};
    T value = {};
  };
  static constexpr int MOST = 64;
  Entry entries[MOST];
  std::mutex mutex;

public:
  // The current device's, which `look_up` finds out at its first call: then it is one atomic load. A failure is tried again.
  template <typename LookUp> int get(T *value, LookUp look_up) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
      return error;
    if (device >= MOST)
      return FUSED_MLP_UNSUPPORTED;
    Entry &entry = entries[device];
    if (!entry.ready.load(std::memory_order_acquire)) {
      const std::lock_guard<std::mutex> lock(mutex);
      // Another thread may have found it meanwhile, and others read it already.
      if (!entry.ready.load(std::memory_order_relaxed)) {
        const int status = look_up(device, &entry.value);
        if (status != FUSED_MLP_OK)
          return status;
        entry.ready.store(true, std::memory_order_release);
      }
    }
    *value = entry.value;
    return FUSED_MLP_OK;
  }
};

// What was found for a key, for a thread that asks for the same few again and again.
template <typename Key, typename Found, int PLACE_BITS> class Memory {
  struct Place {
    Key key;
    Found found;
    bool known;
  };
  const std::unique_ptr<Place[]> places{new (std::nothrow) Place[1 << PLACE_BITS]()};

public:
  // What `find` gave for this key, or gives now. A place belongs to the last key of its hash; a failure is not remembered.
  template <typename Find> int get(const Key &key, unsigned long long hash, Found *found, Find find) {
    if (!places)
      return cudaErrorMemoryAllocation;
    Place &place = places[hash * 0x9e3779b97f4a7c15ull >> (64 - PLACE_BITS)];
    if (!place.known || !(place.key == key)) {
      place.known = false;
      const int status = find(&place.found);
      if (status != FUSED_MLP_OK)
        return status;
      place.key = key;
      place.known = true;
    }
    *found = place.found;
    return FUSED_MLP_OK;
  }
};

} // namespace fused_mlp
