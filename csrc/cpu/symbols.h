// The symbols of a node.
//
//   SYMBOLS      how many there are
//   SOFTMAXES       softmax of each: 0 with the tokens, 1 with the symbols of softmax 1 alone
//   HAS_COLUMN   whether each is a logit at all; where not, it is zero
//   NO_LABEL, ZERO_LOGIT   in place of a symbol's column: there is no such symbol; its logit is 0
#pragma once

namespace {

constexpr int softmax_of[SYMBOLS] = {SOFTMAXES};
constexpr bool has_column[SYMBOLS] = {HAS_COLUMN};

}  // namespace
