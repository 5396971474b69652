"""The middle stage: prompts become contexts, noise becomes clean latents, by a compiled velocity network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..models.context import Context, recorded_context
from ..models.velocity_network import VelocityNetwork
from ..ops import EAGER
from ..passes.fold import Schedule
from ..runtime.capture import AUTO_POSITIONS
from ..runtime.streaming import NOT_RECORDED
from ..runtime.timing import StageTimer
from ..sampling.guidance import Guidance
from ..sampling.noise import step_noise
from ..sampling.sampler import Start, sample
from ..sampling.schedule import SamplerConfig, schedule, steps
from .prompt_cache import PromptCache
from .stage import DEFAULTS, StageOptions, in_parts
from .text import PromptEmbeds

Prompts = tuple[str, ...] | PromptEmbeds
Encode = Callable[[Sequence[str]], PromptEmbeds]
Callback = Callable[[int, int, Tensor], None]
Evaluation = Callable[[Tensor, int], Tensor]


class Program(Protocol):
    """A compiled network that can be folded for another schedule. constants: see `compile.Program`; recordings of the
    network belong to it and them."""

    @property
    def network(self) -> VelocityNetwork: ...

    @property
    def constants(self) -> object: ...

    def refold(self, schedule: Schedule) -> None: ...


class VaeInput(Protocol):
    """What a VAE takes: x0 * std + mean, float32 [C] each, in `dtype`."""

    std: Tensor
    mean: Tensor
    dtype: torch.dtype


AnyProgram = TypeVar("AnyProgram", bound=Program)


class VelocityStage(Generic[AnyProgram]):
    """The network of `program`, on `device` in `dtype`.

    options: `captures` records the network and its contexts; `streams` says that blocks come and go as they run.
    prompt_cache: bytes of contexts that `prompts` keeps for prompts seen before.
    """

    def __init__(
        self, program: AnyProgram, device: torch.device, dtype: torch.dtype, options: StageOptions = DEFAULTS,
        prompt_cache: int = 0,
    ) -> None:  # fmt: skip
        self.program, self.device, self.dtype, self.options = program, device, dtype, options
        self.prompts = PromptCache(prompt_cache)

    def contexts(
        self, prompts: Prompts, encode: Encode, repeats: int, times: Schedule, at_once: int, alone: bool = False,
        negative: Sequence[int] = (),
    ) -> list[Context]:  # fmt: skip
        """Return the contexts of `repeats` images of each prompt, one context for every `at_once` images. A part waits
        for no prompt of another part, so its bits are those it has by itself; alone: likewise where there is one part.

        encode: makes embeddings of texts. times: the schedule of the images (SD3.5 has it in the context). negative: of
        guided prompts, which come first in `prompts`, the numbers of their negative ones; a context then has those of
        its images behind theirs."""
        total = (len(negative) or len(prompts)) * repeats
        if at_once >= total and not alone and not negative:
            return [self.context(prompts, encode, repeats, times)]
        numbers = [image // repeats for image in range(total)]  # of each image's prompt
        if isinstance(prompts, tuple):
            numbers = [prompts.index(prompts[number]) for number in numbers]
        parts = [numbers[start : start + at_once] for start in range(0, total, at_once)]
        if negative:
            parts = [[*part, *(negative[number] for number in part)] for part in parts]
        made: dict[tuple[int, ...], Context] = {}
        contexts = []
        for part in parts:
            few = tuple(dict.fromkeys(part))
            if few not in made:
                some = tuple(prompts[n] for n in few) if isinstance(prompts, tuple) else prompts.select(few)
                made[few] = self.context(some, encode, 1, times)
            contexts.append(made[few].select([few.index(n) for n in part]))
        return contexts

    def context(self, prompts: Prompts, encode: Encode, repeats: int = 1, times: Schedule | None = None) -> Context:
        """Return one context for `repeats` images of each prompt; every distinct text is computed once.
        times: the schedule it is for, under which it is cached; None: the one folded now, not cached."""
        if isinstance(prompts, PromptEmbeds):
            numbers, context = list(range(len(prompts))), self.encode(prompts)
        else:
            distinct = tuple(dict.fromkeys(prompts))
            numbers = [distinct.index(p) for p in prompts]
            make: Callable[[], Context] = lambda: self.encode(encode(list(distinct)))
            context = make() if times is None else self.prompts.get((distinct, times), self.program.network, make)
        return context.select([number for number in numbers for _ in range(repeats)])

    def encode(self, embeds: PromptEmbeds) -> Context:
        """Return the context of embeddings, one prompt each."""
        given, network, captures = embeds.to(self.device, self.dtype), self.program.network, self.options.captures
        if captures is None:
            return network.encode_context(given.embeds, given.lengths, **given.extras)
        call = partial(captures, "context", network, version=self.program.constants)
        if captures.buckets:
            return recorded_context(network, call, given.embeds, given.lengths, **given.extras)
        encode = lambda embeds, lengths, extras: network.encode_context(embeds, lengths, **extras)
        context: Context = call(encode, given.embeds, given.lengths, given.extras)
        return context

    def projects_to_vae(self, times: Schedule) -> bool:
        """Return whether one kernel takes the network's last tokens to the VAE's input: x0, unpacking and the VAE's
        scaling. Without such a kernel the three are no faster together."""
        fused = self.program.network.ops.x0_to_vae is not EAGER.x0_to_vae
        return fused and len(times) == 1 and self.dtype != torch.float64

    def sample(
        self, noise: Tensor, contexts: Sequence[Context], seeds: Sequence[int], sampler: SamplerConfig, at_once: int,
        timer: StageTimer, callback: Callback | None = None, vae: VaeInput | None = None, start: Start | None = None,
        guidance: Guidance | None = None, apart: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return clean latents of noise [B, C, h, w], both normalised, `at_once` images together with their contexts.

        seeds: of the images, for the noise between evaluations. timer: asked between parts and evaluations whether to
        stop. callback: see `sampling.sampler.sample`. vae: whose input is wanted in place of the normalised latents,
        where `projects_to_vae`. start: given images, which with the noise make what sampling begins from. guidance: of
        contexts with negative prompts, whose images go through the network beside the others or, `apart`, after."""
        t = steps(sampler, self.dtype)[0].t
        begin, keep = (noise, {}) if start is None else (start.at(t), {"keep": start.keep})
        times = [] if guidance is None else [one for one, _ in schedule(sampler, self.dtype)]
        parts = [
            self._evaluation(context, part, vae, t)
            if guidance is None
            else self._guided(context, part, t, guidance, times, apart)
            for context, part in zip(contexts, noise.split(at_once), strict=True)
        ]
        velocity = lambda x, step: in_parts(lambda part, i: parts[i](part, step), x, at_once, timer)
        fresh = lambda step: step_noise(seeds, step, noise.shape[1:], device=noise.device)
        return sample(
            velocity, begin, sampler, noise_fn=fresh, callback=callback, cancel=timer.cancel,
            project=self.program.network.ops.x0_project if vae is None else (lambda noise, raw, t: raw), **keep,
        )  # fmt: skip

    def _guided(
        self, context: Context, noise: Tensor, t: float, guidance: Guidance, times: Sequence[float], apart: bool
    ) -> Evaluation:
        """Return the network under `guidance` for the prompts in the first half of `context`, against those in the
        second. times: of the evaluations."""
        n, network = len(noise), self.program.network
        if apart:
            halves = [self._evaluation(context.select(range(i, i + n)), noise, None, t) for i in (0, n)]
            both: Evaluation = lambda x, step: torch.cat([half(x, step).clone() for half in halves])
        else:
            together = self._evaluation(context, torch.cat((noise, noise)), None, t)
            both = lambda x, step: together(torch.cat((x, x)), step)

        def evaluate(x: Tensor, step: int) -> Tensor:
            asked, empty = both(x, step).to(torch.promote_types(x.dtype, torch.float32)).chunk(2)
            if 1 - times[step] > guidance.truncation:
                return asked.to(x.dtype)
            flow = network.guide(asked, empty, guidance.scale)
            if guidance.normalization:
                own, guided = (y.flatten(1).norm(dim=1)[:, None, None, None] for y in (asked, flow))
                flow = flow * (guidance.normalization * own / guided).clamp(max=1)
            return flow.to(x.dtype)

        return evaluate

    def _evaluation(self, context: Context, noise: Tensor, vae: VaeInput | None, t: float) -> Evaluation:
        """Return the network for these prompts: recorded where that is asked for, or (capture "auto") worth while.
        vae, t: see `sample`; its time."""
        network, captures = self.program.network, self.options.captures

        def run(x: Tensor, step: int, context: Context) -> Tensor:
            modulation = network.step_modulation(step)
            if vae is None:
                velocity: Tensor = network(x, modulation, context)
                return velocity
            patches, sign = network.patches(x, modulation, context)
            raw: Tensor = network.ops.x0_to_vae(x, patches, sign * t, vae.std, vae.mean, vae.dtype)
            return raw

        if captures is not None and self.options.streams:
            captures.refuse("velocity", NOT_RECORDED)
            captures = None
        if captures is None or not (captures.strict or noise[:, 0].numel() <= AUTO_POSITIONS):
            return lambda x, step: run(x, step, context)
        call = partial(captures, "velocity" if vae is None else "vae input", network, version=self.program.constants)
        static = context.in_bucket() if captures.buckets else context
        return lambda x, step: call(run, x, step, static)
