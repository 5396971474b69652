"""Merged projections: which checkpoint tensors a merged weight is stacked from, and back.

A `fused` table maps the merged name within a block to its parts, in row order, for example
`attention.to_qkv.weight -> (attention.to_q.weight, attention.to_k.weight, attention.to_v.weight)`.
One GEMM then reads its input once and launches once.

Chains between the projections need no rewriting here: networks are written in the op vocabulary of
`ops/`, in which QK norm and rope, a gated residual with the next norm, and each activation are one op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import CheckpointError

Fused = Mapping[str, tuple[str, ...]]


def sources(name: str, fused: Fused) -> tuple[str, ...]:
    """Return the checkpoint's names of a module's tensor: its own, or those of the parts it is stacked from."""
    for merged, parts in fused.items():
        if name == merged or name.endswith("." + merged):
            prefix = name[: len(name) - len(merged)]
            return tuple(prefix + part for part in parts)
    return (name,)


def stack(parts: Iterable[Tensor], rows: int) -> Tensor:
    """Stack `parts` into one tensor of `rows` rows, freeing each part once copied.

    Parts share dtype, device and trailing shape. Peak memory: the result and one part.
    """
    out, start = None, 0
    for part in parts:
        if out is None:
            out = part.new_empty((rows, *part.shape[1:]))
        out[start : start + len(part)].copy_(part)
        start += len(part)
        del part
    if out is None or start != rows:
        raise CheckpointError(f"merged weight of {rows} rows got {start}: the parts do not add up")
    return out


def split(
    tensors: Mapping[str, Tensor], fused: Fused, rows: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Return tensors under module names as the checkpoint has them.

    Merged weights are cut into equal blocks of rows, unless `rows` gives their sizes (by merged name).
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = sources(name, fused)
        if len(names) == 1:
            out[name] = tensor
            continue
        uneven = next((n for merged, n in (rows or {}).items() if name.endswith(merged)), None)
        sizes = uneven or (len(tensor) // len(names),) * len(names)
        if sum(sizes) != len(tensor):
            raise CheckpointError(f"{name}: {tuple(tensor.shape)} does not split into parts of {sizes} rows")
        out.update(zip(names, tensor.split(sizes), strict=True))
    return out
