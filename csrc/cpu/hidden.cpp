// Hidden states of the joint network for packed node rows:
//
//     hidden[r, h] = act(encoder[frame[r], h] + predictor[state[r], h])
//
// The sum and the activation are REAL and rounded once, to the operand of the GEMM that follows.
// With -DDROPOUT=1 some states are zero instead, and the others grow by `scale`.
//
//   samples       position of each of the group's samples in the batch
//   frame_sample  which of these an encoder row belongs to, and frame_index its t
//   state_index   u of each predictor row

#include "dropout.h"
#include "threads.h"

extern "C" void hidden(long long threads, const PACKED* encoder, const PACKED* predictor, long long packed_pitch,
                       const std::int32_t* frame, const std::int32_t* state,
#if DROPOUT
                       const std::int64_t* samples, const std::int64_t* frame_sample,
                       const std::int64_t* frame_index, const std::int64_t* state_index,
                       const std::uint64_t* seed, std::uint64_t threshold, double scale,
#endif
                       OPERAND* hidden, long long hidden_pitch, long long row_count,
                       long long joint_dim) {
  constexpr int width = lanes<REAL>;
  for_each_range(threads, row_count, 16, [=](long long first, long long last) {
    for (long long r = first; r < last; ++r) {
      const PACKED* const e = encoder + frame[r] * packed_pitch;
      const PACKED* const p = predictor + state[r] * packed_pitch;
      OPERAND* const y = hidden + r * hidden_pitch;
#if DROPOUT
      Dropout drop = {*seed,
                      static_cast<std::uint32_t>(state_index[state[r]]),
                      static_cast<std::uint32_t>(frame_index[frame[r]]),
                      static_cast<std::uint32_t>(samples[frame_sample[frame[r]]]),
                      static_cast<std::uint32_t>(threshold),
                      static_cast<REAL>(scale)};
#else
      const auto drop = [](Reals values, long long) { return values; };
#endif
      long long h = 0;
      for (; h + width <= joint_dim; h += width) store(y + h, drop(activate(load(e + h) + load(p + h)), h));
      if (h < joint_dim) {
        const long long rest = joint_dim - h;
        store_first(y + h, drop(activate(load_first(e + h, rest) + load_first(p + h, rest)), h), rest);
      }
    }
  });
}
