// The path of largest score of each sample, in float64, for any arcs that move forward:
//
//     α(n) = max_{arcs m → n} α(m) + score          α(0, 0) = 0
//     score of the path = α(T, U)
//
// Of equal arcs into a node the first is taken. An arc of score −∞ is none, and NaN is more than any
// number, so that it reaches α(T, U). Terms are added in the same order in all backends: paths are equal in
// all of them, whatever rounds.
//
// A task takes a sample. It walks the frames, each from its lowest state to its highest: every arc leads
// ahead in that order. It keeps which arc attains α of each node, and goes back from (T, U) along them.
//
//   first_frame, first_state     first packed frame and first packed state of each sample. [S]
//   frames, states               T and U + 1 of each sample. [S]
//   frame_node, low, high        of each packed frame, as in arcs.h. [F]
//   alpha, best_arc              scratch: α of each node, and the arc that attains it. [N]
//   path_score                   −∞ where there is no path. [S]
//   label_frame                  frame on which the path emits a state's next label; −1 beforehand. [P]

#include <cmath>

#include "arcs.h"
#include "threads.h"

namespace {

constexpr double infinity = __builtin_inf();

static_assert(ARCS <= 256, "best_arc has a byte for a node");

// The best way to a node: its score, and the last of its arcs.
struct Arrival {
  double score;
  int arc;
};

// The arcs that lead to the nodes of frame t, or to (T, U).
class Arriving {
 public:
  Arriving(const Arcs& arcs, const double* alpha, long long t)
      : arcs_(arcs), alpha_(alpha), is_first_(t == 0) {
    for (int a = 0; a < ARCS; ++a) {
      const long long from_t = t - arc_frames[a], labels = arc_labels[a];
      first_u_[a] = last_u_[a] = 0;
      if (from_t < 0 || from_t >= arcs.frames || (t == arcs.frames && !arc_ends[a])) continue;
      first_u_[a] = arcs.low[from_t] + labels;
      last_u_[a] = arcs.high[from_t] + labels - (arc_next_symbols[a] ? 1 : 0);
      node_[a] = arcs.node(from_t, -labels);
      of_numbers_[a] = arcs.of_numbers(a, from_t);
    }
  }

  // The best way to state u.
  Arrival best(long long u) const {
    Arrival found = {is_first_ && u == 0 ? 0.0 : -infinity, 0};
    for (int a = 0; a < ARCS; ++a) {
      if (u < first_u_[a] || u >= last_u_[a]) continue;
      const double of_arc = arcs_.of_symbols(a, node_[a] + u) + of_numbers_[a];
      const double score = of_arc == -infinity ? of_arc : alpha_[node_[a] + u] + of_arc;
      if (score > found.score || std::isnan(score)) found = {score, a};
    }
    return found;
  }

 private:
  const Arcs& arcs_;
  const double* alpha_;
  bool is_first_;
  // Of each arc to state u: it exists where first_u ≤ u < last_u, and starts in node + u.
  long long first_u_[ARCS], last_u_[ARCS], node_[ARCS];
  double of_numbers_[ARCS];
};

}  // namespace

extern "C" void best_paths(long long threads, const double* scores, const double* numbers,
                           const std::int64_t* first_frame, const std::int64_t* first_state,
                           const std::int64_t* frames, const std::int64_t* states,
                           const std::int64_t* frame_node, const std::int64_t* low,
                           const std::int64_t* high, double* alpha, std::uint8_t* best_arc,
                           double* path_score, std::int64_t* label_frame, long long sample_count) {
  for_each_task(threads, sample_count, [=](long long s) {
    const std::int64_t f = first_frame[s];
    const Arcs arcs = {scores, numbers, frame_node + f, low + f, high + f, frames[s], states[s]};
    for (long long t = 0; t < arcs.frames; ++t) {
      const Arriving arriving(arcs, alpha, t);
      for (long long u = arcs.low[t]; u < arcs.high[t]; ++u) {
        const Arrival best = arriving.best(u);
        alpha[arcs.node(t, u)] = best.score;
        best_arc[arcs.node(t, u)] = static_cast<std::uint8_t>(best.arc);
      }
    }
    const Arrival end = Arriving(arcs, alpha, arcs.frames).best(arcs.states - 1);
    path_score[s] = end.score;
    // A finite sum has finite terms alone: its arcs lead back to (0, 0).
    if (!std::isfinite(end.score)) return;
    long long t = arcs.frames, u = arcs.states - 1;
    for (int arc = end.arc;; arc = best_arc[arcs.node(t, u)]) {
      t -= arc_frames[arc];
      u -= arc_labels[arc];
      if (arc_labels[arc]) label_frame[first_state[s] + u] = t;
      if (t == 0 && u == 0) return;
    }
  });
}
