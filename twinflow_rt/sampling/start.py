"""Where sampling starts from given images, and what keeps parts of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """Clean latents x and noise z, both [B, C, h, w] in the model's dtype, which at time t make x_t = t z + (1-t) x.

    mask: bool [1 or B, 1, h, w], true where images are made anew; None: everywhere."""

    clean: Tensor
    noise: Tensor
    mask: Tensor | None = None

    def at(self, t: float) -> Tensor:
        """Return x_t: float32 inside (float64 for such latents), one rounding."""
        wide = torch.promote_types(self.noise.dtype, torch.float32)
        return (t * self.noise.to(wide) + (1 - t) * self.clean.to(wide)).to(self.noise.dtype)

    def keep(self, x: Tensor, t: float) -> Tensor:
        """Return the state x at time t, in the dtype it has, with x_t where images are not made anew."""
        return x if self.mask is None else torch.where(self.mask, x, self.at(t).to(x.dtype))
