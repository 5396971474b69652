// The OpenMP threads that compute for a calling thread: who they are, and where they may run.
#pragma once

#if defined(__linux__) && defined(_OPENMP)

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <vector>

extern "C" {  // not <omp.h>, in which omp_pause_resource_all is not weak
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace {

struct Worker {
  pid_t id;
  cpu_set_t mask;  // its own, while `apart`
  bool apart;
};

struct Team {
  pid_t process = 0;  // a forked child has none of its parent's threads
  int threads = 0;    // asked for; 0: not met
  bool apart = false;
  std::vector<Worker> workers;
};

thread_local Team team;

// Every worker says who it is; where there are none yet, OpenMP makes them. The caller lets others run meanwhile: a
// worker that began on the caller's CPU would otherwise wait for the end of the caller's turn, and the caller for its.
inline void meet_team(int threads) {
  team.process = getpid(), team.threads = threads, team.apart = false;
  team.workers.assign(threads - 1, Worker{});
  Worker* const workers = team.workers.data();  // `team` is another one in each thread
  std::atomic<int> met{0};
  int found = 0;  // OpenMP may give fewer than were asked for
#pragma omp parallel num_threads(threads)
  {
    if (const int i = omp_get_thread_num()) {
      workers[i - 1].id = static_cast<pid_t>(syscall(SYS_gettid));
      ++met;
      sched_yield();
    } else {
      found = omp_get_num_threads() - 1;
      while (met < found) sched_yield();
    }
  }
  team.workers.resize(found);
}

inline int part_team(int threads) {
  cpu_set_t allowed;
  const bool parted = team.apart && team.process == getpid();
  if (threads < 2 || parted || sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) < 2) return 0;
  if (team.threads != threads || team.process != getpid()) meet_team(threads);
  const int cpu = sched_getcpu();
  int count = 0;
  for (Worker& worker : team.workers) {
    if (sched_getaffinity(worker.id, sizeof worker.mask, &worker.mask)) {
      team.threads = 0;  // it is gone: the next call meets those that came instead
      continue;
    }
    cpu_set_t others = worker.mask;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0 || CPU_EQUAL(&others, &worker.mask)) continue;  // bound to one CPU, or away already
    worker.apart = sched_setaffinity(worker.id, sizeof others, &others) == 0;
    count += worker.apart;
  }
  team.apart = count > 0;
  return count;
}

inline int join_team() {
  int count = 0;
  if (team.process != getpid()) return count;
  for (Worker& worker : team.workers) {
    count += worker.apart && sched_setaffinity(worker.id, sizeof worker.mask, &worker.mask) == 0;
    worker.apart = false;
  }
  team.apart = false;
  return count;
}

inline void forget_team() { team = {}; }

}  // namespace

#else

namespace {

inline int part_team(int) { return 0; }
inline int join_team() { return 0; }
inline void forget_team() {}

}  // namespace

#endif
