// Log-probability of each symbol of each node row, from one read of its logits x = logits + bias:
//
//     score[r, s] = x[r, column_s] − log Σ_v exp(x[r, v])
//
// The sum runs over the symbol's softmax: for softmax 0 all tokens but the symbols of softmax 1, for softmax 1
// its symbols alone. The symbols' own logits are left out of the row's sum (−∞ takes their place)
// and enter it in float64: beside an almost certain symbol's 1, a float32 sum would lose the rest,
// which is all that this symbol's score and gradient consist of. A row is copied a tile at a time, which
// stays in cache between the search for its maximum and the sum. As many rows as a vector has float64
// lanes end together.
//
//   macros of symbols.h
//   logits         rows of LOGITs that are `column_stride` apart
//   pitch          from one row to the next, unless
//   frame_place    the first node of each frame, and
//   state_place    what each state adds, say where rows lie, in elements. [F], [P], or null
//   bias           LOGITs, or null. [V]
//   tokens         columns that softmax 0 sums
//   frame, state   packed encoder and predictor row of each node. [R]
//   columns        logit column of each symbol of a state, NO_LABEL or ZERO_LOGIT. [states, SYMBOLS]
//   normalize      0: the logits are log-probabilities already
//   others         if not null, the columns are a part of all: it takes log Σ exp of the tokens that are no
//                  symbols, and scores stay logits. [R]

#include <cmath>

#include "rows.h"
#include "symbols.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr REAL nothing = static_cast<REAL>(-infinity);
constexpr int in_flight = 4;
constexpr int tile_columns = 1024;

struct Sum {
  REAL maximum;
  REAL scaled;  // Σ exp(x − maximum)

  // exp(∞ − ∞) would be NaN where there is nothing so far.
  REAL scaled_to(REAL other) const { return maximum == other ? scaled : scaled * std::exp(maximum - other); }

  Sum operator+(Sum other) const {
    const REAL greater = maximum > other.maximum ? maximum : other.maximum;
    return {greater, scaled_to(greater) + other.scaled_to(greater)};
  }
};

// Of a whole number of vectors.
Sum sum_of_tile(const REAL* x, long long columns) {
  using V = Vector<REAL>;
  constexpr int width = lanes<REAL>;
  const long long blocked = columns - columns % (in_flight * width);

  V maxima[in_flight];
  for (V& m : maxima) m = broadcast(nothing);
  for (long long v = 0; v < blocked; v += in_flight * width) {
    for (int k = 0; k < in_flight; ++k) maxima[k] = greater_of<REAL>(load(x + v + k * width), maxima[k]);
  }
  for (long long v = blocked; v < columns; v += width) maxima[0] = greater_of<REAL>(load(x + v), maxima[0]);
  const REAL maximum = greatest_lane<REAL>(
      greater_of<REAL>(greater_of<REAL>(maxima[0], maxima[1]), greater_of<REAL>(maxima[2], maxima[3])));

  // Where all is −∞, any finite number serves as maximum.
  const REAL finite = maximum == nothing ? REAL(0) : maximum;
  V sums[in_flight] = {};
  for (long long v = 0; v < blocked; v += in_flight * width) {
    for (int k = 0; k < in_flight; ++k) sums[k] += exponential<REAL>(load(x + v + k * width) - finite);
  }
  for (long long v = blocked; v < columns; v += width) sums[0] += exponential<REAL>(load(x + v) - finite);
  return {maximum, sum_of_lanes<REAL>((sums[0] + sums[1]) + (sums[2] + sums[3]))};
}

// Of a row but for the symbols' columns.
Sum sum_of_row(const LOGIT* x, long long stride, const LOGIT* bias, long long tokens, const std::int64_t* column) {
  constexpr int width = lanes<REAL>;
  REAL tile[tile_columns];
  Sum sum = {nothing, 0};
  for (long long first = 0; first < tokens; first += tile_columns) {
    const long long count = tokens - first < tile_columns ? tokens - first : tile_columns;
    const long long whole = stride == 1 ? count - count % width : 0;
    long long v = 0;
    for (; v < whole && bias; v += width) store(tile + v, load(x + first + v) + load(bias + first + v));
    for (; v < whole; v += width) store(tile + v, load(x + first + v));
    for (; v < count; v += width) {
      const long long left = count - v < width ? count - v : width;
      const Vector<REAL> values = load_first(x + (first + v) * stride, left, stride);
      store(tile + v, bias ? values + load_first(bias + first + v, left) : values);
    }
    for (long long beyond = count; beyond < v; ++beyond) tile[beyond] = nothing;
    for (int s = 0; s < SYMBOLS; ++s) {
      if (column[s] >= first && column[s] < first + count) tile[column[s] - first] = nothing;
    }
    const Sum of_tile = sum_of_tile(tile, v);
    sum = first == 0 ? of_tile : sum + of_tile;
  }
  return sum;
}

}  // namespace

extern "C" void symbol_scores(long long threads, const LOGIT* logits, long long pitch, long long column_stride,
                              const std::int64_t* frame_place, const std::int64_t* state_place,
                              const LOGIT* bias, long long tokens,
                              const std::int32_t* frame, const std::int32_t* state, const std::int64_t* columns,
                              double* scores, double* others, long long row_count, long long normalize) {
  using V = Vector<double>;
  constexpr int width = lanes<double>;
  const Places place = {pitch, frame, state, frame_place, state_place};
  // Enough for a thread to be worth waking.
  const long long blocks = 1 + (1 << 15) / ((1 + tokens) * width);
  for_each_range(threads, row_count, blocks * width, [=](long long first, long long last) {
    for (long long start = first; start < last; start += width) {
      const int count = static_cast<int>(last - start < width ? last - start : width);
      double values[SYMBOLS][width] = {}, maxima[width] = {}, sums[width] = {};
      for (int i = 0; i < count; ++i) {
        const std::int64_t* const column = columns + state[start + i] * static_cast<long long>(SYMBOLS);
        const LOGIT* const x = logits + place(start + i);
        for (int s = 0; s < SYMBOLS; ++s) {
          values[s][i] = column[s] == ZERO_LOGIT ? 0.0
                         : column[s] == NO_LABEL ? -infinity
                                                 : static_cast<double>(logit(x, column_stride, bias, column[s]));
        }
        if (!normalize) continue;
        const Sum sum = sum_of_row(x, column_stride, bias, tokens, column);
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
