"""Linear layers, and their quantized form: each row of activations carries its own scale, as each row of weights does.

`linear_quantized` is the specification of precisions "int8" and "fp8". `int8_mm` and the native one are it for int8,
`scaled_mm` for float8 on an NVIDIA GPU; where none serves, the specification runs, slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import dtype_name
from ..errors import ConfigError
from .declaration import COMPILED, op

Quantizing = Callable[..., tuple[Tensor, Tensor]]  # an op that returns values and scales
# the largest magnitude of each quantized dtype; int8 keeps its range symmetric
LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
PACKED_DTYPES = (torch.float32, torch.bfloat16)
GPU_ROWS = 16  # cuBLASLt's int8 product takes more rows than these
SMALLEST = 1e-12  # rows whose largest magnitude is below quantize as if it were this: no division by zero


class QuantizedRows(NamedTuple):
    """Activations of a quantized network, about values * scales: what passes from the norm or activation that writes
    them to the layer that multiplies them.

    values: int8 or float8_e4m3fn [..., D]; scales: float32 [..., 1]; dtype: the storage dtype of the network, which
    a product of these rows is rounded to.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


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
    values = v * (torch.full_like(top, LIMITS[dtype]) / top)  # number / tensor would round twice
    return (values.round_() if dtype == torch.int8 else values).to(dtype), top / LIMITS[dtype]


def linear_quantized(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = (x weight^T) * x_scales * weight_scales^T + bias, the product of two tensors from `quantize_rows`.

    x: [..., K]; x_scales: float32 [..., 1]; weight: [N, K] in x's dtype; weight_scales: float32 [N, 1];
    bias: [N] or None; dtype: of the result, [..., N]. The sum over K is float32, one rounding at the end.
    """
    y = (x.float() @ weight.float().t()) * x_scales * weight_scales.float().t()
    return (y if bias is None else y + bias.float()).to(dtype)


@dataclass(frozen=True)
class QuantizedLinearOps:
    """What a quantized layer calls."""

    quantize_rows: Quantizing = op(quantize_rows, *COMPILED)
    linear_quantized: Callable[..., Tensor] = op(linear_quantized, "native", "scaled-mm", "cuda", "int8-mm")


# -- on a CPU: weights are stored once in the form that the matrix product reads ---------------------------


def packing_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of `dtype` cannot be packed for `device`, or None."""
    if device.type != "cpu":
        return f"oneDNN's layout is the CPU's, not {device.type}'s"
    if dtype not in PACKED_DTYPES:
        return f"oneDNN packs float32 and bfloat16, not {dtype_name(dtype)}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN packs bfloat16 for CPUs with AVX-512 (BW, VL, DQ) or AVX-NE-CONVERT"
    return None


def pack(weight: Tensor) -> Tensor:
    """`weight` [N, K], float32 or bfloat16, in the blocked layout that oneDNN's kernel for this CPU reads.

    An opaque tensor of the same shape and size: `linear_packed` takes it, `.to_dense()` gives it back.
    A plain weight is arranged anew in every call (`benches/bench_linear.py` has both).
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def linear_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x weight^T + bias with a weight from `pack`; x: [..., K] of its dtype. Returns [..., N]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def linear_upcast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x weight^T + bias, multiplied in float32 whatever the storage, rounded once, to x's dtype.

    For CPUs that can store bfloat16 but only emulate its products, which takes far longer than
    converting the weight in every call.
    """
    y = x.float() @ weight.float().t()
    return (y if bias is None else y.add_(bias.float())).to(x.dtype)


@cache
def sums_int8() -> bool:
    """Return whether this CPU adds 8-bit products in 32 bits (VNNI, AMX); in 16 bits, two of them can saturate."""
    flags = torch.cpu.get_capabilities()
    return any(flags.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def int8_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in int32, exactly: x int8 [..., K], weight int8 [N, K]; returns [rows of x, N].

    On a CPU only where `sums_int8`. On a GPU K and N are multiples of 8, and fewer than 17 rows are padded with zeros.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.is_cuda and len(rows) <= GPU_ROWS:
        padded: Tensor = torch._int_mm(F.pad(rows, (0, 0, 0, GPU_ROWS + 1 - len(rows))), weight.t())
        return padded.narrow(0, 0, len(rows))
    sums: Tensor = torch._int_mm(rows, weight.t())
    return sums


def int8_mm(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_quantized` of int8: products are summed exactly, in int32; scaled in float32, rounded once."""
    y = int8_sums(x, weight) * x_scales.reshape(-1, 1)
    y.mul_(weight_scales.view(1, -1))
    return (y if bias is None else y.add_(bias)).to(dtype).view(*x.shape[:-1], len(weight))


# -- on an NVIDIA GPU ----------------------------------------------------------------------------------------


def scaled_mm(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_quantized` of float8_e4m3fn by `torch._scaled_mm` with a scale per row and column, in bfloat16.

    K and N are multiples of 16. Partial sums are kept as the tensor cores have them (`use_fast_accum`):
    on compute capability 9.0 with fewer bits than float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return rows.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)
    y = torch._scaled_mm(
        rows, weight.t(), x_scales.reshape(-1, 1), weight_scales.view(1, -1), None if bias is None else bias.to(dtype),
        out_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip
    return y.view(*x.shape[:-1], len(weight))
