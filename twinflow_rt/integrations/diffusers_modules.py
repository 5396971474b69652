"""Modules that stand in a diffusers pipeline where its velocity network and its VAE's decoder stood.

Each takes what the pipeline passes, in the pipeline's conventions of time, sign and layout, and hands the compiled
network what it takes.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checkpoint.files import some
from ..compile import Program
from ..errors import ConfigError
from ..models.layers import pack, unpack
from ..runtime.host_state import isolated
from ..stages.text import PromptEmbeds

TINY = 2.0**-40  # stands for t = 0, where TwinFlow's sign(0) makes of Z-Image another time
EULER = "FlowMatchEulerDiscreteScheduler"


class Compiled(nn.Module):
    """Stands where the pipeline's transformer stood. Subclasses know how diffusers calls a family's."""

    network: Any

    def __init__(self, pipe: Any, original: Any, program: Program, any_step: bool) -> None:
        super().__init__()
        self.network, self.program, self.any_step = program.network, program, any_step
        self.config, self.dtype, self.device = original.config, original.dtype, original.device
        self.in_channels = original.config.in_channels
        self.pipe = pipe

    def given(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scheduler's timesteps as the network receives them."""
        raise NotImplementedError

    def time(self, value: float) -> float:
        """Return the t in [0, 1] of a value that the network receives."""
        raise NotImplementedError

    @isolated()
    def velocity(
        self, latents: Tensor, timestep: Tensor, embeds: Tensor, lengths: tuple[int, ...], **extras: Tensor
    ) -> Tensor:
        """Return z - x [B, C, H, W] at the step that `timestep` [B] names, computed in the network's dtype, in the
        latents': parts of a pipeline may differ in it."""
        step = self._step(timestep, latents.dtype)
        given = PromptEmbeds(embeds, lengths, extras).to(self.device, self.dtype)
        context = self.network.encode_context(given.embeds, given.lengths, **given.extras)
        flow: Tensor = self.network(latents.to(self.dtype), self.network.step_modulation(step), context)
        return flow.to(latents.dtype)

    def _step(self, timestep: Tensor, dtype: torch.dtype) -> int:
        """Return which of the scheduler's steps this is; fold tables anew where those have changed. Waits for the
        device twice, for a few bytes."""
        scheduler = self.pipe.scheduler
        values = tuple(dict.fromkeys(self.given(scheduler.timesteps, dtype).tolist()))
        now = set(timestep.flatten().tolist())
        if len(now) != 1 or not now <= set(values):
            raise ConfigError(
                f"the network was called at {some(map(str, now))}, none of the scheduler's steps: accelerated, it "
                "takes one time per call out of pipe.scheduler.timesteps"
            )
        self.program.refold(self._schedule(values, scheduler))  # nothing, if they are those of the last call
        return values.index(*now)

    def _schedule(self, values: tuple[float, ...], scheduler: Any) -> tuple[tuple[float, float], ...]:
        times = [self.time(value) for value in values]
        if not self.any_step:
            return tuple((max(t, TINY), max(t, TINY)) for t in times)
        if type(scheduler).__name__ != EULER or scheduler.config.get("stochastic_sampling"):
            raise ConfigError(f"TwinFlow's steps end at the next time, as {EULER}'s do without noise; use that one")
        if any(a <= b for a, b in pairwise(times)):
            raise ConfigError("TwinFlow's steps go down in time; the scheduler's timesteps do not")
        return tuple(zip(times, [*times[1:], 0.0], strict=True))

    def cache_context(self, name: str) -> Any:
        """Do nothing: diffusers' step caches have no modules here to attach to."""
        return nullcontext()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Stay as it is, for tables are float32 in any dtype. Raises ConfigError for another device or dtype."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device not in (None, self.device, torch.device(self.device.type)) or dtype not in (None, self.dtype):
            raise ConfigError("an accelerated pipeline cannot be moved or cast: restore() it, then accelerate it again")
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError("compiled networks are not diffusers checkpoints: restore() the pipeline, then save it")


def _output(sample: Any, return_dict: bool) -> Any:
    if not return_dict:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def _refuse(**options: Any) -> None:
    """Raise ConfigError for options of diffusers' forward that change its result and that are missing here."""
    if active := [name for name, value in options.items() if value is not None and value != {}]:
        raise ConfigError(f"the compiled network takes no {some(active)}: restore() the pipeline to use them")


def _lengths(mask: Tensor | None, embeds: Tensor) -> tuple[int, ...]:
    """Return the tokens of each prompt. Raises ConfigError where padding comes before them."""
    if mask is None:
        return (embeds.shape[1],) * len(embeds)
    prompts = mask.bool().tolist()
    if any(not all(prompt[: sum(prompt)]) for prompt in prompts):
        raise ConfigError("the prompt mask has gaps; the compiled network takes prompts padded on the right")
    return tuple(sum(prompt) for prompt in prompts)


class ZImage(Compiled):
    """Z-Image: t runs backwards in diffusers' network, and its output is x - z."""

    def given(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return (1000 - timesteps) / 1000

    def time(self, value: float) -> float:
        return 1 - value

    def forward(
        self, x: list[Tensor], t: Tensor, cap_feats: list[Tensor], return_dict: bool = True, *,
        joint_attention_kwargs: dict[str, Any] | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        _refuse(joint_attention_kwargs=joint_attention_kwargs, **others)
        if not isinstance(x[0], Tensor) or any(image.shape != x[0].shape or image.shape[1] != 1 for image in x):
            raise ConfigError("the compiled network takes images of one size and one frame each")
        lengths = tuple(len(prompt) for prompt in cap_feats)
        embeds = nn.utils.rnn.pad_sequence(cap_feats, batch_first=True)
        flow = self.velocity(torch.stack(x)[:, :, 0], t, embeds, lengths)
        return _output(list((-flow)[:, :, None]), return_dict)


class QwenImage(Compiled):
    """Qwen-Image: latents come packed."""

    def given(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return timesteps.to(dtype) / 1000

    def time(self, value: float) -> float:
        return value

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *, timestep: Tensor, img_shapes: Any,
        encoder_hidden_states_mask: Tensor | None = None, attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True, **others: Any,
    ) -> Any:  # fmt: skip
        _refuse(attention_kwargs=attention_kwargs, **others)
        shapes = {tuple(shape) for image in img_shapes for shape in image}
        if len(shapes) != 1 or any(len(image) != 1 for image in img_shapes) or next(iter(shapes))[0] != 1:
            raise ConfigError("the compiled network takes one image per prompt, all of one size")
        ((_, height, width),) = shapes
        lengths = _lengths(encoder_hidden_states_mask, encoder_hidden_states)
        flow = self.velocity(unpack(hidden_states, height, width), timestep, encoder_hidden_states, lengths)
        return _output(pack(flow), return_dict)


class SD3(Compiled):
    """SD3.5: prompts have a pooled form, and no mask."""

    def given(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return timesteps

    def time(self, value: float) -> float:
        return value / 1000

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor, *,
        joint_attention_kwargs: dict[str, Any] | None = None, return_dict: bool = True, **others: Any,
    ) -> Any:  # fmt: skip
        _refuse(joint_attention_kwargs=joint_attention_kwargs, **others)
        lengths = _lengths(None, encoder_hidden_states)
        flow = self.velocity(hidden_states, timestep, encoder_hidden_states, lengths, pooled=pooled_projections)
        return _output(flow, return_dict)


class Sana(Compiled):
    """SANA."""

    def given(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return timesteps * self.config.timestep_scale

    def time(self, value: float) -> float:
        return value / 1000

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, *,
        encoder_attention_mask: Tensor | None = None, attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True, **others: Any,
    ) -> Any:  # fmt: skip
        _refuse(attention_kwargs=attention_kwargs, **others)
        lengths = _lengths(encoder_attention_mask, encoder_hidden_states)
        return _output(self.velocity(hidden_states, timestep, encoder_hidden_states, lengths), return_dict)


class CompiledDecoder(nn.Module):
    """Stands where the VAE's decoder stood, and computes in its dtype. A video VAE's latents have a frame axis, here of
    one frame."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    @isolated()
    def forward(
        self, sample: Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None, **others: Any
    ) -> Tensor:
        _refuse(**others)
        sample = sample.to(self.dtype)
        if sample.ndim == 4:
            return self.network(sample.contiguous(memory_format=torch.channels_last))
        if feat_cache is not None:
            if feat_cache:
                raise ConfigError("the compiled decoder takes one frame: restore() the pipeline to decode video")
            feat_cache.append(sample)  # diffusers makes a new list for each image, and none for a second frame
        return self.network(sample[:, :, 0].contiguous(memory_format=torch.channels_last))[:, :, None]


CALLS = {
    "ZImageTransformer2DModel": ZImage, "QwenImageTransformer2DModel": QwenImage, "SD3Transformer2DModel": SD3,
    "SanaTransformer2DModel": Sana,
}  # fmt: skip
