// The library that ONNX Runtime loads: SessionOptions.register_custom_ops_library.
#include <algorithm>

#include "api.h"
#include "sparse_int8_linear.h"
#include "window_sparse_attention.h"

namespace fastrec::onnxruntime {
namespace {

const OrtApi* given = nullptr;

// One for all sessions, never freed: ONNX Runtime keeps a pointer to it.
OrtCustomOpDomain* domain() {
  static OrtCustomOpDomain* const ops = [] {
    OrtCustomOpDomain* made = nullptr;
    check(api().CreateCustomOpDomain("fastrec", &made));
    for (const OrtCustomOp* op : {custom_op<SparseInt8Linear>(), custom_op<SparseInt8LinearU8>(),
                                  custom_op<WindowSparseAttention>()})
      check(api().CustomOpDomain_Add(made, op));
    return made;
  }();
  return ops;
}

}  // namespace

const OrtApi& api() { return *given; }

}  // namespace fastrec::onnxruntime

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace fastrec::onnxruntime;
  const OrtApi* const api = base->GetApi(ORT_API_VERSION);
  if (!api)
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED,
                                         "fastrec's ops need ONNX Runtime 1.17 or later");
  given = api;
  return status_of(ORT_FAIL, [&] { check(api->AddCustomOpDomain(options, domain())); });
}
