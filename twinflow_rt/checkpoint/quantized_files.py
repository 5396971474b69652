"""Safetensors files whose weights are stored in 8 bits, read as the dense weights that they stand for.

Names, dtypes and shapes decide: a weight in int8 or float8 has scales, by a name of `_companions`, for the whole, for
rows or for blocks; float8 may be the weight as it is. So ComfyUI's scaled fp8 and int8, quanto, torchao,
compressed-tensors, ModelOpt, FBGEMM and transformers' fine-grained fp8 are one kind. Others are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import Declared, parse_json
from .tensor_files import TensorFile, read_tensor, stored_bytes

EIGHT_BITS = ("I8", "F8_E4M3", "F8_E5M2")
SCALES = ("F32", "F16", "BF16", "F64")
# names that tell how a file was quantized, the most telling first
REFUSED = {
    r"\.(wscales|wcscales|smooth_factor|weight_proj_down)$": "nunchaku (SVDQuant)",
    r"\.(absmax|quant_map|SCB)$|\.quant_state\.": "bitsandbytes",
    r"\.(weight_scale_2|weight_global_scale)$": "nvfp4", r"\.(qweight|qzeros|(weight_)?g_idx)$": "GPTQ or AWQ",
    r"\.weight_packed$": "compressed-tensors in 4 bits", r"\._(shift|data\._data)$": "quanto in 4 or 2 bits",
    r"\.(pre_quant_scale|_\w+_act_pre_scale)$": "a method that scales inputs, too",
    r"\.svd_(up|down)$": "SDNQ", r"\.W_q$": "HQQ", r"\.weight_scales$": "EETQ", r"\.weight_s_rel$": "asym_w4a8_int8",
}  # fmt: skip
TORCHAO = re.compile(r'"_type": ?"((?:Int4|MX|NVFP4)\w*)"')  # in a header; its other tensors are read
COMFY = re.compile(r"(float8_e4m3fn|float8_e5m2|int8)(_(tensor|row|block)wise)?")  # formats that are read
# scales of activations, which are quantized here by what they are, and ComfyUI's marks
UNREAD = re.compile(r"(.*\.)?((in|out)put_(scale|zero_point)|scale_input|comfy_quant|scaled_fp8)")
NUMBER = re.compile(r"\d+")


class Weight(NamedTuple):
    """Keys of a weight's parts. scale: None for float8 as it is. rotated: inputs that a Hadamard matrix mixes, or 0."""

    data: str
    scale: str | None = None
    zero: str | None = None
    rotated: int = 0


def dense_files(opened: list[tuple[TensorFile, list[str]]], where: Path) -> list[tuple[TensorFile, list[str]]]:
    """Return the files of a network, each with its keys, as they are; or where weights are quantized, one file that
    serves all tensors dense, as scales may stand in another shard. where: what messages call the files. Raises
    CheckpointError for methods that are not read, and for scales that are missing or of another shape."""
    file = QuantizedFile({key: file for file, keys in opened for key in keys}, where)
    return [(file, [*file.keys()])] if file.weights else opened


class QuantizedFile:
    """A `TensorFile` of dense weights over files of quantized ones; weights: these, by the names they are served as.
    Scaled ones are read as float32, and best held in bfloat16, or float16 where scales are."""

    def __init__(self, files: Mapping[str, TensorFile], where: Path) -> None:
        self._files, self._where = files, where
        for pattern, method in REFUSED.items():
            if found := next((key for key in files if re.search(pattern, key)), None):
                raise self._unread(found, method)
        slices = {key: file.get_slice(key) for key, file in files.items()}
        self._dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}
        self._shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        rotations, alike = self._rotations(), {NUMBER.sub("", key) for key in files}
        stored = [key for key, dtype in self._dtypes.items() if dtype in EIGHT_BITS and not UNREAD.fullmatch(key)]
        stored += [key for key, dtype in self._dtypes.items() if dtype == "U8" and files.keys() & _companions(key)[1]]
        zeros = {_companions(key)[2] for key in stored}
        self.weights = dict(self._weight(key, rotations, alike) for key in stored if key not in zeros)
        used = {key for weight in self.weights.values() for key in weight[:3]}
        self._plain = [key for key in files if key not in used and not UNREAD.fullmatch(key)]

    def keys(self) -> Iterable[str]:
        return (*self._plain, *self.weights)

    def get_slice(self, name: str) -> Any:
        if (weight := self.weights.get(name)) is None:
            return self._files[name].get_slice(name)
        return Declared(self._shapes[weight.data], "F16" if self._dtypes.get(weight.scale or "") == "F16" else "BF16")

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in the files, its scales included."""
        keys = filter(None, self.weights.get(name, Weight(name))[:3])
        return sum(stored_bytes(self._dtypes[key], math.prod(self._shapes[key])) for key in keys)

    def get_tensor(self, name: str) -> Tensor:
        data, scale, zero, rotated = self.weights.get(name, Weight(name))
        stored = read_tensor(self._files[data], data)
        if scale is None:
            return stored.to(torch.bfloat16) if name in self.weights else stored  # which has every float8
        dense = stored.to(torch.float32)
        for key, apply in ((zero, Tensor.sub_), (scale, Tensor.mul_)):
            if key is not None:
                factors: Any = read_tensor(self._files[key], key).to(torch.float32)
                if not factors.isfinite().all():
                    raise self._damaged(f"{key} holds NaN or infinity")
                factors = _spread(factors, dense.shape)
                apply(dense, factors)
        return _unrotated(dense, rotated) if rotated else dense

    def _rotations(self) -> dict[str, int]:
        """Return how many inputs are rotated, by names of weights, of layers that ComfyUI's files describe in a header
        or in tensors. Raises CheckpointError for descriptions of what is not read."""
        said: dict[str, Any] = {}
        rotations: dict[str, int] = {}
        try:
            for file in set(self._files.values()):
                header: dict[str, str] = getattr(file, "metadata", dict)() or {}
                if kind := TORCHAO.search(" ".join(header.values())):
                    raise self._unread("a weight", f"torchao ({kind[1]:.40})")
                said |= parse_json(header.get("_quantization_metadata", "{}")).get("layers", {})
            for key in (key for key in self._files if key.endswith(".comfy_quant")):
                said[key.removesuffix(".comfy_quant")] = parse_json(self._files[key].get_tensor(key).numpy().tobytes())
            for layer, content in said.items():
                content = {"format": content} if isinstance(content, str) else {**content.get("params", {}), **content}
                if not COMFY.fullmatch(str(content.get("format"))):
                    raise self._unread(layer, f"ComfyUI ({content.get('format')!s:.60})")
                name = f"{layer}.weight"  # headers may leave out what stands before all names of a network
                names = [name] if name in self._files else [key for key in self._files if key.endswith("." + name)]
                group = content.get("convrot_groupsize", 256) if content.get("convrot") else 0
                rotations |= dict.fromkeys(names, group)
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(f"what it says of its quantization is not readable ({error})") from None
        return rotations

    def _weight(self, key: str, rotations: Mapping[str, int], alike: set[str]) -> tuple[str, Weight]:
        """Return the name that the weight with these data is served as, and where it stands. alike: all keys without
        their numbers, for float8 without a scale is whole only where no such weight of other blocks has one."""
        name, scales, zero = _companions(key)
        scale, dtype, shape = next((x for x in scales if x in self._dtypes), None), self._dtypes[key], self._shapes[key]
        if dtype == "U8" or (scale and (self._dtypes[scale] not in SCALES or scale.endswith(".scale"))):
            raise self._unread(
                key, f"a method with {dtype} and {self._dtypes[scale or key]} ({scale}), as mxfp8 or SDNQ"
            )
        if not scale and (dtype == "I8" or name in rotations or any(NUMBER.sub("", x) in alike for x in scales)):
            raise self._damaged(f"{name} is stored as {dtype} without its scale ({scales[0]}), so it is incomplete")
        weight = Weight(key, scale, zero if zero in self._dtypes else None, rotations.get(name, 0))
        for other in filter(None, (weight.scale, weight.zero)):
            if _spread(torch.empty(self._shapes[other], dtype=torch.float32, device="meta"), shape) is None:
                needs = f"but {name} of {list(shape)} needs one for all, one for each row, or one for each block"
                raise self._damaged(f"{other} has shape {list(self._shapes[other])}, {needs}")
        if (group := weight.rotated) and (group not in (16, 64, 256, 1024) or len(shape) != 2 or shape[1] % group):
            raise self._unread(name, f"a rotation of {group!r:.40} inputs where {list(shape)} has others")
        return name, weight

    def _unread(self, key: str, method: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: {key:.200} is quantized by {method}, in a form that is not read; get the model in "
            "bfloat16, fp8 or int8, or as GGUF, and quantize while loading (precision='int8', 'fp8' or 'int4')"
        )

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {what}; download it again")


def _companions(key: str) -> tuple[str, tuple[str, ...], str]:
    """Return the name that a weight is served as, and the names its scale and its zero point may have."""
    at, dot, leaf = key.rpartition(".")
    if leaf == "_data":  # quanto
        return at, (f"{at}._scale",), ""
    if leaf.startswith("_") and leaf.endswith("_qdata"):  # torchao
        stem = key.removesuffix("qdata")
        return f"{at}{dot}{leaf[1:-6]}", (f"{stem}scale",), f"{stem}zero_point"
    return key, (f"{key}_scale", f"{key}_scale_inv", f"{at}{dot}scale_{leaf}", f"{at}{dot}scale"), f"{key}_zero_point"


def _spread(factors: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return factors of blocks so that they broadcast with a weight of `shape`; None where they are of no blocks. Along
    an axis a block is all, or a power of two, of which the last one may be cut."""
    if factors.shape[len(shape) :].numel() != 1:
        return None
    factors = factors.reshape((*factors.shape, *[1] * len(shape))[: len(shape)])
    for axis, (size, count) in enumerate(zip(shape, factors.shape, strict=True)):
        block = next((1 << i for i in range(size.bit_length()) if -(-size >> i) == count), 0)
        if not block and count != 1:
            return None
        factors = factors if count == 1 else factors.repeat_interleave(block, axis).narrow(axis, 0, size)
    return factors


def _unrotated(dense: Tensor, group: int) -> Tensor:
    """Return a weight as it was before ConvRot (arXiv 2512.03673), which multiplies each `group` inputs with a regular
    Hadamard matrix, its own inverse."""
    corner = matrix = 0.5 - torch.eye(4, dtype=torch.float32).flip(1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, corner)
    turned: Tensor = dense.unflatten(1, (-1, group)) @ matrix
    return turned.flatten(1)
