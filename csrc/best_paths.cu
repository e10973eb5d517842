// The path of largest score of each sample, in float64, for any arcs that move forward:
//
//     α(n) = max_{arcs m → n} α(m) + score          α(0, 0) = 0
//     score of the path = α(T, U)
//
// The score of an arc of node (t, u) is the sum of its symbols' at (t, u) and of its next symbols' at
// (t, u + 1), plus offset + delay·((T − 1)/2 − t). An arc from or to a (t, u) that is no node does not
// exist, nor does one whose next symbols have no node.
//
// Of equal arcs into a node the first is taken. An arc of score −∞ is none, and NaN is more than any
// number, so that it reaches α(T, U). Terms are added in the same order in all backends: paths are equal
// in all of them, whatever rounds.
//
// A block takes a sample. It walks the anti-diagonals d = t + u, a thread a node, one barrier a diagonal,
// and keeps α of each node and which arc attains it; then one thread goes back from (T, U) along them.
//
//   macros of arcs.cuh
//   scores                    of symbols. [N, SYMBOLS]
//   numbers                   offset, delay and scale of each arc. [ARCS, 3]
//   first_frame, first_state  first packed frame and first packed state of each sample. [S]
//   frames, states            T and U + 1 of each sample. [S]
//   frame_node, low, high     of each packed frame: node (t, u) is number frame_node + u, low ≤ u < high. [F]
//   alpha, best_arc           scratch. [N]
//   path_score                −∞ where there is no path. [S]
//   label_frame               frame on which the path emits a state's next label; −1 beforehand. [P]

#include "arcs.cuh"
#include "warp.cuh"

namespace {

static_assert(ARCS <= 256, "best_arc has a byte for a node");

// The best way to a node: its score, and the last of its arcs.
struct Arrival {
  double score;
  int arc;
};

struct Sample {
  int frames, states;
  const double *scores, *numbers;
  const long long *frame_node, *low, *high;  // of its frames
  double* alpha;
  unsigned char* best_arc;

  __device__ bool has(int t, int u) const { return t >= 0 && t < frames && low[t] <= u && u < high[t]; }
  __device__ long long node(int t, int u) const { return frame_node[t] + u; }

  // Score of arc `a` of a node on frame t.
  __device__ double score_of(int a, int t, long long node) const {
    // Not contracted with the sum that follows: the product rounds before, as in all backends.
    const double of_delay = fma(numbers[3 * a + 1], 0.5 * (frames - 1) - t, 0.0);
    return sum_of_symbols(scores + node * SYMBOLS, a) + (numbers[3 * a] + of_delay);
  }

  // The best way to (t, u), a node or (T, U).
  __device__ Arrival best(int t, int u) const {
    Arrival found = {t == 0 && u == 0 ? 0.0 : minus_infinity(), 0};
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const int from_t = t - arc_frames[a], from_u = u - arc_labels[a];
      const bool exists = has(from_t, from_u) && (!arc_next_symbols[a] || has(from_t, from_u + 1)) &&
                          (arc_ends[a] || t < frames);
      if (!exists) continue;
      const long long from = node(from_t, from_u);
      const double of_arc = score_of(a, from_t, from);
      const double score = of_arc == minus_infinity() ? of_arc : alpha[from] + of_arc;
      if (score > found.score || isnan(score)) found = {score, a};
    }
    return found;
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(1024, 1)
    best_paths(const double* __restrict__ scores, const double* __restrict__ numbers,
               const long long* __restrict__ first_frame, const long long* __restrict__ first_state,
               const long long* __restrict__ frames, const long long* __restrict__ states,
               const long long* __restrict__ frame_node, const long long* __restrict__ low,
               const long long* __restrict__ high, double* alpha, unsigned char* best_arc,
               double* __restrict__ path_score, long long* __restrict__ label_frame) {
  const long long first = first_frame[blockIdx.x];
  const Sample sample = {static_cast<int>(frames[blockIdx.x]),
                         static_cast<int>(states[blockIdx.x]),
                         scores,
                         numbers,
                         frame_node + first,
                         low + first,
                         high + first,
                         alpha,
                         best_arc};
  for (int d = 0; d < sample.frames + sample.states - 1; ++d) {
    const int first_u = max(0, d - sample.frames + 1), last_u = min(d, sample.states - 1);
    for (int u = first_u + static_cast<int>(threadIdx.x); u <= last_u; u += blockDim.x) {
      const int t = d - u;
      if (!sample.has(t, u)) continue;
      const Arrival best = sample.best(t, u);
      alpha[sample.node(t, u)] = best.score;
      best_arc[sample.node(t, u)] = static_cast<unsigned char>(best.arc);
    }
    __syncthreads();
  }
  if (threadIdx.x > 0) return;
  int t = sample.frames, u = sample.states - 1;
  const Arrival end = sample.best(t, u);
  path_score[blockIdx.x] = end.score;
  // A finite sum has finite terms alone: its arcs lead back to (0, 0).
  if (!isfinite(end.score)) return;
  for (int arc = end.arc;; arc = best_arc[sample.node(t, u)]) {
    t -= arc_frames[arc];
    u -= arc_labels[arc];
    if (arc_labels[arc]) label_frame[first_state[blockIdx.x] + u] = t;
    if (t == 0 && u == 0) return;
  }
}
