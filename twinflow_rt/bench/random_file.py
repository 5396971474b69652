"""Weights made on demand, for measuring a model without its files.

With this module imported, a network's folder may hold `random_weights.json` in place of safetensors: names, shapes,
the stored dtype and a seed (`checkpoint.tensor_files.READERS` is told of it below). A tensor depends on its name and
the seed alone, so every reader sees the same weights. Values have the size of a trained network's: matrices
N(0, 1 / fan-in), biases N(0, 0.1^2), norm weights 1 + N(0, 0.2^2); no zeros, which would let a GPU run faster than on
real weights.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import Declared, read_json
from ..checkpoint.tensor_files import DTYPES, READERS
from ..errors import CheckpointError

FILE = "random_weights.json"
BLOCK = (1 << 20) + 7  # a prime, so that the rows of no matrix repeat


class RandomFile:
    """A declaration of random weights, read like a safetensors file. Raises CheckpointError for a damaged one."""

    def __init__(self, path: Path) -> None:
        try:
            declared = read_json(path)
            self.code, self.dtype, self.seed = declared["dtype"], DTYPES[declared["dtype"]], int(declared["seed"])
            self.shapes = {name: tuple(map(int, shape)) for name, shape in declared["tensors"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} declares no random weights ({error!r}); write it again") from None

    def keys(self) -> Iterable[str]:
        return self.shapes.keys()

    def get_slice(self, name: str) -> Declared:
        return Declared(self.shapes[name], self.code)

    def get_tensor(self, name: str) -> Tensor:
        return random_tensor(name, self.shapes[name], self.dtype, self.seed)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return the weights of that name, on the CPU: one block of normals, repeated from a start the name chooses.

    As fast as memory is written; drawing 20 billion normals takes minutes.
    """
    block, size = _block(dtype, seed), math.prod(shape)
    start = zlib.crc32(name.encode()) % BLOCK
    values = block.roll(-start).repeat(-(-size // BLOCK))[:size].view(shape)
    vector = size == (shape[0] if shape else 1)
    if vector and ("norm" in name or name.endswith("running_var")) and not name.endswith("bias"):
        return values.mul_(0.2).add_(1)
    if vector:
        return values.mul_(0.1)
    return values if "embed_tokens" in name else values.mul_(math.prod(shape[1:]) ** -0.5)


@cache
def _block(dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write(folder: Path, shapes: dict[str, tuple[int, ...]], code: str = "BF16", seed: int = 0) -> None:
    """Declare random weights in `folder`. code: safetensors' name of the dtype they are stored in."""
    content = {"dtype": code, "seed": seed, "tensors": {name: list(shape) for name, shape in shapes.items()}}
    (folder / FILE).write_text(json.dumps(content))


READERS[FILE] = RandomFile
