/* twinflow_rt: the C interface of the native kernels. Plain C99: pointers, shapes, strides; no torch.
 *
 * Every function returns 0 or an error code (twinflow_error_message explains it), never throws, never
 * allocates, and may be called from several threads on different data. Strides count elements.
 * Arithmetic is float32 whatever the storage; results are rounded once, to nearest even.
 */
#ifndef TWINFLOW_RT_H
#define TWINFLOW_RT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TWINFLOW_ABI_VERSION 1

typedef enum { TWINFLOW_F32 = 0, TWINFLOW_BF16 = 1 } twinflow_dtype;

typedef enum {
  TWINFLOW_OK = 0,
  TWINFLOW_NULL_POINTER = 1,
  TWINFLOW_BAD_SHAPE = 2,
  TWINFLOW_BAD_DTYPE = 3
} twinflow_status;

int twinflow_abi_version(void);
const char* twinflow_error_message(int status);

/* The instruction set the CPU kernels run on: "avx512", "avx2" or "baseline". */
const char* twinflow_cpu_isa(void);

/* Norm weights: row r uses weight + (r / rows_per_weight) * dim, so one vector can serve all rows
 * (rows_per_weight = rows) or each sample its own. */

/* out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight.   x: [rows, dim], row stride x_stride;
 * out: [rows, dim] contiguous. */
int twinflow_cpu_rms_norm(const void* x, int64_t x_stride, const float* weight, int64_t rows_per_weight,
                          void* out, int64_t rows, int64_t dim, float eps, int dtype, int threads);

/* x_out = x + rms_norm(branch, post); h_out = rms_norm(x_out, pre).   h_out and pre may both be NULL. */
int twinflow_cpu_residual_norm(const void* x, int64_t x_stride, const void* branch, int64_t branch_stride,
                               const float* post, int64_t rows_per_post, const float* pre,
                               int64_t rows_per_pre, void* x_out, void* h_out, int64_t rows, int64_t dim,
                               float eps, int dtype, int threads);

/* out[r, i] = silu(x[r, i]) * x[r, hidden + i].   x: [rows, 2 * hidden] contiguous. */
int twinflow_cpu_swiglu(const void* x, void* out, int64_t rows, int64_t hidden, int dtype, int threads);

/* In place on q and k of qkv [batch, seq, 3, heads, dim] contiguous: RMS norm per head, then pairs
 * (2i, 2i+1) rotated by cos, sin [rope_batch, seq, dim / 2], rope_batch being 1 or batch. */
int twinflow_cpu_qk_norm_rope(void* qkv, const float* q_weight, const float* k_weight, const float* cos,
                              const float* sin, int64_t batch, int64_t rope_batch, int64_t seq,
                              int64_t heads, int64_t dim, float eps, int dtype, int threads);

/* out[b, y, x, c] = round(clamp(image[b, c, y, x] / 2 + 1/2, 0, 1) * 255); NaN gives 0.
 * image: strides of b, c, y, x; out: [batch, height, width, channels] uint8 contiguous. */
int twinflow_cpu_to_uint8(const void* image, const int64_t strides[4], uint8_t* out, int64_t batch,
                          int64_t channels, int64_t height, int64_t width, int dtype, int threads);

#ifdef __cplusplus
}
#endif
#endif
