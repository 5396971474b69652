"""The data path: prompt -> embeddings -> noise -> velocity -> clean latents -> pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import artifact
from .checkpoint.lora import Loras, resolve_loras
from .compile import Program
from .config import ON_OOM, OUTPUTS, SizeRule, check_choice, check_count, resolve_prompts
from .errors import ConfigError, DeviceError
from .models.context import Context, recorded_context
from .ops import EAGER
from .passes.fold import Schedule
from .plan import Plan, Stage
from .planning import warm_up as warm
from .planning.memory_plan import MemoryPlan
from .planning.work import predict_stages
from .runtime import out_of_memory
from .runtime.capture import AUTO_POSITIONS, Captures
from .runtime.forks import Lock
from .runtime.parallel import Ulysses
from .runtime.streaming import NOT_RECORDED
from .runtime.threads import placed_threads
from .runtime.timing import StageTimer
from .sampling.noise import check_batch, initial_noise, resolve_seeds, step_noise
from .sampling.sampler import SamplerConfig, sample, schedule
from .sampling.schedule import resolve_sampler, steps
from .stages import embeds_file
from .stages.prompt_cache import PromptCache
from .stages.text import PromptEmbeds
from .stages.vae import PreviewDecoder


@dataclass(frozen=True)
class Result:
    """images: one per (prompt, repeat), prompt-major. seeds: image k's own. timings: seconds per
    stage and in total. memory: peak bytes per stage (see `runtime.timing.StageTimer`). at_once: the most images
    that went through a network together."""

    images: Any
    seeds: list[int]
    timings: dict[str, float]
    memory: dict[str, int]
    at_once: int = 0


class Pipeline:
    """A loaded model. Calls are serialised: one device runs one generation at a time.

    batch_invariant: whether every image goes through the networks alone, so that its bits are the same in
    any batch (docs/reliability.md); may be changed between calls.
    """

    def __init__(
        self, text: Any, program: Program, vae: Any, sizes: SizeRule, sampler: SamplerConfig,
        device: torch.device, dtype: torch.dtype, folder: Path, prompt_cache: int = 0, batch_invariant: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.prompts = folder, PromptCache(prompt_cache)
        self.text, self.program, self.vae, self.sizes = text, program, vae, sizes
        self.sampler, self.device, self.dtype = sampler, device, dtype
        self.captures: Captures | None = None
        self.memory: MemoryPlan | None = None
        self.preview: PreviewDecoder | None = None
        self.batch_invariant = batch_invariant
        self._lock = Lock()
        self._stages: tuple[Stage, ...] | None = None
        self._probe: PromptEmbeds | None = None  # of the text stage: what embeddings look like

    @property
    def plan(self) -> Plan:
        """What compiling decided, and the least each stage must cost for an image of the default size."""
        if self._stages is None:
            size = self.sizes.resolve(None, None)
            self._stages = predict_stages(self.text, self.program.network, self.vae, *size, self.dtype)
        loads = tuple(note for stage in (self.text, self.vae) for note in stage.notes())
        graphs = self.captures.notes() if self.captures is not None else ()
        graphs += self.memory.notes() if self.memory is not None else ()
        graphs += (str(self.prompts),) if self.prompts.budget else ()
        return replace(self.program.plan, stages=self._stages, notes=self.program.plan.notes + loads + graphs)

    def read_embeds(self, path: str | Path) -> PromptEmbeds:
        """Prompt embeddings that `twinflow-rt encode` wrote, for a call of this pipeline.

        Raises CheckpointError for another file, ConfigError for one of another model or text encoder.
        """
        return self.accept(embeds_file.read(path), path)

    def accept(self, saved: embeds_file.Saved, where: str | Path) -> PromptEmbeds:
        """The embeddings of a file read from `where`, if they are this model's; see `read_embeds`."""
        saved.require(self.program.plan.family, self.text, where)
        return saved.embeds

    def record(self, captures: Captures | None) -> None:
        """Has the stages recorded by `captures` from now on, or (None) run as they are."""
        self.captures = self.text.captures = self.vae.captures = captures
        if self.preview is not None:
            self.preview.captures = captures

    def __call__(
        self, prompt: str | Sequence[str] | PromptEmbeds, *, height: int | None = None, width: int | None = None,
        seed: int | Sequence[int] | None = None, num_images: int = 1, nfe: int | None = None,
        sampler: SamplerConfig | str | None = None, output: str = "pil",
        callback: Callable[[int, int, Tensor], None] | None = None, cancel: Callable[[], bool] | None = None,
        on_oom: str = "raise", preview: bool = False,
    ) -> Result:  # fmt: skip
        """Generates num_images images per prompt, all in one batch, prompt-major.

        prompt: text, several, or embeddings from `self.text`. height, width: pixels, multiples of
            `self.sizes.multiple`. seed: image k of the batch gets seed + k; or one seed per image;
            None draws at random. nfe or sampler: another schedule than loaded with, refolded on
            first use and kept for later calls of that schedule.
        output: "pil" images; "np" uint8 [B, H, W, 3]; "pt" float32 [B, 3, H, W] in [0, 1] on the
            device; "latent" the normalised x0 [B, C, h, w] in the model's dtype.
        callback(done, total, x0) after each evaluation; cancel() -> True ends the run between stages.
        on_oom: what follows when memory runs out: "raise" OutOfMemoryError, or "split": begin again with
            half as many images at once, down to one. Either way nothing of the failed run is kept.
        preview: decode with the small decoder that the model was loaded with (`load(preview=FOLDER)`).
        Raises ConfigError for arguments that cannot work, CancelledError, OutOfMemoryError.
        """
        check_choice("on_oom", on_oom, ON_OOM)
        check_choice("output", output, OUTPUTS)
        check_count("num_images", num_images)
        if isinstance(prompt, PromptEmbeds):
            prompts: tuple[str, ...] | PromptEmbeds = self._checked(prompt)
        else:
            prompts = resolve_prompts(prompt)
        size = self.sizes.resolve(height, width)
        check_batch(len(prompts) * num_images)
        seeds = resolve_seeds(seed, len(prompts) * num_images)
        if (sequence := self.program.sequence) is not None:
            if cancel is not None or on_oom != "raise":
                raise ConfigError("cancel= and on_oom='split' would part the processes of a sequence-parallel call")
            seeds = sequence.agree(seeds)
        if self.memory is not None:
            self.memory.require(*size, len(seeds))
        config = resolve_sampler(nfe, sampler) or self.sampler
        if preview and self.preview is None:
            raise ConfigError("preview=True needs a preview decoder: load(..., preview=FOLDER) with an AutoencoderTiny")
        stages = StageTimer(self.device, cancel)
        if self._lock.forked and self.device.type == "cuda":
            raise DeviceError("CUDA does not survive a fork: start the worker by spawn and load the model in it")

        def run(at_once: int) -> Any:
            with torch.inference_mode():
                return self._run(prompts, num_images, size, seeds, config, output, callback, stages, at_once, preview)

        with self._lock, placed_threads(self.device):
            images, at_once = out_of_memory.halving(
                run, 1 if self.batch_invariant else len(seeds), split=on_oom == "split", release=self._release,
                what=lambda n: f"images of {size[1]}x{size[0]}, {n} at once, do not fit in {self.device}'s memory",
            )  # fmt: skip
        return Result(images, seeds, stages.timings(), stages.memory, at_once)

    def _release(self) -> None:
        """Give up what graphs hold, before a call begins again with fewer images."""
        if self.captures is not None:
            self.captures.clear()

    def parallelize(self, group: Any = None) -> None:
        """Spreads the velocity network of each image over the processes of a torch.distributed group (None: all),
        see `parallel`: for a GPU each, under torchrun. Every process loads the model and makes the same calls,
        which then all return the same images; seeds left open are the first process's.

        Raises ConfigError without a process group, for SD3.5 and SANA, and for heads that do not divide.
        """
        with self._lock:
            self.program.parallelize(Ulysses(group))

    @out_of_memory.named("compiling with these adapters")
    def set_loras(self, loras: Loras = ()) -> None:
        """Replaces the merged adapters by `loras` (as for `load`; none by default): the network is
        compiled again from the checkpoint, so nothing of the old ones remains.

        Raises ConfigError on a saved artifact, whose weights hold theirs for good; CheckpointError for
        an adapter that cannot be merged, and then nothing has changed.
        """
        with self._lock, torch.no_grad():
            self.program.set_loras(resolve_loras(loras))

    def warm_up(
        self, height: int | None = None, width: int | None = None, num_images: int = 1, tokens: int | None = None
    ) -> int:
        """Prepares for calls of this size, and prompts of up to `tokens` tokens, what an attention backend prepares
        per shape (see `warm`); `load` does for one image of the default size. Returns how many shapes there were,
        0 for backends that need no such thing. Qwen-Image's and SANA's prompts keep their own lengths, each of which
        is a shape, for up to 400 ms of planning: they are prepared for only where `tokens` is given."""
        check_count("num_images", num_images)
        if tokens is not None:
            check_count("tokens", tokens)
        size, network = self.sizes.resolve(height, width), self.program.network
        with self._lock, torch.inference_mode():
            return warm.warm(
                self.text, network, self.vae, self.program.plan.choices, size, num_images, tokens, self.dtype,
                self.device,
            )  # fmt: skip

    def __reduce__(self) -> Any:
        raise ConfigError("a Pipeline is not copied or sent to another process: load the model there")

    @out_of_memory.named("saving")
    def save(self, path: str | Path) -> Path:
        """Writes the compiled program and the other parts as an artifact (passes/artifact.py), which
        `load` takes like a model folder, skipping the passes. It holds this pipeline's schedule only.
        Raises ConfigError where weights stream, and where the text encoder has 8 bits: those are made as it is
        read, of a saved program too."""
        if self.memory is not None and (self.memory.streamed or self.memory.text_streams):
            raise ConfigError("this pipeline's weights stream: load it without memory_budget to save it")
        if self.text.precision is not None:
            raise ConfigError("text encoders are saved in their dtype: save without text_precision, load with it again")
        with self._lock, torch.inference_mode():
            self.program.refold(schedule(self.sampler, self.dtype))  # a call may have left another
            parts = {
                "transformer": (self.program.network.config.to_dict(), self.program.network.state_dict()),
                **{part.name: (part.checkpoint.config, part.weights()) for part in (*self.text.parts, *self.vae.parts)},
            }
            meta = {
                "sampler": asdict(self.sampler),
                "source": artifact.source_hash(self.folder / "transformer"),
                "plan": self.plan.to_dict(),
            }
            return artifact.write(Path(path), parts, self.folder, meta)

    def _run(
        self, prompts: tuple[str, ...] | PromptEmbeds, repeats: int, size: tuple[int, int], seeds: list[int],
        config: SamplerConfig, output: str, callback: Callable[[int, int, Tensor], None] | None,
        stages: StageTimer, at_once: int, preview: bool,
    ) -> Any:  # fmt: skip
        times = schedule(config, self.dtype)
        self.program.refold(times)
        network, vae = self.program.network, self.preview if preview and self.preview is not None else self.vae
        direct = output != "latent" and vae is self.vae and callback is None and self._projects_directly(times)
        with stages("text"):
            contexts = self._contexts(prompts, repeats, times, at_once)
        with stages("noise"):
            shape = (self.vae.channels, size[0] // self.vae.scale, size[1] // self.vae.scale)
            noise = initial_noise(seeds, shape, self.dtype, self.device)
        with stages("sample"):
            latents = sample(
                self._velocities(contexts, noise, at_once, stages, steps(config, self.dtype)[0].t if direct else None),
                noise, config, noise_fn=lambda step: step_noise(seeds, step, shape, device=self.device),
                callback=callback, cancel=stages.cancel,
                project=(lambda noise, raw, t: raw) if direct else network.ops.x0_project,
            )  # fmt: skip
        if output == "latent":
            return latents
        with stages("decode"):
            decode = vae.decode if output == "pt" else vae.decode_uint8
            check = lambda: stages.check("before a tile of its decode stage")
            images = _in_parts(lambda part, _: decode(part, raw=direct, check=check), latents, at_once, stages)
        with stages("output"):
            return _deliver(images, output)

    def _projects_directly(self, times: Schedule) -> bool:
        """Whether one kernel takes the network's last tokens to the VAE's input: x0, unpacking and the VAE's scaling.
        Without such a kernel the three are no faster together, and elsewhere x0 itself is wanted."""
        fused = self.program.network.ops.x0_to_vae is not EAGER.x0_to_vae
        return fused and len(times) == 1 and self.dtype != torch.float64

    def _velocities(
        self, contexts: list[Context], noise: Tensor, at_once: int, stages: StageTimer, direct: float | None
    ) -> Callable[[Tensor, int], Tensor]:
        """The network for all images of a batch, `at_once` together, with their contexts. direct: the time at which
        its answer is to be the VAE's input in place of the velocity, or None."""
        parts = [self._velocity(c, part, direct) for c, part in zip(contexts, noise.split(at_once), strict=True)]
        return lambda x, step: _in_parts(lambda part, i: parts[i](part, step), x, at_once, stages)

    def _velocity(self, context: Context, noise: Tensor, direct: float | None) -> Callable[[Tensor, int], Tensor]:
        """The network for these prompts, recorded where that is asked for or (capture "auto") worth while."""
        network, graphs, vae = self.program.network, self.captures, self.vae

        def run(x: Tensor, step: int, context: Context) -> Tensor:
            modulation = network.step_modulation(step)
            if direct is None:
                velocity: Tensor = network(x, modulation, context)
                return velocity
            patches, sign = network.patches(x, modulation, context)
            raw: Tensor = network.ops.x0_to_vae(x, patches, sign * direct, vae.std, vae.mean, vae.dtype)
            return raw

        positions = noise[:, 0].numel()
        streamed = self.memory is not None and self.memory.streamed
        if graphs is None or streamed or not (graphs.strict or positions <= AUTO_POSITIONS):
            if graphs is not None and streamed:
                graphs.refuse("velocity", NOT_RECORDED)
            return lambda x, step: run(x, step, context)
        static = context.in_bucket() if graphs.buckets else context
        name = "velocity" if direct is None else "vae input"
        return lambda x, step: graphs(name, self.program.plan, run, x, step, static)

    def _contexts(
        self, prompts: tuple[str, ...] | PromptEmbeds, repeats: int, times: Schedule, at_once: int
    ) -> list[Context]:
        """The contexts of a batch's images, `at_once` together; prompts never wait for others beside them there."""
        total = len(prompts) * repeats
        if at_once >= total and not self.batch_invariant:
            return [self._context(prompts, repeats, times)]
        rows = [image // repeats for image in range(total)]
        if isinstance(prompts, tuple):
            rows = [prompts.index(prompts[row]) for row in rows]
        made: dict[tuple[int, ...], Context] = {}
        contexts = []
        for part in (rows[start : start + at_once] for start in range(0, total, at_once)):
            few = tuple(dict.fromkeys(part))
            if few not in made:
                some = tuple(prompts[row] for row in few) if isinstance(prompts, tuple) else prompts.select(few)
                made[few] = self._context(some, 1, times)
            contexts.append(made[few].select([few.index(row) for row in part]))
        return contexts

    def _context(self, prompts: tuple[str, ...] | PromptEmbeds, repeats: int, times: Schedule | None = None) -> Context:
        """The prompts' side of the network: each distinct prompt computed once, then repeated per image.
        times: the schedule it is for (SD3.5 has it in the context); None: as it is now, not kept."""
        if isinstance(prompts, PromptEmbeds):
            rows, context = list(range(len(prompts))), self._encode(prompts)
        else:
            distinct = tuple(dict.fromkeys(prompts))
            rows = [distinct.index(p) for p in prompts]
            make: Callable[[], Context] = lambda: self._encode(self.text(list(distinct)))
            context = make() if times is None else self.prompts.get((distinct, times), self.program.network, make)
        return context.select([r for r in rows for _ in range(repeats)])

    def _checked(self, embeds: PromptEmbeds) -> PromptEmbeds:
        if self._probe is None:
            self._probe = self.text.probe(1)
        embeds.check(self._probe, self.text.max_tokens)
        return embeds

    def _encode(self, embeds: PromptEmbeds) -> Context:
        given, network = embeds.to(self.device, self.dtype), self.program.network
        if self.captures is not None:
            call = partial(self.captures, "context", self.program.plan)
            if self.captures.buckets:
                return recorded_context(network, call, given.embeds, given.lengths, **given.extras)
            encode = lambda embeds, lengths, extras: network.encode_context(embeds, lengths, **extras)
            alone: Context = call(encode, given.embeds, given.lengths, given.extras)
            return alone
        context: Context = network.encode_context(given.embeds, given.lengths, **given.extras)
        return context


def _in_parts(function: Callable[[Tensor, int], Tensor], x: Tensor, at_once: int, stages: StageTimer) -> Tensor:
    """function(part, its number) for parts of `at_once` rows of x, joined; the caller can cancel between them."""
    results = []
    for i, part in enumerate(x.split(at_once)):
        if i:
            stages.check(f"after {i * at_once} of {len(x)} images of a stage")
        results.append(function(part, i))
    return results[0] if len(results) == 1 else torch.cat(results)


def _deliver(images: Tensor, output: str) -> Any:
    if output == "pt":
        return (images.float() / 2 + 0.5).clamp(0, 1)
    array = images.cpu().numpy()
    if output == "np":
        return array
    from PIL import Image

    return [Image.fromarray(a) for a in array]
