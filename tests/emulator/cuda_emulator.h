// CUDA's words for g++, force-included before a kernel source: qualifiers, built-in variables and
// types, intrinsics. Collectives go to the scheduler, arithmetic to the C++ standard library.
//
// Unlike a GPU: __expf and the like are exact to float, the math library's last bits are the
// host's, and products and sums are not contracted to fma. NVRTC knows fewer names than the standard
// headers declare here, so that a source compiles here is no proof that it compiles there.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))  // after the standard headers, which use the word

#undef assert
[[noreturn]] inline void __assert_failed(const char* what) { emulator::trap(what); }
#define assert(condition) \
  ((condition) ? static_cast<void>(0) : __assert_failed("assertion `" #condition "' failed"))

constexpr int warpSize = 32;

// ---- vectors: alignment is what makes the compiler load them whole

#define EMULATOR_VECTOR2(T, name, alignment)            \
  struct alignas(alignment) name {                      \
    T x, y;                                             \
  };                                                    \
  inline name make_##name(T x, T y) { return {x, y}; }
#define EMULATOR_VECTOR4(T, name, alignment)                            \
  struct alignas(alignment) name {                                      \
    T x, y, z, w;                                                       \
  };                                                                    \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR2(int, int2, 8)
EMULATOR_VECTOR2(unsigned, uint2, 8)
EMULATOR_VECTOR2(float, float2, 8)
EMULATOR_VECTOR2(double, double2, 16)
EMULATOR_VECTOR2(long long, longlong2, 16)
EMULATOR_VECTOR2(unsigned long long, ulonglong2, 16)
EMULATOR_VECTOR4(int, int4, 16)
EMULATOR_VECTOR4(unsigned, uint4, 16)
EMULATOR_VECTOR4(float, float4, 16)
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// ---- collectives

inline void __syncthreads() { emulator::barrier(emulator::Operation::syncthreads, true); }
inline int __syncthreads_count(int predicate) {
  return emulator::barrier(emulator::Operation::syncthreads_count, predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return emulator::barrier(emulator::Operation::syncthreads_or, predicate != 0);
}
inline int __syncthreads_and(int predicate) {
  return emulator::barrier(emulator::Operation::syncthreads_and, predicate != 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::warp_collective(emulator::Operation::syncwarp, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      emulator::warp_collective(emulator::Operation::ballot, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(
      emulator::warp_collective(emulator::Operation::any, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(
      emulator::warp_collective(emulator::Operation::all, mask, predicate != 0));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(
      emulator::warp_collective(emulator::Operation::reduce_add, mask, value));
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value)));
}

namespace emulator {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T shuffle(Operation operation, unsigned mask, T value, unsigned operand, int width) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_collective(operation, mask, bits, operand, width, sizeof value);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

// Overloads for CUDA's own types, not a template: other types convert or are refused as on a GPU.
#define EMULATOR_SHUFFLES(T)                                                                       \
  inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {                       \
    const unsigned lane = static_cast<unsigned>(source);                                           \
    return emulator::shuffle(emulator::Operation::shuffle, mask, value, lane, width);              \
  }                                                                                                \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {                \
    return emulator::shuffle(emulator::Operation::shuffle_up, mask, value, delta, width);          \
  }                                                                                                \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {              \
    return emulator::shuffle(emulator::Operation::shuffle_down, mask, value, delta, width);        \
  }                                                                                                \
  inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {                \
    const unsigned lanes = static_cast<unsigned>(lane_mask);                                       \
    return emulator::shuffle(emulator::Operation::shuffle_xor, mask, value, lanes, width);         \
  }
EMULATOR_SHUFFLES(int)
EMULATOR_SHUFFLES(unsigned)
EMULATOR_SHUFFLES(long)
EMULATOR_SHUFFLES(unsigned long)
EMULATOR_SHUFFLES(long long)
EMULATOR_SHUFFLES(unsigned long long)
EMULATOR_SHUFFLES(float)
EMULATOR_SHUFFLES(double)

// ---- mathematics that C++ lacks

inline float normcdff(float x) { return static_cast<float>(0.5 * erfc(-x * 0.70710678118654752)); }
inline double normcdf(double x) {
  return static_cast<double>(0.5L * erfcl(-x * 0.707106781186547524400844L));
}

// ---- atomics, of other CPU threads' launches too

namespace emulator {

template <class T, class Function>
inline T update(T* address, Function function) {
  T old, replacement;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do replacement = function(old);
  while (!__atomic_compare_exchange(address, &old, &replacement, true, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED));
  return old;
}

template <class T>
inline T sum(T a, T b) {
  if constexpr (std::is_signed_v<T> && std::is_integral_v<T>) {  // wraps round
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  } else {
    return a + b;
  }
}

}  // namespace emulator

#define EMULATOR_ATOMIC(name, T, expression)                             \
  inline T name(T* address, T value) {                                   \
    return emulator::update(address, [&](T old) { return expression; }); \
  }
#define EMULATOR_ATOMICS(T)                                 \
  EMULATOR_ATOMIC(atomicAdd, T, emulator::sum(old, value))  \
  EMULATOR_ATOMIC(atomicMax, T, old < value ? value : old)  \
  EMULATOR_ATOMIC(atomicMin, T, value < old ? value : old)  \
  EMULATOR_ATOMIC(atomicExch, T, (static_cast<void>(old), value))
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicAdd, double, old + value)

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { emulator::trap("__trap()"); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// ---- bits

inline unsigned __float_as_uint(float x) { return emulator::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bit_cast<float>(x); }
inline int __float_as_int(float x) { return emulator::bit_cast<int>(x); }
inline float __int_as_float(int x) { return emulator::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
// A GPU's NaN is positive.
inline float __fdividef(float x, float y) {
  const float quotient = x / y;
  return quotient == quotient ? quotient : __uint_as_float(0x7fffffff);
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

// ---- arithmetic

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }

#define EMULATOR_EXTREMA(T, A, B)                                                         \
  inline T min(A a, B b) {                                                                \
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); \
  }                                                                                       \
  inline T max(A a, B b) {                                                                \
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a); \
  }
EMULATOR_EXTREMA(int, int, int)
EMULATOR_EXTREMA(unsigned, unsigned, unsigned)
EMULATOR_EXTREMA(unsigned, int, unsigned)
EMULATOR_EXTREMA(unsigned, unsigned, int)
EMULATOR_EXTREMA(long, long, long)
EMULATOR_EXTREMA(unsigned long, unsigned long, unsigned long)
EMULATOR_EXTREMA(long long, long long, long long)
EMULATOR_EXTREMA(unsigned long long, unsigned long long, unsigned long long)
EMULATOR_EXTREMA(unsigned long long, long long, unsigned long long)
EMULATOR_EXTREMA(unsigned long long, unsigned long long, long long)

// As CUDA: the number where the other is NaN.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return ::fmin(a, b); }
inline double max(double a, double b) { return ::fmax(a, b); }
inline double min(float a, double b) { return ::fmin(static_cast<double>(a), b); }
inline double min(double a, float b) { return ::fmin(a, static_cast<double>(b)); }
inline double max(float a, double b) { return ::fmax(static_cast<double>(a), b); }
inline double max(double a, float b) { return ::fmax(a, static_cast<double>(b)); }

#include "ptx.h"

// ---- what the generated unit says of each kernel

namespace emulator {

template <class P>
constexpr char letter() {
  if constexpr (std::is_pointer_v<P>) return 'p';
  if constexpr (std::is_integral_v<P>) return 'i';
  if constexpr (std::is_same_v<P, double>) return 'd';
  return '?';
}

template <auto function>
struct Entry;

template <class... P, void (*function)(P...)>
struct Entry<function> {
  static_assert(((sizeof(P) == 8) && ...), "every kernel parameter must have 8 bytes");

  static constexpr char parameters[] = {letter<P>()..., '\0'};

  static void invoke(void** arguments) { unpack(arguments, std::index_sequence_for<P...>()); }

  template <std::size_t... i>
  static void unpack([[maybe_unused]] void** arguments, std::index_sequence<i...>) {
    function(*static_cast<P*>(arguments[i])...);
  }
};

}  // namespace emulator
