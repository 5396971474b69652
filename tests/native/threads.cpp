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
  std::vector<float> all;
  const auto keep = [&](const std::vector<float>& part) { all.insert(all.end(), part.begin(), part.end()); };
  std::vector<float> a(N), b(N), qkv = numbers(3 * N, 5);
  std::vector<uint8_t> image(3 * DIM * DIM);
  const twinflow_kernels& run = *twinflow_cpu_kernels();
  const auto rows = [](const std::vector<float>& of, int64_t row) {
    return twinflow_rows{const_cast<float*>(of.data()), SEQ * row, row};
  };
  const twinflow_rows in = rows(x, WIDTH), add = rows(other, WIDTH), token = rows(qkv, 3 * WIDTH);
  const twinflow_weights w{weight.data(), 0};
  const twinflow_out to_a{a.data(), nullptr, TWINFLOW_STORED}, to_b{b.data(), nullptr, TWINFLOW_STORED};
  const twinflow_shape shape{BATCH, SEQ, WIDTH}, heads{BATCH, SEQ, DIM};
  const twinflow_angles angles{x.data(), other.data(), 0, DIM / 2};
  const twinflow_image strides{3 * DIM * DIM, DIM * DIM, DIM, 1}, size{1, 3, DIM, DIM};
  const twinflow_launch how{TWINFLOW_F32, TEAM, nullptr};
  const float *q = w.data, *k = w.data;
  require(run.rms_norm(in, w, to_a, shape, 1e-5f, how));
  keep(a);
  require(run.layer_norm(in, w, w, to_a, shape, 1e-5f, how));
  keep(a);
  require(run.residual_norm(in, add, w, w, a.data(), to_b, shape, 1e-5f, how));
  keep(a), keep(b);
  require(run.residual_layer_norm(in, add, w, w, w, a.data(), to_b, shape, 1e-5f, how));
  keep(a), keep(b);
  require(run.swiglu(x.data(), to_a, BATCH * SEQ, WIDTH / 2, how));
  require(run.gelu_tanh(x.data(), to_b, BATCH * SEQ, WIDTH, how));
  keep(a), keep(b);
  require(run.x0_project(x.data(), other.data(), a.data(), N, 0.5f, how));
  keep(a);
  require(run.qk_norm_rope(token, WIDTH, token, WIDTH, q, k, angles, heads, HEADS, 2, 1e-5f, how));
  keep(qkv);
  require(run.to_uint8(x.data(), strides, image.data(), size, how));
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
