"""The op vocabulary: one stem per op, the eager reference being its specification."""

from .attention import attention, attention_fp8, linear_attention
from .conv import fold_upsample, upsample_conv
from .decode import to_uint8, x0_to_vae
from .int4 import linear_w4a8, linear_w4a16
from .linear import QuantizedRows, linear_quantized, quantize_rows
from .mlp import gelu_tanh, gelu_tanh_quantized, linear_gelu, linear_residual, linear_swiglu, swiglu, swiglu_quantized
from .norm import (
    group_norm_silu,
    layer_norm,
    layer_norm_quantized,
    residual_layer_norm,
    residual_layer_norm_quantized,
    residual_norm,
    residual_norm_quantized,
    rms_norm,
    rms_norm_quantized,
    rms_norm_silu,
)
from .nvfp4 import linear_nvfp4
from .rope import grouped_qk_norm_rope, joint_qk_norm_rope, qk_norm_rope, rotate
from .sample import x0_project
from .selection import select
from .table import EAGER, OpTable, ops_for
from .target import Target

__all__ = [
    "EAGER", "OpTable", "QuantizedRows", "Target", "attention", "attention_fp8", "fold_upsample", "gelu_tanh",
    "gelu_tanh_quantized", "group_norm_silu", "grouped_qk_norm_rope", "joint_qk_norm_rope", "layer_norm",
    "layer_norm_quantized", "linear_attention", "linear_gelu", "linear_nvfp4", "linear_quantized", "linear_residual",
    "linear_swiglu", "linear_w4a8", "linear_w4a16", "ops_for", "qk_norm_rope", "quantize_rows", "residual_layer_norm",
    "residual_layer_norm_quantized", "residual_norm", "residual_norm_quantized", "rms_norm", "rms_norm_quantized",
    "rms_norm_silu", "rotate", "select", "swiglu", "swiglu_quantized", "to_uint8", "upsample_conv", "x0_project",
    "x0_to_vae",
]  # fmt: skip
