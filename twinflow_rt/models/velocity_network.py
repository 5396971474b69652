"""The velocity network: the base class of `models.transformers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import EAGER, OpTable
from .context import Context
from .folding import Resident
from .layers import Module, join_patches


class VelocityNetwork(Module):
    """F(x_t, t, tt, prompt), the velocity z - x, in latent space as the VAE has it.

    A call takes what depends on the prompts (`encode_context`, once per prompt) and on time (`modulate`, or after
    folding `step_modulation`). What depends on both, as in SD3.5, is in the context, with one row per evaluation;
    `step_modulation` then says which row.

    config: what the network was built from. folded_steps: None, or the number of evaluations that the tables of a
    folded network hold. absorbed: whether the constants are inside the weights instead, for one step. prompt_modules:
    names of the modules that `encode_context` runs. prompt_multiple: tokens of a context are padded to a multiple of
    this, and the padding counts. fixed_length: prompts all have the longest length. second_embedder: name of the
    module that TwinFlow adds to the published network; its name less "_2" is that of the first. unguided: the scale of
    classifier-free guidance that changes nothing, as diffusers counts it.

    encode_context(prompt_embeds, lengths, **extras) -> Context: all that depends on the prompts alone. prompt_embeds:
    [B, L, width], of which prompt b's first lengths[b] rows count. lengths: numbers, which shape the sequence; or int64
    [B] on the device, which only mask it (for `export`). extras: more that a family's text stage makes of a prompt.
    """

    encode_context: Callable[..., Context]
    second_embedder: str
    unguided = 1.0
    prompt_multiple = 1
    fixed_length = False

    def __init__(self, config: Any, folded_steps: int | None, absorbed: bool = False) -> None:
        super().__init__()
        if absorbed and folded_steps != 1:
            raise ConfigError(
                f"constants of {folded_steps} steps cannot be absorbed: weights hold those of one step; "
                "use absorbed=False, or folded_steps=1"
            )
        self.config, self.folded_steps, self.absorbed = config, folded_steps, absorbed
        self.ops: OpTable = EAGER

    def times(self, t: Tensor, tt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return t, tt [B] in float64; of a network without a second time embedder the time that it sees, and None.

        That is t; t for any target where SimpleTuner trained it (`enable_time_sign_embed`); and t - tt / 2 where
        upstream's LoRA training did (`averaged_time`). Raises ConfigError for a target that it was not trained for."""
        t, tt, config = t.double(), tt.double(), self.config
        if config.twinflow:
            return t, tt
        if config.enable_time_sign_embed or torch.equal(t, tt):
            return t, None
        if config.averaged_time:
            return t - tt / 2, None
        raise ConfigError(
            "this network has no second time embedder, so no target time but t itself: sample it as its own scheduler "
            "does (nfe=), or by a SamplerConfig of mode 'multi'"
        )

    def guide(self, asked: Tensor, empty: Tensor, scale: float) -> Tensor:
        """Return the velocity [B, C, H, W] guided from that of the negative prompts to that of the prompts."""
        return empty + (scale + 1 - self.unguided) * (asked - empty)

    def fold(self, t: Tensor, tt: Tensor, resident: Resident) -> Iterator[tuple[str, Tensor]]:
        """Yield (buffer name, table) of the folded network for evaluations at times t, tt [N], in [-1, 1].

        This network may be on the meta device: parameters are real only where `resident` lends them.
        """
        raise NotImplementedError

    def step_modulation(self, step: int) -> Any:
        """Return the constants of evaluation `step`, as `patches` takes them; for folded networks."""
        raise NotImplementedError

    def patches(self, latents: Tensor, modulation: Any, context: Any) -> tuple[Tensor, float]:
        """Return the velocity as the last layer leaves it, patches [B, C, H/p, p, W/p, p], a view of tokens; and the
        sign they take. `ops.x0_to_vae` reads them so."""
        raise NotImplementedError

    def forward(self, latents: Tensor, modulation: Any, context: Any) -> Tensor:
        """Return the velocity [B, C, H, W] of latents [B, C, H, W], computed in their dtype. H and W are multiples of
        the patch size."""
        return join_patches(*self.patches(latents, modulation, context))
