// Gradient of the packed encoder and predictor rows from that of the hidden states:
//
//     d = d_hidden[r] · act'        encoder_sums[frame[r]] += d        predictor_sums[state[r]] += d
//
// act' follows from hidden[r], or from encoder[frame[r]] + predictor[state[r]]. A task takes some columns
// of all rows, in their order, so the sums do not depend on the threads. What a frame's rows add up to
// stays in registers.
//
//   encoder_sums, predictor_sums   null where unwanted
//   kept                           with -DDROPOUT=1: share of kept states, whose inverse is `scale`

#include "dropout.h"
#include "threads.h"

namespace {

// COUNT vectors of columns; the last may be part of one.
template <int COUNT>
struct Columns {
  long long first, count, pitch;

  template <class T>
  void load_row(const T* matrix, long long row, Reals (&x)[COUNT]) const {
    const T* const address = matrix + row * pitch + first;
    for (int i = 0; i < COUNT; ++i) {
      const long long rest = count - i * lanes<REAL>;
      x[i] = rest >= lanes<REAL> ? load(address + i * lanes<REAL>) : load_first(address + i * lanes<REAL>, rest);
    }
  }
  void add_to_row(REAL* matrix, long long row, const Reals (&x)[COUNT]) const {
    REAL* const address = matrix + row * pitch + first;
    Reals sum[COUNT];
    load_row(matrix, row, sum);
    for (int i = 0; i < COUNT; ++i) {
      const long long rest = count - i * lanes<REAL>;
      if (rest >= lanes<REAL>) {
        store(address + i * lanes<REAL>, sum[i] + x[i]);
      } else {
        store_first(address + i * lanes<REAL>, sum[i] + x[i], rest);
      }
    }
  }

  template <class Slope>
  void run(const REAL* d_hidden, const OPERAND* hidden, const PACKED* encoder, const PACKED* predictor,
           const std::int32_t* frame, const std::int32_t* state, REAL* encoder_sums, REAL* predictor_sums,
           long long rows, const Slope& slope) const {
    Reals of_frame[COUNT] = {};
    for (long long r = 0; r < rows; ++r) {
      Reals d[COUNT], y[COUNT], e[COUNT], p[COUNT];
      load_row(d_hidden, r, d);
      load_row(hidden, r, y);
      load_row(encoder, frame[r], e);
      load_row(predictor, state[r], p);
      for (int i = 0; i < COUNT; ++i) {
        d[i] *= slope(e[i] + p[i], y[i]);
        of_frame[i] += d[i];
      }
      if (predictor_sums) add_to_row(predictor_sums, state[r], d);
      if (r + 1 == rows || frame[r + 1] != frame[r]) {
        if (encoder_sums) add_to_row(encoder_sums, frame[r], of_frame);
        for (Reals& x : of_frame) x = Reals{};
      }
    }
  }
};

}  // namespace

extern "C" void joint_gradient(long long threads, const REAL* d_hidden, const OPERAND* hidden,
                               const PACKED* encoder, const PACKED* predictor, const std::int32_t* frame,
                               const std::int32_t* state,
#if DROPOUT
                               double kept, double scale,
#endif
                               REAL* encoder_sums, REAL* predictor_sums, long long joint_dim,
                               long long row_count) {
  constexpr int vectors = 4;
#if DROPOUT
  const auto slope = [kept = static_cast<REAL>(kept), scale = static_cast<REAL>(scale)](Reals x, Reals y) {
    return derivative_with_dropout(x, y, kept, scale);
  };
#else
  static constexpr auto slope = [](Reals x, Reals y) { return derivative(x, y); };
#endif
  for_each_range(threads, joint_dim, vectors * lanes<REAL>, [=](long long first, long long last) {
    const auto add = [=](auto part) {
      part.run(d_hidden, hidden, encoder, predictor, frame, state, encoder_sums, predictor_sums, row_count,
               slope);
    };
    if (last - first == vectors * lanes<REAL>) {
      add(Columns<vectors>{first, last - first, joint_dim});
    } else {
      for (long long h = first; h < last; h += lanes<REAL>) {
        add(Columns<1>{h, last - h < lanes<REAL> ? last - h : lanes<REAL>, joint_dim});
      }
    }
  });
}
