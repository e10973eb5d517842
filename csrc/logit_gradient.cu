// Gradient of each kept node row's logits x = logits + bias, in their place:
//
//     d_logits[v] = w · clamp(Σ_g γ_g·softmax_g(x)[v] − Σ_s γ_s·[v = column_s])
//     γ_g = Σ_{s in softmax g} γ_s
//
// The normaliser of softmax 0 needs no second reduction over the row: log Σ exp(x) = x[column_s] − score_s
// for any of its symbols, taken in float64 and split in two REALs. A row without one has γ_0 = 0.
// A warp turns a row; each lane has read all that a store may overwrite before any lane stores, since
// OPERANDs are no wider than REALs and a row keeps its place. At the symbols' own columns, which are
// all that softmax 1 has, γ_g·p_s − γ_s is a difference of almost equal numbers, taken in float64; it
// takes the place of what the row's turn has left there.
//
//   node                row in scores and occupancy of each kept node. [R]
//   frame, state        packed encoder and predictor row of each kept node. [R]
//   normalizers         log Σ exp of softmax 0, or null: it follows from a symbol's score. [N]
//   weight              gradient of the scalar with respect to each sample's loss. [S]
//   clamp               bound on the elements at w = 1; none if not positive

#include "elements.cuh"
#include "symbols.cuh"

namespace {

__device__ __forceinline__ float exponential(float x) {
  return is_half<OPERAND> ? exponential_approximate(x) : expf(x);
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

static_assert(SYMBOLS <= warp_lanes, "a lane a symbol");

// Softmaxes of the symbols as bits.
__device__ constexpr unsigned int softmax_bits() {
  unsigned int bits = 0;
  for (int s = 0; s < SYMBOLS; ++s) bits |= static_cast<unsigned int>(softmax_of[s]) << s;
  return bits;
}

__device__ __forceinline__ REAL clamped(REAL x, REAL bound) { return fmin(fmax(x, -bound), bound); }

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    logit_gradient(REAL* logits, long long pitch, const REAL* __restrict__ bias, long long column_count,
                   const long long* __restrict__ node, const int* __restrict__ frame,
                   const int* __restrict__ state, const long long* __restrict__ frame_sample,
                   const double* __restrict__ weight, const long long* __restrict__ columns,
                   const double* __restrict__ scores, const double* __restrict__ occupancy,
                   const double* __restrict__ normalizers, long long row_count, long long normalize,
                   double clamp) {
  constexpr int width = vector_width<OPERAND>;
  const long long row = blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y;
  if (row >= row_count) return;
  const int lane = threadIdx.x;
  REAL* const x = logits + row * pitch;
  OPERAND* const d = reinterpret_cast<OPERAND*>(x);
  const long long* const column = columns + state[row] * static_cast<long long>(SYMBOLS);
  const double* const score = scores + node[row] * SYMBOLS;
  const double* const gammas = occupancy + node[row] * SYMBOLS;
  // NaN as weight stays NaN, whatever it multiplies.
  const REAL w = static_cast<REAL>(weight[frame_sample[frame[row]]]);
  const REAL bound = static_cast<REAL>(clamp > 0 ? clamp : -minus_infinity());

  double gamma[2] = {}, best = minus_infinity();
  long long best_column = 0;
#pragma unroll
  for (int s = 0; s < SYMBOLS; ++s) {
    gamma[softmax_of[s]] += gammas[s];
    if (softmax_of[s] == 0 && has_column[s] && column[s] >= 0 && score[s] > best) {
      best = score[s];
      best_column = column[s];
    }
  }
  const bool has_softmax = normalize && (normalizers || best > minus_infinity());
  const REAL best_logit = bias ? x[best_column] + bias[best_column] : x[best_column];
  const double normalizer = normalizers ? normalizers[node[row]] : static_cast<double>(best_logit) - best;
  const REAL high = static_cast<REAL>(normalizer);
  const REAL low = static_cast<REAL>(normalizer - static_cast<double>(high));
  const REAL scale = static_cast<REAL>(gamma[0]);

  for_each_step<width, 1>(static_cast<int>(column_count), [&](int v, bool is_whole) {
    REAL values[width], offsets[width] = {};
    if (is_whole || v < column_count) {
      load(x + v, values);
      if (bias) load(bias + v, offsets);
    }
    __syncwarp();
    if (is_whole || v < column_count) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const REAL p = has_softmax ? exponential((values[i] + offsets[i] - high) - low) : REAL(0);
        values[i] = clamped(scale * p, bound) * w;
      }
      store(d + v, values);
    }
  });
  __syncwarp();

  if (lane >= SYMBOLS || column[lane] < 0) return;
  constexpr unsigned int softmaxes = softmax_bits();
  const double gamma_of_softmax = softmaxes >> lane & 1 ? gamma[1] : gamma[0];
  const double p = normalize ? exp(score[lane]) : 0.0;
  const REAL gradient = static_cast<REAL>(gamma_of_softmax * p - gammas[lane]);
  narrow(clamped(gradient, bound) * w, d[column[lane]]);
}
