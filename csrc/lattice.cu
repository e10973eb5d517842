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
// A block takes one direction of one sample, so α and β run side by side. β is α of the lattice walked
// from its end: both count rows and states from where they start, so row k is frame k of α, T − k of β. A
// lane takes a state, a row a step, and is a row behind the lane before it. What it needs of the state
// before comes by a shuffle, what it needs of its own is in its registers, so no step waits for memory.
// While it computes a row, the scores of the next turn into probabilities, and those after are being read.
//
// A warp passes its last lane's values on through a column of memory. It waits for the one before it, at a
// barrier, only once in TURN steps: it is `lag` turns behind, since a last lane is 32 rows behind a first.
// Where states are more than threads, warps begin again, and columns have room for all rows. Behind them
// each thread keeps rows that arcs of more than one frame lead back to. All this is shared memory where it
// fits, else `scratch`; so neither T nor U has a limit. backends/lattice_walk.py counts turns and bytes.
//
// Nodes are stored (sample, t, u), as the score pass left them. An arc from or to a (t, u) that is no node
// does not exist, nor does one whose next symbols have no node. Such a (t, u) is computed like a node
// without arcs, and so are rows before the first and after the last: a lane has a number at every step.
//
//   macros of arcs.cuh
//   TURN                     steps between two barriers
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

static_assert(warp_lanes % TURN == 0, "the first and the last lane are whole turns apart");
constexpr int turns_of_warp = warp_lanes / TURN;
constexpr int lag = turns_of_warp + 1;

// The most frames of arcs with so many labels, or none if that is one.
__device__ constexpr int longest(int labels) {
  int frames = 0;
  for (int a = 0; a < ARCS; ++a) {
    if (arc_labels[a] == labels && arc_frames[a] > frames) frames = arc_frames[a];
  }
  return frames > 1 ? frames : 0;
}
// Rows that a thread keeps of its own state, and of the state before.
__device__ constexpr int history[2] = {longest(0), longest(1)};

// As far as registers go: whether the arcs' numbers stand in them, how many rows ahead scores turn into
// probabilities, and for how many rows scores are being read at once.
constexpr bool keeps_numbers = ARCS <= 9;
constexpr int probable_rows = ARCS <= 9 ? 1 : 0;
constexpr int read_rows = ARCS <= 7 && !restricted ? 2 : 1;

// What its numbers contribute, `position` = (T − 1)/2 − t.
__device__ __forceinline__ double sum_of_numbers(const double* numbers, int a, double position) {
  return fma(numbers[3 * a + 1], position, numbers[3 * a]);
}

// Of the symbols of each arc of a (t, u). They are added up when they are needed: a sum would wait for them.
struct ArcScores {
  double of_arc[ARCS][2 * SYMBOLS];  // of an arc without symbols, the first is its score

  __device__ double sum(int a) const {
    return has_symbols(a) ? sum_of_symbols(of_arc[a], a) : of_arc[a][0];
  }
};

// One direction of one sample: its arcs lead from (t, u) back to (t − frames, u − labels) of α, or
// ahead to (t + frames, u + labels) of β.
struct Recursion {
  int sign;  // 1 for α, −1 for β
  int frames, states, first_frame;
  const long long *frame_node, *low, *high;  // of all packed frames
  // Of all nodes where restricted, else of the sample's.
  const double* scores;  // [.., SYMBOLS]
  double* result;        // packed, or null
  const double* numbers;
  Scaled* likelihood;

  __device__ bool is_forward() const { return sign > 0; }
  // 1 where (t, u) is its arcs' end, 0 where it is their start. Without a branch, for which the
  // compiler would write all that follows twice.
  __device__ int back() const { return (1 + sign) >> 1; }
  // Packed row of frame t, or of the frame nearest to it: loads need not wait for whether there is one.
  __device__ int frame(int t) const { return first_frame + min(max(t, 0), frames - 1); }
  // Whether (t, u), of which t is a frame or T, is a node or the end.
  __device__ bool is_in_range(int t, int u) const {
    return (t == frames) | ((low[frame(t)] <= u) & (u < high[frame(t)]));
  }
  // Number of a node among all.
  __device__ long long node_at(int t, int u) const { return frame_node[frame(t)] + u; }
};

// A lane's way through the rows of a state. Values in registers are not normalized, which every step would
// wait for: mantissas grow by less than 2·ARCS a step, and are normalized every turn.
struct Lane {
  const Recursion& recursion;
  const int lane;
  Scaled* const kept;  // its history, beside other threads'
  double numbers[3 * ARCS];

  int row, t, u;
  double position;           // (T − 1)/2 − t
  double* result;            // of (t, u), unless restricted
  const double* from[ARCS];  // of each arc, the scores that are to be read next, unless restricted
  bool is_first_state;
  // Rows with arcs of so many labels, less the arc's frames at the first: of arcs that may end the path, and
  // the last of others.
  int first_ending[2], last_ending[2], last_inner[2];
  int last_wanted;  // of rows whose values are kept
  int end_row;      // T if α(T, U) is its last value
  int slot[2];      // of the row, in the history

  Scaled own;        // value of its state on the row before
  Scaled before[2];  // of the state before, on this row and on the row before
  Scaled beyond;     // of the state before the first lane's, on the row that comes next
  ArcScores read[read_rows];
  Scaled probability[ARCS];  // of the row's arcs

  __device__ Lane(const Recursion& recursion, Scaled* memory)
      : recursion(recursion), lane(threadIdx.x % warp_lanes), kept(memory + threadIdx.x) {
#pragma unroll
    for (int i = 0; i < 3 * ARCS; ++i) numbers[i] = recursion.numbers[i];
  }

  // Goes to the row before the first, or as much earlier as other lanes are ahead.
  __device__ void start(int state) {
    constexpr int none = -2 * warp_lanes;  // less than any row
    const int frames = recursion.frames, states = recursion.states;
    const int sign = recursion.sign, back = recursion.back();
    row = -1 - lane;
    t = back ? row : frames - row;
    u = back ? state : states - 1 - state;
    position = 0.5 * (frames - 1) - t;
    const long long node = static_cast<long long>(t) * states + u;
    result = recursion.result + node;
    is_first_state = state == 0;
#pragma unroll
    for (int labels = 0; labels < 2; ++labels) {
      const bool has_arcs = labels <= state && state < states;
      first_ending[labels] = back || state == labels ? 0 : 1;
      last_ending[labels] = !has_arcs ? none : back && state < states - 1 ? frames - 1 : frames;
      last_inner[labels] = !has_arcs ? none : frames - back;
    }
    last_wanted = recursion.result ? last_inner[0] : none;
    end_row = back && state == states - 1 ? frames : none;
    slot[0] = slot[1] = 0;
    own = before[0] = before[1] = beyond = zero();
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      probability[a] = zero();
      const long long rows_aside = probable_rows * sign - back * arc_frames[a];
      from[a] = recursion.scores + (node + rows_aside * states - back * arc_labels[a]) * SYMBOLS;
    }
#pragma unroll
    for (int i = 0; i < read_rows; ++i) load(probable_rows + i, read[i]);
  }

  // Whether the row that comes so many steps later has arc `a`, ranges aside. α's last row and β's first
  // are T, which is no frame: only the end is there, and arcs that may end the path meet it.
  __device__ bool has_arc(int a, int steps) const {
    const int labels = arc_labels[a], later = row + steps;
    const bool ends = arc_ends[a] && arc_frames[a] > 0;
    const int first = ends ? first_ending[labels] : 1 - recursion.back();
    const int last = ends ? last_ending[labels] : last_inner[labels];
    return (later - first >= arc_frames[a]) & (later <= last);
  }

  // Starts to read the scores of that row's arcs, −∞ where there is none.
  __device__ void load(int steps, ArcScores& loaded) {
    const int sign = recursion.sign, back = recursion.back();
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      bool exists = has_arc(a, steps);
      const double* scores = from[a];
      from[a] += sign * recursion.states * SYMBOLS;
      if (restricted) {
        const int later_t = t + steps * sign, from_t = later_t - back * arc_frames[a];
        const int from_u = u - back * arc_labels[a];
        // The ends are (t, u), for all arcs, and where `other` is.
        exists &= recursion.is_in_range(later_t, u);
        exists &= recursion.is_in_range(later_t - sign * arc_frames[a], u - sign * arc_labels[a]);
        if (arc_next_symbols[a]) exists &= recursion.is_in_range(from_t, from_u + 1);
        scores = recursion.scores + recursion.node_at(from_t, from_u) * SYMBOLS;
      }
#pragma unroll
      for (int s = 0; s < 2 * SYMBOLS; ++s) {
        if (is_scored_by(a, s)) loaded.of_arc[a][s] = exists ? scores[s] : minus_infinity();
      }
      if (!has_symbols(a)) loaded.of_arc[a][0] = exists ? 0.0 : minus_infinity();
    }
  }

  // Of arcs `probable_rows` later.
  __device__ void to_probabilities(const ArcScores& loaded, Scaled (&next)[ARCS]) const {
    const double* const all_numbers = keeps_numbers ? numbers : recursion.numbers;
    const double of_row = position - probable_rows * recursion.sign;
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      double of_start = of_row;
      if (arc_frames[a] > 0) of_start += recursion.back() ? static_cast<double>(arc_frames[a]) : 0.0;
      next[a] = exponential(loaded.sum(a) + sum_of_numbers(all_numbers, a, of_start));
    }
  }

  __device__ Scaled& kept_at(int labels, int i) const {
    return kept[(labels * history[0] + i) * static_cast<int>(blockDim.x)];
  }

  // Value at the other end of arc `a`.
  __device__ Scaled other(int a) const {
    const int labels = arc_labels[a];
    if (arc_frames[a] <= 1) return labels ? before[arc_frames[a]] : own;
    if (row < arc_frames[a]) return zero();
    const int i = slot[labels] - arc_frames[a];
    return kept_at(labels, i < 0 ? i + history[labels] : i);
  }

  // Keeps the row's value for the arcs of later rows, and where it is wanted.
  __device__ void keep(const Scaled& value) {
    if ((row + recursion.back() > 0) & (row <= last_wanted)) {
      if (!restricted) {
        *result = pack(value);
      } else if (recursion.is_in_range(t, u)) {
        recursion.result[recursion.node_at(t, u)] = pack(value);
      }
    }
    if (row == end_row) *recursion.likelihood = value;
#pragma unroll
    for (int labels = 0; labels < 2; ++labels) {
      if (history[labels] == 0) continue;
      kept_at(labels, slot[labels]) = labels ? normalized(before[0]) : value;
      slot[labels] = slot[labels] + 1 == history[labels] ? 0 : slot[labels] + 1;
    }
  }

  // Computes a row and returns its value, normalized. `next` has the scores that turn into
  // probabilities, and makes room for those of a later row.
  __device__ Scaled step(ArcScores& next) {
    before[1] = before[0];
    before[0] = {__shfl_up_sync(all_lanes, own.mantissa, 1), __shfl_up_sync(all_lanes, own.exponent, 1)};
    if (lane == 0) before[0] = beyond;
    Scaled next_probability[ARCS], others[ARCS];
    to_probabilities(next, next_probability);
    load(probable_rows + read_rows, next);

#pragma unroll
    for (int a = 0; a < ARCS; ++a) others[a] = other(a);
    own = sum_of_products(others, probable_rows ? probability : next_probability);
    if (is_first_state && row == 0) own = one();
    const Scaled value = normalized(own);
    keep(value);

#pragma unroll
    for (int a = 0; a < ARCS; ++a) probability[a] = next_probability[a];
    ++row;
    t += recursion.sign;
    position -= recursion.sign;
    result += recursion.sign * recursion.states;
    return value;
  }

  __device__ void normalize() {
    own = normalized(own);
    before[0] = normalized(before[0]);
    before[1] = normalized(before[1]);
  }
};

// Walks all states of a sample. `memory` has the columns of the warps and the histories of the threads.
__device__ __forceinline__ void walk(const Recursion& recursion, Scaled* memory) {
  const int warps = blockDim.x / warp_lanes;
  // From one lane, so that the compiler knows that it is the same for all of a warp.
  const int warp = __shfl_sync(all_lanes, static_cast<int>(threadIdx.x) / warp_lanes, 0);
  const int groups = (recursion.states + warp_lanes - 1) / warp_lanes;  // of 32 states
  // Of a group: its first lane begins a row early, and its last, 32 rows later, ends with row T.
  const int turns = (recursion.frames + 1 + warp_lanes + TURN - 1) / TURN;
  const int period = max(turns, warps * lag);  // from a warp's group to its next one
  const int last_start = (groups - 1) / warps * period + (groups - 1) % warps * lag;

  // A turn of a column is read while the next is written, or much later by a warp that begins again.
  const bool begins_again = groups > warps;
  const int kept_turns = begins_again ? turns + turns_of_warp : 2;
  const int kept_turn = begins_again ? ~0 : 1;
  Scaled* const column = memory + warp * kept_turns * TURN;
  const Scaled* const column_before = memory + (warp + warps - 1) % warps * kept_turns * TURN;

  Lane lane(recursion, memory + warps * kept_turns * TURN);
  const bool is_last = lane.lane == warp_lanes - 1;
  Scaled beyond[read_rows];
#pragma unroll
  for (int i = 0; i < read_rows; ++i) beyond[i] = zero();
  int group = warp, turn = -lag * warp;
  for (int all_turns = 0; all_turns < last_start + turns; ++all_turns) {
    if (0 <= turn && turn < turns && group < groups) {
      if (turn == 0) lane.start(group * warp_lanes + lane.lane);
      lane.normalize();
      const bool is_fed = lane.lane == 0 && group > 0;
      const Scaled* in = column_before + ((turn + turns_of_warp) & kept_turn) * TURN;
      Scaled* out = column + (turn & kept_turn) * TURN;
      for (int step = 0; step < TURN; step += read_rows) {
        // Before anything else is read, which would be waited for together with these.
#pragma unroll
        for (int i = 0; i < read_rows; ++i) {
          if (is_fed) beyond[i] = in[i];
        }
#pragma unroll
        for (int i = 0; i < read_rows; ++i) {
          const Scaled value = lane.step(lane.read[i]);
          lane.beyond = beyond[i];
          if (is_last) out[i] = value;
        }
        in += read_rows;
        out += read_rows;
      }
    }
    if (++turn == period) {
      turn = 0;
      group += warps;
    }
    __syncthreads();
  }
}

}  // namespace

// Block (sample, direction): α and the log-likelihood in direction 0, β in direction 1. Without
// `alpha`, α is not kept. `numbers` may not be called restrict: those of many arcs would stay in registers
// that there are too few of.
extern "C" __global__ void __launch_bounds__(THREADS)
    forward_backward(const double* __restrict__ scores, const double* numbers,
                     const long long* __restrict__ first_frame, const long long* __restrict__ frames,
                     const long long* __restrict__ states, const long long* __restrict__ frame_node,
                     const long long* __restrict__ low, const long long* __restrict__ high,
                     double* __restrict__ alpha, double* __restrict__ beta,
                     double* __restrict__ log_likelihood, double* scratch, long long scratch_pitch) {
  const bool forward = blockIdx.y == 0;
  const long long block = blockIdx.x * static_cast<long long>(gridDim.y) + blockIdx.y;
  Scaled* const memory =
      scratch ? reinterpret_cast<Scaled*>(scratch + block * scratch_pitch) : dynamic_shared<Scaled>();
  const int frame = static_cast<int>(first_frame[blockIdx.x]);
  const long long first = restricted ? 0 : frame_node[frame];
  double* const result = forward ? alpha : beta;
  const Recursion recursion = {forward ? 1 : -1,
                               static_cast<int>(frames[blockIdx.x]),
                               static_cast<int>(states[blockIdx.x]),
                               frame,
                               frame_node,
                               low,
                               high,
                               scores + first * SYMBOLS,
                               result ? result + first : nullptr,
                               numbers,
                               memory};
  walk(recursion, memory + 1);
  if (forward && threadIdx.x == 0) log_likelihood[blockIdx.x] = logarithm(*memory);
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
