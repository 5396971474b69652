"""One measured call, and its stages on their own.

    text      prompts -> embeddings                       text encoder
    context   embeddings -> the network's prompt side     once per prompt
    noise     seeds -> latents
    velocity  one evaluation of the network
    decode    latents -> uint8 pixels
    output    pixels -> PIL images on the host
    total     a whole call, prompts to PIL images

Stages run on the tensors that a real call hands from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pipeline import Pipeline
from ..sampling.noise import initial_noise, step_noise
from ..sampling.sampler import sample
from ..sampling.schedule import schedule
from ..stages.result import deliver

STAGES = ("text", "context", "noise", "velocity", "decode", "output")
PROMPTS = ("a photograph of a lighthouse in a storm at dusk", "two red squares above a green triangle")


def batch_of(prompt: str | None, count: int) -> tuple[str, ...]:
    """Return `count` different prompts, so that nothing is computed once for all: the given one or the built-in
    ones, then variations."""
    base = (prompt,) if prompt is not None else PROMPTS
    return tuple(base[k] if k < len(base) else f"{base[k % len(base)]} variation {k}" for k in range(count))


@dataclass(frozen=True)
class Workload:
    """The call that is measured: image k of the batch has prompts[k] and seed + k."""

    prompts: tuple[str, ...]
    height: int
    width: int
    seed: int
    nfe: int

    @property
    def seeds(self) -> list[int]:
        return [self.seed + k for k in range(len(self.prompts))]

    def call(self, pipe: Pipeline, output: str = "pil") -> Any:
        """Return the images of one whole call."""
        return pipe(
            list(self.prompts), height=self.height, width=self.width, seed=self.seed, nfe=self.nfe, output=output
        ).images

    def shape(self, pipe: Pipeline) -> tuple[int, int, int]:
        """Return the shape of one latent, [C, H, W]."""
        return pipe.vae.channels, self.height // pipe.vae.scale, self.width // pipe.vae.scale


def stages(pipe: Pipeline, work: Workload) -> dict[str, Callable[[], Any]]:
    """Return name -> one run of that stage alone, on inputs made by the stages before it."""
    sampler = pipe.sampler_of(work.nfe, None, (work.height, work.width))
    pipe.program.refold(schedule(sampler, pipe.dtype))
    network: Any = pipe.program.network
    with torch.inference_mode():
        embeds = pipe.text(list(work.prompts))
        context = pipe.velocity.encode(embeds)
        noise = initial_noise(work.seeds, work.shape(pipe), pipe.dtype, pipe.device)
        latents = work.call(pipe, "latent")
        pixels = pipe.vae.decode_uint8(latents)
    calls = {
        "text": lambda: pipe.text(list(work.prompts)),
        "context": lambda: pipe.velocity.encode(embeds),
        "noise": lambda: initial_noise(work.seeds, work.shape(pipe), pipe.dtype, pipe.device),
        "velocity": lambda: network(noise, network.step_modulation(0), context),
        "decode": lambda: pipe.vae.decode_uint8(latents),
        "output": lambda: deliver(pixels, "pil"),
    }
    return {name: torch.inference_mode()(call) for name, call in calls.items()}


def exact_outputs(pipe: Pipeline, work: Workload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return latents x0 and images [B, 3, H, W] of a float32 pipeline that starts from the noise a pipeline in
    `dtype` starts from, at the times that one evaluates: what its outputs would be without rounding.

    (With several evaluations the state between them is rounded to `dtype`, as the sampler does there.)
    """
    config, shape = pipe.sampler_of(work.nfe, None, (work.height, work.width)), work.shape(pipe)
    pipe.program.refold(schedule(config, dtype))
    network: Any = pipe.program.network
    with torch.inference_mode():
        context = pipe.velocity.encode(pipe.text(list(work.prompts)))
        latents = sample(
            lambda x, step: network(x.float(), network.step_modulation(step), context),
            initial_noise(work.seeds, shape, dtype, pipe.device), config,
            noise_fn=lambda step: step_noise(work.seeds, step, shape, device=pipe.device),
            project=lambda noise, flow, t: noise.float() - t * flow,
        )  # fmt: skip
        images = deliver(pipe.vae.decode(latents.float()), "pt")
    return latents.float().cpu(), images.cpu()


def outputs(call: Callable[[str], Tensor], kinds: Sequence[str] = ("latent", "pt")) -> tuple[Tensor, ...]:
    """Return latents and images of a contender, float32 on the host; call(output) makes them."""
    with torch.inference_mode():
        return tuple(call(kind).float().cpu() for kind in kinds)
