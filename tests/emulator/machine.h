// State of the launch that a CPU thread runs, and which CUDA thread of it runs next: what the parts
// of the scheduler share.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "scheduler.h"

namespace emulator {

constexpr int warp_size = 32;
constexpr int max_block = 1024;
constexpr std::size_t stack_bytes = 64 << 10;
constexpr std::size_t max_shared_bytes = 227 << 10;

inline bool is_barrier(Operation operation) { return operation <= Operation::syncthreads_and; }

inline bool is_shuffle(Operation operation) {
  return operation >= Operation::shuffle && operation <= Operation::shuffle_xor;
}

const char* name(Operation operation);

inline std::size_t page_bytes() {
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

struct Bytes {
  char* begin;
  std::size_t size;

  bool contains(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return at >= begin && at < begin + size;
  }
};

class Pages {  // memory between two pages that must not be touched
 public:
  explicit Pages(std::size_t bytes)
      : bytes_((bytes + page_bytes() - 1) / page_bytes() * page_bytes()) {
    void* mapped = mmap(nullptr, bytes_ + 2 * page_bytes(), PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    base_ = static_cast<char*>(mapped);
    if (mprotect(begin(), bytes_, PROT_READ | PROT_WRITE) != 0) std::abort();
  }
  ~Pages() { munmap(base_, bytes_ + 2 * page_bytes()); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  char* begin() const { return base_ + page_bytes(); }
  char* end() const { return begin() + bytes_; }
  bool contains(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return at >= begin() && at < end();
  }
  bool guards(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return at >= base_ && at < end() + page_bytes() && !contains(address);
  }

 private:
  char* base_;
  std::size_t bytes_;
};

struct Fiber {
  explicit Fiber(std::size_t number) : stack(stack_bytes), colour(number % 32 * 128) {}

  void* context[5];  // of __builtin_setjmp
  Pages stack;
  // Stacks are whole pages apart: without an offset all their tops would share a few cache lines.
  std::size_t colour;
  bool entered = false;
};

struct Access {  // of watched kernels
  const void* site;
  std::uint32_t block, barriers, warp_barriers;
  int thread;
};

struct Thread {
  Fiber* fiber;  // null until it starts
  uint3 index;
  // What it waits for, or waited for last.
  Operation operation;
  std::uint8_t size, source;
  unsigned mask;
  std::uint64_t value, result;
  const void* site;
  std::uint32_t warp_barriers;  // of all lanes that it has passed
};

struct Warp {
  unsigned live;     // lanes that exist and have not exited
  unsigned waiting;  // lanes in a warp collective
};

struct Barrier {
  Operation operation;
  int arrived, counted, result;
};

struct Machine {
  const Launch* launch = nullptr;
  int size = 0;     // threads in a block
  int live = 0;     // of which have not exited
  int running = 0;  // the thread whose code runs
  std::uint64_t random = 0;
  std::uint64_t ready[max_block / 64] = {};  // a bit a thread
  std::uint32_t ready_words = 0;             // a bit a word of `ready` that is not 0
  std::uint32_t block = 0;
  std::uint32_t barriers = 0;  // that the block has passed
  Barrier barrier = {};
  Warp warps[max_block / warp_size] = {};
  Thread threads[max_block] = {};

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Pages shared{max_shared_bytes};
  char* dynamic_shared = nullptr;
  Bytes static_shared = {};

  jmp_buf block_done, failed;
  char error[2048] = {};

  Thread& current() { return threads[running]; }
};

extern __thread Machine* machine;  // null when this CPU thread runs no launch

[[noreturn]] void fail_deadlock(Machine& m);
[[noreturn]] void fail_race(const Access& now, const char* how, const Access& before,
                            const char* how_before);

// Of watched kernels, before a launch.
void forget_accesses();

// The running thread has returned from its kernel: whoever waited for it need not, or must fail.
void exit_thread(Machine& m);

// ---- which thread runs next

inline void make_ready(Machine& m, int word, std::uint64_t threads) {
  m.ready[word] |= threads;
  m.ready_words |= static_cast<std::uint32_t>(threads != 0) << word;
}

inline std::uint64_t next_random(std::uint64_t& state) {  // splitmix64
  std::uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

inline int first_from(std::uint64_t bits, unsigned start) {  // first set bit, round from `start`
  const unsigned shift = start % 64;
  const std::uint64_t rotated = bits >> shift | (shift ? bits << (64 - shift) : 0);
  return (__builtin_ctzll(rotated) + static_cast<int>(shift)) % 64;
}

inline int pick(Machine& m) {  // takes a thread from the ready ones; -1: none
  if (m.ready_words == 0) return -1;
  int word = 0, bit = 0;
  switch (m.launch->order) {
    case Order::ascending:
      word = __builtin_ctz(m.ready_words);
      bit = __builtin_ctzll(m.ready[word]);
      break;
    case Order::descending:
      word = 31 - __builtin_clz(m.ready_words);
      bit = 63 - __builtin_clzll(m.ready[word]);
      break;
    case Order::shuffled: {
      const std::uint64_t number = next_random(m.random);
      word = first_from(m.ready_words, static_cast<unsigned>(number >> 32));
      bit = first_from(m.ready[word], static_cast<unsigned>(number));
      break;
    }
  }
  m.ready[word] &= ~(std::uint64_t{1} << bit);
  if (m.ready[word] == 0) m.ready_words &= ~(1u << word);
  return word * 64 + bit;
}

inline void enter(Machine& m, int thread) {
  m.running = thread;
  threadIdx = m.threads[thread].index;
}

[[noreturn]] void jump(Fiber& fiber);
Fiber* take_idle(Machine& m);

inline Fiber& fiber_of(Machine& m, int thread) {
  Fiber*& fiber = m.threads[thread].fiber;
  if (fiber == nullptr) fiber = take_idle(m);
  return *fiber;
}

// The fiber that runs when the running thread waits; the same one if that thread may go on.
inline Fiber& next_fiber(Machine& m) {
  const int next = pick(m);
  if (next < 0) fail_deadlock(m);
  enter(m, next);
  return fiber_of(m, next);
}

// Lets others run until the running thread has been made ready and picked. No function: a return
// after a jump to another stack is one that the processor predicts wrongly, and costs as much.
#define EMULATOR_WAIT(m)                                                                        \
  do {                                                                                          \
    Fiber& self = *(m).current().fiber;                                                         \
    Fiber& other = next_fiber(m);                                                               \
    if (&other != &self && __builtin_setjmp(self.context) == 0) jump(other);                    \
  } while (false)

// The call is the instruction before the one to return to.
#define EMULATOR_SITE (static_cast<const char*>(__builtin_return_address(0)) - 1)

}  // namespace emulator
