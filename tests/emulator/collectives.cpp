// Barriers and warp collectives: who waits, who is released with which result, what does not fit.
#include "machine.h"

namespace emulator {
namespace {

void release_barrier(Machine& m) {  // if all have arrived
  Barrier& b = m.barrier;
  if (b.arrived == 0 || b.arrived < m.live) return;
  b.result = b.operation == Operation::syncthreads_count ? b.counted
             : b.operation == Operation::syncthreads_and ? b.counted == b.arrived
                                                         : b.counted > 0;
  b.arrived = b.counted = 0;
  ++m.barriers;
  for (int w = 0; w < max_block / warp_size; ++w) {
    make_ready(m, w / 2, std::uint64_t{m.warps[w].live} << w % 2 * warp_size);
  }
}

void release_lanes(Machine& m, int w, unsigned mask) {  // if all lanes of the mask have arrived
  Warp& warp = m.warps[w];
  Thread* const threads = m.threads + w * warp_size;
  const unsigned lanes = mask & warp.live;
  if ((warp.waiting & lanes) != lanes) return;
  const int first = __builtin_ctz(lanes);
  std::uint64_t ballot = 0, sum = 0;
  int other = first;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Thread& thread = threads[lane];
    if (thread.mask != mask) return;  // it takes part in a collective of other lanes first
    if (thread.operation != threads[first].operation || thread.size != threads[first].size) {
      other = lane;
    }
    ballot |= static_cast<std::uint64_t>(thread.value != 0) << lane;
    sum += thread.value;
  }
  const Operation operation = threads[first].operation;
  if (other != first) {
    fail(m.current().site,
         "lanes of one collective (warp %d, mask 0x%08x) call different operations: lane %d "
         "%s of %d bytes, lane %d %s of %d bytes,",
         w, mask, first, name(operation), threads[first].size, other,
         name(threads[other].operation), threads[other].size);
  }
  const bool shuffles = is_shuffle(operation);
  const std::uint64_t result = operation == Operation::any   ? ballot != 0
                               : operation == Operation::all ? ballot == lanes
                               : operation == Operation::ballot ? ballot
                                                                : sum;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    Thread& thread = threads[__builtin_ctz(rest)];
    // What a lane outside the mask holds is undefined: NaN or -1 makes its use visible.
    thread.result = !shuffles                     ? result
                    : lanes >> thread.source & 1 ? threads[thread.source].value
                                                  : ~std::uint64_t{0};
    thread.warp_barriers += operation == Operation::syncwarp && lanes == warp.live;
  }
  warp.waiting &= ~lanes;
  make_ready(m, w / 2, std::uint64_t{lanes} << w % 2 * warp_size);
}

// PTX ISA, shfl.sync: lanes in segments of `width`; beyond its segment a lane reads itself.
int source_lane(Operation operation, int lane, unsigned operand, int width) {
  const int begin = lane & ~(width - 1), end = begin + width;
  const int distance = static_cast<int>(operand % warp_size);
  switch (operation) {
    case Operation::shuffle_up:
      return lane - distance >= begin ? lane - distance : lane;
    case Operation::shuffle_down:
      return lane + distance < end ? lane + distance : lane;
    case Operation::shuffle_xor:
      return (lane ^ distance) < end ? lane ^ distance : lane;
    default:
      return begin | (distance & (width - 1));
  }
}

}  // namespace

void exit_thread(Machine& m) {
  const int w = m.running / warp_size, lane = m.running % warp_size;
  Warp& warp = m.warps[w];
  --m.live;
  warp.live &= ~(1u << lane);
  release_barrier(m);
  for (int l = 0; warp.waiting != 0 && l < warp_size; ++l) {
    const Thread& thread = m.threads[w * warp_size + l];
    if (!(warp.waiting >> l & 1) || !(thread.mask >> lane & 1)) continue;
    if (is_shuffle(thread.operation)) {
      fail(thread.site, "exit while lane %d of the warp waits at %s with mask 0x%08x for it,", l,
           name(thread.operation), thread.mask);
    }
    release_lanes(m, w, thread.mask);
  }
}

[[gnu::noinline]] int barrier(Operation operation, bool predicate) {
  Machine& m = *machine;
  Thread& thread = m.current();
  thread.operation = operation;
  thread.site = EMULATOR_SITE;
  if (m.barrier.arrived > 0 && m.barrier.operation != operation) {
    fail(thread.site, "%s while other threads wait at %s", name(operation),
         name(m.barrier.operation));
  }
  m.barrier.operation = operation;
  m.barrier.arrived += 1;
  m.barrier.counted += predicate;
  release_barrier(m);
  EMULATOR_WAIT(m);
  return m.barrier.result;
}

[[gnu::noinline]] std::uint64_t warp_collective(Operation operation, unsigned mask,
                                                std::uint64_t value, unsigned operand, int width,
                                                int size) {
  Machine& m = *machine;
  const int w = m.running / warp_size, lane = m.running % warp_size;
  Thread& thread = m.current();
  thread.operation = operation;
  thread.site = EMULATOR_SITE;
  thread.mask = mask;
  thread.value = value;
  thread.size = static_cast<std::uint8_t>(size);
  if (!(mask >> lane & 1)) {
    fail(thread.site, "%s with mask 0x%08x, which lacks the calling lane %d,", name(operation),
         mask, lane);
  }
  if (is_shuffle(operation)) {
    if (width < 1 || width > warp_size || (width & (width - 1)) != 0) {
      fail(thread.site, "%s with width %d, which is no power of two up to 32,", name(operation),
           width);
    }
    if (const unsigned gone = mask & ~m.warps[w].live) {
      fail(thread.site, "%s with mask 0x%08x, of which lanes 0x%08x have exited or do not exist,",
           name(operation), mask, gone);
    }
    thread.source = static_cast<std::uint8_t>(source_lane(operation, lane, operand, width));
  }
  m.warps[w].waiting |= 1u << lane;
  release_lanes(m, w, mask);
  EMULATOR_WAIT(m);
  return thread.result;
}

}  // namespace emulator
