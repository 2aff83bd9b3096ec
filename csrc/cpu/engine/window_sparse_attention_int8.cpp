// window_sparse_attention_int8: the same of 8-bit integers.
//
// operands  q u8 or s8 [B, H, L, D], k u8 or s8, v u8, s8 or f32 [B, H, keys, D], D contiguous,
//           D <= 256; lengths i64 [B] contiguous if integers[0]; result f32 or u8 [B, L, H, D]
// integers  whether there are lengths; whether query i sees no key beyond i; the window; lists of
//           distances (1, or one a head); q's zero point, the result's; then each list: how many,
//           and they, rising beyond the window
// numbers   exponent scale, v's scale (of bytes), the result's
#include "window_sparse_attention_int8/window_sparse_attention_int8.h"

#include "engine/steps.h"

namespace fastrec::engine {

namespace {
namespace attention = window_sparse_attention_int8;

struct Distances {
  std::vector<int64_t> distances, starts{0};
};
}  // namespace

std::shared_ptr<void> prepare_window_sparse_attention_int8(const Step& step,
                                                           const Tensor* operands) {
  const std::vector<int64_t>& from = step.integers;
  const int64_t lists = from.at(3), heads = operands[0].sizes[1];
  auto made = std::make_shared<Distances>();
  size_t next = 6;
  for (int64_t head = 0; head < heads; ++head) {
    if (lists == 1) next = 6;
    const int64_t count = from.at(next++);
    for (int64_t n = 0; n < count; ++n) made->distances.push_back(from.at(next++));
    made->starts.push_back(static_cast<int64_t>(made->distances.size()));
  }
  return made;
}

Status run_window_sparse_attention_int8(const Step& step, const Tensor* operands) {
  const bool has_lengths = step.integers[0] != 0;
  const Tensor &q = operands[0], &k = operands[1], &v = operands[2];
  const Tensor& out = operands[3 + has_lengths];
  const auto rows = [](const Tensor& t) {
    return attention::Rows{t.data, t.strides[0], t.strides[1], t.strides[2]};
  };
  const auto& far = *static_cast<const Distances*>(step.prepared.get());
  attention::Call call{};
  call.q = rows(q);
  call.k = rows(k);
  call.v = rows(v);
  call.q_u8 = q.dtype == Dtype::u8;
  call.k_u8 = k.dtype == Dtype::u8;
  call.v_u8 = v.dtype == Dtype::u8;
  call.v_f32 = v.dtype == Dtype::f32;
  call.out_u8 = out.dtype == Dtype::u8;
  call.q_zero_point = static_cast<int32_t>(step.integers[4]);
  call.exponent_scale = static_cast<float>(step.numbers[0]);
  call.v_scale_of_all = static_cast<float>(step.numbers[1]);
  call.out = {out.data, out.strides[0], out.strides[2], out.strides[1]};
  call.out_scale = static_cast<float>(step.numbers[2]);
  call.out_zero_point = static_cast<int32_t>(step.integers[5]);
  call.lengths = has_lengths ? operands[3].as<int64_t>() : nullptr;
  call.pattern = {step.integers[2], step.integers[1] != 0, far.distances.data(), far.starts.data()};
  call.batch = q.sizes[0];
  call.heads = q.sizes[1];
  call.length = q.sizes[2];
  call.dims = q.sizes[3];
  call.key_rows = k.sizes[2];
  const int64_t bad = attention::run(call);
  if (bad == attention::kNotFinite) return {Fault::not_a_number};
  return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, call.lengths[bad]};
}

}  // namespace fastrec::engine
