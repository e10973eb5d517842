// Runs a launch: block after block, each CUDA thread of the block on a fiber (a stack of its own).
//
// A thread runs until it exits or waits in a collective; then the next runnable thread of the
// chosen order continues. Nothing runs in parallel, so a launch is deterministic, and a block in
// which every live thread waits is a deadlock that can be told. What is not checked: a thread that
// spins on memory which another thread should write hangs, as no other thread gets to run.
//
// Cost: fibers switch by the compiler's own setjmp and longjmp, which store three registers;
// ucontext (a system call a switch) is used for the first entry of a fiber only. Fibers belong to a
// CPU thread and outlive launches. A fiber whose thread has exited takes the next thread that has
// not started without a switch, so kernels without collectives run as a plain loop on one stack.
#include "scheduler.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "machine.h"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace emulator {

__thread Machine* machine;

namespace {

thread_local std::unique_ptr<Machine> own_machine;

void run_threads() {  // what a fiber does: thread after thread, block after block
  for (;;) {
    Machine& m = *machine;
    Fiber* const self = m.current().fiber;
    m.launch->kernel->invoke(m.launch->arguments);
    exit_thread(m);
    const int next = pick(m);
    if (next < 0 && m.live > 0) fail_deadlock(m);
    if (next >= 0 && m.threads[next].fiber == nullptr) {
      enter(m, next);
      m.threads[next].fiber = self;
      continue;
    }
    m.idle.push_back(self);
    if (__builtin_setjmp(self->context) == 0) {
      if (next < 0) _longjmp(m.block_done, 1);
      enter(m, next);
      jump(*m.threads[next].fiber);
    }
  }
}

[[noreturn, gnu::noinline]] void enter_first_time(Fiber& fiber) {
  fiber.entered = true;
  static thread_local ucontext_t entry;
  getcontext(&entry);
  entry.uc_stack.ss_sp = fiber.stack.begin();
  entry.uc_stack.ss_size = stack_bytes - fiber.colour;
  entry.uc_link = nullptr;
  makecontext(&entry, run_threads, 0);
  setcontext(&entry);
  std::abort();
}

// Static __shared__ variables are thread_local, and the kernels' library has no others: its whole
// thread-local segment is the static shared memory.
Bytes static_shared_memory(const Kernel* kernel) {
  struct Search {
    const char* inside;
    Bytes found;
  } search{reinterpret_cast<const char*>(kernel), {nullptr, 0}};
  kernel->touch_shared_memory();
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        Search& s = *static_cast<Search*>(data);
        std::size_t tls_bytes = 0;
        bool here = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr)& header = info->dlpi_phdr[i];
          const std::uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(s.inside);
          here |= header.p_type == PT_LOAD && at >= begin && at < begin + header.p_memsz;
          if (header.p_type == PT_TLS) tls_bytes = header.p_memsz;
        }
        char* const segment = static_cast<char*>(info->dlpi_tls_data);
        if (here) s.found = {segment, segment ? tls_bytes : 0};
        return static_cast<int>(here);
      },
      &search);
  return search.found;
}

void start_block(Machine& m) {
  m.live = m.size;
  m.barriers = 0;
  m.barrier = {};
  for (int t = 0; t < m.size; ++t) {
    m.threads[t].fiber = nullptr;
    m.threads[t].warp_barriers = 0;
  }
  for (int w = 0; w * warp_size < m.size; ++w) {
    const int lanes = std::min(m.size - w * warp_size, warp_size);
    const unsigned live = 0xffffffffu >> (warp_size - lanes);
    m.warps[w] = {live, 0};
    make_ready(m, w / 2, std::uint64_t{live} << w % 2 * warp_size);
  }
}

void run_block(Machine& m) {
  if (_setjmp(m.block_done) != 0) return;
  const int first = pick(m);
  enter(m, first);
  jump(fiber_of(m, first));
}

void prepare(Machine& m, const Launch& launch) {
  m.launch = &launch;
  m.size = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  m.random = launch.seed;
  m.ready_words = 0;
  std::fill(std::begin(m.ready), std::end(m.ready), 0);
  std::fill(std::begin(m.warps), std::end(m.warps), Warp{});
  const unsigned x = launch.block.x, y = launch.block.y;
  for (unsigned t = 0; t < static_cast<unsigned>(m.size); ++t) {
    m.threads[t].index = {t % x, t / x % y, t / x / y};
  }
  // Its end is where the memory ends, so that a step beyond it faults.
  m.dynamic_shared = m.shared.end() - (launch.shared_bytes + 15) / 16 * 16;
  blockDim = launch.block;
  gridDim = launch.grid;
  blockIdx = {0, 0, 0};
}

bool run(Machine& m, const Launch& launch) {
  if (_setjmp(m.failed) != 0) return false;
  const Bytes static_shared = m.static_shared = static_shared_memory(launch.kernel);
  const std::uint64_t x = launch.grid.x, y = launch.grid.y, blocks = x * y * launch.grid.z;
  std::uint64_t step = 1, offset = 0;
  if (launch.order == Order::shuffled) {  // i -> (i·step + offset) mod blocks is a permutation
    offset = next_random(m.random) % blocks;
    do step = next_random(m.random) % blocks + 1;
    while (std::gcd(step, blocks) != 1);
  }
  for (std::uint64_t i = 0; i < blocks; ++i) {
    // No overflow up to 2^32 blocks, which would take minutes.
    const std::uint64_t b =
        launch.order == Order::descending ? blocks - 1 - i : (i * step + offset) % blocks;
    m.block = static_cast<std::uint32_t>(b);
    blockIdx = {static_cast<unsigned>(b % x), static_cast<unsigned>(b / x % y),
                static_cast<unsigned>(b / x / y)};
    // Shared memory starts with arbitrary bits: NaN makes a read before a write visible.
    std::memset(m.dynamic_shared, 0xff, m.shared.end() - m.dynamic_shared);
    if (static_shared.size != 0) std::memset(static_shared.begin, 0xff, static_shared.size);
    start_block(m);
    run_block(m);
  }
  return true;
}

}  // namespace

// In a function of its own, as __builtin_longjmp demands.
[[noreturn, gnu::noinline]] void jump(Fiber& fiber) {
  if (!fiber.entered) enter_first_time(fiber);
  __builtin_longjmp(fiber.context, 1);
}

[[gnu::noinline]] Fiber* take_idle(Machine& m) {
  if (m.idle.empty()) return m.fibers.emplace_back(std::make_unique<Fiber>(m.fibers.size())).get();
  Fiber* const fiber = m.idle.back();
  m.idle.pop_back();
  return fiber;
}

void* dynamic_shared_memory() { return machine->dynamic_shared; }

bool launching() { return machine != nullptr; }

extern "C" const char* emulator_launch(const Launch* launch) {  // null, or what went wrong
  if (!own_machine) own_machine = std::make_unique<Machine>();
  Machine& m = *own_machine;
  prepare(m, *launch);
  forget_accesses();
  const FaultHandlers handlers;
  machine = &m;
  const bool succeeded = run(m, *launch);
  machine = nullptr;
  if (succeeded) return nullptr;
  m.idle.clear();  // some fibers stopped amid a kernel: all start anew
  for (const auto& fiber : m.fibers) {
    fiber->entered = false;
    m.idle.push_back(fiber.get());
  }
  return m.error;
}

}  // namespace emulator
