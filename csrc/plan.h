// Plans the launch for rows of a given number of classes. Plain C++: no CUDA, no torch.
#pragma once

#include <cstdint>

constexpr int VECTOR_BYTES = 16;
constexpr int HELD = 4;            // vectors of each side that a thread holds
constexpr int MOST_THREADS = 512;  // two such blocks fill a multiprocessor: 64 registers and 208 bytes a thread
constexpr int MOST_BLOCKS = 16;    // of a cluster; more than 8 is not portable: the launch asks the device first

// Returns the shared memory of a thread: the student's vectors, the teacher's in float32, and one of scratch.
constexpr int own_bytes(bool held, int element_bytes) {
  return (held ? HELD * (VECTOR_BYTES + VECTOR_BYTES / element_bytes * int(sizeof(float))) : 0) + VECTOR_BYTES;
}

// The start of a block's shared memory: the values that its warps and the blocks of its cluster exchange in each round.
constexpr int ROUNDS = 3;
constexpr int MOST_VALUES = 5;
struct Mailbox {
  float of_warp[ROUNDS][MOST_THREADS / 32][MOST_VALUES];
  float of_block[ROUNDS][MOST_BLOCKS][MOST_VALUES];
};

struct Plan {
  bool held;         // the row stays on chip and is read once; otherwise it is streamed, two or three times
  int cluster;       // blocks a row
  int threads;       // a block
  int shared_bytes;  // a block
};

struct Device {
  int largest_cluster;  // 0 before sm_90
  int shared_bytes;     // that a block may have
};

// `aligned`: every row starts at a multiple of 16 bytes.
inline Plan plan(int64_t classes, int element_bytes, bool aligned, const Device& device) {
  const int vector = VECTOR_BYTES / element_bytes;
  // A row that starts inside a vector may touch one vector more than it fills.
  const int64_t vectors = (classes + (aligned ? 0 : vector - 1) + vector - 1) / vector;
  for (int cluster = 1; cluster <= device.largest_cluster; cluster *= 2) {
    const int64_t of_block = (vectors + cluster - 1) / cluster;
    const int64_t threads = (of_block + 32 * HELD - 1) / (32 * HELD) * 32;
    const int64_t shared_bytes = sizeof(Mailbox) + threads * own_bytes(true, element_bytes);
    if (threads <= MOST_THREADS && shared_bytes <= device.shared_bytes)
      return {true, cluster, int(threads), int(shared_bytes)};
  }
  const int64_t wanted = (vectors + 31) / 32 * 32;
  const int threads = wanted < MOST_THREADS ? int(wanted) : MOST_THREADS;
  return {false, 1, threads, int(sizeof(Mailbox)) + threads * own_bytes(false, element_bytes)};
}

// Row i of x[..., :] starts at i / inner * outer_stride + i % inner * inner_stride. No single stride leads from each
// row of logits like y[:, :-1] to the next; two strides reach them without a copy.
struct Rows {
  int64_t inner, outer_stride, inner_stride;
};

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
