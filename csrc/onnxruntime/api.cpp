#include "api.h"

namespace fastrec::onnxruntime {

namespace {

struct TypeAndShape {
  explicit TypeAndShape(const OrtValue* value) { check(api().GetTensorTypeAndShape(value, &info)); }
  ~TypeAndShape() { api().ReleaseTensorTypeAndShapeInfo(info); }
  TypeAndShape(const TypeAndShape&) = delete;
  OrtTensorTypeAndShapeInfo* info = nullptr;
};

}  // namespace

void check(OrtStatus* status) {
  if (!status) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw std::runtime_error(message);
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("expected ") + what);
}

int64_t Value::count() const {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

Value view(const OrtValue* value) {
  Value seen;
  const TypeAndShape about(value);
  size_t dims = 0;
  check(api().GetTensorElementType(about.info, &seen.type));
  check(api().GetDimensionsCount(about.info, &dims));
  seen.shape.resize(dims);
  check(api().GetDimensions(about.info, seen.shape.data(), dims));
  // Inputs are read only; the API has one function for both.
  check(api().GetTensorMutableData(const_cast<OrtValue*>(value), &seen.data));
  return seen;
}

size_t Node::inputs() const {
  size_t count = 0;
  check(api().KernelInfo_GetInputCount(info_, &count));
  return count;
}

Value Node::constant(size_t index, const char* name, ONNXTensorElementDataType type) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api().KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (!is_constant || !value)
    throw std::invalid_argument(std::string(name) + ": expected an initialiser");
  Value seen = view(value);
  if (seen.type != type) throw std::invalid_argument(std::string(name) + ": has another type");
  return seen;
}

int64_t Node::integer(const char* name) const {
  int64_t value = 0;
  check(api().KernelInfoGetAttribute_int64(info_, name, &value));
  return value;
}

float Node::number(const char* name) const {
  float value = 0;
  check(api().KernelInfoGetAttribute_float(info_, name, &value));
  return value;
}

std::string Node::text(const char* name) const {
  size_t bytes = 0;  // with the zero at its end
  check(api().KernelInfoGetAttribute_string(info_, name, nullptr, &bytes));
  std::string value(bytes, '\0');
  check(api().KernelInfoGetAttribute_string(info_, name, value.data(), &bytes));
  value.resize(bytes - 1);
  return value;
}

std::vector<int64_t> Node::integers(const char* name) const {
  size_t count = 0;
  check(api().KernelInfoGetAttributeArray_int64(info_, name, nullptr, &count));
  std::vector<int64_t> values(count);
  check(api().KernelInfoGetAttributeArray_int64(info_, name, values.data(), &count));
  return values;
}

Value Call::input(size_t index) const {
  const OrtValue* value = nullptr;
  check(api().KernelContext_GetInput(context_, index, &value));
  return value ? view(value) : Value{};
}

Value Call::output(size_t index, const std::vector<int64_t>& shape) const {
  OrtValue* value = nullptr;
  check(api().KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  return view(value);
}

}  // namespace fastrec::onnxruntime
