// The CUDA threads of one block as fibers of one CPU thread: what kernels, the fault handlers and
// the Python side (module.py mirrors Kernel and Launch) know of it. scheduler.cpp says how it
// works.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;

// `__thread`, not `thread_local`: no initialiser, which an access would first have to call.
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;

namespace emulator {

enum class Operation : std::uint8_t {
  syncthreads,
  syncthreads_count,
  syncthreads_or,
  syncthreads_and,
  syncwarp,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  any,
  all,
  reduce_add,
};

struct Kernel {
  const char* name;
  const char* parameters;  // one letter each: p pointer, i integer, d double, ? another 8-byte type
  int max_threads;         // of __launch_bounds__
  void (*invoke)(void** arguments);
  void (*touch_shared_memory)();  // makes the static __shared__ variables of this CPU thread exist
};

enum class Order : int { ascending, descending, shuffled };

struct Launch {
  const Kernel* kernel;
  void** arguments;  // as kernelParams of cuLaunchKernel: one pointer to each argument's value
  uint3 grid, block;
  std::uint64_t shared_bytes;
  std::uint64_t seed;
  Order order;
};

// Blocks until all live threads of the block are here; the count, the "or" or the "and".
int barrier(Operation operation, bool predicate);

// Blocks until all lanes of `mask` are here. `operand` is the source lane, the delta or the lane
// mask of a shuffle; `size` the bytes of its value.
std::uint64_t warp_collective(Operation operation, unsigned mask, std::uint64_t value,
                              unsigned operand = 0, int width = 32, int size = 4);

void* dynamic_shared_memory();

// Both end the launch, whose Python caller gets `what` as an exception.
[[noreturn]] void trap(const char* what);
[[noreturn, gnu::format(printf, 2, 3)]] void fail(const void* site, const char* what, ...);

// For the fault handlers: does this CPU thread run a launch, and what is known of an address that
// must not be accessed?
bool launching();
const char* describe(const void* address);

struct FaultHandlers {  // turns faults of kernels into fail() for as long as it lives
  FaultHandlers();
  ~FaultHandlers();
};

}  // namespace emulator
