// Activations of the joint network and their derivatives.
//
//   ACTIVATION   a name below
//   NUMBERS      values of its members, if it has any
//
// A derivative is given argument and value. It reads the value, which a chunk keeps, where that is enough,
// and else the argument (`reads_argument`); the compiler leaves out what it does not read.
#pragma once

#include "elements.cuh"

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16> = true;

__device__ __forceinline__ float exponential_of(float x) { return expf(x); }
__device__ __forceinline__ double exponential_of(double x) { return exp(x); }

// Φ(x), of the standard normal distribution.
__device__ __forceinline__ float normal_distribution(float x) { return normcdff(x); }
__device__ __forceinline__ double normal_distribution(double x) { return normcdf(x); }

// NaN stays NaN.
__device__ __forceinline__ REAL not_negative(REAL x) { return x < 0 ? REAL(0) : x; }

namespace activations {

struct tanh {
  static constexpr bool reads_argument = false;
  static __device__ __forceinline__ float of(float x) {
    // Rounding to bfloat16 costs up to 2^-8 of the value, the instruction 2^-11.
    if constexpr (is_bfloat16<OPERAND>) return tanh_approximate(x);
    return tanhf(x);
  }
  static __device__ __forceinline__ double of(double x) { return ::tanh(x); }

  __device__ __forceinline__ REAL value(REAL x) const { return of(x); }
  // No less than zero where dropout's rounding has put a saturated state beyond 1.
  __device__ __forceinline__ REAL derivative(REAL, REAL y) const { return not_negative(REAL(1) - y * y); }
};

struct sigmoid {
  static constexpr bool reads_argument = false;
  __device__ __forceinline__ REAL value(REAL x) const { return REAL(1) / (REAL(1) + exponential_of(-x)); }
  __device__ __forceinline__ REAL derivative(REAL, REAL y) const { return not_negative(y * (REAL(1) - y)); }
};

struct relu {
  static constexpr bool reads_argument = false;
  __device__ __forceinline__ REAL value(REAL x) const { return not_negative(x); }
  __device__ __forceinline__ REAL derivative(REAL, REAL y) const { return y > 0 ? REAL(1) : REAL(0); }
};

struct identity {
  static constexpr bool reads_argument = false;
  __device__ __forceinline__ REAL value(REAL x) const { return x; }
  __device__ __forceinline__ REAL derivative(REAL, REAL) const { return REAL(1); }
};

struct leaky_relu {
  static constexpr bool reads_argument = true;
  REAL negative_slope;

  __device__ __forceinline__ REAL value(REAL x) const { return x * derivative(x, x); }
  __device__ __forceinline__ REAL derivative(REAL x, REAL) const { return x > 0 ? REAL(1) : negative_slope; }
};

struct hardtanh {
  static constexpr bool reads_argument = true;
  REAL least, greatest;

  __device__ __forceinline__ REAL value(REAL x) const {
    return x < least ? least : x > greatest ? greatest : x;
  }
  __device__ __forceinline__ REAL derivative(REAL x, REAL) const {
    return x > least && x < greatest ? REAL(1) : REAL(0);
  }
};

// x · sigmoid(x)
struct silu {
  static constexpr bool reads_argument = true;
  __device__ __forceinline__ REAL value(REAL x) const { return x * sigmoid{}.value(x); }
  __device__ __forceinline__ REAL derivative(REAL x, REAL) const {
    return sigmoid{}.value(x) * (REAL(1) + x * sigmoid{}.value(-x));
  }
};

// x · Φ(x)
struct gelu {
  static constexpr bool reads_argument = true;
  __device__ __forceinline__ REAL value(REAL x) const { return x * normal_distribution(x); }
  __device__ __forceinline__ REAL derivative(REAL x, REAL) const {
    const REAL density = REAL(0.3989422804014327) * exponential_of(REAL(-0.5) * x * x);
    return normal_distribution(x) + x * density;
  }
};

}  // namespace activations

#ifndef NUMBERS
#define NUMBERS
#endif

using Activation = activations::ACTIVATION;

__device__ __forceinline__ REAL activate(REAL x) { return Activation{NUMBERS}.value(x); }
__device__ __forceinline__ REAL derivative(REAL x, REAL y) { return Activation{NUMBERS}.derivative(x, y); }
