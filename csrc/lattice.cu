// Forward-backward over whole samples in float64, for any arcs that move forward:
//
//     α(n) = log Σ_{arcs m → n} exp(α(m) + score)          α(0, 0) = 0
//     β(n) = log Σ_{arcs n → m} exp(score + β(m))          β(T, U) = 0
//     log-likelihood = α(T, U)
//     occupancy(arc n → m) = exp(α(n) + score + β(m) − α(T, U))
//
// A block takes one direction of one sample, so α and β run side by side. It walks the anti-diagonals
// d = t + u, a thread a state u, one barrier a diagonal. Diagonals that later ones still need
// stand in a ring of RING rows of U + 1 numbers: in shared memory where it fits, else in `scratch`; so
// neither T nor U has a limit. Nodes are stored (sample, t, u), as the score pass left them.
//
//   ARCS                     arcs that leave a node
//   ARC_FRAMES, ARC_LABELS   frames that each reads and labels that it emits
//   RING                     1 + the largest frames + labels of an arc
//   first_node, frames, states   first node, T and U + 1 of each sample. [S]

#include "warp.cuh"

namespace {

__device__ constexpr int arc_frames[ARCS] = {ARC_FRAMES};
__device__ constexpr int arc_labels[ARCS] = {ARC_LABELS};

// Keeps NaN; −∞ is the sum of nothing.
__device__ __forceinline__ double log_add(double a, double b) {
  if (a == minus_infinity()) return b;
  if (b == minus_infinity()) return a;
  return (a > b ? a : b) + log1p(exp(-fabs(a - b)));
}

struct Sample {
  long long frames, states;
  const double* scores;  // [frames, states, ARCS]
  double* ring;          // [RING, states]

  __device__ double& at(long long t, long long u) const { return ring[(t + u) % RING * states + u]; }

  __device__ double score(long long t, long long u, int arc) const {
    return scores[(t * states + u) * ARCS + arc];
  }
  __device__ bool is_node(long long t, long long u) const {
    return t >= 0 && t < frames && u >= 0 && u < states;
  }
  __device__ bool is_end(long long t, long long u) const { return t == frames && u == states - 1; }

  // Scores of the arcs that end in (t, u), −∞ where there is none.
  __device__ void load_arriving(long long t, long long u, double (&score_of)[ARCS]) const {
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const long long from_t = t - arc_frames[a], from_u = u - arc_labels[a];
      score_of[a] = is_node(from_t, from_u) ? score(from_t, from_u, a) : minus_infinity();
    }
  }
  // Scores of the arcs that leave (t, u), −∞ where there is none.
  __device__ void load_leaving(long long t, long long u, double (&score_of)[ARCS]) const {
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const long long to_t = t + arc_frames[a], to_u = u + arc_labels[a];
      const bool exists = is_node(t, u) && (is_node(to_t, to_u) || is_end(to_t, to_u));
      score_of[a] = exists ? score(t, u, a) : minus_infinity();
    }
  }

  __device__ double arriving(long long t, long long u, const double (&score_of)[ARCS]) const {
    double sum = minus_infinity();
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const long long from_t = t - arc_frames[a], from_u = u - arc_labels[a];
      if (is_node(from_t, from_u)) sum = log_add(sum, score_of[a] + at(from_t, from_u));
    }
    return sum;
  }
  __device__ double leaving(long long t, long long u, const double (&score_of)[ARCS]) const {
    double sum = minus_infinity();
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const long long to_t = t + arc_frames[a], to_u = u + arc_labels[a];
      if (is_node(to_t, to_u)) sum = log_add(sum, score_of[a] + at(to_t, to_u));
      if (is_end(to_t, to_u)) sum = log_add(sum, score_of[a]);
    }
    return sum;
  }
};

}  // namespace

// Block (sample, direction): α and the log-likelihood in direction 0, β in direction 1. Without
// `alpha`, α is not kept.
extern "C" __global__ void __launch_bounds__(1024)
    forward_backward(const double* __restrict__ scores, const long long* __restrict__ first_node,
                     const long long* __restrict__ frames, const long long* __restrict__ states,
                     double* __restrict__ alpha, double* __restrict__ beta,
                     double* __restrict__ log_likelihood, double* scratch, long long scratch_pitch) {
  const long long block = blockIdx.x * static_cast<long long>(gridDim.y) + blockIdx.y;
  const long long first = first_node[blockIdx.x];
  const Sample sample = {frames[blockIdx.x], states[blockIdx.x], scores + first * ARCS,
                         scratch ? scratch + block * scratch_pitch : dynamic_shared<double>()};
  const long long diagonals = sample.frames + sample.states - 1;
  const bool forward = blockIdx.y == 0;
  double* const result = forward ? alpha : beta;

  const auto load_scores = [&](long long t, long long u, double(&score_of)[ARCS]) {
    forward ? sample.load_arriving(t, u, score_of) : sample.load_leaving(t, u, score_of);
  };
  const auto compute = [&](long long t, long long u, const double(&score_of)[ARCS]) {
    const bool is_start = forward && t + u == 0;
    const double value = is_start  ? 0.0
                         : forward ? sample.arriving(t, u, score_of)
                                   : sample.leaving(t, u, score_of);
    sample.at(t, u) = value;
    if (result) result[first + t * sample.states + u] = value;
  };

  // A thread's scores of the next diagonal are on their way while this one is computed.
  const long long mine = threadIdx.x;
  const long long advance = forward ? 1 : -1;
  double ahead[ARCS];
  long long d = forward ? 0 : diagonals - 1;
  load_scores(d - mine, mine, ahead);
  for (long long step = 0; step < diagonals; ++step, d += advance) {
    double now[ARCS];
#pragma unroll
    for (int a = 0; a < ARCS; ++a) now[a] = ahead[a];
    load_scores(d + advance - mine, mine, ahead);
    if (sample.is_node(d - mine, mine)) compute(d - mine, mine, now);

    // Samples of more states than the block has threads.
    for (long long u = mine + blockDim.x; u < sample.states && u <= d; u += blockDim.x) {
      if (!sample.is_node(d - u, u)) continue;
      load_scores(d - u, u, now);
      compute(d - u, u, now);
    }
    __syncthreads();
  }
  if (forward && threadIdx.x == 0) {
    load_scores(sample.frames, sample.states - 1, ahead);
    log_likelihood[blockIdx.x] = sample.arriving(sample.frames, sample.states - 1, ahead);
  }
}

// A thread a node.
extern "C" __global__ void __launch_bounds__(256)
    occupancies(const double* __restrict__ scores, const double* __restrict__ alpha,
                const double* __restrict__ beta, const double* __restrict__ log_likelihood,
                const int* __restrict__ frame, const long long* __restrict__ frame_sample,
                const long long* __restrict__ first_node, const long long* __restrict__ frames,
                const long long* __restrict__ states, double* __restrict__ occupancy, long long nodes) {
  const long long node = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (node >= nodes) return;
  const long long sample = frame_sample[frame[node]];
  const long long width = states[sample];
  const long long t = (node - first_node[sample]) / width;
  const long long u = (node - first_node[sample]) - t * width;
#pragma unroll
  for (int a = 0; a < ARCS; ++a) {
    const long long to_t = t + arc_frames[a], to_u = u + arc_labels[a];
    double value = 0.0;
    const bool is_last = to_t == frames[sample] && to_u == width - 1;
    if (is_last || (to_t < frames[sample] && to_u < width)) {
      const double rest = is_last ? 0.0 : beta[node + arc_frames[a] * width + arc_labels[a]];
      value = exp(alpha[node] + scores[node * ARCS + a] + rest - log_likelihood[sample]);
    }
    occupancy[node * ARCS + a] = value;
  }
}
