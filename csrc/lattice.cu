// Forward-backward over whole samples in float64, for any arcs that move forward:
//
//     α(n) = Σ_{arcs m → n} α(m)·p          α(0, 0) = 1          p = exp(score)
//     β(n) = Σ_{arcs n → m} p·β(m)          β(T, U) = 1
//     log-likelihood = log α(T, U)
//     occupancy(arc n → m) = α(n)·p·β(m) / α(T, U)
//
// Products of thousands of probabilities leave a double's range, so α and β carry their exponent
// (scaled.cuh): as exact as recursions over logarithms, without a logarithm to wait for.
//
// A block takes one direction of one sample, so α and β run side by side. It walks the anti-diagonals
// d = t + u, a thread a state u, one barrier a diagonal; while it computes one, the scores of the next
// turn into probabilities and those of the one after are read. Diagonals that later ones still need
// stand in a ring of RING rows of U + 1 numbers: in shared memory where it fits, else in `scratch`; so
// neither T nor U has a limit. Nodes are stored (sample, t, u), as the score pass left them.
//
//   ARCS                     arcs that leave a node
//   ARC_FRAMES, ARC_LABELS   frames that each reads and labels that it emits
//   RING                     1 + the largest frames + labels of an arc
//   first_node, frames, states   first node, T and U + 1 of each sample. [S]
//   alpha, beta                  packed. [N]

#include "scaled.cuh"

namespace {

__device__ constexpr int arc_frames[ARCS] = {ARC_FRAMES};
__device__ constexpr int arc_labels[ARCS] = {ARC_LABELS};

// One direction of one sample: its arcs lead from (t, u) back to (t − frames, u − labels) of α, or
// ahead to (t + frames, u + labels) of β.
struct Recursion {
  bool forward;
  long long frames, states;
  const double* scores;  // [frames, states, ARCS]
  Scaled* ring;          // [RING, states]

  __device__ bool is_node(long long t, long long u) const {
    return t >= 0 && t < frames && u >= 0 && u < states;
  }
  __device__ bool is_end(long long t, long long u) const { return t == frames && u == states - 1; }
  __device__ Scaled& at(long long t, long long u) const { return ring[(t + u) % RING * states + u]; }

  // Score of each arc of (t, u), −∞ where there is none.
  __device__ void load_scores(long long t, long long u, double (&score)[ARCS]) const {
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const long long other_t = forward ? t - arc_frames[a] : t + arc_frames[a];
      const long long other_u = forward ? u - arc_labels[a] : u + arc_labels[a];
      const long long from_t = forward ? other_t : t, from_u = forward ? other_u : u;
      const bool exists = is_node(from_t, from_u) && (is_node(other_t, other_u) || is_end(other_t, other_u));
      score[a] = exists ? scores[(from_t * states + from_u) * ARCS + a] : minus_infinity();
    }
  }

  // Sum over the arcs of (t, u).
  __device__ Scaled sum(long long t, long long u, const Scaled (&probability)[ARCS]) const {
    Scaled others[ARCS];
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const long long other_t = forward ? t - arc_frames[a] : t + arc_frames[a];
      const long long other_u = forward ? u - arc_labels[a] : u + arc_labels[a];
      others[a] = is_node(other_t, other_u) ? at(other_t, other_u) : is_end(other_t, other_u) ? one() : zero();
    }
    return sum_of_products(others, probability);
  }
};

__device__ __forceinline__ void to_probabilities(const double (&score)[ARCS], Scaled (&probability)[ARCS]) {
#pragma unroll
  for (int a = 0; a < ARCS; ++a) probability[a] = exponential(score[a]);
}

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
  const Recursion recursion = {
      blockIdx.y == 0, frames[blockIdx.x], states[blockIdx.x], scores + first * ARCS,
      scratch ? reinterpret_cast<Scaled*>(scratch + block * scratch_pitch) : dynamic_shared<Scaled>()};
  const bool forward = recursion.forward;
  double* const result = forward ? alpha : beta;
  const long long diagonals = recursion.frames + recursion.states - 1;
  const long long advance = forward ? 1 : -1;
  const long long mine = threadIdx.x;

  const auto finish = [&](long long t, long long u, const Scaled(&probability)[ARCS]) {
    const Scaled value = forward && t + u == 0 ? one() : recursion.sum(t, u, probability);
    recursion.at(t, u) = value;
    if (result) result[first + t * recursion.states + u] = pack(value);
  };

  long long d = forward ? 0 : diagonals - 1;
  double score[ARCS];
  Scaled probability[ARCS];
  recursion.load_scores(d - mine, mine, score);
  to_probabilities(score, probability);
  recursion.load_scores(d + advance - mine, mine, score);
  for (long long step = 0; step < diagonals; ++step, d += advance) {
    Scaled next[ARCS];
    to_probabilities(score, next);
    recursion.load_scores(d + 2 * advance - mine, mine, score);
    if (recursion.is_node(d - mine, mine)) finish(d - mine, mine, probability);

    // Samples of more states than the block has threads.
    for (long long u = mine + blockDim.x; u < recursion.states && u <= d; u += blockDim.x) {
      if (!recursion.is_node(d - u, u)) continue;
      double score_of[ARCS];
      recursion.load_scores(d - u, u, score_of);
      to_probabilities(score_of, probability);
      finish(d - u, u, probability);
    }
#pragma unroll
    for (int a = 0; a < ARCS; ++a) probability[a] = next[a];
    __syncthreads();
  }
  if (forward && threadIdx.x == 0) {
    const long long t = recursion.frames, u = recursion.states - 1;
    recursion.load_scores(t, u, score);
    to_probabilities(score, probability);
    log_likelihood[blockIdx.x] = logarithm(recursion.sum(t, u, probability));
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
      const Scaled from = unpack(alpha[node]);
      const Scaled to = is_last ? one() : unpack(beta[node + arc_frames[a] * width + arc_labels[a]]);
      const double rest = scores[node * ARCS + a] - log_likelihood[sample];
      value = from.mantissa * to.mantissa * exp(fma(from.exponent + to.exponent, ln2, rest));
    }
    occupancy[node * ARCS + a] = value;
  }
}
