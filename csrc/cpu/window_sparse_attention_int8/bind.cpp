#include "window_sparse_attention_int8/bind.h"

#include <pybind11/stl.h>

#include <array>

#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

namespace py = pybind11;

namespace fastrec::window_sparse_attention_int8 {

using Strided = std::array<int64_t, 4>;  // address, batch stride, head stride, row stride

void bind(py::module_& parent) {
  py::module_ m = parent.def_submodule("window_sparse_attention_int8");
  m.attr("MAX_KEYS") = kMaxKeys;
  m.attr("MAX_DIMS") = kMaxDims;
  m.attr("NOT_FINITE") = kNotFinite;
  m.attr("BAD_SCALE") = kBadScale;
  m.def(
      "kernel_isa", [] { return kIsaTable[static_cast<int>(select().isa)].name; },
      "Name of the ISA whose kernel runs now.");
  m.def(
      "run",
      [](const Strided& q, bool q_u8, int32_t q_zero_point, const Strided& k, const Strided& v,
         bool v_f32, uintptr_t v_scale, float v_scale_of_all, float exponent_scale,
         const Strided& out, bool out_u8, float out_scale, int32_t out_zero_point,
         uintptr_t lengths, uintptr_t cu_seqlens, int64_t window, bool causal, uintptr_t distances,
         uintptr_t starts, int64_t batch, int64_t heads, int64_t length, int64_t dims,
         int64_t key_rows, bool k_u8, bool v_u8) {
        const auto rows = [](const Strided& s) {
          return Rows{reinterpret_cast<const void*>(s[0]), s[1], s[2], s[3]};
        };
        const auto ints = [](uintptr_t p) { return reinterpret_cast<const int64_t*>(p); };
        py::gil_scoped_release nogil;
        return run({rows(q),
                    rows(k),
                    rows(v),
                    q_u8,
                    v_f32,
                    out_u8,
                    q_zero_point,
                    exponent_scale,
                    reinterpret_cast<const float*>(v_scale),
                    {reinterpret_cast<void*>(out[0]), out[1], out[2], out[3]},
                    out_scale,
                    out_zero_point,
                    ints(lengths),
                    ints(cu_seqlens),
                    {window, causal, ints(distances), ints(starts)},
                    batch,
                    heads,
                    length,
                    dims,
                    key_rows,
                    k_u8,
                    v_u8,
                    v_scale_of_all});
      },
      "Addresses, strides in elements, sizes, checked by the caller. -1: done; NOT_FINITE: v "
      "holds NaN or infinity; BAD_SCALE: of v_scale; else the first bad entry of lengths or "
      "cu_seqlens.");
}

}  // namespace fastrec::window_sparse_attention_int8
