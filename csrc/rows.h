// Losses over classes, one row at a time: computes the loss and, if wanted, its gradient in the student's logits.
//
// With x = z - max z, e = exp(x / T), Z = sum e, p = e / Z of each side, every class adds to the sums and has a
// gradient:
//
//     kind                loss                               a class adds            gradient
//     soft_cross_entropy  log Z_s - A / (T Z_t)              A: e_t x_s              (p_s - p_t) / T
//     kl_div              A / (T Z_t) - log(Z_t / Z_s)       A: e_t (x_t - x_s)      (p_s - p_t) / T
//     reverse_kl          A / (T Z_s) - log(Z_s / Z_t)       A: e_s c                p_s (c - E_s[c]) / T^2
//                                                            c = x_s - x_t
//     jsd                 sum of -beta p_t log(m / p_t) + (1 - beta) p_s c           (1 - beta) p_s (c - E_s[c]) / T
//                                                            c = -log(m / p_s)
//     tvd                 sum of |p_s - p_t| / 2             c = sgn(p_s - p_t)      p_s (c - E_s[c]) / 2T
//     mixture             sum of -w_t p_t log(m / p_t) - w_s p_s log(m / p_s) - bend d
//                                                                                    p_s (c - E_s[c]) / T
//                                                            c = -w_s log(m / p_s) - (1 - beta) bend d / m
//
// where m = beta p_t + (1 - beta) p_s, d = p_t - p_s and bend = (1 - beta) w_t - beta w_s. jsd is the mixture with
// w_t = beta and w_s = 1 - beta, so bend = 0. `bend d` is the part of a term that is linear in d; over the classes it
// adds up to 0, so it is left out of the sum. Each class's difference is taken before the sum, so a student near its
// teacher keeps its digits.
//
// `held_row` is a thread's work on a row that its cluster of blocks holds on chip; `streamed_row` its work on a longer
// row, which its block reads two or three times. Both are templates over the cluster, which provides threads, blocks,
// barriers and access to another block's memory. rows.cu defines it for a GPU, simulate.cpp for tests without one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "plan.h"

#ifdef __CUDACC__
#define IN_KERNEL __device__ __forceinline__
#else
#define IN_KERNEL inline
#endif

enum class Kind { soft_cross_entropy, kl_div, reverse_kl, jsd, tvd, mixture };

struct Mixture {
  float beta, teacher_kl, student_kl;  // w_t, w_s
};

// How a side's logits follow from the stored ones: scale, then softcap.
struct Shape {
  float gain;     // scale / softcap, or the scale; 0: logits are as stored
  float softcap;  // 0: none

  Shape(float scale, float softcap)
      : gain(softcap != 0 ? scale / softcap : scale != 1 ? scale : 0), softcap(softcap) {}
};

template <class T>
struct Problem {
  const T* student;       // (N, >= V)
  const T* teacher;       // (N, >= V)
  const int64_t* labels;  // (N); null: no labels
  const bool* counted;    // (N); null: all rows count
  const float* weight;    // (N), of each row's gradient; null: 1
  const float* expected;  // (N), the weights that the gradient was written with; null: it was not written yet
  float* loss;            // (N)
  T* gradient;            // (N, width), contiguous; null: not wanted
  Rows student_rows, teacher_rows;
  int width;    // of a row of the gradient; zero from V on
  int classes;  // V
  float temperature;
  Mixture mixture;
  float soft_weight, hard_weight;
  Shape student_shape, teacher_shape;
  float student_scale;
};

constexpr float INFINITE = __builtin_huge_valf();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -3.4e38f;
constexpr float TINY = 1.17549435e-38f;  // the smallest normal number

// -- Arithmetic -------------------------------------------------------------------------------------------------------

// Computes 2^x to two units in the last place; results below the smallest normal number are 0.
IN_KERNEL float power_of_2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Computes a * b, never fused into a sum: where p_s and p_t are equal, their difference must be exactly 0.
IN_KERNEL float product(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Computes a / b to two units in the last place, for b of at most 1e37.
IN_KERNEL float quotient(float a, float b) {
#ifdef __CUDACC__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// Computes log(1 + x) to a few units in the last place. log1pf is as accurate but takes twice the instructions.
IN_KERNEL float log_of_1_plus(float x) {
#ifdef __CUDACC__
  const float far = __log2f(1 + x) * 0.693147181f;
#else
  const float far = log2f(1 + x) * 0.693147181f;
#endif
  const float s = quotient(x, 2 + x), t = s * s;  // log((1 + s) / (1 - s))
  const float near = 2 * s * (1 + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7))));
  return fabsf(x) < 0.25f ? near : far;
}

IN_KERNEL float wide(float x) { return x; }
IN_KERNEL float wide(__half x) { return __half2float(x); }
IN_KERNEL float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
IN_KERNEL void narrow(float x, float& y) { y = x; }
IN_KERNEL void narrow(float x, __half& y) { y = __float2half_rn(x); }
IN_KERNEL void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

// Applies scale and softcap, of which there is at least one. -inf stays -inf: the class has probability 0.
IN_KERNEL float shaped(float z, const Shape& shape) {
  return z == -INFINITE ? z : shape.softcap != 0 ? shape.softcap * tanhf(z * shape.gain) : z * shape.gain;
}

// Returns log(a / b), to the last digit where they are close; `excess` is a - b, summed class by class.
IN_KERNEL float log_ratio(float excess, float a, float b) {
  return fabsf(excess) < 0.5f * b ? log1pf(quotient(excess, b)) : logf(quotient(a, b));
}

// -- Sums over the cluster --------------------------------------------------------------------------------------------

struct Sum {
  static constexpr float nothing = 0;
  static IN_KERNEL float of(float a, float b) { return a + b; }
};
struct Maximum {
  static constexpr float nothing = -INFINITE;
  static IN_KERNEL float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces over lanes by pairwise exchange, at distance `farthest` first: every lane ends with the same bits.
template <class Op, int K, class Cluster>
IN_KERNEL void across_lanes(Cluster& cluster, float (&values)[K], int farthest) {
#pragma unroll
  for (int distance = farthest; distance > 0; distance /= 2) {
    float others[K];
    cluster.from_lane(values, distance, others);
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = Op::of(values[k], others[k]);
  }
}

// Reduces what at most 16 warps, or blocks, have left in the mailbox.
template <class Op, int K, class Cluster>
IN_KERNEL void collect(Cluster& cluster, const float (*left)[MOST_VALUES], int count, float (&values)[K]) {
  static_assert(MOST_THREADS / 32 == 16 && MOST_BLOCKS == 16);
  const int i = cluster.thread % 16;
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = i < count ? left[i][k] : Op::nothing;
  across_lanes<Op>(cluster, values, 8);
}

// Reduces over lanes, then warps, then blocks in a fixed order, so that every thread of the cluster ends with the same
// bits. Each round has its own place in the mailboxes, so no thread waits for the previous round to be read.
template <class Op, int ROUND, int K, class Cluster>
IN_KERNEL void reduce(Cluster& cluster, float (&values)[K]) {
  static_assert(ROUND < ROUNDS && K <= MOST_VALUES);
  Mailbox& own = *cluster.mailbox();
  across_lanes<Op>(cluster, values, 16);
  if (cluster.threads > 32) {
    if (cluster.thread % 32 == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) own.of_warp[ROUND][cluster.thread / 32][k] = values[k];
    }
    cluster.wait_for_block();
    collect<Op>(cluster, own.of_warp[ROUND], cluster.threads / 32, values);
  }
  if (cluster.size > 1) {
    if (ROUND == 0) cluster.wait();  // until all blocks have started: only then is their memory there
    if (cluster.thread < cluster.size) {
      Mailbox& other = *cluster.mailbox_of(cluster.thread);
#pragma unroll
      for (int k = 0; k < K; ++k) other.of_block[ROUND][cluster.rank][k] = values[k];
    }
    cluster.arrive(true);
    cluster.wait();
    collect<Op>(cluster, own.of_block[ROUND], cluster.size, values);
  }
}

// -- Memory -----------------------------------------------------------------------------------------------------------

template <class T>
struct Vector {
  static constexpr int size = VECTOR_BYTES / sizeof(T);
  union {
    uint4 whole;
    T element[size];
  };
  IN_KERNEL Vector() {}
};

// Returns the number of elements between a multiple of 16 bytes and the start of the row.
template <class T>
IN_KERNEL int misalignment(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % VECTOR_BYTES / sizeof(T);
}

// The columns of a row that a block, or a thread, reads and writes.
struct Columns {
  int begin, end;
};

// Loads a vector of a row that is cut at multiples of 16 bytes; elements outside the columns become `other`. At the
// row's ends this reads beyond the row, which is safe: 16 aligned bytes lie in one page of memory.
template <class T>
IN_KERNEL Vector<T> load(const T* row, int column, const Columns& columns, float other) {
  Vector<T> v;
  const bool any = column + v.size > columns.begin && column < columns.end;
  v.whole = any ? *reinterpret_cast<const uint4*>(row + column) : make_uint4(0, 0, 0, 0);
  if (column < columns.begin || column + v.size > columns.end) {
#pragma unroll
    for (int i = 0; i < v.size; ++i)
      if (column + i < columns.begin || column + i >= columns.end) narrow(other, v.element[i]);
  }
  return v;
}

// Does the same for a row that is not cut there.
template <class T>
IN_KERNEL Vector<T> load_elements(const T* row, int column, const Columns& columns, float other) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < v.size; ++i) {
    narrow(other, v.element[i]);
    if (column + i >= columns.begin && column + i < columns.end) v.element[i] = row[column + i];
  }
  return v;
}

// Stores a vector. `scratch` is shared memory: a vector in registers cannot be indexed by a variable.
template <class T>
IN_KERNEL void store(T* row, int column, const Columns& columns, bool whole, const Vector<T>& v, Vector<T>& scratch) {
  if (whole && column >= columns.begin && column + v.size <= columns.end) {
    *reinterpret_cast<uint4*>(row + column) = v.whole;
  } else if (column + v.size > columns.begin && column < columns.end) {
    scratch.whole = v.whole;
#pragma unroll 1
    for (int i = max(0, columns.begin - column); i < min(v.size, columns.end - column); ++i)
      row[column + i] = scratch.element[i];
  }
}

template <class T>
IN_KERNEL const T* row_of(const T* x, const Rows& rows, int row) {
  const unsigned inner = unsigned(rows.inner);  // a 64-bit division takes a hundred instructions
  return x + row / inner * rows.outer_stride + row % inner * rows.inner_stride;
}

// -- Shared by both ways ----------------------------------------------------------------------------------------------

// The location of a row and its cut into vectors, at the multiples of 16 bytes of the student's memory.
template <class T>
struct Place {
  const T* student;
  const T* teacher;
  T* gradient;
  int shift;  // elements of the first vector that lie before the row
  int vectors;
  bool whole_teacher, whole_gradient;  // whether these are cut at multiples of 16 bytes as well

  IN_KERNEL Place(const Problem<T>& p, int row) {
    student = row_of(p.student, p.student_rows, row);
    teacher = row_of(p.teacher, p.teacher_rows, row);
    gradient = p.gradient + int64_t(row) * p.width;
    shift = misalignment(student);
    vectors = (shift + p.classes + Vector<T>::size - 1) / Vector<T>::size;
    whole_teacher = misalignment(teacher) == shift;
    whole_gradient = misalignment(gradient) == shift;
  }
  IN_KERNEL int column(int vector) const { return vector * Vector<T>::size - shift; }
};

// Returns whether multiplying a gradient rounds as recomputing it would, or nearly. Multiplying bfloat16 by a power of
// 2 is exact. In float16, numbers below 6e-5 have already lost digits.
IN_KERNEL bool rounds_once(float ratio, float) { return fabsf(ratio) < 3e38f; }
IN_KERNEL bool rounds_once(float, __half) { return false; }
IN_KERNEL bool rounds_once(float ratio, __nv_bfloat16) {
  int exponent;
  return fabsf(ratio) < 3e38f && fabsf(frexpf(ratio, &exponent)) == 0.5f;
}

// Handles a row that needs no loss and returns whether it was one: it is masked, or its gradient is right as it is, or
// becomes right by a factor.
template <class T, class Cluster>
IN_KERNEL bool settled(Cluster& cluster, const Problem<T>& p, int row, Vector<T>& scratch) {
  const bool counts = !p.counted || p.counted[row];
  float ratio = 0;
  if (counts) {
    if (!p.expected) return false;
    const float weight = p.weight[row], expected = p.expected[row];
    if (weight == expected) return true;
    ratio = weight / expected;
    if (!rounds_once(ratio, T())) return false;
  } else if (cluster.rank == 0 && cluster.thread == 0) {
    p.loss[row] = 0;
  }
  if (!p.gradient) return true;
  T* gradient = p.gradient + int64_t(row) * p.width;
  const int shift = misalignment(gradient);
  const Columns columns{0, p.width};
  const int first = (cluster.rank * cluster.threads + cluster.thread) * Vector<T>::size - shift;
  for (int column = first; column < p.width; column += cluster.size * cluster.threads * Vector<T>::size) {
    Vector<T> v = load(gradient, column, columns, 0);
#pragma unroll
    for (int i = 0; i < v.size; ++i) narrow(counts ? wide(v.element[i]) * ratio : 0, v.element[i]);
    store(gradient, column, columns, true, v, scratch);
  }
  return true;
}

// Reads four of a vector's logits, with scale and softcap applied.
template <class T>
IN_KERNEL void logits(const Vector<T>& v, int from, const Shape& shape, float (&z)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) z[k] = wide(v.element[from + k]);
  if (shape.gain != 0) {
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] = shaped(z[k], shape);
  }
}

// The factors that all classes of a row share.
struct Scales {
  float exponent;        // log2 e / T
  float student_max, teacher_max;
  float student, teacher, hard;  // 1 / Z, hard at temperature 1
  float slope;           // of the soft loss, in the gradient
  float mean;            // E_s[c]
};

struct Sums {
  enum { STUDENT, TEACHER, HARD, TOTAL, EXCESS };  // Z of each, A, and the difference of the two Z in a KL's log(Z / Z)
  float of[5] = {0, 0, 0, 0, 0};
};

template <Kind KIND>
constexpr bool COMPARES =  // a class's term of the loss needs p_s and p_t
    KIND == Kind::jsd || KIND == Kind::tvd || KIND == Kind::mixture;
template <Kind KIND>
constexpr bool CENTRED = KIND == Kind::reverse_kl || COMPARES<KIND>;  // the gradient needs E_s[c]

// Adds a class, with unnormalised e, to A; returns what its gradient needs besides the student.
template <Kind KIND>
IN_KERNEL float weigh(float student_x, float teacher_x, float student_e, float teacher_e, float (&sums)[5]) {
  if (KIND == Kind::soft_cross_entropy) {
    sums[Sums::TOTAL] += teacher_e == 0 ? 0 : teacher_e * student_x;
  } else if (KIND == Kind::kl_div) {
    sums[Sums::TOTAL] += teacher_e == 0 ? 0 : teacher_e * (teacher_x - student_x);
    sums[Sums::EXCESS] += teacher_e - student_e;
  } else if (KIND == Kind::reverse_kl) {
    const float c = student_e == 0 ? 0 : student_x - teacher_x;
    sums[Sums::TOTAL] += student_e * c;
    sums[Sums::EXCESS] += student_e - teacher_e;
    return c;
  }
  return teacher_e;
}

// Adds a class, with its probabilities, to the loss and to E_s[c]; returns p_s c.
template <Kind KIND>
IN_KERNEL float compare(float student_p, float teacher_p, const Mixture& mixture, float& loss, float& mean) {
  float value;
  if (KIND == Kind::jsd || KIND == Kind::mixture) {
    const float beta = mixture.beta;
    // TINY keeps ratios of the two finite, and 1 where both probabilities are 0.
    const float student_q = student_p + TINY, teacher_q = teacher_p + TINY;
    const float difference = teacher_q - student_q;
    value = -student_p * log_of_1_plus(beta * quotient(difference, student_q));
    const float teacher_value = -teacher_q * log_of_1_plus((beta - 1) * quotient(difference, teacher_q));
    if (KIND == Kind::jsd) {
      loss += (1 - beta) * value + beta * teacher_value;
    } else {
      const float bent = ((1 - beta) * mixture.teacher_kl - beta * mixture.student_kl) * difference;
      const float of_student = (1 - beta) * student_q;
      value *= mixture.student_kl;
      loss += value + mixture.teacher_kl * teacher_value - bent;
      value -= bent * quotient(of_student, beta * teacher_q + of_student);
    }
  } else {
    const float difference = student_p - teacher_p;
    loss += 0.5f * fabsf(difference);
    value = difference > 0 ? student_p : difference < 0 ? -student_p : student_p * difference;  // NaN stays
  }
  mean += value;
  return value;
}

// Returns the soft loss of a row and sets the scales of its gradient.
template <Kind KIND>
IN_KERNEL float soft_loss(const float (&sums)[5], float temperature, float soft_weight, Scales& scales) {
  const float student_sum = sums[Sums::STUDENT], teacher_sum = sums[Sums::TEACHER], total = sums[Sums::TOTAL];
  scales.slope = quotient(soft_weight, temperature);
  const float of_teacher = quotient(quotient(total, teacher_sum), temperature);
  if (KIND == Kind::soft_cross_entropy) return logf(student_sum) - of_teacher;
  if (KIND == Kind::kl_div) return of_teacher - log_ratio(sums[Sums::EXCESS], teacher_sum, student_sum);
  scales.mean = quotient(total, student_sum);
  scales.slope = quotient(scales.slope, temperature);
  return quotient(scales.mean, temperature) - log_ratio(sums[Sums::EXCESS], student_sum, teacher_sum);
}

template <Kind KIND>
IN_KERNEL float soft_loss(float loss, float mean, float temperature, float beta, float soft_weight, Scales& scales) {
  scales.mean = mean;
  const float factor = KIND == Kind::jsd ? 1 - beta : KIND == Kind::tvd ? 0.5f : 1;
  scales.slope = quotient(soft_weight * factor, temperature);
  return loss;
}

// Rounding may turn a loss of 0 into -1e-8.
IN_KERNEL float not_negative(float loss) { return loss < 0 ? 0 : loss; }

// Returns the gradient of the soft loss in a class's logit after the softcap; `other` is p_t, c or p_s c.
template <Kind KIND>
IN_KERNEL float slope(float student_p, float other, const Scales& scales) {
  if (!CENTRED<KIND>) return (student_p - other) * scales.slope;
  if (KIND == Kind::reverse_kl) return student_p * (other - scales.mean) * scales.slope;
  return (other - student_p * scales.mean) * scales.slope;
}

// Turns it into the gradient of the row's loss before the softcap; z is the logit after it.
template <class T>
IN_KERNEL float finish(float gradient, float z, bool is_label, const Problem<T>& p, const Scales& scales) {
  if (p.labels) {
    const float hard_p = power_of_2((z - scales.student_max) * LOG2E) * scales.hard;
    gradient += p.hard_weight * (is_label ? hard_p - 1 : hard_p);
  }
  if (p.student_shape.softcap != 0) {
    const float ratio = quotient(z, p.student_shape.softcap);
    gradient *= 1 - ratio * ratio;
  }
  // Where the target or the label is a class of probability 0, the loss is infinite and the class has gradient 0.
  return z == -INFINITE ? 0 : gradient;
}

template <class T>
IN_KERNEL int label_of(const Problem<T>& p, int row) {
  const int64_t label = p.labels[row];
  return label >= 0 && label < p.classes ? int(label) : -1;
}

// Returns z_s[label]; NaN if the label is out of range.
template <class T>
IN_KERNEL float label_logit(const Problem<T>& p, const Place<T>& place, int label) {
  if (label < 0) return NAN;
  const float z = wide(place.student[label]);
  return p.student_shape.gain != 0 ? shaped(z, p.student_shape) : z;
}

// Writes zeros from V on, where the gradient is wider than the classes that take part.
template <class T, class Cluster>
IN_KERNEL void pad(Cluster& cluster, const Problem<T>& p, const Place<T>& place) {
  const int first = p.classes + cluster.rank * cluster.threads + cluster.thread;
  for (int column = first; column < p.width; column += cluster.size * cluster.threads)
    narrow(0.0f, place.gradient[column]);
}

// A thread's part of its row, in shared memory.
template <class T>
struct Held {
  Vector<T> student[HELD];
  float other[HELD][Vector<T>::size];  // z_t, then the result of `weigh`, then that of `compare`
  Vector<T> scratch;                   // also keeps neighbouring threads in different memory banks
};

IN_KERNEL void put(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

IN_KERNEL void get(const float* from, float (&x)[4]) {
  const float4 y = *reinterpret_cast<const float4*>(from);
  x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}

// -- Rows that the cluster holds --------------------------------------------------------------------------------------

template <Kind KIND, class T, class Cluster>
IN_KERNEL void held_row(Cluster& cluster, const Problem<T>& p, int row) {
  constexpr int SIZE = Vector<T>::size;
  Held<T>& held = *cluster.template own<Held<T>>();
  if (settled(cluster, p, row, held.scratch)) return;
  cluster.arrive(false);
  const Place<T> place(p, row);
  const int label = p.labels ? label_of(p, row) : -1;

  // Blocks take equal shares of the vectors, and so do their warps; lanes read adjacent vectors.
  const int of_block = (place.vectors + cluster.size - 1) / cluster.size;
  const Columns columns{
      max(0, place.column(cluster.rank * of_block)), min(p.classes, place.column((cluster.rank + 1) * of_block))};
  constexpr int STEP = 32 * SIZE;  // columns from a thread's vector to its next
  const int first = place.column(cluster.rank * of_block + cluster.thread / 32 * 32 * HELD + cluster.thread % 32);

  // 1. Maxima.
  float maxima[2] = {-INFINITE, -INFINITE};
  float z[4], other[4];
  Vector<T> student[HELD], teacher[HELD];
#pragma unroll
  for (int v = 0; v < HELD; ++v) student[v] = load(place.student, first + v * STEP, columns, -INFINITE);
  if (place.whole_teacher) {
#pragma unroll
    for (int v = 0; v < HELD; ++v) teacher[v] = load(place.teacher, first + v * STEP, columns, -INFINITE);
  } else {
#pragma unroll
    for (int v = 0; v < HELD; ++v) teacher[v] = load_elements(place.teacher, first + v * STEP, columns, -INFINITE);
  }
#pragma unroll
  for (int v = 0; v < HELD; ++v) {
    held.student[v].whole = student[v].whole;
#pragma unroll
    for (int j = 0; j < SIZE; j += 4) {
      logits(student[v], j, p.student_shape, z);
      logits(teacher[v], j, p.teacher_shape, other);
      put(&held.other[v][j], other);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        maxima[0] = fmaxf(maxima[0], z[k]);
        maxima[1] = fmaxf(maxima[1], other[k]);
      }
    }
  }
  reduce<Maximum, 0>(cluster, maxima);

  // 2. Sums.
  Scales scales{};
  scales.exponent = quotient(LOG2E, p.temperature);
  scales.student_max = maxima[0];
  scales.teacher_max = maxima[1];
  Sums sums;
#pragma unroll 1
  for (int v = 0; v < HELD; ++v) {
#pragma unroll
    for (int j = 0; j < SIZE; j += 4) {
      logits(held.student[v], j, p.student_shape, z);
      get(&held.other[v][j], other);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float student_x = z[k] - scales.student_max, teacher_x = other[k] - scales.teacher_max;
        const float student_e = power_of_2(student_x * scales.exponent);
        const float teacher_e = power_of_2(teacher_x * scales.exponent);
        sums.of[Sums::STUDENT] += student_e;
        sums.of[Sums::TEACHER] += teacher_e;
        if (p.labels) sums.of[Sums::HARD] += power_of_2(student_x * LOG2E);
        other[k] = weigh<KIND>(student_x, teacher_x, student_e, teacher_e, sums.of);
      }
      put(&held.other[v][j], other);
    }
  }
  const float likely = p.labels ? label_logit(p, place, label) : 0;
  reduce<Sum, 1>(cluster, sums.of);
  scales.student = quotient(1, sums.of[Sums::STUDENT]);
  scales.teacher = quotient(1, sums.of[Sums::TEACHER]);
  scales.hard = quotient(1, sums.of[Sums::HARD]);
  // The label's logit was read before any block wrote its gradient, which may share the student's memory.
  if (cluster.rank == 0 && cluster.thread == 0)
    p.loss[row] = p.labels ? p.hard_weight * (logf(sums.of[Sums::HARD]) + (scales.student_max - likely)) : 0;

  // 3. The sums that need the probabilities of both.
  float soft;
  if constexpr (COMPARES<KIND>) {
    float means[2] = {0, 0};
#pragma unroll 1
    for (int v = 0; v < HELD; ++v) {
#pragma unroll
      for (int j = 0; j < SIZE; j += 4) {
        logits(held.student[v], j, p.student_shape, z);
        get(&held.other[v][j], other);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float student_e = power_of_2((z[k] - scales.student_max) * scales.exponent);
          const float student_p = product(student_e, scales.student), teacher_p = product(other[k], scales.teacher);
          other[k] = compare<KIND>(student_p, teacher_p, p.mixture, means[0], means[1]);
        }
        put(&held.other[v][j], other);
      }
    }
    reduce<Sum, 2>(cluster, means);
    soft = soft_loss<KIND>(means[0], means[1], p.temperature, p.mixture.beta, p.soft_weight, scales);
  } else {
    soft = soft_loss<KIND>(sums.of, p.temperature, p.soft_weight, scales);
  }
  if (cluster.rank == 0 && cluster.thread == 0) p.loss[row] += p.soft_weight * not_negative(soft);
  if (!p.gradient) return;

  // 4. The gradient.
  const float weight = p.weight ? p.weight[row] * p.student_scale : p.student_scale;
#pragma unroll 1
  for (int v = 0; v < HELD; ++v) {
    const int column = first + v * STEP;
    Vector<T> gradient;
#pragma unroll
    for (int j = 0; j < SIZE; j += 4) {
      logits(held.student[v], j, p.student_shape, z);
      get(&held.other[v][j], other);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float student_e = power_of_2((z[k] - scales.student_max) * scales.exponent);
        const float student_p = product(student_e, scales.student);
        const float soft = slope<KIND>(student_p, CENTRED<KIND> ? other[k] : product(other[k], scales.teacher), scales);
        narrow(weight * finish(soft, z[k], column + j + k == label, p, scales), gradient.element[j + k]);
      }
    }
    store(place.gradient, column, columns, place.whole_gradient, gradient, held.scratch);
  }
  pad(cluster, p, place);
}

// -- Rows that are read several times ---------------------------------------------------------------------------------

template <class T>
struct Both {
  Vector<T> student, teacher;

  IN_KERNEL Both(const Problem<T>& p, const Place<T>& place, int column) {
    const Columns columns{0, p.classes};
    student = load(place.student, column, columns, -INFINITE);
    teacher = place.whole_teacher ? load(place.teacher, column, columns, -INFINITE)
                                  : load_elements(place.teacher, column, columns, -INFINITE);
  }
};

// Sums of exponentials under a running maximum.
struct Growing {
  float top = LOWEST;  // finite: it is subtracted from -inf
  float sum = 0, hard = 0;

  IN_KERNEL void add(const float (&z)[4], float exponent, bool with_hard) {
    raise(fmaxf(fmaxf(top, fmaxf(z[0], z[1])), fmaxf(z[2], z[3])), exponent, with_hard);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum += power_of_2((z[k] - top) * exponent);
      if (with_hard) hard += power_of_2((z[k] - top) * LOG2E);
    }
  }
  IN_KERNEL void raise(float higher, float exponent, bool with_hard) {
    sum *= power_of_2((top - higher) * exponent);
    if (with_hard) hard *= power_of_2((top - higher) * LOG2E);
    top = higher;
  }
};

template <Kind KIND, class T, class Cluster>
IN_KERNEL void streamed_row(Cluster& cluster, const Problem<T>& p, int row) {
  constexpr int SIZE = Vector<T>::size;
  Vector<T>& scratch = *cluster.template own<Vector<T>>();
  if (settled(cluster, p, row, scratch)) return;
  const Place<T> place(p, row);
  const int label = p.labels ? label_of(p, row) : -1;
  const float likely = p.labels ? label_logit(p, place, label) : 0;
  const float weight = p.weight ? p.weight[row] * p.student_scale : p.student_scale;
  const Columns columns{0, p.classes};

  // 1. Maxima and sums of exponentials.
  Scales scales{};
  scales.exponent = quotient(LOG2E, p.temperature);
  Growing student, teacher;
  float student_z[4], teacher_z[4];
  for (int i = cluster.thread; i < place.vectors; i += cluster.threads) {
    const Both<T> both(p, place, place.column(i));
#pragma unroll
    for (int j = 0; j < SIZE; j += 4) {
      logits(both.student, j, p.student_shape, student_z);
      student.add(student_z, scales.exponent, p.labels);
      logits(both.teacher, j, p.teacher_shape, teacher_z);
      teacher.add(teacher_z, scales.exponent, false);
    }
  }
  float maxima[2] = {student.top, teacher.top};
  reduce<Maximum, 0>(cluster, maxima);
  student.raise(maxima[0], scales.exponent, p.labels);
  teacher.raise(maxima[1], scales.exponent, false);
  float of_exponentials[3] = {student.sum, teacher.sum, student.hard};
  reduce<Sum, 1>(cluster, of_exponentials);
  scales.student_max = maxima[0];
  scales.teacher_max = maxima[1];
  scales.student = quotient(1, of_exponentials[0]);
  scales.teacher = quotient(1, of_exponentials[1]);
  scales.hard = quotient(1, of_exponentials[2]);
  scales.slope = quotient(p.soft_weight, p.temperature);

  // 2. The loss, and the gradient unless it needs E_s[c]. 3. The gradient that needs E_s[c].
  Sums sums;
  float means[2] = {0, 0};
  for (int pass = 0; pass < (CENTRED<KIND> && p.gradient ? 2 : 1); ++pass) {
    const bool writes = p.gradient && (pass == 1 || !CENTRED<KIND>);
    for (int i = cluster.thread; i < place.vectors; i += cluster.threads) {
      const int column = place.column(i);
      const Both<T> both(p, place, column);
      Vector<T> gradient;
#pragma unroll
      for (int j = 0; j < SIZE; j += 4) {
        logits(both.student, j, p.student_shape, student_z);
        logits(both.teacher, j, p.teacher_shape, teacher_z);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float student_x = student_z[k] - scales.student_max, teacher_x = teacher_z[k] - scales.teacher_max;
          const float student_e = power_of_2(student_x * scales.exponent);
          const float teacher_e = power_of_2(teacher_x * scales.exponent);
          const float student_p = product(student_e, scales.student), teacher_p = product(teacher_e, scales.teacher);
          float other = teacher_p;
          if constexpr (COMPARES<KIND>) {
            other = compare<KIND>(student_p, teacher_p, p.mixture, means[0], means[1]);
          } else {
            const float c = weigh<KIND>(student_x, teacher_x, student_e, teacher_e, sums.of);
            if (KIND == Kind::reverse_kl) other = c;
          }
          if (writes) {
            const float soft = slope<KIND>(student_p, other, scales);
            narrow(weight * finish(soft, student_z[k], column + j + k == label, p, scales), gradient.element[j + k]);
          }
        }
      }
      if (writes) store(place.gradient, column, columns, place.whole_gradient, gradient, scratch);
    }
    if (pass == 1) break;
    float soft;
    if constexpr (COMPARES<KIND>) {
      reduce<Sum, 2>(cluster, means);
      soft = soft_loss<KIND>(means[0], means[1], p.temperature, p.mixture.beta, p.soft_weight, scales);
    } else {
      reduce<Sum, 2>(cluster, sums.of);
      sums.of[Sums::STUDENT] = of_exponentials[0];
      sums.of[Sums::TEACHER] = of_exponentials[1];
      soft = soft_loss<KIND>(sums.of, p.temperature, p.soft_weight, scales);
    }
    if (cluster.thread == 0) {
      const float hard = p.labels ? p.hard_weight * (logf(of_exponentials[2]) + (scales.student_max - likely)) : 0;
      p.loss[row] = hard + p.soft_weight * not_negative(soft);
    }
  }
  if (p.gradient) pad(cluster, p, place);
}
