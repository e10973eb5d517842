// Gradient of the packed encoder (or predictor) rows from that of the hidden states:
//
//     sums[s] += Σ_{r: segment[r] = s} d_hidden[r] · act'(hidden[r])
//
// act' follows from the activation's value. Rows come sorted by segment: nodes are sorted by frame as
// they are, and `order` sorts them by state. The block of a segment's first row adds all its rows in
// that order, four in flight; the others have nothing to do. No atomics, so the sum is always the same.
//
//   segment  packed row that each position adds to, ascending. int32. [rows]
//   order    row at each position, or null if that is the position itself. [rows]

#include "activations.cuh"

extern "C" __global__ void __launch_bounds__(256)
    joint_gradient(const REAL* __restrict__ d_hidden, long long d_hidden_pitch,
                   const OPERAND* __restrict__ hidden, long long hidden_pitch,
                   const int* __restrict__ segment, const long long* __restrict__ order,
                   REAL* __restrict__ sums, long long sums_pitch, long long columns, long long rows) {
  constexpr int width = vector_width<OPERAND>;
  constexpr int in_flight = 4;
  const long long start = blockIdx.x;
  const int mine = segment[start];
  if (start > 0 && segment[start - 1] == mine) return;

  for (long long h = threadIdx.x * width; h < columns; h += blockDim.x * width) {
    REAL total[width] = {};
    bool inside = true;
    for (long long position = start; inside; position += in_flight) {
      REAL gradient[in_flight][width], value[in_flight][width];
      bool is_mine[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
        is_mine[k] = position + k < rows && segment[position + k] == mine;
        if (!is_mine[k]) continue;
        const long long row = order ? order[position + k] : position + k;
        load(d_hidden + row * d_hidden_pitch + h, gradient[k]);
        load(hidden + row * hidden_pitch + h, value[k]);
      }
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
        if (!is_mine[k]) continue;
#pragma unroll
        for (int i = 0; i < width; ++i) total[i] += gradient[k][i] * derivative(value[k][i]);
      }
      inside = is_mine[in_flight - 1];
    }
    REAL* const sum = sums + mine * sums_pitch + h;
    REAL old[width];
    load(sum, old);
#pragma unroll
    for (int i = 0; i < width; ++i) total[i] += old[i];
    store(sum, total);
  }
}
