"""What a program is compiled for, as implementations of ops need to know it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """What a program is compiled for. arch: compute capability, 90 for 9.0; None on a CPU or where
    unknown. head_dim, linear_head_dim: of softmax and of linear attention; None where unknown. quantized: what
    quantized layers multiply, int8 or float8_e4m3fn; None where there are none, or unknown. fp8_attention:
    whether softmax attention may be `attention_fp8`."""

    device: str
    dtype: torch.dtype
    training: bool = False
    arch: int | None = None
    head_dim: int | None = None
    linear_head_dim: int | None = None
    quantized: torch.dtype | None = None
    fp8_attention: bool = False

    @classmethod
    def of_network(cls, config: object, device: torch.device, dtype: torch.dtype) -> Target:
        """The target of a network with this config on `device` of this machine."""
        dims: dict[str, Any] = {name: getattr(config, name, None) for name in ("head_dim", "linear_head_dim")}
        return replace(cls.of(device, dtype), **dims)

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> Target:
        """The target that `device` of this machine is."""
        arch = None
        if device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            arch = 10 * major + minor
        return cls(device.type, dtype, arch=arch, head_dim=head_dim)
