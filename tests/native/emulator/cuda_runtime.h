// Enough of CUDA to run csrc/cuda on a CPU: the same sources, compiled by a C++ compiler, every thread of a
// block a coroutine. Blocks run one after the other. Barriers and shuffles keep their meaning: a barrier
// that not all live threads reach, or a shuffle that part of a warp misses, ends the launch with an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct emulated_stream*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  unsigned long dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim;

namespace emulator {

enum class State { ready, shuffle, barrier, done };

struct Thread {
  ucontext_t context;
  State state;
  std::vector<char> stack;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<uint32_t> shuffled;
  ucontext_t scheduler;
  std::function<void()> body;
  unsigned current = 0;
};

inline Machine machine;

inline void enter() {
  machine.body();
  machine.threads[machine.current].state = State::done;
}

inline void wait(State state) {
  Thread& self = machine.threads[machine.current];
  self.state = state;
  swapcontext(&self.context, &machine.scheduler);
}

inline void resume(unsigned i) {
  machine.current = i;
  threadIdx.x = i;
  machine.threads[i].state = State::ready;
  swapcontext(&machine.scheduler, &machine.threads[i].context);
}

inline void prepare(Thread& t) {
  t.state = State::ready;
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.data();
  t.context.uc_stack.ss_size = t.stack.size();
  t.context.uc_link = &machine.scheduler;
  makecontext(&t.context, enter, 0);
}

// The one state of all threads [first, last), or false.
inline bool agree(unsigned first, unsigned last, State* state) {
  *state = machine.threads[first].state;
  for (unsigned i = first; i < last; ++i)
    if (machine.threads[i].state != *state) return false;
  return true;
}

inline cudaError_t run_block() {
  const unsigned count = blockDim.x;
  for (unsigned i = 0; i < count; ++i) prepare(machine.threads[i]);
  for (;;) {
    bool moved = false, waiting = false;
    for (unsigned warp = 0; warp < count; warp += 32) {
      State state;
      const bool together = agree(warp, warp + 32, &state);
      if (together && (state == State::ready || state == State::shuffle)) {
        for (unsigned i = warp; i < warp + 32; ++i) resume(i);
        moved = true;
        continue;
      }
      for (unsigned i = warp; i < warp + 32; ++i) {  // exited threads count as arrived
        const State s = machine.threads[i].state;
        if (s != State::barrier && s != State::done) return cudaErrorLaunchFailure;
        waiting |= s == State::barrier;
      }
    }
    if (moved) continue;
    if (!waiting) return cudaSuccess;
    for (unsigned i = 0; i < count; ++i)
      if (machine.threads[i].state == State::barrier) resume(i);
  }
}

inline cudaError_t run(const dim3& grid, const dim3& size, std::function<void()> body) {
  if (grid.y * grid.z * size.y * size.z != 1 || size.x < 1 || size.x > 1024 || size.x % 32)
    return cudaErrorInvalidConfiguration;  // CUDA allows more; csrc/cuda needs no more
  machine.threads.resize(1024);
  machine.shuffled.resize(1024);
  for (unsigned i = 0; i < size.x; ++i) machine.threads[i].stack.resize(32 << 10);
  machine.body = std::move(body);
  blockDim = size;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    if (const cudaError_t error = run_block()) return error;
  return cudaSuccess;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::barrier); }

template <class V>
V __shfl_xor_sync(unsigned, V v, int mask) {
  static_assert(sizeof(V) == sizeof(uint32_t), "");
  const unsigned self = emulator::machine.current;
  std::memcpy(&emulator::machine.shuffled[self], &v, sizeof v);
  emulator::wait(emulator::State::shuffle);  // all lanes have written
  V other;
  std::memcpy(&other, &emulator::machine.shuffled[self ^ mask], sizeof other);
  emulator::wait(emulator::State::shuffle);  // all lanes have read
  return other;
}

inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }

inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(x)); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  return emulator::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
}

template <class K>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, K*) {
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "emulator: a launch of a kind it does not know";
    case cudaErrorLaunchFailure: return "emulator: threads of a warp or block parted before a shuffle or barrier";
  }
  return "emulator: unknown error";
}
