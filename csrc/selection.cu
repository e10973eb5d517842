// Selection of the nodes that the backward pass keeps: those of largest gradient mass
//
//     c = γ_0·(1 − Σ_{s in softmax 0} p_s) + Σ_s |γ_g(s)·p_s − γ_s|
//     γ_g = Σ_{s in softmax g} γ_s,  p_s = exp(score_s)
//
// (where the last sum leaves out symbols without a column) such that the others carry at most
// `tolerance` of their sample's Σc. A histogram of c over quarter octaves finds the threshold without
// sorting: the top bits of a positive float64 are its exponent and quarter octave. Bins add integers (a
// mass in units of 2^-31 of its octave), so atomics may come in any order and the result is the same.
// Kept nodes are then written in ascending order: count by block, scan, write.
//
//   BINS            bins of a sample's histogram, from 2^-256 on; a multiple of 128
//   NODES_OF_WARP   nodes that a warp counts and writes, a multiple of 32
//   bin        quarter octave of each node, −1 for mass zero. int16. [N]
//   threshold  a node is kept where its bin is at least its sample's threshold. [S]
//   least      a node whose elements would all be below has no gradient

#include "symbols.cuh"

namespace {

constexpr int bins = BINS;
constexpr long long first_bin = 4 * (1023 - 256);  // of 2^-256
constexpr int nodes_of_warp = NODES_OF_WARP;
constexpr int nodes_of_thread = nodes_of_warp / warp_lanes;
constexpr int selection_threads = 256;
constexpr int warps = selection_threads / warp_lanes;

// The bin of a positive mass.
__device__ __forceinline__ int bin_of(double mass) {
  const long long octave = (__double_as_longlong(mass) >> 50) - first_bin;
  return octave < 0 ? 0 : octave < bins ? static_cast<int>(octave) : bins - 1;
}

// Value of one unit in a bin: masses count in units of 2^-31 of their octave.
__device__ __forceinline__ double unit_of(int bin) {
  const long long exponent = (bin + first_bin) >> 2;
  return __longlong_as_double((exponent - 31) << 52);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    gradient_mass(const double* __restrict__ scores, const double* __restrict__ occupancy,
                  const int* __restrict__ frame, const long long* __restrict__ frame_sample,
                  short* __restrict__ bin, unsigned long long* __restrict__ histogram, long long node_count) {
  const long long node = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (node >= node_count) return;
  double gamma[2] = {}, rest = 1.0, mass = 0.0;
#pragma unroll
  for (int s = 0; s < SYMBOLS; ++s) gamma[softmax_of[s]] += occupancy[node * SYMBOLS + s];
#pragma unroll
  for (int s = 0; s < SYMBOLS; ++s) {
    const double p = exp(scores[node * SYMBOLS + s]);
    if (softmax_of[s] == 0) rest -= p;
    if (has_column[s]) mass += fabs(gamma[softmax_of[s]] * p - occupancy[node * SYMBOLS + s]);
  }
  if (rest > 0.0) mass += gamma[0] * rest;

  int index = -1;
  if (mass > 0.0) {
    const unsigned long long bits = static_cast<unsigned long long>(__double_as_longlong(mass));
    // What is below the range of bins counts as more than it is.
    const unsigned long long units = ((bits & 0xfffffffffffffull) >> 21) + (1ull << 31);
    index = bin_of(mass);
    atomicAdd(histogram + frame_sample[frame[node]] * bins + index, units);
  }
  bin[node] = static_cast<short>(index);
}

// A block a sample. One of weight zero has no gradient; one of weight NaN keeps every node, so that it
// reaches all gradients that the sample takes part in.
extern "C" __global__ void __launch_bounds__(128)
    thresholds(const unsigned long long* __restrict__ histogram, const double* __restrict__ weight,
               double tolerance, double least, int* __restrict__ threshold) {
  constexpr int threads = 128;
  constexpr int bins_of_thread = bins / threads;
  double* const before = dynamic_shared<double>();  // [threads + 1]
  const unsigned long long* const mine =
      histogram + blockIdx.x * static_cast<long long>(bins) + threadIdx.x * bins_of_thread;

  double mass = 0.0;
  for (int i = 0; i < bins_of_thread; ++i) {
    mass += static_cast<double>(mine[i]) * unit_of(threadIdx.x * bins_of_thread + i);
  }
  before[threadIdx.x + 1] = mass;
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0.0;
    for (int i = 1; i <= threads; ++i) before[i] += before[i - 1];
  }
  __syncthreads();

  const double budget = tolerance * before[threads];
  double skipped = before[threadIdx.x];
  int skipped_bins = 0;
  for (int i = 0; i < bins_of_thread; ++i) {
    skipped += static_cast<double>(mine[i]) * unit_of(threadIdx.x * bins_of_thread + i);
    skipped_bins += skipped <= budget;
  }
  int* const total = reinterpret_cast<int*>(before + threads + 1);
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  atomicAdd(total, skipped_bins);
  __syncthreads();
  if (threadIdx.x == 0) {
    const double w = weight[blockIdx.x];
    // An exact quotient is a call, for which sm_120 spills registers; an octave has four bins. What float32
    // takes for zero, as that of float64 sums, is below all bins.
    const float lowest = static_cast<float>(least);
    const int least_bin = lowest > 0.0f ? bin_of(__fdividef(lowest, static_cast<float>(fabs(w)))) : 0;
    threshold[blockIdx.x] = w == 0.0 ? bins : isnan(w) ? -1 : least_bin > *total ? least_bin : *total;
  }
}

namespace {

struct Selection {
  const short* bin;
  const int* frame;
  const long long* frame_sample;
  const int* threshold;
  long long nodes;

  // First of the nodes that this warp looks at, 32 at a time.
  __device__ long long first_of_warp() const {
    return (blockIdx.x * static_cast<long long>(warps) + threadIdx.x / warp_lanes) * nodes_of_warp;
  }
  __device__ bool keeps(long long node) const {
    return node < nodes && bin[node] >= threshold[frame_sample[frame[node]]];
  }
};

}  // namespace

// counts[warp]: kept nodes among the `nodes_of_warp` that a warp looks at.
extern "C" __global__ void __launch_bounds__(selection_threads)
    count_kept(const short* __restrict__ bin, const int* __restrict__ frame,
               const long long* __restrict__ frame_sample, const int* __restrict__ threshold,
               long long* __restrict__ counts, long long node_count) {
  const Selection selection = {bin, frame, frame_sample, threshold, node_count};
  const long long first = selection.first_of_warp();
  const int lane = threadIdx.x % warp_lanes;
  if (first >= node_count) return;
  int count = 0;
#pragma unroll
  for (int k = 0; k < nodes_of_thread; ++k) {
    count += __popc(__ballot_sync(all_lanes, selection.keeps(first + k * warp_lanes + lane)));
  }
  if (lane == 0) counts[first / nodes_of_warp] = count;
}

// Turns counts into the number of kept nodes before each warp's, and gives their sum. One block.
extern "C" __global__ void __launch_bounds__(1024)
    scan_counts(long long* __restrict__ counts, long long* __restrict__ total, long long length) {
  long long* const partial = dynamic_shared<long long>();  // [threads]
  const long long share = (length + blockDim.x - 1) / blockDim.x;
  const long long first = threadIdx.x * share;
  const long long last = first + share < length ? first + share : length;
  long long sum = 0;
  for (long long i = first; i < last; ++i) sum += counts[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int offset = 1; offset < static_cast<int>(blockDim.x); offset *= 2) {
    const long long before = static_cast<int>(threadIdx.x) >= offset ? partial[threadIdx.x - offset] : 0;
    __syncthreads();
    partial[threadIdx.x] += before;
    __syncthreads();
  }
  long long running = partial[threadIdx.x] - sum;
  for (long long i = first; i < last; ++i) {
    const long long count = counts[i];
    counts[i] = running;
    running += count;
  }
  if (threadIdx.x == blockDim.x - 1) *total = partial[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(selection_threads)
    write_kept(const short* __restrict__ bin, const int* __restrict__ frame,
               const long long* __restrict__ frame_sample, const int* __restrict__ threshold,
               const long long* __restrict__ before, long long* __restrict__ kept, long long node_count) {
  const Selection selection = {bin, frame, frame_sample, threshold, node_count};
  const long long first = selection.first_of_warp();
  const int lane = threadIdx.x % warp_lanes;
  if (first >= node_count) return;
  long long next = before[first / nodes_of_warp];
#pragma unroll
  for (int k = 0; k < nodes_of_thread; ++k) {
    const long long node = first + k * warp_lanes + lane;
    const bool keep = selection.keeps(node);
    const unsigned int ballot = __ballot_sync(all_lanes, keep);
    if (keep) kept[next + __popc(ballot & ((1u << lane) - 1))] = node;
    next += __popc(ballot);
  }
}
