// What C++ cannot say: PTX instructions and dynamic shared memory. Nothing else in csrc is tied to
// an architecture, so this header alone is replaced where kernels run without a GPU.
#ifndef RNNT_OP_PTX_CUH
#define RNNT_OP_PTX_CUH

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 rnnt_op_dynamic_shared[];
  return reinterpret_cast<T*>(rnnt_op_dynamic_shared);
}

// Relative error up to 2^-11, in one instruction.
__device__ __forceinline__ float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^x in two instructions, with relative error 2^-23·(2 + |x|), and 0 below 2^-126.
__device__ __forceinline__ float exponential_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ unsigned short float_to_bfloat16(float x) {
#if __CUDA_ARCH__ >= 800
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const unsigned int bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

#endif
