// The arcs of one sample's lattice, and their scores.
//
// An arc of node (t, u) leads to (t + frames, u + labels). Its score is the sum of its symbols' at (t, u)
// and of its next symbols' at (t, u + 1), plus offset + delay·((T − 1)/2 − t). Nodes are stored (sample,
// t, u), as the score pass left them. An arc from or to a (t, u) that is no node does not exist, nor does
// one whose next symbols have no node.
//
//   SYMBOLS, ARCS                   symbols of a node, and arcs that leave it
//   ARC_FRAMES, ARC_LABELS          frames that each reads and labels that it emits
//   ARC_SYMBOLS, ARC_NEXT_SYMBOLS   bits of the symbols that score it
//   ARC_ENDS                        whether it may lead to (T, U)
//   RESTRICTED                      whether some of a sample's (t, u) may be no nodes
#pragma once

#include <cstdint>

namespace {

constexpr long long arc_frames[ARCS] = {ARC_FRAMES};
constexpr long long arc_labels[ARCS] = {ARC_LABELS};
constexpr unsigned arc_symbols[ARCS] = {ARC_SYMBOLS};
constexpr unsigned arc_next_symbols[ARCS] = {ARC_NEXT_SYMBOLS};
constexpr bool arc_ends[ARCS] = {ARC_ENDS};
constexpr bool restricted = RESTRICTED;

struct Arcs {
  const double* scores;   // of symbols. [N, SYMBOLS]
  const double* numbers;  // offset, delay and scale of each arc. [ARCS, 3]
  // Of its frames: node (t, u) is number frame_node + u, low ≤ u < high.
  const std::int64_t *frame_node, *low, *high;
  long long frames, states;  // T and U + 1

  long long node(long long t, long long u) const { return frame_node[t] + u; }
  // Whether there is such a node, t being a frame and u a state.
  bool has(long long t, long long u) const { return !restricted || (low[t] <= u && u < high[t]); }
  // What the symbols contribute to an arc, which must exist.
  double of_symbols(int a, long long node) const {
    const double* const here = scores + node * SYMBOLS;
    double score = 0.0;
    for (int s = 0; s < SYMBOLS; ++s) {
      if (arc_symbols[a] >> s & 1) score += here[s];
    }
    for (int s = 0; s < SYMBOLS; ++s) {
      if (arc_next_symbols[a] >> s & 1) score += here[SYMBOLS + s];
    }
    return score;
  }
  // What its numbers contribute on frame t. Volatile, so that the product rounds before the sum, as in all
  // backends, even where the CPU does both at once.
  double of_numbers(int a, long long t) const {
    const double until_middle = 0.5 * static_cast<double>(frames - 1) - static_cast<double>(t);
    const volatile double of_delay = numbers[3 * a + 1] * until_middle;
    return numbers[3 * a] + of_delay;
  }
  // Whether an arc of the node (t, u) leads to a node, or to the end, and has all its symbols.
  bool exists(int a, long long t, long long u) const {
    const long long to_t = t + arc_frames[a], to_u = u + arc_labels[a];
    if (to_u >= states || (arc_next_symbols[a] && !has(t, u + 1))) return false;
    return to_t < frames ? has(to_t, to_u) : arc_ends[a] && to_t == frames && to_u == states - 1;
  }
};

}  // namespace
