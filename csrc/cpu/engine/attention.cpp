// attention: padded_attention.
//
// operands  q [B, H, Lq, D], k and v [B, H, Lk, D] f32, D contiguous; lengths
//           i64 [B] if integers[0]; result f32 [B, Lq, H, D] contiguous
// integers  whether there are lengths. They stand for a mask that adds a large negative number, so
//           a length of 0, where all keys are shifted alike, means all keys
// numbers   scale
#include "engine/steps.h"
#include "padded_attention/padded_attention.h"
#include "scratch.h"

namespace fastrec::engine {

Status run_attention(const Step& step, const Tensor* operands) {
  namespace attention = padded_attention;
  const bool has_lengths = step.integers[0] != 0;
  const Tensor &q = operands[0], &k = operands[1], &v = operands[2];
  const auto rows = [](const Tensor& t) {
    return attention::Rows{t.as<float>(), t.strides[0], t.strides[1], t.strides[2]};
  };
  attention::Call call{};
  call.q = rows(q);
  call.k = rows(k);
  call.v = rows(v);
  call.out = operands[has_lengths ? 4 : 3].as<float>();
  call.batch = q.sizes[0];
  call.heads = q.sizes[1];
  call.query_rows = q.sizes[2];
  call.head_dim = q.sizes[3];
  call.key_rows = k.sizes[2];
  call.scale = static_cast<float>(step.numbers[0]);
  if (has_lengths) {
    int64_t* lengths = scratch<int64_t>(call.batch);
    for (int64_t b = 0; b < call.batch; ++b) {
      const int64_t length = operands[3].as<int64_t>()[b * operands[3].strides[0]];
      lengths[b] = length == 0 ? call.key_rows : length;
    }
    call.lengths = lengths;
  }
  const int64_t bad = attention::run(call);
  return bad < 0 ? Status{} : Status{Fault::id_out_of_range, -1, call.lengths[bad]};
}

}  // namespace fastrec::engine
