// What this machine can do at most, measured: the denominators of every "% of peak".
#pragma once

namespace fastrec {

// 10^9 multiply and add operations a second of one core running vpdpbusd on registers alone for
// about `seconds`; 0 where the CPU has no AVX-512 VNNI.
double vpdpbusd_peak_gops(double seconds);

}  // namespace fastrec
