// Runs the kernels' algorithm on a CPU, for tests without GPU and torch. Every thread of a cluster is a coroutine,
// which yields at a barrier until all others have reached it.
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

using std::max;
using std::min;

#include "rows.h"

namespace {

constexpr size_t STACK_BYTES = 32 << 10;

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;

  int arrive() {
    const int mine = generation;
    if (++arrived == expected) arrived = 0, ++generation;
    return mine;
  }
};

struct Warp {
  Barrier barrier;
  float left[2][32][MOST_VALUES];
};

// Shared memory starts as NaN, so that a read before a write shows. It exists from the block's first thread until its
// last one ends.
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<float4> shared;
  int begun = 0, ended = 0;  // of its threads

  Block(const Plan& plan)
      : warps(plan.threads / 32), shared(sizeof(Mailbox) / sizeof(float4) + plan.threads * (sizeof(Held<__half>) / sizeof(float4))) {
    barrier.expected = plan.threads;
    for (Warp& warp : warps) warp.barrier.expected = 32;
    std::fill(shared.begin(), shared.end(), make_float4(NAN, NAN, NAN, NAN));
  }
};

struct Simulation {
  ucontext_t scheduler;
  Barrier barrier;  // of the cluster
  std::vector<Block> blocks;
};

// The counterpart of Blocks in rows.cu.
struct Thread {
  int rank, size, log_size, thread, threads;
  Simulation& simulation;
  ucontext_t context;
  bool done = false;
  int generation = 0, exchanges = 0;
  const Barrier* stops_at = nullptr;
  int stopped = 0;  // the barrier's generation

  Thread(Simulation& simulation, const Plan& plan, int rank, int thread)
      : rank(rank), size(plan.cluster), log_size(__builtin_ctz(plan.cluster)), thread(thread), threads(plan.threads),
        simulation(simulation) {}

  Block& block() { return simulation.blocks[rank]; }
  Mailbox* mailbox() { return mailbox_of(rank); }
  // What is written to a block that has not started or has ended is lost.
  Mailbox* mailbox_of(int other) {
    static Mailbox lost;
    Block& block = simulation.blocks[other];
    return block.begun > 0 && block.ended < threads ? reinterpret_cast<Mailbox*>(block.shared.data()) : &lost;
  }
  template <class Own>
  Own* own() { return reinterpret_cast<Own*>(mailbox() + 1) + thread; }

  bool waits() const { return stops_at && stops_at->generation == stopped; }
  void until(const Barrier& barrier, int generation) {
    stops_at = &barrier, stopped = generation;
    if (waits()) swapcontext(&context, &simulation.scheduler);
  }
  // Leaves values for the other lanes of the warp; returns what each lane has left.
  template <int K>
  float (&exchange(const float (&values)[K]))[32][MOST_VALUES] {
    Warp& warp = block().warps[thread / 32];
    auto& left = warp.left[exchanges++ % 2];  // no thread is two exchanges ahead
    std::copy(values, values + K, left[thread % 32]);
    until(warp.barrier, warp.barrier.arrive());
    return left;
  }
  template <int K>
  void from_lane(const float (&values)[K], int distance, float (&others)[K]) {
    const auto& left = exchange(values)[(thread % 32) ^ distance];
    std::copy(left, left + K, others);
  }
  bool any(bool x) {
    const auto& left = exchange<1>({float(x)});
    return std::any_of(left, left + 32, [](const float* lane) { return *lane != 0; });
  }
  void wait_for_block() { until(block().barrier, block().barrier.arrive()); }
  // Of how many sweeps over all threads it takes one, if threads run at unequal speeds.
  int pace() const { return rank % 2 ? 576 : thread / 32 % 2 ? 24 : 1; }
  void arrive(bool) { generation = simulation.barrier.arrive(); }
  void wait() { until(simulation.barrier, generation); }
};

template <Kind KIND, bool PLAIN, class T>
struct Task {
  const Call& call;
  int row, count;

  void run(Thread& thread) const {
    ++thread.block().begun;
    compute_rows<KIND, PLAIN, T>(thread, call, row, count);
    ++thread.block().ended;
    thread.done = true;
  }
};

// makecontext only passes integers: pointers are split in two.
template <class Task>
void enter(unsigned task_high, unsigned task_low, unsigned thread_high, unsigned thread_low) {
  const auto pointer = [](unsigned high, unsigned low) { return uintptr_t(high) << 32 | low; };
  Thread& thread = *reinterpret_cast<Thread*>(pointer(thread_high, thread_low));
  reinterpret_cast<const Task*>(pointer(task_high, task_low))->run(thread);
  setcontext(&thread.simulation.scheduler);
}

// `backwards` runs the last thread of the last block first, and at unequal speeds: every second warp starts late and is
// slow, and every second block even more so. Results must not depend on it.
template <class Task>
void run_cluster(const Task& task, const Plan& plan, bool backwards, char* stacks) {
  Simulation simulation{{}, {}, std::vector<Block>(plan.cluster, Block(plan))};
  const int count = plan.cluster * plan.threads;
  simulation.barrier.expected = count;
  std::vector<std::unique_ptr<Thread>> threads;
  for (int i = 0; i < count; ++i) {
    threads.push_back(std::make_unique<Thread>(simulation, plan, i / plan.threads, i % plan.threads));
    Thread& thread = *threads.back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks + i * STACK_BYTES;
    thread.context.uc_stack.ss_size = STACK_BYTES;
    const auto high = [](const void* p) { return unsigned(reinterpret_cast<uintptr_t>(p) >> 32); };
    const auto low = [](const void* p) { return unsigned(reinterpret_cast<uintptr_t>(p)); };
    makecontext(
        &thread.context, reinterpret_cast<void (*)()>(&enter<Task>), 4, high(&task), low(&task), high(&thread),
        low(&thread));
  }
  for (int left = count, sweep = 1; left > 0; ++sweep) {
    for (int i = 0; i < count; ++i) {
      Thread& thread = *threads[backwards ? count - 1 - i : i];
      if (thread.done || thread.waits() || (backwards && sweep % thread.pace())) continue;
      swapcontext(&simulation.scheduler, &thread.context);
      left -= thread.done;
    }
  }
}

}  // namespace

extern "C" {

void plan_of(int64_t classes, int element_bytes, int aligned, int* out) {
  const Plan p = plan(classes, element_bytes, aligned);
  out[0] = p.cluster, out[1] = p.threads;
}

int two_strides(const int64_t* sizes, const int64_t* strides, int dims, int64_t* out) {
  Rows rows{};
  const bool found = rows_of(sizes, strides, dims, &rows);
  out[0] = rows.inner, out[1] = rows.outer_stride, out[2] = rows.inner_stride;
  return found;
}

void simulate(const Call* call, int element, int kind, int cluster, int threads, int backwards) {
  const Plan plan{cluster, threads};
  const std::unique_ptr<char[]> stacks(new char[size_t(cluster) * threads * STACK_BYTES]);
  const int each = rows_of_cluster(*call, cluster);
  with_arguments(*call, Element(element), Kind(kind), [&](auto kind_is, auto plain_is, auto x) {
    for (int row = 0; row < call->count; row += each)
      run_cluster(Task<kind_is.value, plain_is.value, decltype(x)>{*call, row, each}, plan, backwards, stacks.get());
  });
}

}  // extern "C"
