/* twinflow_rt: the C interface of the native kernels. Plain C99: pointers, shapes, strides; no torch.
 *
 * Every function returns TWINFLOW_OK or an error code (twinflow_error_message explains it), never
 * throws, never allocates, and may be called from several threads on different data. All strides count
 * elements; the last axis has stride 1. Storage is float32 or bfloat16, arithmetic is float32, and
 * results are rounded once, to nearest even. Sizes of 0 are allowed and do nothing.
 *
 * The cpu functions split rows over `threads` OpenMP threads. The cuda functions live in a library of
 * their own (libtwinflow_cuda), take device pointers, and are enqueued on `stream` (a cudaStream_t)
 * without waiting for it.
 */
#ifndef TWINFLOW_RT_H
#define TWINFLOW_RT_H

#include <stdint.h>

#if defined(__GNUC__)
#define TWINFLOW_API __attribute__((visibility("default")))
#else
#define TWINFLOW_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TWINFLOW_ABI_VERSION 6

typedef enum { TWINFLOW_F32 = 0, TWINFLOW_BF16 = 1 } twinflow_dtype;

/* What rows are quantized to: integers up to 127, or float8 e4m3 ("fn": no infinity) up to 448. */
typedef enum { TWINFLOW_I8 = 0, TWINFLOW_E4M3 = 1 } twinflow_format;

typedef enum {
  TWINFLOW_OK = 0,
  TWINFLOW_NULL_POINTER = 1,
  TWINFLOW_BAD_SHAPE = 2,
  TWINFLOW_BAD_DTYPE = 3,
  TWINFLOW_TOO_WIDE = 4,     /* cuda: a row does not fit in one block's registers */
  TWINFLOW_CUDA_ERROR = 1000 /* cuda: 1000 + cudaError_t of the launch */
} twinflow_status;

TWINFLOW_API int twinflow_abi_version(void);
TWINFLOW_API const char* twinflow_error_message(int status);

/* The instruction set the CPU kernels run on: "avx512", "avx2" or "baseline". */
TWINFLOW_API const char* twinflow_cpu_isa(void);

/* Rows are addressed as p + b * p_batch + s * p_row for b < batch, s < seq. A weight of sample b is
 * weight + b * weight_batch: weight_batch is 0 when all samples share one. */

/* out = x / sqrt(mean(x^2) + eps) * weight, over the last axis.
 * x: [batch, seq, dim]; weight: float32 [1 or batch, dim]; out: [batch, seq, dim] contiguous. */
TWINFLOW_API int twinflow_cpu_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                       int64_t weight_batch, void* out, int64_t batch, int64_t seq, int64_t dim,
                                       float eps, int dtype, int threads);

/* out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; weight and bias may be NULL. */
TWINFLOW_API int twinflow_cpu_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                         int64_t weight_batch, const float* bias, int64_t bias_batch, void* out,
                                         int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads);

/* x_out = x + rms_norm(branch, post);  h_out = rms_norm(x_out, pre), read from the rounded x_out.
 * x, branch: [batch, seq, dim]; x_out, h_out: the same, contiguous. pre and h_out may both be NULL. */
TWINFLOW_API int twinflow_cpu_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                            int64_t branch_batch, int64_t branch_row, const float* post,
                                            int64_t post_batch, const float* pre, int64_t pre_batch, void* x_out,
                                            void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                                            int threads);

/* x_out = x + gate * branch;  h_out = layer_norm(x_out, weight, bias), read from the rounded x_out.
 * gate, weight and bias may be NULL. */
TWINFLOW_API int twinflow_cpu_residual_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                                  int64_t branch_batch, int64_t branch_row, const float* gate,
                                                  int64_t gate_batch, const float* weight, int64_t weight_batch,
                                                  const float* bias, int64_t bias_batch, void* x_out, void* h_out,
                                                  int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                                                  int threads);

/* out[r, i] = silu(x[r, i]) * x[r, hidden + i].   x: [rows, 2 * hidden], out: [rows, hidden], contiguous. */
TWINFLOW_API int twinflow_cpu_swiglu(const void* x, void* out, int64_t rows, int64_t hidden, int dtype, int threads);

/* out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).   x, out: [rows, width], contiguous. */
TWINFLOW_API int twinflow_cpu_gelu_tanh(const void* x, void* out, int64_t rows, int64_t width, int dtype, int threads);

/* From q | k | v of every token to attention's operands: rms_norm of every head of q and k by q_weight or
 * k_weight (float32 [dim]), rounded to storage, then (x[2i] + j x[2i+1]) * (cos[i] + j sin[i]).
 * A token's q, k and v are heads * dim elements each, `part` elements apart; out may be qkv itself. parts:
 * 2 writes q and k, 3 copies v as well. cos, sin: float32 rows of dim / 2, angle_batch 0 where all samples
 * share them. dim must be even. */
TWINFLOW_API int twinflow_cpu_qk_norm_rope(const void* qkv, int64_t qkv_batch, int64_t qkv_row, int64_t qkv_part,
                                           void* out, int64_t out_batch, int64_t out_row, int64_t out_part,
                                           const float* q_weight, const float* k_weight, const float* cos,
                                           const float* sin, int64_t angle_batch, int64_t angle_row, int64_t batch,
                                           int64_t seq, int64_t heads, int64_t dim, int parts, float eps, int dtype,
                                           int threads);

/* The same in place for language models: q has `heads` heads, k and v have kv_heads each, adjacent, and a head's
 * halves are its pairs: (x[i] + j x[dim/2 + i]) * (cos[i] + j sin[i]). Either weight may be NULL: no norm. */
TWINFLOW_API int twinflow_cpu_grouped_qk_norm_rope(void* qkv, int64_t qkv_batch, int64_t qkv_row, const float* q_weight,
                                                   const float* k_weight, const float* cos, const float* sin,
                                                   int64_t angle_batch, int64_t angle_row, int64_t batch, int64_t seq,
                                                   int64_t heads, int64_t kv_heads, int64_t dim, float eps, int dtype,
                                                   int threads);

/* out = x - t * velocity, elementwise over n contiguous elements: the clean end of a TwinFlow path. */
TWINFLOW_API int twinflow_cpu_x0_project(const void* x, const void* velocity, void* out, int64_t n, float t, int dtype,
                                         int threads);

/* out[b, y, x, c] = round(clamp(image[b, c, y, x] / 2 + 1/2, 0, 1) * 255), half to even; NaN gives 0.
 * image: strides of b, c, y, x; out: [batch, height, width, channels] uint8 contiguous. */
TWINFLOW_API int twinflow_cpu_to_uint8(const void* image, const int64_t strides[4], uint8_t* out, int64_t batch,
                                       int64_t channels, int64_t height, int64_t width, int dtype, int threads);

/* out = silu(group_norm(x) * weight + bias), over groups of channels / groups channels and all pixels.
 * x, out: [batch, pixels, channels] contiguous; weight, bias: [channels] of x's dtype; scratch: float32, 32 * channels
 * for each sample. */
TWINFLOW_API int twinflow_cpu_group_norm_silu(const void* x, const void* weight, const void* bias, void* out,
                                              float* scratch, int64_t batch, int64_t pixels, int64_t channels,
                                              int64_t groups, float eps, int dtype, int threads);

/* The transforms of a 3x3 convolution with a border of zeros by F(2x2, 3x3); float32 only. Tile k of an output [batch,
 * height, width, channels] covers 2x2 pixels; tiles go row by row, (height + 1) / 2 * ((width + 1) / 2) a sample.
 * enlarged: the convolution reads a nearest enlargement by 2 of its input. Tiles have 16 points, 9 where enlarged.
 * `input`: x [batch, height, width, channels] to points [last - first, points, channels] of tiles [first, last).
 * The product of each point with its matrix is the caller's.
 * `output`: points, of the output's channels, to pixels, plus bias [channels] and `added`, like out; both may be NULL.
 * height and width are those of x in the first, of out in the second. */
TWINFLOW_API int twinflow_cpu_winograd_input(const float* x, float* points, int64_t batch, int64_t height,
                                             int64_t width, int64_t channels, int64_t first, int64_t last, int enlarged,
                                             int dtype, int threads);

TWINFLOW_API int twinflow_cpu_winograd_output(const float* points, const float* bias, const float* added, float* out,
                                              int64_t batch, int64_t height, int64_t width, int64_t channels,
                                              int64_t first, int64_t last, int enlarged, int dtype, int threads);

/* Quantized rows. values[r, i] = round(y[r, i] / scales[r]) with scales[r] = max |y[r]| / 127, y being x itself or
 * what the function of the same name without "_quantized" computes, in float32 and not rounded to storage before.
 * values: int8, contiguous; scales: float32, one per row. A row that holds NaN or infinity gets such a scale. */
TWINFLOW_API int twinflow_cpu_quantize_rows(const void* x, int64_t x_batch, int64_t x_row, int8_t* values,
                                            float* scales, int64_t batch, int64_t seq, int64_t dim, int dtype,
                                            int threads);

TWINFLOW_API int twinflow_cpu_rms_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                                 int64_t weight_batch, int8_t* values, float* scales, int64_t batch,
                                                 int64_t seq, int64_t dim, float eps, int dtype, int threads);

TWINFLOW_API int twinflow_cpu_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                                   int64_t weight_batch, const float* bias, int64_t bias_batch,
                                                   int8_t* values, float* scales, int64_t batch, int64_t seq,
                                                   int64_t dim, float eps, int dtype, int threads);

/* x_out is stored as by twinflow_cpu_residual_norm; pre is required. */
TWINFLOW_API int twinflow_cpu_residual_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                                      int64_t branch_batch, int64_t branch_row, const float* post,
                                                      int64_t post_batch, const float* pre, int64_t pre_batch,
                                                      void* x_out, int8_t* values, float* scales, int64_t batch,
                                                      int64_t seq, int64_t dim, float eps, int dtype, int threads);

TWINFLOW_API int twinflow_cpu_residual_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row,
                                                            const void* branch, int64_t branch_batch,
                                                            int64_t branch_row, const float* gate, int64_t gate_batch,
                                                            const float* weight, int64_t weight_batch,
                                                            const float* bias, int64_t bias_batch, void* x_out,
                                                            int8_t* values, float* scales, int64_t batch, int64_t seq,
                                                            int64_t dim, float eps, int dtype, int threads);

TWINFLOW_API int twinflow_cpu_swiglu_quantized(const void* x, int8_t* values, float* scales, int64_t rows,
                                               int64_t hidden, int dtype, int threads);

TWINFLOW_API int twinflow_cpu_gelu_tanh_quantized(const void* x, int8_t* values, float* scales, int64_t rows,
                                                  int64_t width, int dtype, int threads);

/* out[r, c] = sums[r, c] * x_scales[r] * w_scales[c] + bias[c]: a product of quantized rows. bias, of out's dtype,
 * may be NULL; out may be sums itself where it is float32. */
TWINFLOW_API int twinflow_cpu_dequantize(const int32_t* sums, const float* x_scales, const float* w_scales,
                                         const void* bias, void* out, int64_t rows, int64_t columns, int dtype,
                                         int threads);

/* Ends the OpenMP threads that wait for the calling thread's next kernel; that kernel starts new ones. Returns 0, or
 * -1 where the OpenMP runtime cannot. While several threads own such teams, with more members together than the
 * machine has cores, libgomp puts each to sleep between kernels, and waking them costs more than small kernels do. */
TWINFLOW_API int twinflow_cpu_release_threads(void);

/* Keeps the calling thread's OpenMP threads, of a team of `threads`, off the CPU that it runs on now, until
 * twinflow_cpu_threads_together gives them their CPUs back; the caller's own are not touched. For work that begins
 * after a pause: schedulers may wake a thread on the caller's CPU although others are idle, and there it waits while
 * the caller spins for it. The first call starts the team where there is none. Both return how many threads they
 * changed: 0 where the caller may use one CPU only, where the threads are bound to CPUs already, when they are apart
 * already, on systems other than Linux and without OpenMP. Like a kernel, not for a forked child with more than one
 * thread. */
TWINFLOW_API int twinflow_cpu_threads_apart(int threads);
TWINFLOW_API int twinflow_cpu_threads_together(void);

/* On a GPU. Rows of at most 16384 elements; rows that are not whole 16-byte groups, or
 * not aligned to 16 bytes, at most 2048. batch * seq stays below 2^31; offsets may exceed it. */
TWINFLOW_API int twinflow_cuda_rms_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                        int64_t weight_batch, void* out, int64_t batch, int64_t seq, int64_t dim,
                                        float eps, int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_residual_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                             int64_t branch_batch, int64_t branch_row, const float* post,
                                             int64_t post_batch, const float* pre, int64_t pre_batch, void* x_out,
                                             void* h_out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                                             void* stream);

TWINFLOW_API int twinflow_cuda_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                          int64_t weight_batch, const float* bias, int64_t bias_batch, void* out,
                                          int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_residual_layer_norm(const void* x, int64_t x_batch, int64_t x_row, const void* branch,
                                                   int64_t branch_batch, int64_t branch_row, const float* gate,
                                                   int64_t gate_batch, const float* weight, int64_t weight_batch,
                                                   const float* bias, int64_t bias_batch, void* x_out, void* h_out,
                                                   int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
                                                   void* stream);

/* dim: at most 256. */
TWINFLOW_API int twinflow_cuda_qk_norm_rope(const void* qkv, int64_t qkv_batch, int64_t qkv_row, int64_t qkv_part,
                                            void* out, int64_t out_batch, int64_t out_row, int64_t out_part,
                                            const float* q_weight, const float* k_weight, const float* cos,
                                            const float* sin, int64_t angle_batch, int64_t angle_row, int64_t batch,
                                            int64_t seq, int64_t heads, int64_t dim, int parts, float eps, int dtype,
                                            void* stream);

TWINFLOW_API int twinflow_cuda_swiglu(const void* x, void* out, int64_t rows, int64_t hidden, int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_gelu_tanh(const void* x, void* out, int64_t rows, int64_t width, int dtype,
                                         void* stream);

/* Quantized rows as the cpu functions make them, in either twinflow_format: the limit of e4m3 is 448 in place of 127.
 * hidden and width: at most 20480. e4m3 is emulated below compute capability 8.9. */
TWINFLOW_API int twinflow_cuda_quantize_rows(const void* x, int64_t x_batch, int64_t x_row, void* values, float* scales,
                                             int64_t batch, int64_t seq, int64_t dim, int format, int dtype,
                                             void* stream);

TWINFLOW_API int twinflow_cuda_rms_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                                  int64_t weight_batch, void* values, float* scales, int64_t batch,
                                                  int64_t seq, int64_t dim, float eps, int format, int dtype,
                                                  void* stream);

TWINFLOW_API int twinflow_cuda_layer_norm_quantized(const void* x, int64_t x_batch, int64_t x_row, const float* weight,
                                                    int64_t weight_batch, const float* bias, int64_t bias_batch,
                                                    void* values, float* scales, int64_t batch, int64_t seq,
                                                    int64_t dim, float eps, int format, int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_residual_norm_quantized(const void* x, int64_t x_batch, int64_t x_row,
                                                       const void* branch, int64_t branch_batch, int64_t branch_row,
                                                       const float* post, int64_t post_batch, const float* pre,
                                                       int64_t pre_batch, void* x_out, void* values, float* scales,
                                                       int64_t batch, int64_t seq, int64_t dim, float eps, int format,
                                                       int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_residual_layer_norm_quantized(
    const void* x, int64_t x_batch, int64_t x_row, const void* branch, int64_t branch_batch, int64_t branch_row,
    const float* gate, int64_t gate_batch, const float* weight, int64_t weight_batch, const float* bias,
    int64_t bias_batch, void* x_out, void* values, float* scales, int64_t batch, int64_t seq, int64_t dim, float eps,
    int format, int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_swiglu_quantized(const void* x, void* values, float* scales, int64_t rows,
                                                int64_t hidden, int format, int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_gelu_tanh_quantized(const void* x, void* values, float* scales, int64_t rows,
                                                   int64_t width, int format, int dtype, void* stream);

TWINFLOW_API int twinflow_cuda_dequantize(const int32_t* sums, const float* x_scales, const float* w_scales,
                                          const void* bias, void* out, int64_t rows, int64_t columns, int dtype,
                                          void* stream);

TWINFLOW_API int twinflow_cuda_x0_project(const void* x, const void* velocity, void* out, int64_t n, float t, int dtype,
                                          void* stream);

TWINFLOW_API int twinflow_cuda_to_uint8(const void* image, const int64_t strides[4], uint8_t* out, int64_t batch,
                                        int64_t channels, int64_t height, int64_t width, int dtype, void* stream);

/* TWINFLOW_OK if the driver can run this library's kernels on the current device; otherwise why not:
 * no device, a driver older than the library, a GPU the library has no code for. */
TWINFLOW_API int twinflow_cuda_usable(void);

/* Text for TWINFLOW_CUDA_ERROR + cudaError_t, and for every other status. */
TWINFLOW_API const char* twinflow_cuda_error_message(int status);
TWINFLOW_API int twinflow_cuda_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif
