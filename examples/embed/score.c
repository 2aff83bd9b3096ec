/* Opens an engine file, prints its inputs and scores one batch:
 *
 *   cc -std=c11 score.c $(fastrec info --c-flags) -o score && ./score ranker.engine 2
 *
 * A service fills the arrays with its requests; here ids count up, lengths are whole histories and
 * numbers are 0.5. Each score is printed with the nine digits that give back all bits of a float.
 */
#include <fastrec.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_INPUTS = 32, MAX_SYMBOLS = 8, MOST = 1 << 10 };

/* The sizes of this request by their symbols. */
static struct {
  const char* name;
  int64_t size;
} symbols[MAX_SYMBOLS];
static int known;

static int64_t size_of(const char* symbol, int64_t low, int64_t high, int64_t batch) {
  for (int s = 0; s < known; ++s)
    if (strcmp(symbols[s].name, symbol) == 0) return symbols[s].size;
  int64_t size = strcmp(symbol, "B") == 0 ? batch : 7;
  if (size < low) size = low;
  if (size > high) size = high;
  if (known == MAX_SYMBOLS) return size;
  symbols[known].name = symbol;
  symbols[known++].size = size;
  return size;
}

static size_t bytes_of(int32_t dtype) {
  switch (dtype) {
    case FASTREC_INT64:
      return 8;
    case FASTREC_FLOAT32:
    case FASTREC_INT32:
      return 4;
    default:
      return 1;
  }
}

static void set(void* data, int32_t dtype, int64_t at, int64_t value) {
  if (dtype == FASTREC_INT64)
    ((int64_t*)data)[at] = value;
  else if (dtype == FASTREC_INT32)
    ((int32_t*)data)[at] = (int32_t)value;
  else if (dtype == FASTREC_FLOAT32)
    ((float*)data)[at] = 0.5f;
  else
    ((unsigned char*)data)[at] = (unsigned char)value;
}

static int fail(const char* what, const fastrec_error* error) {
  fprintf(stderr, "%s: code %d: %s\n", what, error->code, error->message);
  return 1;
}

int main(int count, char** arguments) {
  if (count < 2) {
    fprintf(stderr, "usage: %s ENGINE [BATCH]\n", arguments[0]);
    return 2;
  }
  const int64_t batch = count > 2 ? atoll(arguments[2]) : 1;
  fastrec_engine* engine = NULL;
  fastrec_error error;
  if (fastrec_open(arguments[1], FASTREC_COPY, &engine, &error)) return fail("open", &error);

  int status = 1;
  void* data[MAX_INPUTS] = {0};
  static int64_t sizes[MAX_INPUTS][FASTREC_MAX_DIMS];
  fastrec_array arrays[MAX_INPUTS];
  float* scores = NULL;
  const int inputs = fastrec_inputs(engine);
  int with_ids = -1;
  int64_t rows = 0;
  for (int i = 0; i < inputs; ++i) {
    fastrec_input input;
    if (fastrec_describe(engine, i, &input, &error)) {
      fail("describe", &error);
      goto end;
    }
    printf("input %s dtype %d [", input.name, (int)input.dtype);
    int64_t elements = 1;
    for (int d = 0; d < input.dims; ++d) {
      sizes[i][d] = input.symbols[d] ? size_of(input.symbols[d], input.low[d], input.high[d], batch)
                                     : input.sizes[d];
      elements *= sizes[i][d];
      printf("%s%s=%" PRId64, d ? ", " : "", input.symbols[d] ? input.symbols[d] : "", sizes[i][d]);
    }
    printf("] ids below %" PRId64 "\n", input.rows);
    data[i] = calloc((size_t)elements + 1, bytes_of(input.dtype));
    if (!data[i]) goto end;
    for (int64_t e = 0; e < elements; ++e) {
      int64_t value = input.rows > 0 ? (e * 7 + i + 1) % input.rows : 0;
      if (input.rows_symbol) value = size_of(input.rows_symbol, 1, MOST, batch);
      set(data[i], input.dtype, e, value);
    }
    if (input.rows > 0 && with_ids < 0) with_ids = i, rows = input.rows;
    arrays[i] = (fastrec_array){data[i], input.dtype, input.dims, sizes[i]};
  }

  int64_t shape[FASTREC_MAX_DIMS];
  int dims = 0;
  if (fastrec_output_sizes(engine, arrays, inputs, shape, &dims, &error)) {
    fail("output sizes", &error);
    goto end;
  }
  size_t room = 1;
  for (int d = 0; d < dims; ++d) room *= (size_t)shape[d];
  scores = malloc((room + 1) * sizeof(float));
  if (!scores) goto end;
  if (fastrec_run(engine, arrays, inputs, scores, room, &error)) {
    fail("run", &error);
    goto end;
  }
  for (size_t s = 0; s < room; ++s) printf("%.9g\n", scores[s]);

  /* A wrong id is a value to look at, and the engine goes on. */
  if (with_ids >= 0) {
    set(data[with_ids], arrays[with_ids].dtype, 0, rows);
    if (fastrec_run(engine, arrays, inputs, scores, room, &error) != FASTREC_ID_RANGE) {
      fail("an id beyond its table was not refused", &error);
      goto end;
    }
    printf("refused: %s\n", error.message);
  }
  status = 0;

end:
  free(scores);
  for (int i = 0; i < inputs; ++i) free(data[i]);
  fastrec_close(engine);
  return status;
}
