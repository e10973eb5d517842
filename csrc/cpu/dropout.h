// Dropout of hidden states. The GEMM's operand tells what was dropped: −0 stands for that, and every
// other zero is +0. So the backward pass reads the mask where it reads the states, and needs no second one.
#pragma once

#include "activations.h"
#include "philox.h"

namespace {

// Of the hidden states of node (t, u) of sample b, from left to right.
struct Dropout {
  static constexpr int columns = 4 * lanes<float>;

  std::uint64_t seed;
  std::uint32_t u, t, b, threshold;
  REAL scale;
  Bits<REAL> words[columns] = {};

  // The states of some columns, the first of which follows those of the last call.
  Reals operator()(Reals values, long long first) {
    const long long place = first % columns;
    if (place == 0) philox<columns / 4>(static_cast<std::uint32_t>(first / 4), u, t, b, seed, words);
    Vector<Bits<REAL>> word;
    std::memcpy(&word, words + place, sizeof word);
    values *= scale;
    values = magnitude<REAL>(values) <= REAL(rounds_to_zero<OPERAND>) ? Reals{} : values;
    return word < Bits<REAL>{threshold} ? broadcast(REAL(-0.0)) : values;
  }
};

// act' · mask / (1 − p), from the activation's arguments, and from the states as the operand has them.
inline Reals derivative_with_dropout(Reals sum, Reals hidden, REAL kept, REAL scale) {
  constexpr Bits<REAL> minus_zero = Bits<REAL>{1} << (8 * sizeof(REAL) - 1);
  return bits_of<REAL>(hidden) == minus_zero ? Reals{} : derivative(sum, hidden * kept) * scale;
}

}  // namespace
