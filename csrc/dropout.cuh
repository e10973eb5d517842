// Dropout of hidden states. The GEMM's operand tells what was dropped: -0 stands for that, and every other
// zero is +0. So the backward pass reads the mask where it reads the states, and needs no second one.
#pragma once

#include "activations.cuh"
#include "philox.cuh"

// The largest magnitude that becomes zero where it is rounded to T.
template <class T>
constexpr float rounds_to_zero = 0.0f;
template <>
constexpr float rounds_to_zero<bfloat16> = 0x1p-134f;
template <>
constexpr float rounds_to_zero<float16> = 0x1p-25f;

__device__ __forceinline__ bool is_dropped(float x) { return __float_as_uint(x) == 0x80000000u; }
__device__ __forceinline__ bool is_dropped(double x) {
  return static_cast<unsigned long long>(__double_as_longlong(x)) == 0x8000000000000000ull;
}

// Of the hidden states of node (t, u) of sample b.
struct Dropout {
  uint2 key;
  unsigned int u, t, b, threshold;
  REAL scale;

  // COUNT consecutive columns, the first at a multiple of COUNT.
  template <int COUNT>
  __device__ __forceinline__ void apply(long long first, REAL (&values)[COUNT]) const {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const uint4 x = philox(make_uint4(static_cast<unsigned int>((first + i) / 4), u, t, b), key);
      // Two columns take half of a counter's words.
      const bool is_second_half = COUNT == 2 && first % 4 != 0;
      const unsigned int words[4] = {is_second_half ? x.z : x.x, is_second_half ? x.w : x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < (COUNT < 4 ? COUNT : 4); ++j) {
        REAL& value = values[i + j];
        value *= scale;
        if (fabs(value) <= rounds_to_zero<OPERAND>) value = 0;
        if (words[j] < threshold) value = -REAL(0);
      }
    }
  }
};

// act' · mask / (1 − p), from the activation's argument and the state as the operand has it.
__device__ __forceinline__ REAL derivative_with_dropout(REAL sum, REAL hidden, REAL kept, REAL scale) {
  return is_dropped(hidden) ? REAL(0) : derivative(sum, hidden * kept) * scale;
}
