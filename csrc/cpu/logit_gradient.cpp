// Gradient of each kept node row's logits x, in their place:
//
//     d_logits[v] = w · clamp(γ·softmax(x)[v] − Σ_a γ_a·[v = column_a])        γ = Σ_a γ_a
//
// The normaliser needs no second sum over the row: log Σ exp(x) = x[column_a] − score_a for any arc,
// taken in float64 and split in two REALs. At the arcs' own columns γ·p_a − γ_a is a difference of
// almost equal numbers, taken in float64.
//
//   node                row in scores and occupancy of each kept node. [rows]
//   frame, state        packed encoder and predictor row of each kept node. [rows]
//   weight              gradient of the scalar with respect to each sample's loss. [S]
//   clamp               bound on the elements at w = 1; none if not positive

#include <cmath>

#include "threads.h"
#include "vectors.h"

namespace {

using Reals = Vector<REAL>;

template <class T>
T clamped(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

}  // namespace

extern "C" void logit_gradient(long long threads, OPERAND* logits, long long vocab_size, long long pitch,
                               const std::int64_t* node, const std::int32_t* frame, const std::int32_t* state,
                               const std::int64_t* frame_sample, const double* weight,
                               const std::int64_t* columns, const double* scores, const double* occupancy,
                               long long rows, long long normalize, double clamp) {
  constexpr int width = lanes<REAL>;
  const REAL bound = static_cast<REAL>(clamp > 0 ? clamp : infinity);
  const Reals low_bound = broadcast(-bound), high_bound = broadcast(bound);
  for_each_range(threads, rows, 1 + (1 << 14) / vocab_size, [=](long long first, long long last) {
    for (long long r = first; r < last; ++r) {
      OPERAND* const x = logits + r * pitch;
      const std::int64_t* const column = columns + state[r] * static_cast<long long>(ARCS);
      const double* const score = scores + node[r] * ARCS;
      const double* const gammas = occupancy + node[r] * ARCS;
      // NaN as weight stays NaN, whatever it multiplies.
      const REAL w = static_cast<REAL>(weight[frame_sample[frame[r]]]);

      double gamma = 0.0, best = -infinity;
      std::int64_t best_column = 0;
      for (int a = 0; a < ARCS; ++a) {
        gamma += gammas[a];
        if (score[a] > best) {
          best = score[a];
          best_column = column[a];
        }
      }
      const double normalizer = static_cast<double>(widen(x[best_column])) - best;
      const REAL high = static_cast<REAL>(normalizer);
      const REAL low = static_cast<REAL>(normalizer - static_cast<double>(high));
      const REAL scale = static_cast<REAL>(gamma);

      const auto gradient = [=](Reals logit) {
        const Reals p = normalize ? exponential<REAL>((logit - high) - low) : Reals{};
        return clamped(scale * p, low_bound, high_bound) * w;
      };
      long long v = 0;
      for (; v + width <= vocab_size; v += width) store(x + v, gradient(load(x + v)));
      if (v < vocab_size) store_first(x + v, gradient(load_first(x + v, vocab_size - v)), vocab_size - v);

      for (int a = 0; a < ARCS; ++a) {
        if (column[a] < 0) continue;
        const double p = normalize ? std::exp(score[a]) : 0.0;
        narrow(clamped(static_cast<REAL>(gamma * p - gammas[a]), -bound, bound) * w, x[column[a]]);
      }
    }
  });
}
