"""Linear layers on quantized rows: each row of activations carries its own scale, as each row of weights does."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError

# the largest magnitude of each quantized dtype; int8 keeps its range symmetric
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST = 1e-12  # rows whose largest magnitude is below quantize as if it were this: no division by zero


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values = round(x / scale) with scale = max |x| of the row / limit   (448 for e4m3, 127 for int8).

    x: [..., D], any float dtype; dtype: torch.float8_e4m3fn or torch.int8. Returns values [..., D] in
    `dtype` and scales [..., 1], float32, so that x is about values * scales: what `torch._scaled_mm`
    takes for its rows. float32 inside; one rounding, to nearest even. Raises ConfigError for another dtype.
    """
    if dtype not in LIMITS:
        raise ConfigError(f"quantize_rows: rows quantize to float8_e4m3fn or int8, got {dtype}")
    v = x.float()
    top = v.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    values = v * (LIMITS[dtype] / top)
    return (values.round() if dtype == torch.int8 else values).to(dtype), top / LIMITS[dtype]


def linear_quantized(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = (x weight^T) * x_scales * weight_scales^T + bias, the product of two tensors from `quantize_rows`.

    x: [..., K]; x_scales: float32 [..., 1]; weight: [N, K] in x's dtype; weight_scales: float32 [N, 1];
    bias: [N] or None; dtype: of the result, [..., N]. The sum over K is float32, one rounding at the end.
    """
    y = (x.float() @ weight.float().t()) * x_scales * weight_scales.float().t()
    return (y if bias is None else y + bias.float()).to(dtype)
