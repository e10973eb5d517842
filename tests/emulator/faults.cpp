// Faults of emulated kernels as errors of their launch: signals, and failed checks of the
// undefined-behaviour sanitizer (-fsanitize=alignment,…), whose run-time library this replaces.
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <iterator>
#include <mutex>

#include "machine.h"

namespace emulator {
namespace {

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

std::mutex handlers_lock;
int handlers_users;
struct sigaction previous[std::size(signals)];

thread_local stack_t previous_stack;
alignas(16) thread_local char signal_stack[32 << 10];  // the fiber's own may be what overflowed

const void* program_counter(void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#else
  return nullptr;
#endif
}

const char* access(void* context) {
#if defined(__x86_64__)  // bit 1 of the page fault's error code
  return static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "write" : "read";
#else
  return "access";
#endif
}

void pass_on(int signal, siginfo_t* info, void* context) {  // not ours: as if we were not here
  for (std::size_t i = 0; i < std::size(signals); ++i) {
    if (signals[i] != signal) continue;
    const struct sigaction& old = previous[i];
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
    sigaction(signal, &old, nullptr);  // the instruction faults again, to death
  }
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!launching()) return pass_on(signal, info, context);
  const void* site = program_counter(context);
  if (signal == SIGSEGV || signal == SIGBUS) {
    if (info->si_code == SI_KERNEL) fail(site, "access to an impossible address");
    fail(site, "out-of-bounds %s at 0x%llx%s", access(context),
         static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(info->si_addr)),
         describe(info->si_addr));
  }
  fail(site, "%s", signal == SIGFPE ? "division by zero" : "illegal instruction");
}

}  // namespace

FaultHandlers::FaultHandlers() {
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &previous_stack);
  const std::lock_guard lock(handlers_lock);
  if (handlers_users++ > 0) return;
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  // SA_NODEFER: the handler is left by _longjmp, which would not unblock the signal.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (std::size_t i = 0; i < std::size(signals); ++i) sigaction(signals[i], &action, &previous[i]);
}

FaultHandlers::~FaultHandlers() {
  {
    const std::lock_guard lock(handlers_lock);
    if (--handlers_users == 0) {
      for (std::size_t i = 0; i < std::size(signals); ++i) {
        sigaction(signals[i], &previous[i], nullptr);
      }
    }
  }
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace emulator

// ---- the sanitizer's interface (compiler-rt/lib/ubsan/ubsan_handlers.h): static data, then values

namespace {

struct Place {
  const char* file;
  std::uint32_t line, column;
};

struct Type {
  std::uint16_t kind, information;
  char name[1];
};

struct Mismatch {
  Place place;
  const Type* type;
  std::uint8_t log_alignment, kind;
};

struct OutOfBounds {
  Place place;
  const Type *array, *index;
};

}  // namespace

extern "C" {

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Mismatch* data, const void* address) {
  emulator::fail(EMULATOR_SITE, "misaligned access to %s (%d bytes) at %p", data->type->name,
                 1 << data->log_alignment, address);
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data, long long index) {
  emulator::fail(EMULATOR_SITE, "index %lld out of bounds of %s", index, data->array->name);
}

#define EMULATOR_CHECK(name, what)                       \
  [[noreturn]] void __ubsan_handle_##name(const void*) { \
    emulator::fail(EMULATOR_SITE, "%s", what);           \
  }
EMULATOR_CHECK(add_overflow_abort, "signed integer overflow")
EMULATOR_CHECK(sub_overflow_abort, "signed integer overflow")
EMULATOR_CHECK(mul_overflow_abort, "signed integer overflow")
EMULATOR_CHECK(negate_overflow_abort, "signed integer overflow")
EMULATOR_CHECK(divrem_overflow_abort, "division by zero or overflow of a division")
EMULATOR_CHECK(shift_out_of_bounds_abort, "shift by more than the type's bits")
EMULATOR_CHECK(float_cast_overflow_abort, "floating-point value that its integer type cannot hold")
EMULATOR_CHECK(missing_return, "end of a function without its return value")
EMULATOR_CHECK(builtin_unreachable, "code that claims to be unreachable")

}  // extern "C"
