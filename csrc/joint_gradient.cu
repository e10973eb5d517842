// Gradient of the packed encoder (or predictor) rows from that of the hidden states:
//
//     sums[s] += Σ_{r of frame (or state) s} d_hidden[r] · act'
//
// act' follows from hidden[r], or from encoder[frame[r]] + predictor[state[r]]. Rows ascend by frame, so
// those of a frame adjoin, and those of a state are among the rows of its sample's frames. A block takes a
// frame (or state) and a slice of the columns, a lane 16 bytes of operands. Its threads look through these
// rows and list those that count, its warps deal out the list, and at last add up what each has. No
// atomics, and the order depends on the rows alone, so the sum is always the same.
//
//   THREADS       of a block at most
//   LOOKS         rows that a thread looks at before the list is summed, 32 at most
//   PACKED        element type of the packed encoder and predictor rows
//   frame, state  int32. [R]
//   state_sample  which of the group's samples each state belongs to; null: the sums are of frames. [P]
//   first_frame, frames   first packed frame of each sample, and how many it has. [S]
//   kept          with -DDROPOUT=1: share of kept states, whose inverse is `scale`

#include "dropout.cuh"

namespace {

// COUNT consecutive elements, in 16-byte loads where they fill one, as they were read.
template <class T, int COUNT>
struct Loaded {
  static constexpr int width = COUNT < vector_width<T> ? COUNT : vector_width<T>;
  struct alignas(width * sizeof(T)) Block {
    T at[width];
  };
  Block blocks[COUNT / width];

  __device__ __forceinline__ void read(const T* address) {
#pragma unroll
    for (int i = 0; i < COUNT / width; ++i) blocks[i] = reinterpret_cast<const Block*>(address)[i];
  }
  __device__ __forceinline__ REAL at(int i) const {
    return static_cast<REAL>(widen(blocks[i / width].at[i % width]));
  }
};

// Rows of frames before f.
__device__ __forceinline__ int rows_before(const int* frame, int row_count, int f) {
  int first = 0;
  for (int length = row_count; length > 0;) {
    const int half = length / 2;
    const bool is_before = frame[first + half] < f;
    first = is_before ? first + half + 1 : first;
    length = is_before ? length - half - 1 : half;
  }
  return first;
}

// Lists the rows start + k · threads + t of which the block's thread t has found the k-th: bit k of `found`.
// Returns how many they are.
__device__ __forceinline__ int list_rows(unsigned int found, int start, int* list, int* counts) {
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  int next = __popc(found);
#pragma unroll
  for (int step = 1; step < warp_lanes; step *= 2) {
    const int before = __shfl_up_sync(all_lanes, next, step);
    if (lane >= step) next += before;
  }
  if (lane == warp_lanes - 1) counts[warp] = next;
  next -= __popc(found);
  __syncthreads();
  int count = 0;
#pragma unroll 1
  for (int other = 0; other < warps; ++other) {
    if (other == warp) next += count;
    count += counts[other];
  }
  for (; found; found &= found - 1) {
    list[next++] = start + ((__ffs(found) - 1) * warps + warp) * warp_lanes + lane;
  }
  __syncthreads();
  return count;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    joint_gradient(const REAL* __restrict__ d_hidden, long long d_hidden_pitch,
                   const OPERAND* __restrict__ hidden, long long hidden_pitch,
                   const PACKED* __restrict__ encoder, const PACKED* __restrict__ predictor,
                   long long packed_pitch, const int* __restrict__ frame, const int* __restrict__ state,
                   const long long* __restrict__ state_sample, const long long* __restrict__ first_frame,
                   const long long* __restrict__ frames,
#if DROPOUT
                   double kept, double scale,
#endif
                   REAL* __restrict__ sums, long long sums_pitch, long long joint_dim,
                   long long row_count) {
  constexpr int width = vector_width<OPERAND>;
  // Wide rows that have to be read fill the registers, and so do functions of doubles.
  constexpr bool is_wide = sizeof(PACKED) > sizeof(OPERAND) || sizeof(REAL) > sizeof(float);
  constexpr int in_flight = Activation::reads_argument && is_wide ? 2 : 4;
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int threads = warps * warp_lanes, thread = warp * warp_lanes + lane;
  const int segment = blockIdx.x, rows = static_cast<int>(row_count);

  int its_first = segment, its_last = segment;  // frames
  if (state_sample) {
    const long long sample = state_sample[segment];
    its_first = static_cast<int>(first_frame[sample]);
    its_last = its_first + static_cast<int>(frames[sample]) - 1;
  }
  if ((its_last < frame[0]) | (its_first > frame[rows - 1])) return;
  const int before = rows_before(frame, rows, lane % 2 ? its_last + 1 : its_first);
  const int first = __shfl_sync(all_lanes, before, 0), end = __shfl_sync(all_lanes, before, 1);
  if (first == end) return;

  const long long slice = blockIdx.y * static_cast<long long>(warp_lanes * width);
  const bool has_columns = slice + lane * width < joint_dim;
  const long long h = has_columns ? slice + lane * width : slice;
  REAL* const totals = dynamic_shared<REAL>();                         // of warps. [warps][width][warp_lanes]
  int* const list = reinterpret_cast<int*>(totals + threads * width);  // of its rows. [threads * LOOKS]
  int* const counts = list + threads * LOOKS;                          // that warps have found. [warps]
  REAL total[width] = {};
  for (int start = first; start < end; start += threads * LOOKS) {
    unsigned int found = 0;  // a bit for each look
#pragma unroll
    for (int k = 0; k < LOOKS; ++k) {
      const int r = start + k * threads + thread;
      found |= static_cast<unsigned int>(r < end && (!state_sample || state[r] == segment)) << k;
    }
    const int count = list_rows(found, start, list, counts);
#pragma unroll 1
    for (int position = warp * in_flight; position < count; position += warps * in_flight) {
      // No branch between the loads, so that all of them are in flight; the last row takes the place of
      // those that are missing.
      long long row[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) row[k] = list[min(position + k, count - 1)];
      Loaded<REAL, width> gradient[in_flight];
      Loaded<OPERAND, width> value[in_flight];
      Loaded<PACKED, width> encoded[in_flight], predicted[in_flight];
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
        gradient[k].read(d_hidden + row[k] * d_hidden_pitch + h);
        value[k].read(hidden + row[k] * hidden_pitch + h);
        encoded[k].read(encoder + frame[row[k]] * packed_pitch + h);
        predicted[k].read(predictor + state[row[k]] * packed_pitch + h);
      }
#pragma unroll
      for (int k = 0; k < in_flight; ++k) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const REAL x = encoded[k].at(i) + predicted[k].at(i), y = value[k].at(i);
#if DROPOUT
          const REAL slope = derivative_with_dropout(x, y, static_cast<REAL>(kept), static_cast<REAL>(scale));
#else
          const REAL slope = derivative(x, y);
#endif
          const REAL sum = total[i] + gradient[k].at(i) * slope;
          total[i] = position + k < count ? sum : total[i];
        }
      }
    }
  }

  if (warps > 1) {
#pragma unroll
    for (int i = 0; i < width; ++i) totals[(warp * width + i) * warp_lanes + lane] = total[i];
    __syncthreads();
    if (warp > 0) return;
#pragma unroll 1
    for (int other = 1; other < warps; ++other) {
#pragma unroll
      for (int i = 0; i < width; ++i) total[i] += totals[(other * width + i) * warp_lanes + lane];
    }
  }
  if (!has_columns) return;
  REAL* const sum = sums + segment * sums_pitch + h;
  REAL old[width];
  load(sum, old);
#pragma unroll
  for (int i = 0; i < width; ++i) total[i] += old[i];
  store(sum, total);
}
