// Runs the kernels' algorithm on a CPU, for tests without GPU and torch. Every thread of a cluster is a coroutine,
// which yields at a barrier until all others have reached it.
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

using std::max;
using std::min;

#include "launch.h"
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

// Shared memory starts as NaN, so that a read before a write shows.
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<float4> shared;

  Block(const Plan& plan) : warps(plan.threads / 32), shared(plan.shared_bytes / sizeof(float4)) {
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
  int rank, size, thread, threads;
  Simulation& simulation;
  ucontext_t context;
  bool done = false;
  int generation = 0, exchanges = 0;

  Thread(Simulation& simulation, const Plan& plan, int rank, int thread)
      : rank(rank), size(plan.cluster), thread(thread), threads(plan.threads), simulation(simulation) {}

  Block& block() { return simulation.blocks[rank]; }
  Mailbox* mailbox() { return mailbox_of(rank); }
  Mailbox* mailbox_of(int other) { return reinterpret_cast<Mailbox*>(simulation.blocks[other].shared.data()); }
  template <class Own>
  Own* own() { return reinterpret_cast<Own*>(mailbox() + 1) + thread; }

  void until(const Barrier& barrier, int generation) {
    while (barrier.generation == generation) swapcontext(&context, &simulation.scheduler);
  }
  template <int K>
  void from_lane(const float (&values)[K], int distance, float (&others)[K]) {
    Warp& warp = block().warps[thread / 32];
    auto& left = warp.left[exchanges++ % 2];  // no thread is two exchanges ahead
    std::copy(values, values + K, left[thread % 32]);
    until(warp.barrier, warp.barrier.arrive());
    std::copy(left[(thread % 32) ^ distance], left[(thread % 32) ^ distance] + K, others);
  }
  void wait_for_block() { until(block().barrier, block().barrier.arrive()); }
  void arrive(bool) { generation = simulation.barrier.arrive(); }
  void wait() { until(simulation.barrier, generation); }
};

template <Kind KIND, class T>
struct Task {
  const Problem<T>& problem;
  bool held;
  int row;

  void run(Thread& thread) const {
    held ? held_row<KIND>(thread, problem, row) : streamed_row<KIND>(thread, problem, row);
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

// `backwards` runs the last thread of the last block first. Results must not depend on it.
template <class Task>
void run_row(const Task& task, const Plan& plan, bool backwards, char* stacks) {
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
  for (int left = count; left > 0;) {
    for (int i = 0; i < count; ++i) {
      Thread& thread = *threads[backwards ? count - 1 - i : i];
      if (thread.done) continue;
      swapcontext(&simulation.scheduler, &thread.context);
      left -= thread.done;
    }
  }
}

template <Kind KIND, class T>
void simulate_as(const Call& c, const Plan& plan, bool backwards) {
  const Problem<T> problem{
      static_cast<const T*>(c.student), static_cast<const T*>(c.teacher), c.labels, c.counted, c.weight, c.expected,
      c.loss, static_cast<T*>(c.gradient), c.student_rows, c.teacher_rows, int(c.width), int(c.classes), c.temperature,
      {c.beta, c.teacher_kl, c.student_kl}, c.soft_weight, c.hard_weight, {c.student_scale, c.student_softcap},
      {c.teacher_scale, c.teacher_softcap}, c.student_scale};
  const std::unique_ptr<char[]> stacks(new char[size_t(plan.cluster) * plan.threads * STACK_BYTES]);
  for (int row = 0; row < c.count; ++row)
    run_row(Task<KIND, T>{problem, plan.held, row}, plan, backwards, stacks.get());
}

template <class T>
void simulate_kind(const Call& c, int kind, const Plan& plan, bool backwards) {
  switch (Kind(kind)) {
    case Kind::soft_cross_entropy: return simulate_as<Kind::soft_cross_entropy, T>(c, plan, backwards);
    case Kind::kl_div: return simulate_as<Kind::kl_div, T>(c, plan, backwards);
    case Kind::reverse_kl: return simulate_as<Kind::reverse_kl, T>(c, plan, backwards);
    case Kind::jsd: return simulate_as<Kind::jsd, T>(c, plan, backwards);
    case Kind::tvd: return simulate_as<Kind::tvd, T>(c, plan, backwards);
    case Kind::mixture: return simulate_as<Kind::mixture, T>(c, plan, backwards);
  }
}

}  // namespace

extern "C" {

void plan_of(int64_t classes, int element_bytes, int aligned, int largest_cluster, int shared_bytes, int* out) {
  const Plan p = plan(classes, element_bytes, aligned, {largest_cluster, shared_bytes});
  const int values[] = {p.held, p.cluster, p.threads, p.shared_bytes};
  std::copy(values, values + 4, out);
}

int two_strides(const int64_t* sizes, const int64_t* strides, int dims, int64_t* out) {
  Rows rows{};
  const bool found = rows_of(sizes, strides, dims, &rows);
  out[0] = rows.inner, out[1] = rows.outer_stride, out[2] = rows.inner_stride;
  return found;
}

void simulate(const Call* call, int element, int kind, int held, int cluster, int threads, int backwards) {
  const int bytes = element == 0 ? 4 : 2;
  const Plan plan{held != 0, cluster, threads, int(sizeof(Mailbox)) + threads * own_bytes(held, bytes)};
  switch (Element(element)) {
    case Element::float32: return simulate_kind<float>(*call, kind, plan, backwards);
    case Element::float16: return simulate_kind<__half>(*call, kind, plan, backwards);
    case Element::bfloat16: return simulate_kind<__nv_bfloat16>(*call, kind, plan, backwards);
  }
}

}  // extern "C"
