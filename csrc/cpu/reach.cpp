// Which nodes to score: those that paths reach with a probability that matters.
//
// What leaves a node has probability 1 at most, and so has what follows it. Paths through a node that is not
// scored are lost; α, where it leaves the scored nodes, bounds their probability:
//
//     P' ≤ P ≤ P' + D      P' of the paths through scored nodes alone, D = Σ of the α that leave them
//
// A path's logit gradient has an L1 norm of 2·A at most, where its arcs have A symbols, each counted as often
// as its arc's scale says. With G, the norm of the gradient of the scored nodes, it changes by a share of
// `tolerance` at most where
//
//     D / P'·(2·A + G) ≤ tolerance·G
//
// The sweeps know no G, and take 1 − P for it. Where the arcs of a node are outcomes of one choice, G is no
// less. Elsewhere it may be, so it is compared once it is known.
//
// Each sample is swept twice, a block of frames at a time. In a block a window of states is scored: cut below
// where little comes from the block before, and raised until little leaves it at its top. The first sweep
// leaves out e^-12 of what is under way. What it finds, P' and D, says how much the second one may leave out,
// which begins with the nodes that the first one has scored.
//
// A call takes each sample to where it wants scores that are not there. It wants all of them where the lattice
// is small, where little could be left out, and where a score is NaN. A call after the lattice, with
// occupancies, wants what is left of samples whose G is too small.
//
//   macros of arcs.h and symbols.h
//   scores                   of the nodes that were wanted before. [N, SYMBOLS]
//   occupancy                of the symbols; null while sweeping. [N, SYMBOLS]
//   numbers                  offset, at most 0, delay, which is 0, and scale of each arc. [ARCS, 3]
//   tolerance                in (0, 1)
//   progress                 struct Progress of each sample, zero at first. [S, 8]
//   inflow                   α that the blocks before bring to each state, zero at first. [P, AHEAD]
//   scored_low, scored_high  states whose nodes have been wanted, of each packed frame; zero at first. [F]
//   lost                     D / P' of each sample, once nothing is wanted. [S]
//   wanted                   numbers of the nodes to score next, ascending; the first `total` are. [N]

#include <algorithm>
#include <cmath>
#include <vector>

#include "arcs.h"
#include "gradient_mass.h"
#include "threads.h"

namespace {

constexpr long long largest(const long long (&numbers)[ARCS]) { return *std::max_element(numbers, numbers + ARCS); }

// Arcs lead to the next block at most.
constexpr long long ahead = largest(arc_frames), block_frames = std::max(ahead, 16ll);
constexpr long long least_frames = 2 * block_frames, least_states = 12;  // of a lattice that is not small
constexpr double beam = 6e-6;
// Above 5 nats and 1.5 a label, next to nothing can be left out.
constexpr double most_nats = 5.0, most_nats_of_label = 1.5;
// Where the first sweep takes more of the states than this, the second one would take nearly all.
constexpr double most_states = 0.75;
// What the probabilities that leave a node add up to beyond 1, at most.
constexpr double rounding = 1e-14;
// Below, products of probabilities would leave the range of a double.
constexpr double least_limit = 1e-280;

enum Stage { not_begun, first_sweep, second_sweep, done };

struct Progress {
  double stage;
  double block;    // that the sweep takes next
  double growth;   // states by which the last window rose above what came to it
  double scale;    // log of the unit of masses
  double dropped;  // mass that left the scored nodes
  double ended;    // of paths that have ended
  double limit;    // log of what the second sweep may drop; −∞ or NaN: nothing
  double taken;    // states of all windows so far
};

// One sample.
class Reach {
 public:
  Reach(const Arcs& arcs, double tolerance, Progress& progress, double* inflow, std::int64_t* scored_low,
        std::int64_t* scored_high, std::int64_t* wanted)
      : arcs_(arcs),
        tolerance_(tolerance),
        progress_(progress),
        inflow_(inflow),
        scored_low_(scored_low),
        scored_high_(scored_high),
        wanted_(wanted) {
    double most = 0.0;
    for (int a = 0; a < ARCS; ++a) {
      const int symbols = __builtin_popcount(arc_symbols[a]) + __builtin_popcount(arc_next_symbols[a]);
      most = std::max(most, symbols * std::abs(arcs.numbers[3 * a + 2]));
      factor_[a] = std::exp(arcs.numbers[3 * a]);
    }
    path_norm_ = 2.0 * most * static_cast<double>(arcs.frames + arcs.states - 1);
  }

  // Goes on until it wants scores; returns of how many nodes.
  long long run() {
    if (progress_.stage == not_begun) {
      begin(first_sweep);
      if (arcs_.frames < least_frames || arcs_.states < least_states) want_all();
    }
    while (progress_.stage != done && count_ == 0) {
      if (static_cast<long long>(progress_.block) * block_frames < arcs_.frames) {
        take_block();
      } else if (progress_.stage == first_sweep) {
        begin_second();
      } else {
        progress_.stage = done;
      }
    }
    return count_;
  }

  // Wants what is left where a gradient of this norm is too small for what is lost; returns of how many nodes.
  long long rest(double norm) {
    if (!(lost() * (path_norm_ + norm) <= tolerance_ * norm)) want_all();
    return count_;
  }

  double lost() const { return progress_.dropped > 0.0 ? progress_.dropped / progress_.ended : 0.0; }

 private:
  void begin(Stage stage) {
    progress_ = {static_cast<double>(stage), 0.0, 1.0, 0.0, 0.0, 0.0, progress_.limit, 0.0};
    std::fill(inflow_, inflow_ + arcs_.states * ahead, 0.0);
    inflow_[0] = 1.0;
  }

  void begin_second() {
    const double most = std::exp(progress_.scale) * (progress_.ended + progress_.dropped);
    const double uncertain = 1.0 - most - rounding * path_norm_;  // 1 − P, or less
    const double share = tolerance_ * uncertain / (path_norm_ + 1.0);
    progress_.limit = progress_.scale + std::log(progress_.ended * share);
    begin(second_sweep);
  }

  void take_block() {
    const long long block = static_cast<long long>(progress_.block);
    const long long blocks = (arcs_.frames + block_frames - 1) / block_frames, states = arcs_.states;
    from_ = block * block_frames, to_ = std::min(from_ + block_frames, arcs_.frames);

    // What comes to the states from u on.
    std::vector<double> above(states + 1, 0.0);
    double above_zero = 0.0;
    for (long long u = states - 1; u >= 0; --u) {
      above_zero += above[u + 1];
      above[u] = above[u + 1] + inflow_of(u);
    }
    const double all = above[0];
    if (!(all > 0.0) || !(all < infinity)) return want_all();
    double limit = beam * all;
    if (progress_.stage == second_sweep) {
      limit = std::exp(progress_.limit - progress_.scale) - progress_.dropped;
      if (!(limit > least_limit)) return want_all();
    } else {
      const double nats = -progress_.scale - std::log(all), labels = above_zero / all;
      if (nats > most_nats + most_nats_of_label * (labels + 1.0)) return want_all();
      if (block >= 4 && progress_.taken > most_states * static_cast<double>(block * states)) return want_all();
    }

    // There are two cuts in each block that is left.
    const double cuts = 2.0 * static_cast<double>(blocks - block);
    long long low = 0;
    double below = 0.0;
    while (low < states - 1 && below + inflow_of(low) <= limit / cuts) below += inflow_of(low++);
    limit = (limit - below) / (cuts - 1.0);
    long long top = low + 1;
    while (top < states && !(above[top] <= limit / 4.0)) ++top;
    if (want(low, std::min(top + static_cast<long long>(progress_.growth), states))) return;

    low = scored_low_[from_];
    const long long high = scored_high_[from_];
    const double ended = pass(low, high);
    const auto dropped = [&](long long u) { return u < states ? crossing_[u - low] + above[u] : 0.0; };
    if (!(dropped(high) <= limit)) {
      // By two states, and by more where that is not enough for long.
      const long long rise = std::max(2ll, (high - top) / 4);
      progress_.growth = static_cast<double>(high - top + rise);
      want(low, std::min(high + rise, states));
      return;
    }
    long long least = top;
    while (!(dropped(least) <= limit)) ++least;
    progress_.growth = static_cast<double>(std::max(least - top, 1ll));
    progress_.dropped += dropped(high);
    for (long long u = 0; u < low; ++u) progress_.dropped += inflow_of(u);
    progress_.ended += ended;
    progress_.taken += static_cast<double>(high - low);
    progress_.block += 1.0;
    hand_on(low, high);
  }

  double inflow_of(long long u) const {
    double sum = 0.0;
    for (long long d = 0; d < ahead; ++d) sum += inflow_[u * ahead + d];
    return sum;
  }

  // α of a block's nodes from low to high, and what crosses into each state from the one below. Returns what
  // ends.
  double pass(long long low, long long high) {
    const long long pitch = high - low + 1;
    mass_.assign((block_frames + ahead) * pitch, 0.0);
    crossing_.assign(pitch, 0.0);
    probability_.resize((high - low) * SYMBOLS + lanes<double>);
    for (long long d = 0; d < ahead; ++d) {
      for (long long u = low; u < high; ++u) mass_[d * pitch + u - low] = inflow_[u * ahead + d];
    }
    double ended = 0.0;
    for (long long t = from_; t < to_; ++t) {
      const long long first = restricted ? std::max<long long>(low, arcs_.low[t]) : low;
      const long long last = restricted ? std::min<long long>(high, arcs_.high[t]) : high;
      if (first >= last) continue;
      const double* const score = arcs_.scores + arcs_.node(t, first) * SYMBOLS;
      const long long count = (last - first) * SYMBOLS;
      for (long long i = 0; i < count; i += lanes<double>) {
        const auto some = load_first(score + i, std::min<long long>(lanes<double>, count - i));
        store(probability_.data() + i, exponential<double>(some));
      }
      double* const here = mass_.data() + (t - from_) * pitch - low;
      for (long long u = first; u < last; ++u) {
        if (here[u] == 0.0) continue;
        for (int a = 0; a < ARCS; ++a) {
          if (!arcs_.exists(a, t, u)) continue;
          double moved = here[u] * factor_[a];
          for (int s = 0; s < SYMBOLS; ++s) {
            if (arc_symbols[a] >> s & 1) moved *= probability_[(u - first) * SYMBOLS + s];
          }
          if (arc_next_symbols[a] && u + 1 == last) {
            crossing_[last - low] += moved;
            continue;
          }
          for (int s = 0; s < SYMBOLS; ++s) {
            if (arc_next_symbols[a] >> s & 1) moved *= probability_[(u + 1 - first) * SYMBOLS + s];
          }
          const long long to_t = t + arc_frames[a], to_u = u + arc_labels[a];
          if (to_t == arcs_.frames) {
            ended += moved;
          } else if (to_t >= to_) {
            here[arc_frames[a] * pitch + to_u] += moved;
          } else {
            if (arc_labels[a]) crossing_[to_u - low] += moved;
            if (to_u < high) here[arc_frames[a] * pitch + to_u] += moved;
          }
        }
      }
    }
    return ended;
  }

  // What leads beyond the block, in a unit of its size.
  void hand_on(long long low, long long high) {
    if (to_ == arcs_.frames) return;
    const double* const beyond = mass_.data() + (to_ - from_) * (high - low + 1);
    double unit = 0.0;
    for (long long i = 0; i < ahead * (high - low + 1); ++i) unit += beyond[i];
    std::fill(inflow_, inflow_ + arcs_.states * ahead, 0.0);
    for (long long d = 0; d < ahead; ++d) {
      for (long long u = low; u < std::min(high + 1, arcs_.states); ++u) {
        inflow_[u * ahead + d] = beyond[d * (high - low + 1) + u - low] / unit;
      }
    }
    progress_.dropped /= unit;
    progress_.ended /= unit;
    progress_.scale += std::log(unit);
  }

  // Asks for those of the block's nodes from low to high that have not been asked for; whether there are any.
  bool want(long long low, long long high) {
    for (long long t = from_; t < to_; ++t) {
      const bool is_first = scored_low_[t] == scored_high_[t];
      const long long old_low = is_first ? high : scored_low_[t], old_high = is_first ? high : scored_high_[t];
      add(t, low, std::min(old_low, high));
      add(t, std::max(old_high, low), high);
      scored_low_[t] = std::min(low, old_low);
      scored_high_[t] = std::max(high, old_high);
    }
    return count_ > 0;
  }

  void want_all() {
    progress_.stage = done;
    progress_.dropped = 0.0;
    from_ = 0, to_ = arcs_.frames;
    want(0, arcs_.states);
  }

  void add(long long t, long long low, long long high) {
    if (restricted) {
      low = std::max<long long>(low, arcs_.low[t]);
      high = std::min<long long>(high, arcs_.high[t]);
    }
    for (long long u = low; u < high; ++u) wanted_[count_++] = arcs_.node(t, u);
  }

  const Arcs& arcs_;
  double factor_[ARCS];  // of an arc's offset
  double path_norm_;     // of a path's logit gradient, at most
  double tolerance_;
  Progress& progress_;
  double* inflow_;  // [states, ahead]
  std::int64_t *scored_low_, *scored_high_, *wanted_;
  long long count_ = 0, from_ = 0, to_ = 0;          // wanted nodes, and the block
  std::vector<double> mass_, crossing_, probability_;  // [block + ahead, window + 1], [window + 1], [window, SYMBOLS]
};

// L1 norm of the logit gradient of some nodes.
double norm_of(const double* scores, const double* occupancy, std::int64_t nodes) {
  double norm = 0.0, masses[width];
  for (std::int64_t n = 0; n < nodes; n += width) {
    const std::int64_t count = std::min<std::int64_t>(nodes - n, width);
    store(masses, mass_of(scores + n * SYMBOLS, occupancy + n * SYMBOLS, count));
    for (std::int64_t i = 0; i < count; ++i) norm += masses[i];
  }
  return norm;
}

}  // namespace

extern "C" void reach(long long threads, const double* scores, const double* occupancy, const double* numbers,
                      const std::int64_t* first_frame, const std::int64_t* first_state,
                      const std::int64_t* first_node, const std::int64_t* frames, const std::int64_t* states,
                      const std::int64_t* frame_node, const std::int64_t* low, const std::int64_t* high,
                      double tolerance, double* progress, double* inflow, std::int64_t* scored_low,
                      std::int64_t* scored_high, double* lost, std::int64_t* wanted, std::int64_t* total,
                      long long sample_count) {
  std::vector<std::int64_t> counts(sample_count);
  std::int64_t* const count_of = counts.data();
  for_each_task(threads, sample_count, [=](long long s) {
    const std::int64_t f = first_frame[s], first = first_node[s], nodes = first_node[s + 1] - first;
    const Arcs arcs = {scores, numbers, frame_node + f, low + f, high + f, frames[s], states[s]};
    Reach sample(arcs, tolerance, reinterpret_cast<Progress*>(progress)[s], inflow + first_state[s] * ahead,
                 scored_low + f, scored_high + f, wanted + first);
    if (!occupancy) {
      count_of[s] = sample.run();
    } else if (sample.lost() > 0.0) {
      count_of[s] = sample.rest(norm_of(scores + first * SYMBOLS, occupancy + first * SYMBOLS, nodes));
    }
    lost[s] = sample.lost();
  });
  std::int64_t* next = wanted;
  for (long long s = 0; s < sample_count; ++s) {
    std::copy(wanted + first_node[s], wanted + first_node[s] + counts[s], next);
    next += counts[s];
  }
  *total = next - wanted;
}
