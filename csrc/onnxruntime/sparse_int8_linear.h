// fastrec.SparseInt8Linear and fastrec.SparseInt8LinearU8: the op sparse_int8_linear, whose header
// says what is computed.
//
// inputs      x f32 or u8 [.., K]; initialisers: values s8 [groups, 128], group_index s32 [groups],
//             panel_start s32 [panels + 1], w_scale f32 [N], bias f32 [N] (may be left out)
// attributes  in_features K, x_scale, x_zero_point, activation ("none", "relu", "gelu"); of
//             SparseInt8LinearU8 out_scale and out_zero_point too
// output      f32 or u8 [.., N]
#pragma once

#include "api.h"
#include "sparse_int8_linear/sparse_int8_linear.h"

namespace fastrec::onnxruntime {

class SparseInt8Linear {
 public:
  static constexpr const char* kName = "SparseInt8Linear";
  static Signature signature();
  explicit SparseInt8Linear(const Node& node) : SparseInt8Linear(node, false) {}
  void run(const Call& call) const;

 protected:
  SparseInt8Linear(const Node& node, bool quantised);

 private:
  sparse_int8_linear::Weight weight_of(const Value& values, const Value& group_index,
                                       const Value& panel_start, const Value& scale,
                                       const Value& bias) const;

  int64_t inputs_, outputs_;
  bool has_bias_, quantised_;
  sparse_int8_linear::Quantisation x_, y_{1.0f, 0};
  sparse_int8_linear::Activation activation_;
  std::vector<int32_t> sums_;
  std::unique_ptr<sparse_int8_linear::Folding> folding_;
};

class SparseInt8LinearU8 : public SparseInt8Linear {
 public:
  static constexpr const char* kName = "SparseInt8LinearU8";
  static Signature signature();
  explicit SparseInt8LinearU8(const Node& node) : SparseInt8Linear(node, true) {}
};

}  // namespace fastrec::onnxruntime
