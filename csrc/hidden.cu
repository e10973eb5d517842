// Hidden states of the joint network for packed node rows:
//
//     hidden[r, h] = act(encoder[frame[r], h] + predictor[state[r], h])
//
// A warp computes a row. Neighbouring rows share their encoder row, which stays in L1; the sum and
// the activation are REAL and rounded once, to the operand of the GEMM that follows. With -DDROPOUT=1
// some states are zero instead, and the others grow by `scale`.
//
//   PACKED         element type of the packed encoder and predictor rows
//   frame         int32, state int32. [R]
//   samples       position of each of the group's samples in the batch
//   frame_sample  which of these an encoder row belongs to, and frame_index its t
//   state_index   u of each predictor row

#include "dropout.cuh"

extern "C" __global__ void __launch_bounds__(256)
    hidden(const PACKED* __restrict__ encoder, const PACKED* __restrict__ predictor, long long packed_pitch,
           const int* __restrict__ frame, const int* __restrict__ state,
#if DROPOUT
           const long long* __restrict__ samples, const long long* __restrict__ frame_sample,
           const long long* __restrict__ frame_index, const long long* __restrict__ state_index,
           const long long* __restrict__ seed, long long threshold, double scale,
#endif
           OPERAND* __restrict__ hidden, long long hidden_pitch, long long row_count,
           long long joint_dim) {
  constexpr int width = vector_width<OPERAND>;
  const long long row = blockIdx.x * static_cast<long long>(blockDim.y) + threadIdx.y;
  if (row >= row_count) return;
  const PACKED* const encoder_row = encoder + frame[row] * packed_pitch;
  const PACKED* const predictor_row = predictor + state[row] * packed_pitch;
  OPERAND* const hidden_row = hidden + row * hidden_pitch;
#if DROPOUT
  const Dropout dropout = {
      make_uint2(static_cast<unsigned int>(*seed), static_cast<unsigned int>(*seed >> 32)),
      static_cast<unsigned int>(state_index[state[row]]),
      static_cast<unsigned int>(frame_index[frame[row]]),
      static_cast<unsigned int>(samples[frame_sample[frame[row]]]),
      static_cast<unsigned int>(threshold),
      static_cast<REAL>(scale)};
#endif

  // Two steps in flight, except for doubles, whose functions take the registers.
#pragma unroll(sizeof(REAL) == sizeof(double) ? 1 : 2)
  for (long long h = threadIdx.x * width; h < joint_dim; h += warp_lanes * width) {
    REAL e[width], p[width], values[width];
    load(encoder_row + h, e);
    load(predictor_row + h, p);
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = activate(e[i] + p[i]);
#if DROPOUT
    dropout.apply(h, values);
#endif
    store(hidden_row + h, values);
  }
}
