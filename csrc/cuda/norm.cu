// The norm family: one block a row, the row held in registers, float32 statistics.

#include "rows.cuh"

namespace twinflow {
namespace {

// The weights of an affine step; either may be null.
struct Affine {
  twinflow_weights weight, bias;
};

// to = normalised x, scaled. CENTER: layer norm, otherwise RMS norm.
// (One block a multiprocessor asked for, where a thread holds most: left to itself, the compiler spills on 8.6
// to fit a third.)
template <class T, int N, int PER, bool CENTER, class To>
__global__ void __launch_bounds__(MAX_THREADS, N* PER == HELD ? 1 : 0)
    norm(Rows<const T> x, Affine affine, To to, int seq, int dim, float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  Share<T, N, PER> row;
  row.read(x.at(b, s), dim);
  if (CENTER) row.center(dim);
  row.normalize(dim, eps);
  row.scale(at(affine.weight, b), at(affine.bias, b), dim);
  to.put(row, blockIdx.x, dim);
}

// x_out = x + branch * gate (LAYER) or x + rms(branch) * gate; h_out = the norm of x_out that opens
// the next branch: layer norm (LAYER) or RMS norm.
template <class T, int N, int PER, bool LAYER, class To>
__global__ void __launch_bounds__(MAX_THREADS)
    residual(Rows<const T> x, Rows<const T> branch, twinflow_weights gate, Affine next, Stored x_out, To h_out, int seq,
             int dim, float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  Share<T, N, PER> row, old;
  row.read(branch.at(b, s), dim);
  old.read(x.at(b, s), dim);  // both loads are under way before the first sum waits for one
  if (!LAYER) row.normalize(dim, eps);
  row.scale(at(gate, b), nullptr, dim);
  row.with(old, [](float mine, float other) { return mine + other; });
  x_out.put(row, blockIdx.x, dim);
  if (!h_out.wanted()) return;
  if (LAYER) row.center(dim);
  row.normalize(dim, eps);
  row.scale(at(next.weight, b), at(next.bias, b), dim);
  h_out.put(row, blockIdx.x, dim);
}

template <bool CENTER>
int normalize(const twinflow_rows& x, const Affine& affine, bool given, const twinflow_out& out,
              const twinflow_shape& shape, float eps, const twinflow_launch& how) {
  const int64_t rows = shape.batch * shape.seq;
  if (const int error = shape_error(shape)) return error;
  if (rows == 0) return TWINFLOW_OK;
  if (!(given && x.data && complete(out))) return TWINFLOW_NULL_POINTER;
  return to_rows(out, [&](auto to) {
    return typed(how.dtype, [&](auto kind) {
      using T = decltype(kind);
      const Rows<const T> in(x);
      const bool wide =
          whole_groups(in, shape.dim) && to.wide() && whole_groups(affine.weight) && whole_groups(affine.bias);
      return with_config<T>(wide, shape.dim, [&](auto config, int threads) {
        return launch(norm<T, config.group, config.per, CENTER, decltype(to)>, rows, threads, how.stream, in, affine,
                      to, static_cast<int>(shape.seq), static_cast<int>(shape.dim), eps);
      });
    });
  });
}

template <bool LAYER>
int add_and_normalize(const twinflow_rows& x, const twinflow_rows& branch, const twinflow_weights& gate,
                      const Affine& next, bool given, void* sum, const twinflow_out& out, const twinflow_shape& shape,
                      float eps, const twinflow_launch& how) {
  const int64_t rows = shape.batch * shape.seq;
  if (const int error = shape_error(shape)) return error;
  if (rows == 0) return TWINFLOW_OK;
  if (!(given && x.data && branch.data && sum)) return TWINFLOW_NULL_POINTER;
  return to_rows(out, [&](auto to) {
    return typed(how.dtype, [&](auto kind) {
      using T = decltype(kind);
      const Rows<const T> in(x), add(branch);
      const Stored total{sum};
      const bool wide = whole_groups(in, shape.dim) && whole_groups(add, shape.dim) && total.wide() && to.wide() &&
                        whole_groups(gate) && whole_groups(next.weight) && whole_groups(next.bias);
      return with_config<T>(wide, shape.dim, [&](auto config, int threads) {
        return launch(residual<T, config.group, config.per, LAYER, decltype(to)>, rows, threads, how.stream, in, add,
                      gate, next, total, to, static_cast<int>(shape.seq), static_cast<int>(shape.dim), eps);
      });
    });
  });
}

}  // namespace

int launch_rms_norm(twinflow_rows x, twinflow_weights weight, twinflow_out out, twinflow_shape shape, float eps,
                    twinflow_launch how) {
  return normalize<false>(x, {weight, {}}, weight.data, out, shape, eps, how);
}

int launch_layer_norm(twinflow_rows x, twinflow_weights weight, twinflow_weights bias, twinflow_out out,
                      twinflow_shape shape, float eps, twinflow_launch how) {
  return normalize<true>(x, {weight, bias}, true, out, shape, eps, how);
}

int launch_residual_norm(twinflow_rows x, twinflow_rows branch, twinflow_weights post, twinflow_weights pre, void* sum,
                         twinflow_out out, twinflow_shape shape, float eps, twinflow_launch how) {
  const bool fits = pre.data ? complete(out) : out.format == TWINFLOW_STORED && !out.data;
  return add_and_normalize<false>(x, branch, post, {pre, {}}, post.data && fits, sum, out, shape, eps, how);
}

int launch_residual_layer_norm(twinflow_rows x, twinflow_rows branch, twinflow_weights gate, twinflow_weights weight,
                               twinflow_weights bias, void* sum, twinflow_out out, twinflow_shape shape, float eps,
                               twinflow_launch how) {
  return add_and_normalize<true>(x, branch, gate, {weight, bias}, complete(out), sum, out, shape, eps, how);
}

}  // namespace twinflow
