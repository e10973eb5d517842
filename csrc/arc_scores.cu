// Log-probability of each arc of each node row, in one read of its logits x = logits + bias:
//
//     score[r, a] = x[r, column_a] − log Σ_v exp(x[r, v])
//
// The arcs' own logits leave the row before it is summed (−∞ takes their place) and enter the sum in
// float64: beside an almost certain arc's 1, a float32 sum would lose the rest, which is all that this
// arc's score and gradient consist of. A warp reads a row, four 16-byte loads a lane in flight, and
// keeps the running maximum m and Σ exp(x − m) in REAL. It takes several rows in turn, and begins and
// ends them side by side, a row a lane, so that neither the wait for the arcs' logits nor the float64
// end costs a whole warp's time for each row.
//
//   ROWS_OF_WARP   rows that a warp takes, at most 32
//   logits     lose those of the arcs
//   columns    logit column of each arc of a state, negative where there is none. [states, ARCS]
//   normalize  0: the logits are log-probabilities already

#include "elements.cuh"

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
__device__ __forceinline__ Sum sum_of_row(const REAL* x, const REAL* bias, int vocab_size) {
  constexpr int width = vector_width<REAL>;
  constexpr int in_flight = 4;
  constexpr int stride = warp_lanes * width;

  Sum sum = {nothing(), 0};
  for_each_step<width, in_flight>(vocab_size, [&](int first, bool is_whole) {
    REAL values[in_flight][width];
#pragma unroll
    for (int k = 0; k < in_flight; ++k) {
      const int v = first + k * stride;
      if (is_whole || v < vocab_size) load(x + v, values[k]);
    }
    REAL maximum = sum.maximum;
#pragma unroll
    for (int k = 0; k < in_flight; ++k) {
      const int v = first + k * stride;
      REAL offsets[width] = {};
      if (bias && (is_whole || v < vocab_size)) load(bias + v, offsets);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        values[k][i] = is_whole || v + i < vocab_size ? values[k][i] + offsets[i] : nothing();
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

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    arc_scores(REAL* logits, long long pitch, const REAL* __restrict__ bias, long long vocab_size,
               const int* __restrict__ state, const long long* __restrict__ columns,
               double* __restrict__ scores, long long rows, long long normalize) {
  const int lane = threadIdx.x;
  const long long first =
      (blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y) * ROWS_OF_WARP;
  const long long row = first + lane;
  const bool is_mine = lane < ROWS_OF_WARP && row < rows;

  REAL value[ARCS];
  if (is_mine) {
    const long long* const column = columns + state[row] * static_cast<long long>(ARCS);
    REAL* const x = logits + row * pitch;
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      value[a] = nothing();
      if (column[a] >= 0) value[a] = bias ? x[column[a]] + bias[column[a]] : x[column[a]];
    }
#pragma unroll
    for (int a = 0; a < ARCS; ++a) {
      if (normalize && column[a] >= 0) x[column[a]] = nothing();
    }
  }
  __syncwarp();

  Sum sum = {0, 0};
  for (int k = 0; normalize && k < ROWS_OF_WARP && first + k < rows; ++k) {
    const Sum others = sum_of_row(logits + (first + k) * pitch, bias, static_cast<int>(vocab_size));
    if (lane == k) sum = others;
  }
  if (!is_mine) return;

  REAL maximum = sum.maximum;
#pragma unroll
  for (int a = 0; a < ARCS; ++a) maximum = normalize && value[a] > maximum ? value[a] : maximum;
  double total = sum.scaled == 0 ? 0.0 : sum.scaled * exp(static_cast<double>(sum.maximum) - maximum);
  double score[ARCS];
#pragma unroll
  for (int a = 0; a < ARCS; ++a) {
    score[a] = static_cast<double>(value[a]) - static_cast<double>(maximum);
    if (value[a] != nothing()) total += exp(score[a]);
  }
  const double log_total = normalize ? log(total) : 0.0;
#pragma unroll
  for (int a = 0; a < ARCS; ++a) scores[row * ARCS + a] = score[a] - log_total;
}
