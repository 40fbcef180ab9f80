// Registers torch.ops.LIBRARY.rows through the stable ABI: one binary works with several versions of torch and Python.
// LIBRARY is the file's name: a process may load binaries for several cards, and each registers ops of its own.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>

#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape(const Tensor& x) {
  std::string text = "(";
  for (const int64_t size : x.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

Element element_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return Element::float32;
  if (x.scalar_type() == ScalarType::Half) return Element::float16;
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::BFloat16,
      "fastdistill: logits of shape ", shape(x), " have another dtype; they should be float32, float16 or bfloat16");
  return Element::bfloat16;
}

// Returns a tensor of one value a row as a pointer, or null.
template <class T>
const T* per_row(const std::optional<Tensor>& x, const char* name, ScalarType dtype, int64_t count) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(
      x->scalar_type() == dtype && x->is_contiguous() && x->numel() == count, "fastdistill: ", name,
      " has shape ", shape(*x), "; it should be contiguous, of ", torch::headeronly::toString(dtype), " and ", count,
      " long");
  return static_cast<const T*>(x->const_data_ptr());
}

// Makes `x` a contiguous copy if two strides cannot reach its rows. The copy belongs to the stream of the launch.
Rows reachable_rows(Tensor& x) {
  Rows rows;
  if (!rows_of(x.sizes().data(), x.strides().data(), int(x.dim()), &rows)) {
    x = torch::stable::contiguous(x);
    rows_of(x.sizes().data(), x.strides().data(), int(x.dim()), &rows);
  }
  return rows;
}

void rows(
    Tensor student,                    // (*, >= V)
    Tensor teacher,                    // (*, >= V)
    std::optional<Tensor> labels,      // (N) int64
    std::optional<Tensor> counted,     // (N) bool
    std::optional<Tensor> weight,      // (N) float32
    std::optional<Tensor> expected,    // (N) float32
    Tensor loss,                       // (N) float32, written
    std::optional<Tensor> gradient,    // (*, >= V), contiguous, written
    int64_t kind, int64_t classes, double temperature, double beta, double teacher_kl, double student_kl,
    double soft_weight, double hard_weight, double student_scale, double teacher_scale, double student_softcap,
    double teacher_softcap) {
  const int64_t count = loss.numel();
  if (count == 0) return;
  const Element element = element_of(student);
  const int64_t last = student.dim() - 1, width = gradient ? gradient->size(gradient->dim() - 1) : 0;
  STD_TORCH_CHECK(
      teacher.scalar_type() == student.scalar_type() && teacher.get_device_index() == student.get_device_index(),
      "fastdistill: student and teacher have different dtypes or devices; they should have the same");
  STD_TORCH_CHECK(
      classes > 0 && classes <= student.size(last) && classes <= teacher.size(teacher.dim() - 1) &&
          count * student.size(last) == student.numel() && count * teacher.size(teacher.dim() - 1) == teacher.numel() &&
          student.size(last) < std::numeric_limits<int>::max() - 64 && count <= std::numeric_limits<int>::max(),
      "fastdistill: ", count, " rows of ", classes, " classes do not fit student ", shape(student), " and teacher ",
      shape(teacher));
  STD_TORCH_CHECK(
      !gradient || (gradient->scalar_type() == student.scalar_type() && gradient->is_contiguous() &&
                    gradient->numel() == count * width && width >= classes),
      "fastdistill: the gradient should be contiguous, of the student's dtype and shape ", shape(student));
  STD_TORCH_CHECK(!expected || (weight && gradient), "fastdistill: expected weights need a weight and a gradient");
  // Launch on the tensor's own device and its current stream; the current device may be another.
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(student.get_device_index(), &stream));
  const Rows student_rows = reachable_rows(student), teacher_rows = reachable_rows(teacher);
  const Call call{
      student.const_data_ptr(), teacher.const_data_ptr(),
      per_row<int64_t>(labels, "labels", ScalarType::Long, count),
      per_row<bool>(counted, "counted", ScalarType::Bool, count),
      per_row<float>(weight, "weight", ScalarType::Float, count),
      per_row<float>(expected, "expected", ScalarType::Float, count),
      const_cast<float*>(per_row<float>(loss, "loss", ScalarType::Float, count)),
      gradient ? gradient->mutable_data_ptr() : nullptr,
      student_rows, teacher_rows, count, width, classes, float(temperature), float(beta), float(teacher_kl),
      float(student_kl), float(soft_weight), float(hard_weight), float(student_scale), float(teacher_scale),
      float(student_softcap), float(teacher_softcap)};
  launch_rows(call, element, Kind(kind), stream);
}

}  // namespace

STABLE_TORCH_LIBRARY(LIBRARY, library) {
  library.def(
      "rows(Tensor student, Tensor teacher, Tensor? labels, Tensor? counted, Tensor? weight, Tensor? expected, "
      "Tensor(a!) loss, Tensor(b!)? gradient, int kind, int classes, float temperature, float beta, "
      "float teacher_kl, float student_kl, float soft_weight, float hard_weight, float student_scale, "
      "float teacher_scale, float student_softcap, float teacher_softcap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CUDA, library) { library.impl("rows", TORCH_BOX(&rows)); }
