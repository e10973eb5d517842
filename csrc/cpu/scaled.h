// Numbers of any magnitude: mantissa · 2^exponent in two doubles. Sums of products of probabilities
// need no logarithm this way, and round once an operation however small they are.
#pragma once

#include "vectors.h"

namespace {

using Doubles = Vector<double>;
using Words = Vector<std::uint64_t>;

constexpr double ln2 = 0.6931471805599453;
constexpr double integer_shift = 0x1.8p52;  // added, it rounds to an integer
constexpr std::uint64_t fraction_mask = (std::uint64_t{1} << 52) - 1;

// A mantissa is in [1, 2), or in [0.7, 1.5) as a factor; zero has exponent −∞.
struct Scaled {
  Doubles mantissa, exponent;
};

inline Scaled zero() { return {broadcast(1.0), broadcast(-infinity)}; }

// e^x as a factor.
inline Scaled scaled_exponential(Doubles x) {
  const Reduced<double> reduced(x);
  // Beyond, one unit in the last place of k is more than the rest could be; and −∞ has no rest.
  const auto is_huge = magnitude<double>(x) > 0x1p40;
  const Doubles rest = is_huge ? Doubles{} : reduced.rest;
  return {series<double>(rest) * rest + 1.0, is_huge ? x * 1.4426950408889634 : reduced.k};
}

// 2^exponent for an integer exponent of no more than 1023; zero below every normal double, and for NaN.
inline Doubles power_of_two(Doubles exponent) {
  const Words bits = (bits_of<double>(exponent + (integer_shift + 1023)) & 0xfff) << 52;
  return exponent > -1022.0 ? from_bits<double>(bits) : Doubles{};
}

// Σ_i a_i · b_i
template <int COUNT>
inline Scaled sum_of_products(const Scaled (&a)[COUNT], const Scaled (&b)[COUNT]) {
  Doubles exponents[COUNT], largest = broadcast(-infinity);
  for (int i = 0; i < COUNT; ++i) {
    exponents[i] = a[i].exponent + b[i].exponent;
    largest = greater_of<double>(exponents[i], largest);
  }
  Doubles sum = {};
  for (int i = 0; i < COUNT; ++i) {
    sum += a[i].mantissa * b[i].mantissa * power_of_two(exponents[i] - largest);
  }
  const Words bits = bits_of<double>(sum);
  const Doubles exponent = from_bits<double>((bits >> 52) + 0x4330000000000000) - (0x1p52 + 1023);
  const Doubles mantissa = from_bits<double>((bits & fraction_mask) | bits_of<double>(broadcast(1.0)));
  const auto is_zero = sum == 0.0;
  const auto is_positive = sum > 0.0;  // neither where it is NaN
  return {is_positive ? mantissa : is_zero ? broadcast(1.0) : sum,
          is_positive ? largest + exponent : is_zero ? broadcast(-infinity) : largest};
}

inline Doubles logarithm(Scaled a) { return a.exponent * ln2 + logarithm(a.mantissa); }

// One double for both: exact where the exponent is small, and to 2^-38 where it is 10,000, as a
// logarithm would be.
inline Doubles pack(Scaled a) { return a.exponent + (a.mantissa - 1.0); }

inline Scaled unpack(Doubles packed) {
  const Doubles nearest = (packed + integer_shift) - integer_shift;
  const Doubles floor = nearest > packed ? nearest - 1.0 : nearest;
  const auto is_zero = packed == -infinity;
  return {is_zero ? broadcast(1.0) : 1.0 + (packed - floor), is_zero ? packed : floor};
}

}  // namespace
