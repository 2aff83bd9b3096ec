#include "engine/map_program.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace fastrec::engine {
namespace {

constexpr const char *kInfinite = "inf", *kBelow = "-inf", *kNan = "nan";

[[noreturn]] void refuse(int instruction, const std::string& why) {
  throw InvalidProgram("an invalid plan: instruction " + std::to_string(instruction) + " " + why);
}

MapOp op_of(const std::string& name) {
  for (int i = 0; i < kMapOps; ++i)
    if (name == kMapOpNames[i]) return static_cast<MapOp>(i);
  throw json::Error("an unknown instruction: " + name);
}

float number_of(const json::Value& value) {
  if (!value.is_text()) return static_cast<float>(value.number());
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::string& text = value.text();
  if (text == kInfinite) return kInfinity;
  if (text == kBelow) return -kInfinity;
  if (text == kNan) return std::numeric_limits<float>::quiet_NaN();
  throw json::Error("not a number: " + text);
}

json::Value written(float number) {
  if (std::isnan(number)) return kNan;
  if (std::isinf(number)) return number > 0 ? kInfinite : kBelow;
  return static_cast<double>(number);
}

int position_of(const json::Value& value) {
  const int64_t position = value.integer();
  if (position < 0 || position >= kMaxRegisters) throw json::Error("a register that is not there");
  return static_cast<int>(position);
}

int reads_of(MapOp op) { return kMapOpReads[static_cast<int>(op)]; }
const char* name_of(MapOp op) { return kMapOpNames[static_cast<int>(op)]; }

}  // namespace

MapProgram MapProgram::read(const json::Value& value) {
  MapProgram program;
  for (const json::Value& row : value.list()) {
    MapInstruction made{op_of(row[0].text())};
    const size_t operands = row.list().size() - 1;
    const int reads = reads_of(made.op);
    if (operands != static_cast<size_t>(std::max(reads, 1)))
      throw json::Error(std::string(name_of(made.op)) + " with another number of operands");
    if (made.op == MapOp::number) {
      made.number = number_of(row[1]);
    } else if (made.op == MapOp::integer) {
      made.integer = row[1].integer();
    } else {
      int* const to[] = {&made.a, &made.b, &made.c};
      for (size_t o = 0; o < operands; ++o) *to[o] = position_of(row[o + 1]);
    }
    program.instructions.push_back(made);
  }
  return program;
}

json::Value MapProgram::write() const {
  json::List rows;
  for (const MapInstruction& i : instructions) {
    json::List row{name_of(i.op)};
    if (i.op == MapOp::number) row.push_back(written(i.number));
    if (i.op == MapOp::integer) row.push_back(i.integer);
    if (i.op == MapOp::index) row.push_back(i.a);
    const int registers[] = {i.a, i.b, i.c};
    for (int o = 0; o < reads_of(i.op); ++o) row.push_back(registers[o]);
    rows.push_back(std::move(row));
  }
  return rows;
}

bool MapProgram::reads_index(int dim) const {
  return std::any_of(instructions.begin(), instructions.end(),
                     [&](const MapInstruction& i) { return i.op == MapOp::index && i.a == dim; });
}

void MapProgram::check(int inputs, int result_dims) const {
  if (inputs + size() == 0) throw InvalidProgram("an invalid plan: something to compute");
  if (inputs + size() > kMaxRegisters)
    refuse(size() - 1, "has no register: there are " + std::to_string(kMaxRegisters));
  for (int p = 0; p < size(); ++p) {
    const MapInstruction& i = instructions[p];
    const int op = static_cast<int>(i.op);
    if (op < 0 || op >= kMapOps) refuse(p, "is unknown");
    const int registers[] = {i.a, i.b, i.c};
    const bool index = i.op == MapOp::index;
    for (int o = 0; o < 3; ++o) {
      // Registers that are not read are 0.
      const int there = index && o == 0 ? result_dims : o < kMapOpReads[op] ? inputs + p : 1;
      if (registers[o] < 0 || registers[o] >= there)
        refuse(p, std::string("(") + kMapOpNames[op] + ") reads " + std::to_string(registers[o]) +
                      " of " + std::to_string(there));
    }
  }
}

MapProgram MapProgram::moved_on(int inputs, int dim) const {
  MapProgram moved;
  std::vector<int> number;  // old register -> new one; the new input is register `inputs`
  for (int i = 0; i < inputs; ++i) number.push_back(i);
  const auto last = [&] { return inputs + moved.size(); };
  for (MapInstruction i : instructions) {
    int* const registers[] = {&i.a, &i.b, &i.c};
    for (int o = 0; o < reads_of(i.op); ++o) *registers[o] = number.at(*registers[o]);
    moved.instructions.push_back(i);
    if (i.op == MapOp::index && i.a == dim)
      moved.instructions.push_back({MapOp::add_i64, last(), inputs});
    number.push_back(last());
  }
  if (inputs + 1 + moved.size() > kMaxRegisters)
    throw InvalidProgram("a map step without a register for the positions that it counts on");
  return moved;
}

}  // namespace fastrec::engine
