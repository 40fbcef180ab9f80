// Defines the kernels over rows.h and launches them.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "rows.h"

namespace {

// A thread's view of the cluster of blocks that works on its row.
struct Blocks {
  int rank, size, log_size;  // of the block in its cluster
  int thread, threads;

  __device__ Blocks(int rank, int size) : rank(rank), size(size), thread(threadIdx.x), threads(blockDim.x) {
#ifdef __CUDA_ARCH__  // the host's compiler does not know __ffs
    log_size = __ffs(size) - 1;
#endif
  }

  // Shared memory holds the mailbox, then a number for each class of kinds that compare.
  IN_KERNEL Mailbox* mailbox() {
    extern __shared__ __align__(16) char bytes[];
    return reinterpret_cast<Mailbox*>(bytes);
  }
  IN_KERNEL Mailbox* mailbox_of(int block) {
    return cooperative_groups::this_cluster().map_shared_rank(mailbox(), block);
  }
  template <class Own>
  IN_KERNEL Own* own() {
    return reinterpret_cast<Own*>(mailbox() + 1) + thread;
  }

  template <int K>
  IN_KERNEL void from_lane(const float (&values)[K], int distance, float (&others)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) others[k] = __shfl_xor_sync(0xffffffff, values[k], distance);
  }
  IN_KERNEL bool any(bool x) { return __any_sync(0xffffffff, x); }  // of a warp
  IN_KERNEL void wait_for_block() { __syncthreads(); }
  IN_KERNEL void arrive(bool wrote) {
    if (wrote)
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    else
      asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  IN_KERNEL void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
};

template <Kind KIND, bool PLAIN, class T>
__global__ __launch_bounds__(MOST_THREADS, 2) void rows(const __grid_constant__ Call call, int rows_of_cluster) {
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  Blocks blocks(cluster.block_rank(), cluster.num_blocks());
  compute_rows<KIND, PLAIN, T>(blocks, call, (blockIdx.x >> blocks.log_size) * rows_of_cluster, rows_of_cluster);
}

__global__ void nothing() {}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that no later call reports it
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// A launch, and the cluster that is one of its attributes.
struct Launch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Launch(int64_t blocks, const Plan& plan, int shared_bytes, cudaStream_t stream) {
    if (blocks > 0x7fffffff) check(cudaErrorInvalidValue, "a grid of more than 2^31 blocks");
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(plan.cluster), 1, 1};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(plan.threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

template <Kind KIND, bool PLAIN, class T>
struct Kernel {
  static constexpr auto function = rows<KIND, PLAIN, T>;
  static int shared_bytes(int threads) {
    return sizeof(Mailbox) + threads * (!PLAIN ? sizeof(Held<T>) : COMPARES<KIND> ? sizeof(Compared<T>) : 0);
  }

  // Returns the largest cluster that the current device runs; the first call on a device asks it. A partition of a
  // device (MIG) may have no group of multiprocessors that fits a large cluster.
  static int largest_cluster() {
    static std::atomic<int> largest[64];  // of each device; 0: not known yet
    int device;
    check(cudaGetDevice(&device), "cudaGetDevice");
    if (device < 64 && largest[device]) return largest[device];
    const int bytes = shared_bytes(MOST_THREADS);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
    int size = MOST_BLOCKS;
    for (int clusters = 0; size > 1; size /= 2) {
      Launch launch(size, {size, MOST_THREADS}, bytes, nullptr);
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, function, &launch.config);
      if (error == cudaErrorInvalidClusterSize) {
        cudaGetLastError();  // no device of this kind runs such a cluster
        continue;
      }
      check(error, "cudaOccupancyMaxActiveClusters");
      if (clusters > 0) break;
    }
    if (device < 64) largest[device] = size;
    return size;
  }

  static void launch(const Call& call, cudaStream_t stream) {
    const Plan plan = ::plan(call.classes, sizeof(T), aligned(call, sizeof(T)));
    const int largest = largest_cluster();
    if (plan.cluster == 0 || plan.cluster > largest)
      throw std::runtime_error(
          "the row is too long for the " + std::to_string(largest) + " blocks of this device's largest cluster; use "
          "backend='triton'");
    const int each = rows_of_cluster(call, plan.cluster);
    const Launch launch((call.count + each - 1) / each * plan.cluster, plan, shared_bytes(plan.threads), stream);
    check(cudaLaunchKernelEx(&launch.config, function, call, each), "cudaLaunchKernelEx");
  }
};

}  // namespace

void launch_rows(const Call& call, Element element, Kind kind, void* stream) try {
  with_arguments(call, element, kind, [&](auto kind_is, auto plain_is, auto x) {
    Kernel<kind_is.value, plain_is.value, decltype(x)>::launch(call, static_cast<cudaStream_t>(stream));
  });
} catch (const std::runtime_error& error) {
  const char* const kinds[] = {"soft_cross_entropy", "kl_div", "reverse_kl", "jsd", "tvd", "mixture"};
  const char* const elements[] = {"float32", "float16", "bfloat16"};
  throw std::runtime_error(
      std::string("fastdistill: ") + kinds[int(kind)] + " of " + std::to_string(call.count) + " rows of " +
      std::to_string(call.classes) + " classes in " + elements[int(element)] + ": " + error.what());
}

// Launches an empty kernel on the current device; returns the error, or null. A binary may load on a driver that is too
// old to run it.
extern "C" const char* fastdistill_probe() {
  nothing<<<1, 1>>>();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
