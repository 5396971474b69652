/* twinflow_rt: the C interface of the native kernels. Plain C99: pointers, shapes, strides; no torch.
 *
 * A library has a table of kernels (twinflow_kernels.h says what each computes). Every kernel returns
 * TWINFLOW_OK or an error code (twinflow_error_message explains it), never throws, never allocates, and may
 * be called from several threads on different data. All strides count elements; the last axis has stride 1.
 * Storage is float32 or bfloat16, arithmetic is float32, and results are rounded once, to nearest even.
 * Sizes of 0 are allowed and do nothing.
 *
 * The CPU's kernels split rows over OpenMP threads. Those of a GPU live in a library of their own
 * (libtwinflow_cuda), take device pointers, and are enqueued on a stream without waiting for it.
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

#define TWINFLOW_ABI_VERSION 8

typedef enum { TWINFLOW_F32 = 0, TWINFLOW_BF16 = 1 } twinflow_dtype;

/* How rows are written: in the storage's dtype, or quantized to integers up to 127 or to float8 e4m3 ("fn": no
 * infinity) up to 448. */
typedef enum { TWINFLOW_STORED = 0, TWINFLOW_I8 = 1, TWINFLOW_E4M3 = 2 } twinflow_format;

typedef enum {
  TWINFLOW_OK = 0,
  TWINFLOW_NULL_POINTER = 1,
  TWINFLOW_BAD_SHAPE = 2,
  TWINFLOW_BAD_DTYPE = 3,
  TWINFLOW_TOO_WIDE = 4,     /* on a GPU: a row does not fit in one block's registers */
  TWINFLOW_CUDA_ERROR = 1000 /* on a GPU: 1000 + cudaError_t of the launch */
} twinflow_status;

/* The sizes of rows. On a GPU, dim is at most 16384, and 2048 where rows are not whole 16-byte groups or not aligned
 * to 16 bytes; batch * seq stays below 2^31. Offsets may exceed it. */
typedef struct {
  int64_t batch, seq, dim;
} twinflow_shape;

/* Rows of a tensor: row s of sample b is at data + b * batch + s * row. What a kernel only reads it does not change. */
typedef struct {
  void* data;
  int64_t batch, row;
} twinflow_rows;

/* Weights [dim] of sample b, at data + b * batch: batch is 0 where all samples share them. */
typedef struct {
  const float* data;
  int64_t batch;
} twinflow_weights;

/* Weights of 4 bits, rows of `inputs`, contiguous: weight = (code * group scale - group minimum) * scales[row], codes 0
 * to 15, a scale and a minimum (float16) for each `group` inputs of a row; the parentheses stay within +-127. Of every
 * 64 inputs, input i is in the low half of byte i of 32, input i + 32 in its high half. inputs: a multiple of 64 and of
 * group, group of 32. */
typedef struct {
  const uint8_t* packed;
  const uint16_t *group_scales, *group_minimums; /* the latter NULL: 8 * group scale */
  const float* scales;
  int64_t group;
} twinflow_int4;

/* Where rows go, contiguous. Quantized: data[r, i] = round(y[r, i] / scales[r]) with scales[r] = max |y[r]| / limit, y
 * not rounded to storage before; scales: float32, one per row. A row that holds NaN or infinity gets such a scale. The
 * CPU's kernels know TWINFLOW_STORED and TWINFLOW_I8; e4m3 is emulated below compute capability 8.9. */
typedef struct {
  void* data;
  float* scales; /* NULL where format is TWINFLOW_STORED */
  int format;    /* twinflow_format */
} twinflow_out;

/* Rotation angles, dim / 2 a row, at cos + b * batch + s * row; batch is 0 where all samples share them. */
typedef struct {
  const float *cos, *sin;
  int64_t batch, row;
} twinflow_angles;

/* One number for each axis of an image: its sizes, or its strides. */
typedef struct {
  int64_t batch, channels, height, width;
} twinflow_image;

/* How a kernel runs. dtype: twinflow_dtype; threads: on the CPU; stream: on a GPU, a cudaStream_t. */
typedef struct {
  int dtype, threads;
  void* stream;
} twinflow_launch;

/* The kernels of a library; NULL where it has none of that name. */
typedef struct {
#define KERNEL(name, ...) int (*name)(__VA_ARGS__, twinflow_launch how);
#define KERNEL_CPU KERNEL
#include "twinflow_kernels.h"
} twinflow_kernels;

TWINFLOW_API int twinflow_abi_version(void);
TWINFLOW_API const char* twinflow_error_message(int status);

/* The CPU's kernels for the instruction set of this machine: "avx512", "avx2" or "baseline". */
TWINFLOW_API const twinflow_kernels* twinflow_cpu_kernels(void);
TWINFLOW_API const char* twinflow_cpu_isa(void);

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

/* The kernels of NVIDIA GPUs. usable: TWINFLOW_OK if the driver can run them on the current device; otherwise why not:
 * no device, a driver older than the library, a GPU the library has no code for. error_message: text for
 * TWINFLOW_CUDA_ERROR + cudaError_t, and for every other status. */
TWINFLOW_API const twinflow_kernels* twinflow_cuda_kernels(void);
TWINFLOW_API int twinflow_cuda_usable(void);
TWINFLOW_API const char* twinflow_cuda_error_message(int status);
TWINFLOW_API int twinflow_cuda_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif
