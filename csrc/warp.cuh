// What every kernel may need: the size of a warp, and a number that NVRTC's language lacks.
#pragma once

#include "ptx.cuh"

constexpr int warp_lanes = 32;
constexpr unsigned int all_lanes = 0xffffffffu;

__device__ __forceinline__ double minus_infinity() {
  return __longlong_as_double(static_cast<long long>(0xfff0000000000000ull));
}
