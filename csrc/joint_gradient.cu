// Gradient of the packed encoder (or predictor) rows from that of the hidden states:
//
//     sums[s] += Σ_{r: segment[r] = s} d_hidden[r] · act'(hidden[r])
//
// act' follows from the activation's value. Rows come sorted by segment: nodes are sorted by frame as
// they are, and `order` sorts them by state. The block of a segment's first row adds all its rows in
// that order, four in flight; the others have nothing to do. No atomics, so the sum is always the same.
//
//   segment  packed row that each position adds to, ascending. int32. [R]
//   order    row at each position, or null if that is the position itself. [R]
//   kept     with -DDROPOUT=1: share of kept states, whose inverse is `scale`

#include "dropout.cuh"

namespace {

// COUNT consecutive elements, in 16-byte loads, as they were read.
template <class T, int COUNT>
struct Loaded {
  struct alignas(16) Block {
    T at[vector_width<T>];
  };
  Block blocks[COUNT / vector_width<T>];

  __device__ __forceinline__ void read(const T* address) {
#pragma unroll
    for (int i = 0; i < COUNT / vector_width<T>; ++i) blocks[i] = reinterpret_cast<const Block*>(address)[i];
  }
  __device__ __forceinline__ REAL at(int i) const {
    return static_cast<REAL>(widen(blocks[i / vector_width<T>].at[i % vector_width<T>]));
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 1)
    joint_gradient(const REAL* __restrict__ d_hidden, long long d_hidden_pitch,
                   const OPERAND* __restrict__ hidden, long long hidden_pitch,
                   const int* __restrict__ segment, const long long* __restrict__ order,
#if DROPOUT
                   double kept, double scale,
#endif
                   REAL* __restrict__ sums, long long sums_pitch, long long joint_dim,
                   long long row_count) {
  constexpr int width = vector_width<OPERAND>;
  constexpr int in_flight = 4;
  const long long start = blockIdx.x;
  const int mine = segment[start];
  if (start > 0 && segment[start - 1] == mine) return;

  for (long long h = threadIdx.x * width; h < joint_dim; h += blockDim.x * width) {
    REAL total[width] = {};
    const long long last = row_count - 1;
    bool inside = true;
    for (long long position = start; inside; position += in_flight) {
      // No branch between the loads, so that all of them are in flight; where a row is not of this
      // segment, the segment's first takes its place.
      bool is_mine[in_flight];
      long long row[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
        const long long p = position + k < last ? position + k : last;
        is_mine[k] = (position + k <= last) & (segment[p] == mine);
        row[k] = order ? order[is_mine[k] ? p : start] : is_mine[k] ? p : start;
      }
      Loaded<REAL, width> gradient[in_flight];
      Loaded<OPERAND, width> value[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
        gradient[k].read(d_hidden + row[k] * d_hidden_pitch + h);
        value[k].read(hidden + row[k] * hidden_pitch + h);
      }
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
#if DROPOUT
          const REAL slope =
              derivative_with_dropout(value[k].at(i), static_cast<REAL>(kept), static_cast<REAL>(scale));
#else
          const REAL slope = derivative(value[k].at(i));
#endif
          const REAL sum = total[i] + gradient[k].at(i) * slope;
          total[i] = is_mine[k] ? sum : total[i];
        }
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
