"""GGUF files for tests, written by the gguf package: of given tensors, or of blocks of random bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

# where the float16 of a block are: its scale and what it multiplies its minimums by
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """Random blocks of a quantized type, as bytes [..., bytes of a row]: scales about `scale`, of either sign."""
    rng = np.random.default_rng(seed)
    numbers, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // numbers, size), dtype=np.uint8)
    for at in HALVES[kind]:
        data[..., at : at + 2] = (rng.standard_normal((*data.shape[:-1], 1)) * scale).astype(np.float16).view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def q4_k(weight: np.ndarray) -> np.ndarray:
    """Quantize rows of multiples of 256 to Q4_K, for which the package has no code: plain minima and maxima."""
    groups = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, 8, 32)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    largest = ((x / 63).max(-1, keepdims=True) for x in ((high - low) / 15, -low))
    d, dmin = (np.maximum(x, 1e-7).astype(np.float16) for x in largest)
    scales = np.clip(np.ceil((high - low) / 15 / d.astype(np.float32)), 1, 63).astype(np.uint8)
    least = np.clip(np.rint(-low / dmin.astype(np.float32)), 0, 63).astype(np.uint8)
    steps, offsets = (x.astype(np.float32) * n for x, n in ((d, scales), (dmin, least)))
    codes = np.clip(np.rint((groups + offsets[..., None]) / steps[..., None]), 0, 15).astype(np.uint8)
    small = np.concatenate(
        (
            scales[..., :4] | (scales[..., 4:] >> 4) << 6,
            least[..., :4] | (least[..., 4:] >> 4) << 6,
            (scales[..., 4:] & 15) | (least[..., 4:] & 15) << 4,
        ),
        -1,
    )
    packed = (codes[..., ::2, :] | codes[..., 1::2, :] << 4).reshape(*codes.shape[:-2], 128)
    parts = (d.view(np.uint8), dmin.view(np.uint8), small, packed)
    return np.concatenate(parts, -1).reshape(*weight.shape[:-1], -1)


def quantized(weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    return q4_k(weight) if kind.name == "Q4_K" else gguf.quantize(weight, kind)


def write(
    path: Path, tensors: Mapping[str, Tensor | tuple[np.ndarray, str]], kind: str | Callable[[str], str] = "F32",
    architecture: str = "pig", metadata: Callable[[gguf.GGUFWriter], Any] | None = None, **options: Any,
) -> Path:  # fmt: skip
    """Write a file; return its path.

    tensors: numbers, or blocks and their type. kind: the type that matrices get, or what says it of a name; others,
    and matrices whose rows it does not divide, are F32, as files of the field have it.
    """
    writer = gguf.GGUFWriter(path, architecture, **options)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            wanted = GGMLQuantizationType[kind if isinstance(kind, str) else kind(name)]
            fits = tensor.ndim == 2 and tensor.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
            wanted = wanted if fits else GGMLQuantizationType.F32
            data, found = quantized(tensor.to(torch.float32).numpy(), wanted), wanted.name
        else:
            data, found = tensor
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[found])
    if metadata is not None:
        metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
