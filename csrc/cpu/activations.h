// Activations of the joint network and their derivatives.
//
//   ACTIVATION   a name below
//   NUMBERS      values of its members, if it has any
//
// A derivative is given argument and value. It reads the value, which a chunk keeps, where that is enough,
// and else the argument; a compiler leaves out what it does not read.
#pragma once

#include "gaussian.h"

namespace {

using Reals = Vector<REAL>;

// NaN stays NaN.
inline Reals not_negative(Reals x) { return x < REAL(0) ? Reals{} : x; }

namespace activations {

struct tanh {
  Reals value(Reals x) const {
    // tanh |x| = −e / (e + 2) with e = exp(−2|x|) − 1, which loses nothing near zero. A difference, since
    // −e would be −0 where x is zero.
    constexpr Bits<REAL> sign_bit = Bits<REAL>{1} << (8 * sizeof(REAL) - 1);
    const Vector<Bits<REAL>> sign = bits_of<REAL>(x) & sign_bit;
    const Reals size = from_bits<REAL>(bits_of<REAL>(x) & ~sign_bit);
    const Reals e = exponential_less_one<REAL>(size > REAL(32) ? broadcast(REAL(-64)) : REAL(-2) * size);
    return from_bits<REAL>(bits_of<REAL>((REAL(0) - e) / (e + REAL(2))) | sign);
  }
  // No less than zero where dropout's rounding has put a saturated state beyond 1.
  Reals derivative(Reals, Reals y) const { return not_negative(REAL(1) - y * y); }
};

struct sigmoid {
  Reals value(Reals x) const {
    // exp of what is not positive cannot overflow.
    const Reals e = exponential<REAL>(x > REAL(0) ? -x : x);
    return (x < REAL(0) ? e : broadcast(REAL(1))) / (e + REAL(1));
  }
  Reals derivative(Reals, Reals y) const { return not_negative(y * (REAL(1) - y)); }
};

struct relu {
  Reals value(Reals x) const { return not_negative(x); }
  Reals derivative(Reals, Reals y) const { return y > REAL(0) ? broadcast(REAL(1)) : Reals{}; }
};

struct identity {
  Reals value(Reals x) const { return x; }
  Reals derivative(Reals, Reals) const { return broadcast(REAL(1)); }
};

struct leaky_relu {
  REAL negative_slope;

  Reals value(Reals x) const { return x * derivative(x, x); }
  Reals derivative(Reals x, Reals) const {
    return x > REAL(0) ? broadcast(REAL(1)) : broadcast(negative_slope);
  }
};

struct hardtanh {
  REAL least, greatest;

  Reals value(Reals x) const {
    return x < least ? broadcast(least) : x > greatest ? broadcast(greatest) : x;
  }
  Reals derivative(Reals x, Reals) const {
    return (x > least) & (x < greatest) ? broadcast(REAL(1)) : Reals{};
  }
};

// x · sigmoid(x)
struct silu {
  Reals value(Reals x) const { return x * sigmoid{}.value(x); }
  Reals derivative(Reals x, Reals) const {
    return sigmoid{}.value(x) * (REAL(1) + x * sigmoid{}.value(-x));
  }
};

// x · Φ(x)
struct gelu {
  Reals value(Reals x) const { return x * Gaussian<REAL>(x).distribution; }
  Reals derivative(Reals x, Reals) const {
    const Gaussian<REAL> gaussian(x);
    return gaussian.distribution + x * gaussian.density;
  }
};

}  // namespace activations

#ifndef NUMBERS
#define NUMBERS
#endif

using Activation = activations::ACTIVATION;

inline Reals activate(Reals x) { return Activation{NUMBERS}.value(x); }
inline Reals derivative(Reals x, Reals y) { return Activation{NUMBERS}.derivative(x, y); }

}  // namespace
