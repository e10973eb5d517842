// Forward-backward over whole samples in float64, for any arcs that move forward:
//
//     α(n) = Σ_{arcs m → n} α(m)·p          α(0, 0) = 1          p = exp(score of the arc)
//     β(n) = Σ_{arcs n → m} p·β(m)          β(T, U) = 1
//     log-likelihood = log α(T, U)
//     occupancy(arc n → m) = α(n)·p·β(m) / α(T, U)
//
// Arcs and their scores are those of arcs.h. A symbol's occupancy is that of all arcs that it scores, each
// times its scale.
//
// Products of thousands of probabilities leave a double's range, so α and β carry their exponent
// (scaled.h): as exact as recursions over logarithms, without one logarithm a node.
//
// A task takes one direction of one sample. It walks the anti-diagonals d = t + u, whose nodes do not
// depend on each other, a vector of them at a time; diagonals that later ones still need stand in a
// ring.
//
//   numbers                      offset, delay and scale of each arc. [ARCS, 3]
//   first_frame, frames, states  first packed frame, T and U + 1 of each sample. [S]
//   frame_node, low, high        of each packed frame: node (t, u) is number frame_node + u, low ≤ u < high. [F]
//   alpha, beta                  packed. [N]

#include <algorithm>
#include <vector>

#include "arcs.h"
#include "scaled.h"
#include "threads.h"

namespace {

constexpr long long width = lanes<double>;

// Diagonals that an arc leads back or ahead, at most, and the one that is computed.
constexpr long long diagonals_at_once() {
  long long moved = 0;
  for (int a = 0; a < ARCS; ++a) moved = std::max<long long>(moved, arc_frames[a] + arc_labels[a]);
  return moved + 1;
}
constexpr long long ring_rows = diagonals_at_once();

// One direction of one sample: its arcs lead from (t, u) back to (t − frames, u − labels) of α, or
// ahead to (t + frames, u + labels) of β.
class Recursion {
 public:
  Recursion(bool is_forward, const Arcs& arcs)
      : is_forward_(is_forward),
        frames_(arcs.frames),
        states_(arcs.states),
        arcs_(arcs),
        // Vectors reach beyond a diagonal's ends, and an arc's other end lies up to all its labels aside.
        margin_(*std::max_element(arc_labels, arc_labels + ARCS) + width),
        pitch_(states_ + 2 * margin_),
        mantissas_(ring_rows * pitch_, 1.0),
        exponents_(ring_rows * pitch_, -infinity),
        probabilities_(ARCS * (states_ + width)) {
    if (!restricted) return;
    first_u_.assign(frames_ + states_, states_);
    last_u_.assign(frames_ + states_, -1);
    for (long long t = 0; t < frames_; ++t) {
      for (long long u = arcs_.low[t]; u < arcs_.high[t]; ++u) {
        first_u_[t + u] = std::min(first_u_[t + u], u);
        last_u_[t + u] = std::max(last_u_[t + u], u);
      }
    }
  }

  // Fills `result` [N] with packed α or β, if it is not null; returns log α(T, U) or log β(0, 0), which
  // are the same.
  double run(double* result) {
    const long long last = frames_ + states_ - 1;  // the diagonal of (T, U)
    set(is_forward_ ? 0 : last, is_forward_ ? 0 : states_ - 1);
    for (long long step = is_forward_ ? 0 : 1; step < last + (is_forward_ ? 0 : 1); ++step) {
      const long long d = is_forward_ ? step : last - step;
      const long long first_u = restricted ? first_u_[d] : std::max(0ll, d - frames_ + 1);
      const long long last_u = restricted ? last_u_[d] : std::min(states_ - 1, d);
      if (first_u > last_u) continue;
      // α(0, 0) is set.
      if (!(is_forward_ && d == 0)) compute(d, first_u, last_u);
      if (result) write(d, first_u, last_u, result);
    }
    if (!is_forward_) return log_of(0, 0);
    compute(last, states_ - 1, states_ - 1);
    return log_of(last, states_ - 1);
  }

 private:
  double* row(std::vector<double>& ring, long long d) { return ring.data() + (d % ring_rows) * pitch_ + margin_; }

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
      const double of_top = arcs_.of_numbers(a, top), of_step = arcs_.of_numbers(a, top - 1) - of_top;
      for (long long u = first; u <= last; ++u) {
        const long long from_t = top - u, from_u = u - back;
        if (restricted && !(arcs_.has(from_t, from_u) && arcs_.exists(a, from_t, from_u))) continue;
        const double of_symbols = arcs_.of_symbols(a, arcs_.node(from_t, from_u));
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
        const long long other_d = is_forward_ ? d - moved + ring_rows : d + moved;
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
      for (long long i = 0; i < count; ++i) {
        if (arcs_.has(d - u - i, u + i)) result[arcs_.node(d - u - i, u + i)] = block[i];
      }
    }
  }

  bool is_forward_;
  long long frames_, states_;
  const Arcs& arcs_;
  long long margin_, pitch_;
  std::vector<double> mantissas_, exponents_;  // [ring_rows, pitch]
  std::vector<double> probabilities_;          // scores at first. [ARCS, states + width]
  std::vector<long long> first_u_, last_u_;    // between which a diagonal's nodes are. [frames + states]
};

}  // namespace

extern "C" void forward_backward(long long threads, const double* scores, const double* numbers,
                                 const std::int64_t* first_frame, const std::int64_t* frames,
                                 const std::int64_t* states, const std::int64_t* frame_node,
                                 const std::int64_t* low, const std::int64_t* high, double* alpha,
                                 double* beta, double* log_likelihood, long long sample_count) {
  const long long directions = beta ? 2 : 1;
  for_each_task(threads, sample_count * directions, [=](long long task) {
    const long long s = task / directions;
    const bool is_forward = task % directions == 0;
    const std::int64_t f = first_frame[s];
    const Arcs arcs = {scores, numbers, frame_node + f, low + f, high + f, frames[s], states[s]};
    const double log_total = Recursion(is_forward, arcs).run(is_forward ? alpha : beta);
    if (is_forward) log_likelihood[s] = log_total;
  });
}

// A task takes some frames.
extern "C" void occupancies(long long threads, const double* scores, const double* numbers,
                            const double* alpha, const double* beta, const double* log_likelihood,
                            const std::int64_t* frame_sample, const std::int64_t* frame_index,
                            const std::int64_t* frames, const std::int64_t* states,
                            const std::int64_t* frame_node, const std::int64_t* low,
                            const std::int64_t* high, double* occupancy, long long frame_count) {
  for_each_range(threads, frame_count, 16, [=](long long begin, long long end) {
    for (long long f = begin; f < end; ++f) {
      const std::int64_t s = frame_sample[f], t = frame_index[f], first = f - t;
      const Arcs arcs = {scores, numbers, frame_node + first, low + first, high + first, frames[s], states[s]};
      const long long node = frame_node[f];
      std::fill(occupancy + (node + low[f]) * SYMBOLS, occupancy + (node + high[f]) * SYMBOLS, 0.0);
      for (int a = 0; a < ARCS; ++a) {
        const bool is_to_node = t + arc_frames[a] < frames[s];
        const long long to = is_to_node ? frame_node[f + arc_frames[a]] + arc_labels[a] : 0;
        const double of_numbers = arcs.of_numbers(a, t);
        for (long long u = low[f]; u < high[f]; u += width) {
          const long long count = std::min<long long>(width, high[f] - u);
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
              if (arc_next_symbols[a] >> symbol & 1 && u + i + 1 < high[f]) here[SYMBOLS + symbol] += block[i];
            }
          }
        }
      }
    }
  });
}
