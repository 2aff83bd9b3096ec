// A kernel's entries for every dtype that a call may name: each file that defines forward<T>,
// delta<T>, grad_q<T> and grad_kv<T> includes this after them.
#pragma once

#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::window_sparse_attention {
namespace {

// The instance for the dtype that the call names.
template <class Call, class F>
void with_dtype(const Call& call, F&& f) {
  switch (call.shape.dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(Bf16{});
    case Dtype::f16:
      return f(F16{});
  }
}

void forward_any(const Forward& call, const Part& part, float* scratch) {
  with_dtype(call, [&](auto t) { forward<decltype(t)>(call, part, scratch); });
}
void delta_any(const Backward& call, const Part& part) {
  with_dtype(call, [&](auto t) { delta<decltype(t)>(call, part); });
}
void grad_q_any(const Backward& call, const Part& part, float* scratch) {
  with_dtype(call, [&](auto t) { grad_q<decltype(t)>(call, part, scratch); });
}
void grad_kv_any(const Backward& call, const Part& part, float* scratch) {
  with_dtype(call, [&](auto t) { grad_kv<decltype(t)>(call, part, scratch); });
}

}  // namespace
}  // namespace fastrec::window_sparse_attention
