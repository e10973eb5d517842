// Packed node rows: which encoder and predictor row each node of a group adds up. Nodes are packed
// (sample, t, u).
//
//   frame_sample, frame_index         sample and t of each packed encoder row. [F]
//   first_node, first_state, states   first node, first packed predictor row and U + 1 of each sample. [S]

#include <cstdint>

#include "threads.h"

extern "C" void node_rows(long long threads, const std::int64_t* frame_sample, const std::int64_t* frame_index,
                          const std::int64_t* first_node, const std::int64_t* first_state,
                          const std::int64_t* states, std::int32_t* frame, std::int32_t* state,
                          long long frames) {
  for_each_range(threads, frames, 256, [=](long long first, long long last) {
    for (long long f = first; f < last; ++f) {
      const std::int64_t sample = frame_sample[f], width = states[sample];
      const std::int64_t start = first_node[sample] + frame_index[f] * width;
      for (std::int64_t u = 0; u < width; ++u) {
        frame[start + u] = static_cast<std::int32_t>(f);
        state[start + u] = static_cast<std::int32_t>(first_state[sample] + u);
      }
    }
  });
}
