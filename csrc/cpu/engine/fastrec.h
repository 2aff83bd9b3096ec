/* fastrec's engine from C: open an engine file, score, encode / append / score on users' states.
 *
 * Link with libfastrec.so (`fastrec info --c-flags`). Any number of threads may use one engine; a
 * state is immutable and may be shared. Functions return 0 or a code of fastrec_code and, where
 * `error` is not null, say why in it. Nothing is thrown, nothing is printed, and an engine stays
 * usable after an error. Arrays are C-contiguous; pointers that a call takes are read during the
 * call alone.
 */
#ifndef FASTREC_H
#define FASTREC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FASTREC_API __attribute__((visibility("default")))
#else
#define FASTREC_API
#endif

/* Of this header; fastrec_abi_version() tells the library's. */
#define FASTREC_ABI_VERSION 1

enum fastrec_code {
  FASTREC_OK = 0,
  FASTREC_ARGUMENT = 1,    /* an argument is wrong: a count, a dtype, a NaN, a null pointer */
  FASTREC_SHAPE = 2,       /* an array's dimensions do not fit */
  FASTREC_ID_RANGE = 3,    /* an id or a length lies outside its range */
  FASTREC_FILE = 4,        /* the file is missing, no engine, truncated, altered or not sound */
  FASTREC_UNSUPPORTED = 5, /* the machine or the model cannot do that */
  FASTREC_MEMORY = 6       /* out of memory */
};

typedef struct fastrec_error {
  int code;
  char message[512]; /* ends with a zero */
} fastrec_error;

enum fastrec_dtype {
  FASTREC_FLOAT32 = 0,
  FASTREC_INT64 = 1,
  FASTREC_UINT8 = 2,
  FASTREC_INT8 = 3,
  FASTREC_BOOL = 4,
  FASTREC_INT32 = 5
};

#define FASTREC_MAX_DIMS 6

typedef struct fastrec_array {
  const void* data;
  int32_t dtype; /* fastrec_dtype */
  int32_t dims;
  const int64_t* sizes;
} fastrec_array;

typedef struct fastrec_input {
  const char* name;
  int32_t dtype;
  int32_t dims;
  int64_t sizes[FASTREC_MAX_DIMS];       /* of a free size: -1 */
  const char* symbols[FASTREC_MAX_DIMS]; /* of a free size its symbol ("B", "L"), else null */
  int64_t low[FASTREC_MAX_DIMS];         /* limits of a free size */
  int64_t high[FASTREC_MAX_DIMS];        /* INT64_MAX: none */
  int64_t rows;                          /* ids lie in 0..rows - 1; -1: any value */
  const char* rows_symbol;               /* values lie in 0..that symbol's size, else null */
} fastrec_input;

typedef struct fastrec_engine fastrec_engine;
typedef struct fastrec_state fastrec_state;

FASTREC_API int fastrec_abi_version(void);

enum fastrec_open_flags {
  /* Keep a private copy of the file's constants, which nobody can change or truncate; without it
   * they are mapped, and processes that open one file share its memory. */
  FASTREC_COPY = 1
};

FASTREC_API int fastrec_open(const char* path, int flags, fastrec_engine** engine,
                             fastrec_error* error);
/* States made with the engine stay valid, and are freed by themselves. Null is allowed. */
FASTREC_API void fastrec_close(fastrec_engine* engine);

/* Number of inputs; input `index` of them, valid as long as the engine. */
FASTREC_API int fastrec_inputs(const fastrec_engine* engine);
FASTREC_API int fastrec_describe(const fastrec_engine* engine, int index, fastrec_input* input,
                                 fastrec_error* error);
/* The file's header, JSON: precision, inputs, versions and the program. */
FASTREC_API const char* fastrec_header(const fastrec_engine* engine);

/* Threads that a call may use, 1..1024; at first what the engine was compiled for. */
FASTREC_API int fastrec_set_threads(fastrec_engine* engine, int threads, fastrec_error* error);

/* Dimensions of the scores (float32) for such inputs: at most FASTREC_MAX_DIMS sizes. */
FASTREC_API int fastrec_output_sizes(const fastrec_engine* engine, const fastrec_array* inputs,
                                     int count, int64_t* sizes, int* dims, fastrec_error* error);

/* Scores of one batch; `room` is the number of floats that `scores` holds. */
FASTREC_API int fastrec_run(fastrec_engine* engine, const fastrec_array* inputs, int count,
                            float* scores, size_t room, fastrec_error* error);

enum fastrec_encode_flags {
  FASTREC_APPENDABLE = 1 /* keep what fastrec_append needs too */
};

/* The state of B users' histories: the model's inputs but the candidates', which are those with a
 * dimension "m". `history` has all of the former, in order. */
FASTREC_API int fastrec_encode(fastrec_engine* engine, const fastrec_array* history, int count,
                               int flags, fastrec_state** state, fastrec_error* error);
/* A new state with `events` after the histories of `state`, as many for each user: those of the
 * history's inputs that have a value for each event, in order, [B, n, ..]. Causal models only. */
FASTREC_API int fastrec_append(fastrec_engine* engine, const fastrec_state* state,
                               const fastrec_array* events, int count, fastrec_state** next,
                               fastrec_error* error);
/* Scores of candidates for the users of a state. */
FASTREC_API int fastrec_score(fastrec_engine* engine, const fastrec_state* state,
                              const fastrec_array* candidates, int count, float* scores,
                              size_t room, fastrec_error* error);
/* Of a model without candidates: what it gives for the histories; valid as long as the state. */
FASTREC_API int fastrec_state_output(const fastrec_state* state, const float** output,
                                     int64_t* sizes, int* dims, fastrec_error* error);
FASTREC_API size_t fastrec_state_bytes(const fastrec_state* state);
/* Null is allowed. */
FASTREC_API void fastrec_state_free(fastrec_state* state);

#ifdef __cplusplus
}
#endif

#endif /* FASTREC_H */
