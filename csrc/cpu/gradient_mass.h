// Gradient mass of a node: the L1 norm of its logit gradient, of unit scale,
//
//     c = γ_0·(1 − Σ_{s in softmax 0} p_s) + Σ_s |γ_g(s)·p_s − γ_s|    γ_g = Σ_{s in g} γ_s, p_s = exp(score_s)
#pragma once

#include "symbols.h"
#include "vectors.h"

namespace {

using Doubles = Vector<double>;
constexpr long long width = lanes<double>;

// Of `count` nodes, as many as a vector has elements at most.
Doubles mass_of(const double* scores, const double* occupancy, long long count) {
  double values[2 * SYMBOLS][width] = {};
  for (long long i = 0; i < count; ++i) {
    for (int s = 0; s < SYMBOLS; ++s) {
      values[s][i] = scores[i * SYMBOLS + s];
      values[SYMBOLS + s][i] = occupancy[i * SYMBOLS + s];
    }
  }
  Doubles gamma[2] = {}, rest = broadcast(1.0), mass = {};
  for (int s = 0; s < SYMBOLS; ++s) gamma[softmax_of[s]] += load(values[SYMBOLS + s]);
  for (int s = 0; s < SYMBOLS; ++s) {
    const Doubles p = exponential<double>(load(values[s]));
    if (softmax_of[s] == 0) rest -= p;
    if (has_column[s]) mass += magnitude<double>(gamma[softmax_of[s]] * p - load(values[SYMBOLS + s]));
  }
  return mass + (rest > 0.0 ? gamma[0] * rest : Doubles{});
}

}  // namespace
