// The kernel over a vector type, included by one file for each instruction set, which defines
// FASTREC_KL (its target attribute) and `struct V` in this namespace before:
//
//   V::F (floats), V::M (mask), kWidth; load, store (any address), all(x), zero, add, sub, mul,
//   max, fma(a, b, c) = a * b + c, choose(mask, a, b), positive(x), ramp(first) = first + lane as
//   ints' M between(first, step, limit): lanes where 0 <= first + step * lane <= limit, exp(x <=
//   0).
//
// A lane is a query: kWidth neighbouring queries meet one key of the window at a time (broadcast),
// or kWidth neighbouring keys at one far distance, so that softmax needs no sum across lanes.
// Gradients take the slopes [key][query lane] back to rows of dims.

namespace fastrec::attention_map_kl {
namespace {

using F = V::F;
using M = V::M;
constexpr int W = V::kWidth;
constexpr int kPair = 2 * W;  // dims of two vectors
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

#define FASTREC_KL_NOINLINE FASTREC_KL __attribute__((noinline))

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Columns of a transposed matrix: one vector of room on both sides, and a stride that keeps the
// dims of one position in different cache sets.
int64_t column_stride(int64_t length) { return up(length, 16) + 3 * 16; }
int64_t most_window(const Call& call) {
  return std::min(call.length, 2 * call.pattern.window + W) + 1;
}

struct Memory {
  float *teacher_columns, *student_columns;  // [D][column_stride]; position 0 at W
  float *teacher_queries, *student_queries;  // [D][W]
  float *teacher, *student;                  // scores, then probabilities and slopes: [keys][W]
  float *keys, *queries, *dk;                // student's rows of padded dims: [L], [W], [L]
  int64_t floats = 0;

  Memory(const Call& call, int64_t far, float* scratch) {
    const auto take = [&](int64_t count) {
      float* const part = scratch ? scratch + floats : nullptr;
      floats += up(count, 16);
      return part;
    };
    const int64_t padded = up(call.student_q.dims, kPair);
    const int64_t scores = (most_window(call) + 8 + up(far, 4)) * W;
    const int64_t columns = far ? column_stride(call.length) : 0;
    teacher_columns = take(columns * call.teacher_q.dims);
    student_columns = take(columns * call.student_q.dims);
    teacher_queries = take(W * call.teacher_q.dims);
    student_queries = take(W * call.student_q.dims);
    teacher = take(scores);
    student = take(scores);
    keys = take(call.dq ? call.length * padded : 0);
    dk = take(call.dq ? call.length * padded : 0);
    queries = take(call.dq ? W * padded : 0);
  }
};

int64_t scratch_floats(const Call& call, int64_t far) { return Memory(call, far, nullptr).floats; }

// [count][D] -> [D][stride], zeros up to `width`.
void transpose(const float* rows, int64_t row_stride, int64_t count, int64_t dims, int64_t stride,
               int64_t width, float* to) {
  constexpr int64_t kStep = 16;  // a cache line of each column
  for (int64_t first = 0; first < width; first += kStep)
    for (int64_t d = 0; d < dims; ++d)
      for (int64_t p = first; p < std::min(first + kStep, width); ++p)
        to[d * stride + p] = p < count ? rows[p * row_stride + d] : 0.0f;
}

// Rows of D floats -> rows of `padded`, zeros behind.
void pad(const float* rows, int64_t row_stride, int64_t count, int64_t dims, int64_t padded,
         float* to) {
  for (int64_t p = 0; p < count; ++p) {
    std::copy_n(rows + p * row_stride, dims, to + p * padded);
    std::fill_n(to + p * padded + dims, padded - dims, 0.0f);
  }
}

// Scores of n neighbouring keys, whose rows are read in place.
template <int n>
FASTREC_KL_NOINLINE void near_scores(const float* queries, int64_t dims, const float* keys,
                                     int64_t stride, float scale, float* to) {
  F acc[n];
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) acc[t] = V::zero();
  for (int64_t d = 0; d < dims; ++d) {
    const F query = V::load(queries + d * W);
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) acc[t] = V::fma(query, V::all(keys[t * stride + d]), acc[t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) V::store(to + t * W, V::mul(acc[t], V::all(scale)));
}

// Scores at four far distances; keys[n] is the column entry of lane 0's key.
FASTREC_KL_NOINLINE void far_scores(const float* queries, int64_t dims, const float* const* keys,
                                    int64_t stride, float scale, float* to) {
  F acc[4];
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) acc[n] = V::zero();
  for (int64_t d = 0; d < dims; ++d) {
    const F query = V::load(queries + d * W);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) acc[n] = V::fma(query, V::load(keys[n] + d * stride), acc[n]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) V::store(to + n * W, V::mul(acc[n], V::all(scale)));
}

// The keys of one block of queries: those of the window, then far ones by the key of lane 0.
struct Keys {
  int64_t first, near, far;
  std::vector<int64_t>* far_first;
  int64_t count() const { return near + far; }
};

// Inputs of one map's scores.
struct Map {
  const Rows &q, &k;
  float scale;
  float *queries, *columns, *scores;
};

FASTREC_KL void block_scores(const Map& map, const float* q, const float* k, int64_t rows,
                             int64_t stride, const Keys& keys) {
  transpose(q, map.q.row_stride, rows, map.q.dims, W, W, map.queries);
  float* to = map.scores;
  const float* key = k + keys.first * map.k.row_stride;
  int64_t n = 0;
  for (; n + 8 <= keys.near; n += 8, key += 8 * map.k.row_stride, to += 8 * W)
    near_scores<8>(map.queries, map.q.dims, key, map.k.row_stride, map.scale, to);
  for (; n < keys.near; ++n, key += map.k.row_stride, to += W)
    near_scores<1>(map.queries, map.q.dims, key, map.k.row_stride, map.scale, to);
  for (n = 0; n < keys.far; n += 4, to += 4 * W) {
    const float* column[4];
    for (int i = 0; i < 4; ++i)
      column[i] = map.columns + W + (*keys.far_first)[std::min(n + i, keys.far - 1)];
    far_scores(map.queries, map.q.dims, column, stride, map.scale, to);
  }
}

// Hides what a query does not see: minus infinity.
FASTREC_KL void hide(const Call& call, int64_t i0, int64_t valid, const Keys& keys,
                     const Memory& memory) {
  const F hidden = V::all(kMinusInfinity);
  const auto window = static_cast<int32_t>(std::min(call.pattern.window, call.length));
  const int32_t reach = call.pattern.causal ? window : 2 * window;
  for (int64_t n = 0; n < keys.count(); ++n) {
    float *const student = memory.student + n * W, *const teacher = memory.teacher + n * W;
    M seen, taught;
    if (n < keys.near) {
      const auto from = static_cast<int32_t>(keys.first + n - i0) + window;
      seen = V::between(from, -1, reach);
      taught = call.teacher_causal ? V::between(from, -1, window) : seen;
    } else {
      const int64_t first = (*keys.far_first)[n - keys.near];
      seen = V::between(static_cast<int32_t>(first), 1, static_cast<int32_t>(valid - 1));
      taught = call.teacher_causal && first > i0 ? V::between(-1, 0, 0) : seen;
    }
    V::store(student, V::choose(seen, V::load(student), hidden));
    V::store(teacher, V::choose(taught, V::load(teacher), hidden));
  }
}

// Scores -> slopes S - T in `student`; adds the rows' KL.
FASTREC_KL double divergence(const Memory& memory, int64_t count, int64_t rows) {
  F student_top = V::all(kLowest), teacher_top = student_top;
  for (int64_t n = 0; n < count; ++n) {
    student_top = V::max(student_top, V::load(memory.student + n * W));
    teacher_top = V::max(teacher_top, V::load(memory.teacher + n * W));
  }
  F student_sum = V::zero(), teacher_sum = V::zero(), expected = V::zero();
  for (int64_t n = 0; n < count; ++n) {
    const F s = V::sub(V::load(memory.student + n * W), student_top);
    const F t = V::sub(V::load(memory.teacher + n * W), teacher_top);
    const F own = V::exp(s), target = V::exp(t);
    student_sum = V::add(student_sum, own);
    teacher_sum = V::add(teacher_sum, target);
    // A key without weight in the teacher's map adds nothing (its difference may be no number).
    const F difference = V::choose(V::positive(target), V::sub(t, s), V::zero());
    expected = V::fma(target, difference, expected);
    V::store(memory.student + n * W, own);
    V::store(memory.teacher + n * W, target);
  }
  alignas(64) float own_sum[W], target_sum[W], mean[W], own_inverse[W], target_inverse[W];
  V::store(own_sum, student_sum);
  V::store(target_sum, teacher_sum);
  V::store(mean, expected);
  double total = 0.0;
  for (int r = 0; r < W; ++r) {
    own_inverse[r] = r < rows ? 1.0f / own_sum[r] : 0.0f;
    target_inverse[r] = r < rows ? 1.0f / target_sum[r] : 0.0f;
    if (r < rows) total += mean[r] * target_inverse[r] + std::log(own_sum[r] / target_sum[r]);
  }
  const F own_scale = V::load(own_inverse), target_scale = V::load(target_inverse);
  for (int64_t n = 0; n < count; ++n) {
    const F target = V::mul(V::load(memory.teacher + n * W), target_scale);
    const F own = V::mul(V::load(memory.student + n * W), own_scale);
    V::store(memory.student + n * W, V::sub(own, target));
  }
  return total;
}

// dq of four query lanes from `lane` on, kPair dims.
FASTREC_KL_NOINLINE void query_gradients(const float* slopes, const Keys& keys, int64_t lane,
                                         int64_t valid, const float* rows, int64_t padded,
                                         float scale, float* to) {
  F acc[4][2];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) acc[r][0] = acc[r][1] = V::zero();
  const float* key = rows + keys.first * padded;
  for (int64_t n = 0; n < keys.near; ++n, key += padded, slopes += W) {
    const F low = V::load(key), high = V::load(key + W);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const F slope = V::all(slopes[lane + r]);
      acc[r][0] = V::fma(slope, low, acc[r][0]);
      acc[r][1] = V::fma(slope, high, acc[r][1]);
    }
  }
  for (int64_t n = 0; n < keys.far; ++n, slopes += W) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      // A key outside has slope 0: any row serves.
      const int64_t j = std::clamp<int64_t>((*keys.far_first)[n] + lane + r, 0, valid - 1);
      const F slope = V::all(slopes[lane + r]);
      acc[r][0] = V::fma(slope, V::load(rows + j * padded), acc[r][0]);
      acc[r][1] = V::fma(slope, V::load(rows + j * padded + W), acc[r][1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    V::store(to + r * kPair, V::mul(acc[r][0], V::all(scale)));
    V::store(to + r * kPair + W, V::mul(acc[r][1], V::all(scale)));
  }
}

// dk of n neighbouring keys, kPair dims, from all query lanes.
template <int n>
FASTREC_KL_NOINLINE void key_gradients(const float* slopes, const float* queries, int64_t padded,
                                       float* to) {
  F acc[n][2];
#pragma GCC unroll 4
  for (int t = 0; t < n; ++t) {
    acc[t][0] = V::load(to + t * padded);
    acc[t][1] = V::load(to + t * padded + W);
  }
  for (int r = 0; r < W; ++r) {
    const F low = V::load(queries + r * padded), high = V::load(queries + r * padded + W);
#pragma GCC unroll 4
    for (int t = 0; t < n; ++t) {
      const F slope = V::all(slopes[t * W + r]);
      acc[t][0] = V::fma(slope, low, acc[t][0]);
      acc[t][1] = V::fma(slope, high, acc[t][1]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < n; ++t) {
    V::store(to + t * padded, acc[t][0]);
    V::store(to + t * padded + W, acc[t][1]);
  }
}

// dk of one far distance: each query lane adds to a key of its own.
FASTREC_KL_NOINLINE void far_key_gradients(const float* slopes, const float* queries, int64_t begin,
                                           int64_t end, int64_t padded, float* to) {
  for (int64_t r = begin; r < end; ++r) {
    const F slope = V::all(slopes[r]);
    for (int64_t d = 0; d < padded; d += W) {
      float* const at = to + r * padded + d;
      V::store(at, V::fma(slope, V::load(queries + r * padded + d), V::load(at)));
    }
  }
}

FASTREC_KL void gradients(const Call& call, const Memory& memory, const Keys& keys, int64_t rows,
                          int64_t valid, int64_t padded, float* dq) {
  const int64_t dims = call.student_q.dims;
  const float* const slopes = memory.student;
  for (int64_t d = 0; d < padded; d += kPair) {
    for (int64_t lane = 0; lane < rows; lane += 4) {
      alignas(64) float four[4 * kPair];
      query_gradients(slopes, keys, lane, valid, memory.keys + d, padded, call.student_scale, four);
      for (int64_t r = 0; r < std::min<int64_t>(4, rows - lane); ++r)
        std::copy_n(four + r * kPair, std::min<int64_t>(kPair, dims - d),
                    dq + (lane + r) * dims + d);
    }
    float* to = memory.dk + keys.first * padded + d;
    int64_t n = 0;
    for (; n + 4 <= keys.near; n += 4, to += 4 * padded)
      key_gradients<4>(slopes + n * W, memory.queries + d, padded, to);
    for (; n < keys.near; ++n, to += padded)
      key_gradients<1>(slopes + n * W, memory.queries + d, padded, to);
  }
  for (int64_t n = 0; n < keys.far; ++n) {
    const int64_t first = (*keys.far_first)[n];
    far_key_gradients(slopes + (keys.near + n) * W, memory.queries, std::max<int64_t>(0, -first),
                      std::min<int64_t>(rows, valid - first), padded, memory.dk + first * padded);
  }
}

FASTREC_KL void head(const Call& call, int64_t b, int64_t h, float* scratch) {
  const int64_t valid = call.keys(b), dims = call.student_q.dims, padded = up(dims, kPair);
  const int64_t far = call.pattern.far_count(h), stride = column_stride(call.length);
  const Memory memory(call, far, scratch);
  const Map student = {call.student_q,         call.student_k,         call.student_scale,
                       memory.student_queries, memory.student_columns, memory.student};
  const Map teacher = {call.teacher_q,         call.teacher_k,         call.teacher_scale,
                       memory.teacher_queries, memory.teacher_columns, memory.teacher};
  const float *sq = student.q.head(b, h), *sk = student.k.head(b, h);
  const float *tq = teacher.q.head(b, h), *tk = teacher.k.head(b, h);
  float* const dq = call.dq ? call.dq + (b * call.heads + h) * call.length * dims : nullptr;
  if (far) {
    std::fill_n(memory.student_columns, stride * dims, 0.0f);
    std::fill_n(memory.teacher_columns, stride * teacher.q.dims, 0.0f);
    transpose(sk, student.k.row_stride, valid, dims, stride, valid, memory.student_columns + W);
    transpose(tk, teacher.k.row_stride, valid, teacher.q.dims, stride, valid,
              memory.teacher_columns + W);
  }
  if (dq) {
    pad(sk, student.k.row_stride, valid, dims, padded, memory.keys);
    std::fill_n(memory.dk, call.length * padded, 0.0f);
    std::fill_n(memory.queries, W * padded, 0.0f);
    std::fill_n(dq + valid * dims, (call.length - valid) * dims, 0.0f);
  }
  std::vector<int64_t> far_first(static_cast<size_t>(far));
  double total = 0.0;
  for (int64_t i0 = 0; i0 < valid; i0 += W) {
    const int64_t rows = std::min<int64_t>(W, valid - i0);
    Keys keys = {call.pattern.window_begin(i0), 0, 0, &far_first};
    keys.near = call.pattern.window_end(i0 + rows - 1, valid) - keys.first;
    for (int64_t n = 0; n < far; ++n) {
      const int64_t first = i0 + call.pattern.far_shift(h, n);
      if (first > -W && first < valid) far_first[static_cast<size_t>(keys.far++)] = first;
    }
    block_scores(student, sq + i0 * student.q.row_stride, sk, rows, stride, keys);
    block_scores(teacher, tq + i0 * teacher.q.row_stride, tk, rows, stride, keys);
    hide(call, i0, valid, keys, memory);
    total += divergence(memory, keys.count(), rows);
    if (!dq) continue;
    pad(sq + i0 * student.q.row_stride, student.q.row_stride, rows, dims, padded, memory.queries);
    gradients(call, memory, keys, rows, valid, padded, dq + i0 * dims);
  }
  call.kl[b * call.heads + h] = static_cast<float>(total);
  if (!dq) return;
  float* const dk = call.dk + (b * call.heads + h) * call.length * dims;
  for (int64_t j = 0; j < call.length; ++j)
    for (int64_t d = 0; d < dims; ++d)
      dk[j * dims + d] = call.student_scale * memory.dk[j * padded + d];
}

}  // namespace
}  // namespace fastrec::attention_map_kl
