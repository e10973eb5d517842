// Packed node rows: which encoder and predictor row each node of a group adds up. Nodes are packed
// (sample, t, u); a block writes those of one frame.
//
//   frame_sample             sample of each packed encoder row. [F]
//   frame_node, low, high    of each as well: node (t, u) is number frame_node + u, low ≤ u < high. [F]
//   first_state              first packed predictor row of each sample. [S]

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
