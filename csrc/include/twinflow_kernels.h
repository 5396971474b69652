/* The kernels, one line each: KERNEL(name, arguments) of the CPU and of NVIDIA GPUs, KERNEL_CPU of the CPU alone. Each
 * takes a twinflow_launch as its last argument and returns a twinflow_status. No include guard: whoever includes this
 * file defines both macros, and gets a member, a declaration or an entry of a table for each. */

/* norm.
 * rms_norm: out = x / sqrt(mean(x^2) + eps) * weight, over the last axis. */
KERNEL(rms_norm, twinflow_rows x, twinflow_weights weight, twinflow_out out, twinflow_shape shape, float eps)

/* out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; weight and bias may be NULL. */
KERNEL(layer_norm, twinflow_rows x, twinflow_weights weight, twinflow_weights bias, twinflow_out out,
       twinflow_shape shape, float eps)

/* sum = x + rms_norm(branch, post); out = rms_norm(sum, pre), read from the rounded sum. sum: contiguous, of the
 * storage's dtype. pre and out may both be NULL, where out is not quantized. */
KERNEL(residual_norm, twinflow_rows x, twinflow_rows branch, twinflow_weights post, twinflow_weights pre, void* sum,
       twinflow_out out, twinflow_shape shape, float eps)

/* sum = x + gate * branch; out = layer_norm(sum, weight, bias), read from the rounded sum. gate, weight and bias may
 * be NULL. */
KERNEL(residual_layer_norm, twinflow_rows x, twinflow_rows branch, twinflow_weights gate, twinflow_weights weight,
       twinflow_weights bias, void* sum, twinflow_out out, twinflow_shape shape, float eps)

/* out = silu(group_norm(x) * weight + bias), over groups of dim / groups channels and all pixels. x, out: [batch,
 * seq pixels, dim channels] contiguous; weight, bias: [dim] of x's dtype; scratch: float32, 32 * dim a sample. */
KERNEL_CPU(group_norm_silu, const void* x, const void* weight, const void* bias, void* out, float* scratch,
           twinflow_shape shape, int64_t groups, float eps)

/* rope.
 * qk_norm_rope: from q | k | v of every token to attention's operands: rms_norm of every head of q and k by q_weight
 * or k_weight (float32 [dim]), rounded to storage, then (x[2i] + j x[2i+1]) * (cos[i] + j sin[i]). A token's q, k and
 * v are heads * dim elements each, `part` elements apart; out may be qkv itself. parts: 2 writes q and k, 3 copies v
 * as well. shape: batch, seq and dim of a head, which is even; on a GPU at most 256. */
KERNEL(qk_norm_rope, twinflow_rows qkv, int64_t qkv_part, twinflow_rows out, int64_t out_part, const float* q_weight,
       const float* k_weight, twinflow_angles angles, twinflow_shape shape, int64_t heads, int parts, float eps)

/* The same in place for language models: q has `heads` heads, k and v have kv_heads each, adjacent, and a head's
 * halves are its pairs: (x[i] + j x[dim/2 + i]) * (cos[i] + j sin[i]). Either weight may be NULL: no norm. */
KERNEL_CPU(grouped_qk_norm_rope, twinflow_rows qkv, const float* q_weight, const float* k_weight,
           twinflow_angles angles, twinflow_shape shape, int64_t heads, int64_t kv_heads, float eps)

/* mlp: contiguous rows; quantized on a GPU, of at most 20480 elements.
 * swiglu: out[r, i] = silu(x[r, i]) * x[r, width + i]. x: [rows, 2 * width], out: [rows, width]. */
KERNEL(swiglu, const void* x, twinflow_out out, int64_t rows, int64_t width)

/* out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). x, out: [rows, width]. */
KERNEL(gelu_tanh, const void* x, twinflow_out out, int64_t rows, int64_t width)

/* linear.
 * quantize_rows: out = x, quantized. */
KERNEL(quantize_rows, twinflow_rows x, twinflow_out out, twinflow_shape shape)

/* out[r, c] = sums[r, c] * x_scales[r] * w_scales[c] + bias[c]: a product of quantized rows. bias, of out's dtype,
 * may be NULL; out may be sums itself where it is float32. */
KERNEL(dequantize, const int32_t* sums, const float* x_scales, const float* w_scales, const void* bias, void* out,
       int64_t rows, int64_t columns)

/* The whole product, for a CPU whose vendor's library has none: out[r, c] = sum_k x[r, k] weight[c, k], exact, scaled
 * as above. x, weight: within +-127; inputs: at most 2^17. */
KERNEL_CPU(linear_int8, const int8_t* x, const float* x_scales, const int8_t* weight, const float* w_scales,
           const void* bias, void* out, int64_t rows, int64_t columns, int64_t inputs)

/* int4.
 * linear_int4: the same with a weight of 4 bits in place of weight and w_scales, widened as widen_int4 does. */
KERNEL_CPU(linear_int4, const int8_t* x, const float* x_scales, twinflow_int4 weight, const void* bias, void* out,
           int64_t rows, int64_t columns, int64_t inputs)

/* out[r, k] = code * group scale - group minimum: as TWINFLOW_I8, rounded to nearest even; as TWINFLOW_STORED, of
 * float32 only, times scales[r]. */
KERNEL_CPU(widen_int4, twinflow_int4 weight, void* out, int format, int64_t rows, int64_t inputs)

/* conv: the transforms of a 3x3 convolution with a border of zeros by F(2x2, 3x3); float32 only. Tile k of an output
 * [batch, height, width, channels] covers 2x2 pixels; tiles go row by row, (height + 1) / 2 * ((width + 1) / 2) a
 * sample. enlarged: the convolution reads a nearest enlargement by 2 of its input. Tiles have 16 points, 9 where
 * enlarged. The product of each point with its matrix is the caller's.
 * winograd_input: x, of `size`, to points [last - first, points, channels] of tiles [first, last). */
KERNEL_CPU(winograd_input, const float* x, float* points, twinflow_image size, int64_t first, int64_t last,
           int enlarged)

/* points, of the output's channels, to pixels of out, of `size`, plus bias [channels] and `added`, like out; both may
 * be NULL. */
KERNEL_CPU(winograd_output, const float* points, const float* bias, const float* added, float* out, twinflow_image size,
           int64_t first, int64_t last, int enlarged)

/* decode.
 * to_uint8: out[b, y, x, c] = round(clamp(image[b, c, y, x] / 2 + 1/2, 0, 1) * 255), half to even; NaN gives 0.
 * out: [batch, height, width, channels], contiguous. */
KERNEL(to_uint8, const void* image, twinflow_image strides, uint8_t* out, twinflow_image size)

/* sample.
 * x0_project: out = x - t * velocity, over n contiguous elements: the clean end of a TwinFlow path. */
KERNEL(x0_project, const void* x, const void* velocity, void* out, int64_t n, float t)

#undef KERNEL
#undef KERNEL_CPU
