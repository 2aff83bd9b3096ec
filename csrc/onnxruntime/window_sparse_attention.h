// fastrec.WindowSparseAttention: the op window_sparse_attention, whose header says what is
// computed.
//
// inputs      q, k, v f32 [B, H, L, D], D <= 256; lengths s64 [B] (may be left out)
// attributes  scale; window; causal 0 or 1; pattern: lists of distances (1, or one a head), then
//             each list: how many, and they, rising beyond the window
// output      f32 [B, H, L, D]
#pragma once

#include "api.h"
#include "window_sparse_attention/window_sparse_attention.h"

namespace fastrec::onnxruntime {

class WindowSparseAttention {
 public:
  static constexpr const char* kName = "WindowSparseAttention";
  static Signature signature();
  explicit WindowSparseAttention(const Node& node);
  void run(const Call& call) const;

 private:
  bool has_lengths_;
  float scale_;
  window_sparse_attention::Pattern pattern_;
};

}  // namespace fastrec::onnxruntime
