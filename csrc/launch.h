// What the binding, the kernels and the simulation share: a call, and the plan of its launch. Plain C++, without CUDA or
// torch.
#pragma once

#include <cstdint>
#include <initializer_list>

constexpr int VECTOR_BYTES = 16;
constexpr int HELD = 8;            // vectors of each side that a thread holds: 64 registers
constexpr int MOST_THREADS = 256;  // two such blocks fill a multiprocessor with 128 registers a thread
constexpr int MOST_BLOCKS = 16;    // of a cluster; more than 8 are not portable
constexpr int CHUNK = 32;          // rows that a cluster checks at once in the backward: one a lane

enum class Element { float32, float16, bfloat16 };
enum class Kind { soft_cross_entropy, kl_div, reverse_kl, jsd, tvd, mixture };

// Row i of x[..., :] starts at i / inner * outer_stride + i % inner * inner_stride. No single stride leads from each
// row of logits like y[:, :-1] to the next; two strides reach them without a copy.
struct Rows {
  int64_t inner, outer_stride, inner_stride;
};

struct Call {
  const void* student;    // (N, >= V)
  const void* teacher;    // (N, >= V)
  const int64_t* labels;  // (N); null: no labels
  const bool* counted;    // (N); null: all rows count
  const float* weight;    // (N), of each row's gradient; null: 1
  const float* expected;  // (N), the weights that the gradient was written with; null: it was not written yet
  float* loss;            // (N)
  void* gradient;         // (N, width), contiguous; null: not wanted
  Rows student_rows, teacher_rows;
  int64_t count;           // N
  int64_t width, classes;  // of a row of the gradient, zero from V on; V
  float temperature, beta, teacher_kl, student_kl, soft_weight, hard_weight;  // teacher_kl, student_kl: w_t, w_s
  float student_scale, teacher_scale, student_softcap, teacher_softcap;       // a softcap of 0: none
};

// Returns whether every row of all three tensors starts at a multiple of 16 bytes.
inline bool aligned(const Call& c, int element_bytes) {
  uintptr_t all = uintptr_t(c.student) | uintptr_t(c.teacher) | uintptr_t(c.gradient) | c.width * element_bytes;
  for (const Rows& rows : {c.student_rows, c.teacher_rows})
    all |= (rows.outer_stride | rows.inner_stride) * element_bytes;
  return all % VECTOR_BYTES == 0;
}

// Returns whether the call needs nothing but plain logits in aligned rows, for which the kernels have a shorter case.
inline bool plain(const Call& c, int element_bytes) {
  return !c.labels && c.student_scale == 1 && c.teacher_scale == 1 && !c.student_softcap && !c.teacher_softcap &&
         aligned(c, element_bytes);
}

struct Plan {
  int cluster;  // blocks a row; 0: no cluster holds it
  int threads;  // a block
};

// Returns the smallest cluster that holds a row. An unaligned row may touch one vector more than it fills.
inline Plan plan(int64_t classes, int element_bytes, bool aligned) {
  const int size = VECTOR_BYTES / element_bytes;
  const int64_t vectors = (classes + (aligned ? 0 : size - 1) + size - 1) / size;
  for (int cluster = 1; cluster <= MOST_BLOCKS; cluster *= 2) {
    const int64_t of_block = (vectors + cluster - 1) / cluster;
    const int64_t threads = (of_block + 32 * HELD - 1) / (32 * HELD) * 32;
    if (threads <= MOST_THREADS) return {cluster, int(threads)};
  }
  return {0, MOST_THREADS};
}

// Returns how many rows a cluster takes: one in the forward, and in the backward, which may find them all right, so
// many that about a thousand blocks are launched.
inline int rows_of_cluster(const Call& c, int cluster) {
  if (!c.expected) return 1;
  const int64_t rows = c.count * cluster / 1024;
  return rows < 1 ? 1 : rows > CHUNK ? CHUNK : int(rows);
}

// Returns false if two strides cannot reach the rows.
inline bool rows_of(const int64_t* sizes, const int64_t* strides, int dims, Rows* rows) {
  if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) return false;
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};  // of the leading dimensions; adjacent ones are merged
  int found = 0;
  for (int i = 0; i < dims - 1; ++i) {
    if (sizes[i] == 1) continue;
    if (found && stride[found - 1] == strides[i] * sizes[i]) {
      size[found - 1] *= sizes[i];
      stride[found - 1] = strides[i];
    } else if (found == 2) {
      return false;
    } else {
      size[found] = sizes[i];
      stride[found++] = strides[i];
    }
  }
  *rows = found == 2 ? Rows{size[1], stride[0], stride[1]} : Rows{size[0] ? size[0] : 1, 0, stride[0]};
  return true;
}

// Launches on the current device. Throws std::runtime_error with the CUDA call that failed and the shape.
void launch_rows(const Call& call, Element element, Kind kind, void* stream);
