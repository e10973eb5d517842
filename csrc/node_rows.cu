// Packed node rows: which encoder and predictor row each node of a group adds up. Nodes are packed
// (sample, t, u); a block writes the U + 1 nodes of one frame.
//
//   frame_sample, frame_index         sample and t of each packed encoder row. [F]
//   first_node, first_state, states   first node, first packed predictor row and U + 1 of each sample. [S]

extern "C" __global__ void __launch_bounds__(128)
    node_rows(const long long* __restrict__ frame_sample, const long long* __restrict__ frame_index,
              const long long* __restrict__ first_node, const long long* __restrict__ first_state,
              const long long* __restrict__ states, int* __restrict__ frame, int* __restrict__ state) {
  const long long sample = frame_sample[blockIdx.x];
  const long long first = first_node[sample] + frame_index[blockIdx.x] * states[sample];
  for (long long u = threadIdx.x; u < states[sample]; u += blockDim.x) {
    frame[first + u] = static_cast<int>(blockIdx.x);
    state[first + u] = static_cast<int>(first_state[sample] + u);
  }
}
