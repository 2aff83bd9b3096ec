// ONNX Runtime's C API, version 17 (ONNX Runtime 1.17 and later), as C++: errors are exceptions
// here, and become a status where ONNX Runtime calls.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"

namespace fastrec::onnxruntime {

// RegisterCustomOps' argument; set before any op is made.
const OrtApi& api();

void check(OrtStatus* status);  // throws std::runtime_error with its message, and frees it

// A tensor that ONNX Runtime owns.
struct Value {
  void* data = nullptr;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape;

  int64_t count() const;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};
Value view(const OrtValue* value);

// A node of a graph, while its kernel is made.
class Node {
 public:
  explicit Node(const OrtKernelInfo* info) : info_(info) {}
  size_t inputs() const;
  // An input that has to be an initialiser of this type; throws std::invalid_argument otherwise.
  Value constant(size_t index, const char* name, ONNXTensorElementDataType type) const;
  int64_t integer(const char* name) const;
  float number(const char* name) const;
  std::string text(const char* name) const;
  std::vector<int64_t> integers(const char* name) const;

 private:
  const OrtKernelInfo* info_;
};

// A call of a kernel.
class Call {
 public:
  explicit Call(OrtKernelContext* context) : context_(context) {}
  Value input(size_t index) const;
  Value output(size_t index, const std::vector<int64_t>& shape) const;

 private:
  OrtKernelContext* context_;
};

// Work within its lifetime is shared out among the session's threads, by parallel.cpp.
class Threads {
 public:
  explicit Threads(OrtKernelContext* context);
  ~Threads();
  Threads(const Threads&) = delete;
};

void require(bool holds, const char* what);  // throws std::invalid_argument

// The status of what `action` does: null, or its exception's message.
template <class F>
OrtStatus* status_of(OrtErrorCode code, F&& action) noexcept {
  try {
    action();
    return nullptr;
  } catch (const std::exception& error) {
    return api().CreateStatus(code, error.what());
  }
}

// An op: made from a Node, run with a Call.
template <class T>
concept Kernel = std::constructible_from<T, const Node&> && requires(T& kernel, const Call& call) {
  { kernel.run(call) } -> std::same_as<void>;
  { T::kName } -> std::convertible_to<const char*>;
};

// Types of an op's inputs in order, of which the last `optional` may be left out; and its output's.
// UNDEFINED takes several types.
struct Signature {
  std::vector<ONNXTensorElementDataType> inputs;
  size_t optional;
  ONNXTensorElementDataType output;
};

// ONNX Runtime's table of functions for a Kernel; `T::signature()` is its Signature.
template <Kernel T>
const OrtCustomOp* custom_op() {
  static const Signature signature = T::signature();
  static const OrtCustomOp op = [] {
    OrtCustomOp made{};
    made.version = ORT_API_VERSION;
    made.GetName = [](const OrtCustomOp*) { return T::kName; };
    made.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    made.GetInputType = [](const OrtCustomOp*, size_t index) { return signature.inputs[index]; };
    made.GetInputTypeCount = [](const OrtCustomOp*) { return signature.inputs.size(); };
    made.GetOutputType = [](const OrtCustomOp*, size_t) { return signature.output; };
    made.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    made.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index + signature.optional < signature.inputs.size() ? INPUT_OUTPUT_REQUIRED
                                                                  : INPUT_OUTPUT_OPTIONAL;
    };
    made.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    made.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    made.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    made.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    made.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    made.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    made.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    made.GetEndVersion = [](const OrtCustomOp*) { return 1; };
    made.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info,
                             void** kernel) {
      return status_of(ORT_INVALID_ARGUMENT,
                       [&] { *kernel = std::make_unique<T>(Node(info)).release(); });
    };
    made.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return status_of(ORT_RUNTIME_EXCEPTION, [&] {
        const Threads threads(context);
        static_cast<T*>(kernel)->run(Call(context));
      });
    };
    made.KernelDestroy = [](void* kernel) { delete static_cast<T*>(kernel); };
    return made;
  }();
  return &op;
}

}  // namespace fastrec::onnxruntime
