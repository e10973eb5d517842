// Log-probability of each symbol of each node row, from one read of its logits x:
//
//     score[r, s] = x[r, column_s] − log Σ_v exp(x[r, v])
//
// The sum runs over the symbol's softmax: for softmax 0 all tokens but the symbols of softmax 1, for softmax 1
// its symbols alone. The symbols' own logits leave the row before it is summed (−∞ takes their place)
// and enter the sum in float64: beside an almost certain symbol's 1, a float32 sum would lose the rest,
// which is all that this symbol's score and gradient consist of. A row stays in cache between the search
// for its maximum and the sum. As many rows as a vector has float64 lanes end together.
//
//   macros of symbols.h
//   logits     lose those of the symbols. [rows, pitch]
//   tokens     columns that softmax 0 sums
//   columns    logit column of each symbol of a state, NO_LABEL or ZERO_LOGIT. [states, SYMBOLS]
//   normalize  0: the logits are log-probabilities already
//   others     if not null, the columns are a part of all: it takes log Σ exp of the tokens that are no
//              symbols, and scores stay logits. [R]

#include "symbols.h"
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

extern "C" void symbol_scores(long long threads, OPERAND* logits, long long pitch, long long tokens,
                              const std::int32_t* state, const std::int64_t* columns, double* scores,
                              double* others, long long row_count, long long normalize) {
  using V = Vector<double>;
  constexpr int width = lanes<double>;
  constexpr REAL nothing = static_cast<REAL>(-infinity);
  // Enough for a thread to be worth waking.
  const long long blocks = 1 + (1 << 15) / ((1 + tokens) * width);
  for_each_range(threads, row_count, blocks * width, [=](long long first, long long last) {
    for (long long start = first; start < last; start += width) {
      const int count = static_cast<int>(last - start < width ? last - start : width);
      double values[SYMBOLS][width] = {}, maxima[width] = {}, sums[width] = {};
      for (int i = 0; i < count; ++i) {
        const std::int64_t* const column = columns + state[start + i] * static_cast<long long>(SYMBOLS);
        OPERAND* const x = logits + (start + i) * pitch;
        for (int s = 0; s < SYMBOLS; ++s) {
          values[s][i] = column[s] == ZERO_LOGIT ? 0.0
                         : column[s] == NO_LABEL ? -infinity
                                                 : static_cast<double>(widen(x[column[s]]));
        }
        if (!normalize) continue;
        for (int s = 0; s < SYMBOLS; ++s) {
          if (column[s] >= 0) narrow(nothing, x[column[s]]);
        }
        const Sum sum = sum_of_row(x, tokens);
        maxima[i] = sum.maximum;
        sums[i] = sum.scaled;
      }

      V score[SYMBOLS];
      for (int s = 0; s < SYMBOLS; ++s) score[s] = load(values[s]);
      if (others) {
        const V sum = load(sums);
        store_first(others + start, sum == 0.0 ? broadcast(-infinity) : load(maxima) + logarithm(sum), count);
      }
      for (int softmax = 0; softmax < 2 && normalize && !others; ++softmax) {
        // Of what no symbol has: nothing in softmax 1.
        const V of_rest = softmax == 0 ? load(maxima) : broadcast(-infinity);
        V maximum = of_rest;
        for (int s = 0; s < SYMBOLS; ++s) {
          if (softmax_of[s] == softmax) maximum = greater_of<double>(score[s], maximum);
        }
        const V sum = softmax == 0 ? load(sums) : V{};
        V total = sum == 0.0 ? V{} : sum * exponential<double>(of_rest - maximum);
        for (int s = 0; s < SYMBOLS; ++s) {
          if (softmax_of[s] != softmax) continue;
          const V p = exponential<double>(score[s] - maximum);
          total += score[s] == -infinity ? V{} : p;
          score[s] -= maximum;
        }
        const V log_total = logarithm(total);
        for (int s = 0; s < SYMBOLS; ++s) {
          if (softmax_of[s] == softmax) score[s] -= log_total;
        }
      }
      for (int s = 0; s < SYMBOLS; ++s) store(values[s], score[s]);
      for (int i = 0; i < count; ++i) {
        const std::int64_t* const column = columns + state[start + i] * static_cast<long long>(SYMBOLS);
        double* const result = scores + (start + i) * SYMBOLS;
        for (int s = 0; s < SYMBOLS; ++s) result[s] = column[s] == NO_LABEL ? -infinity : values[s][i];
      }
    }
  });
}
