#include "engine/split.h"

#include <algorithm>
#include <map>
#include <set>

#include "engine/planner.h"

namespace fastrec::engine {
namespace {

// Dtypes that a map copies.
bool can_be_copied(Dtype dtype) {
  return dtype == Dtype::f32 || dtype == Dtype::i64 || dtype == Dtype::b8;
}

// Calls `visit(view, written)` with each operand that is there.
template <class Visit>
void each_operand(const ProgramStep& step, Visit&& visit) {
  for (size_t o = 0; o < step.operands.size(); ++o)
    if (!step.operands[o].absent()) visit(step.operands[o], step.writes(o));
}

// The symbols that are a dimension of one of the inputs.
std::vector<bool> symbols_of(const Program& program, const std::vector<int>& inputs) {
  std::vector<bool> found(kMaxSymbols);
  for (const int i : inputs)
    for (const Extent& size : program.buffers[program.inputs[i]].shape)
      for (int s = 0; s < kMaxSymbols; ++s)
        if (size == Extent::of_symbol(s)) found[s] = true;
  return found;
}

// The parts of a buffer written so far: views, and the steps that wrote them.
using Written = std::map<int, std::vector<std::pair<View, int>>>;

// The steps that a view's values come from.
std::vector<int> writers(const Written& written, const View& view) {
  const auto parts = written.find(view.buffer);
  if (parts == written.end()) return {};
  std::vector<int> exact, all;
  for (const auto& [part, position] : parts->second) {
    all.push_back(position);
    if (part == view) exact.push_back(position);
  }
  return exact.empty() ? all : exact;
}

// Which steps belong to the second part.
std::vector<bool> late_steps(const Program& program, const std::vector<int>& candidates,
                             const std::vector<bool>& symbols) {
  const size_t count = program.steps.size();
  std::vector<bool> candidate(program.buffers.size());
  for (const int i : candidates) candidate[program.inputs[i]] = true;
  const auto unknown = [&](const Shape& shape) {
    return std::any_of(shape.begin(), shape.end(), [&](const Extent& size) {
      for (int s = 0; s < kMaxSymbols; ++s)
        if (size.depends_on(s) && !symbols[s]) return true;
      return false;
    });
  };
  std::vector<bool> late(count);
  std::vector<int> open;
  const auto mark = [&](int p) {
    if (late[p]) return;
    late[p] = true;
    open.push_back(p);
  };
  Written written;
  std::vector<std::vector<int>> readers(count);
  for (int p = 0; p < static_cast<int>(count); ++p) {
    std::set<int> needed;
    each_operand(program.steps[p], [&](const View& view, bool writes) {
      if (unknown(view.sizes) || unknown(view.strides) ||
          unknown(program.buffers[view.buffer].shape) || (!writes && candidate[view.buffer]))
        mark(p);
      if (writes) return;
      for (const int w : writers(written, view)) needed.insert(w);
    });
    for (const int w : needed) readers[w].push_back(p);
    each_operand(program.steps[p], [&](const View& view, bool writes) {
      if (writes) written[view.buffer].emplace_back(view, p);
    });
  }
  while (!open.empty()) {
    const int p = open.back();
    open.pop_back();
    for (const int r : readers[p]) mark(r);
    // A part of a buffer that can't be copied into it is computed where the rest is.
    each_operand(program.steps[p], [&](const View& view, bool writes) {
      if (writes && !can_be_copied(program.buffers[view.buffer].dtype))
        for (const auto& [part, position] : written[view.buffer]) mark(position);
    });
  }
  return late;
}

// A part: the whole program's buffers, none of its steps, and new inputs.
Program part_of(const Program& program, const std::vector<int>& inputs) {
  Program part;
  part.symbols = program.symbols;
  part.constants = program.constants;
  part.buffers = program.buffers;
  for (Buffer& buffer : part.buffers)
    if (buffer.space != Space::constant) buffer = {Space::arena, buffer.dtype, buffer.shape, 0};
  for (const int b : inputs) {
    part.buffers[b].space = Space::input;
    part.buffers[b].index = static_cast<int>(part.inputs.size());
    part.inputs.push_back(b);
  }
  return part;
}

}  // namespace

void add_output(Program& part, const View& view) {
  Buffer& buffer = part.buffers[view.buffer];
  if (buffer.space == Space::output) return;
  buffer.space = Space::output;
  buffer.index = static_cast<int>(part.outputs.size());
  part.outputs.push_back(view);
}

namespace {

std::vector<int> buffers_of(const Program& program, const std::vector<int>& inputs) {
  std::vector<int> buffers;
  for (const int i : inputs) buffers.push_back(program.inputs[i]);
  return buffers;
}

Split whole_of(const Program& program) {
  Split made;
  made.encode = program;
  for (size_t i = 0; i < program.inputs.size(); ++i) made.history.push_back(static_cast<int>(i));
  for (size_t p = 0; p < program.steps.size(); ++p)
    made.encode_origins.push_back(static_cast<int>(p));
  return made;
}

}  // namespace

Split split(const Program& program, const std::vector<int>& candidates) {
  if (candidates.empty()) return whole_of(program);
  Split made;
  made.candidates = candidates;
  for (int i = 0; i < static_cast<int>(program.inputs.size()); ++i)
    if (std::find(candidates.begin(), candidates.end(), i) == candidates.end())
      made.history.push_back(i);
  const std::vector<bool> late = late_steps(program, candidates, symbols_of(program, made.history));

  // Parts that the first part writes of a buffer which the second writes too get a buffer of their
  // own, from which the second copies them.
  std::set<int> written_late;
  for (size_t p = 0; p < program.steps.size(); ++p)
    if (late[p])
      each_operand(program.steps[p], [&](const View& view, bool writes) {
        if (writes) written_late.insert(view.buffer);
      });
  Program whole = program;  // with the moved buffers
  std::vector<std::pair<View, View>> moved;
  for (size_t p = 0; p < program.steps.size(); ++p)
    if (!late[p])
      each_operand(program.steps[p], [&](const View& view, bool writes) {
        if (!writes || !written_late.count(view.buffer)) return;
        whole.buffers.push_back({Space::arena, program.buffers[view.buffer].dtype, view.sizes, 0});
        moved.emplace_back(view, whole.whole(static_cast<int>(whole.buffers.size()) - 1));
      });
  const auto replaced = [&](const View& view) {
    for (const auto& [from, to] : moved)
      if (from == view) return to;
    return view;
  };

  std::vector<ProgramStep> early_steps, late_part;
  const Kind* const map = find_kind("map");
  for (const auto& [view, apart] : moved) {
    late_part.push_back(
        {map, "", {apart, view}, map->read(json::Object{{"program", json::List{}}})});
    made.score_origins.push_back(-1);
  }
  std::vector<int> written_early;  // buffers, in order
  for (size_t p = 0; p < program.steps.size(); ++p) {
    ProgramStep step = program.steps[p];
    if (!late[p])
      for (size_t o = 0; o < step.operands.size(); ++o) {
        View& view = step.operands[o];
        if (view.absent()) continue;
        view = replaced(view);
        const bool known = std::find(written_early.begin(), written_early.end(), view.buffer) !=
                           written_early.end();
        if (step.writes(o) && !known) written_early.push_back(view.buffer);
      }
    (late[p] ? late_part : early_steps).push_back(std::move(step));
    (late[p] ? made.score_origins : made.encode_origins).push_back(static_cast<int>(p));
  }

  const auto read_by = [&](const std::vector<ProgramStep>& steps) {
    std::vector<bool> read(whole.buffers.size());
    for (const ProgramStep& step : steps)
      each_operand(step, [&](const View& view, bool) { read[view.buffer] = true; });
    return read;
  };
  const std::vector<bool> read_late = read_by(late_part), read_early = read_by(early_steps);
  const int output = program.outputs.at(0).buffer;
  std::vector<int> state;
  for (const int b : written_early)
    if (read_late[b]) state.push_back(b);
  for (const int i : made.history)
    if (read_late[program.inputs[i]]) made.kept.push_back(i);
  const char* why = nullptr;
  if (!written_late.count(output))
    why = "its scores do not depend on the candidates";
  else if (std::none_of(made.history.begin(), made.history.end(),
                        [&](int i) { return read_early[program.inputs[i]]; }))
    why = "every step that reads the history reads the candidates too";
  else if (state.empty())
    why = "its scores do not depend on the history";
  if (why) throw CannotSplit(std::string("this plan does not split into encode and score: ") + why);

  made.encode = part_of(whole, buffers_of(program, made.history));
  made.encode.steps = std::move(early_steps);
  for (const int b : state) add_output(made.encode, whole.whole(b));
  std::vector<int> inputs = buffers_of(program, made.candidates);
  inputs.insert(inputs.end(), state.begin(), state.end());
  for (const int i : made.kept) inputs.push_back(program.inputs[i]);
  made.score = part_of(whole, inputs);
  made.score->steps = std::move(late_part);
  add_output(*made.score, program.outputs[0]);
  return made;
}

namespace {

class Resuming {
 public:
  Resuming(const Program& program, int events, int users)
      : old_(program), events_(events), users_(users) {
    Program& made = made_.program;
    made = part_of(program, program.inputs);
    made_.past = free_symbol();
    past_rows_ = add_buffer(Dtype::i64, {Extent::of_symbol(users)});
  }

  Resumption resume() {
    for (size_t p = 0; p < old_.steps.size(); ++p) {
      ProgramStep step = this->step(old_.steps[p]);
      made_.origins.push_back(step.kind == old_.steps[p].kind ? static_cast<int>(p) : -1);
      made_.program.steps.push_back(std::move(step));
    }
    Program& made = made_.program;
    const auto add_input = [&](int buffer) {
      made.buffers[buffer].space = Space::input;
      made.buffers[buffer].index = static_cast<int>(made.inputs.size());
      made.inputs.push_back(buffer);
    };
    for (const int b : made_.caches) add_input(cache_of_.at(b));
    add_input(past_rows_);
    for (const View& view : old_.outputs) add_output(made, view);
    for (const int b : made_.caches) add_output(made, made.whole(b));
    return std::move(made_);
  }

 private:
  // One that no size of the old program uses.
  int free_symbol() {
    std::vector<std::string>& symbols = made_.program.symbols;
    if (symbols.size() < kMaxSymbols) {
      symbols.push_back("past");
      return static_cast<int>(symbols.size()) - 1;
    }
    std::vector<bool> used(kMaxSymbols);
    const auto note = [&](const Shape& shape) {
      for (const Extent& size : shape)
        for (int s = 0; s < kMaxSymbols; ++s)
          if (size.depends_on(s)) used[s] = true;
    };
    for (const int b : old_.inputs) note(old_.buffers[b].shape);
    for (const ProgramStep& step : old_.steps)
      each_operand(step, [&](const View& view, bool) {
        note(view.sizes);
        note(view.strides);
        note(old_.buffers[view.buffer].shape);
      });
    const auto free = std::find(used.begin(), used.end(), false);
    if (free == used.end())
      throw CannotSplit("this plan cannot append events: it has too many free sizes");
    return static_cast<int>(free - used.begin());
  }

  int add_buffer(Dtype dtype, Shape shape) {
    made_.program.buffers.push_back({Space::arena, dtype, std::move(shape), 0});
    return static_cast<int>(made_.program.buffers.size()) - 1;
  }

  bool has_events(const Shape& shape) const {
    return std::any_of(shape.begin(), shape.end(),
                       [&](const Extent& size) { return size.depends_on(events_); });
  }

  ProgramStep step(const ProgramStep& step) {
    bool any = false;
    each_operand(step, [&](const View& view, bool) {
      any = any || has_events(view.sizes) || has_events(view.strides);
    });
    if (!any) return step;
    if (const auto fields = step.kind->resumed ? step.kind->resumed(step.fields.get()) : nullptr) {
      const View &q = step.operands[0], &k = step.operands[1], &v = step.operands[2];
      const Extent rows = Extent::of_symbol(events_);
      if (q.sizes[2] == rows && k.sizes[2] == rows && v.sizes[2] == rows)
        return {find_kind("resumed_attention"),
                step.module,
                {q, k, v, of_past(k), of_past(v), made_.program.whole(past_rows_),
                 step.operands.back()},
                fields};
    }
    require_rows(step);
    ProgramStep copy = step;
    const RowDimension row = row_dimension(step.operands.back().sizes, users_);
    if (step.kind->reads_index(step.fields.get(), row.dim)) {
      const Shape& shape = step.operands.back().sizes;
      const int inputs = static_cast<int>(step.operands.size()) - 1;
      copy.operands.insert(copy.operands.end() - 1,
                           View{past_rows_, 0, shape, Shape(shape.size(), Extent(0))});
      copy.fields = step.kind->moved_on(step.fields.get(), inputs, row.dim);
    }
    return copy;
  }

  // Throws CannotSplit unless new rows follow from new rows.
  void require_rows(const ProgramStep& step) const {
    bool apart = true, own = true, by_position = false;
    const bool map = step.kind->operands[0].many;
    each_operand(step, [&](const View& view, bool writes) {
      if (writes) {
        const RowDimension row = row_dimension(view.sizes, users_);
        apart = apart && !row.none() && row.symbol == events_ &&
                (map || row.dim < static_cast<int>(step.operands.back().sizes.size()) - 1);
        return;
      }
      own = own && each_its_own(old_, view, events_);
      if (has_events(old_.buffers[view.buffer].shape)) return;
      for (size_t d = 0; d < view.sizes.size(); ++d)
        by_position =
            by_position || (view.sizes[d].depends_on(events_) && view.strides[d].number() != 0);
    });
    const Rows rows = step.kind->rows(step.fields.get());
    const bool by_row = rows == Rows::elements || rows == Rows::lookup || rows == Rows::last;
    if (by_row && apart && own && !by_position) return;
    const std::string where = step.module.empty() ? "the model" : step.module;
    std::string why = where + ": a step '" + step.kind->name + "' mixes events";
    if (std::string(step.kind->name).find("attention") != std::string::npos)
      why = where + ": its attention is not causal, so new events change all that came before";
    else if (by_position)
      why = where + ": a table is read by position without an index; look positions up";
    throw CannotSplit("this plan cannot append events (" + why +
                      "); encode the whole history anew");
  }

  // The same part of the rows of the past.
  View of_past(const View& view) {
    if (!cache_of_.count(view.buffer)) {
      cache_of_[view.buffer] =
          add_buffer(old_.buffers[view.buffer].dtype, renamed(old_.buffers[view.buffer].shape));
      made_.caches.push_back(view.buffer);
    }
    return {cache_of_[view.buffer], view.offset, renamed(view.sizes), renamed(view.strides)};
  }

  Shape renamed(Shape sizes) const {
    for (Extent& size : sizes) std::swap(size.exponent[events_], size.exponent[made_.past]);
    return sizes;
  }

  const Program& old_;
  const int events_, users_;
  Resumption made_;
  int past_rows_;  // the buffer: how many rows of the past count
  std::map<int, int> cache_of_;
};

}  // namespace

Resumption resume(const Program& program, int events, int users) {
  return Resuming(program, events, users).resume();
}

}  // namespace fastrec::engine
