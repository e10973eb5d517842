// Packed node rows: which encoder and predictor row each node of a group adds up. Nodes are packed
// (sample, t, u).
//
//   frame_sample             sample of each packed encoder row. [F]
//   frame_node, low, high    of each packed encoder row: node (t, u) is number frame_node + u, low ≤ u < high. [F]
//   first_state              first packed predictor row of each sample. [S]

#include <cstdint>

#include "threads.h"

extern "C" void node_rows(long long threads, const std::int64_t* frame_sample, const std::int64_t* frame_node,
                          const std::int64_t* low, const std::int64_t* high, const std::int64_t* first_state,
                          std::int32_t* frame, std::int32_t* state, long long frame_count) {
  for_each_range(threads, frame_count, 256, [=](long long begin, long long end) {
    for (long long f = begin; f < end; ++f) {
      const std::int64_t first = first_state[frame_sample[f]];
      for (std::int64_t u = low[f]; u < high[f]; ++u) {
        frame[frame_node[f] + u] = static_cast<std::int32_t>(f);
        state[frame_node[f] + u] = static_cast<std::int32_t>(first + u);
      }
    }
  });
}
