// Gradient of each kept node row's logits x = logits + bias, in their place:
//
//     d_logits[v] = w · clamp(γ·softmax(x)[v] − Σ_a γ_a·[v = column_a])        γ = Σ_a γ_a
//
// The normaliser needs no second reduction over the row: log Σ exp(x) = x[column_a] − score_a for any
// arc, taken in float64 and split in two REALs. A warp turns a row; each lane has read all that a
// store may overwrite before any lane stores, since OPERANDs are no wider than REALs and a row keeps
// its place. At the arcs' own columns γ·p_a − γ_a is a difference of almost equal numbers, taken in
// float64.
//
//   node                row in scores and occupancy of each kept node. [rows]
//   frame, state        packed encoder and predictor row of each kept node. [rows]
//   weight              gradient of the scalar with respect to each sample's loss. [S]
//   clamp               bound on the elements at w = 1; none if not positive

#include "elements.cuh"

namespace {

__device__ __forceinline__ float exponential(float x) {
  return is_half<OPERAND> ? exponential_approximate(x) : expf(x);
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

__device__ __forceinline__ REAL clamped(REAL x, REAL bound) { return fmin(fmax(x, -bound), bound); }

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    logit_gradient(REAL* logits, long long pitch, const REAL* __restrict__ bias, long long vocab_size,
                   const long long* __restrict__ node, const int* __restrict__ frame,
                   const int* __restrict__ state, const long long* __restrict__ frame_sample,
                   const double* __restrict__ weight, const long long* __restrict__ columns,
                   const double* __restrict__ scores, const double* __restrict__ occupancy, long long rows,
                   long long normalize, double clamp) {
  constexpr int width = vector_width<OPERAND>;
  const long long row = blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y;
  if (row >= rows) return;
  const int lane = threadIdx.x;
  REAL* const x = logits + row * pitch;
  OPERAND* const d = reinterpret_cast<OPERAND*>(x);
  const long long* const column = columns + state[row] * static_cast<long long>(ARCS);
  const double* const score = scores + node[row] * ARCS;
  const double* const gammas = occupancy + node[row] * ARCS;
  // NaN as weight stays NaN, whatever it multiplies.
  const REAL w = static_cast<REAL>(weight[frame_sample[frame[row]]]);
  const REAL bound = static_cast<REAL>(clamp > 0 ? clamp : -minus_infinity());

  double gamma = 0.0, best = minus_infinity();
  long long best_column = 0;
#pragma unroll
  for (int a = 0; a < ARCS; ++a) {
    gamma += gammas[a];
    if (score[a] > best) {
      best = score[a];
      best_column = column[a];
    }
  }
  const REAL best_logit = bias ? x[best_column] + bias[best_column] : x[best_column];
  const double normalizer = static_cast<double>(best_logit) - best;
  const REAL high = static_cast<REAL>(normalizer);
  const REAL low = static_cast<REAL>(normalizer - static_cast<double>(high));
  const REAL scale = static_cast<REAL>(gamma);

  for_each_step<width, 1>(static_cast<int>(vocab_size), [&](int v, bool is_whole) {
    REAL values[width], offsets[width] = {};
    if (is_whole || v < vocab_size) {
      load(x + v, values);
      if (bias) load(bias + v, offsets);
    }
    __syncwarp();
    if (is_whole || v < vocab_size) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const REAL p = normalize ? exponential((values[i] + offsets[i] - high) - low) : REAL(0);
        values[i] = clamped(scale * p, bound) * w;
      }
      store(d + v, values);
    }
  });
  __syncwarp();

  if (lane >= ARCS || column[lane] < 0) return;
  const double p = normalize ? exp(score[lane]) : 0.0;
  const REAL gradient = static_cast<REAL>(gamma * p - gammas[lane]);
  narrow(clamped(gradient, bound) * w, d[column[lane]]);
}
