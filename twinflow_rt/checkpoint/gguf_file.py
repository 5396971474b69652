"""GGUF files, the quantized single files of llama.cpp and ComfyUI, read like safetensors.

The `gguf` package has the layout of blocks, the values they stand for and llama.cpp's names. The header is read here:
the package's reader makes arrays of every word of a text encoder's tokenizer, and believes any length that is stated.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from errno import ENOMEM
from mmap import ACCESS_COPY, mmap
from os import SEEK_CUR
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, OutOfMemoryError, require_extra
from ..ops.int4 import CHUNK, Int4Form, Int4Weight, largest_units, pack_codes
from ..ops.linear import LIMITS, SMALLEST
from .files import Declared, refuse_foreign, require_file

MAX_COUNT, MAX_VALUES, MAX_AXES = 100_000, 1 << 23, 8  # tensors or other values; of an array; axes of a tensor
# a tensor: its type in the package, its shape, numbers and bytes of a block, and its mapped bytes
Entry = tuple[Any, tuple[int, ...], tuple[int, int], Tensor]
AT_ONCE = 1 << 18  # numbers dequantized by a thread at a time: they stay in its cache
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that are not quantized
INT4_FORMS = {"Q4_0": Int4Form(32), "Q4_1": Int4Form(32, True), "Q4_K": Int4Form(32, True)}
# types of a header's values: those of numbers, as `struct` calls them, of text and of arrays
NUMBERS, TEXT, ARRAY = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", 10)), 8, 9
SHAPES = "comfy.gguf.orig_shape."  # where ComfyUI keeps the shapes of tensors that it stores in rows of 256
AXES = {"x_pad_token": 2, "cap_pad_token": 2, "pos_embed": 3}  # of which llama.cpp's tools drop the first, a 1
LEAF = r"self_attn\.[qkvo]_(proj|norm)|mlp\.(gate|up|down)_proj|(input|post_attention|(pre|post)_feedforward)_layernorm"
LANGUAGE_MODEL = rf"lm_head|model\.(embed_tokens|norm|layers\.\d+\.({LEAF}))"
# a part of names -> what the package calls the models that have it, and which of the many names that its maps give a
# tensor are those of transformers' networks. Qwen2.5-VL's are all among Qwen3's.
LLAMA_CPP = {
    "enc.blk.": ("T5", r"shared|lm_head|(encoder|decoder)\..*(?<!\.wi)"),
    ".post_ffw_norm.": ("GEMMA2", LANGUAGE_MODEL),
    "blk.0.attn_q.": ("QWEN3", LANGUAGE_MODEL),
}


class GGUFFile:
    """The tensors of a GGUF file, mapped and dequantized one at a time, as a `TensorFile`.

    Text encoders under llama.cpp's names have transformers' here. Which they are, names say: a file's architecture
    field is often wrong. Raises CheckpointError for a file that is damaged, in parts, big-endian or of unknown types.
    """

    def __init__(self, path: Path) -> None:
        require_extra("reading GGUF files", "gguf", "gguf")
        require_file(path)
        self.path = path
        try:
            with path.open("rb") as file:
                entries = _read(path, mmap(file.fileno(), 0, access=ACCESS_COPY))
        except (OSError, ValueError, OverflowError, struct.error) as error:
            if getattr(error, "errno", None) == ENOMEM:
                raise OutOfMemoryError(f"{path} cannot be mapped; free memory, or raise `ulimit -v`") from None
            refuse_foreign(path, but=b"GGUF")
            raise CheckpointError(f"{path} is truncated or no GGUF file ({error}); download it again") from None
        names, self._gemma = _transformers_names(entries)
        self._entries = {names.get(name, name): entry for name, entry in entries.items()}

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def get_slice(self, name: str) -> Declared:
        kind, shape, *_ = self._entries[name]
        return Declared(shape, kind.name if kind.name in PLAIN else "BF16")  # which its numbers are best held in

    def nbytes(self, name: str) -> int:
        """Return the bytes that a tensor has in the file."""
        return len(self._entries[name][3])

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor: a view of the mapped file, or dequantized, in float32, bit for bit as `gguf.dequantize` has
        it. Raises CheckpointError for scales of NaN or infinity."""
        kind, shape, _, stored = self._entries[name]
        plain = PLAIN.get(kind.name)
        numbers = self._finite(name, _dequantized(*self._entries[name])) if plain is None else stored.view(plain)
        # a Gemma's norms multiply by 1 + w: llama.cpp keeps that, transformers w
        return numbers.view(shape) - 1 if self._gemma and name.endswith("norm.weight") else numbers.view(shape)

    def int4_form(self, name: str) -> Int4Form | None:
        """Return how `get_int4` gives a matrix of 4-bit blocks (Q4_0, Q4_1, Q4_K); None for any other tensor."""
        kind, shape, (numbers, _), _ = self._entries[name]
        return INT4_FORMS.get(kind.name) if len(shape) == 2 and shape[1] % max(CHUNK, numbers) == 0 else None

    def get_int4(self, name: str) -> Int4Weight:
        """Return a matrix that has an `int4_form`, with the codes that it has; scales are rounded to float16 in units
        of their row's (see `ops.int4`). Raises CheckpointError for scales of NaN or infinity."""
        _, shape, (_, size), stored = self._entries[name]
        packed, scales, minimums = _int4(stored.view(shape[0], -1, size))
        largest = largest_units(scales, minimums).amax(-1, keepdim=True)
        rows = self._finite(name, largest).clamp_min(SMALLEST) / LIMITS[torch.int8]
        return Int4Weight(packed, (scales / rows).half(), None if minimums is None else (minimums / rows).half(), rows)

    def _finite(self, name: str, numbers: Tensor) -> Tensor:
        if not all(extreme.isfinite() for extreme in torch.aminmax(numbers)):
            raise CheckpointError(f"{self.path}: {name:.200} has scales of NaN or infinity; download the file again")
        return numbers


def _dequantized(kind: Any, shape: tuple[int, ...], block: tuple[int, int], stored: Tensor) -> Tensor:
    """Return a tensor's numbers in a row, dequantized part by part in threads."""
    from gguf import dequantize

    def part(numbers: Tensor, blocks: Tensor) -> None:
        with np.errstate(all="ignore"):  # what is not finite is named later
            numbers.numpy()[:] = dequantize(blocks.numpy(), kind)  # threads are not in inference mode

    out = torch.empty(math.prod(shape), dtype=torch.float32)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(part, out.split(AT_ONCE), stored.split(AT_ONCE // block[0] * block[1])))
    return out


def _int4(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return packed codes, scales and minimums (None: 8 scales) of blocks [N, blocks of a row, bytes of a block]."""
    from gguf.quants import Q4_K

    if blocks.shape[-1] == Q4_K.type_size:  # two float16, eight scales and minimums of 6 bits, codes packed as here
        factors = blocks[..., :4].contiguous().view(torch.float16).float()
        small = np.stack(Q4_K.get_scale_min(blocks[..., 4:16].flatten(0, 1).numpy()), 1)
        scales, minimums = (torch.from_numpy(small).view(*factors.shape, 8) * factors[..., None]).unbind(-2)
        return blocks[..., 16:].flatten(1), scales.flatten(1), minimums.flatten(1)
    codes = blocks[..., -16:]  # low halves of bytes are the first 16
    scales, *least = blocks[..., :-16].contiguous().view(torch.float16).float().unbind(-1)
    return pack_codes(torch.stack((codes & 15, codes >> 4), -2).flatten(1)), scales, -least[0] if least else None


def _numbers(file: mmap, code: str) -> tuple[Any, ...]:
    if len(data := file.read(size := struct.calcsize(f"<{code}"))) < size:
        raise ValueError("it ends within its header")
    return struct.unpack(f"<{code}", data)


def _text(file: mmap) -> str:
    return str(file.read(*_numbers(file, "Q")), "utf-8")


def _value(file: mmap) -> tuple[Any, ...]:
    """Return a number, or an array of them; of text (), it is passed by."""
    (kind,), count = _numbers(file, "I"), 1
    if kind == ARRAY:
        kind, count = _numbers(file, "IQ")
    if kind not in (TEXT, *NUMBERS) or count > MAX_VALUES:
        raise ValueError(f"it has {count:,} values of type {kind}")
    if kind == TEXT:
        for _ in range(count):
            file.seek(int.from_bytes(file.read(8), "little"), SEEK_CUR)
    return () if kind == TEXT else _numbers(file, f"{count}{NUMBERS[kind]}")


def _read(path: Path, file: mmap) -> dict[str, Entry]:
    """Return the tensors of a file by their names. Raises ValueError for a damaged one, CheckpointError for others that
    cannot be read."""
    magic, version = _numbers(file, "4sI")
    if magic != b"GGUF":
        raise ValueError("it does not begin as one")
    if version and not version & 0xFFFF:
        raise CheckpointError(f"{path} is big-endian; convert it with `gguf-convert-endian {path} little`")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF of version {version}; versions 2 and 3 are read: get a newer file")
    tensors, values = _numbers(file, "QQ")
    if max(tensors, values) > MAX_COUNT:
        raise ValueError(f"it claims {tensors:,} tensors and {values:,} values; none has more than {MAX_COUNT:,}")
    metadata = {_text(file): _value(file) for _ in range(values)}
    if (parts := sum(metadata.get("split.count", ()))) > 1:
        raise CheckpointError(f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge`")
    declared: dict[str, tuple[Any, ...]] = {}
    for _ in range(tensors):
        name, (axes,) = _text(file), _numbers(file, "I")
        if name in declared or axes > MAX_AXES:
            raise ValueError(f"{name:.200} stands twice or has {axes:,} axes")
        declared[name] = _numbers(file, "Q" * axes + "IQ")
    alignment = sum(metadata.get("general.alignment", (32,)))
    if alignment not in (8 << i for i in range(20)):
        raise ValueError(f"its alignment is {alignment}")
    start, data = -(-file.tell() // alignment) * alignment, torch.frombuffer(file, dtype=torch.uint8)
    return {
        name: _entry(path, data, name, tuple(shape[::-1]), metadata.get(SHAPES + name), code, start + offset)
        for name, (*shape, code, offset) in declared.items()
    }


def _entry(path: Path, data: Tensor, name: str, stored: tuple[int, ...], original: Any, code: int, start: int) -> Entry:
    """Return a tensor of the file. original: its shape in ComfyUI's metadata, or None. Raises as `_read` does."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        kind = GGMLQuantizationType(code)
        numbers, size = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros(size, np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise CheckpointError(
            f"{path}: {name:.200} is of type {code}, which the installed gguf package does not dequantize; get "
            "another, such as Q4_K or Q8_0, or a newer package: pip install --upgrade gguf"
        ) from None
    shape = original or (1,) * (AXES.get(name.rpartition(".")[2], 0) - len(stored)) + stored
    end = start + math.prod(stored) // numbers * size
    if min((1, *stored, *shape)) < 1 or math.prod(stored[-1:]) % numbers or math.prod(shape) != math.prod(stored):
        raise ValueError(f"{name:.200} has shape {stored} or {shape}, of {kind.name} in blocks of {numbers}")
    if start % 8 or end > len(data):
        raise ValueError(f"{name:.200} has bytes {start:,} to {end:,} of {len(data):,}")
    return kind, shape, (numbers, size), data[start:end]


def _transformers_names(names: Iterable[str]) -> tuple[dict[str, str], bool]:
    """Return transformers' names of tensors in llama.cpp's, of those that have one, and whether they are a Gemma's."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    model, pattern = next((m for part, m in LLAMA_CPP.items() if any(part in n for n in names)), ("QWEN3", "none"))
    blocks = {match[1] for name in names if (match := re.search(r"\bblk\.(\d+)\.", name))}
    known = get_tensor_name_map(MODEL_ARCH[model], len(blocks)).mapping
    own = {llama: name for name, (_, llama) in known.items() if re.fullmatch(pattern, name)}
    split = {name: name.rpartition(".") for name in names}
    return {name: f"{own[stem]}.{leaf}" for name, (stem, _, leaf) in split.items() if stem in own}, model == "GEMMA2"
