#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <new>

#include "engine/fastrec.h"
#include "engine/file.h"
#include "engine/user_state.h"

using namespace fastrec::engine;

struct fastrec_engine {
  std::string header;
  std::shared_ptr<Engine> engine;
  int threads;
  std::vector<int> candidates;  // positions of the inputs with a dimension "m"
};

struct fastrec_state {
  std::shared_ptr<Engine> engine;  // which outlives its parts
  std::shared_ptr<SplitExecutors> parts;
  std::shared_ptr<const UserState> state;
};

namespace {

static_assert(FASTREC_MAX_DIMS == kMaxDims);
static_assert(FASTREC_INT32 == static_cast<int>(Dtype::i32) &&
              FASTREC_FLOAT32 == static_cast<int>(Dtype::f32));
constexpr char kCandidates[] = "m";
constexpr int kMaxThreads = 1024;
constexpr double kMaxElements = 1e15;

class Argument : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
class WrongShape : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

int tell(fastrec_error* error, int code, const char* message) noexcept {
  if (error) {
    error->code = code;
    std::strncpy(error->message, message, sizeof(error->message) - 1);
    error->message[sizeof(error->message) - 1] = '\0';
  }
  return code;
}

int code_of(Refused::Kind kind) {
  switch (kind) {
    case Refused::Kind::argument:
      return FASTREC_ARGUMENT;
    case Refused::Kind::shape:
      return FASTREC_SHAPE;
    case Refused::Kind::id_range:
      return FASTREC_ID_RANGE;
    case Refused::Kind::unsupported:
      break;
  }
  return FASTREC_UNSUPPORTED;
}

// No exception leaves a function of the C interface.
template <class F>
int guarded(fastrec_error* error, F&& body) noexcept {
  try {
    body();
    return tell(error, FASTREC_OK, "");
  } catch (const Argument& e) {
    return tell(error, FASTREC_ARGUMENT, e.what());
  } catch (const WrongShape& e) {
    return tell(error, FASTREC_SHAPE, e.what());
  } catch (const FileError& e) {
    return tell(error, FASTREC_FILE, e.what());
  } catch (const Refused& e) {
    return tell(error, code_of(e.kind), e.what());
  } catch (const CannotSplit& e) {
    return tell(error, FASTREC_UNSUPPORTED, e.what());
  } catch (const std::bad_alloc&) {
    return tell(error, FASTREC_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return tell(error, FASTREC_UNSUPPORTED, e.what());
  }
}

void expect(bool met, const char* what) {
  if (!met) throw Argument(what);
}

// The arrays as the specification's fields; sizes are completed, or the reason is thrown.
std::vector<Array> admitted(const InputSpec& spec, const fastrec_array* inputs, int count,
                            SpecSizes& sizes) {
  if (count != static_cast<int>(spec.fields.size()))
    throw Argument("expected " + std::to_string(spec.fields.size()) + " inputs, got " +
                   std::to_string(count));
  expect(inputs || count == 0, "inputs: expected an array, got null");
  std::vector<Array> arrays;
  for (int i = 0; i < count; ++i) {
    const fastrec_array& given = inputs[i];
    const std::string& name = spec.fields[i].name;
    if (given.dtype < 0 || given.dtype > FASTREC_INT32 || given.dims < 0 || given.dims > kMaxDims ||
        (given.dims > 0 && !given.sizes))
      throw Argument(name + ": expected a dtype, at most 6 dimensions and their sizes");
    const Array array{static_cast<const std::byte*>(given.data), static_cast<Dtype>(given.dtype),
                      given.dims, given.sizes};
    double elements = 1;
    for (int d = 0; d < given.dims; ++d) {
      if (given.sizes[d] < 0) throw WrongShape(name + ": expected sizes of 0 or more");
      elements *= std::max(static_cast<double>(given.sizes[d]), 1.0);
    }
    if (elements > kMaxElements) throw WrongShape(name + ": expected sizes that memory may hold");
    if (array.dtype == spec.fields[i].dtype && !given.data)
      throw Argument(name + ": expected an address, got null");
    arrays.push_back(array);
  }
  SpecSizes found = sizes;
  if (!spec.admits(arrays.data(), found)) {
    const std::string why = spec.refusal(arrays.data(), sizes);
    if (why.find("NaN") != std::string::npos) throw Argument(why);
    if (why.find("expected values in") != std::string::npos)
      throw Refused(Refused::Kind::id_range, why.substr(0, why.find(':')),
                    why.substr(why.find("values in"), why.find(", got") - why.find("values in")),
                    "one outside");
    throw WrongShape(why);
  }
  sizes = found;
  return arrays;
}

size_t count_of(const std::vector<int64_t>& sizes) {
  size_t count = 1;
  for (const int64_t size : sizes) count *= static_cast<size_t>(size);
  return count;
}

void require_room(const std::vector<int64_t>& sizes, const float* scores, size_t room) {
  const size_t needed = count_of(sizes);
  if (!scores || room < needed)
    throw Argument("scores: expected room for " + std::to_string(needed) + " floats, got " +
                   std::to_string(scores ? room : 0));
}

void copy_sizes(const std::vector<int64_t>& from, int64_t* sizes, int* dims) {
  expect(sizes && dims, "sizes, dims: expected addresses, got null");
  std::copy(from.begin(), from.end(), sizes);
  *dims = static_cast<int>(from.size());
}

fastrec_state* owned(const fastrec_engine* engine, std::shared_ptr<SplitExecutors> parts,
                     std::shared_ptr<const UserState> state) {
  return new fastrec_state{engine->engine, std::move(parts), std::move(state)};
}

void require_own(const fastrec_engine* engine, const fastrec_state* state) {
  expect(state->engine == engine->engine, "state: expected one that this engine encoded");
}

}  // namespace

int fastrec_abi_version(void) { return FASTREC_ABI_VERSION; }

int fastrec_open(const char* path, int flags, fastrec_engine** engine, fastrec_error* error) {
  return guarded(error, [&] {
    expect(path && engine, "path, engine: expected addresses, got null");
    expect((flags & ~FASTREC_COPY) == 0, "flags: expected 0 or FASTREC_COPY");
    auto made = std::make_unique<fastrec_engine>();
    OpenedFile file = open_file(path, flags & FASTREC_COPY ? Keep::copied : Keep::mapped);
    made->header = std::move(file.header);
    made->engine = std::move(file.engine);
    made->threads = made->engine->threads();
    const InputSpec& spec = made->engine->inputs();
    const int symbol = spec.symbol(kCandidates);
    for (size_t i = 0; symbol >= 0 && i < spec.fields.size(); ++i)
      for (const SpecSize& dim : spec.fields[i].dims)
        if (dim.symbol == symbol) {
          made->candidates.push_back(static_cast<int>(i));
          break;
        }
    *engine = made.release();
  });
}

void fastrec_close(fastrec_engine* engine) { delete engine; }

int fastrec_inputs(const fastrec_engine* engine) {
  return engine ? static_cast<int>(engine->engine->inputs().fields.size()) : 0;
}

int fastrec_describe(const fastrec_engine* engine, int index, fastrec_input* input,
                     fastrec_error* error) {
  return guarded(error, [&] {
    expect(engine && input, "engine, input: expected addresses, got null");
    expect(index >= 0 && index < fastrec_inputs(engine), "index: expected one of the inputs");
    const InputSpec& spec = engine->engine->inputs();
    const InputField& field = spec.fields[index];
    fastrec_input made{};
    made.name = field.name.c_str();
    made.dtype = static_cast<int32_t>(field.dtype);
    made.dims = static_cast<int32_t>(field.dims.size());
    for (size_t d = 0; d < field.dims.size(); ++d) {
      const int symbol = field.dims[d].symbol;
      const bool free = symbol >= 0;
      made.sizes[d] = free ? -1 : field.dims[d].number;
      made.symbols[d] = free ? spec.symbols[symbol].c_str() : nullptr;
      made.low[d] = free ? spec.limits[symbol].low : field.dims[d].number;
      made.high[d] = !free                          ? field.dims[d].number
                     : spec.limits[symbol].high < 0 ? std::numeric_limits<int64_t>::max()
                                                    : spec.limits[symbol].high;
    }
    const bool bounded = field.rows && field.rows->symbol < 0;
    made.rows = bounded ? field.rows->number : -1;
    made.rows_symbol = field.rows && !bounded ? spec.symbols[field.rows->symbol].c_str() : nullptr;
    *input = made;
  });
}

const char* fastrec_header(const fastrec_engine* engine) {
  return engine ? engine->header.c_str() : "";
}

int fastrec_set_threads(fastrec_engine* engine, int threads, fastrec_error* error) {
  return guarded(error, [&] {
    expect(engine, "engine: expected an address, got null");
    expect(threads >= 1 && threads <= kMaxThreads, "threads: expected 1..1024");
    engine->threads = threads;
  });
}

int fastrec_output_sizes(const fastrec_engine* engine, const fastrec_array* inputs, int count,
                         int64_t* sizes, int* dims, fastrec_error* error) {
  return guarded(error, [&] {
    expect(engine, "engine: expected an address, got null");
    SpecSizes found = unknown_sizes();
    admitted(engine->engine->inputs(), inputs, count, found);
    copy_sizes(engine->engine->output_sizes(found), sizes, dims);
  });
}

int fastrec_run(fastrec_engine* engine, const fastrec_array* inputs, int count, float* scores,
                size_t room, fastrec_error* error) {
  return guarded(error, [&] {
    expect(engine, "engine: expected an address, got null");
    Engine& of = *engine->engine;
    SpecSizes sizes = unknown_sizes();
    const std::vector<Array> arrays = admitted(of.inputs(), inputs, count, sizes);
    require_room(of.output_sizes(sizes), scores, room);
    of.run(arrays.data(), sizes, scores, engine->threads);
  });
}

int fastrec_encode(fastrec_engine* engine, const fastrec_array* history, int count, int flags,
                   fastrec_state** state, fastrec_error* error) {
  return guarded(error, [&] {
    expect(engine && state, "engine, state: expected addresses, got null");
    expect((flags & ~FASTREC_APPENDABLE) == 0, "flags: expected 0 or FASTREC_APPENDABLE");
    auto parts = engine->engine->split(engine->candidates, flags & FASTREC_APPENDABLE);
    SpecSizes sizes = unknown_sizes();
    const auto arrays = admitted(parts->history_inputs(), history, count, sizes);
    auto made = parts->encode(arrays.data(), sizes, engine->threads);
    *state = owned(engine, std::move(parts), std::move(made));
  });
}

int fastrec_append(fastrec_engine* engine, const fastrec_state* state, const fastrec_array* events,
                   int count, fastrec_state** next, fastrec_error* error) {
  return guarded(error, [&] {
    expect(engine && state && next, "engine, state, next: expected addresses, got null");
    require_own(engine, state);
    expect(state->parts->appends(), "state: expected one encoded with FASTREC_APPENDABLE");
    SpecSizes sizes = unknown_sizes();
    const auto arrays = admitted(state->parts->event_inputs(), events, count, sizes);
    auto made = state->parts->append(*state->state, arrays.data(), engine->threads);
    *next = owned(engine, state->parts, std::move(made));
  });
}

int fastrec_score(fastrec_engine* engine, const fastrec_state* state,
                  const fastrec_array* candidates, int count, float* scores, size_t room,
                  fastrec_error* error) {
  return guarded(error, [&] {
    expect(engine && state, "engine, state: expected addresses, got null");
    require_own(engine, state);
    if (!state->parts->scores())
      throw Refused("this model has no candidates to score: see fastrec_state_output");
    SpecSizes sizes = state->state->sizes;
    const auto arrays = admitted(state->parts->candidate_inputs(), candidates, count, sizes);
    require_room(state->parts->output_sizes(sizes), scores, room);
    state->parts->score(*state->state, arrays.data(), sizes, scores, engine->threads);
  });
}

int fastrec_state_output(const fastrec_state* state, const float** output, int64_t* sizes,
                         int* dims, fastrec_error* error) {
  return guarded(error, [&] {
    expect(state && output, "state, output: expected addresses, got null");
    if (state->parts->scores())
      throw Refused("a state of a model with candidates has no output: see fastrec_score");
    const Values& values = *state->state->values.at(0);
    copy_sizes(values.sizes, sizes, dims);
    *output = reinterpret_cast<const float*>(values.data());
  });
}

size_t fastrec_state_bytes(const fastrec_state* state) {
  return state ? static_cast<size_t>(state->state->bytes()) : 0;
}

void fastrec_state_free(fastrec_state* state) { delete state; }
