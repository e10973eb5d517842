// Philox4x32-10 (Salmon et al. 2011): four random words of each of COUNT counters (first + i, x, y, z),
// in order, under a key.
#pragma once

#include <cstdint>

namespace {

template <int COUNT, class Word>
inline void philox(std::uint32_t first, std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint64_t key,
                   Word* words) {
  for (int i = 0; i < COUNT; ++i) {
    // In 64 bits, as their products are: a compiler makes vectors of this loop, and does not have to
    // take them apart.
    std::uint64_t c0 = first + static_cast<std::uint32_t>(i), c1 = x, c2 = y, c3 = z;
    std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t a = 0xd2511f53u * c0, b = 0xcd9e8d57u * c2;
      c0 = (b >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(b);
      c2 = (a >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(a);
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
    words[4 * i] = static_cast<Word>(c0);
    words[4 * i + 1] = static_cast<Word>(c1);
    words[4 * i + 2] = static_cast<Word>(c2);
    words[4 * i + 3] = static_cast<Word>(c3);
  }
}

}  // namespace
