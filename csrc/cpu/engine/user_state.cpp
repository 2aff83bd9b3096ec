#include "engine/user_state.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "engine/planner.h"

namespace fastrec::engine {
namespace {

constexpr std::align_val_t kLine{64};

std::vector<std::string> names_of(const InputSpec& spec, size_t more) {
  std::vector<std::string> names;
  for (const InputField& field : spec.fields) names.push_back(field.name);
  names.resize(names.size() + more, "state");
  return names;
}

// Runs a part on all of its inputs; its outputs are written.
void run(Executor& executor, const Program& program, const std::vector<std::string>& names,
         const std::vector<Array>& inputs, const std::vector<std::byte*>& outputs,
         const Symbols& symbols, int threads) {
  std::vector<const std::byte*> addresses;
  for (const Array& array : inputs) addresses.push_back(array.data);
  Status status;
  {
    const CallThreads limit(threads);
    status = executor.run(symbols, addresses.data(), outputs.data());
  }
  if (status.fault != Fault::none) throw refusal_of(program, names, inputs.data(), symbols, status);
}

// New arrays for a part's outputs.
std::vector<std::shared_ptr<Values>> made_for(const Program& program, const Symbols& symbols) {
  std::vector<std::shared_ptr<Values>> made;
  for (const View& view : program.outputs)
    made.push_back(std::make_shared<Values>(program.buffers[view.buffer].dtype,
                                            sizes_at(view.sizes, symbols)));
  return made;
}

std::vector<std::byte*> addresses_of(const std::vector<std::shared_ptr<Values>>& values) {
  std::vector<std::byte*> addresses;
  for (const auto& v : values) addresses.push_back(v->data());
  return addresses;
}

// One user's part of an array whose first dimension counts them; `sizes` holds the part's.
Array of_user(const Array& array, int64_t user, std::vector<int64_t>& sizes) {
  sizes.assign(array.sizes, array.sizes + array.dims);
  sizes[0] = 1;
  Array part{array.data, array.dtype, array.dims, sizes.data()};
  part.data += user * part.count() * bytes_of(array.dtype);
  return part;
}

// `length` old rows, then the new ones, then zeros, of one user's values along dimension `axis` of
// the whole arrays; -1: the new values are all.
void continue_rows(const Values& into, const Array& old, const Array& now, int64_t user, int axis,
                   int64_t length) {
  std::vector<int64_t> sizes, old_sizes;
  const int64_t item = bytes_of(into.dtype);
  std::byte* to = into.data() + user * of_user(into.array(), 0, sizes).count() * item;
  if (axis < 0) {
    std::memcpy(to, now.data, now.count() * item);
    return;
  }
  const Array before = of_user(old, user, old_sizes);
  int64_t outer = 1, inner = item;
  for (int d = 1; d < axis; ++d) outer *= into.sizes[d];
  for (size_t d = axis + 1; d < into.sizes.size(); ++d) inner *= into.sizes[d];
  const int64_t rows = into.sizes[axis], old_rows = old.sizes[axis], new_rows = now.sizes[axis];
  const std::byte *from = before.data, *next = now.data;
  for (int64_t o = 0; o < outer; ++o) {
    std::memcpy(to, from, length * inner);
    std::memcpy(to + length * inner, next, new_rows * inner);
    const int64_t end = length + new_rows;
    std::memset(to + end * inner, 0, (rows - end) * inner);
    to += rows * inner;
    from += old_rows * inner;
    next += new_rows * inner;
  }
}

int position_of(const std::vector<int>& list, int value) {
  return static_cast<int>(std::find(list.begin(), list.end(), value) - list.begin());
}

}  // namespace

void Values::Free::operator()(std::byte* memory) const { ::operator delete[](memory, kLine); }

Values::Values(Dtype dtype, std::vector<int64_t> sizes) : dtype(dtype), sizes(std::move(sizes)) {
  memory_.reset(new (kLine) std::byte[std::max<int64_t>(bytes(), 1)]);
}

Values::Values(const Array& from)
    : Values(from.dtype, std::vector<int64_t>(from.sizes, from.sizes + from.dims)) {
  std::memcpy(data(), from.data, bytes());
}

int64_t Values::bytes() const { return array().count() * bytes_of(dtype); }

int64_t UserState::bytes() const {
  int64_t total = 0;
  for (const auto* list : {&values, &caches, &others})
    for (const SharedValues& v : *list) total += v->bytes();
  return total;
}

// The executor that takes states further.
struct SplitExecutors::Appends {
  Appends(Engine& engine, Split& parts, const InputSpec& history);

  int row_axis(const Shape& shape) const;

  int users_symbol = -1, events_symbol = -1;
  std::vector<int> events, others;  // positions among the history's inputs
  std::vector<int> whole_events;    // positions among the whole program's
  int lengths = -1;                 // which of the history's inputs counts the events, or -1
  InputSpec inputs;
  Resumption made;
  std::unique_ptr<Executor> executor;
  // Of each output of the resumption, and of `encode`: the dimension that counts events, or -1.
  std::vector<int> axes;
  std::vector<int> cache_outputs;  // which output holds each cache
};

SplitExecutors::Appends::Appends(Engine& engine, Split& parts, const InputSpec& history) {
  std::vector<int> symbols;
  const auto note = [](std::vector<int>& list, int symbol) {
    if (std::find(list.begin(), list.end(), symbol) == list.end()) list.push_back(symbol);
  };
  std::vector<int> users;
  for (const InputField& field : history.fields)
    for (size_t d = 0; d < field.dims.size(); ++d)
      if (d == 0)
        note(users, field.dims[0].symbol);
      else if (field.dims[d].symbol >= 0)
        note(symbols, field.dims[d].symbol);
  if (users.size() != 1 || users[0] < 0 || symbols.size() != 1 || symbols[0] == users[0]) {
    std::string found;
    for (const int s : symbols) found += (found.empty() ? "'" : ", '") + history.symbols[s] + "'";
    throw CannotSplit(
        "this model cannot append events: its histories need one free size beside the users', and "
        "have [" +
        found + "]");
  }
  users_symbol = users[0];
  events_symbol = symbols[0];
  for (int i = 0; i < static_cast<int>(history.fields.size()); ++i) {
    const std::vector<SpecSize>& dims = history.fields[i].dims;
    int has = 0;
    for (const SpecSize& dim : dims) has += dim.symbol == events_symbol;
    if (has > 1 || (has == 1 && dims[1].symbol != events_symbol))
      throw CannotSplit("this model cannot append events: " + history.symbols[events_symbol] +
                        " is not their second size");
    (has ? events : others).push_back(i);
    const auto& rows = history.fields[i].rows;
    if (lengths < 0 && dims.size() == 1 && rows && rows->symbol == events_symbol) lengths = i;
  }
  for (const int i : events) whole_events.push_back(parts.history[i]);
  inputs = history.of(events);
  made = resume(parts.encode, events_symbol, users_symbol);
  for (const View& view : made.program.outputs) axes.push_back(row_axis(view.sizes));
  for (const int b : made.caches) {
    cache_outputs.push_back(made.program.buffers[b].index);
    add_output(parts.encode, parts.encode.whole(b));
  }
  std::vector<int> origins;
  for (const int o : made.origins) origins.push_back(o < 0 ? -1 : parts.encode_origins[o]);
  executor =
      std::make_unique<Executor>(make_plan(made.program, &engine.executor().plan(), origins));
}

int SplitExecutors::Appends::row_axis(const Shape& shape) const {
  int axis = -1;
  bool plain = !shape.empty() && shape[0] == Extent::of_symbol(users_symbol);
  for (size_t d = 0; d < shape.size(); ++d) {
    plain = plain && (d == 0 || !shape[d].depends_on(users_symbol));
    if (shape[d].depends_on(events_symbol)) {
      plain = plain && axis < 0 && shape[d] == Extent::of_symbol(events_symbol);
      axis = static_cast<int>(d);
    }
  }
  if (!plain)
    throw CannotSplit(
        "this plan cannot append events: its state is not a row for each event of a user");
  return axis;
}

SplitExecutors::SplitExecutors(Engine& engine, const std::vector<int>& candidates, bool appendable)
    : parts_(engine::split(engine.program(), candidates)),
      history_inputs_(engine.inputs().of(parts_.history)),
      candidate_inputs_(engine.inputs().of(parts_.candidates)) {
  for (const int i : parts_.kept) kept_.push_back(position_of(parts_.history, i));
  computed_ = parts_.encode.outputs.size();
  if (appendable) appends_ = std::make_unique<Appends>(engine, parts_, history_inputs_);
  const Plan& whole = engine.executor().plan();
  encode_ = std::make_unique<Executor>(make_plan(parts_.encode, &whole, parts_.encode_origins));
  if (!parts_.score) return;
  std::vector<bool> known(kMaxSpecSymbols);
  for (const InputField& field : history_inputs_.fields)
    for (const SpecSize& dim : field.dims)
      if (dim.symbol >= 0) known[dim.symbol] = true;
  for (const InputField& field : history_inputs_.fields)
    if (field.rows && field.rows->symbol >= 0 && !known[field.rows->symbol])
      throw Refused(Refused::Kind::argument, "candidates",
                    "the input that brings " + history_inputs_.symbols[field.rows->symbol] +
                        " beside " + field.name,
                    "another part");
  score_ = std::make_unique<Executor>(make_plan(*parts_.score, &whole, parts_.score_origins));
}

SplitExecutors::~SplitExecutors() = default;

std::vector<std::string> SplitExecutors::programs() const {
  std::vector<std::string> texts{json::write(write_program(parts_.encode))};
  if (parts_.score) texts.push_back(json::write(write_program(*parts_.score)));
  return texts;
}

const std::vector<int>& SplitExecutors::events() const { return appends_->whole_events; }
const InputSpec& SplitExecutors::event_inputs() const { return appends_->inputs; }

std::shared_ptr<const UserState> SplitExecutors::encode(const Array* history,
                                                        const SpecSizes& sizes, int threads) const {
  const Symbols symbols = symbols_of(sizes);
  const std::vector<std::shared_ptr<Values>> made = made_for(parts_.encode, symbols);
  const std::vector<Array> inputs(history, history + parts_.history.size());
  run(*encode_, parts_.encode, names_of(history_inputs_, 0), inputs, addresses_of(made), symbols,
      threads);
  auto state = std::make_shared<UserState>();
  state->sizes = sizes;
  state->values.assign(made.begin(), made.begin() + computed_);
  for (const int i : kept_) state->values.push_back(std::make_shared<Values>(history[i]));
  if (!appends_) return state;
  for (const int b : appends_->made.caches)
    state->caches.push_back(made[parts_.encode.buffers[b].index]);
  for (const int i : appends_->others)
    state->others.push_back(std::make_shared<Values>(history[i]));
  state->lengths.assign(sizes[appends_->users_symbol], sizes[appends_->events_symbol]);
  if (appends_->lengths >= 0) {
    const Array& counts = history[appends_->lengths];
    for (size_t user = 0; user < state->lengths.size(); ++user)
      state->lengths[user] = counts.dtype == Dtype::i32
                                 ? reinterpret_cast<const int32_t*>(counts.data)[user]
                                 : reinterpret_cast<const int64_t*>(counts.data)[user];
  }
  return state;
}

std::shared_ptr<const UserState> SplitExecutors::append(const UserState& state, const Array* events,
                                                        int threads) const {
  const Appends& appends = *appends_;
  const int64_t users = events[0].sizes[0], count = events[0].sizes[1];
  const std::string& name = appends.inputs.fields[0].name;
  const auto had = static_cast<int64_t>(state.lengths.size());
  if (users != had)
    throw Refused(Refused::Kind::shape, name, std::to_string(had) + " users, as in the state",
                  std::to_string(users));
  const int64_t longest = *std::max_element(state.lengths.begin(), state.lengths.end());
  const int64_t most = history_inputs_.limits[appends.events_symbol].high;
  if (most >= 0 && longest > most - count)
    throw Refused(Refused::Kind::shape, name,
                  "at most " + std::to_string(most) + " events with the " +
                      std::to_string(longest) + " of the state (encode the newest " +
                      std::to_string(most) + " anew)",
                  std::to_string(count) + " more");

  auto next = std::make_shared<UserState>();
  next->lengths = state.lengths;
  for (int64_t& length : next->lengths) length += count;
  next->sizes = state.sizes;
  next->sizes[appends.events_symbol] = longest + count;
  const Program& program = appends.made.program;
  const Symbols whole = symbols_of(next->sizes);

  // The history's inputs: new events, and what is not events, with the lengths counted on.
  std::vector<SharedValues> others = state.others;
  for (size_t i = 0; i < others.size(); ++i) {
    if (appends.others[i] != appends.lengths) continue;
    const auto counted = std::make_shared<Values>(others[i]->dtype, others[i]->sizes);
    for (int64_t user = 0; user < users; ++user)
      if (counted->dtype == Dtype::i32)
        reinterpret_cast<int32_t*>(counted->data())[user] =
            static_cast<int32_t>(next->lengths[user]);
      else
        reinterpret_cast<int64_t*>(counted->data())[user] = next->lengths[user];
    others[i] = counted;
  }
  std::vector<Array> history(parts_.history.size());
  for (size_t i = 0; i < appends.events.size(); ++i) history[appends.events[i]] = events[i];
  for (size_t i = 0; i < others.size(); ++i) history[appends.others[i]] = others[i]->array();

  // Outputs of the old program of which the resumption computes new rows.
  std::vector<SharedValues> before(state.values.begin(), state.values.begin() + computed_);
  for (size_t c = 0; c < state.caches.size(); ++c)
    if (static_cast<size_t>(appends.cache_outputs[c]) >= computed_)
      before.push_back(state.caches[c]);
  const std::vector<std::shared_ptr<Values>> made = made_for(parts_.encode, whole);
  Symbols own = symbols_of(state.sizes);
  own[appends.made.past] = state.sizes[appends.events_symbol];
  own[appends.users_symbol] = 1;
  own[appends.events_symbol] = count;
  for (int64_t user = 0; user < users; ++user) {
    const int64_t length = state.lengths[user];
    std::vector<std::vector<int64_t>> sizes(history.size() + state.caches.size());
    std::vector<Array> inputs;
    for (size_t i = 0; i < history.size(); ++i) {
      const auto& dims = history_inputs_.fields[i].dims;
      const bool of_users = !dims.empty() && dims[0].symbol == appends.users_symbol;
      inputs.push_back(of_users ? of_user(history[i], user, sizes[i]) : history[i]);
    }
    for (size_t c = 0; c < state.caches.size(); ++c)
      inputs.push_back(of_user(state.caches[c]->array(), user, sizes[history.size() + c]));
    const int64_t one = 1;
    inputs.push_back({reinterpret_cast<const std::byte*>(&length), Dtype::i64, 1, &one});
    const std::vector<std::shared_ptr<Values>> rows = made_for(program, own);
    run(*appends.executor, program, names_of(history_inputs_, state.caches.size() + 1), inputs,
        addresses_of(rows), own, threads);
    for (size_t o = 0; o < made.size(); ++o)
      continue_rows(*made[o], before[o]->array(), rows[o]->array(), user, appends.axes[o], length);
  }
  next->values.assign(made.begin(), made.begin() + computed_);
  for (size_t k = 0; k < kept_.size(); ++k) {
    const int i = kept_[k];
    const auto event = std::find(appends.events.begin(), appends.events.end(), i);
    if (event == appends.events.end()) {
      next->values.push_back(others[position_of(appends.others, i)]);
      continue;
    }
    const SharedValues& old = state.values[computed_ + k];
    std::vector<int64_t> sizes = old->sizes;
    sizes[1] = longest + count;
    const auto values = std::make_shared<Values>(old->dtype, sizes);
    for (int64_t user = 0; user < users; ++user) {
      std::vector<int64_t> of_one;
      continue_rows(*values, old->array(), of_user(history[i], user, of_one), user, 1,
                    state.lengths[user]);
    }
    next->values.push_back(values);
  }
  for (const int output : appends.cache_outputs) next->caches.push_back(made[output]);
  next->others = std::move(others);
  return next;
}

std::vector<int64_t> SplitExecutors::output_sizes(const SpecSizes& sizes) const {
  return sizes_at(parts_.score->outputs[0].sizes, symbols_of(sizes));
}

void SplitExecutors::score(const UserState& state, const Array* candidates, const SpecSizes& sizes,
                           float* scores, int threads) const {
  std::vector<Array> inputs(candidates, candidates + parts_.candidates.size());
  for (const SharedValues& v : state.values) inputs.push_back(v->array());
  run(*score_, *parts_.score, names_of(candidate_inputs_, state.values.size()), inputs,
      {reinterpret_cast<std::byte*>(scores)}, symbols_of(sizes), threads);
}

}  // namespace fastrec::engine
