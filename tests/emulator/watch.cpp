// Accesses of watched kernels. g++ -fsanitize=thread calls a function before each of them, which
// libtsan would define; here they are defined otherwise.
//
// Two accesses of a byte by two threads, of which one at least writes, must be ordered: by a block
// barrier, or within a warp by a __syncwarp of all its lanes; or both must be atomic. Shuffles and
// votes order no memory. Threads of two blocks are never ordered. Of each byte the last write is
// known, and two reads and two atomic accesses since: a race may go unseen, but none is told that is
// not there.
//
// In shuffled order, the thread may also have to wait before an access.
#include <array>
#include <memory>
#include <unordered_map>

#include "machine.h"

namespace emulator {
namespace {

constexpr std::uintptr_t page_size = 1024;
constexpr std::uint64_t accesses_a_turn = 4;  // before another thread runs, on average

enum class Kind { read, write, atomic };

struct Pair {  // of accesses that nothing orders
  Access at[2];
};

struct Byte {
  Access write;
  Pair reads, atomics;
};

struct Shadow {
  std::unordered_map<std::uintptr_t, std::unique_ptr<std::array<Byte, page_size>>> pages;
  std::array<Byte, page_size>* last = nullptr;
  std::uintptr_t last_number = 0;

  Byte& of(std::uintptr_t address) {
    const std::uintptr_t number = address / page_size;
    if (last == nullptr || number != last_number) {
      auto& page = pages[number];
      if (!page) page = std::make_unique<std::array<Byte, page_size>>();
      last = page.get();
      last_number = number;
    }
    return (*last)[address % page_size];
  }
};

thread_local Shadow shadow;

bool is_beside(const Access& a, const Access& b) {
  return a.block == b.block && a.thread / warp_size == b.thread / warp_size;
}

bool is_ordered(const Access& before, const Access& now, bool is_shared) {
  if (before.site == nullptr) return true;
  if (before.block != now.block) return is_shared;  // its memory is another's by now
  if (before.thread == now.thread || before.barriers < now.barriers) return true;
  return is_beside(before, now) && before.warp_barriers < now.warp_barriers;
}

// What is ordered before is behind all that can come. Of many others, two of two warps tell most.
void remember(Pair& pair, const Access& now, bool is_shared) {
  Access(&at)[2] = pair.at;
  const bool is_first_behind = is_ordered(at[0], now, is_shared);
  const bool is_second_behind = is_ordered(at[1], now, is_shared);
  if (is_first_behind) {
    at[0] = now;
    if (is_second_behind) at[1] = {};
  } else if (is_second_behind || is_beside(at[0], at[1])) {
    at[1] = now;
  }
}

[[gnu::noinline]] void preempt(Machine& m) {
  const int t = m.running;
  make_ready(m, t / 64, std::uint64_t{1} << t % 64);
  EMULATOR_WAIT(m);
}

void note(const void* address, unsigned size, Kind kind, const void* site) {
  if (machine == nullptr) return;
  Machine& m = *machine;
  if (m.current().fiber->stack.contains(address)) return;
  if (m.launch->order == Order::shuffled && next_random(m.random) % accesses_a_turn == 0) {
    preempt(m);
  }
  const bool is_shared = m.shared.contains(address) || m.static_shared.contains(address);
  const Thread& thread = m.current();
  const Access now = {site, m.block, m.barriers, thread.warp_barriers, m.running};
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(address);
  for (std::uintptr_t at = first; at < first + size; ++at) {
    Byte& byte = shadow.of(at);
    const auto check = [&](const Access& before, const char* how) {
      if (!is_ordered(before, now, is_shared)) {
        fail_race(now, kind == Kind::read ? "read" : "write", before, how);
      }
    };
    check(byte.write, "written");
    if (kind != Kind::read) {
      for (const Access& before : byte.reads.at) check(before, "read");
    }
    if (kind != Kind::atomic) {
      for (const Access& before : byte.atomics.at) check(before, "written");
    }
    if (kind == Kind::write) {
      byte = {now, {}, {}};
    } else {
      remember(kind == Kind::read ? byte.reads : byte.atomics, now, is_shared);
    }
  }
}

}  // namespace

void forget_accesses() {
  shadow.pages.clear();
  shadow.last = nullptr;
}

}  // namespace emulator

using emulator::Kind;
using emulator::note;

#define EMULATOR_ACCESS(bytes)                                                              \
  void __tsan_read##bytes(void* a) { note(a, bytes, Kind::read, EMULATOR_SITE); }           \
  void __tsan_write##bytes(void* a) { note(a, bytes, Kind::write, EMULATOR_SITE); }         \
  void __tsan_unaligned_read##bytes(void* a) { note(a, bytes, Kind::read, EMULATOR_SITE); } \
  void __tsan_unaligned_write##bytes(void* a) { note(a, bytes, Kind::write, EMULATOR_SITE); }

#define EMULATOR_ATOMIC_ACCESS(bits, T)                                                         \
  T __tsan_atomic##bits##_load(const volatile T* a, int) {                                      \
    note(const_cast<const T*>(a), bits / 8, Kind::atomic, EMULATOR_SITE);                       \
    return __atomic_load_n(a, __ATOMIC_RELAXED);                                                \
  }                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* expected, T desired, int,   \
                                                  int) {                                        \
    note(const_cast<const T*>(a), bits / 8, Kind::atomic, EMULATOR_SITE);                       \
    return __atomic_compare_exchange_n(a, expected, desired, false, __ATOMIC_RELAXED,           \
                                       __ATOMIC_RELAXED);                                       \
  }

extern "C" {

EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
EMULATOR_ATOMIC_ACCESS(32, unsigned)
EMULATOR_ATOMIC_ACCESS(64, unsigned long long)
void __tsan_read_range(void* a, unsigned long size) {
  note(a, static_cast<unsigned>(size), Kind::read, EMULATOR_SITE);
}
void __tsan_write_range(void* a, unsigned long size) {
  note(a, static_cast<unsigned>(size), Kind::write, EMULATOR_SITE);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_atomic_thread_fence(int) {}

}  // extern "C"
