"""What a program is compiled for, as implementations of ops need to know it, and why one cannot serve it.

A refusal is a function of the target that returns a sentence, or None where nothing speaks against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import dtype_name


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


Refusal = Callable[[Target], str | None]


def either(*refusals: Refusal) -> Refusal:
    """The first reason that any of these gives, in this order."""
    return lambda target: next((reason for refuses in refusals if (reason := refuses(target))), None)


def off_gpu(target: Target) -> str | None:
    return None if target.device == "cuda" else f"runs on NVIDIA GPUs, not on {target.device}"


def no_gpu(target: Target | None = None) -> str | None:
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def in_training(target: Target) -> str | None:
    return "has no gradient" if target.training else None


def other_dtype(words: str, *dtypes: torch.dtype) -> Refusal:
    """`words` say which dtypes of storage there are: "takes float32"."""
    return lambda target: None if target.dtype in dtypes else f"{words}, not {dtype_name(target.dtype)}"


def larger_heads(most: int, name: str = "head_dim") -> Refusal:
    """Heads of more than `most` elements; name: the field of the target that has their size."""
    def refusal(target: Target) -> str | None:
        dim = getattr(target, name)
        return f"takes head dims up to {most}, not {dim}" if dim is not None and dim > most else None

    return refusal
