// Vectors as wide as the machine's registers, in the compiler's own vector types: the same code for
// AVX-512, AVX2 and NEON.
//
//   REAL     type of arithmetic and sums: float, or double for double inputs
//   OPERAND  element type of GEMM operands and of logit gradients: float, double or bfloat16; of those of given
//            logits float16, too
//   LOGIT    element type of logits: REAL; of given ones their own
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T, int bytes = vector_bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

constexpr double infinity = __builtin_inf();

// What the functions below need to know of a floating-point type.
template <class T>
struct Format;

template <>
struct Format<float> {
  using Bits = std::uint32_t;
  static constexpr int fraction_bits = 23;
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr int terms = 7;  // of exp's series, whose rest is below 2^-27 for |x| ≤ ln 2 / 2
  static constexpr float least_exponent = -87.0f;
};

template <>
struct Format<double> {
  using Bits = std::uint64_t;
  static constexpr int fraction_bits = 52;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int terms = 13;  // as above, below 2^-57
  static constexpr double least_exponent = -708.0;
};

template <class T>
using Bits = typename Format<T>::Bits;

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

template <class T>
inline Vector<Bits<T>> bits_of(Vector<T> x) {
  return (Vector<Bits<T>>)x;
}

template <class T>
inline Vector<T> from_bits(Vector<Bits<T>> x) {
  return (Vector<T>)x;
}

// ---- memory. Addresses need no alignment.

inline Vector<float> load(const float* address) {
  Vector<float> x;
  std::memcpy(&x, address, sizeof x);
  return x;
}

inline Vector<double> load(const double* address) {
  Vector<double> x;
  std::memcpy(&x, address, sizeof x);
  return x;
}

typedef std::uint16_t HalfBits __attribute__((vector_size(vector_bytes / 2)));

inline Vector<float> load(const bfloat16* address) {
  HalfBits half;
  std::memcpy(&half, address, sizeof half);
  return from_bits<float>(__builtin_convertvector(half, Vector<std::uint32_t>) << 16);
}

// Numbers below 2^-14 are sums with ½, whose steps are theirs, 2^-24: no float here is denormal, and some
// programs have those flushed to zero.
inline Vector<float> load(const float16* address) {
  using V = Vector<std::uint32_t>;
  HalfBits half;
  std::memcpy(&half, address, sizeof half);
  const V bits = __builtin_convertvector(half, V), magnitude = bits & 0x7fff;
  const V shifted = (magnitude << 13) + (magnitude >= 0x7c00 ? V{} + (224u << 23) : V{} + (112u << 23));
  const V small = bits_of<float>(from_bits<float>(magnitude + 0x3f000000) - 0.5f);
  return from_bits<float>((magnitude < 0x400 ? small : shifted) | (bits & 0x8000) << 16);
}

inline void store(float* address, Vector<float> x) { std::memcpy(address, &x, sizeof x); }
inline void store(double* address, Vector<double> x) { std::memcpy(address, &x, sizeof x); }

// Both to the nearest, ties to even; NaN stays NaN. The instruction for bfloat16 takes what is no normal number
// for zero.
inline void store(bfloat16* address, Vector<float> x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
  const Vector<std::uint32_t> bits = bits_of<float>(x);
  const Vector<std::uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfBits half = __builtin_convertvector(x == x ? rounded : bits >> 16 | 0x40, HalfBits);
#endif
  std::memcpy(address, &half, sizeof half);
}

inline void store(float16* address, Vector<float> x) {
  using V = Vector<std::uint32_t>;
  const V bits = bits_of<float>(x), magnitude = bits & 0x7fffffff;
  const V normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const V small = bits_of<float>(from_bits<float>(magnitude) + 0.5f) - 0x3f000000;
  const V finite = magnitude < 0x38800000 ? small : normal;
  const V special = magnitude > 0x7f800000 ? V{} + 0x7e00 : V{} + 0x7c00;
  const V rounded = (magnitude < 0x477ff000 ? finite : special) | (bits >> 16 & 0x8000);
  const HalfBits half = __builtin_convertvector(rounded, HalfBits);
  std::memcpy(address, &half, sizeof half);
}

// The largest magnitude that they turn into zero.
template <class T>
constexpr float rounds_to_zero = 0.0f;
template <>
#if defined(__AVX512BF16__)
constexpr float rounds_to_zero<bfloat16> = 0x1.fffffcp-127f;
#else
constexpr float rounds_to_zero<bfloat16> = 0x1p-134f;
#endif

template <class T>
constexpr int elements_of_vector = lanes<T>;
template <>
constexpr int elements_of_vector<bfloat16> = lanes<float>;
template <>
constexpr int elements_of_vector<float16> = lanes<float>;

// The first `count` elements, zeros after them.
template <class T>
inline auto load_first(const T* address, long long count) {
  T block[elements_of_vector<T>] = {};
  std::memcpy(block, address, static_cast<std::size_t>(count) * sizeof(T));
  return load(block);
}

// Of elements that are `stride` apart.
template <class T>
inline auto load_first(const T* address, long long count, long long stride) {
  T block[elements_of_vector<T>] = {};
  for (long long i = 0; i < count; ++i) block[i] = address[i * stride];
  return load(block);
}

template <class T, class V>
inline void store_first(T* address, V x, long long count) {
  T block[elements_of_vector<T>];
  store(block, x);
  std::memcpy(address, block, static_cast<std::size_t>(count) * sizeof(T));
}

inline float widen(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float widen(float16 x) { return load_first(&x, 1)[0]; }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// ---- arithmetic. NaN in, NaN out.

template <class T>
inline Vector<T> greater_of(Vector<T> x, Vector<T> y) {
  return x > y ? x : y;
}

template <class T>
inline Vector<T> magnitude(Vector<T> x) {
  return x < T(0) ? -x : x;
}

// Lanes joined in pairs, a half of them with the other, until one is left.
template <class T, int bytes = vector_bytes, class Join>
inline T joined(typename VectorOf<T, bytes>::type x, Join join) {
  if constexpr (bytes == 2 * sizeof(T)) {
    return join(x[0], x[1]);
  } else {
    typename VectorOf<T, bytes / 2>::type halves[2];
    std::memcpy(halves, &x, sizeof x);
    return joined<T, bytes / 2>(join(halves[0], halves[1]), join);
  }
}

template <class T>
inline T sum_of_lanes(Vector<T> x) {
  return joined<T>(x, [](auto a, auto b) { return a + b; });
}

template <class T>
inline T greatest_lane(Vector<T> x) {
  return joined<T>(x, [](auto a, auto b) { return a > b ? a : b; });
}

// x = k·ln 2 + rest with an integer k and |rest| ≤ ln 2 / 2, for |x| below 2^(fraction bits − 2).
template <class T>
struct Reduced {
  Vector<T> shifted;  // k in its low bits
  Vector<T> k;
  Vector<T> rest;

  explicit Reduced(Vector<T> x) {
    constexpr T shift = static_cast<T>(Bits<T>{3} << (Format<T>::fraction_bits - 1));
    shifted = x * T(1.4426950408889634) + shift;
    k = shifted - shift;
    rest = (x - k * Format<T>::ln2_high) - k * Format<T>::ln2_low;
  }
  // Of x + low, for which x has not digits enough.
  Reduced(Vector<T> x, Vector<T> low) : Reduced(x + low) {
    rest = ((x - k * Format<T>::ln2_high) - k * Format<T>::ln2_low) + low;
  }
};

// Taylor's series of (e^x − 1) / x for |x| ≤ ln 2 / 2.
template <class T>
inline Vector<T> series(Vector<T> x) {
  constexpr double inverse_factorials[] = {
      1.0,           1.0,            1.0 / 2,         1.0 / 6,   1.0 / 24,
      1.0 / 120,     1.0 / 720,      1.0 / 5040,      1.0 / 40320, 1.0 / 362880,
      1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  Vector<T> sum = broadcast(T(inverse_factorials[Format<T>::terms]));
  for (int i = Format<T>::terms - 1; i > 0; --i) sum = sum * x + T(inverse_factorials[i]);
  return sum;
}

// e^x for a normal result.
template <class T>
inline Vector<T> exponential(const Reduced<T>& reduced) {
  const Vector<T> y = series<T>(reduced.rest) * reduced.rest + T(1);
  // 2^k; as a factor, since bits added to those of a NaN could make it a number.
  const Vector<T> scale =
      from_bits<T>(bits_of<T>(broadcast(T(1))) + (bits_of<T>(reduced.shifted) << Format<T>::fraction_bits));
  return y * scale;
}

// e^x for x up to 80, zero for x below `least`, which may be no less than where it is not a normal number.
template <class T>
inline Vector<T> exponential(Vector<T> x, T least = Format<T>::least_exponent) {
  const Vector<T> y = exponential(Reduced<T>(x));
  return x < least ? Vector<T>{} : y;
}

// e^x − 1 for −64 ≤ x ≤ 0, to a relative rounding unit or two.
template <class T>
inline Vector<T> exponential_less_one(Vector<T> x) {
  const Reduced<T> reduced(x);
  const Vector<T> one = broadcast(T(1));
  const Vector<T> scale =
      from_bits<T>(bits_of<T>(one) + (bits_of<T>(reduced.shifted) << Format<T>::fraction_bits));
  return scale * (series<T>(reduced.rest) * reduced.rest) + (scale - one);
}

// log x for normal x; NaN for infinity.
inline Vector<double> logarithm(Vector<double> x) {
  using V = Vector<double>;
  constexpr std::uint64_t root_half = 0x3fe6a09e00000000, fraction = (std::uint64_t{1} << 52) - 1;
  // x = 2^k · m with m in [√½, √2).
  const Vector<std::uint64_t> bits = bits_of<double>(x) - root_half;
  const V m = from_bits<double>((bits & fraction) + root_half);
  const V k = from_bits<double>(((bits + (std::uint64_t{1023} << 52)) >> 52) + 0x4330000000000000) -
              (0x1p52 + 1023);
  // log m = 2·artanh((m − 1) / (m + 1)); the series' rest is below 2^-60.
  const V s = (m - 1) / (m + 1), square = s * s;
  V sum = broadcast(1.0 / 21);
  for (int i = 19; i > 0; i -= 2) sum = sum * square + 1.0 / i;
  return k * Format<double>::ln2_high + (2 * s * sum + k * Format<double>::ln2_low) + (x - x);
}

}  // namespace
