// Activations of the joint network and their derivatives, which follow from their values.
// -DACTIVATION=tanh, relu, sigmoid or identity chooses one.
#pragma once

#include "vectors.h"

namespace {

using Reals = Vector<REAL>;

inline Reals activate_tanh(Reals x) {
  // tanh |x| = −e / (e + 2) with e = exp(−2|x|) − 1, which loses nothing near zero. A difference, since
  // −e would be −0 where x is zero.
  constexpr Bits<REAL> sign_bit = Bits<REAL>{1} << (8 * sizeof(REAL) - 1);
  const Vector<Bits<REAL>> sign = bits_of<REAL>(x) & sign_bit;
  const Reals magnitude = from_bits<REAL>(bits_of<REAL>(x) & ~sign_bit);
  const Reals e = exponential_less_one<REAL>(magnitude > REAL(32) ? broadcast(REAL(-64)) : REAL(-2) * magnitude);
  return from_bits<REAL>(bits_of<REAL>((REAL(0) - e) / (e + REAL(2))) | sign);
}

inline Reals activate_sigmoid(Reals x) {
  // exp of what is not positive cannot overflow.
  const Reals e = exponential<REAL>(x > REAL(0) ? -x : x);
  return (x < REAL(0) ? e : broadcast(REAL(1))) / (e + REAL(1));
}

// Written so that NaN stays NaN.
inline Reals activate_relu(Reals x) { return x < REAL(0) ? Reals{} : x; }
inline Reals activate_identity(Reals x) { return x; }

inline Reals derivative_tanh(Reals y) { return REAL(1) - y * y; }
inline Reals derivative_sigmoid(Reals y) { return y * (REAL(1) - y); }
inline Reals derivative_relu(Reals y) { return y > REAL(0) ? broadcast(REAL(1)) : Reals{}; }
inline Reals derivative_identity(Reals) { return broadcast(REAL(1)); }

#define RNNT_OP_JOIN(a, b) a##b
#define RNNT_OP_NAME(prefix, activation) RNNT_OP_JOIN(prefix, activation)

inline Reals activate(Reals x) { return RNNT_OP_NAME(activate_, ACTIVATION)(x); }
inline Reals derivative(Reals y) { return RNNT_OP_NAME(derivative_, ACTIVATION)(y); }

}  // namespace
