"""The data path: prompt -> embeddings -> noise -> velocity -> clean latents -> pixels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub
from .compile import Program, compile_network, load_program
from .config import (
    DTYPES,
    OUTPUTS,
    SizeRule,
    check_choice,
    check_count,
    resolve_device,
    resolve_dtype,
    resolve_precision,
    resolve_prompts,
    resolve_sampler,
)
from .errors import ConfigError, DeviceError
from .models import family_of
from .models.context import Context
from .noise import check_batch, initial_noise, resolve_seeds, step_noise
from .passes import artifact
from .passes.fold import Schedule
from .passes.load import Checkpoint, model_folder
from .passes.lora import Loras, Merged, require_same, resolve_loras
from .plan import Plan, Stage
from .predict import predict_stages
from .prompt_cache import PromptCache
from .report import Stages
from .sample import SamplerConfig, preset, sample, schedule
from .text import PromptEmbeds

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Result:
    """images: one per (prompt, repeat), prompt-major. seeds: image k's own. timings: seconds per
    stage and in total. memory: peak bytes per stage (see `report.Stages`)."""

    images: Any
    seeds: list[int]
    timings: dict[str, float]
    memory: dict[str, int]


class Pipeline:
    """A loaded model. Calls are serialised: one device runs one generation at a time."""

    def __init__(
        self, text: Any, program: Program, vae: Any, sizes: SizeRule, sampler: SamplerConfig,
        device: torch.device, dtype: torch.dtype, folder: Path, prompt_cache: int = 0,
    ) -> None:  # fmt: skip
        self.folder, self.prompts = folder, PromptCache(prompt_cache)
        self.text, self.program, self.vae, self.sizes = text, program, vae, sizes
        self.sampler, self.device, self.dtype = sampler, device, dtype
        self._lock = threading.Lock()
        self._stages: tuple[Stage, ...] | None = None
        self._probe: PromptEmbeds | None = None  # of the text stage: what embeddings look like

    @property
    def plan(self) -> Plan:
        """What compiling decided, and the least each stage must cost for an image of the default size."""
        if self._stages is None:
            size = self.sizes.resolve(None, None)
            self._stages = predict_stages(self.text, self.program.network, self.vae, *size)
        loads = tuple(
            f"{part.name} {report}"
            for stage in (self.text, self.vae)
            for part, report in zip(stage.parts, stage.reports, strict=True)
        )
        return replace(self.program.plan, stages=self._stages, notes=self.program.plan.notes + loads)

    def __call__(
        self, prompt: str | Sequence[str] | PromptEmbeds, *, height: int | None = None, width: int | None = None,
        seed: int | Sequence[int] | None = None, num_images: int = 1, nfe: int | None = None,
        sampler: SamplerConfig | str | None = None, output: str = "pil",
        callback: Callable[[int, int, Tensor], None] | None = None, cancel: Callable[[], bool] | None = None,
    ) -> Result:  # fmt: skip
        """Generates num_images images per prompt, all in one batch, prompt-major.

        prompt: text, several, or embeddings from `self.text`. height, width: pixels, multiples of
            `self.sizes.multiple`. seed: image k of the batch gets seed + k; or one seed per image;
            None draws at random. nfe or sampler: another schedule than loaded with, refolded on
            first use and kept for later calls of that schedule.
        output: "pil" images; "np" uint8 [B, H, W, 3]; "pt" float32 [B, 3, H, W] in [0, 1] on the
            device; "latent" the normalised x0 [B, C, h, w] in the model's dtype.
        callback(done, total, x0) after each evaluation; cancel() -> True ends the run between stages.
        Raises ConfigError for arguments that cannot work, CancelledError, DeviceError out of memory.
        """
        check_choice("output", output, OUTPUTS)
        check_count("num_images", num_images)
        if isinstance(prompt, PromptEmbeds):
            prompts: tuple[str, ...] | PromptEmbeds = self._checked(prompt)
        else:
            prompts = resolve_prompts(prompt)
        size = self.sizes.resolve(height, width)
        check_batch(len(prompts) * num_images)
        check_batch(len(prompts) * num_images)
        seeds = resolve_seeds(seed, len(prompts) * num_images)
        config = resolve_sampler(nfe, sampler) or self.sampler
        stages = Stages(self.device, cancel)
        try:
            with self._lock, torch.inference_mode():
                images = self._run(prompts, num_images, size, seeds, config, output, callback, stages)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{len(seeds)} images of {size[1]}x{size[0]} do not fit in {self.device}'s memory; "
                f"generate fewer at a time or smaller ones ({str(error).splitlines()[0]})"
            ) from None
        return Result(images, seeds, stages.timings(), stages.memory)

    def set_loras(self, loras: Loras = ()) -> None:
        """Replaces the merged adapters by `loras` (as for `load`; none by default): the network is
        compiled again from the checkpoint, so nothing of the old ones remains.

        Raises ConfigError on a saved artifact, whose weights hold theirs for good; CheckpointError for
        an adapter that cannot be merged, and then nothing has changed.
        """
        with self._lock, torch.no_grad():
            self.program.set_loras(resolve_loras(loras))

    def save(self, path: str | Path) -> Path:
        """Writes the compiled program and the other parts as an artifact (passes/artifact.py), which
        `load` takes like a model folder, skipping the passes. It holds this pipeline's schedule only."""
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
        config: SamplerConfig, output: str, callback: Callable | None, stages: Stages,
    ) -> Any:  # fmt: skip
        times = schedule(config, self.dtype)
        self.program.refold(times)
        network = self.program.network
        with stages("text"):
            context = self._context(prompts, repeats, times)
        with stages("noise"):
            shape = (self.vae.channels, size[0] // self.vae.scale, size[1] // self.vae.scale)
            noise = initial_noise(seeds, shape, self.dtype, self.device)
        with stages("sample"):
            latents = sample(
                lambda x, step: network(x, network.step_modulation(step), context), noise, config,
                noise_fn=lambda step: step_noise(seeds, step, shape, device=self.device),
                callback=callback, cancel=stages.cancel, project=network.ops.x0_project,
            )  # fmt: skip
        if output == "latent":
            return latents
        with stages("decode"):
            images = self.vae.decode(latents) if output == "pt" else self.vae.decode_uint8(latents)
        with stages("output"):
            return _deliver(images, output)

    def _context(self, prompts: tuple[str, ...] | PromptEmbeds, repeats: int, times: Schedule | None = None) -> Context:
        """The prompts' side of the network: each distinct prompt computed once, then repeated per image.
        times: the schedule it is for (SD3.5 has it in the context); None: as it is now, not kept."""
        if isinstance(prompts, PromptEmbeds):
            rows, context = list(range(len(prompts))), self._encode(prompts)
        else:
            distinct = tuple(dict.fromkeys(prompts))
            rows = [distinct.index(p) for p in prompts]
            make = lambda: self._encode(self.text(list(distinct)))
            context = make() if times is None else self.prompts.get((distinct, times), self.program.network, make)
        return context.select([r for r in rows for _ in range(repeats)])

    def _checked(self, embeds: PromptEmbeds) -> PromptEmbeds:
        if self._probe is None:
            self._probe = self.text.probe(1)
        embeds.check(self._probe, self.text.max_tokens)
        return embeds

    def _encode(self, embeds: PromptEmbeds) -> Context:
        given = embeds.to(self.device, self.dtype)
        return self.program.network.encode_context(given.embeds, given.lengths, **given.extras)


def _deliver(images: Tensor, output: str) -> Any:
    if output == "pt":
        return (images.float() / 2 + 0.5).clamp(0, 1)
    array = images.cpu().numpy()
    if output == "np":
        return array
    from PIL import Image

    return [Image.fromarray(a) for a in array]


def load(
    path: str | Path = "demo", *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
    nfe: int | None = None, sampler: SamplerConfig | str | None = None, loras: Loras | None = None,
    progress: Callable[[str, int], None] | None = None, precision: str | None = None, exempt: Sequence[str] = (),
    prompt_cache: int = 0, download: bool = False,
) -> Pipeline:  # fmt: skip
    """Loads and compiles a model folder in diffusers' layout, "demo", the miniature that ships along, or
    hf://owner/name[@revision][/subfolder] from the cache of the Hugging Face hub.

    device: default the GPU if there is one. dtype: default the checkpoint's, or float32 where the
    device cannot compute in that at full rate. nfe: evaluations per image the network is folded for
    (default 1). loras: adapters to merge, {path: weight} or [path or (path, weight), ...]; an artifact
    takes those it was saved with, or None. progress(part, bytes) is called as tensors arrive.
    precision: "fp32", "fp16" or "bf16", the dtypes; "int8", CPU only: linear layers of the transformer's
    blocks with 8-bit weights and activations; "auto" or None, what suits checkpoint and device. exempt:
    parts of layer names kept out of int8, because they measured sensitive (`twinflow-rt sensitivity`).
    prompt_cache: bytes of device memory to keep prompts in that were seen before, as the network reads them
    (`Pipeline.prompts` counts hits); 0: none.
    download: fetch a hf:// model (`hub`); nothing else ever opens a connection.
    Raises CheckpointError, ConfigError, DeviceError.
    """
    asked, target = resolve_sampler(nfe, sampler), resolve_device(device)
    quantized, dtype = resolve_precision(precision, dtype)
    folder = model_folder(model_path(path, download))
    saved = artifact.read(folder) if artifact.is_artifact(folder) else None
    config = asked or (saved["sampler"] if saved else preset(1))

    def part(name: str) -> Callable[[int], None] | None:
        return None if progress is None else lambda size: progress(name, size)

    pairs = None if loras is None else resolve_loras(loras)
    plan = saved["plan"] if saved else None
    if plan is not None:
        require_same(plan.loras, pairs)
        if (precision is not None and quantized != plan.precision) or (exempt and tuple(exempt) != plan.exempt):
            raise ConfigError(
                f"{folder} was saved with linear layers in {plan.precision or 'its dtype'}, for good; "
                "load the model folder for another precision"
            )
    checkpoint = Merged(folder / "transformer", pairs) if pairs and plan is None else _transformer(folder, plan)
    family = family_of(checkpoint.config)
    kind = resolve_dtype(dtype, target, DTYPES[plan.dtype] if plan else checkpoint.main_dtype())
    text, vae, sizes = family.open(folder, checkpoint.config)
    with torch.no_grad():
        text.materialize(target, kind, part("text encoder"))
        times = schedule(config, kind)
        to = {"device": target, "dtype": kind, "progress": part("transformer")}
        how = {"precision": quantized, "exempt": exempt}
        if plan is not None:
            program = load_program(checkpoint, family, plan, **to)
            program.refold(times)  # refuses another schedule than the saved one
        else:
            program = compile_network(checkpoint, family, times, **to, **how)
        vae.materialize(target, kind, part("vae"))
    return Pipeline(text, program, vae, sizes, config, target, kind, folder, prompt_cache)


def model_path(path: str | Path, download: bool = False) -> Path:
    """The local folder that `load` takes for `path`."""
    return DEMO if str(path) == "demo" else hub.folder(path, download)


def _transformer(folder: Path, plan: Plan | None) -> Checkpoint:
    return Checkpoint(folder / "transformer", quantized=plan is not None and plan.precision is not None)
