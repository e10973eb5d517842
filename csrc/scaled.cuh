// Numbers of any magnitude: mantissa · 2^exponent in two doubles. Sums of products of probabilities
// need no logarithm this way, and round once an operation however small they are.
#pragma once

#include "warp.cuh"

// Added to a double up to 2^50, makes an integer of it, which the sum's last bits are.
constexpr double integers = 0x1.8p52;
constexpr double ln2 = 0.6931471805599453;

// The mantissa is in [1, 2) if normalized, in [0.7, 1.5) as a factor; zero has exponent −∞.
struct alignas(16) Scaled {
  double mantissa, exponent;
};

__device__ __forceinline__ Scaled zero() { return {1.0, minus_infinity()}; }
__device__ __forceinline__ Scaled one() { return {1.0, 0.0}; }

// 1 / n!, in constant memory, which instructions read operands from.
__constant__ double inverse_factorials[] = {
    1.0,          1.0,           1.0 / 2,        1.0 / 6,          1.0 / 24,
    1.0 / 120,    1.0 / 720,     1.0 / 5040,     1.0 / 40320,      1.0 / 362880,
    1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

// e^x as a factor. Straight code, so that it is computed beside what does not depend on it.
__device__ __forceinline__ Scaled exponential(double x) {
  constexpr double ln2_high = 0x1.62e42fefa39efp-1, ln2_low = 0x1.abc9e3b39803fp-56;
  const double k = fma(x, 1.4426950408889634, integers) - integers;
  double f = fma(-k, ln2_low, fma(-k, ln2_high, x));
  // Beyond, one unit in the last place of k is more than f could be; and −∞ has no f.
  if (fabs(x) > 0x1p40) f = 0.0;
  // Taylor's series, 1 + f·(…): its remainder is below 2^-57 for |f| up to ln 2 / 2. Terms are added in
  // pairs, and pairs of these, so that few steps depend on each other.
  const double f2 = f * f, f4 = f2 * f2;
  const auto pair = [&](int i) { return fma(f, inverse_factorials[i + 1], inverse_factorials[i]); };
  const double from_9 = fma(f4, inverse_factorials[13], fma(f2, pair(11), pair(9)));
  const double from_5 = fma(f4, from_9, fma(f2, pair(7), pair(5)));
  const double from_1 = fma(f4, from_5, fma(f2, pair(3), pair(1)));
  return {fma(f, from_1, 1.0), k};
}

// 2^exponent for an integer that is no more than 0; less than every double for NaN, too.
__device__ __forceinline__ double power_of_two(double exponent) {
  // The sum's last bits are the exponent's field of the power.
  const long long bits = __double_as_longlong(exponent + (integers + 1023.0)) << 52;
  return exponent > -1022.0 ? __longlong_as_double(bits) : 0.0;
}

// Σ_i a_i · b_i, not normalized: its mantissa is between the least of the products' and the sum of them.
// That is exact to rounding all the same, as long as mantissas stay within 2^±500.
template <int COUNT>
__device__ __forceinline__ Scaled sum_of_products(const Scaled (&a)[COUNT], const Scaled (&b)[COUNT]) {
  double exponents[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) exponents[i] = a[i].exponent + b[i].exponent;
  double largest = exponents[0];
#pragma unroll
  for (int i = 1; i < COUNT; ++i) largest = exponents[i] > largest ? exponents[i] : largest;
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    sum = fma(a[i].mantissa * b[i].mantissa, power_of_two(exponents[i] - largest), sum);
  }
  return {sum, largest};
}

// The same number with a mantissa in [1, 2), or NaN. Zero's mantissa is 1, as in `zero`.
__device__ __forceinline__ Scaled normalized(Scaled a) {
  const long long bits = __double_as_longlong(a.mantissa);
  const long long fraction = (1ll << 52) - 1;
  const double mantissa = __longlong_as_double((bits & fraction) | 1023ll << 52);
  return {isnan(a.mantissa) ? a.mantissa : mantissa,
          a.exponent + (__longlong_as_double(bits >> 52 | 0x433ll << 52) - (0x1p52 + 1023.0))};
}

__device__ __forceinline__ double logarithm(Scaled a) { return fma(a.exponent, ln2, log(a.mantissa)); }

// One double for both: exact where the exponent is small, and to 2^-38 where it is 10,000, as a
// logarithm would be.
__device__ __forceinline__ double pack(Scaled a) { return a.exponent + (a.mantissa - 1.0); }

__device__ __forceinline__ Scaled unpack(double packed) {
  const double exponent = floor(packed);
  return {packed == minus_infinity() ? 1.0 : 1.0 + (packed - exponent), exponent};
}
