"""What a computation needs, counted on the meta device: peak memory, FLOPs and bytes moved. Nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class _Live(TorchDispatchMode):
    """Follow every storage that operators make until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(x) for x in _tensors(args, kwargs)}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            if _storage(x) in known:
                continue
            known.add(_storage(x))
            size = x.untyped_storage().nbytes()
            self.live += size
            weakref.finalize(x.untyped_storage(), self._freed, size)
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


class _Fused(TorchFunctionMode):
    """Run attention as its kernels do: only the result is made, no matrix of scores. seen(q, k, v, result) is told."""

    def __init__(self, seen: Callable[..., None] = lambda *tensors: None) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            out = q.new_empty((*q.shape[:-1], v.shape[-1]))
            self.seen(q, k, v, out)
            return out
        return func(*args, **(kwargs or {}))


def peak_of(run: Callable[[], T]) -> tuple[T, int]:
    """Return what `run` returns, and the most bytes that tensors it made occupied at one time, the result's among
    them. run: on modules and inputs on the meta device.

    Counts what operators return, as an allocator would without rounding; not what kernels use inside.
    """
    with torch.inference_mode(), _Fused(), _Live() as live:
        result = run()
    return result, int(live.peak)


@dataclass(frozen=True)
class Work:
    """What a computation's matrix products, convolutions and attention take.

    flops: multiply and add counted apart (2 m n k of a product, 4 s_q s_k d per head of attention, causal or not).
    eight_bit_flops: those of them with a weight of 8 bits. moved: bytes that they read and write but for weights,
    each operand once. What runs between them (norms, activations) is taken to be fused into them.
    """

    flops: int
    eight_bit_flops: int
    moved: int


class _Products(TorchDispatchMode):
    """Add up `Work`. `FlopCounterMode` is entered inside it and takes composite operators apart."""

    def __init__(self, weights: set[int], eight_bit: set[int]) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas, self.weights, self.eight_bit = flop_registry, weights, eight_bit
        self.flops = self.eight_bit_flops = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := self.formulas.get(func._overloadpacket)) is not None:
            self.add(int(formula(*args, **kwargs, out_val=out)), *_tensors(args, kwargs, out))
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        self.add(2 * out[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]), q, k, v, out)

    def add(self, flops: int, *tensors: Tensor) -> None:
        self.flops += flops
        if any(_storage(x) in self.eight_bit for x in tensors):
            self.eight_bit_flops += flops
        for x in tensors:
            if _storage(x) not in self.weights:
                self.moved += min(x.nbytes, x.untyped_storage().nbytes())  # what is expanded is read once


def work_of(run: Callable[[], object], weights: Iterable[Tensor] = (), eight_bit: Iterable[Tensor] = ()) -> Work:
    """Return the work of `run`, on modules and inputs on the meta device. weights: tensors whose traffic is counted
    elsewhere, once and for all; eight_bit: those of them that have 8 bits in the real network."""
    from torch.utils.flop_counter import FlopCounterMode

    products = _Products({_storage(x) for x in weights}, {_storage(x) for x in eight_bit})
    with torch.inference_mode(), _Fused(products.attention), products, FlopCounterMode(display=False):
        run()
    return Work(products.flops, products.eight_bit_flops, products.moved)


def _tensors(*values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
