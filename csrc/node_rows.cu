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

#include "ptx.cuh"

// A block a sample.
extern "C" __global__ void __launch_bounds__(128)
    pack(const long long* __restrict__ samples, const long long* __restrict__ frames,
         const long long* __restrict__ states, const long long* __restrict__ first_frame,
         const long long* __restrict__ first_state, const long long* __restrict__ first_node,
         const long long* __restrict__ targets, long long max_labels, const long long* __restrict__ label_ranges,
         long long max_frames, long long* __restrict__ frame_sample, long long* __restrict__ frame_index,
         long long* __restrict__ low, long long* __restrict__ high, long long* __restrict__ frame_node,
         long long* __restrict__ state_sample, long long* __restrict__ state_index,
         long long* __restrict__ next_label) {
  const long long s = blockIdx.x, b = samples[s], count = states[s];
  for (long long u = threadIdx.x; u < count; u += blockDim.x) {
    const long long p = first_state[s] + u;
    state_sample[p] = s;
    state_index[p] = u;
    next_label[p] = u < count - 1 ? targets[b * max_labels + u] : NO_LABEL;
  }

  long long* const nodes = dynamic_shared<long long>();  // of this pass's frames. [blockDim.x]
  long long node = first_node[s];
  for (long long start = 0; start < frames[s]; start += blockDim.x) {
    const long long t = start + threadIdx.x, f = first_frame[s] + t;
    long long first = 0, last = count;
    if (t < frames[s]) {
      if (label_ranges) {
        const long long* const range = label_ranges + (b * max_frames + t) * 2;
        first = range[0];
        last = max(min(range[1], count), first);
      }
      frame_sample[f] = s;
      frame_index[f] = t;
      low[f] = first;
      high[f] = last;
    }
    if (!label_ranges) {
      if (t < frames[s]) frame_node[f] = node + t * count;
      continue;
    }
    nodes[threadIdx.x] = t < frames[s] ? last - first : 0;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 1  // unrolled, it spills on sm_120
      for (unsigned int i = 0; i < blockDim.x; ++i) {
        const long long here = nodes[i];
        nodes[i] = node;
        node += here;
      }
    }
    __syncthreads();
    if (t < frames[s]) frame_node[f] = nodes[threadIdx.x] - first;
  }
}

// A block a frame.
extern "C" __global__ void __launch_bounds__(128)
    node_rows(const long long* __restrict__ frame_sample, const long long* __restrict__ frame_node,
              const long long* __restrict__ low, const long long* __restrict__ high,
              const long long* __restrict__ first_state, int* __restrict__ frame, int* __restrict__ state) {
  const long long node = frame_node[blockIdx.x], last = high[blockIdx.x];
  const long long first = first_state[frame_sample[blockIdx.x]];
  for (long long u = low[blockIdx.x] + threadIdx.x; u < last; u += blockDim.x) {
    frame[node + u] = static_cast<int>(blockIdx.x);
    state[node + u] = static_cast<int>(first + u);
  }
}
