// The standard normal distribution, to a few rounding units wherever its values are normal numbers.
#pragma once

#include "vectors.h"

namespace {

// e^(x²/2) · Φ(−x) = v · Σ_i coefficients[i] · s^i for x ≥ 0, where v = 5 / (x + 5) and s = 1 − 2v. The sum
// interpolates the left side over v, in Chebyshev's nodes of the x where e^(−x²/2) is not zero.
template <class T>
struct Tail;

template <>
struct Tail<float> {  // up to 13.3, to 2^-28
  static constexpr float coefficients[] = {
      0.15383861f,      -0.133076498f,    0.0990610847f,    -0.0627067666f,   0.0330047983f,   -0.0138214096f,
      0.00415548624f,   -0.000613966962f, -0.000162585389f, 0.00014080148f,   2.47658087e-05f};
};

template <>
struct Tail<double> {  // up to 37.8, to 2^-61
  static constexpr double coefficients[] = {
      0.15383860995001258,     -0.13307650057801138,    0.09906112319399521,     -0.062706631334257495,
      0.033004073234081346,    -0.013823727741375478,   0.0041590133598538824,   -0.00059867535237509613,
      -0.00015957387787930653, 0.00010897979855383115,  -1.1875161344538792e-05, -9.9524911915591814e-06,
      3.3363274385706414e-06,  7.9596065552092408e-07,  -5.5414300292987155e-07, -6.6913692674271016e-08,
      8.725718032518196e-08,   8.0336900820714424e-09,  -1.4027824022856964e-08, -1.7094161673283253e-09,
      2.159773130198257e-09,   4.4357090142976559e-10,  -2.324971718801766e-10,  -7.6363402207878263e-11};
};

template <class T>
struct Gaussian {
  Vector<T> density;       // e^(−x²/2) / √(2π)
  Vector<T> distribution;  // Φ(x)

  explicit Gaussian(Vector<T> x) {
    // Where e^(−x²/2) is zero, it is also for 40.
    const Vector<T> size = magnitude<T>(x) > T(40) ? broadcast(T(40)) : magnitude<T>(x);
    // x² would round, and e^(−x²/2) suffer; the square of half the digits does not.
    constexpr Bits<T> low_half = (Bits<T>{1} << (Format<T>::fraction_bits / 2 + 1)) - 1;
    const Vector<T> high = from_bits<T>(bits_of<T>(size) & ~low_half);
    const Vector<T> power = T(-0.5) * high * high, rest = T(-0.5) * (size - high) * (size + high);
    const Vector<T> y = exponential(Reduced<T>(power, rest));
    const Vector<T> e = power < Format<T>::least_exponent ? Vector<T>{} : y;
    // Not 1 − 2v, which would lose what a small x differs from zero by.
    const Vector<T> v = T(5) / (size + T(5)), s = T(2) * (size / (size + T(5))) - T(1);
    constexpr int count = sizeof Tail<T>::coefficients / sizeof(T);
    Vector<T> sum = broadcast(Tail<T>::coefficients[count - 1]);
    for (int i = count - 2; i >= 0; --i) sum = sum * s + Tail<T>::coefficients[i];
    density = e * T(0.3989422804014327);
    const Vector<T> tail = e * (v * sum);
    distribution = x < T(0) ? tail : T(1) - tail;
  }
};

}  // namespace
