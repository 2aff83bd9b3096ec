// u8 = clip(round_half_even(x * (1 / scale)) + zero_point, 0, 255), products rounded to fp32.
#pragma once

#include <cstdint>

namespace fastrec {

struct Quantisation {
  float scale = 1.0f;
  int32_t zero_point = 0;
};

}  // namespace fastrec
