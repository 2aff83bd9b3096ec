// Constants of GELU, shared by every op and ISA file so that they agree to the last bit:
// gelu(x) = |h| * E(|x|) + h, h = x / 2, the last step one fused multiply-add.
#pragma once

namespace fastrec {

// E(a) = erf(a * sqrt(1/2)), a polynomial of degree 4 in each of sixteen pieces: a table of sixteen
// coefficients is one register, from which all lanes pick theirs, where a division takes as long as
// ten products. With s = min(a * kErfPieces, 15) and n = rint(s), E(a) = c0 + t * (c1 + t * ..), t
// = s - n, c = kErf[..][n]. The last piece is 1, from a = 4 sqrt(2) on. Least squares with
// iterative reweighting towards the minimax; absolute error of E 2.8e-7, of GELU 3.6e-7, in fp32.
inline constexpr float kErfPieces = 2.563261985f, kErfLast = 15.0f;
// s + this has n in its lowest bits.
inline constexpr float kErfRound = 12582912.0f;  // 1.5 * 2^23
inline constexpr int kErfDegree = 4;
alignas(64) inline constexpr float kErf[kErfDegree + 1][16] = {
    {0.0f, 0.303557992f, 0.564759672f, 0.758153379f, 0.881360948f, 0.948900044f, 0.980755866f,
     0.993683755f, 0.998197734f, 0.9995538f, 0.999904335f, 0.999982238f, 0.999997139f, 0.999999583f,
     0.99999994f, 1.0f},
    {0.311276257f, 0.2884655f, 0.2295876f, 0.156929523f, 0.092121318f, 0.0464420952f, 0.0201073848f,
     0.00747629255f, 0.00238725031f, 0.000654611329f, 0.00015414691f, 3.11704134e-05f,
     5.41247982e-06f, 8.07020058e-07f, 1.03322193e-07f, 0.0f},
    {1.49839616e-05f, -0.0219514053f, -0.0349421538f, -0.0358261354f, -0.0280413982f,
     -0.0176713262f, -0.00918123126f, -0.0039828741f, -0.00145351305f, -0.000448416075f,
     -0.000117333155f, -2.61011646e-05f, -4.94481856e-06f, -7.98839892e-07f, -1.10160521e-07f,
     0.0f},
    {-0.0079868827f, -0.0061671813f, -0.0022820076f, 0.00144062168f, 0.00332224858f, 0.00328943692f,
     0.00228474638f, 0.00123098434f, 0.000535058964f, 0.000191370054f, 5.69727417e-05f,
     1.42223862e-05f, 2.99202452e-06f, 5.32354363e-07f, 8.03218967e-08f, 0.0f},
    {0.000217415305f, 0.000784620468f, 0.00105086993f, 0.000737557071f, 0.000203546442f,
     -0.000176177215f, -0.000286484865f, -0.000224735995f, -0.000124778686f, -5.361082e-05f,
     -1.85035042e-05f, -5.23194058e-06f, -1.22628092e-06f, -2.40094863e-07f, -3.94796054e-08f,
     0.0f}};

}  // namespace fastrec
