// The CPU kernels. Compiled once per instruction set (TWINFLOW_ISA names the table), so the loops are
// plain C++ that the compiler vectorises; `omp simd` allows it to reorder the sums.

#include "kernels.h"

#include "decode.h"
#include "group_norm.h"
#include "mlp.h"
#include "norm.h"
#include "rope.h"
#include "rows.h"
#include "sample.h"
#include "winograd.h"

const twinflow_kernels& TWINFLOW_ISA() {
  static const twinflow_kernels table = {c_rms_norm,
                                         c_layer_norm,
                                         c_residual_norm,
                                         c_residual_layer_norm,
                                         c_qk_norm_rope,
                                         c_grouped_qk_norm_rope,
                                         c_swiglu,
                                         c_gelu_tanh,
                                         c_x0_project,
                                         c_to_uint8,
                                         c_group_norm_silu,
                                         c_winograd_input,
                                         c_winograd_output,
                                         c_quantize_rows,
                                         c_rms_norm_quantized,
                                         c_layer_norm_quantized,
                                         c_residual_norm_quantized,
                                         c_residual_layer_norm_quantized,
                                         c_swiglu_quantized,
                                         c_gelu_tanh_quantized,
                                         c_dequantize};
  return table;
}
