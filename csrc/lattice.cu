// Forward-backward over whole samples in float64, for any arcs that move forward:
//
//     α(n) = Σ_{arcs m → n} α(m)·p          α(0, 0) = 1          p = exp(score)
//     β(n) = Σ_{arcs n → m} p·β(m)          β(T, U) = 1
//     log-likelihood = log α(T, U)
//     occupancy(symbol of n) = Σ_{arcs m → k that it scores} scale·α(m)·p·β(k) / α(T, U)
//
// The score of an arc that leaves n = (t, u) is the sum of those of its symbols at n and of its next
// symbols at (t, u + 1), plus offset + delay·((T − 1)/2 − t).
//
// Products of thousands of probabilities leave a double's range, so α and β carry their exponent
// (scaled.cuh): as exact as recursions over logarithms, without a logarithm to wait for.
//
// A block takes one direction of one sample, so α and β run side by side. It walks the anti-diagonals
// d = t + u, a thread a state u, one barrier a diagonal; while it computes one, the scores of the next
// turn into probabilities and those of the one after are read. Diagonals that later ones still need
// stand in a ring of RING rows of U + 1 numbers: in shared memory where it fits, else in `scratch`; so
// neither T nor U has a limit. Nodes are stored (sample, t, u), as the score pass left them. An arc from
// or to a (t, u) that is no node does not exist, nor does one whose next symbols have no node. Such a
// (t, u) is computed like a node without arcs, so that the ring holds a number everywhere.
//
//   macros of arcs.cuh
//   RING                     1 + the largest frames + labels of an arc
//   RESTRICTED               whether some of a sample's (t, u) may be no nodes
//   THREADS                  of a block at most: the more arcs, the more registers a thread needs
//   scores                   of symbols. [N, SYMBOLS]
//   numbers                  offset, delay and scale of each arc. [ARCS, 3]
//   first_frame, frames, states   first packed frame, T and U + 1 of each sample. [S]
//   frame_node, low, high    of each packed frame: node (t, u) is number frame_node + u, low ≤ u < high.
//                            [F]
//   alpha, beta              packed. [N]

#include "arcs.cuh"
#include "scaled.cuh"

namespace {

constexpr bool restricted = RESTRICTED;

// What its numbers contribute, `position` = (T − 1)/2 − t.
__device__ __forceinline__ double sum_of_numbers(const double* numbers, int a, double position) {
  return fma(numbers[3 * a + 1], position, numbers[3 * a]);
}

// One direction of one sample: its arcs lead from (t, u) back to (t − frames, u − labels) of α, or
// ahead to (t + frames, u + labels) of β.
struct Recursion {
  int sign;  // 1 for α, −1 for β
  int frames, states, first_frame;
  const long long *frame_node, *low, *high;  // of all packed frames
  const double* scores;                      // by `node_at`. [.., SYMBOLS]
  const double* numbers;
  double* result;  // packed, by `node_at`, or null
  double* log_likelihood;

  __device__ bool is_forward() const { return sign > 0; }
  // 1 where (t, u) is its arcs' end, 0 where it is their start. Without a branch, for which the
  // compiler would write all that follows twice.
  __device__ int back() const { return (1 + sign) >> 1; }
  // Whether t is a frame and u a state.
  __device__ bool is_inside(int t, int u) const {
    return static_cast<unsigned int>(t) < static_cast<unsigned int>(frames) &&
           static_cast<unsigned int>(u) < static_cast<unsigned int>(states);
  }
  __device__ bool is_end(int t, int u) const { return t == frames && u == states - 1; }
  // Packed row of frame t, or of the frame nearest to it: loads need not wait for whether there is one.
  __device__ int frame(int t) const { return first_frame + min(max(t, 0), frames - 1); }
  // Whether (t, u), if it is inside or the end, is a node or the end.
  __device__ bool is_in_range(int t, int u) const {
    return (t == frames) | ((low[frame(t)] <= u) & (u < high[frame(t)]));
  }
  // Number of a node: among all where restricted, else among its sample's, which takes no load.
  __device__ long long node_at(int t, int u) const {
    return restricted ? frame_node[frame(t)] + u : static_cast<long long>(t) * states + u;
  }

  // What symbols contribute to the score of each arc of (t, u), −∞ where there is none.
  __device__ void load_scores(int t, int u, double (&score)[ARCS]) const {
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const int from_t = t - back() * arc_frames[a], from_u = u - back() * arc_labels[a];
      const int to_t = from_t + arc_frames[a], to_u = from_u + arc_labels[a];
      bool exists = is_inside(from_t, from_u) &&
                    (is_inside(to_t, to_u) || (arc_ends[a] && is_end(to_t, to_u)));
      if (restricted) {
        // The ends are (t, u), for all arcs, and what `sum` reads.
        exists &= is_in_range(t, u) & is_in_range(t - sign * arc_frames[a], u - sign * arc_labels[a]);
        if (arc_next_symbols[a]) exists &= is_in_range(from_t, from_u + 1);
      }
      const long long from = node_at(from_t, from_u);
      score[a] = exists ? sum_of_symbols(scores + from * SYMBOLS, a) : minus_infinity();
    }
  }

  // Probability of each arc of a node on frame t.
  __device__ void to_probabilities(int t, const double (&score)[ARCS], Scaled (&probability)[ARCS]) const {
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      const double position = 0.5 * (frames - 1 - 2 * (t - back() * arc_frames[a]));
      probability[a] = exponential(score[a] + sum_of_numbers(numbers, a, position));
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
      if (is_inside(other_t, other_u)) others[a] = ring[row * states + other_u];
    }
    return sum_of_products(others, probability);
  }

  // Writes the value of (t, u), if it is to be kept and (t, u) is a node.
  __device__ void write(int t, int u, long long node, const Scaled& value) const {
    if (result && (!restricted || is_in_range(t, u))) result[node] = pack(value);
  }

  // `node` moves along with the thread's own state from diagonal to diagonal.
  __device__ __forceinline__ void run(Scaled* ring) const {
    const int diagonals = frames + states - 1;
    const int mine = threadIdx.x;
    const bool is_wide = states > static_cast<int>(blockDim.x);
    const long long pitch = static_cast<long long>(sign) * states;
    int d = is_forward() ? 0 : diagonals - 1;
    int slot = d % RING;
    long long node = node_at(d - mine, mine);

    double score[ARCS];
    Scaled probability[ARCS];
    load_scores(d - mine, mine, score);
    to_probabilities(d - mine, score, probability);
    load_scores(d + sign - mine, mine, score);
    for (int step = 0; step < diagonals; ++step) {
      Scaled next[ARCS];
      to_probabilities(d + sign - mine, score, next);
      load_scores(d + 2 * sign - mine, mine, score);
      if (is_inside(d - mine, mine)) {
        const Scaled value = sum(ring, d - mine, mine, slot, probability);
        ring[slot * states + mine] = value;
        write(d - mine, mine, node, value);
      }
      if (is_wide) run_others(ring, d, slot);
#pragma unroll
      for (int a = 0; a < ARCS; ++a) probability[a] = next[a];
      d += sign;
      node = restricted ? node_at(d - mine, mine) : node + pitch;
      slot += sign;
      slot += slot < 0 ? RING : slot >= RING ? -RING : 0;
      __syncthreads();
    }
    if (is_forward() && threadIdx.x == 0) {
      load_scores(frames, states - 1, score);
      to_probabilities(frames, score, probability);
      *log_likelihood = logarithm(sum(ring, frames, states - 1, slot, probability));
    }
  }

  // The states that the block has no thread for.
  __device__ void run_others(Scaled* ring, int d, int slot) const {
    for (int u = threadIdx.x + blockDim.x; u < states && u <= d; u += blockDim.x) {
      const int t = d - u;
      if (!is_inside(t, u)) continue;
      const long long node = node_at(t, u);
      double score[ARCS];
      Scaled probability[ARCS];
      load_scores(t, u, score);
      to_probabilities(t, score, probability);
      const Scaled value = sum(ring, t, u, slot, probability);
      ring[slot * states + u] = value;
      write(t, u, node, value);
    }
  }
};

}  // namespace

// Block (sample, direction): α and the log-likelihood in direction 0, β in direction 1. Without
// `alpha`, α is not kept. `numbers` may not be called restrict: they would stay in registers that
// there are too few of.
extern "C" __global__ void __launch_bounds__(THREADS)
    forward_backward(const double* __restrict__ scores, const double* numbers,
                     const long long* __restrict__ first_frame, const long long* __restrict__ frames,
                     const long long* __restrict__ states, const long long* __restrict__ frame_node,
                     const long long* __restrict__ low, const long long* __restrict__ high,
                     double* __restrict__ alpha, double* __restrict__ beta,
                     double* __restrict__ log_likelihood, double* scratch, long long scratch_pitch) {
  const bool forward = blockIdx.y == 0;
  const int frame = static_cast<int>(first_frame[blockIdx.x]);
  const long long first = restricted ? 0 : frame_node[frame];  // of the nodes that `node_at` numbers
  double* const result = forward ? alpha : beta;
  const Recursion recursion = {forward ? 1 : -1,
                               static_cast<int>(frames[blockIdx.x]),
                               static_cast<int>(states[blockIdx.x]),
                               frame,
                               frame_node,
                               low,
                               high,
                               scores + first * SYMBOLS,
                               numbers,
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

// A thread a node. Next symbols of an arc belong to the node after the one that it leaves.
extern "C" __global__ void __launch_bounds__(256)
    occupancies(const double* __restrict__ scores, const double* __restrict__ numbers,
                const double* __restrict__ alpha, const double* __restrict__ beta,
                const double* __restrict__ log_likelihood, const int* __restrict__ frame,
                const long long* __restrict__ frame_sample, const long long* __restrict__ frame_index,
                const long long* __restrict__ frames, const long long* __restrict__ states,
                const long long* __restrict__ frame_node, const long long* __restrict__ low,
                const long long* __restrict__ high, double* __restrict__ occupancy, long long node_count) {
  const long long node = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (node >= node_count) return;
  const long long row = frame[node], sample = frame_sample[row];
  const long long height = frames[sample], width = states[sample];
  const long long t = frame_index[row], u = node - frame_node[row];
  const double position = 0.5 * static_cast<double>(height - 1) - static_cast<double>(t);

  // scale · posterior that the path takes arc `a` from (t, u − back).
  const auto occupancy_of = [&](int a, int back) {
    const long long from_node = node - back;
    const long long to_t = t + arc_frames[a], to_u = u - back + arc_labels[a];
    const bool is_last = to_t == height && to_u == width - 1;
    const long long to_row = row + arc_frames[a];
    if (!(is_last ? arc_ends[a] : to_t < height && low[to_row] <= to_u && to_u < high[to_row])) return 0.0;
    if (arc_next_symbols[a] && u - back + 1 >= high[row]) return 0.0;
    const Scaled from = unpack(alpha[from_node]);
    const Scaled to = is_last ? one() : unpack(beta[frame_node[to_row] + to_u]);
    const double score =
        sum_of_symbols(scores + from_node * SYMBOLS, a) + sum_of_numbers(numbers, a, position);
    const double rest = score - log_likelihood[sample];
    const double posterior =
        from.mantissa * to.mantissa * exp(fma(from.exponent + to.exponent, ln2, rest));
    return numbers[3 * a + 2] * posterior;
  };
  double value[SYMBOLS] = {};
#pragma unroll
  for (int a = 0; a < ARCS; ++a) {
    const double mine = occupancy_of(a, 0);
    const double before = arc_next_symbols[a] && u > low[row] ? occupancy_of(a, 1) : 0.0;
#pragma unroll
    for (int s = 0; s < SYMBOLS; ++s) {
      if (arc_symbols[a] >> s & 1) value[s] += mine;
      if (arc_next_symbols[a] >> s & 1) value[s] += before;
    }
  }
#pragma unroll
  for (int s = 0; s < SYMBOLS; ++s) occupancy[node * SYMBOLS + s] = value[s];
}
