// Defines the kernels over rows.h and launches them.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "rows.h"

namespace {

// A thread's view of the cluster of blocks that works on its row.
struct Blocks {
  int rank, size;  // of the block in its cluster
  int thread, threads;

  __device__ Blocks(int rank, int size) : rank(rank), size(size), thread(threadIdx.x), threads(blockDim.x) {}

  // Shared memory holds the mailbox, then each thread's own part.
  IN_KERNEL Mailbox* mailbox() {
    extern __shared__ __align__(16) char bytes[];
    return reinterpret_cast<Mailbox*>(bytes);
  }
  template <class Own>
  IN_KERNEL Own* own() {
    static_assert(sizeof(Mailbox) % alignof(Own) == 0);
    return reinterpret_cast<Own*>(mailbox() + 1) + thread;
  }

  template <int K>
  IN_KERNEL void from_lane(const float (&values)[K], int distance, float (&others)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) others[k] = __shfl_xor_sync(0xffffffff, values[k], distance);
  }
  IN_KERNEL void wait_for_block() { __syncthreads(); }

#if __CUDA_ARCH__ >= 900
  IN_KERNEL Mailbox* mailbox_of(int block) {
    return cooperative_groups::this_cluster().map_shared_rank(mailbox(), block);
  }
  IN_KERNEL void arrive(bool wrote) {
    if (size == 1) return;
    if (wrote)
      asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    else
      asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  IN_KERNEL void wait() {
    if (size > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  }
#else
  IN_KERNEL Mailbox* mailbox_of(int) { return mailbox(); }
  IN_KERNEL void arrive(bool) {}
  IN_KERNEL void wait() {}
#endif
};

template <Kind KIND, class T>
__global__ __launch_bounds__(MOST_THREADS, 2) void held_rows(
    [[maybe_unused]] const __grid_constant__ Problem<T> problem) {
#if __CUDA_ARCH__ >= 900
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  Blocks blocks(cluster.block_rank(), cluster.num_blocks());
  held_row<KIND>(blocks, problem, blockIdx.x / blocks.size);
#endif
}

template <Kind KIND, class T>
__global__ __launch_bounds__(MOST_THREADS, 2) void streamed_rows(const __grid_constant__ Problem<T> problem) {
  Blocks blocks(0, 1);
  streamed_row<KIND>(blocks, problem, blockIdx.x);
}

static_assert(sizeof(Held<float>) == own_bytes(true, 4) && sizeof(Held<__half>) == own_bytes(true, 2));
static_assert(sizeof(Vector<float>) == own_bytes(false, 4) && sizeof(Vector<__half>) == own_bytes(false, 2));

const char* const KINDS[] = {"soft_cross_entropy", "kl_div", "reverse_kl", "jsd", "tvd", "mixture"};

struct Launch {
  const Call& call;
  Element element;
  int kind;
  Plan plan;

  void check(cudaError_t error, const char* what) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that no later call reports it
    const char* const elements[] = {"float32", "float16", "bfloat16"};
    throw std::runtime_error(
        std::string("fastdistill: ") + what + " failed: " + cudaGetErrorString(error) + " (" + KINDS[kind] + " of " +
        std::to_string(call.count) + " rows of " + std::to_string(call.classes) + " classes in " +
        elements[int(element)] + ", " + std::to_string(plan.cluster) + " blocks of " + std::to_string(plan.threads) +
        " threads a row" + (plan.held ? ")" : ", streamed)"));
  }
};

Device current_device(const Launch& launch) {
  int device, major, shared;
  launch.check(cudaGetDevice(&device), "cudaGetDevice");
  launch.check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  launch.check(
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return {major >= 9 ? MOST_BLOCKS : 0, shared};
}

template <Kind KIND, class T>
void launch_as(Launch launch, cudaStream_t stream) {
  const Call& c = launch.call;
  const Problem<T> problem{
      static_cast<const T*>(c.student), static_cast<const T*>(c.teacher), c.labels, c.counted, c.weight, c.expected,
      c.loss, static_cast<T*>(c.gradient), c.student_rows, c.teacher_rows, int(c.width), int(c.classes), c.temperature,
      {c.beta, c.teacher_kl, c.student_kl}, c.soft_weight, c.hard_weight, {c.student_scale, c.student_softcap},
      {c.teacher_scale, c.teacher_softcap}, c.student_scale};
  Device device = current_device(launch);
  for (;;) {
    Plan& plan = launch.plan = ::plan(c.classes, sizeof(T), aligned(c, sizeof(T)), device);
    void (*const kernel)(Problem<T>) = plan.held ? held_rows<KIND, T> : streamed_rows<KIND, T>;
    if (c.count * plan.cluster > 0x7fffffff) launch.check(cudaErrorInvalidValue, "a grid of more than 2^31 blocks");
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(plan.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(c.count * plan.cluster));
    config.blockDim = dim3(unsigned(plan.threads));
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    if (plan.held) {
      // The limit belongs to the kernel, not to the launch. Set it to all shared memory, since another thread may be
      // about to launch the kernel for longer rows.
      launch.check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes),
          "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    }
    if (plan.cluster > 1) {
      config.attrs = &cluster;
      config.numAttrs = 1;
    }
    if (plan.cluster > 8) {
      launch.check(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)");
      // A partition of a device (MIG) may have no group of multiprocessors that fits so large a cluster.
      int clusters = 0;
      launch.check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
      if (clusters == 0) {
        device.largest_cluster = 8;
        continue;
      }
    }
    launch.check(cudaLaunchKernelEx(&config, kernel, problem), "cudaLaunchKernelEx");
    return;
  }
}

template <class T>
void launch_kind(const Launch& launch, cudaStream_t stream) {
  switch (Kind(launch.kind)) {
    case Kind::soft_cross_entropy: return launch_as<Kind::soft_cross_entropy, T>(launch, stream);
    case Kind::kl_div: return launch_as<Kind::kl_div, T>(launch, stream);
    case Kind::reverse_kl: return launch_as<Kind::reverse_kl, T>(launch, stream);
    case Kind::jsd: return launch_as<Kind::jsd, T>(launch, stream);
    case Kind::tvd: return launch_as<Kind::tvd, T>(launch, stream);
    case Kind::mixture: return launch_as<Kind::mixture, T>(launch, stream);
  }
}

}  // namespace

void launch_rows(const Call& call, Element element, int kind, void* stream) {
  const Launch launch{call, element, kind, {}};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (element) {
    case Element::float32: return launch_kind<float>(launch, on);
    case Element::float16: return launch_kind<__half>(launch, on);
    case Element::bfloat16: return launch_kind<__nv_bfloat16>(launch, on);
  }
}
