// The closing step of the sampler.
#pragma once

#include "common.h"

namespace {

template <class T>
void x0_project(const T* x, const T* velocity, T* out, int64_t n, float t, int threads) {
#pragma omp parallel for simd num_threads(team(n, threads)) schedule(static)
  for (int64_t i = 0; i < n; ++i) store(out + i, load(x[i]) - t * load(velocity[i]));
}

int launch_x0_project(const void* x, const void* velocity, void* out, int64_t n, float t, twinflow_launch how) {
  if (n < 0) return TWINFLOW_BAD_SHAPE;
  if (n && !(x && velocity && out)) return TWINFLOW_NULL_POINTER;
  return typed(how.dtype, [&](auto kind) {
    using T = decltype(kind);
    x0_project(static_cast<const T*>(x), static_cast<const T*>(velocity), static_cast<T*>(out), n, t, how.threads);
  });
}

}  // namespace
