// Activations of the joint network and their derivatives, which follow from their values.
// -DACTIVATION=tanh, relu, sigmoid or identity chooses one.
#pragma once

#include "elements.cuh"

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

__device__ __forceinline__ float activate_tanh(float x) {
  // Rounding to bfloat16 costs up to 2^-8 of the value, the instruction 2^-11.
  if constexpr (is_bfloat16<OPERAND>) return tanh_approximate(x);
  return tanhf(x);
}
__device__ __forceinline__ double activate_tanh(double x) { return tanh(x); }

__device__ __forceinline__ float activate_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double activate_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// Written so that NaN stays NaN.
__device__ __forceinline__ REAL activate_relu(REAL x) { return x < 0 ? REAL(0) : x; }
__device__ __forceinline__ REAL activate_identity(REAL x) { return x; }

__device__ __forceinline__ REAL derivative_tanh(REAL y) { return REAL(1) - y * y; }
__device__ __forceinline__ REAL derivative_sigmoid(REAL y) { return y * (REAL(1) - y); }
__device__ __forceinline__ REAL derivative_relu(REAL y) { return y > 0 ? REAL(1) : REAL(0); }
__device__ __forceinline__ REAL derivative_identity(REAL) { return REAL(1); }

#define RNNT_OP_JOIN(a, b) a##b
#define RNNT_OP_NAME(prefix, activation) RNNT_OP_JOIN(prefix, activation)

__device__ __forceinline__ REAL activate(REAL x) { return RNNT_OP_NAME(activate_, ACTIVATION)(x); }
__device__ __forceinline__ REAL derivative(REAL y) { return RNNT_OP_NAME(derivative_, ACTIVATION)(y); }
