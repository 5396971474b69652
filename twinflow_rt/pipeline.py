"""The data path: prompt -> embeddings -> noise -> velocity -> clean latents -> pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from .checkpoint import artifact
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.lora import Loras, resolve_loras
from .compile import Program
from .config import (
    CALL_NAMES,
    METHODS,
    ON_OOM,
    OUTPUTS,
    SizeRule,
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_path,
    dtype_name,
    resolve_device,
    resolve_prompts,
    shown,
    understands,
)
from .errors import ConfigError, DeviceError, NonFiniteError
from .plan import Plan
from .planning import encoder_costs, warm_up
from .planning.memory_plan import MemoryPlan
from .planning.roofline import StageWork
from .planning.work import predict_stages
from .runtime import out_of_memory
from .runtime.capture import Captures
from .runtime.finite import FiniteCheck, broken
from .runtime.forks import Lock
from .runtime.host_state import isolated
from .runtime.parallel import Ulysses
from .runtime.threads import placed_threads
from .runtime.timing import StageTimer
from .sampling.guidance import Guidance, resolve_guidance
from .sampling.noise import check_batch, initial_noise, resolve_seeds
from .sampling.schedule import SamplerConfig, schedule, started
from .sampling.scheduler import Scheduler, sampler_of
from .stages import embeds_file
from .stages.image_input import ImageInput, resolve_images
from .stages.result import Result, Truncated, deliver
from .stages.text import PromptEmbeds, TextStage
from .stages.vae import VaeDecoder
from .stages.velocity import Callback, Prompts, VelocityStage


@dataclass(frozen=True)
class Request:
    """The arguments of a call, checked. repeats: images per prompt. size: height and width in pixels. seeds: one per
    image. given: the pictures to start from, if any. guidance, negative: the prompts to lead away from, one each or one
    for all; None: no guidance."""

    prompts: Prompts
    repeats: int
    size: tuple[int, int]
    seeds: list[int]
    sampler: SamplerConfig
    output: str
    callback: Callback | None
    preview: bool
    given: ImageInput | None
    guidance: Guidance | None
    negative: Prompts


class Pipeline:
    """A loaded model. Calls are serialised: one device runs one generation at a time.

    text, velocity, vae: its stages. preview: the decoder of calls with preview=True, or None. sampler: of calls of the
    default size that name none. scheduler: of an ordinary flow model, which gives calls their samplers; None for
    TwinFlow's. folder: it was loaded from. memory: how it keeps to a budget, or None.
    batch_invariant: whether every image goes through the networks alone, so that its bits are the same in
    any batch (docs/reliability.md). check_finite: whether latents and pixels that hold NaN or infinity are a
    NonFiniteError. Both may be changed between calls.
    """

    def __init__(
        self, text: TextStage, velocity: VelocityStage[Program], vae: VaeDecoder, sizes: SizeRule,
        sampler: SamplerConfig, folder: Path, *, preview: VaeDecoder | None = None, memory: MemoryPlan | None = None,
        batch_invariant: bool = False, check_finite: bool = True, scheduler: Scheduler | None = None,
    ) -> None:  # fmt: skip
        self.text, self.velocity, self.vae, self.preview = text, velocity, vae, preview
        self.sizes, self.sampler, self.folder, self.memory = sizes, sampler, folder, memory
        self.device, self.dtype, self.prompts = velocity.device, velocity.dtype, velocity.prompts
        self.batch_invariant, self.check_finite, self.scheduler = batch_invariant, check_finite, scheduler
        self._lock = Lock("this pipeline")
        self._work: tuple[StageWork, ...] | None = None
        self._probe: PromptEmbeds | None = None  # of the text stage: what embeddings look like

    @property
    def program(self) -> Program:
        """The compiled velocity network."""
        return self.velocity.program

    @property
    def source(self) -> Checkpoint:
        """What the velocity network was read from, open."""
        recipe = self.program.recipe
        return Checkpoint(self.folder / "transformer", quantized=True) if recipe is None else recipe.source

    @property
    def captures(self) -> Captures | None:
        """What records the stages, or None."""
        stages = (self.velocity, self.text, self.vae)  # within a memory budget some are not recorded
        return next((stage.options.captures for stage in stages if stage.options.captures is not None), None)

    @property
    @isolated()
    def plan(self) -> Plan:
        """What compiling decided (what was folded, precision, implementations and why better ones were refused), and
        the least each stage must cost for an image of the default size. Printed in full; `to_dict()` is its JSON."""
        if self._work is None:
            size = self.sizes.resolve(None, None)
            self._work = predict_stages(self.text, self.program.network, self.vae, *size, self.dtype)
        loads = tuple(note for stage in (self.text, self.vae) for note in stage.notes())
        graphs = self.captures.notes() if self.captures is not None else ()
        graphs += self.memory.notes() if self.memory is not None else ()
        graphs += (str(self.prompts),) if self.prompts.budget else ()
        graphs += (encoder_costs.note(self.vae, self.sizes.resolve(None, None)),)
        if self.program.schedule != tuple(own := schedule(self.sampler, self.dtype)):
            graphs += (f"folded for the last call; save, and calls without one, go back to {len(own)} evaluation(s)",)
        return replace(self.program.plan, stages=self._work, notes=self.program.plan.notes + loads + graphs)

    def read_embeds(self, path: str | Path) -> PromptEmbeds:
        """Return prompt embeddings that `twinflow-rt encode` wrote, for a call of this pipeline.

        Raises CheckpointError for another file, ConfigError for one of another model or text encoder.
        """
        return self.accept(embeds_file.read(check_path("path", path)), path)

    @isolated()
    def accept(self, saved: embeds_file.Saved, where: str | Path) -> PromptEmbeds:
        """Return the embeddings of a file read from `where`, if they are this model's; see `read_embeds`."""
        if not isinstance(saved, embeds_file.Saved):
            raise ConfigError(f"saved must be what stages.embeds_file.read returns; got {shown(saved)}")
        saved.require(self.program.plan.family, self.text, where)
        return saved.embeds

    @understands(CALL_NAMES)
    @isolated()
    def __call__(
        self, prompt: str | Sequence[str] | PromptEmbeds, *, height: int | None = None, width: int | None = None,
        seed: int | Sequence[int] | None = None, num_images: int = 1, nfe: int | None = None,
        sampler: SamplerConfig | str | None = None, output: str = "pil",
        callback: Callback | None = None, cancel: Callable[[], bool] | None = None,
        on_oom: str = "raise", preview: bool = False, image: Any = None, strength: float | None = None,
        mask: Any = None, guidance: float | Guidance | None = None,
        negative_prompt: str | Sequence[str] | PromptEmbeds | None = None,
    ) -> Result:  # fmt: skip
        """Generate num_images images per prompt, all in one batch, prompt-major.

        prompt: text, several, or embeddings from `self.text`. height, width: pixels, multiples of
            `self.sizes.multiple`. seed: image k of the batch gets seed + k; or one seed per image;
            None draws at random. nfe or sampler: another schedule than loaded with, refolded on
            first use and kept for later calls of that schedule.
        output: "pil" images; "np" uint8 [B, H, W, 3]; "pt" float32 [B, 3, H, W] in [0, 1] on the
            device; "latent" the normalised x0 [B, C, h, w] in the model's dtype.
        callback(done, total, x0) after each evaluation; cancel() -> True ends the run between stages. Neither may
            call this pipeline again, save it or change it: ConfigError.
        on_oom: what follows when memory runs out: "raise" OutOfMemoryError, or "split": begin again with
            half as many images at once, down to one. Either way nothing of the failed run is kept.
        preview: decode with the small decoder that the model was loaded with (`load(preview=FOLDER)`).
        image: a picture to start from, or one per prompt or image (`stages.image_input`), which gives the default size.
            strength: above 0 and up to 1, default 0.6: the time of the schedule at which its noise begins. mask:
            of its size, white where it is painted anew; all other pixels stay as they are.
        guidance: scale of classifier-free guidance, as diffusers' pipeline of the family counts it (Qwen-Image's
            `true_cfg_scale`), or a `Guidance`; for ordinary flow models that are not distilled: twice the work.
            negative_prompt: what to lead away from, one or one per prompt; default: the empty prompt.
        Names of diffusers (`num_inference_steps`, `generator`, ...) are taken where they mean the same.
        Raises ConfigError for arguments that cannot work, CancelledError, OutOfMemoryError, NonFiniteError.
        """
        check_choice("on_oom", on_oom, ON_OOM)
        if cancel is not None:
            check_callable("cancel", cancel, ())
        if self.program.sequence is not None and (cancel is not None or on_oom != "raise"):
            raise ConfigError("cancel= and on_oom='split' would part the processes of a sequence-parallel call")
        request = self._checked(
            prompt, (height, width), seed, num_images, nfe, sampler, output, callback, preview, (image, mask, strength),
            guidance, negative_prompt,
        )  # fmt: skip
        timer = StageTimer(self.device, cancel)
        if self._lock.forked and self.device.type == "cuda":
            raise DeviceError("CUDA does not survive a fork: start the worker by spawn and load the model in it")
        (rows, columns), images = request.size, len(request.seeds)
        with self._lock, placed_threads(self.device):
            truncated = self._truncated(request)
            made, at_once = out_of_memory.halving(
                lambda at_once: self._run(request, at_once, timer), 1 if self.batch_invariant else images,
                split=on_oom == "split", release=self._release,
                what=lambda n: f"images of {columns}x{rows}, {n} at once, do not fit in {self.device}'s memory",
            )  # fmt: skip
        return Result(made, request.seeds, timer.timings(), timer.memory, at_once, request.output, truncated)

    def _checked(
        self, prompt: str | Sequence[str] | PromptEmbeds, size: tuple[int | None, int | None],
        seed: int | Sequence[int] | None, num_images: int, nfe: int | None, sampler: SamplerConfig | str | None,
        output: str, callback: Callback | None, preview: bool, picture: tuple[Any, Any, Any],
        guidance: float | Guidance | None, negative: str | Sequence[str] | PromptEmbeds | None,
    ) -> Request:  # fmt: skip
        """Return a call's arguments checked and completed. Raises ConfigError."""
        check_choice("output", output, OUTPUTS)
        num_images, preview = check_count("num_images", num_images), check_flag("preview", preview)
        if callback is not None:
            check_callable("callback", callback, ("done", "total", "x0"))
        prompts, away = self._checked_prompts(prompt), self._checked_prompts("" if negative is None else negative)
        check_batch(images := len(prompts) * num_images)
        given, resolved = resolve_images(*picture, len(prompts), num_images, self.sizes, size)
        config = started(self.sampler_of(nfe, sampler, resolved), 1 if given is None else given.strength)
        distilled = self.scheduler is not None and self.scheduler.distilled
        guided = resolve_guidance(guidance, negative, config.mode, distilled, self.program.network)
        if guided is not None and len(away) not in (1, len(prompts)):
            raise ConfigError(f"{len(away)} negative prompts for {len(prompts)}: give one, or one for each")
        if self.memory is not None:
            self.memory.require(*resolved, images)
        if preview and self.preview is None:
            raise ConfigError("preview=True needs a preview decoder: load(..., preview=FOLDER) with an AutoencoderTiny")
        seeds = resolve_seeds(seed, images)  # last: it takes a generator for used
        if (sequence := self.program.sequence) is not None:
            seeds = sequence.agree(seeds)
        return Request(
            prompts, num_images, resolved, seeds, config, output, callback, preview, given, guided, away
        )

    def sampler_of(self, nfe: int | None, sampler: SamplerConfig | str | None, size: tuple[int, int]) -> SamplerConfig:
        """Return the sampler that a call with these arguments has. size: height and width in pixels."""
        return sampler_of(nfe, sampler, self.sampler, self.scheduler, self.sizes.tokens(*size))

    def _truncated(self, request: Request) -> Truncated:
        """Return which of a call's images have prompts that were cut, and warn of texts that are."""
        given = request.prompts
        if request.guidance is not None and not isinstance(request.negative, PromptEmbeds):
            self.text.truncated(request.negative)
        known = given.truncated if isinstance(given, PromptEmbeds) else self.text.truncated(given)
        return Truncated(one for one in known or (False,) * len(given) for _ in range(request.repeats))

    def _checked_prompts(self, given: str | Sequence[str] | PromptEmbeds) -> Prompts:
        """Return texts, or embeddings if the text stage could have made them. Raises ConfigError."""
        if not isinstance(given, PromptEmbeds):
            return resolve_prompts(given)
        if self._probe is None:
            self._probe = self.text.probe(1)
        return given.check(self._probe, self.text.max_tokens)

    def _run(self, request: Request, at_once: int, timer: StageTimer) -> Any:
        """Return the images of a call, `at_once` of them in a network together; tensors are such as autograd takes."""
        finite = FiniteCheck(self.check_finite)
        with torch.inference_mode():
            made = self._made(request, at_once, timer, finite)
        if request.output == "latent":
            result: Any = made.clone()
        else:
            with timer("output"):
                result = deliver(made, request.output)
        if (found := finite.first()) is not None:  # the device has been waited for, or will be
            raise self._not_finite(*found, request.seeds)
        return result

    def _made(self, request: Request, at_once: int, timer: StageTimer, finite: FiniteCheck) -> Tensor:
        """Return decoded images, or latents where those are asked for; `finite` notes both."""
        velocity, seeds, size = self.velocity, request.seeds, request.size
        times = schedule(request.sampler, self.dtype)
        self.program.refold(times)
        vae = self.preview if request.preview and self.preview is not None else self.vae
        given, start = request.given, None
        masked = given is not None and given.mask is not None  # whose latents are put together
        alone = not masked and request.guidance is None and request.output != "latent" and request.callback is None
        raw = vae is self.vae and alone and velocity.projects_to_vae(times)
        with timer("text"):
            prompts, negative = self._with_negative(request)
            contexts = velocity.contexts(
                prompts, self.text.encode, request.repeats, times, at_once, self.batch_invariant, negative
            )
        with timer("noise"):
            shape = (vae.channels, size[0] // vae.scale, size[1] // vae.scale)
            noise = initial_noise(seeds, shape, self.dtype, self.device)
        if given is not None:
            with timer("encode"), encoder_costs.opened(self.vae, self.memory, size) as encoder:
                start = encoder.start(given, noise, at_once if self.memory is None else 1, timer)
        with timer("sample"):
            latents = velocity.sample(
                noise, contexts, seeds, request.sampler, at_once, timer, request.callback, vae if raw else None, start,
                request.guidance, apart=self.memory is not None,
            )  # fmt: skip
        finite.note("latents", latents)
        if request.output == "latent":
            return latents
        with timer("decode"):
            return vae.images(latents, request.output, at_once, timer, raw, finite, given)

    def _with_negative(self, request: Request) -> tuple[Prompts, list[int]]:
        """Return a call's prompts and, where it is guided, its negative ones behind them, and which is whose."""
        if request.guidance is None:
            return request.prompts, []
        asked, away = request.prompts, request.negative
        asked = asked if isinstance(asked, PromptEmbeds) else self.text.encode(asked)
        away = away if isinstance(away, PromptEmbeds) else self.text.encode_negative(away)
        return asked.joined(away), [len(asked) + i % len(away) for i in range(len(asked))]

    def damaged(self, most: int | None = None) -> tuple[Path, str] | None:
        """Return the first of the weights and constants that holds NaN or infinity, as its folder and name, or None.
        most: elements of the tensors looked at; None: all are read."""
        stages = [stage for stage in (self.text, self.vae, self.preview) if stage is not None]
        networks = [(part.checkpoint.folder, part.network) for stage in stages for part in stage.parts]
        for folder, network in ((self.folder / "transformer", self.program.network), *networks):
            if (name := broken(network, most)) is not None:
                return folder, name
        return None

    def _not_finite(self, what: str, images: list[int], seeds: list[int]) -> NonFiniteError:
        """Return the error of a call whose `what` is not finite in these images, with the likely cause."""
        if (found := self.damaged()) is not None:
            reason = f"{found[1]} of the {found[0].name} does, so its file, or an adapter, is damaged: get it again"
        else:
            held, cure = dtype_name(self.dtype), " or 'bf16'" * (self.dtype == torch.float16)
            reason = f"no weight does, so numbers grew beyond what {held} holds"
            reason += f": load with precision='fp32'{cure}" * (self.dtype != torch.float32)
        some = ", ".join(f"number {i} of seed {seeds[i]}" for i in images[:3]) + ", ..." * (len(images) > 3)
        return NonFiniteError(
            f"the {what} of {len(images)} of {len(seeds)} images ({some}) hold NaN or infinity, and would be black: "
            f"{reason}; check_finite=False returns them all the same"
        )

    def _release(self) -> None:
        """Give up what graphs hold, before a call begins again with fewer images."""
        if self.captures is not None:
            self.captures.clear()

    def parallelize(self, group: Any = None) -> None:
        """Spread the velocity network of each image over the processes of a torch.distributed group (None: all),
        see `runtime.parallel`: for a GPU each, under torchrun. Every process loads the model and makes the same calls,
        which then all return the same images; seeds left open are the first process's.

        Raises ConfigError without a process group, for SD3.5 and SANA, and for heads that do not divide.
        """
        with self._lock:
            self.program.parallelize(Ulysses(group))

    @out_of_memory.named("compiling with these adapters")
    @isolated()
    def set_loras(self, loras: Loras = ()) -> None:
        """Replace the merged adapters by `loras` (as for `load`; none by default): the network is
        compiled again from the checkpoint, so nothing of the old ones remains.

        Raises ConfigError on a saved artifact, whose weights hold theirs for good; CheckpointError for
        an adapter that cannot be merged, and then nothing has changed.
        """
        with self._lock:
            self.program.set_loras(resolve_loras(loras), self.check_finite)

    @isolated()
    def warm_up(
        self, height: int | None = None, width: int | None = None, num_images: int = 1, tokens: int | None = None
    ) -> int:
        """Prepare for calls of this size, and prompts of up to `tokens` tokens, what an attention backend prepares per
        shape (see `planning.warm_up`); `load` does for one image of the default size. Returns how many shapes there
        were, 0 for backends that need no such thing. Qwen-Image's and SANA's prompts keep their own lengths, each of
        which is a shape, for up to 400 ms of planning: they are prepared for only where `tokens` is given."""
        num_images = check_count("num_images", num_images)
        check_batch(num_images)
        tokens = None if tokens is None else check_count("tokens", tokens)
        size, network = self.sizes.resolve(height, width), self.program.network
        with self._lock, torch.inference_mode():
            return warm_up.warm(
                self.text, network, self.vae, self.program.plan.choices, size, num_images, tokens, self.dtype,
                self.device,
            )  # fmt: skip

    def to(self, *where: Any, device: Any = None, dtype: Any = None) -> Self:
        """Return the pipeline, if it is on that device and in that dtype already. Raises ConfigError otherwise: both
        are chosen when it is loaded."""
        for wanted in (wanted for wanted in (*where, device, dtype) if wanted is not None):
            if isinstance(wanted, torch.dtype):
                fits, how = wanted == self.dtype, f"dtype='{dtype_name(wanted)}'"
            else:
                place = resolve_device(wanted)
                fits = (place.type, place.index or 0) == (self.device.type, self.device.index or 0)
                how = f"device='{place}'"
            if not fits:
                have = f"{dtype_name(self.dtype)} on {self.device}"
                raise ConfigError(f"this pipeline was compiled for {have}: call load(..., {how}) instead")
        return self

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Self:
        """Raise ConfigError: `twinflow_rt.load` is what diffusers calls from_pretrained."""
        raise ConfigError("call twinflow_rt.load(path, ...) in its place")

    if not TYPE_CHECKING:  # else every name would be an attribute

        def __getattr__(self, name: str) -> Any:
            hint = f"; use {METHODS[name]}" if name in METHODS else ""
            raise AttributeError(f"a Pipeline has no attribute {name!r}{hint}")

    def __repr__(self) -> str:
        plan, sizes, text = self.program.plan, self.sizes, self.text
        evaluations, loras = len(plan.schedule), ", ".join(map(str, plan.loras)) or "none"
        text_precision = text.options.precision or dtype_name(self.dtype)
        budget = "" if self.memory is None else f", within {self.memory.peak / 1e9:.2f} GB"
        return "\n".join((
            f"Pipeline of {plan.family}, from {self.folder}",
            f"  arithmetic  {plan.arithmetic}; text encoder {text_precision}; on {self.device}{budget}",
            f"  sampling    {evaluations} evaluation{'s' * (evaluations > 1)} per image; adapters: {loras}",
            f"  images      {sizes.default}x{sizes.default} if not asked otherwise, multiples of {sizes.multiple} up "
            f"to {sizes.max_width}x{sizes.max_height}; prompts of up to {text.max_tokens} tokens",
            "  to use      pipe(PROMPT, seed=0)[0] is an image; print(pipe.plan) says what was compiled, and why",
        ))  # fmt: skip

    def __reduce__(self) -> Any:
        raise ConfigError("a Pipeline is not copied or sent to another process: load the model there")

    @out_of_memory.named("saving")
    @isolated()
    def save(self, path: str | Path) -> Path:
        """Write the compiled program and the other parts as an artifact (checkpoint/artifact.py), which `load` takes
        like a model folder, skipping the passes. It holds the schedule that this pipeline was loaded with, and no
        other, whatever calls have run since; so does the plan from then on. Raises ConfigError where weights stream,
        and where the text encoder has 8 bits: those are made as it is read, of a saved program too."""
        artifact.check_place(folder := Path(check_path("path", path)))
        if self.memory is not None and (self.memory.streamed or self.memory.text_streams):
            raise ConfigError("this pipeline's weights stream: load it without memory_budget to save it")
        if self.text.options.precision is not None:
            raise ConfigError("text encoders are saved in their dtype: save without text_precision, load with it again")
        with self._lock, torch.inference_mode():
            self.program.restore(schedule(self.sampler, self.dtype))  # a call may have left another
            parts = {
                "transformer": (self.program.network.config.to_dict(), self.program.network.state_dict()),
                **{part.name: (part.checkpoint.config, part.weights()) for part in self.text.parts},
                "vae": (self.vae.parts[0].checkpoint.config, self.vae.stored()),
            }
            meta = {
                "sampler": asdict(self.sampler),
                "source": artifact.source_hash(self.source),
                "plan": self.plan.to_dict(),
            }
            return artifact.write(folder, parts, self.folder, meta)
