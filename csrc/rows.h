// Losses over classes, one row at a time: computes the loss and, if wanted, its gradient in the student's logits.
//
// With y = (z - max z) log2(e) / T, e = 2^y, Z = sum e, p = e / Z of each side, every class adds to the sums and has a
// gradient:
//
//     kind                loss                                  a class adds          gradient
//     soft_cross_entropy  log Z_s - ln2 A / Z_t                 A: e_t y_s            (p_s - p_t) / T
//     kl_div              ln2 A / Z_t - log(Z_t / Z_s)          A: e_t (y_t - y_s)    (p_s - p_t) / T
//     reverse_kl          ln2 A / Z_s - log(Z_s / Z_t)          A: e_s c              p_s (c - E_s[c]) ln2 / T
//                                                               c = y_s - y_t
//     tvd                 sum of |p_s - p_t| / 2                c = sgn(p_s - p_t)    p_s (c - E_s[c]) / 2T
//     mixture             ln2 sum of w_t p_t log2(p_t / m) + w_s p_s log2(p_s / m) - bend d
//                                                                                     p_s (c - E_s[c]) ln2 / T
//                                                               c = w_s log2(p_s / m) - (1 - beta) bend d / m
//
// where m = beta p_t + (1 - beta) p_s, d = p_t - p_s and bend = log2(e) ((1 - beta) w_t - beta w_s). jsd is the mixture
// with w_t = beta and w_s = 1 - beta, so bend = 0. `bend d` is the part of a term that is linear in d; over the classes
// it adds up to 0, so it is left out of the sum. Each class's difference is taken before the sum, so a student near its
// teacher keeps its digits.
//
// `compute_rows` is a thread's work on the rows of its cluster of blocks, which holds a row in registers. It is a
// template over the cluster, which provides threads, blocks, barriers and access to another block's memory. rows.cu
// defines it for a GPU, simulate.cpp for tests without one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "launch.h"

#ifdef __CUDACC__
#define IN_KERNEL __device__ __forceinline__
#else
#define IN_KERNEL inline
#endif

constexpr float INFINITE = __builtin_huge_valf();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
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

// Computes 1 / x to one unit in the last place.
IN_KERNEL float reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// Computes log2(x) to 2^-22.
IN_KERNEL float log2_of(float x) {
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

// Computes log2(1 + u) for u of at most 1 / 8, to one unit in the last place.
IN_KERNEL float log2_near_1(float u) {
  return u * (1.44269502f + u * (-0.72134757f + u * (0.480869502f + u * (-0.360634387f + u * (0.293438911f -
         u * 0.245460704f)))));
}

// Computes tanh(x) to three units in the last place, without the branches of tanhf.
IN_KERNEL float tanh_of(float x) {
  const float square = x * x;
  const float series =
      square * (-0.333327681f + square * (0.133152977f + square * (-0.0523025580f + square * 0.0157394409f)));
  const float far = 1 - 2 * reciprocal(1 + power_of_2(2 * LOG2E * fabsf(x)));
  return fabsf(x) < 0.55f ? fmaf(series, x, x) : copysignf(far, x);
}

// Returns log(a / b), to the last digit where they are close; `excess` is a - b, summed class by class.
IN_KERNEL float log_ratio(float excess, float a, float b) {
  return fabsf(excess) < 0.5f * b ? log1pf(excess * reciprocal(b)) : logf(a * reciprocal(b));
}

// A 32-bit word of a row: one element, or two.
template <class To, class From>
IN_KERNEL To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(static_cast<void*>(&y), &x, sizeof(y));
  return y;
}

template <class T>
struct Word;
template <>
struct Word<float> {
  using Raw = uint32_t;
  static constexpr uint32_t IMPOSSIBLE = 0xff800000;  // -inf
  static IN_KERNEL void widen(uint32_t x, float* z) { z[0] = bits<float>(x); }
  static IN_KERNEL uint32_t narrow(const float* z) { return bits<uint32_t>(z[0]); }
  static IN_KERNEL uint32_t highest(uint32_t x, uint32_t y) {
    return bits<uint32_t>(fmaxf(bits<float>(x), bits<float>(y)));
  }
};
template <>
struct Word<__half> {
  using Raw = uint16_t;
  static constexpr uint32_t IMPOSSIBLE = 0xfc00fc00;
  static IN_KERNEL void widen(uint32_t x, float* z) {
    const float2 both = __half22float2(bits<__half2>(x));
    z[0] = both.x, z[1] = both.y;
  }
  static IN_KERNEL uint32_t narrow(const float* z) { return bits<uint32_t>(__floats2half2_rn(z[0], z[1])); }
  static IN_KERNEL uint32_t highest(uint32_t x, uint32_t y) {
    return bits<uint32_t>(__hmax2(bits<__half2>(x), bits<__half2>(y)));
  }
};
template <>
struct Word<__nv_bfloat16> {
  using Raw = uint16_t;
  static constexpr uint32_t IMPOSSIBLE = 0xff80ff80;
  static IN_KERNEL void widen(uint32_t x, float* z) {
    z[0] = bits<float>(x << 16), z[1] = bits<float>(x & 0xffff0000);
  }
  static IN_KERNEL uint32_t narrow(const float* z) { return bits<uint32_t>(__floats2bfloat162_rn(z[0], z[1])); }
  static IN_KERNEL uint32_t highest(uint32_t x, uint32_t y) {
    return bits<uint32_t>(__hmax2(bits<__nv_bfloat162>(x), bits<__nv_bfloat162>(y)));
  }
};

template <class T>
struct Vector {
  static constexpr int size = VECTOR_BYTES / sizeof(T), in_word = 4 / sizeof(T);
  uint32_t word[4];

  IN_KERNEL void widen(float (&z)[size]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) Word<T>::widen(word[i], z + i * in_word);
  }
  IN_KERNEL void narrow(const float (&z)[size]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = Word<T>::narrow(z + i * in_word);
  }
  IN_KERNEL typename Word<T>::Raw raw(int i) const { return word[i / in_word] >> (i % in_word * 16); }
  IN_KERNEL void set(int i, typename Word<T>::Raw x) {
    const uint32_t keep = in_word == 1 ? 0 : 0xffff0000 >> (i % in_word * 16);
    word[i / in_word] = (word[i / in_word] & keep) | uint32_t(x) << (i % in_word * 16);
  }
  IN_KERNEL void read(const void* from) {
    const uint4 x = *static_cast<const uint4*>(from);
    word[0] = x.x, word[1] = x.y, word[2] = x.z, word[3] = x.w;
  }
  IN_KERNEL void write(void* to) const { *static_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]); }
  IN_KERNEL void fill(uint32_t x) { word[0] = word[1] = word[2] = word[3] = x; }
};

// -- Sums over the cluster --------------------------------------------------------------------------------------------

// The start of a block's shared memory: the values that its warps and the blocks of its cluster exchange in each round.
constexpr int ROUNDS = 3;
constexpr int MOST_VALUES = 5;
struct Mailbox {
  float of_warp[ROUNDS][MOST_THREADS / 32][MOST_VALUES];
  float of_block[ROUNDS][MOST_BLOCKS][MOST_VALUES];
};
static_assert(sizeof(Mailbox) % 16 == 0);

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

// Reduces what at most MOST warps, or blocks, have left in the mailbox.
template <class Op, int MOST, int K, class Cluster>
IN_KERNEL void collect(Cluster& cluster, const float (&left)[MOST][MOST_VALUES], int count, float (&values)[K]) {
  const int i = cluster.thread % MOST;
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = i < count ? left[i][k] : Op::nothing;
  across_lanes<Op>(cluster, values, MOST / 2);
}

// Reduces over lanes, then warps, then blocks in a fixed order, so that every thread of the cluster ends with the same
// bits. Each round has its own place in the mailboxes. A place is written again one row later, after a barrier of
// another round, at which all threads have read it.
template <class Op, int ROUND, int K, class Cluster>
IN_KERNEL void reduce(Cluster& cluster, float (&values)[K], bool joins = false) {
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
    if (ROUND == 0 && joins) cluster.wait();  // until all blocks have started: only then is their memory there
    if (cluster.thread < cluster.size) {
      Mailbox& other = *cluster.mailbox_of(cluster.thread);
#pragma unroll
      for (int k = 0; k < K; ++k) other.of_block[ROUND][cluster.rank][k] = values[k];
    }
    cluster.arrive(cluster.thread < 32);
    cluster.wait();
    collect<Op>(cluster, own.of_block[ROUND], cluster.size, values);
  }
}

// -- Memory -----------------------------------------------------------------------------------------------------------

// Returns the number of elements between a multiple of 16 bytes and the start of the row.
template <class T>
IN_KERNEL int misalignment(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % VECTOR_BYTES / sizeof(T);
}

template <class T>
IN_KERNEL T* row_of(const void* x, const Rows& rows, int row) {
  const unsigned inner = unsigned(rows.inner);  // a 64-bit division takes a hundred instructions
  const unsigned outer = unsigned(row) < inner ? 0 : row / inner;
  return (T*)x + outer * rows.outer_stride + (row - outer * inner) * rows.inner_stride;
}

// A thread's part of a row, which is cut into vectors at the multiples of 16 bytes of the student's memory. Blocks take
// equal shares of the vectors; lanes take adjacent vectors, and a thread's next one is 32 vectors further on.
template <class T, bool PLAIN>
struct Part {
  static constexpr int SIZE = Vector<T>::size, STEP = 32 * SIZE;
  using Raw = typename Word<T>::Raw;
  const Raw* student;
  const Raw* teacher;
  int classes;
  int first;      // column of the thread's first vector
  int stop;       // column where the block's share ends
  bool whole;     // the share has all of the thread's vectors, and none crosses an end of the row
  bool teacher_cut;  // the teacher's row is cut at multiples of 16 bytes as well

  template <class Cluster>
  IN_KERNEL Part(const Cluster& cluster, const Call& c, int row) {
    student = row_of<Raw>(c.student, c.student_rows, row);
    teacher = row_of<Raw>(c.teacher, c.teacher_rows, row);
    classes = int(c.classes);
    const int shift = PLAIN ? 0 : misalignment(student);
    teacher_cut = PLAIN || misalignment(teacher) == shift;
    const int vectors = (shift + classes + SIZE - 1) / SIZE;
    const int of_block = (vectors + cluster.size - 1) >> cluster.log_size, start = cluster.rank * of_block;
    first = (start + cluster.thread / 32 * 32 * HELD + cluster.thread % 32) * SIZE - shift;
    stop = min(start + of_block, vectors) * SIZE - shift;
    whole = first >= 0 && column(HELD - 1) < stop && column(HELD - 1) + SIZE <= classes;
  }
  IN_KERNEL int column(int vector) const { return first + vector * STEP; }
  IN_KERNEL bool exists(int vector) const { return column(vector) < stop; }
  IN_KERNEL bool has(int vector, int i) const {
    return exists(vector) && column(vector) + i >= 0 && column(vector) + i < classes;
  }
};

// Loads the thread's vectors of a row that is cut as the student's; elements outside the row become -inf. At the row's
// ends this reads beyond the row, which is safe: 16 aligned bytes lie in one page of memory.
template <class T, bool PLAIN>
IN_KERNEL void load(const Part<T, PLAIN>& part, const typename Word<T>::Raw* row, Vector<T> (&held)[HELD]) {
#pragma unroll
  for (int v = 0; v < HELD; ++v) {
    held[v].fill(Word<T>::IMPOSSIBLE);
    if (part.exists(v)) held[v].read(row + part.column(v));
  }
#pragma unroll
  for (int v = 0; v < HELD; ++v)
#pragma unroll
    for (int i = 0; i < part.SIZE; ++i)
      if (!part.has(v, i)) held[v].set(i, typename Word<T>::Raw(Word<T>::IMPOSSIBLE));
}

// Does the same for a row that is cut elsewhere.
template <class T, bool PLAIN>
IN_KERNEL void load_elements(const Part<T, PLAIN>& part, const typename Word<T>::Raw* row, Vector<T> (&held)[HELD]) {
#pragma unroll
  for (int v = 0; v < HELD; ++v) {
    held[v].fill(Word<T>::IMPOSSIBLE);
#pragma unroll
    for (int i = 0; i < part.SIZE; ++i)
      if (part.has(v, i)) held[v].set(i, row[part.column(v) + i]);
  }
}

template <class T, bool PLAIN>
IN_KERNEL void store(const Part<T, PLAIN>& part, int v, const Vector<T>& x, typename Word<T>::Raw* row, bool cut) {
  if (part.whole && cut) {
    x.write(row + part.column(v));
  } else {
#pragma unroll
    for (int i = 0; i < part.SIZE; ++i)
      if (part.has(v, i)) row[part.column(v) + i] = x.raw(i);
  }
}

// Returns whether multiplying a gradient rounds as recomputing it would, or nearly. Multiplying bfloat16 by a power of
// 2 is exact. In float16, numbers below 6e-5 have already lost digits.
IN_KERNEL bool rounds_once(float ratio, float) { return fabsf(ratio) < 3e38f; }
IN_KERNEL bool rounds_once(float, __half) { return false; }
IN_KERNEL bool rounds_once(float ratio, __nv_bfloat16) {
  return fabsf(ratio) < 3e38f && (bits<uint32_t>(ratio) & 0x7fffff) == 0 && fabsf(ratio) >= TINY;
}

// Multiplies a row of the gradient; a factor of 0 makes it 0 whatever it holds.
template <class T, class Cluster>
IN_KERNEL void scale_row(Cluster& cluster, const Call& c, int row, float factor) {
  if (!c.gradient) return;
  constexpr int SIZE = Vector<T>::size;
  typename Word<T>::Raw* gradient = static_cast<typename Word<T>::Raw*>(c.gradient) + row * c.width;
  const int first = cluster.rank * cluster.threads + cluster.thread, shift = misalignment(gradient);
  for (int64_t column = first * SIZE - shift; column < c.width; column += cluster.size * cluster.threads * SIZE) {
    const bool whole = column >= 0 && column + SIZE <= c.width;
    const auto inside = [&](int i) { return column + i >= 0 && column + i < c.width; };
    Vector<T> x;
    if (whole) x.read(gradient + column);
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (!whole && inside(i)) x.set(i, gradient[column + i]);
    float z[SIZE];
    x.widen(z);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) z[i] = factor == 0 ? 0 : z[i] * factor;
    x.narrow(z);
    if (whole) x.write(gradient + column);
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (!whole && inside(i)) gradient[column + i] = x.raw(i);
  }
}

// -- A row ------------------------------------------------------------------------------------------------------------

// How a side's logits follow from the stored ones: scale, then softcap. Both keep their order, and -inf.
struct Shape {
  float gain;     // scale / softcap, or the scale; 0: logits are as stored
  float softcap;  // 0: none

  IN_KERNEL Shape(float scale, float softcap)
      : gain(softcap != 0 ? scale / softcap : scale != 1 ? scale : 0), softcap(softcap) {}
  template <int N>
  IN_KERNEL void operator()(float (&z)[N]) const {
    if (gain == 0) return;
#pragma unroll
    for (int i = 0; i < N; ++i)
      z[i] = z[i] == -INFINITE ? z[i] : softcap != 0 ? softcap * tanh_of(z[i] * gain) : z[i] * gain;
  }
};

// A side of a row: its logits as exponents y of 2.
struct Side {
  float exponent;  // log2 e / T
  float offset;    // -max z log2 e / T
  IN_KERNEL Side(float top, float exponent) : exponent(exponent), offset(-(top * exponent)) {}
  IN_KERNEL float operator()(float z) const { return fmaf(z, exponent, offset); }
};

template <Kind KIND>
constexpr bool COMPARES =  // a class's term of the loss needs p_s and p_t
    KIND == Kind::jsd || KIND == Kind::tvd || KIND == Kind::mixture;

enum { STUDENT, TEACHER, TOTAL, EXCESS, HARD };  // sums: Z of each, A, the difference of the two Z, Z at temperature 1

// Adds a class to A, and to the excess in a KL's log(Z / Z).
template <Kind KIND, int K>
IN_KERNEL void add(float student_y, float teacher_y, float student_e, float teacher_e, float (&sums)[K]) {
  sums[STUDENT] += student_e;
  sums[TEACHER] += teacher_e;
  if constexpr (KIND == Kind::soft_cross_entropy) {
    if (teacher_e != 0) sums[TOTAL] = fmaf(teacher_e, student_y, sums[TOTAL]);
  } else if constexpr (KIND == Kind::kl_div) {
    if (teacher_e != 0) sums[TOTAL] = fmaf(teacher_e, teacher_y - student_y, sums[TOTAL]);
    sums[EXCESS] += teacher_e - student_e;
  } else if constexpr (KIND == Kind::reverse_kl) {
    if (student_e != 0) sums[TOTAL] = fmaf(student_e, student_y - teacher_y, sums[TOTAL]);
    sums[EXCESS] += student_e - teacher_e;
  }
}

enum { LOSS, MEAN };  // sums of `compare`; jsd's loss without the terms of E_s[c]

// Adds a class, with its probabilities, to the loss and to E_s[c]; returns p_s c.
template <Kind KIND>
IN_KERNEL float compare(float student_p, float teacher_p, const Call& c, float (&sums)[2]) {
  float value;
  if constexpr (KIND == Kind::tvd) {
    const float difference = student_p - teacher_p;
    sums[LOSS] += fabsf(difference);
    value = difference == 0 ? 0 : copysignf(student_p, difference);
  } else {
    // TINY keeps the ratios finite where m is 0, and the logarithms where p is.
    const float inverse = reciprocal(fmaf(c.beta, teacher_p, fmaf(1 - c.beta, student_p, TINY)));
    const float ratio = (teacher_p - student_p) * inverse;  // d / m
    const bool near = fabsf(ratio) < 0.125f;
    const float student_far = log2_of(fmaf(student_p, inverse, TINY)), student_near = log2_near_1(-c.beta * ratio);
    const float teacher_far = log2_of(fmaf(teacher_p, inverse, TINY)), teacher_near = log2_near_1((1 - c.beta) * ratio);
    value = student_p * (near ? student_near : student_far);
    const float of_teacher = near ? teacher_near : teacher_far;
    if constexpr (KIND == Kind::jsd) {
      sums[LOSS] = fmaf(teacher_p, of_teacher, sums[LOSS]);
    } else {
      const float bend = LOG2E * ((1 - c.beta) * c.teacher_kl - c.beta * c.student_kl);
      sums[LOSS] += c.student_kl * value + c.teacher_kl * teacher_p * of_teacher - bend * (teacher_p - student_p);
      value = c.student_kl * value - bend * (1 - c.beta) * student_p * ratio;
    }
  }
  sums[MEAN] += value;
  return value;
}

// A thread's shared memory; 16 bytes between neighbours keep them in different banks.
template <class T>
struct Compared {
  float4 other[HELD][Vector<T>::size / 4], unused;  // p_s c
};
template <class T>
struct Held {
  Vector<T> student[HELD];
  float4 other[HELD][Vector<T>::size / 4], unused;  // the teacher's vector, then p_s c
};

// Rounding may turn a loss of 0 into -1e-8.
IN_KERNEL float square(float x) { return x * x; }
IN_KERNEL float not_negative(float loss) { return loss < 0 ? 0 : loss; }

// `PLAIN`: aligned rows without labels, scales and softcaps.
template <Kind KIND, bool PLAIN, class T, class Cluster>
IN_KERNEL void compute_row(Cluster& cluster, const Call& c, int row, float weight, int label) {
  // Vectors whose p_s stays in registers between passes; the others' is computed again. More would spill.
  constexpr int KEPT = KIND == Kind::jsd ? 7 : KIND == Kind::tvd ? 5 : 6, SIZE = Vector<T>::size;
  constexpr int K = !PLAIN ? 5 : COMPARES<KIND> ? 2 : KIND == Kind::soft_cross_entropy ? 3 : 4;
  const bool joins = cluster.size > 1 && !c.expected;  // the backward has joined the cluster before its first row
  if (joins) cluster.arrive(false);
  const Part<T, PLAIN> part(cluster, c, row);
  const Shape student_shape(c.student_scale, c.student_softcap), teacher_shape(c.teacher_scale, c.teacher_softcap);
  Vector<T> student[HELD], teacher[HELD];
  if (part.whole && part.teacher_cut) {
#pragma unroll
    for (int v = 0; v < HELD; ++v) student[v].read(part.student + part.column(v));
#pragma unroll
    for (int v = 0; v < HELD; ++v) teacher[v].read(part.teacher + part.column(v));
  } else {
    load(part, part.student, student);
    part.teacher_cut ? load(part, part.teacher, teacher) : load_elements(part, part.teacher, teacher);
  }
  // The label's logit is read before any block writes its gradient, which may share the student's memory.
  float likely[2] = {NAN, NAN};
  if (!PLAIN && label >= 0) Word<T>::widen(part.student[label], likely);

  // Reads the logits of vector v, in pass number `pass`. Plain rows stay in registers; others go to shared memory, where
  // a loop over vectors can index them. The compiler cannot know that `zero` is 0: it would keep the numbers of one
  // pass for the next, and spill.
  auto& own = *cluster.template own<std::conditional_t<PLAIN, Compared<T>, Held<T>>>();
  if constexpr (!PLAIN) {
#pragma unroll
    for (int v = 0; v < HELD; ++v) own.student[v] = student[v], reinterpret_cast<Vector<T>&>(own.other[v]) = teacher[v];
  }
  const auto logits = [&](int v, int pass, float (&student_z)[SIZE], float (&teacher_z)[SIZE]) {
    if constexpr (PLAIN) {
      const uint32_t zero = cluster.rank >> (3 + pass);
#pragma unroll
      for (int i = 0; i < 4 && pass; ++i) student[v].word[i] ^= zero, teacher[v].word[i] ^= zero;
      student[v].widen(student_z), teacher[v].widen(teacher_z);
    } else {
      own.student[v].widen(student_z), reinterpret_cast<const Vector<T>&>(own.other[v]).widen(teacher_z);
      student_shape(student_z), teacher_shape(teacher_z);
    }
  };

  // 1. Maxima.
  uint32_t top[2] = {Word<T>::IMPOSSIBLE, Word<T>::IMPOSSIBLE};
#pragma unroll
  for (int v = 0; v < HELD; ++v)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      top[0] = Word<T>::highest(top[0], student[v].word[i]);
      top[1] = Word<T>::highest(top[1], teacher[v].word[i]);
    }
  float maxima[2], halves[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    Word<T>::widen(top[side], halves);
    maxima[side] = Vector<T>::in_word == 1 ? halves[0] : fmaxf(halves[0], halves[1]);
  }
  reduce<Maximum, 0>(cluster, maxima, joins);
  if constexpr (!PLAIN) {
    float tops[2][1] = {{maxima[0]}, {maxima[1]}};
    student_shape(tops[0]), teacher_shape(tops[1]);
    maxima[0] = tops[0][0], maxima[1] = tops[1][0];
    student_shape(likely);
  }
  const float exponent = LOG2E * reciprocal(c.temperature);
  const Side of_student(maxima[0], exponent), of_teacher(maxima[1], exponent), of_hard(maxima[0], LOG2E);

  // 2. Sums.
  float student_z[SIZE], teacher_z[SIZE], sums[K] = {};
#pragma unroll (PLAIN ? HELD : 1)
  for (int v = 0; v < HELD; ++v) {
    logits(v, 0, student_z, teacher_z);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float student_y = of_student(student_z[i]), teacher_y = of_teacher(teacher_z[i]);
      add<KIND>(student_y, teacher_y, power_of_2(student_y), power_of_2(teacher_y), sums);
      if constexpr (!PLAIN) if (c.labels) sums[HARD] += power_of_2(of_hard(student_z[i]));
    }
  }
  reduce<Sum, 1>(cluster, sums);
  const float of_Z_s = reciprocal(sums[STUDENT]), of_Z_t = reciprocal(sums[TEACHER]);

  // 3. The sums that need the probabilities of both. p_s stays in registers, p_s c in shared memory.
  float soft, mean = 0, slope = weight * c.soft_weight * reciprocal(c.temperature);
  [[maybe_unused]] float student_p[KEPT][SIZE];
  if constexpr (COMPARES<KIND>) {
    float both[2] = {0, 0};
#pragma unroll (PLAIN ? HELD : 1)
    for (int v = 0; v < HELD; ++v) {
      logits(v, 1, student_z, teacher_z);
      float value[SIZE];
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float p = product(power_of_2(of_student(student_z[i])), of_Z_s);
        if (PLAIN && v < KEPT) student_p[v][i] = p;
        value[i] = compare<KIND>(p, product(power_of_2(of_teacher(teacher_z[i])), of_Z_t), c, both);
      }
#pragma unroll
      for (int i = 0; i < SIZE; i += 4)
        own.other[v][i / 4] = make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
    }
    reduce<Sum, 2>(cluster, both);
    const float unit = KIND == Kind::tvd ? 0.5f : LN2;
    mean = both[MEAN];
    soft = unit * (KIND == Kind::jsd ? c.beta * both[LOSS] + (1 - c.beta) * mean : both[LOSS]);
    slope *= KIND == Kind::jsd ? LN2 * (1 - c.beta) : unit;
  } else if constexpr (KIND == Kind::soft_cross_entropy) {
    soft = logf(sums[STUDENT]) - LN2 * sums[TOTAL] * of_Z_t;
  } else if constexpr (KIND == Kind::kl_div) {
    soft = LN2 * sums[TOTAL] * of_Z_t - log_ratio(sums[EXCESS], sums[TEACHER], sums[STUDENT]);
  } else {
    mean = sums[TOTAL] * of_Z_s, slope *= LN2;
    soft = LN2 * mean - log_ratio(sums[EXCESS], sums[STUDENT], sums[TEACHER]);
  }
  if (cluster.rank == 0 && cluster.thread == 0) {
    float hard = 0;
    if constexpr (!PLAIN)
      if (c.labels) hard = c.hard_weight * LN2 * (log2f(sums[HARD]) - of_hard(likely[0]));
    c.loss[row] = c.soft_weight * not_negative(soft) + hard;
  }
  if (!c.gradient) return;

  // 4. The gradient.
  const float student_slope = slope * of_Z_s, teacher_slope = slope * of_Z_t;
  [[maybe_unused]] const float hard_slope = weight * c.hard_weight, of_Z_hard = PLAIN ? 0 : reciprocal(sums[K - 1]);
  auto* d_row = static_cast<typename Word<T>::Raw*>(c.gradient) + (KIND == Kind::tvd ? row + (cluster.rank >> 6) : row) * c.width;  // rank >> 6: see above
  const bool cut = PLAIN || misalignment(d_row) == misalignment(part.student);
  [[maybe_unused]] const float of_softcap = reciprocal(c.student_softcap);
#pragma unroll (PLAIN ? HELD : 1)
  for (int v = 0; v < HELD; ++v) {
    float gradient[SIZE];
    const bool kept = PLAIN && COMPARES<KIND> && v < KEPT;
    if (!kept) logits(v, 2, student_z, teacher_z);
    [[maybe_unused]] float4 values = {};
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float student_y = of_student(student_z[i]), student_e = power_of_2(student_y);
      if constexpr (COMPARES<KIND>) {
        if (i % 4 == 0) values = own.other[v][i / 4];
        const float value = i % 4 == 0 ? values.x : i % 4 == 1 ? values.y : i % 4 == 2 ? values.z : values.w;
        gradient[i] = slope * fmaf(kept ? student_p[v % KEPT][i] : product(student_e, of_Z_s), -mean, value);
      } else if constexpr (KIND == Kind::reverse_kl) {
        const float c = student_y - of_teacher(teacher_z[i]);
        gradient[i] = student_e == 0 ? 0 : student_e * student_slope * (c - mean);
      } else {
        const float teacher_e = power_of_2(of_teacher(teacher_z[i]));
        gradient[i] = product(student_e, student_slope) - product(teacher_e, teacher_slope);
      }
    }
    if (!PLAIN && c.labels) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float hard_p = power_of_2(of_hard(student_z[i])) * of_Z_hard;
        gradient[i] += hard_slope * (part.column(v) + i == label ? hard_p - 1 : hard_p);
      }
    }
    if (!PLAIN && c.student_softcap != 0) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) gradient[i] *= 1 - square(student_z[i] * of_softcap);
    }
    // Where the target or the label is a class of probability 0, the loss is infinite and the class has gradient 0.
    if constexpr (!PLAIN || !(COMPARES<KIND> || KIND == Kind::reverse_kl)) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) gradient[i] = student_z[i] == -INFINITE ? 0 : gradient[i];
    }
    Vector<T> x;
    x.narrow(gradient);
    store(part, v, x, d_row, cut);
  }
  for (int64_t i = c.classes + cluster.rank * cluster.threads + cluster.thread; i < c.width;
       i += cluster.size * cluster.threads)
    d_row[i] = 0;  // where the gradient is wider than the classes that take part
}

// Computes the rows of a cluster, from `first` on. In the backward, those whose gradient was written with another
// weight: they are scaled if that rounds once, otherwise computed again. A lane checks a row first, so that a cluster
// whose rows are all right ends at once.
template <Kind KIND, bool PLAIN, class T, class Cluster>
IN_KERNEL void compute_rows(Cluster& cluster, const Call& c, int first, int count) {
  if (c.expected) {
    const int row = first + cluster.thread % 32;
    if (!cluster.any(row < first + count && row < c.count && c.weight[row] != c.expected[row])) return;
    if (cluster.size > 1) cluster.arrive(false), cluster.wait();
  }
#pragma unroll 1
  for (int i = 0; i < count && first + i < c.count; ++i) {
    const int row = first + i;
    const bool counts = !c.counted || c.counted[row];
    const float weight = c.weight ? c.weight[row] : 1, expected = c.expected ? c.expected[row] : 0;
    const int64_t label = PLAIN || !c.labels ? -1 : c.labels[row];
    const float ratio = weight / expected;
    if (c.expected && (weight == expected || !counts)) continue;
    if (counts && !(c.expected && rounds_once(ratio, T()))) {
      const bool valid = label >= 0 && label < c.classes;  // otherwise the loss is NaN
      compute_row<KIND, PLAIN, T>(cluster, c, row, weight * c.student_scale, valid ? int(label) : -1);
      continue;
    }
    scale_row<T>(cluster, c, row, counts ? ratio : 0);
    if (!counts && cluster.rank == 0 && cluster.thread == 0) c.loss[row] = 0;
  }
}

template <Kind KIND>
using Is = std::integral_constant<Kind, KIND>;

// Calls `run` with the template arguments of a call, as values: a kind, whether it is plain, and an element.
template <class Run>
void with_arguments(const Call& c, Element element, Kind kind, Run run) {
  const auto with_kind = [&](auto kind_is, auto x) {
    plain(c, sizeof(x)) ? run(kind_is, std::true_type(), x) : run(kind_is, std::false_type(), x);
  };
  const auto with_element = [&](auto x) {
    switch (kind) {
      case Kind::soft_cross_entropy: return with_kind(Is<Kind::soft_cross_entropy>(), x);
      case Kind::kl_div: return with_kind(Is<Kind::kl_div>(), x);
      case Kind::reverse_kl: return with_kind(Is<Kind::reverse_kl>(), x);
      case Kind::jsd: return with_kind(Is<Kind::jsd>(), x);
      case Kind::tvd: return with_kind(Is<Kind::tvd>(), x);
      case Kind::mixture: return with_kind(Is<Kind::mixture>(), x);
    }
  };
  switch (element) {
    case Element::float32: return with_element(float());
    case Element::float16: return with_element(__half());
    case Element::bfloat16: return with_element(__nv_bfloat16());
  }
}
