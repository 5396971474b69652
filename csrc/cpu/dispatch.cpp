// Picks the kernels for this CPU once, and gives them their C names.

#include "kernels.h"
#include "threads.h"

// Of OpenMP 5.0; weak, because a runtime may lack it, or there be none.
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);

namespace {

struct choice {
  const char* isa;
  const twinflow_kernels& kernels;
};

choice choose() {
#ifdef TWINFLOW_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return {"avx512", twinflow_kernels_avx512()};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", twinflow_kernels_avx2()};
#endif
  return {"baseline", twinflow_kernels_baseline()};
}

const choice& chosen() {
  static const choice once = choose();
  return once;
}

}  // namespace

int twinflow_abi_version(void) { return TWINFLOW_ABI_VERSION; }

const char* twinflow_cpu_isa(void) { return chosen().isa; }

const char* twinflow_error_message(int status) {
  switch (status) {
    case TWINFLOW_OK: return "no error";
    case TWINFLOW_NULL_POINTER: return "a required pointer is NULL";
    case TWINFLOW_BAD_SHAPE: return "a size or stride is out of range for this kernel";
    case TWINFLOW_BAD_DTYPE: return "the dtype is none of twinflow_dtype";
    case TWINFLOW_TOO_WIDE: return "rows are too wide for this kernel; see twinflow_rt.h";
    default: return status >= TWINFLOW_CUDA_ERROR ? "CUDA refused the launch" : "unknown status";
  }
}

int twinflow_cpu_release_threads(void) {
  constexpr int soft = 1;  // omp_pause_soft: what can be made again
  if (!omp_pause_resource_all || omp_pause_resource_all(soft) != 0) return -1;
  forget_team();
  return 0;
}

int twinflow_cpu_threads_apart(int threads) { return part_team(threads); }

int twinflow_cpu_threads_together(void) { return join_team(); }

int twinflow_cpu_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                          void* out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
  return chosen().kernels.rms_norm(x, x_batch, x_row, weight, weight_batch, out, batch, seq, dim, eps, dtype, threads);
}

int twinflow_cpu_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight, int64_t weight_batch,
                            const float* bias, int64_t bias_batch, void* out, int64_t batch, int64_t seq, int64_t dim,
                            float eps, int dtype, int threads) {
  return chosen().kernels.layer_norm(x, x_batch, x_row, weight, weight_batch, bias, bias_batch, out, batch, seq, dim,
                                     eps, dtype, threads);
}

int twinflow_cpu_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch,
                               int64_t branch_row, const float* post, int64_t post_batch, const float* pre,
                               int64_t pre_batch, void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim,
                               float eps, int dtype, int threads) {
  return chosen().kernels.residual_norm(x, x_batch, x_row, branch, branch_batch, branch_row, post, post_batch, pre,
                                        pre_batch, x_out, h_out, batch, seq, dim, eps, dtype, threads);
}

int twinflow_cpu_residual_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                     int64_t branch_batch, int64_t branch_row, const float* gate, int64_t gate_batch,
                                     const float* weight, int64_t weight_batch, const float* bias, int64_t bias_batch,
                                     void* x_out, void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps,
                                     int dtype, int threads) {
  return chosen().kernels.residual_layer_norm(x, x_batch, x_row, branch, branch_batch, branch_row, gate, gate_batch,
                                              weight, weight_batch, bias, bias_batch, x_out, h_out, batch, seq, dim,
                                              eps, dtype, threads);
}

int twinflow_cpu_swiglu(const void* x, void* out, int64_t rows, int64_t hidden, int dtype, int threads) {
  return chosen().kernels.swiglu(x, out, rows, hidden, dtype, threads);
}

int twinflow_cpu_gelu_tanh(const void* x, void* out, int64_t rows, int64_t width, int dtype, int threads) {
  return chosen().kernels.gelu_tanh(x, out, rows, width, dtype, threads);
}

int twinflow_cpu_qk_norm_rope(const void* qkv, int64_t qkv_batch, int64_t qkv_row, int64_t qkv_part, void* out,
                              int64_t out_batch, int64_t out_row, int64_t out_part, const float* q_weight,
                              const float* k_weight, const float* cos, const float* sin, int64_t angle_batch,
                              int64_t angle_row, int64_t batch, int64_t seq, int64_t heads, int64_t dim, int parts,
                              float eps, int dtype, int threads) {
  return chosen().kernels.qk_norm_rope(qkv, qkv_batch, qkv_row, qkv_part, out, out_batch, out_row, out_part, q_weight,
                                       k_weight, cos, sin, angle_batch, angle_row, batch, seq, heads, dim, parts, eps,
                                       dtype, threads);
}

int twinflow_cpu_grouped_qk_norm_rope(void* qkv, int64_t qkv_batch, int64_t qkv_row, const float* q_weight,
                                      const float* k_weight, const float* cos, const float* sin, int64_t angle_batch,
                                      int64_t angle_row, int64_t batch, int64_t seq, int64_t heads, int64_t kv_heads,
                                      int64_t dim, float eps, int dtype, int threads) {
  return chosen().kernels.grouped_qk_norm_rope(qkv, qkv_batch, qkv_row, q_weight, k_weight, cos, sin, angle_batch,
                                               angle_row, batch, seq, heads, kv_heads, dim, eps, dtype, threads);
}

int twinflow_cpu_x0_project(const void* x, const void* velocity, void* out, int64_t n, float t, int dtype,
                            int threads) {
  return chosen().kernels.x0_project(x, velocity, out, n, t, dtype, threads);
}

int twinflow_cpu_to_uint8(const void* image, const int64_t strides[4], uint8_t* out, int64_t batch, int64_t channels,
                          int64_t height, int64_t width, int dtype, int threads) {
  return chosen().kernels.to_uint8(image, strides, out, batch, channels, height, width, dtype, threads);
}

int twinflow_cpu_group_norm_silu(const void* x, const void* weight, const void* bias, void* out, float* scratch,
                                 int64_t batch, int64_t pixels, int64_t channels, int64_t groups, float eps, int dtype,
                                 int threads) {
  return chosen().kernels.group_norm_silu(x, weight, bias, out, scratch, batch, pixels, channels, groups, eps, dtype,
                                          threads);
}

int twinflow_cpu_winograd_input(const float* x, float* points, int64_t batch, int64_t height, int64_t width,
                                int64_t channels, int64_t first, int64_t last, int enlarged, int dtype, int threads) {
  return chosen().kernels.winograd_input(x, points, batch, height, width, channels, first, last, enlarged, dtype,
                                         threads);
}

int twinflow_cpu_winograd_output(const float* points, const float* bias, const float* added, float* out, int64_t batch,
                                 int64_t height, int64_t width, int64_t channels, int64_t first, int64_t last,
                                 int enlarged, int dtype, int threads) {
  return chosen().kernels.winograd_output(points, bias, added, out, batch, height, width, channels, first, last,
                                          enlarged, dtype, threads);
}

int twinflow_cpu_quantize_rows(const void* x, int64_t x_batch, int64_t x_row, int8_t* values, float* scales,
                               int64_t batch, int64_t seq, int64_t dim, int dtype, int threads) {
  return chosen().kernels.quantize_rows(x, x_batch, x_row, values, scales, batch, seq, dim, dtype, threads);
}

int twinflow_cpu_rms_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                    int64_t weight_batch, int8_t* values, float* scales, int64_t batch, int64_t seq,
                                    int64_t dim, float eps, int dtype, int threads) {
  return chosen().kernels.rms_norm_quantized(x, x_batch, x_row, weight, weight_batch, values, scales, batch, seq, dim,
                                             eps, dtype, threads);
}

int twinflow_cpu_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                      int64_t weight_batch, const float* bias, int64_t bias_batch, int8_t* values,
                                      float* scales, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                                      int threads) {
  return chosen().kernels.layer_norm_quantized(x, x_batch, x_row, weight, weight_batch, bias, bias_batch, values,
                                               scales, batch, seq, dim, eps, dtype, threads);
}

int twinflow_cpu_residual_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                         int64_t branch_batch, int64_t branch_row, const float* post,
                                         int64_t post_batch, const float* pre, int64_t pre_batch, void* x_out,
                                         int8_t* values, float* scales, int64_t batch, int64_t seq, int64_t dim,
                                         float eps, int dtype, int threads) {
  return chosen().kernels.residual_norm_quantized(x, x_batch, x_row, branch, branch_batch, branch_row, post, post_batch,
                                                  pre, pre_batch, x_out, values, scales, batch, seq, dim, eps, dtype,
                                                  threads);
}

int twinflow_cpu_residual_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                               int64_t branch_batch, int64_t branch_row, const float* gate,
                                               int64_t gate_batch, const float* weight, int64_t weight_batch,
                                               const float* bias, int64_t bias_batch, void* x_out, int8_t* values,
                                               float* scales, int64_t batch, int64_t seq, int64_t dim, float eps,
                                               int dtype, int threads) {
  return chosen().kernels.residual_layer_norm_quantized(x, x_batch, x_row, branch, branch_batch, branch_row, gate,
                                                        gate_batch, weight, weight_batch, bias, bias_batch, x_out,
                                                        values, scales, batch, seq, dim, eps, dtype, threads);
}

int twinflow_cpu_swiglu_quantized(const void* x, int8_t* values, float* scales, int64_t rows, int64_t hidden, int dtype,
                                  int threads) {
  return chosen().kernels.swiglu_quantized(x, values, scales, rows, hidden, dtype, threads);
}

int twinflow_cpu_gelu_tanh_quantized(const void* x, int8_t* values, float* scales, int64_t rows, int64_t width,
                                     int dtype, int threads) {
  return chosen().kernels.gelu_tanh_quantized(x, values, scales, rows, width, dtype, threads);
}

int twinflow_cpu_dequantize(const int32_t* sums, const float* x_scales, const float* w_scales, const void* bias,
                            void* out, int64_t rows, int64_t columns, int dtype, int threads) {
  return chosen().kernels.dequantize(sums, x_scales, w_scales, bias, out, rows, columns, dtype, threads);
}
