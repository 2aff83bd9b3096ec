#include "engine/planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

namespace fastrec::engine {
namespace {

// A layer whose weights outgrow a core's second cache is better shared out by its outputs: each
// core then reads a part of them.
constexpr int64_t kMaxWeightBytes = 1 << 20;

bool depends(const Shape& shape, int symbol) {
  return std::any_of(shape.begin(), shape.end(),
                     [&](const Extent& size) { return size.depends_on(symbol); });
}

// The users are the first dimension alone, once.
bool leads(const Shape& shape, int symbol) {
  if (shape.empty() || shape[0].exponent[symbol] != 1) return false;
  return std::none_of(shape.begin() + 1, shape.end(),
                      [&](const Extent& size) { return size.depends_on(symbol); });
}

const Shape& buffer_shape(const Program& program, const View& view) {
  return program.buffers[view.buffer].shape;
}

bool is_constant(const Program& program, const View& view) {
  return program.buffers[view.buffer].space == Space::constant;
}

// Not a single user's values, for all; nor users in any dimension but the first.
bool user_by_user(const Program& program, const View& view, int symbol) {
  if (depends(buffer_shape(program, view), symbol))
    return leads(view.sizes, symbol) && view.strides[0].number() != 0;
  return leads(view.sizes, symbol) || !depends(view.sizes, symbol);
}

bool reads_index(const ProgramStep& step, int dim) {
  return step.kind->reads_index(step.fields.get(), dim);
}

bool keeps_users_apart(const Program& program, const ProgramStep& step, int symbol) {
  const Shape& result = step.operands.back().sizes;
  for (const View& view : step.operands)
    if (!view.absent() && !user_by_user(program, view, symbol)) return false;
  if (!leads(result, symbol)) {
    return std::none_of(step.operands.begin(), step.operands.end(), [&](const View& view) {
      return !view.absent() && leads(view.sizes, symbol);
    });
  }
  const Users users = step.kind->traits.users;
  if (users == Users::mixed || reads_index(step, 0)) return false;
  if (step.kind->operands[0].many) return true;
  const Shape& first = step.operands[0].sizes;
  return first.size() > (users == Users::apart_of_two) && leads(first, symbol);
}

// The symbol whose rows a step keeps apart, as far as is known, or -1.
int row_symbol(const Program& program, const ProgramStep& step, int users) {
  const Shape& result = step.operands.back().sizes;
  const RowDimension found = row_dimension(result, users);
  if (found.none()) return -1;
  const int last = static_cast<int>(result.size()) - 1;
  const auto others_depend = [&] {
    for (size_t o = 1; o + 1 < step.operands.size(); ++o)
      if (!step.operands[o].absent() &&
          depends(buffer_shape(program, step.operands[o]), found.symbol))
        return true;
    return false;
  };
  bool apart = false;
  switch (step.kind->rows(step.fields.get())) {
    case Rows::mixed:
      break;
    case Rows::elements:
      apart = found.dim < last && !reads_index(step, found.dim);
      break;
    case Rows::lookup:
      apart = found.dim < last && row_dimension(step.operands[0].sizes, users) == found &&
              !others_depend();
      break;
    case Rows::last: {
      int64_t weights = 0;
      apart = found.dim < last;
      for (const View& view : step.operands) {
        if (view.absent()) continue;
        if (is_constant(program, view))
          weights += program.constants[program.buffers[view.buffer].index].bytes;
        else
          apart = apart && row_dimension(view.sizes, users) == found;
      }
      apart = apart && weights <= kMaxWeightBytes;
      break;
    }
    case Rows::queries:
      apart = row_dimension(step.operands[0].sizes, users) == RowDimension{2, found.symbol} &&
              found.dim == 1 && !others_depend();
      break;
  }
  if (!apart) return -1;
  for (size_t o = 0; o < step.operands.size(); ++o)
    if (!step.operands[o].absent() && !step.writes(o) &&
        !each_its_own(program, step.operands[o], found.symbol))
      return -1;
  return found.symbol;
}

uint32_t tiled(const ProgramStep& step) {
  return step.kind->tiled ? step.kind->tiled(step.fields.get()) : 0;
}

// First and last step that has to do with each buffer.
struct Span {
  int first = std::numeric_limits<int>::max(), last = -1;
};

std::vector<Span> spans(const Program& program) {
  std::vector<Span> found(program.buffers.size());
  for (int p = 0; p < static_cast<int>(program.steps.size()); ++p)
    for (const View& view : program.steps[p].operands) {
      if (view.absent()) continue;
      Span& span = found[view.buffer];
      span.first = std::min(span.first, p);
      span.last = p;
    }
  return found;
}

// The groups of two steps and more.
std::vector<RowGroup> row_groups(const Program& program, int users) {
  const int count = static_cast<int>(program.steps.size());
  std::vector<int> symbols(count);
  for (int p = 0; p < count; ++p) symbols[p] = row_symbol(program, program.steps[p], users);
  const std::vector<Span> used = spans(program);
  std::vector<RowGroup> groups;
  for (int begin = 0, next; begin < count; begin = next) {
    next = begin + 1;
    while (next < count && symbols[next] == symbols[begin]) ++next;
    if (symbols[begin] < 0) continue;
    // Without the steps at its ends that share tiles with steps outside.
    int first = begin, end = next;
    const auto outside = [&](int p) {
      const ProgramStep& step = program.steps[p];
      const uint32_t tiles = tiled(step);
      for (size_t o = 0; o < step.operands.size(); ++o) {
        if (!(tiles >> o & 1) || step.operands[o].absent()) continue;
        const Span& span = used[step.operands[o].buffer];
        if (span.first < first || span.last >= end) return true;
      }
      return false;
    };
    while (first < end) {
      int lowest = -1, highest = -1;
      for (int p = first; p < end; ++p)
        if (outside(p)) lowest = lowest < 0 ? p : lowest, highest = p;
      if (lowest < 0) break;
      if (lowest - first < end - 1 - highest)
        first = highest + 1;
      else
        end = lowest;
    }
    if (end - first > 1) groups.push_back({first, end, symbols[begin]});
  }
  return groups;
}

// Gives every arena buffer the slot whose last user is done and whose size fits best: the index of
// each buffer's slot, and the sizes in bytes of each slot's buffers.
//
// Sizes may depend on symbols, so a slot is as large as the largest of its buffers turns out to be
// in a call. Buffers that grow alike share a slot: a small one never claims a large one's. Threads
// are at different steps of a row group, so what one of its steps uses is in use throughout.
std::vector<Slot> assign_slots(const Program& program, const std::vector<RowGroup>& groups,
                               std::vector<int>& slot_of) {
  const int count = static_cast<int>(program.steps.size());
  std::vector<Span> within(count);
  for (int p = 0; p < count; ++p) within[p] = {p, p};
  for (const RowGroup& group : groups)
    for (int p = group.begin; p < group.end; ++p) within[p] = {group.begin, group.end - 1};
  std::vector<Span> lives(program.buffers.size());
  std::vector<int> order;  // arena buffers as the steps come to them
  for (int p = 0; p < count; ++p) {
    const auto note = [&](const View& view) {
      if (view.absent() || program.buffers[view.buffer].space != Space::arena) return;
      Span& life = lives[view.buffer];
      if (life.last < 0) {
        order.push_back(view.buffer);
        life.first = within[p].first;
      }
      life.last = within[p].last;
    };
    const ProgramStep& step = program.steps[p];
    for (size_t o = 0; o < step.operands.size(); ++o)
      if (!step.writes(o)) note(step.operands[o]);
    for (size_t o = 0; o < step.operands.size(); ++o)
      if (step.writes(o)) note(step.operands[o]);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return std::pair(lives[a].first, lives[a].last) < std::pair(lives[b].first, lives[b].last);
  });
  std::vector<Slot> slots;
  std::vector<int> busy_until;
  std::vector<int64_t> largest;
  slot_of.assign(program.buffers.size(), -1);
  for (const int b : order) {
    const Buffer& buffer = program.buffers[b];
    const Extent size = Extent(bytes_of(buffer.dtype)) * product(buffer.shape);
    int best = -1;
    int64_t best_cost = std::numeric_limits<int64_t>::max();
    for (size_t s = 0; s < slots.size(); ++s) {
      const bool alike = slots[s].bytes[0].exponent == size.exponent;
      const int64_t cost = std::abs(largest[s] - size.coefficient);
      if (busy_until[s] < lives[b].first && alike && cost < best_cost)
        best = static_cast<int>(s), best_cost = cost;
    }
    if (best < 0) {
      best = static_cast<int>(slots.size());
      slots.emplace_back();
      busy_until.push_back(-1);
      largest.push_back(0);
    }
    slots[best].bytes.push_back(size);
    largest[best] = std::max(largest[best], size.coefficient);
    busy_until[best] = lives[b].last;
    slot_of[b] = best;
  }
  return slots;
}

// How many rows of one user the layers with weights see.
std::vector<Extent> rows_of_layers(const Program& program, int users) {
  std::vector<Extent> rows;
  for (const ProgramStep& step : program.steps) {
    const bool weights =
        std::any_of(step.operands.begin(), step.operands.end(), [&](const View& view) {
          return !view.absent() && is_constant(program, view) && view.sizes.size() > 1;
        });
    const bool one_row = step.kind->traits.one_row;
    if (!weights || (!one_row && step.kind->rows(step.fields.get()) != Rows::last)) continue;
    const Shape& x = step.operands[0].sizes;
    const Extent count = one_row ? Extent(1) : product(x, 0, x.size() - 1).without(users);
    if (std::find(rows.begin(), rows.end(), count) == rows.end()) rows.push_back(count);
  }
  return rows;
}

}  // namespace

RowDimension row_dimension(const Shape& shape, int users) {
  RowDimension found;
  for (size_t d = 0; d < shape.size(); ++d) {
    const Extent own = users < 0 ? shape[d] : shape[d].without(users);
    if (own.is_number()) continue;
    if (!found.none()) return {};
    for (int s = 0; s < kMaxSymbols; ++s)
      if (own == Extent::of_symbol(s)) found = {static_cast<int>(d), s};
    if (found.none()) return {};
  }
  return found;
}

bool each_its_own(const Program& program, const View& view, int symbol) {
  if (!depends(buffer_shape(program, view), symbol)) return true;
  int own = 0;
  bool moves = false;
  for (size_t d = 0; d < view.sizes.size(); ++d)
    if (view.sizes[d].depends_on(symbol)) {
      ++own;
      moves = view.strides[d].number() != 0;
    }
  return own == 1 && moves;
}

int user_symbol(const Program& program) {
  for (int s = 0; s < static_cast<int>(program.symbols.size()); ++s) {
    bool input = false;
    const auto first_alone = [&](const Shape& shape) {
      return !depends(shape, s) || shape[0] == Extent::of_symbol(s);
    };
    bool apart = true;
    for (const int b : program.inputs) {
      apart = apart && first_alone(program.buffers[b].shape);
      input = input || depends(program.buffers[b].shape, s);
    }
    for (const View& view : program.outputs)
      apart = apart && first_alone(buffer_shape(program, view));
    for (const ProgramStep& step : program.steps)
      apart = apart && keeps_users_apart(program, step, s);
    if (input && apart) return s;
  }
  return -1;
}

void order_by_rows(Program& program) {
  const int users = user_symbol(program);
  const int count = static_cast<int>(program.steps.size());
  std::vector<int> symbol(count), waits(count);
  std::vector<std::vector<int>> readers(count);
  // Of a buffer that several steps fill, what a step reads was written before it.
  std::vector<std::vector<int>> writers(program.buffers.size());
  for (int p = 0; p < count; ++p) {
    const ProgramStep& step = program.steps[p];
    symbol[p] = row_symbol(program, step, users);
    std::set<int> needed;
    for (size_t o = 0; o < step.operands.size(); ++o)
      if (!step.operands[o].absent() && !step.writes(o))
        for (const int w : writers[step.operands[o].buffer]) needed.insert(w);
    for (const int w : needed) readers[w].push_back(p);
    waits[p] = static_cast<int>(needed.size());
    for (size_t o = 0; o < step.operands.size(); ++o)
      if (!step.operands[o].absent() && step.writes(o))
        writers[step.operands[o].buffer].push_back(p);
  }
  std::set<int> ready;
  std::map<int, std::set<int>> ready_of;  // by symbol
  const auto enter = [&](int p) {
    ready.insert(p);
    ready_of[symbol[p]].insert(p);
  };
  for (int p = 0; p < count; ++p)
    if (waits[p] == 0) enter(p);
  std::vector<ProgramStep> done;
  std::optional<int> current;
  while (!ready.empty()) {
    const std::set<int>* const alike = current ? &ready_of[*current] : nullptr;
    const int p = alike && !alike->empty() ? *alike->begin() : *ready.begin();
    ready.erase(p);
    ready_of[symbol[p]].erase(p);
    current = symbol[p];
    done.push_back(program.steps[p]);
    for (const int r : readers[p])
      if (--waits[r] == 0) enter(r);
  }
  program.steps = std::move(done);
}

Plan make_plan(const Program& program, const Plan* whole, const std::vector<int>& origins) {
  Plan plan;
  plan.users = user_symbol(program);
  if (plan.users >= 0) plan.rows = rows_of_layers(program, plan.users);
  plan.groups = row_groups(program, plan.users);
  std::vector<int> slot_of;
  plan.slots = assign_slots(program, plan.groups, slot_of);
  for (const Constant& constant : program.constants) plan.constants.push_back(constant.data);
  for (size_t p = 0; p < program.steps.size(); ++p) {
    const ProgramStep& from = program.steps[p];
    Step step;
    step.kind = from.kind;
    step.fields = from.fields;
    const uint32_t tiles = tiled(from);
    for (size_t o = 0; o < from.operands.size(); ++o) {
      const View& view = from.operands[o];
      Operand& operand = step.operands.emplace_back(Operand::none());
      if (view.absent()) continue;
      const Buffer& buffer = program.buffers[view.buffer];
      operand.space = buffer.space;
      operand.index = buffer.space == Space::arena ? slot_of[view.buffer] : buffer.index;
      operand.dtype = buffer.dtype;
      operand.offset = view.offset;
      operand.sizes = view.sizes;
      operand.strides = view.strides;
      operand.tile_row = tiles >> o & 1 ? buffer.shape.back().coefficient : 0;
    }
    if (whole && p < origins.size() && origins[p] >= 0)
      step.prepared = whole->steps[origins[p]].prepared;
    plan.steps.push_back(std::move(step));
  }
  return plan;
}

}  // namespace fastrec::engine
