// Plain loops, any machine: the readable form of every vector kernel.
#include "pointwise_attention_int8/steps.h"

namespace fastrec::pointwise_attention_int8 {
namespace {

int64_t packed_bytes(const Call&, int64_t) { return 0; }
int64_t scratch_floats(const Call& call) { return call.shape.value_dims + kRun; }
void pack(const Call&, const Sequence&, int64_t, uint8_t*) {}

void forward(const Call& call, const Tables& tables, const Part& part, const uint8_t*,
             float* scratch) {
  const Sequence& sequence = part.sequence;
  const int64_t value_dims = call.shape.value_dims, history = sequence.history;
  float *const sum = scratch, *const weights = scratch + value_dims;
  for (int64_t h = 0; h < call.shape.heads; ++h) {
    const Weights weight(call, tables, sequence, h);
    const auto v = rows_of<const int8_t>(call.v, sequence, h);
    const auto out = rows_of<float>(call.out, sequence, h);
    for (int64_t i = part.begin; i < part.end; ++i) {
      std::fill_n(sum, value_dims, 0.0f);
      for (int64_t begin = 0; begin < history; begin += kRun) {
        const int64_t end = std::min(begin + kRun, history);
        for (int64_t j = begin; j < end; ++j)
          weights[j - begin] =
              pointwise_attention::sees(call.causal, history, i, j) ? weight(i, j) : 0.0f;
        add_run(weights, v, begin, end, value_dims, sum, 1);
      }
      if (i >= history) {
        weights[0] = weight(i, i);
        add_run(weights, v, i, i + 1, value_dims, sum, 1);
      }
      for (int64_t d = 0; d < value_dims; ++d) out[i][d] = sum[d] * call.out_scale;
    }
  }
}

}  // namespace

const Kernel kScalar = {Isa::scalar, packed_bytes, scratch_floats, pack, forward};

}  // namespace fastrec::pointwise_attention_int8
