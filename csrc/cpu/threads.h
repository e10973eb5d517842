// Work spread over torch's threads.
//
// A library asks for no thread pool of its own: it is given GOMP_parallel of the OpenMP runtime that
// torch uses, so torch's idle threads take the work and none compete for its cores. Without one,
// threads are started for each call.
#pragma once

#include <pthread.h>

namespace {

using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
Parallel parallel = nullptr;

// Threads take the next task whenever they are free, so one that the system holds up delays little.
// No result may depend on who takes which.
template <class Work>
struct Team {
  const Work& work;
  long long tasks;
  long long next;

  void run() {
    for (;;) {
      const long long task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      work(task);
    }
  }
  static void join(void* team) { static_cast<Team*>(team)->run(); }
  static void* join_thread(void* team) {
    join(team);
    return nullptr;
  }
};

// Calls work(task) for each task below `tasks`, in any order, on at most `threads` threads.
template <class Work>
void for_each_task(long long threads, long long tasks, const Work& work) {
  Team<Work> team = {work, tasks, 0};
  const long long members = threads < tasks ? threads : tasks;
  if (members <= 1) {
    team.run();
  } else if (parallel) {
    parallel(Team<Work>::join, &team, static_cast<unsigned>(members), 0);
  } else {
    constexpr int most_helpers = 255;
    pthread_t helpers[most_helpers];
    int count = 0;
    while (count < most_helpers && count < members - 1 &&
           pthread_create(&helpers[count], nullptr, Team<Work>::join_thread, &team) == 0) {
      ++count;
    }
    team.run();
    while (count > 0) pthread_join(helpers[--count], nullptr);
  }
}

// Calls work(first, last) for ranges that cover `items`, each of at least `least` of them.
template <class Work>
void for_each_range(long long threads, long long items, long long least, const Work& work) {
  for_each_task(threads, (items + least - 1) / least, [&](long long task) {
    const long long first = task * least;
    work(first, first + least < items ? first + least : items);
  });
}

}  // namespace

extern "C" void use_parallel(void* gomp_parallel) { parallel = reinterpret_cast<Parallel>(gomp_parallel); }
