// Log-probability of each symbol of each node row, in one read of its logits x = logits + bias:
//
//     score[r, s] = x[r, column_s] − log Σ_{v in the softmax of s} exp(x[r, v])
//
// Softmax 1 is over its symbols; softmax 0 over the tokens, except those of softmax 1, and its symbols. All
// symbols' own logits leave the row before it is summed (−∞ takes their place) and enter the sum of
// their softmax in float64: beside an almost certain symbol's 1, a float32 sum would lose the rest,
// which is all that this symbol's score and gradient consist of. A warp reads a row, four 16-byte
// loads a lane in flight, and keeps the running maximum m and Σ exp(x − m) in REAL. It takes several
// rows in turn, and begins and ends them side by side, a row a lane, so that neither the wait for the
// symbols' logits nor the float64 end costs a whole warp's time for each row.
//
//   ROWS_OF_WARP   rows that a warp takes, at most 32
//   PART           whether the columns are a part of all: then scores stay logits, and `others` takes
//                  log Σ exp of the tokens that are no symbols. [R]
//   logits     lose those of the symbols
//   tokens     columns of a row that are tokens: the first
//   columns    logit column of each symbol of a state, negative where there is none. [states, SYMBOLS]
//   normalize  0: the logits are log-probabilities already

#include "elements.cuh"
#include "symbols.cuh"

namespace {

__device__ __forceinline__ float fast_exponential(float x) { return exponential_approximate(x); }
__device__ __forceinline__ double fast_exponential(double x) { return exp(x); }

__device__ __forceinline__ REAL nothing() { return static_cast<REAL>(minus_infinity()); }

struct Sum {
  REAL maximum;
  REAL scaled;  // Σ exp(x − maximum)

  // exp(−∞ − −∞) would be NaN where there is nothing yet.
  __device__ __forceinline__ REAL scaled_to(REAL other) const {
    return maximum == other ? scaled : scaled * fast_exponential(maximum - other);
  }
};

// The same in every lane.
__device__ __forceinline__ Sum sum_of_row(const REAL* x, const REAL* bias, int tokens) {
  constexpr int width = vector_width<REAL>;
  constexpr int in_flight = 4;
  constexpr int stride = warp_lanes * width;

  Sum sum = {nothing(), 0};
  for_each_step<width, in_flight>(tokens, [&](int first, bool is_whole) {
    REAL values[in_flight][width];
#pragma unroll
    for (int k = 0; k < in_flight; ++k) {
      const int v = first + k * stride;
      if (is_whole || v < tokens) load(x + v, values[k]);
    }
    REAL maximum = sum.maximum;
#pragma unroll
    for (int k = 0; k < in_flight; ++k) {
      const int v = first + k * stride;
      REAL offsets[width] = {};
      if (bias && (is_whole || v < tokens)) load(bias + v, offsets);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        values[k][i] = is_whole || v + i < tokens ? values[k][i] + offsets[i] : nothing();
        maximum = fmax(values[k][i], maximum);
      }
    }
    // Where all is −∞ so far, any finite number serves as maximum.
    const REAL finite = maximum == nothing() ? REAL(0) : maximum;
    REAL step = 0;
#pragma unroll
    for (int k = 0; k < in_flight; ++k) {
#pragma unroll
      for (int i = 0; i < width; ++i) step += fast_exponential(values[k][i] - finite);
    }
    sum = {maximum, sum.scaled_to(maximum) + step};
  });
  // The maximum of all lanes first: one exponential a lane then, and additions.
  REAL maximum = sum.maximum;
  for (int offset = warp_lanes / 2; offset > 0; offset /= 2) {
    maximum = fmax(maximum, __shfl_xor_sync(all_lanes, maximum, offset));
  }
  sum = {maximum, sum.scaled_to(maximum)};
  for (int offset = warp_lanes / 2; offset > 0; offset /= 2) {
    sum.scaled += __shfl_xor_sync(all_lanes, sum.scaled, offset);
  }
  return sum;
}

// The log-sum-exp of some logits, as a sum.
struct Normalizer {
  REAL maximum;
  double rest;
};

// Of the symbols of a softmax and of `others`.
__device__ __forceinline__ Normalizer normalizer(int softmax, const REAL (&value)[SYMBOLS], Sum others) {
  REAL maximum = others.maximum;
#pragma unroll
  for (int s = 0; s < SYMBOLS; ++s) maximum = softmax_of[s] == softmax && value[s] > maximum ? value[s] : maximum;
  double total =
      others.scaled == 0 ? 0.0 : others.scaled * exp(static_cast<double>(others.maximum) - maximum);
#pragma unroll
  for (int s = 0; s < SYMBOLS; ++s) {
    if (softmax_of[s] == softmax && value[s] != nothing()) total += exp(static_cast<double>(value[s]) - maximum);
  }
  return {maximum, log(total)};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    symbol_scores(REAL* logits, long long pitch, const REAL* __restrict__ bias, long long tokens,
                  const int* __restrict__ state, const long long* __restrict__ columns,
                  double* __restrict__ scores, double* __restrict__ others, long long row_count,
                  long long normalize) {
  const int lane = threadIdx.x;
  const long long first =
      (blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y) * ROWS_OF_WARP;
  const long long row = first + lane;
  const bool is_mine = lane < ROWS_OF_WARP && row < row_count;

  REAL value[SYMBOLS];
  bool exists[SYMBOLS];
  if (is_mine) {
    const long long* const column = columns + state[row] * static_cast<long long>(SYMBOLS);
    REAL* const x = logits + row * pitch;
#pragma unroll
    for (int s = 0; s < SYMBOLS; ++s) {
      exists[s] = !has_column[s] || column[s] >= 0;
      value[s] = has_column[s] ? nothing() : REAL(0);
      if (has_column[s] && exists[s]) value[s] = bias ? x[column[s]] + bias[column[s]] : x[column[s]];
    }
#pragma unroll
    for (int s = 0; s < SYMBOLS; ++s) {
      if (normalize && has_column[s] && exists[s] && column[s] < tokens) x[column[s]] = nothing();
    }
  }
  __syncwarp();

  Sum sum = {nothing(), 0};
  for (int k = 0; normalize && k < ROWS_OF_WARP && first + k < row_count; ++k) {
    const Sum of_row = sum_of_row(logits + (first + k) * pitch, bias, static_cast<int>(tokens));
    if (lane == k) sum = of_row;
  }
  if (!is_mine) return;

  Normalizer normalizers[2] = {};
  if (PART) {
    others[row] = sum.scaled == 0 ? minus_infinity() : sum.maximum + log(static_cast<double>(sum.scaled));
  } else if (normalize) {
    normalizers[0] = normalizer(0, value, sum);
    normalizers[1] = normalizer(1, value, {nothing(), 0});
  }
#pragma unroll
  for (int s = 0; s < SYMBOLS; ++s) {
    const Normalizer of_softmax = normalizers[softmax_of[s]];
    const double score = static_cast<double>(value[s]) - of_softmax.maximum - of_softmax.rest;
    scores[row * SYMBOLS + s] = exists[s] ? score : minus_infinity();
  }
}
