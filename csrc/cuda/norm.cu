// The norm family: one block a row, the row held in registers, float32 statistics.

#include "rows.cuh"

namespace twinflow {
namespace {

// Where the weights of an affine step are; either pointer may be null.
struct Affine {
  Weights weight, bias;
  __device__ const float* w(int64_t b) const { return weight.data ? weight.at(b) : nullptr; }
  __device__ const float* b(int64_t b) const { return bias.data ? bias.at(b) : nullptr; }
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
  row.scale(affine.w(b), affine.b(b), dim);
  to.put(row, blockIdx.x, dim);
}

// x_out = x + branch * gate (LAYER) or x + rms(branch) * gate; h_out = the norm of x_out that opens
// the next branch: layer norm (LAYER) or RMS norm.
template <class T, int N, int PER, bool LAYER, class To>
__global__ void __launch_bounds__(MAX_THREADS)
    residual(Rows<const T> x, Rows<const T> branch, Weights gate, Affine next, Stored x_out, To h_out, int seq, int dim,
             float eps) {
  const int64_t b = blockIdx.x / seq, s = blockIdx.x % seq;
  Share<T, N, PER> row, old;
  row.read(branch.at(b, s), dim);
  old.read(x.at(b, s), dim);  // both loads are under way before the first sum waits for one
  if (!LAYER) row.normalize(dim, eps);
  row.scale(gate.data ? gate.at(b) : nullptr, nullptr, dim);
  row.with(old, [](float mine, float other) { return mine + other; });
  x_out.put(row, blockIdx.x, dim);
  if (!h_out.wanted()) return;
  if (LAYER) row.center(dim);
  row.normalize(dim, eps);
  row.scale(next.w(b), next.b(b), dim);
  h_out.put(row, blockIdx.x, dim);
}

template <bool CENTER, class To>
int launch_norm(const void* x, int64_t x_batch, int64_t x_row, Affine affine, bool complete, To to, Shape shape,
                float eps, int dtype, void* stream) {
  if (shape.error()) return shape.error();
  if (shape.empty()) return TWINFLOW_OK;
  if (!(complete && x)) return TWINFLOW_NULL_POINTER;
  if (to.error()) return to.error();
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in{static_cast<const T*>(x), x_batch, x_row};
    const bool wide =
        whole_groups(in, shape.dim) && to.wide() && whole_groups(affine.weight) && whole_groups(affine.bias);
    return with_config<T>(wide, shape.dim, [&](auto config, int threads) {
      return launch(norm<T, config.group, config.per, CENTER, To>, shape.batch * shape.seq, threads, stream, in, affine,
                    to, static_cast<int>(shape.seq), static_cast<int>(shape.dim), eps);
    });
  });
}

template <bool LAYER, class To>
int launch_residual(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                    int64_t branch_row, Weights gate, Affine next, bool complete, void* x_out, To h, Shape shape,
                    float eps, int dtype, void* stream) {
  if (shape.error()) return shape.error();
  if (shape.empty()) return TWINFLOW_OK;
  if (!(complete && x && branch && x_out)) return TWINFLOW_NULL_POINTER;
  if (h.error()) return h.error();
  return typed(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Rows<const T> in{static_cast<const T*>(x), x_batch, x_row};
    const Rows<const T> add{static_cast<const T*>(branch), branch_batch, branch_row};
    const Stored sum{x_out};
    const bool wide = whole_groups(in, shape.dim) && whole_groups(add, shape.dim) && sum.wide() && h.wide() &&
                      whole_groups(gate) && whole_groups(next.weight) && whole_groups(next.bias);
    return with_config<T>(wide, shape.dim, [&](auto config, int threads) {
      return launch(residual<T, config.group, config.per, LAYER, To>, shape.batch * shape.seq, threads, stream, in, add,
                    gate, next, sum, h, static_cast<int>(shape.seq), static_cast<int>(shape.dim), eps);
    });
  });
}

}  // namespace
}  // namespace twinflow

using namespace twinflow;

int twinflow_cuda_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                           void* out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, void* stream) {
  return launch_norm<false>(x, x_batch, x_row, {{weight, weight_batch}, {}}, weight && out, Stored{out},
                            {batch, seq, dim}, eps, dtype, stream);
}

int twinflow_cuda_rms_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                     int64_t weight_batch, void* values, float* scales, int64_t batch, int64_t seq,
                                     int64_t dim, float eps, int format, int dtype, void* stream) {
  return launch_norm<false>(x, x_batch, x_row, {{weight, weight_batch}, {}}, weight && values && scales,
                            Quantized{values, scales, format}, {batch, seq, dim}, eps, dtype, stream);
}

int twinflow_cuda_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                             const float* bias, int64_t bias_batch, void* out, int64_t batch, int64_t seq, int64_t dim,
                             float eps, int dtype, void* stream) {
  return launch_norm<true>(x, x_batch, x_row, {{weight, weight_batch}, {bias, bias_batch}}, out, Stored{out},
                           {batch, seq, dim}, eps, dtype, stream);
}

int twinflow_cuda_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                       int64_t weight_batch, const float* bias, int64_t bias_batch, void* values,
                                       float* scales, int64_t batch, int64_t seq, int64_t dim, float eps, int format,
                                       int dtype, void* stream) {
  return launch_norm<true>(x, x_batch, x_row, {{weight, weight_batch}, {bias, bias_batch}}, values && scales,
                           Quantized{values, scales, format}, {batch, seq, dim}, eps, dtype, stream);
}

int twinflow_cuda_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                                int64_t branch_row, const float* post, int64_t post_batch, const float* pre,
                                int64_t pre_batch, void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim,
                                float eps, int dtype, void* stream) {
  return launch_residual<false>(x, x_batch, x_row, branch, branch_batch, branch_row, {post, post_batch},
                                {{pre, pre_batch}, {}}, post && !pre == !h_out, x_out, Stored{h_out}, {batch, seq, dim},
                                eps, dtype, stream);
}

int twinflow_cuda_residual_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                          int64_t branch_batch, int64_t branch_row, const float* post,
                                          int64_t post_batch, const float* pre, int64_t pre_batch, void* x_out,
                                          void* values, float* scales, int64_t batch, int64_t seq, int64_t dim,
                                          float eps, int format, int dtype, void* stream) {
  return launch_residual<false>(x, x_batch, x_row, branch, branch_batch, branch_row, {post, post_batch},
                                {{pre, pre_batch}, {}}, post && pre && values && scales, x_out,
                                Quantized{values, scales, format}, {batch, seq, dim}, eps, dtype, stream);
}

int twinflow_cuda_residual_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                      int64_t branch_batch, int64_t branch_row, const float* gate, int64_t gate_batch,
                                      const float* weight, int64_t weight_batch, const float* bias, int64_t bias_batch,
                                      void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps,
                                      int dtype, void* stream) {
  return launch_residual<true>(x, x_batch, x_row, branch, branch_batch, branch_row, {gate, gate_batch},
                               {{weight, weight_batch}, {bias, bias_batch}}, h_out, x_out, Stored{h_out},
                               {batch, seq, dim}, eps, dtype, stream);
}

int twinflow_cuda_residual_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                                int64_t branch_batch, int64_t branch_row, const float* gate,
                                                int64_t gate_batch, const float* weight, int64_t weight_batch,
                                                const float* bias, int64_t bias_batch, void* x_out, void* values,
                                                float* scales, int64_t batch, int64_t seq, int64_t dim, float eps,
                                                int format, int dtype, void* stream) {
  return launch_residual<true>(x, x_batch, x_row, branch, branch_batch, branch_row, {gate, gate_batch},
                               {{weight, weight_batch}, {bias, bias_batch}}, values && scales, x_out,
                               Quantized{values, scales, format}, {batch, seq, dim}, eps, dtype, stream);
}
