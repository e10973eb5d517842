// Packed frames and states of a group, and which of them each node adds up. Frames are packed (sample, t),
// states (sample, u) and nodes (sample, t, u).
//
//   NO_LABEL                           next label of a sample's last state
//   samples                            position of each in the batch. [S]
//   frames, states                     T and U + 1 of each. [S]
//   first_frame, first_state           first packed frame and state of each. [S]
//   first_node                         first node of each, and the number of all. [S + 1]
//   targets                            [B, max_labels]
//   label_ranges                       of each frame: low, and high where that is at most U + 1; null: all states.
//                                      [B, max_frames, 2]
//   frame_sample, frame_index          sample and t of each packed frame. [F]
//   frame_node, low, high              of each as well: node (t, u) is number frame_node + u, low ≤ u < high. [F]
//   state_sample, state_index          sample and u of each packed state. [P]
//   next_label                         that it would emit. [P]
//   frame, state                       packed frame and state of each node. [N]

#include <algorithm>
#include <cstdint>

#include "threads.h"

extern "C" void pack(long long threads, const std::int64_t* samples, const std::int64_t* frames,
                     const std::int64_t* states, const std::int64_t* first_frame, const std::int64_t* first_state,
                     const std::int64_t* first_node, const std::int64_t* targets, long long max_labels,
                     const std::int64_t* label_ranges, long long max_frames, std::int64_t* frame_sample,
                     std::int64_t* frame_index, std::int64_t* low, std::int64_t* high, std::int64_t* frame_node,
                     std::int64_t* state_sample, std::int64_t* state_index, std::int64_t* next_label,
                     long long sample_count) {
  for_each_range(threads, sample_count, 16, [=](long long begin, long long end) {
    for (long long s = begin; s < end; ++s) {
      const std::int64_t b = samples[s];
      std::int64_t node = first_node[s];
      for (std::int64_t t = 0; t < frames[s]; ++t) {
        const std::int64_t f = first_frame[s] + t;
        const std::int64_t* const range = label_ranges ? label_ranges + (b * max_frames + t) * 2 : nullptr;
        frame_sample[f] = s;
        frame_index[f] = t;
        low[f] = range ? range[0] : 0;
        high[f] = range ? std::max(std::min(range[1], states[s]), range[0]) : states[s];
        frame_node[f] = node - low[f];
        node += high[f] - low[f];
      }
      for (std::int64_t u = 0; u < states[s]; ++u) {
        const std::int64_t p = first_state[s] + u;
        state_sample[p] = s;
        state_index[p] = u;
        next_label[p] = u < states[s] - 1 ? targets[b * max_labels + u] : NO_LABEL;
      }
    }
  });
}

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
