"""Sequence parallelism inside one image: Ulysses (arXiv 2309.14509) over torch.distributed.

Of S tokens each of P processes holds S/P and runs all layers that act on tokens alone. For attention an
all-to-all trades tokens for heads: a process then has H/P heads of the whole sequence, and a second one
trades back. Per block and process 4 B S dim / P numbers are sent, and no weight is split.

A network asks its `sequence` (`models.token_split`) for its share of each stream of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..ops.declaration import Op


@dataclass(frozen=True)
class Keys:
    """Where attention finds its keys.

    order: where the joint sequence's tokens lie in the shares of all processes, one after the other; padding lies
    elsewhere. lengths: as for `ops.attention`, of the joint sequence."""

    order: Tensor
    lengths: Tensor | None


class Ulysses:
    """The tokens of every stream, padded to a multiple of P, in P equal shares. group: None is the default one.

    Raises ConfigError where no process group was initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "sequence parallelism needs torch.distributed: start with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def require(self, heads: int) -> None:
        """Raise ConfigError unless the processes can share `heads` attention heads equally."""
        if heads % self.size:
            fitting = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ConfigError(f"{self.size} processes cannot share {heads} attention heads; use one of {fitting}")

    def agree(self, seeds: list[int]) -> list[int]:
        """Return the first process's seeds, so that all draw the same noise where none were given."""
        box = [seeds]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0) if self.group else 0, group=self.group)
        return box[0]

    def _local(self, count: int) -> int:
        return -(-count // self.size)

    def share(self, x: Tensor, *counts: int) -> Tensor:
        shares = []
        for stream, count in zip(x.split(counts, 1), counts, strict=True):
            local = self._local(count)
            padding = (0, 0) * (x.ndim - 2) + (0, local * self.size - count)
            shares.append(F.pad(stream, padding).narrow(1, self.rank * local, local))
        return torch.cat(shares, 1)

    def whole(self, x: Tensor, count: int) -> Tensor:
        shares = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(shares, x.contiguous(), group=self.group)
        joined: Tensor = shares.unflatten(0, (self.size, -1)).movedim(0, 1).flatten(1, 2)
        return joined[:, :count]

    def keys(self, lengths: Tensor | None, *counts: int) -> Keys:
        stride, start, parts = sum(map(self._local, counts)), 0, []
        for count in counts:
            i, local = torch.arange(count), self._local(count)
            parts.append(i // local * stride + start + i % local)
            start += local
        return Keys(torch.cat(parts), lengths)

    def attention(self, inner: Op) -> Op:
        """Return `ops.attention` of shares: q [B, Sq_local, H, D], k, v [B, S_local, H, D] -> [B, Sq_local, H*D].
        `inner` sees H/P heads of the whole joint sequence, its keys in order and without padding."""

        def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Keys | Tensor | None = None) -> Any:
            if not isinstance(lengths, Keys):  # of prompts, which every process has whole
                return inner(q, k, v, lengths)
            order = lengths.order.to(k.device)
            q, k, v = (self._to_heads(x) for x in (q, k, v))
            return self._to_tokens(inner(q, k[:, order], v[:, order], lengths.lengths))

        return attention

    def _exchange(self, parts: Tensor) -> Tensor:
        """Send parts [P, ...], the p-th to process p; return [P, ...], the p-th from process p."""
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=self.group)
        return received

    def _to_heads(self, x: Tensor) -> Tensor:
        """Trade tokens for heads: [B, S_local, H, D] -> [B, P S_local, H/P, D]."""
        return self._exchange(x.unflatten(2, (self.size, -1)).movedim(2, 0)).movedim(0, 1).flatten(1, 2)

    def _to_tokens(self, y: Tensor) -> Tensor:
        """Trade heads for tokens: [B, P S_local, H/P D] -> [B, S_local, H D]."""
        return self._exchange(y.unflatten(1, (self.size, -1)).movedim(1, 0)).movedim(0, 2).flatten(2)
