// Rows of given logits to a chunk, as wide as sums, and rows of gradients back to their place:
//
//     values[r] = given[b, t, u − low_t]     and the other way round
//
//   given, its strides    in elements. [B, T, nodes of a frame, column_count]
//   samples               position of each in the batch. [S]
//   frame_sample, frame_index, low
//                         sample, t and first u of each packed frame. [F]
//   state_index           u of each packed state. [P]
//   frame, state          packed frame and state of each node. [R]
//   values                [R, pitch]

#include "elements.cuh"

namespace {

// The lane's columns, 32 apart, so that a warp's accesses lie side by side where the given ones do.
template <class From, class To, class Copy>
__device__ __forceinline__ void copy_row(const From* from, long long from_stride, To* to, long long to_stride,
                                         long long column_count, const Copy& copy) {
#pragma unroll 4
  for (long long v = threadIdx.x; v < column_count; v += warp_lanes) copy(from[v * from_stride], to[v * to_stride]);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    gather(const OPERAND* __restrict__ given, long long batch_stride, long long frame_stride,
           long long state_stride, long long column_stride, const long long* __restrict__ samples,
           const long long* __restrict__ frame_sample, const long long* __restrict__ frame_index,
           const long long* __restrict__ low, const long long* __restrict__ state_index,
           const int* __restrict__ frame, const int* __restrict__ state, REAL* __restrict__ values,
           long long pitch, long long column_count, long long row_count) {
  const long long row = blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y;
  if (row >= row_count) return;
  const int f = frame[row];
  const long long place = samples[frame_sample[f]] * batch_stride + frame_index[f] * frame_stride +
                          (state_index[state[row]] - low[f]) * state_stride;
  copy_row(given + place, column_stride, values + row * pitch, 1, column_count,
           [](OPERAND x, REAL& y) { y = widen(x); });
}

extern "C" __global__ void __launch_bounds__(256)
    scatter(OPERAND* __restrict__ given, long long batch_stride, long long frame_stride,
            long long state_stride, long long column_stride, const long long* __restrict__ samples,
            const long long* __restrict__ frame_sample, const long long* __restrict__ frame_index,
            const long long* __restrict__ low, const long long* __restrict__ state_index,
            const int* __restrict__ frame, const int* __restrict__ state, const OPERAND* __restrict__ values,
            long long pitch, long long column_count, long long row_count) {
  const long long row = blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y;
  if (row >= row_count) return;
  const int f = frame[row];
  const long long place = samples[frame_sample[f]] * batch_stride + frame_index[f] * frame_stride +
                          (state_index[state[row]] - low[f]) * state_stride;
  copy_row(values + row * pitch, 1, given + place, column_stride, column_count,
           [](OPERAND x, OPERAND& y) { y = x; });
}
