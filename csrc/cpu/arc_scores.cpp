// Log-probability of each arc of each node row, from one read of its logits x:
//
//     score[r, a] = x[r, column_a] − log Σ_v exp(x[r, v])
//
// The arcs' own logits leave the row before it is summed (−∞ takes their place) and enter the sum in
// float64: beside an almost certain arc's 1, a float32 sum would lose the rest, which is all that this
// arc's score and gradient consist of. A row stays in cache between the search for its maximum and the
// sum. As many rows as a vector has float64 lanes end together.
//
//   logits     lose those of the arcs. [rows, vocab_size]
//   columns    logit column of each arc of a state, negative where there is none. [states, ARCS]
//   normalize  0: the logits are log-probabilities already

#include "threads.h"
#include "vectors.h"

namespace {

struct Sum {
  REAL maximum;
  REAL scaled;  // Σ exp(x − maximum)
};

Sum sum_of_row(const OPERAND* x, long long columns) {
  using V = Vector<REAL>;
  constexpr int width = lanes<REAL>;
  constexpr int in_flight = 4;
  constexpr REAL nothing = static_cast<REAL>(-infinity);
  const long long rest = columns % width, whole = columns - rest, blocked = whole - whole % (in_flight * width);

  // Lanes beyond the row hold its last element again, which changes no maximum.
  V last = broadcast(nothing);
  if (rest > 0) {
    OPERAND block[width];
    for (int i = 0; i < width; ++i) block[i] = x[whole + (i < rest ? i : rest - 1)];
    last = load(block);
  }

  V maxima[in_flight];
  for (V& m : maxima) m = last;
  for (long long v = 0; v < blocked; v += in_flight * width) {
    for (int k = 0; k < in_flight; ++k) maxima[k] = greater_of<REAL>(load(x + v + k * width), maxima[k]);
  }
  for (long long v = blocked; v < whole; v += width) maxima[0] = greater_of<REAL>(load(x + v), maxima[0]);
  const REAL maximum = greatest_lane<REAL>(
      greater_of<REAL>(greater_of<REAL>(maxima[0], maxima[1]), greater_of<REAL>(maxima[2], maxima[3])));

  // Where all is −∞, any finite number serves as maximum.
  const REAL finite = maximum == nothing ? REAL(0) : maximum;
  V sums[in_flight] = {};
  for (long long v = 0; v < blocked; v += in_flight * width) {
    for (int k = 0; k < in_flight; ++k) sums[k] += exponential<REAL>(load(x + v + k * width) - finite);
  }
  for (long long v = blocked; v < whole; v += width) sums[0] += exponential<REAL>(load(x + v) - finite);
  if (rest > 0) {
    REAL block[width];
    store(block, exponential<REAL>(last - finite));
    for (int i = static_cast<int>(rest); i < width; ++i) block[i] = 0;
    sums[1] += load(block);
  }
  return {maximum, sum_of_lanes<REAL>((sums[0] + sums[1]) + (sums[2] + sums[3]))};
}

}  // namespace

extern "C" void arc_scores(long long threads, OPERAND* logits, long long vocab_size, long long pitch,
                           const std::int32_t* state, const std::int64_t* columns, double* scores,
                           long long rows, long long normalize) {
  using V = Vector<double>;
  constexpr int width = lanes<double>;
  constexpr REAL nothing = static_cast<REAL>(-infinity);
  // Enough for a thread to be worth waking.
  const long long blocks = 1 + (1 << 15) / (vocab_size * width);
  for_each_range(threads, rows, blocks * width, [=](long long first, long long last) {
    for (long long start = first; start < last; start += width) {
      const int count = static_cast<int>(last - start < width ? last - start : width);
      double values[ARCS][width] = {}, maxima[width] = {}, sums[width] = {};
      for (int i = 0; i < count; ++i) {
        const std::int64_t* const column = columns + state[start + i] * static_cast<long long>(ARCS);
        OPERAND* const x = logits + (start + i) * pitch;
        for (int a = 0; a < ARCS; ++a) {
          values[a][i] = column[a] < 0 ? -infinity : static_cast<double>(widen(x[column[a]]));
        }
        if (!normalize) continue;
        for (int a = 0; a < ARCS; ++a) {
          if (column[a] >= 0) narrow(nothing, x[column[a]]);
        }
        const Sum sum = sum_of_row(x, vocab_size);
        maxima[i] = sum.maximum;
        sums[i] = sum.scaled;
      }

      V score[ARCS];
      for (int a = 0; a < ARCS; ++a) score[a] = load(values[a]);
      if (normalize) {
        V maximum = load(maxima);
        for (int a = 0; a < ARCS; ++a) maximum = greater_of<double>(score[a], maximum);
        const V sum = load(sums);
        V total = sum == 0.0 ? V{} : sum * exponential<double>(load(maxima) - maximum);
        for (int a = 0; a < ARCS; ++a) {
          const V p = exponential<double>(score[a] - maximum);
          total += score[a] == -infinity ? V{} : p;
          score[a] -= maximum;
        }
        const V log_total = logarithm(total);
        for (int a = 0; a < ARCS; ++a) score[a] -= log_total;
      }
      for (int a = 0; a < ARCS; ++a) {
        store(values[a], score[a]);
        for (int i = 0; i < count; ++i) scores[(start + i) * ARCS + a] = values[a][i];
      }
    }
  });
}
