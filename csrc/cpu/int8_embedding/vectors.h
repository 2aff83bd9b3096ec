// The vector kernel, written once over sixteen lanes; an ISA file includes its vec16 header and
// this one. Rows a few lookups ahead are prefetched: a table of a recommender does not fit the
// caches.
#include <algorithm>

#include "int8_embedding/int8_embedding.h"

namespace fastrec::int8_embedding {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 8;  // lookups: about one memory latency of work

FASTREC_VEC void gather(const Call& call, int64_t begin, int64_t end) {
  const int64_t whole = call.dims / kLanes * kLanes;
  const Lanes tail = first_lanes(call.dims - whole);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t next = call.ids[std::min(i + kAhead, end - 1)];
    for (int64_t d = 0; d < call.dims; d += kLine)
      _mm_prefetch(reinterpret_cast<const char*>(call.table + next * call.dims + d), _MM_HINT_T0);
    const int8_t* row = call.table + call.ids[i] * call.dims;
    float* out = call.out + i * call.dims;
    const Floats scale = splat(call.scale[call.ids[i]]);
    for (int64_t d = 0; d < whole; d += kLanes)
      store(out + d, multiply(to_float(load_s8(row + d)), scale));
    if (whole < call.dims)
      store(out + whole, multiply(to_float(load_s8(row + whole, tail)), scale), tail);
  }
}

}  // namespace
}  // namespace fastrec::int8_embedding
