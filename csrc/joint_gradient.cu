// Gradient of the packed encoder (or predictor) rows from that of the hidden states:
//
//     sums[s] += Σ_{r: segment[r] = s} d_hidden[r] · act'
//
// act' follows from hidden[r], or from encoder[frame[r]] + predictor[state[r]]. Rows come sorted by
// segment: nodes are sorted by frame as they are, and `order` sorts them by state. The block of a
// segment's first row adds all its rows in that order, some in flight; the others have nothing to do. No
// atomics, so the sum is always the same.
//
//   PACKED   element type of the packed encoder and predictor rows
//   frame    int32, state int32. [R]
//   segment  packed row that each position adds to, ascending. int32. [R]
//   order    row at each position, or null if that is the position itself. [R]
//   kept     with -DDROPOUT=1: share of kept states, whose inverse is `scale`

#include "dropout.cuh"

namespace {

// COUNT consecutive elements, in 16-byte loads where they fill one, as they were read.
template <class T, int COUNT>
struct Loaded {
  static constexpr int width = COUNT < vector_width<T> ? COUNT : vector_width<T>;
  struct alignas(width * sizeof(T)) Block {
    T at[width];
  };
  Block blocks[COUNT / width];

  __device__ __forceinline__ void read(const T* address) {
#pragma unroll
    for (int i = 0; i < COUNT / width; ++i) blocks[i] = reinterpret_cast<const Block*>(address)[i];
  }
  __device__ __forceinline__ REAL at(int i) const {
    return static_cast<REAL>(widen(blocks[i / width].at[i % width]));
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 2)
    joint_gradient(const REAL* __restrict__ d_hidden, long long d_hidden_pitch,
                   const OPERAND* __restrict__ hidden, long long hidden_pitch,
                   const PACKED* __restrict__ encoder, const PACKED* __restrict__ predictor,
                   long long packed_pitch, const int* __restrict__ frame, const int* __restrict__ state,
                   const int* __restrict__ segment, const long long* __restrict__ order,
#if DROPOUT
                   double kept, double scale,
#endif
                   REAL* __restrict__ sums, long long sums_pitch, long long joint_dim,
                   long long row_count) {
  constexpr int width = vector_width<OPERAND>;
  // Wide rows that have to be read fill the registers.
  constexpr int in_flight = Activation::reads_argument && sizeof(PACKED) > sizeof(OPERAND) ? 2 : 4;
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
      Loaded<PACKED, width> encoded[in_flight], predicted[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
        gradient[k].read(d_hidden + row[k] * d_hidden_pitch + h);
        value[k].read(hidden + row[k] * hidden_pitch + h);
        encoded[k].read(encoder + frame[row[k]] * packed_pitch + h);
        predicted[k].read(predictor + state[row[k]] * packed_pitch + h);
      }
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const REAL x = encoded[k].at(i) + predicted[k].at(i), y = value[k].at(i);
#if DROPOUT
          const REAL slope = derivative_with_dropout(x, y, static_cast<REAL>(kept), static_cast<REAL>(scale));
#else
          const REAL slope = derivative(x, y);
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
