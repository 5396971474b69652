"""Muon (K. Jordan and others, 2024: "Muon: an optimizer for hidden layers").

torch.optim.Muon iterates in bfloat16 everywhere, which CPUs without bfloat16 matrix units emulate at a hundredth of
their float32 rate; this one iterates in float32 there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import has_native

# Newton-Schulz polynomial a x + b x^3 + c x^5: steepest at 0, so that five steps bring singular values near 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices U V^T of g = U S V^T, roughly: singular values in about 0.7..1.2.

    g: [..., m, n], any floating dtype; the result has its shape and dtype. float32 iterates in bfloat16 where the
    device multiplies it at full rate: the polynomial pulls rounding errors in, too.
    """
    a, b, c = COEFFICIENTS
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if g.dtype == torch.float32 and has_native(torch.bfloat16, g.device) else g.dtype)
    x = x.mT if (tall := g.shape[-2] > g.shape[-1]) else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """W -= lr * sqrt(max(1, m / n)) * orthogonalize(Nesterov momentum), for matrices W [m, n].

    lr is the largest singular value (about) of one update, 0.02 to 0.05 for hidden layers; embeddings, norms
    and outputs belong to AdamW. Matrices of one shape are orthogonalised in one batch.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), params in by_shape.items():
                updates = orthogonalize(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-rate)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        average = self.state[p].setdefault("momentum", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)
