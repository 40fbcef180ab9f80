// The interface between the binding, which uses torch, and the kernels, which do not.
#pragma once

#include <cstdint>

#include "plan.h"

enum class Element { float32, float16, bfloat16 };

// `Problem` of rows.h without its element type.
struct Call {
  const void* student;    // (N, >= V)
  const void* teacher;    // (N, >= V)
  const int64_t* labels;  // (N) or null
  const bool* counted;    // (N) or null
  const float* weight;    // (N) or null
  const float* expected;  // (N) or null
  float* loss;            // (N)
  void* gradient;         // (N, width) or null
  Rows student_rows, teacher_rows;
  int64_t count;  // N
  int64_t width, classes;
  float temperature, beta, teacher_kl, student_kl, soft_weight, hard_weight;
  float student_scale, teacher_scale, student_softcap, teacher_softcap;  // a softcap of 0: none
};

// Returns whether every row of the call starts at a multiple of 16 bytes. Other rows may touch one vector more than
// they fill.
inline bool aligned(const Call& call, int element_bytes) {
  const Rows& rows = call.student_rows;
  return (reinterpret_cast<uintptr_t>(call.student) | uintptr_t(rows.outer_stride * element_bytes) |
          uintptr_t(rows.inner_stride * element_bytes)) % VECTOR_BYTES == 0;
}

// Launches on the current device. Throws std::runtime_error with the CUDA call that failed and the shape.
void launch_rows(const Call& call, Element element, int kind, void* stream);
