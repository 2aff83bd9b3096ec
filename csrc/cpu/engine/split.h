// A program in two: what depends on the history alone, and what reads the candidates.
//
// A step belongs to the second part if it reads a candidate input, something computed from one, or
// a size that only the candidates bring. What the second part reads of the first is the state.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/program.h"

namespace fastrec::engine {

// Why a program does not split there, or cannot be taken further.
class CannotSplit : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The parts count symbols and constants as the whole does; buffers keep their numbers.
struct Split {
  // Inputs: the history's; outputs: the computed part of the state.
  Program encode;
  // Inputs: the candidates', then the computed part of the state, then `kept`; none where the state
  // is all that there is.
  std::optional<Program> score;
  // Positions of the whole program's inputs: of each part, and those history inputs that `score`
  // reads as they are, part of the state too.
  std::vector<int> history, candidates, kept;
  // The whole program's step behind each step, or -1.
  std::vector<int> encode_origins, score_origins;
};

// `candidates`: positions of the second part's own inputs; none: all of the program is the first
// part, its output the state. Throws CannotSplit.
Split split(const Program& program, const std::vector<int>& candidates);

// Makes all of a buffer, seen so, one more output of a program, unless it is one already.
void add_output(Program& program, const View& view);

// How the rows of new events come about, in a program where an event sees itself and those before.
//
// The symbol of events counts the new ones; attention reads the keys and values of the past from
// the state, whose rows the symbol `past` counts. It serves one user at a time: histories end at
// different rows.
struct Resumption {
  // Inputs: those of the program it was made of (events: the new ones), then `caches`, then how
  // many rows of the past count, int64 [B]; outputs: new rows of the program's outputs, then of
  // those of `caches` that are no output yet.
  Program program;
  int past = -1;  // the symbol
  // The old program's buffers whose rows of the past are needed.
  std::vector<int> caches;
  // The old program's step behind each step, or -1.
  std::vector<int> origins;
};

// Throws CannotSplit: a step lets events see later ones or cannot be computed row by row, and
// which.
Resumption resume(const Program& program, int events, int users);

}  // namespace fastrec::engine
