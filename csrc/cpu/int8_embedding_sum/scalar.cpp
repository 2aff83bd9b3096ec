// Plain loops, any machine: bit for bit what the vector kernels compute.
#include "element.h"
#include "int8_embedding_sum/int8_embedding_sum.h"

namespace fastrec::int8_embedding_sum {
namespace {

float entry(const Table& table, int64_t row, int64_t at) {
  if (table.type == Type::f32) return static_cast<const float*>(table.rows)[at];
  if (table.type == Type::bf16) return from_bf16(static_cast<const uint16_t*>(table.rows)[at]);
  return static_cast<float>(static_cast<const int8_t*>(table.rows)[at]) * table.scale[row];
}

bool gather(const Call& call, int64_t begin, int64_t end) {
  bool numbers = true;
  for (int64_t n = begin; n < end; ++n)
    for (int64_t d = 0; d < call.dims; ++d) {
      float sum = 0.0f;
      for (int t = 0; t < call.table_count; ++t) {
        const int64_t row = row_of(call.tables[t], n);
        if (row >= 0) sum += entry(call.tables[t], row, row * call.dims + d);
      }
      if (!call.out_u8)
        static_cast<float*>(call.out)[n * call.dims + d] = sum;
      else if (std::isnan(sum))
        numbers = false;
      else
        static_cast<uint8_t*>(call.out)[n * call.dims + d] = quantise(sum, call.quantisation);
    }
  return numbers;
}

}  // namespace

const Kernel kScalar = {Isa::scalar, gather};

}  // namespace fastrec::int8_embedding_sum
