// Constants of GELU, shared by every op and ISA file so that they agree to the last bit:
// gelu(x) = h * erf(x * sqrt(1/2)) + h, h = x / 2, the last step one fused multiply-add.
#pragma once

namespace fastrec {

// erf(y) = y * P(y^2) / Q(y^2) on |y| <= 4, clamped to +-1 beyond: a rational least-squares fit of
// degree 5/5 with iterative reweighting towards the minimax (relative error 2.5e-8 in exact
// arithmetic, absolute error 4.3e-7 in fp32).
inline constexpr float kErfLimit = 4.0f;
inline constexpr float kErfP[] = {1.1283791065216064f,    0.19352270662784576f,
                                  0.05309876427054405f,   0.0038823934737592936f,
                                  0.0002845456183422357f, 1.986956021937658e-06f};
inline constexpr float kErfQ[] = {1.0f,
                                  0.5048375725746155f,
                                  0.11534073948860168f,
                                  0.015205327421426773f,
                                  0.0011853439500555396f,
                                  3.7420944863697514e-05f};
inline constexpr float kSqrtHalf = 0.70710678118654752f;

}  // namespace fastrec
