/* Opens an engine file, calls it with one request of the canonical ranker, and prints the time of
 * each call and the memory that is resident, as JSON: embedding ENGINE WARM CALLS COPY */
#include <fastrec.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { INPUTS = 6, HISTORY = 100, CANDIDATES = 50 };

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static long status_kb(const char* name) {
  FILE* file = fopen("/proc/self/status", "r");
  char line[256];
  long kb = -1;
  while (file && fgets(line, sizeof(line), file))
    if (strncmp(line, name, strlen(name)) == 0) kb = atol(line + strlen(name) + 1);
  if (file) fclose(file);
  return kb;
}

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int warm = atoi(arguments[2]), calls = atoi(arguments[3]);
  fastrec_engine* engine = NULL;
  fastrec_error error;
  const int flags = atoi(arguments[4]) ? FASTREC_COPY : 0;
  if (fastrec_open(arguments[1], flags, &engine, &error)) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  static int64_t values[INPUTS][HISTORY];
  static const int64_t history[2] = {1, HISTORY}, one[1] = {1}, candidates[2] = {1, CANDIDATES};
  fastrec_array arrays[INPUTS];
  for (int i = 0; i < INPUTS; ++i) {
    fastrec_input input;
    if (fastrec_inputs(engine) != INPUTS || fastrec_describe(engine, i, &input, &error)) return 1;
    for (int e = 0; e < HISTORY; ++e)
      values[i][e] = input.rows > 0 ? (e * 7919 + i + 1) % input.rows : HISTORY;
    arrays[i] = (fastrec_array){values[i], FASTREC_INT64, i == 3 ? 1 : 2,
                                i < 3    ? history
                                : i == 3 ? one
                                         : candidates};
  }
  float scores[CANDIDATES];
  printf("{\"us\": [");
  for (int c = 0; c < warm + calls; ++c) {
    const int64_t start = now_ns();
    if (fastrec_run(engine, arrays, INPUTS, scores, CANDIDATES, &error)) {
      fprintf(stderr, "%s\n", error.message);
      return 1;
    }
    if (c >= warm) printf("%s%.3f", c > warm ? ", " : "", (double)(now_ns() - start) / 1e3);
  }
  printf("], \"rss_kb\": %ld, \"anonymous_kb\": %ld, \"first_score\": %.9g}\n", status_kb("VmRSS:"),
         status_kb("RssAnon:"), scores[0]);
  fastrec_close(engine);
  return 0;
}
