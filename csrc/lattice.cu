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

__device__ __forceinline__ void to_probabilities(const double (&score)[ARCS], Scaled (&probability)[ARCS]) {
#pragma unroll
  for (int a = 0; a < ARCS; ++a) probability[a] = exponential(score[a]);
}

// One direction of one sample: its arcs lead from (t, u) back to (t − frames, u − labels) of α, or
// ahead to (t + frames, u + labels) of β.
struct Recursion {
  int sign;  // 1 for α, −1 for β
  int frames, states;
  const double* scores;  // [frames, states, ARCS]
  double* result;        // packed, or null. [frames, states]
  double* log_likelihood;

  __device__ bool is_forward() const { return sign > 0; }
  __device__ bool is_node(int t, int u) const {
    return static_cast<unsigned int>(t) < static_cast<unsigned int>(frames) &&
           static_cast<unsigned int>(u) < static_cast<unsigned int>(states);
  }
  __device__ bool is_end(int t, int u) const { return t == frames && u == states - 1; }

  // Score of each arc of (t, u), −∞ where there is none; `node` is t·states + u.
  __device__ void load_scores(int t, int u, long long node, double (&score)[ARCS]) const {
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const int other_t = t - sign * arc_frames[a], other_u = u - sign * arc_labels[a];
      const bool exists = is_node(is_forward() ? other_t : t, is_forward() ? other_u : u) &&
                          (is_node(other_t, other_u) || is_end(other_t, other_u));
      const long long back = is_forward() ? static_cast<long long>(arc_frames[a]) * states + arc_labels[a] : 0;
      score[a] = exists ? scores[(node - back) * ARCS + a] : minus_infinity();
    }
  }

  // Sum over the arcs of (t, u), which stands in row `slot` of the ring.
  __device__ Scaled sum(const Scaled* ring, int t, int u, int slot, const Scaled (&probability)[ARCS]) const {
    if (is_forward() && t + u == 0) return one();
    Scaled others[ARCS];
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const int other_t = t - sign * arc_frames[a], other_u = u - sign * arc_labels[a];
      int row = slot - sign * (arc_frames[a] + arc_labels[a]);
      row += row < 0 ? RING : row >= RING ? -RING : 0;
      others[a] = is_end(other_t, other_u) ? one() : zero();
      if (is_node(other_t, other_u)) others[a] = ring[row * states + other_u];
    }
    return sum_of_products(others, probability);
  }

  // `node` moves along with the thread's own state from diagonal to diagonal.
  __device__ __forceinline__ void run(Scaled* ring) const {
    const int diagonals = frames + states - 1;
    const int mine = threadIdx.x;
    const bool is_wide = states > static_cast<int>(blockDim.x);
    const long long pitch = static_cast<long long>(sign) * states;
    int d = is_forward() ? 0 : diagonals - 1;
    int slot = d % RING;
    long long node = static_cast<long long>(d - mine) * states + mine;

    double score[ARCS];
    Scaled probability[ARCS];
    load_scores(d - mine, mine, node, score);
    to_probabilities(score, probability);
    load_scores(d + sign - mine, mine, node + pitch, score);
    for (int step = 0; step < diagonals; ++step) {
      Scaled next[ARCS];
      to_probabilities(score, next);
      load_scores(d + 2 * sign - mine, mine, node + 2 * pitch, score);
      if (is_node(d - mine, mine)) {
        const Scaled value = sum(ring, d - mine, mine, slot, probability);
        ring[slot * states + mine] = value;
        if (result) result[node] = pack(value);
      }
      if (is_wide) run_others(ring, d, slot);
#pragma unroll
      for (int a = 0; a < ARCS; ++a) probability[a] = next[a];
      d += sign;
      node += pitch;
      slot += sign;
      slot += slot < 0 ? RING : slot >= RING ? -RING : 0;
      __syncthreads();
    }
    if (is_forward() && threadIdx.x == 0) {
      load_scores(frames, states - 1, static_cast<long long>(frames) * states + states - 1, score);
      to_probabilities(score, probability);
      *log_likelihood = logarithm(sum(ring, frames, states - 1, slot, probability));
    }
  }

  // The states that the block has no thread for.
  __device__ void run_others(Scaled* ring, int d, int slot) const {
    for (int u = threadIdx.x + blockDim.x; u < states && u <= d; u += blockDim.x) {
      const int t = d - u;
      if (!is_node(t, u)) continue;
      const long long node = static_cast<long long>(t) * states + u;
      double score[ARCS];
      Scaled probability[ARCS];
      load_scores(t, u, node, score);
      to_probabilities(score, probability);
      const Scaled value = sum(ring, t, u, slot, probability);
      ring[slot * states + u] = value;
      if (result) result[node] = pack(value);
    }
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
  const bool forward = blockIdx.y == 0;
  const long long first = first_node[blockIdx.x];
  double* const result = forward ? alpha : beta;
  const Recursion recursion = {forward ? 1 : -1,
                               static_cast<int>(frames[blockIdx.x]),
                               static_cast<int>(states[blockIdx.x]),
                               scores + first * ARCS,
                               result ? result + first : nullptr,
                               log_likelihood + blockIdx.x};
  // Two calls, so that the compiler knows shared memory where it is.
  if (scratch) {
    const long long block = blockIdx.x * static_cast<long long>(gridDim.y) + blockIdx.y;
    recursion.run(reinterpret_cast<Scaled*>(scratch + block * scratch_pitch));
  } else {
    recursion.run(dynamic_shared<Scaled>());
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
