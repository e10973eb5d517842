// What ends a launch, as text: who, where, and in a deadlock what everyone waits for.
#include <dlfcn.h>
#include <stdarg.h>

#include <cstdio>
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

constexpr const char* names[] = {
    "__syncthreads",   "__syncthreads_count", "__syncthreads_or", "__syncthreads_and",
    "__syncwarp",      "__shfl_sync",         "__shfl_up_sync",   "__shfl_down_sync",
    "__shfl_xor_sync", "__ballot_sync",       "__any_sync",       "__all_sync",
    "__reduce_add_sync"};

[[gnu::format(printf, 2, 3)]] void append(Machine& m, const char* format, ...) {
  const std::size_t used = std::strlen(m.error);
  va_list values;
  va_start(values, format);
  vsnprintf(m.error + used, sizeof m.error - used, format, values);
  va_end(values);
}

// module.py replaces the offset in the kernel's library by the source's file and line.
void append_site(Machine& m, const void* site) {
  Dl_info here, kernels;
  if (!dladdr(site, &here) || !dladdr(m.launch->kernel, &kernels)) return;
  if (here.dli_fbase != kernels.dli_fbase) return;
  const std::ptrdiff_t offset = static_cast<const char*>(site) - static_cast<char*>(here.dli_fbase);
  append(m, " <+0x%llx>", static_cast<unsigned long long>(offset));
}

void append_block(Machine& m) {
  append(m, " block (%u,%u,%u) of kernel '%s'", blockIdx.x, blockIdx.y, blockIdx.z,
         m.launch->kernel->name);
}

}  // namespace

const char* name(Operation operation) { return names[static_cast<int>(operation)]; }

void fail_deadlock(Machine& m) {
  std::strcpy(m.error, "deadlock in");
  append_block(m);
  const char* separator = ":";
  for (int first = 0; first < m.size; ++first) {
    // One line for the threads that wait at the same place (of the same warp and mask).
    const auto live = [&](int t) { return m.warps[t / warp_size].live >> t % warp_size & 1; };
    const auto together = [&](int t) {
      const Thread &a = m.threads[first], &b = m.threads[t];
      return live(t) && a.operation == b.operation && a.site == b.site &&
             (is_barrier(a.operation) || (a.mask == b.mask && first / warp_size == t / warp_size));
    };
    if (!live(first)) continue;
    int earlier = 0, count = 0;
    for (int t = 0; t < m.size; ++t) (t < first ? earlier : count) += together(t);
    if (earlier > 0) continue;
    const Thread& thread = m.threads[first];
    append(m, "%s\n  %d of %d live threads wait at %s", separator, count, m.live,
           name(thread.operation));
    separator = ";";
    append_site(m, thread.site);
    append(m, ", the first is (%u,%u,%u)", thread.index.x, thread.index.y,
           thread.index.z);
    if (is_barrier(thread.operation)) continue;
    const unsigned lanes = thread.mask & m.warps[first / warp_size].live;
    unsigned missing = lanes;
    for (int lane = 0; lane < warp_size; ++lane) {
      const int t = first / warp_size * warp_size + lane;
      if ((lanes >> lane & 1) && together(t)) missing &= ~(1u << lane);
    }
    append(m, " of warp %d with mask 0x%08x, of which 0x%08x do not come",
           first / warp_size, thread.mask, missing);
  }
  _longjmp(m.failed, 1);
}

void fail_race(const Access& now, const char* how, const Access& before, const char* how_before) {
  Machine& m = *machine;
  std::snprintf(m.error, sizeof m.error, "race: %s", how);
  append_site(m, now.site);
  append(m, " by thread (%u,%u,%u) of what", threadIdx.x, threadIdx.y, threadIdx.z);
  const uint3 index = m.threads[before.thread].index;
  append(m, " thread (%u,%u,%u)", index.x, index.y, index.z);
  if (before.block != now.block) append(m, " of block %u", before.block);
  append(m, " has %s", how_before);
  append_site(m, before.site);
  append(m, ", with no barrier between, in");
  append_block(m);
  _longjmp(m.failed, 1);
}

void fail(const void* site, const char* what, ...) {
  Machine& m = *machine;
  va_list values;
  va_start(values, what);
  vsnprintf(m.error, sizeof m.error, what, values);
  va_end(values);
  append_site(m, site);
  append(m, " by thread (%u,%u,%u) of", threadIdx.x, threadIdx.y, threadIdx.z);
  append_block(m);
  _longjmp(m.failed, 1);
}

[[gnu::noinline]] void trap(const char* what) { fail(EMULATOR_SITE, "%s", what); }

const char* describe(const void* address) {
  const Machine& m = *machine;
  if (m.shared.guards(address)) return " (dynamic shared memory)";
  for (const auto& fiber : m.fibers) {
    if (fiber->stack.guards(address)) return " (stack overflow)";
  }
  return reinterpret_cast<std::uintptr_t>(address) < page_bytes() ? " (null pointer)" : "";
}

}  // namespace emulator
