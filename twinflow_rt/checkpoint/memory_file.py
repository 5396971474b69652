"""Tensors that are in memory already, read like a file: what `passes.load.Checkpoint.of` is made on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class TensorFile:
    """The part of safetensors' `safe_open` that `passes.load.Checkpoint` uses."""

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._tensors = tensors
        self._codes = {dtype: code for code, dtype in dtypes.items()}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_slice(self, name: str) -> TensorSlice:
        tensor = self._tensors[name]
        return TensorSlice(tuple(tensor.shape), self._codes.get(tensor.dtype, str(tensor.dtype)))

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


class TensorSlice:
    """Shape and dtype of a tensor, whether or not it is made yet (`passes.random`)."""

    def __init__(self, shape: tuple[int, ...], code: str) -> None:
        self._shape, self._code = shape, code

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        return self._code
