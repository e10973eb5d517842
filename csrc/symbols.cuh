// The symbols of a node.
//
//   SYMBOLS      how many there are, at most 32
//   SOFTMAXES       softmax of each: 0 with the tokens, 1 with the symbols of softmax 1 alone
//   HAS_COLUMN   whether each is a logit at all; where not, it is zero
#pragma once

#include "warp.cuh"

__device__ constexpr int softmax_of[SYMBOLS] = {SOFTMAXES};
__device__ constexpr bool has_column[SYMBOLS] = {HAS_COLUMN};
