"""The op table of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .attention import attention, linear_attention
from .decode import group_norm_silu, rms_norm_silu, to_uint8, upsample_conv, x0_to_vae
from .mlp import gelu_tanh, linear_gelu, linear_residual, linear_swiglu, swiglu
from .norm import layer_norm, residual_layer_norm, residual_norm, rms_norm
from .rope import grouped_qk_norm_rope, joint_qk_norm_rope, qk_norm_rope
from .sample import x0_project

Op = Callable[..., Any]  # gives tensors, or `QuantizedRows` where a quantized layer reads them


@dataclass(frozen=True)
class OpTable:
    """The callables a compiled network runs on; the signatures are those of the eager references."""

    rms_norm: Op
    layer_norm: Op
    residual_norm: Op
    qk_norm_rope: Op
    attention: Op
    swiglu: Op
    x0_project: Op
    to_uint8: Op
    residual_layer_norm: Op
    joint_qk_norm_rope: Op
    grouped_qk_norm_rope: Op
    gelu_tanh: Op
    linear_attention: Op
    linear_swiglu: Op
    linear_gelu: Op
    linear_residual: Op
    x0_to_vae: Op
    group_norm_silu: Op
    rms_norm_silu: Op
    upsample_conv: Op


EAGER = OpTable(
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    residual_norm=residual_norm,
    qk_norm_rope=qk_norm_rope,
    attention=attention,
    swiglu=swiglu,
    x0_project=x0_project,
    to_uint8=to_uint8,
    residual_layer_norm=residual_layer_norm,
    joint_qk_norm_rope=joint_qk_norm_rope,
    grouped_qk_norm_rope=grouped_qk_norm_rope,
    gelu_tanh=gelu_tanh,
    linear_attention=linear_attention,
    linear_swiglu=linear_swiglu,
    linear_gelu=linear_gelu,
    linear_residual=linear_residual,
    x0_to_vae=x0_to_vae,
    group_norm_silu=group_norm_silu,
    rms_norm_silu=rms_norm_silu,
    upsample_conv=upsample_conv,
)
