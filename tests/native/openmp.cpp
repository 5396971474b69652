// The part of OpenMP's runtime that the kernels use, on std::thread. libgomp is not built for ThreadSanitizer,
// which therefore misses that its barriers order anything and reports races that are none.

#include <thread>
#include <vector>

namespace {
thread_local int number = 0, team = 1;
}

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team; }

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  const int count = threads ? static_cast<int>(threads) : 1;
  const auto run = [=](int i) {
    number = i, team = count;
    region(data);
    number = 0, team = 1;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
}
}
