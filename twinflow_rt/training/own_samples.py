"""The warm start of the last stage: regression on the flow's OWN guided samples, so that jumps begin where it arrives.

No other model takes part. From every noise the flow is followed to its end with classifier-free guidance; the states on
the way are kept, and F(x_t, t, tt) learns the straight line from each to a later one, most often from noise to image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.atomic import replacing
from .objective import balanced

CHUNK, BATCH = 768, 96  # trajectories a file holds, and those that are evaluated together

Prompt = tuple[Tensor, Tensor]  # prompt_embeds [B, L, D], lengths [B]


@dataclass(frozen=True)
class Trajectories:
    """states [N, S+1, C, H, W] float16 at times [N, S+1], which fall from 1 to 0; prompts [N]: row of the data."""

    states: Tensor
    times: Tensor
    prompts: Tensor


def draw_times(steps: int) -> Tensor:
    """Return steps + 1 times from 1 to 0, those between moved at random by less than half a step: jumps learn all."""
    inner = torch.arange(1, steps) + 0.8 * (torch.rand(steps - 1) - 0.5)
    return torch.cat((torch.ones(1), 1 - inner / steps, torch.zeros(1)))


def follow(velocity: Callable[[Tensor, Tensor], Tensor], z: Tensor, times: Tensor) -> Tensor:
    """Return the states [B, S+1, ...] of dx/dt = velocity(x, t) from z at times[0] on, by two-step Adams-Bashforth
    (the first step is Euler's). velocity takes t as [B]."""
    states, before, last = [z], None, 1.0
    for t, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x, h = states[-1], end - t
        v = velocity(x, torch.full((len(x),), t, device=x.device))
        slope = v if before is None else v + (v - before) * (h / last / 2)
        states.append(x + h * slope)
        before, last = v, h
    return torch.stack(states, 1)


@torch.no_grad()
def own_samples(
    network: Any, prompts: Callable[[Tensor], Prompt], latents: Tensor, folder: Path, *, count: int, steps: int,
    guidance: float, seed: int, log: Callable[[str], None], device: torch.device,
) -> Trajectories:  # fmt: skip
    """Follow `count` noises under captions drawn at random; files in `folder`, CHUNK each, are not made again.

    prompts: row numbers of the data, -1 for the empty prompt -> `Prompt`. latents [N, ...]: the data, for its shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in range(0, count, CHUNK):
        path = folder / f"{start:06}.pt"
        if not path.exists():
            torch.manual_seed(seed + start)
            sizes = [min(BATCH, min(count, start + CHUNK) - a) for a in range(start, min(count, start + CHUNK), BATCH)]
            made = [_batch(network, prompts, latents.shape, n, steps, guidance, device) for n in sizes]
            with replacing(path) as partial:
                torch.save([torch.cat(parts) for parts in zip(*made, strict=True)], partial)
            log(f"own samples {start}/{count}")
        chunks.append(torch.load(path, weights_only=True))
    return Trajectories(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _batch(
    network: Any, prompts: Callable[[Tensor], Prompt], shape: tuple[int, ...], n: int, steps: int, guidance: float,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the states, times and prompts of n trajectories, whose inner times are the same."""
    rows, times = torch.randint(shape[0], (n,)), draw_times(steps)
    embeds, lengths = prompts(torch.cat((rows, torch.full((n,), -1))))
    context = network.encode_context(embeds, lengths.tolist())

    def guided(x: Tensor, t: Tensor) -> Tensor:
        two = torch.cat((t, t))
        asked, empty = network(torch.cat((x, x)), network.modulate(two, two), context).chunk(2)
        return torch.lerp(empty, asked, guidance)

    return follow(guided, torch.randn(n, *shape[1:]).to(device), times).half().cpu(), times.expand(n, -1), rows


def warm_loss(
    velocity: Callable[..., Tensor], samples: Trajectories, prompts: Callable[[Tensor], Prompt], batch: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Return the loss of one batch: two of three from noise to image, t in [0.999, 1] as the samplers start; the
    others between two states of a trajectory."""
    rows = torch.randint(len(samples.states), (batch,))
    steps, whole = samples.times.shape[1] - 1, torch.arange(batch) < 2 * batch // 3
    i = torch.where(whole, 0, torch.randint(steps, (batch,)))
    j = torch.where(whole, steps, i + 1 + (torch.rand(batch) * (steps - i)).long())
    t, tt = samples.times[rows, i], samples.times[rows, j]
    x_t, x_tt = (samples.states[rows, k].to(device).float() for k in (i, j))
    target = (x_t - x_tt) / (t - tt).to(device)[:, None, None, None]
    t = torch.where(whole, 1 - 1e-3 * torch.rand(batch), t)
    return balanced(velocity(x_t, t.to(device), tt.to(device), prompts(samples.prompts[rows])) - target).mean()
