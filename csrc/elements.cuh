// Element types and their movement 16 bytes at a time.
//
// REAL     logits and sums: float, or double for double inputs
// OPERAND  operands of GEMMs: hidden states, logit gradients
//
// A row of a matrix starts at a multiple of 16 bytes and is padded to one, so that the last vector
// of a row may be read and written whole.
#pragma once

#include "warp.cuh"

struct bfloat16 {
  unsigned short bits;
};

struct float16 {
  unsigned short bits;
};

__device__ __forceinline__ float widen(bfloat16 x) {
  return __uint_as_float(static_cast<unsigned int>(x.bits) << 16);
}
__device__ __forceinline__ float widen(float16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ void narrow(float x, bfloat16& y) { y.bits = float_to_bfloat16(x); }
__device__ __forceinline__ void narrow(float x, float16& y) { y.bits = float_to_half(x); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }

// Elements of T that fill 16 bytes.
template <class T>
constexpr int vector_width = 16 / static_cast<int>(sizeof(T));

// COUNT consecutive elements as REALs, in 16-byte loads where COUNT fills them. COUNT is a multiple
// of T's vector width, or T is so narrow that COUNT of them fill 8 bytes.
template <int COUNT, class T>
__device__ __forceinline__ void load(const T* address, REAL (&values)[COUNT]) {
  struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Block {
    T at[COUNT * sizeof(T) < 16 ? COUNT : vector_width<T>];
  };
  constexpr int width = sizeof(Block) / sizeof(T);
  Block blocks[COUNT / width];
#pragma unroll
  for (int i = 0; i < COUNT / width; ++i) blocks[i] = reinterpret_cast<const Block*>(address)[i];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = static_cast<REAL>(widen(blocks[i / width].at[i % width]));
}

template <int COUNT, class T>
__device__ __forceinline__ void store(T* address, const REAL (&values)[COUNT]) {
  constexpr int width = vector_width<T>;
  struct alignas(16) Block {
    T at[width];
  };
#pragma unroll
  for (int i = 0; i < COUNT / width; ++i) {
    Block block;
#pragma unroll
    for (int j = 0; j < width; ++j) narrow(values[i * width + j], block.at[j]);
    reinterpret_cast<Block*>(address)[i] = block;
  }
}

template <class T>
constexpr bool is_half = sizeof(T) == 2;

// A row of `columns` elements, `width` of them at a time for a lane and `in_flight` times for a warp
// in each step: calls step(first, is_whole), where `first` is the lane's first column and whole steps
// stay within the row for every lane.
template <int width, int in_flight, class Step>
__device__ __forceinline__ void for_each_step(int columns, const Step& step) {
  constexpr int advance = warp_lanes * width * in_flight;
  const int lane = threadIdx.x;
  int first = 0;
  for (; first + advance <= columns; first += advance) step(first + lane * width, true);
  if (first < columns) step(first + lane * width, false);
}
