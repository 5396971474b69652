// The table of kernels that kernels.cpp fills once per instruction set; dispatch.cpp picks one.
#pragma once

#include "twinflow_rt.h"

struct twinflow_kernels {
  decltype(&twinflow_cpu_rms_norm) rms_norm;
  decltype(&twinflow_cpu_layer_norm) layer_norm;
  decltype(&twinflow_cpu_residual_norm) residual_norm;
  decltype(&twinflow_cpu_residual_layer_norm) residual_layer_norm;
  decltype(&twinflow_cpu_qk_norm_rope) qk_norm_rope;
  decltype(&twinflow_cpu_grouped_qk_norm_rope) grouped_qk_norm_rope;
  decltype(&twinflow_cpu_swiglu) swiglu;
  decltype(&twinflow_cpu_gelu_tanh) gelu_tanh;
  decltype(&twinflow_cpu_x0_project) x0_project;
  decltype(&twinflow_cpu_to_uint8) to_uint8;
  decltype(&twinflow_cpu_group_norm_silu) group_norm_silu;
  decltype(&twinflow_cpu_winograd_input) winograd_input;
  decltype(&twinflow_cpu_winograd_output) winograd_output;
  decltype(&twinflow_cpu_quantize_rows) quantize_rows;
  decltype(&twinflow_cpu_rms_norm_quantized) rms_norm_quantized;
  decltype(&twinflow_cpu_layer_norm_quantized) layer_norm_quantized;
  decltype(&twinflow_cpu_residual_norm_quantized) residual_norm_quantized;
  decltype(&twinflow_cpu_residual_layer_norm_quantized) residual_layer_norm_quantized;
  decltype(&twinflow_cpu_swiglu_quantized) swiglu_quantized;
  decltype(&twinflow_cpu_gelu_tanh_quantized) gelu_tanh_quantized;
  decltype(&twinflow_cpu_dequantize) dequantize;
};

const twinflow_kernels& twinflow_kernels_baseline();
const twinflow_kernels& twinflow_kernels_avx2();
const twinflow_kernels& twinflow_kernels_avx512();
