// The arcs that leave a node, and what scores them.
//
//   SYMBOLS, ARCS                   symbols of a node, and arcs that leave it
//   ARC_FRAMES, ARC_LABELS          frames that each reads and labels that it emits
//   ARC_SYMBOLS, ARC_NEXT_SYMBOLS   symbols of its node, and of the next, that score it: bits
//   ARC_ENDS                        whether it may lead to (T, U)
#pragma once

__device__ constexpr int arc_frames[ARCS] = {ARC_FRAMES};
__device__ constexpr int arc_labels[ARCS] = {ARC_LABELS};
__device__ constexpr unsigned int arc_symbols[ARCS] = {ARC_SYMBOLS};
__device__ constexpr unsigned int arc_next_symbols[ARCS] = {ARC_NEXT_SYMBOLS};
__device__ constexpr bool arc_ends[ARCS] = {ARC_ENDS};

// Whether symbol `s` scores arc `a`: of its node, or from SYMBOLS on of the next.
__device__ constexpr bool is_scored_by(int a, int s) {
  return s < SYMBOLS ? arc_symbols[a] >> s & 1 : arc_next_symbols[a] >> (s - SYMBOLS) & 1;
}

__device__ constexpr bool has_symbols(int a) { return arc_symbols[a] | arc_next_symbols[a]; }

// What the symbols contribute to the score of arc `a`; `scores` are those of its node, and behind them
// those of the next.
__device__ __forceinline__ double sum_of_symbols(const double* scores, int a) {
  double sum = -0.0;  // unlike 0.0, it changes no term, so that no addition is left of it
#pragma unroll
  for (int s = 0; s < 2 * SYMBOLS; ++s) {
    if (is_scored_by(a, s)) sum += scores[s];
  }
  return sum;
}
