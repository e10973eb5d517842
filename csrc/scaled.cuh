// Numbers of any magnitude: mantissa · 2^exponent in two doubles. Sums of products of probabilities
// need no logarithm this way, and round once an operation however small they are.
#pragma once

#include "warp.cuh"

constexpr double ln2 = 0.6931471805599453;

// The mantissa is in [1, 2), or in [0.7, 1.5) as a factor; zero has exponent −∞.
struct alignas(16) Scaled {
  double mantissa, exponent;
};

__device__ __forceinline__ Scaled zero() { return {1.0, minus_infinity()}; }
__device__ __forceinline__ Scaled one() { return {1.0, 0.0}; }

// e^x as a factor. Straight code, so that it is computed beside what does not depend on it.
__device__ __forceinline__ Scaled exponential(double x) {
  constexpr double ln2_high = 0x1.62e42fefa39efp-1, ln2_low = 0x1.abc9e3b39803fp-56;
  const double k = rint(x * 1.4426950408889634);
  double f = fma(-k, ln2_low, fma(-k, ln2_high, x));
  // Beyond, one unit in the last place of k is more than f could be; and −∞ has no f.
  if (fabs(x) > 0x1p40) f = 0.0;
  // Taylor's series: its remainder is below 2^-57 for |f| up to ln 2 / 2.
  constexpr double inverse_factorials[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
      1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
      1.0 / 6,          1.0 / 2,         1.0,            1.0};
  double series = inverse_factorials[0];
#pragma unroll
  for (int i = 1; i < 14; ++i) series = fma(series, f, inverse_factorials[i]);
  return {series, k};
}

// 2^exponent for an exponent that is no more than 0; less than every double for NaN, too.
__device__ __forceinline__ double power_of_two(double exponent) {
  if (!(exponent > -1022.0)) return 0.0;
  return __longlong_as_double(static_cast<long long>(static_cast<int>(exponent) + 1023) << 52);
}

// Σ_i a_i · b_i
template <int COUNT>
__device__ __forceinline__ Scaled sum_of_products(const Scaled (&a)[COUNT], const Scaled (&b)[COUNT]) {
  double exponents[COUNT], largest = minus_infinity();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    exponents[i] = a[i].exponent + b[i].exponent;
    largest = fmax(largest, exponents[i]);
  }
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    sum = fma(a[i].mantissa * b[i].mantissa, power_of_two(exponents[i] - largest), sum);
  }
  if (!(sum > 0.0)) return {sum == 0.0 ? 1.0 : sum, sum == 0.0 ? minus_infinity() : largest};
  const long long bits = __double_as_longlong(sum);
  const long long fraction = (1ll << 52) - 1;
  return {__longlong_as_double((bits & fraction) | 1023ll << 52),
          largest + static_cast<double>(static_cast<int>(bits >> 52) - 1023)};
}

__device__ __forceinline__ double logarithm(Scaled a) { return fma(a.exponent, ln2, log(a.mantissa)); }

// One double for both: exact where the exponent is small, and to 2^-38 where it is 10,000, as a
// logarithm would be.
__device__ __forceinline__ double pack(Scaled a) { return a.exponent + (a.mantissa - 1.0); }

__device__ __forceinline__ Scaled unpack(double packed) {
  const double exponent = floor(packed);
  return {packed == minus_infinity() ? 1.0 : 1.0 + (packed - exponent), exponent};
}
