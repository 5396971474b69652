"""The op vocabulary: one stem per op, the eager reference being its specification."""

from .attention import attention, linear_attention
from .decode import to_uint8
from .mlp import gelu_tanh, swiglu
from .norm import layer_norm, residual_layer_norm, residual_norm, rms_norm
from .rope import joint_qk_norm_rope, qk_norm_rope, rotate
from .sample import x0_project
from .select import EAGER, OpTable, Target, select

__all__ = [
    "EAGER", "OpTable", "Target", "attention", "gelu_tanh", "joint_qk_norm_rope", "layer_norm", "linear_attention",
    "qk_norm_rope", "residual_layer_norm", "residual_norm", "rms_norm", "rotate", "select", "swiglu",
    "to_uint8", "x0_project",
]  # fmt: skip
