// Philox4x32-10 (Salmon et al. 2011): four random words of a counter under a key.
#pragma once

__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned long long a = 0xd2511f53ull * counter.x, b = 0xcd9e8d57ull * counter.z;
    const unsigned int a_high = static_cast<unsigned int>(a >> 32), a_low = static_cast<unsigned int>(a);
    const unsigned int b_high = static_cast<unsigned int>(b >> 32), b_low = static_cast<unsigned int>(b);
    counter = make_uint4(b_high ^ counter.y ^ key.x, b_low, a_high ^ counter.w ^ key.y, a_low);
    key.x += 0x9e3779b9u;
    key.y += 0xbb67ae85u;
  }
  return counter;
}
