// Plain loops, any machine: bit for bit what the vector kernels compute.
#include "element.h"
#include "layer_norm_quantize/layer_norm_quantize.h"

namespace fastrec::layer_norm_quantize {
namespace {

constexpr int kAccumulators = 4, kLanes = 16;

// The sum in the order of the contract.
class Sum {
 public:
  void add(int64_t i, float value) { acc_[i / kLanes % kAccumulators][i % kLanes] += value; }
  float total() const {
    float lane[kLanes];
    for (int l = 0; l < kLanes; ++l)
      lane[l] = (acc_[0][l] + acc_[1][l]) + (acc_[2][l] + acc_[3][l]);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
  }

 private:
  float acc_[kAccumulators][kLanes] = {};
};

bool rows(const Call& call, int64_t begin, int64_t end) {
  const int64_t dims = call.dims;
  bool numbers = true;
  for (int64_t at = begin * dims; at < end * dims; at += dims) {
    const bool keeps = call.residual && call.sum;
    const auto value = [&](int64_t i) {
      if (keeps) return call.sum[at + i];
      return call.residual ? call.x[at + i] + call.residual[at + i] : call.x[at + i];
    };
    if (call.sum)
      for (int64_t i = 0; i < dims; ++i)
        call.sum[at + i] = call.residual ? call.x[at + i] + call.residual[at + i] : call.x[at + i];
    Sum sum, squares;
    for (int64_t i = 0; i < dims; ++i) sum.add(i, value(i));
    const float mean = sum.total() / static_cast<float>(dims);
    for (int64_t i = 0; i < dims; ++i) squares.add(i, (value(i) - mean) * (value(i) - mean));
    const float rstd = 1.0f / std::sqrt(squares.total() / static_cast<float>(dims) + call.eps);
    for (int64_t i = 0; i < dims; ++i) {
      float y = (value(i) - mean) * rstd;
      if (call.weight) y *= call.weight[i];
      if (call.bias) y += call.bias[i];
      if (!call.y_u8)
        static_cast<float*>(call.y)[at + i] = y;
      else if (std::isnan(y))
        numbers = false;
      else
        static_cast<uint8_t*>(call.y)[at + i] = quantise(y, call.quantisation);
    }
  }
  return numbers;
}

}  // namespace

const Kernel kScalar = {Isa::scalar, rows};

}  // namespace fastrec::layer_norm_quantize
