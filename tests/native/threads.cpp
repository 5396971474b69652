// The kernels from many threads at once, for ThreadSanitizer: the whole of abi.c in every thread, then all
// threads on the same inputs, whose results must be the same to the last bit.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "twinflow_rt.h"

extern "C" int abi_main(void);  // abi.c

namespace {

constexpr int THREADS = 8, TEAM = 2;
constexpr int64_t BATCH = 2, SEQ = 19, HEADS = 3, DIM = 16, WIDTH = HEADS * DIM, N = BATCH * SEQ * WIDTH;

std::vector<float> numbers(int64_t n, uint32_t state) {
  std::vector<float> out(n);
  for (float& v : out) v = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
  return out;
}

void require(int status) {
  if (status == TWINFLOW_OK) return;
  std::printf("%s\n", twinflow_error_message(status));
  std::exit(1);
}

// Every kernel once; x, other and weight are shared by all threads, the result is the caller's own.
std::vector<float> everything(const std::vector<float>& x, const std::vector<float>& other,
                              const std::vector<float>& weight) {
  const int64_t batch = SEQ * WIDTH, row = WIDTH;
  std::vector<float> all;
  const auto keep = [&](const std::vector<float>& part) { all.insert(all.end(), part.begin(), part.end()); };
  std::vector<float> a(N), b(N);
  const float* w = weight.data();
  require(twinflow_cpu_rms_norm(x.data(), batch, row, w, 0, a.data(), BATCH, SEQ, WIDTH, 1e-5f, TWINFLOW_F32, TEAM));
  keep(a);
  require(twinflow_cpu_layer_norm(x.data(), batch, row, w, 0, w, 0, a.data(), BATCH, SEQ, WIDTH, 1e-5f, TWINFLOW_F32,
                                  TEAM));
  keep(a);
  require(twinflow_cpu_residual_norm(x.data(), batch, row, other.data(), batch, row, w, 0, w, 0, a.data(), b.data(),
                                     BATCH, SEQ, WIDTH, 1e-5f, TWINFLOW_F32, TEAM));
  keep(a), keep(b);
  require(twinflow_cpu_residual_layer_norm(x.data(), batch, row, other.data(), batch, row, w, 0, w, 0, w, 0, a.data(),
                                           b.data(), BATCH, SEQ, WIDTH, 1e-5f, TWINFLOW_F32, TEAM));
  keep(a), keep(b);
  require(twinflow_cpu_swiglu(x.data(), a.data(), BATCH * SEQ, WIDTH / 2, TWINFLOW_F32, TEAM));
  require(twinflow_cpu_gelu_tanh(x.data(), b.data(), BATCH * SEQ, WIDTH, TWINFLOW_F32, TEAM));
  keep(a), keep(b);
  require(twinflow_cpu_x0_project(x.data(), other.data(), a.data(), N, 0.5f, TWINFLOW_F32, TEAM));
  keep(a);
  std::vector<float> qkv = numbers(3 * N, 5);
  require(twinflow_cpu_qk_norm_rope(qkv.data(), 3 * batch, 3 * row, row, qkv.data(), 3 * batch, 3 * row, row, w, w,
                                    x.data(), other.data(), 0, DIM / 2, BATCH, SEQ, HEADS, DIM, 2, 1e-5f, TWINFLOW_F32,
                                    TEAM));
  keep(qkv);
  const int64_t strides[4] = {3 * DIM * DIM, DIM * DIM, DIM, 1};
  std::vector<uint8_t> image(3 * DIM * DIM);
  require(twinflow_cpu_to_uint8(x.data(), strides, image.data(), 1, 3, DIM, DIM, TWINFLOW_F32, TEAM));
  keep({image.begin(), image.end()});
  return all;
}

void in_threads(const std::function<void(int)>& run) {
  std::vector<std::thread> threads;
  for (int i = 0; i < THREADS; ++i) threads.emplace_back(run, i);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  in_threads([](int) { abi_main(); });
  const std::vector<float> x = numbers(N, 1), other = numbers(N, 2), weight = numbers(WIDTH, 3);
  std::vector<std::vector<float>> results(THREADS);
  in_threads([&](int i) { results[i] = everything(x, other, weight); });
  for (const std::vector<float>& result : results)
    if (std::memcmp(result.data(), results[0].data(), result.size() * sizeof(float))) {
      std::printf("threads disagree\n");
      return 1;
    }
  std::printf("%d threads: ok, %s\n", THREADS, twinflow_cpu_isa());
  return 0;
}
