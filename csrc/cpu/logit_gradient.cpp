// Gradient of each kept node row's logits x = logits + bias, which may take their place, OPERANDs being
// no wider than LOGITs:
//
//     d_logits[v] = w · clamp(Σ_g γ_g·softmax_g(x)[v] − Σ_s γ_s·[v = column_s])      γ_g = Σ_{s in g} γ_s
//
// over softmaxes g and symbols s, as symbol_scores has them; a column that is no symbol's is a token of
// softmax 0. That softmax's normaliser needs no second sum over the row: log Σ exp(x) = x[column_s] − score_s
// for any of its symbols, taken in float64 and split in two REALs. At the symbols' own columns
// γ_g·p_s − γ_s is a difference of almost equal numbers, taken in float64. Elements below LEAST are zero: a
// product with one could be no normal number, and such numbers take a CPU a hundred cycles each.
//
//   macros of symbols.h
//   logits, pitch, column_stride, frame_place, state_place, bias
//                       of the logits, as in symbol_scores
//   gradient, gradient_pitch, frame_target, state_target
//                       of the gradient likewise, whose elements lie side by side
//   node                row in scores and occupancy of each kept node. [R]
//   frame, state        packed encoder and predictor row of each kept node. [R]
//   normalizers         log Σ exp of softmax 0, or null: it follows from a symbol's score. [N]
//   weight              gradient of the scalar with respect to each sample's loss. [S]
//   clamp               bound on the elements at w = 1; none if not positive

#include <algorithm>
#include <cmath>

#include "rows.h"
#include "symbols.h"
#include "threads.h"
#include "vectors.h"

namespace {

using Reals = Vector<REAL>;

template <class T>
T clamped(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// Writes what `gradient_of` makes of a row of logits.
template <class F>
void write_row(const LOGIT* x, long long stride, const LOGIT* bias, OPERAND* d, long long columns, F gradient_of) {
  constexpr int width = lanes<REAL>;
  const long long whole = stride == 1 ? columns - columns % width : 0;
  long long v = 0;
  for (; v < whole && bias; v += width) store(d + v, gradient_of(load(x + v) + load(bias + v)));
  for (; v < whole; v += width) store(d + v, gradient_of(load(x + v)));
  for (; v < columns; v += width) {
    const long long count = columns - v < width ? columns - v : width;
    const Reals values = load_first(x + v * stride, count, stride);
    store_first(d + v, gradient_of(bias ? values + load_first(bias + v, count) : values), count);
  }
}

}  // namespace

extern "C" void logit_gradient(long long threads, const LOGIT* logits, long long pitch, long long column_stride,
                               const std::int64_t* frame_place, const std::int64_t* state_place,
                               const LOGIT* bias, OPERAND* gradient, long long gradient_pitch,
                               const std::int64_t* frame_target, const std::int64_t* state_target, long long column_count, const std::int64_t* node,
                               const std::int32_t* frame, const std::int32_t* state,
                               const std::int64_t* frame_sample, const double* weight,
                               const std::int64_t* columns, const double* scores, const double* occupancy,
                               const double* normalizers, long long row_count, long long normalize, double clamp) {
  const REAL bound = static_cast<REAL>(clamp > 0 ? clamp : infinity);
  const Places place = {pitch, frame, state, frame_place, state_place};
  const Places target = {gradient_pitch, frame, state, frame_target, state_target};
  const Reals low_bound = broadcast(-bound), high_bound = broadcast(bound);
  for_each_range(threads, row_count, 1 + (1 << 14) / column_count, [=](long long first, long long last) {
    for (long long r = first; r < last; ++r) {
      const LOGIT* const x = logits + place(r);
      OPERAND* const d = gradient + target(r);
      const std::int64_t* const column = columns + state[r] * static_cast<long long>(SYMBOLS);
      const double* const score = scores + node[r] * SYMBOLS;
      const double* const gammas = occupancy + node[r] * SYMBOLS;
      // NaN as weight stays NaN, whatever it multiplies.
      const REAL w = static_cast<REAL>(weight[frame_sample[frame[r]]]);

      double gamma[2] = {}, best = -infinity, normalizer = 0.0;
      for (int s = 0; s < SYMBOLS; ++s) {
        gamma[softmax_of[s]] += gammas[s];
        if (softmax_of[s] == 0 && column[s] >= 0 && score[s] > best) {
          best = score[s];
          normalizer = static_cast<double>(logit(x, column_stride, bias, column[s])) - best;
        }
      }
      if (normalizers) normalizer = normalizers[node[r]];
      const REAL high = static_cast<REAL>(normalizer);
      const REAL low = static_cast<REAL>(normalizer - static_cast<double>(high));
      const REAL scale = static_cast<REAL>(gamma[0]);
      // Without a symbol of its own the softmax is not used, and its normaliser is not known.
      const bool is_used = normalize && (normalizers || best > -infinity);

      // log p below which an element is zero; NaN is not below it.
      const REAL least = std::max(Format<REAL>::least_exponent, std::log(REAL(LEAST) / std::abs(scale * w)));
      const auto write = [=](auto gradient_of) { write_row(x, column_stride, bias, d, column_count, gradient_of); };
      if (!is_used) {
        write([=](Reals) { return broadcast(REAL(0) * w); });
      } else if (clamp > 0) {
        write([=](Reals logit) {
          const Reals p = exponential<REAL>((logit - high) - low, least);
          return clamped(scale * p, low_bound, high_bound) * w;
        });
      } else {
        write([=](Reals logit) { return exponential<REAL>((logit - high) - low, least) * (scale * w); });
      }

      for (int s = 0; s < SYMBOLS; ++s) {
        if (column[s] < 0) continue;
        const double p = normalize ? std::exp(score[s]) : 0.0;
        const REAL element = clamped(static_cast<REAL>(gamma[softmax_of[s]] * p - gammas[s]), -bound, bound) * w;
        store_first(d + column[s], broadcast(std::abs(element) < REAL(LEAST) ? REAL(0) : element), 1);
      }
    }
  });
}
