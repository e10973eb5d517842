// Hidden states of the joint network for packed node rows:
//
//     hidden[r, h] = act(encoder[frame[r], h] + predictor[state[r], h])
//
// The sum and the activation are REAL and rounded once, to the operand of the GEMM that follows.

#include "activations.h"
#include "threads.h"

extern "C" void hidden(long long threads, const REAL* encoder, const REAL* predictor,
                       const std::int32_t* frame, const std::int32_t* state, OPERAND* hidden, long long rows,
                       long long columns) {
  constexpr int width = lanes<REAL>;
  for_each_range(threads, rows, 16, [=](long long first, long long last) {
    for (long long r = first; r < last; ++r) {
      const REAL* const e = encoder + frame[r] * columns;
      const REAL* const p = predictor + state[r] * columns;
      OPERAND* const y = hidden + r * columns;
      long long h = 0;
      for (; h + width <= columns; h += width) store(y + h, activate(load(e + h) + load(p + h)));
      if (h < columns) {
        const long long rest = columns - h;
        store_first(y + h, activate(load_first(e + h, rest) + load_first(p + h, rest)), rest);
      }
    }
  });
}
