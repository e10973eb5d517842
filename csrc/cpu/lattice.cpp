// Forward-backward over whole samples in float64, for any arcs that move forward:
//
//     α(n) = Σ_{arcs m → n} α(m)·p          α(0, 0) = 1          p = exp(score of the arc)
//     β(n) = Σ_{arcs n → m} p·β(m)          β(T, U) = 1
//     log-likelihood = log α(T, U)
//     occupancy(arc n → m) = α(n)·p·β(m) / α(T, U)
//
// An arc's score is the sum of its symbols' at its node (t, u) and of its next symbols' at (t, u + 1), plus
// offset + delay·((T − 1)/2 − t). A symbol's occupancy is that of all arcs that it scores, each times its
// scale.
//
// Products of thousands of probabilities leave a double's range, so α and β carry their exponent
// (scaled.h): as exact as recursions over logarithms, without one logarithm a node.
//
// A task takes one direction of one sample. It walks the anti-diagonals d = t + u, whose nodes do not
// depend on each other, a vector of them at a time; diagonals that later ones still need stand in a
// ring. Nodes are stored (sample, t, u), as the score pass left them.
//
//   SYMBOLS, ARCS                   symbols of a node, and arcs that leave it
//   ARC_FRAMES, ARC_LABELS          frames that each reads and labels that it emits
//   ARC_SYMBOLS, ARC_NEXT_SYMBOLS   bits of the symbols that score it
//   ARC_ENDS                        whether it may lead to (T, U)
//   RING                            1 + the largest frames + labels of an arc
//   numbers                      offset, delay and scale of each arc. [ARCS, 3]
//   first_node, frames, states   first node, T and U + 1 of each sample. [S]
//   alpha, beta                  packed. [N]

#include <algorithm>
#include <vector>

#include "scaled.h"
#include "threads.h"

namespace {

constexpr long long arc_frames[ARCS] = {ARC_FRAMES};
constexpr long long arc_labels[ARCS] = {ARC_LABELS};
constexpr unsigned arc_symbols[ARCS] = {ARC_SYMBOLS};
constexpr unsigned arc_next_symbols[ARCS] = {ARC_NEXT_SYMBOLS};
constexpr bool arc_ends[ARCS] = {ARC_ENDS};
constexpr long long width = lanes<double>;

// Scores of one sample's arcs.
struct ArcScores {
  const double* symbols;  // [frames, states, SYMBOLS]
  const double* numbers;  // [ARCS, 3]
  long long frames, states;

  // What the symbols contribute to an arc of a node, which must exist.
  double of_symbols(int a, long long node) const {
    const double* const here = symbols + node * SYMBOLS;
    double score = 0.0;
    for (int s = 0; s < SYMBOLS; ++s) {
      if (arc_symbols[a] >> s & 1) score += here[s];
      if (arc_next_symbols[a] >> s & 1) score += here[SYMBOLS + s];
    }
    return score;
  }
  // What its numbers contribute on frame t.
  double of_numbers(int a, long long t) const {
    const double until_middle = 0.5 * static_cast<double>(frames - 1) - static_cast<double>(t);
    return numbers[3 * a] + numbers[3 * a + 1] * until_middle;
  }
  // Whether an arc of the node (t, u) leads to a node, or to the end.
  bool exists(int a, long long t, long long u) const {
    const long long to_t = t + arc_frames[a], to_u = u + arc_labels[a];
    return to_u < states && (to_t < frames || (arc_ends[a] && to_t == frames && to_u == states - 1));
  }
};

// One direction of one sample: its arcs lead from (t, u) back to (t − frames, u − labels) of α, or
// ahead to (t + frames, u + labels) of β.
class Recursion {
 public:
  Recursion(bool is_forward, const ArcScores& scores)
      : is_forward_(is_forward),
        frames_(scores.frames),
        states_(scores.states),
        scores_(scores),
        // Vectors reach beyond a diagonal's ends, and an arc's other end lies up to all its labels aside.
        margin_(*std::max_element(arc_labels, arc_labels + ARCS) + width),
        pitch_(states_ + 2 * margin_),
        mantissas_(RING * pitch_, 1.0),
        exponents_(RING * pitch_, -infinity),
        probabilities_(ARCS * (states_ + width)) {}

  // Fills `result` [frames, states] with packed α or β, if it is not null; returns log α(T, U) or
  // log β(0, 0), which are the same.
  double run(double* result) {
    const long long last = frames_ + states_ - 1;  // the diagonal of (T, U)
    set(is_forward_ ? 0 : last, is_forward_ ? 0 : states_ - 1);
    for (long long step = is_forward_ ? 0 : 1; step < last + (is_forward_ ? 0 : 1); ++step) {
      const long long d = is_forward_ ? step : last - step;
      const long long first_u = std::max(0ll, d - frames_ + 1), last_u = std::min(states_ - 1, d);
      // α(0, 0) is set.
      if (!(is_forward_ && d == 0)) compute(d, first_u, last_u);
      if (result) write(d, first_u, last_u, result);
    }
    if (!is_forward_) return log_of(0, 0);
    compute(last, states_ - 1, states_ - 1);
    return log_of(last, states_ - 1);
  }

 private:
  double* row(std::vector<double>& ring, long long d) { return ring.data() + (d % RING) * pitch_ + margin_; }

  // Makes (d − u, u) one, and all else of its diagonal zero.
  void set(long long d, long long u) { row(exponents_, d)[u] = 0.0; }

  double log_of(long long d, long long u) {
    return logarithm(Scaled{broadcast(row(mantissas_, d)[u]), broadcast(row(exponents_, d)[u])})[0];
  }

  // Probability of each arc of the nodes of a diagonal, zero where there is none.
  void load_probabilities(long long d, long long first_u, long long last_u) {
    for (int a = 0; a < ARCS; ++a) {
      const long long f = arc_frames[a], l = arc_labels[a];
      double* const score = probabilities_.data() + a * (states_ + width);
      // The states whose arc has another end: a node, or (T, U).
      long long first, last;
      if (is_forward_) {
        first = std::max(l, d - f - frames_ + 1);
        last = d - f;
        if (d == frames_ + states_ - 1 && !arc_ends[a]) last = -1;
      } else {
        first = d + f - frames_ + (arc_ends[a] && d + f - frames_ == states_ - 1 - l ? 0 : 1);
        last = states_ - 1 - l;
      }
      first = std::max(first, first_u);
      last = std::min(last, last_u);
      std::fill(score + first_u, score + last_u + width, -infinity);
      // The arc of (d − u, u), or the one that comes there, starts on frame top − u.
      const long long top = is_forward_ ? d - f : d, back = is_forward_ ? l : 0;
      const double of_top = scores_.of_numbers(a, top), of_step = scores_.of_numbers(a, top - 1) - of_top;
      for (long long u = first; u <= last; ++u) {
        const double of_symbols = scores_.of_symbols(a, (top - u) * states_ + u - back);
        score[u] = of_symbols + (of_top + static_cast<double>(u) * of_step);
      }
    }
  }

  void compute(long long d, long long first_u, long long last_u) {
    load_probabilities(d, first_u, last_u);
    double* const mantissa = row(mantissas_, d);
    double* const exponent = row(exponents_, d);
    for (long long u = first_u; u <= last_u; u += width) {
      Scaled others[ARCS], arcs[ARCS];
      for (int a = 0; a < ARCS; ++a) {
        const long long moved = arc_frames[a] + arc_labels[a];
        const long long other_d = is_forward_ ? d - moved + RING : d + moved;
        const long long other_u = is_forward_ ? u - arc_labels[a] : u + arc_labels[a];
        others[a] = {load(row(mantissas_, other_d) + other_u), load(row(exponents_, other_d) + other_u)};
        arcs[a] = scaled_exponential(load(probabilities_.data() + a * (states_ + width) + u));
      }
      const Scaled sum = sum_of_products(others, arcs);
      store(mantissa + u, sum.mantissa);
      store(exponent + u, sum.exponent);
    }
  }

  void write(long long d, long long first_u, long long last_u, double* result) {
    const double* const mantissa = row(mantissas_, d);
    const double* const exponent = row(exponents_, d);
    for (long long u = first_u; u <= last_u; u += width) {
      double block[width];
      store(block, pack({load(mantissa + u), load(exponent + u)}));
      const long long count = std::min(width, last_u - u + 1);
      for (long long i = 0; i < count; ++i) result[(d - u - i) * states_ + u + i] = block[i];
    }
  }

  bool is_forward_;
  long long frames_, states_;
  const ArcScores& scores_;
  long long margin_, pitch_;
  std::vector<double> mantissas_, exponents_;  // [RING, pitch]
  std::vector<double> probabilities_;          // scores at first. [ARCS, states + width]
};

}  // namespace

extern "C" void forward_backward(long long threads, const double* scores, const double* numbers,
                                 const std::int64_t* first_node, const std::int64_t* frames,
                                 const std::int64_t* states, double* alpha, double* beta,
                                 double* log_likelihood, long long samples) {
  const long long directions = beta ? 2 : 1;
  for_each_task(threads, samples * directions, [=](long long task) {
    const long long s = task / directions;
    const bool is_forward = task % directions == 0;
    double* const result = is_forward ? alpha : beta;
    const ArcScores arcs = {scores + first_node[s] * SYMBOLS, numbers, frames[s], states[s]};
    Recursion recursion(is_forward, arcs);
    const double log_total = recursion.run(result ? result + first_node[s] : nullptr);
    if (is_forward) log_likelihood[s] = log_total;
  });
}

// A task takes some frames.
extern "C" void occupancies(long long threads, const double* scores, const double* numbers,
                            const double* alpha, const double* beta, const double* log_likelihood,
                            const std::int64_t* frame_sample, const std::int64_t* frame_index,
                            const std::int64_t* first_node, const std::int64_t* frames,
                            const std::int64_t* states, double* occupancy, long long all_frames) {
  for_each_range(threads, all_frames, 16, [=](long long begin, long long end) {
    for (long long f = begin; f < end; ++f) {
      const std::int64_t s = frame_sample[f], t = frame_index[f], last_u = states[s] - 1;
      const long long node = first_node[s] + t * states[s];
      const ArcScores arcs = {scores, numbers, frames[s], states[s]};
      std::fill(occupancy + node * SYMBOLS, occupancy + (node + states[s]) * SYMBOLS, 0.0);
      for (int a = 0; a < ARCS; ++a) {
        const long long to = node + arc_frames[a] * states[s] + arc_labels[a];
        const bool is_to_node = t + arc_frames[a] < frames[s];
        const double of_numbers = arcs.of_numbers(a, t);
        for (long long u = 0; u <= last_u; u += width) {
          const long long count = std::min<long long>(width, last_u - u + 1);
          double score[width], ends[width] = {};  // β(T, U) = 1, packed
          for (long long i = 0; i < width; ++i) {
            const bool exists = i < count && arcs.exists(a, t, u + i);
            score[i] = exists ? arcs.of_symbols(a, node + u + i) + of_numbers : -infinity;
            if (exists && is_to_node) ends[i] = beta[to + u + i];
          }
          const Scaled from = unpack(load_first(alpha + node + u, count)), into = unpack(load(ends));
          const Scaled p = scaled_exponential(load(score) - log_likelihood[s]);
          double block[width];
          store(block, numbers[3 * a + 2] * from.mantissa * into.mantissa * p.mantissa *
                           power_of_two(from.exponent + into.exponent + p.exponent));
          for (long long i = 0; i < count; ++i) {
            double* const here = occupancy + (node + u + i) * SYMBOLS;
            for (int symbol = 0; symbol < SYMBOLS; ++symbol) {
              if (arc_symbols[a] >> symbol & 1) here[symbol] += block[i];
              if (arc_next_symbols[a] >> symbol & 1 && u + i < last_u) here[SYMBOLS + symbol] += block[i];
            }
          }
        }
      }
    }
  });
}
