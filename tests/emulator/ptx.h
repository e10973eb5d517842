// The functions of csrc/ptx.cuh, whose include guard this defines, without a GPU's instructions.
#pragma once
#define RNNT_OP_PTX_CUH

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared_memory());
}

// tanh.approx.f32 has a relative error of up to 2^-11 (PTX ISA). So that tolerances are tested with
// one, each input has an error of its own, the same at each call, spread evenly over that range.
// -DEMULATOR_EXACT_TANH leaves it out.
inline float tanh_approximate(float x) {
  const float y = tanhf(x);
#ifdef EMULATOR_EXACT_TANH
  return y;
#else
  const unsigned hash = (__float_as_uint(x) ^ __float_as_uint(x) >> 15) * 0x9e3779b1u;
  const float error = static_cast<float>(hash >> 8) * 0x1p-23f - 1.0f;  // from -1 to 1
  return fminf(fmaxf(y * (1.0f + error * 0x1p-11f), -1.0f), 1.0f);
#endif
}

// ex2.approx.ftz.f32 of a rounded product: the instruction's error is up to 2^-22.
inline float exponential_approximate(float x) {
  const float exponent = x * 1.44269504f;
  const float y = static_cast<float>(exp2(static_cast<double>(exponent)) * (1.0 + 0x1p-23));
  return y < 0x1p-126f ? 0.0f : y;
}

// binary16 in a float's place: its exponent bias is 127 - 15 = 112 less, which a product corrects,
// subnormals included.
inline float half_to_float(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest even; NaN becomes 0x7fff, as on the hardware.
inline unsigned short float_to_half(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  unsigned rounded;
  if (magnitude < 0x38800000u) {  // below 2^-14: the float unit rounds to a multiple of 2^-24
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {
    rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    if (rounded > 0x7c00u) rounded = 0x7c00u;
  }
  return static_cast<unsigned short>(sign | rounded);
}

inline unsigned short float_to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Cache hints do not change values.
inline uint4 load_streaming(const uint4* address) { return *address; }
inline void store_streaming(uint4* address, uint4 value) { *address = value; }
