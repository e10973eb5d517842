// Rows of logits: where they lie, one after the other or in a caller's tensor at frame and state, and their
// elements.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

// Frame's place plus state's place, in elements; with null places, a pitch apart.
struct Places {
  long long pitch;
  const std::int32_t* frame;
  const std::int32_t* state;
  const std::int64_t* of_frame;
  const std::int64_t* of_state;

  long long operator()(long long row) const {
    return of_frame ? of_frame[frame[row]] + of_state[state[row]] : row * pitch;
  }
};

inline REAL logit(const LOGIT* row, long long stride, const LOGIT* bias, long long column) {
  const REAL x = widen(row[column * stride]);
  return bias ? x + widen(bias[column]) : x;
}

}  // namespace
