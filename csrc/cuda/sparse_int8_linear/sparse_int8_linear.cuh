// The kernel of sparse_int8_linear. y [M, N] of x [M, K] and the packed weight (csrc/cpu's header
// states the op; the arithmetic outside the accumulator is the same, in the same order, so that
// results agree with the CPU's to the last bit).
//
// Weights are the matrix instruction's 16 rows, activations its 8 columns: a register of either
// then holds 4 consecutive inputs of one output or of one row, which is what a kept group is made
// of. A step is 8 groups, the 32 inputs of one instruction; which groups those are costs nothing,
// since each lane reads its activations from shared memory one group at a time.
//
// Where every output keeps at most 2 of the 4 inputs of every kept group (2:4), a step is 16
// groups, the 64 inputs of one sparse instruction: half the bytes, and half the instructions.
//
// Device form of a panel (kernels/sparse_int8_linear/_device.py makes it): groups in order of
// chunks of 512 inputs, each chunk filled up to whole steps with groups of zeros. Within a chunk
// groups stand so that any 4 in a row lie in different shared memory banks, where the pattern
// allows it.
#pragma once

#include "common.cuh"
#include "sparse_int8_linear/params.cuh"

namespace fastrec::sparse_int8_linear {

__device__ __forceinline__ uint8_t quantise(float value, float inverse_scale, int32_t zero_point) {
  const float scaled = __fmul_rn(value, inverse_scale);
  const float low = static_cast<float>(-zero_point), high = static_cast<float>(255 - zero_point);
  // A NaN becomes the lower bound, as on the CPU.
  const float raised = scaled > low ? scaled : low;
  return static_cast<uint8_t>(__float2int_rn(raised < high ? raised : high) + zero_point);
}

__device__ __forceinline__ float from_bf16(uint16_t half) {
  return __uint_as_float(static_cast<uint32_t>(half) << 16);
}

__device__ __forceinline__ uint16_t to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// csrc/cpu/gelu.h, which says what it is, with the same numbers: E(|x|) = erf(|x| sqrt(1/2)), a
// polynomial in each of sixteen pieces.
__device__ const float kErf[5][16] = {
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

__device__ __forceinline__ float gelu(float value) {
  const float s = fminf(15.0f, __fmul_rn(fabsf(value), 2.563261985f));
  const int piece = __float2int_rn(s);
  const float t = __fadd_rn(s, -static_cast<float>(piece)), half = __fmul_rn(0.5f, value);
  float erf = kErf[4][piece];
#pragma unroll
  for (int i = 3; i >= 0; --i) erf = fmaf(erf, t, kErf[i][piece]);
  return fmaf(fabsf(half), erf, half);
}

__device__ __forceinline__ float finish(const Params& params, int32_t sum, int64_t n) {
  const float scaled = __fmul_rn(static_cast<float>(sum), params.scale[n]);
  const float value = __fadd_rn(scaled, params.bias[n]);
  if (params.activation == kRelu) return value > 0.0f ? value : 0.0f;
  return params.activation == kGelu ? gelu(value) : value;
}

// Rows row0 .. row0 + kRows of one chunk of x as bytes in `stage`, kRowBytes a row; what lies
// outside x is 0. Copies of bytes are asynchronous, other inputs are quantised on the way. A warp
// takes a row: 32 lanes x 16 bytes are a chunk's.
template <int kRows, int kThreads>
__device__ __forceinline__ void load_chunk(const Params& params, int64_t row0, int chunk,
                                           uint8_t* stage) {
  static_assert(kWarp * 16 == kChunkInputs, "a row of a chunk is one copy of each lane");
  const int lane = threadIdx.x % kWarp, k0 = chunk * kChunkInputs;
  const int width = params.inputs - k0 < kChunkInputs ? params.inputs - k0 : kChunkInputs;
  for (int row = threadIdx.x / kWarp; row < kRows; row += kThreads / kWarp) {
    const bool valid = row0 + row < params.rows;
    const int64_t at = valid ? (row0 + row) * params.inputs + k0 : 0;
    uint8_t* const to = stage + row * kRowBytes;
    if (params.x_dtype == kU8 && params.x_alignment == 16) {
      const int k = lane * 16;
      const uint8_t* const from = static_cast<const uint8_t*>(params.x) + at;
      if (k < width) copy_async_16(to + k, from + (valid ? k : 0), valid);
    } else if (params.x_dtype == kU8 && params.x_alignment == 4) {
      const uint8_t* const from = static_cast<const uint8_t*>(params.x) + at;
      for (int k = lane * 4; k < width; k += kWarp * 4)
        copy_async_4(to + k, from + (valid ? k : 0), valid);
    } else {
      for (int k = lane; k < width; k += kWarp) {
        uint8_t byte = 0;
        if (valid && params.x_dtype == kU8) {
          byte = static_cast<const uint8_t*>(params.x)[at + k];
        } else if (valid) {
          const float value = params.x_dtype == kF32
                                  ? static_cast<const float*>(params.x)[at + k]
                                  : from_bf16(static_cast<const uint16_t*>(params.x)[at + k]);
          byte = quantise(value, params.x_inverse_scale, params.x_zero_point);
        }
        to[k] = byte;
      }
    }
  }
  copy_async_commit();
}

// The operands of one lane in one step: its words of the weights, by panel and 16 outputs, and
// where its groups lie in a row of activations.
template <int kWide, bool kTwoFour>
struct Step {
  static constexpr int kGroups = kTwoFour ? 16 : 8;
  uint32_t weights[kWide][2][4];
  uint32_t meta[kTwoFour ? kWide : 1][2];
  int offset[kGroups / 4];

  // Of step `at` of a panel; the next panel of `kWide` has it `apart` steps later.
  __device__ __forceinline__ void fetch(const Params& params, int64_t at, int64_t apart, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int wide = 0; wide < kWide; ++wide)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t step = at + wide * apart;
        const uint32_t* const from =
            reinterpret_cast<const uint32_t*>(params.values) + step * (kStepBytes / 4);
        if constexpr (kTwoFour) {
          // Stored lane by lane.
          const uint4 words = __ldg(reinterpret_cast<const uint4*>(from) + half * kWarp + lane);
          weights[wide][half][0] = words.x, weights[wide][half][1] = words.y;
          weights[wide][half][2] = words.z, weights[wide][half][3] = words.w;
          meta[wide][half] = __ldg(params.meta + (step * 2 + half) * kWarp + lane);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            weights[wide][half][i] =
                __ldg(from + (i / 2 * 4 + t) * kPanelOutputs + half * 16 + i % 2 * 8 + g);
        }
      }
#pragma unroll
    for (int i = 0; i < kGroups / 4; ++i)
      offset[i] = __ldg(params.offset + at * kGroups + i * 4 + t);
  }

  // sums[wide][half] += 16 outputs of the step by 8 rows of activations, of which `row` is the
  // lane's.
  template <int kColumns>
  __device__ __forceinline__ void multiply(int32_t (&sums)[kWide][2][kColumns][4], int column,
                                           const uint8_t* row) const {
    uint32_t x[kGroups / 4];
#pragma unroll
    for (int i = 0; i < kGroups / 4; ++i)
      x[i] = *reinterpret_cast<const uint32_t*>(row + offset[i]);
#pragma unroll
    for (int wide = 0; wide < kWide; ++wide)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kTwoFour)
          mma_sp_s8_u8(sums[wide][half][column], weights[wide][half], x, meta[wide][half]);
        else
          mma_s8_u8(sums[wide][half][column], weights[wide][half], x);
      }
  }
};

// kRows:    rows of x of a block, a multiple of 8 kBands
// kWide:    panels that a warp multiplies by the same activations: 2 only for weights whose panels
//           come in pairs that keep the same groups (dense ones do)
// kPanels:  warps side by side, each with kWide panels of its own
// kSlices:  warps that share the steps of a panel
// kAhead:   steps whose weights are under way, in registers
// kBands:   warps that take other rows of the same panels, whose weights the later ones find in L1
// kTwoFour: the weight has the 2:4 form
template <int kRows, int kWide, int kPanels, int kSlices, int kAhead, int kBands, bool kTwoFour>
__global__ void __launch_bounds__(block_threads(kPanels, kSlices, kBands), 1)
    multiply(const Params params) {
  constexpr int kThreads = block_threads(kPanels, kSlices, kBands);
  constexpr int kBandRows = kRows / kBands, kColumns = kBandRows / 8;
  uint8_t* const shared = dynamic_shared();
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int warp = threadIdx.x / kWarp, side = warp % kPanels;
  const int slice = warp / kPanels % kSlices, band = warp / (kPanels * kSlices);
  const int blocks = static_cast<int>(ceil_div(params.panels, kPanels * kWide));
  const int panel0 = blockIdx.x % blocks * (kPanels * kWide);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / blocks) * kRows;
  const int panel = panel0 + side * kWide;

  int32_t sums[kWide][2][kColumns][4] = {};
  // Beyond the last panel a warp has no step, and only helps to load.
  const bool works = panel < params.panels;
  const int32_t* const starts = params.step_start + (works ? panel : 0) * (params.chunks + 1);
  const int32_t first = starts[0], last = works ? starts[params.chunks] : first;
  Step<kWide, kTwoFour> ahead[kAhead];
  auto fetch = [&](Step<kWide, kTwoFour>& step, int32_t at) {
    // A pair's second panel follows the first, with as many steps.
    if (at < last) step.fetch(params, at, last - first, lane);
  };

  int chunk = -1;
  int32_t chunk_end = first;
  const uint8_t* lane_rows = nullptr;  // the lane's row of every 8, in the chunk at hand
  // Every warp enters every chunk, in order.
  auto enter_chunk = [&] {
    ++chunk;
    chunk_end = starts[chunk + 1];
    lane_rows = shared + (chunk % kStages * kRows + band * kBandRows + g) * kRowBytes;
    copy_async_wait<kStages - 2>();
    __syncthreads();
    // All have left the chunk before, whose memory the next to come takes.
    const int next = chunk + kStages - 1;
    if (next < params.chunks)
      load_chunk<kRows, kThreads>(params, row0, next,
                                  shared + next % kStages * (kRows * kRowBytes));
    else
      copy_async_commit();
  };

#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(ahead[i], first + slice + i * kSlices);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < params.chunks)
      load_chunk<kRows, kThreads>(params, row0, i, shared + i * (kRows * kRowBytes));
    else
      copy_async_commit();
  }

  for (int32_t at = first + slice; at < last;) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (at >= last) break;
      while (at >= chunk_end) enter_chunk();
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        ahead[i].multiply(sums, column, lane_rows + column * (8 * kRowBytes));
      fetch(ahead[i], at + kAhead * kSlices);
      at += kSlices;
    }
  }
  while (chunk < params.chunks - 1) enter_chunk();

  // Sums to shared memory, one part a slice, and from there to y, whole rows at a time.
  copy_async_wait<0>();
  __syncthreads();
  int32_t* const parts = reinterpret_cast<int32_t*>(shared);
#pragma unroll
  for (int wide = 0; wide < kWide; ++wide)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = band * kBandRows + column * 8 + 2 * t + i % 2;
          const int n = half * 16 + i / 2 * 8 + g;
          const int part = (slice * kPanels + side) * kWide + wide;
          parts[(part * kRows + row) * kSumsRow + n] = sums[wide][half][column][i];
        }
  __syncthreads();

  constexpr int kFours = kPanels * kWide * kPanelOutputs / 4;
  for (int i = threadIdx.x; i < kRows * kFours; i += kThreads) {
    const int row = i / kFours, four = i % kFours;
    const int64_t n = static_cast<int64_t>(panel0) * kPanelOutputs + four * 4;
    if (row0 + row >= params.rows || n >= params.outputs) continue;
    int32_t sum[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = params.start[n + j];
#pragma unroll
    for (int part = 0; part < kSlices; ++part) {
      const int32_t* const from =
          parts + ((part * kPanels * kWide + four / (kPanelOutputs / 4)) * kRows + row) * kSumsRow +
          four % (kPanelOutputs / 4) * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += from[j];
    }
    float value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = finish(params, sum[j], n + j);
    const int64_t to = (row0 + row) * params.outputs + n;
    if (params.y_dtype == kU8) {
      uint8_t byte[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        byte[j] = quantise(value[j], params.y_inverse_scale, params.y_zero_point);
      store_fours(static_cast<uint8_t*>(params.y) + to, byte, params.outputs - n,
                  params.y_alignment);
    } else if (params.y_dtype == kF32) {
      store_fours(static_cast<float*>(params.y) + to, value, params.outputs - n,
                  params.y_alignment);
    } else {
      uint16_t half[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) half[j] = to_bf16(value[j]);
      store_fours(static_cast<uint16_t*>(params.y) + to, half, params.outputs - n,
                  params.y_alignment);
    }
  }
}

}  // namespace fastrec::sparse_int8_linear
