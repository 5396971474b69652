"""Opening a model: its folder, the stages in it, what streams; then the compile path, and a Pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import artifact, hub
from .checkpoint.checkpoint import OWN_FILES, Checkpoint, Files
from .checkpoint.files import WEIGHTS
from .checkpoint.lora import Loras, Merged, require_same, resolve_loras
from .checkpoint.model_folder import model_folder, weight_files
from .checkpoint.reading import Progress
from .compile import TABLES, Program, Recipe, compile_network, load_program
from .config import (
    DTYPES,
    LOAD_NAMES,
    SizeRule,
    check_choice,
    check_path,
    dtype_name,
    parse_bytes,
    resolve_device,
    resolve_dtype,
    resolve_precision,
    shown,
    understands,
)
from .errors import CheckpointError, ConfigError
from .families import Family, family_of
from .host_memory import keep_freed_memory
from .ops.native import library
from .options import CAPTURES, LoadOptions, describe
from .passes.fold import Schedule
from .pipeline import Pipeline
from .plan import Plan
from .planning import mixed_precision
from .planning import precision as precisions
from .planning.memory_plan import PROMPT_TOKENS, MemoryPlan, plan_memory
from .runtime import out_of_memory
from .runtime.capture import Captures, open_captures
from .runtime.finite import SMALL
from .runtime.host_state import isolated
from .sampling.noise import check_batch
from .sampling.schedule import PRESETS, SamplerConfig, resolve_sampler, schedule
from .sampling.scheduler import MAX_EVALUATIONS, Scheduler, sampler_of
from .single_files.recognition import open_files
from .stages.stage import StageOptions
from .stages.text import TextStage
from .stages.tiles import check_tile
from .stages.vae import PreviewDecoder, VaeDecoder
from .stages.velocity import VelocityStage

__all__ = ["DEMO", "LoadOptions", "load", "model_path"]
DEMO = Path(__file__).parent / "demo"


@understands(LOAD_NAMES)
@isolated()
def load(
    path: str | Path = "demo", *, base: str | Path | None = None, files: Sequence[str | Path] = (),
    device: str | torch.device | None = None, dtype: str | torch.dtype | None = None, nfe: int | None = None,
    sampler: SamplerConfig | str | None = None, loras: Loras | None = None,
    progress: Callable[[str, int], None] | None = None, precision: str | None = None,
    skip_layers: Sequence[str] | str | Path = (), fp8_attention: bool = False, text_precision: str | None = None,
    text_skip_layers: Sequence[str] = (), prompt_cache: int = 0, download: bool = False, capture: str = "auto",
    batch_invariant: bool = False, check_finite: bool = True, memory_budget: int | str | None = None,
    largest: tuple[int | None, int | None, int] | None = None, tile: int | None = None,
    preview: str | Path | None = None,
) -> Pipeline:  # fmt: skip
    """Load and compile a model; return its Pipeline.

    path: a model folder in diffusers' layout, one that `Pipeline.save` wrote, "demo", the miniature that ships along,
    or hf://owner/name[@revision][/subfolder] from the cache of the Hugging Face hub; with `base`, a .gguf or
    .safetensors file of one network, or a folder of such, hf://owner/name/file included. The options are `LoadOptions`:
    {options}
    Raises CheckpointError, ConfigError, DeviceError, OutOfMemoryError.
    """
    given = locals()  # the arguments alone: nothing else has a name yet
    asked = Asked.of(LoadOptions(**{option.name: given[option.name] for option in fields(LoadOptions)}))
    return load_opened(*open_model(path, asked.options), asked)


load.__doc__ = (load.__doc__ or "").replace(
    "{options}", "\n    ".join(f"{option.name}: {describe(option)}." for option in fields(LoadOptions))
)


def open_model(path: str | Path, options: LoadOptions) -> tuple[Path, Files]:
    """Return the model folder that `load` takes for `path`, `options.base` and `options.files`, and what is read in
    place of its networks, by their folders' names. Raises CheckpointError, ConfigError."""
    path, download = check_path("path", path), options.download
    at_hub = path.startswith(hub.SCHEME) and not path.endswith(WEIGHTS)
    whole = path == "demo" or at_hub or os.path.lexists(Path(path) / "model_index.json")
    if whole and options.base is not None:
        raise ConfigError(f"{shown(path)} is a whole model, not weights that go with base=: give one of the two alone")
    given = options.files if whole else (path, *options.files)
    base = path if whole else options.base
    if not given or base is None:  # what is wrong with a path that is no model, `model_folder` says
        return model_folder(model_path(path, download)), OWN_FILES
    paths = [model_path(file, download) for file in given]
    folder = model_folder(model_path(base, download, without=hub.NETWORKS))
    if artifact.is_artifact(folder):
        raise ConfigError(f"{folder} is a saved program, compiled for good: base must be the model folder it is of")
    files = open_files(folder, paths)
    return model_folder(model_path(base, download, without=tuple(files))) if download else folder, files


@out_of_memory.named("loading")
@isolated()
def load_opened(folder: Path, files: Files, asked: Asked) -> Pipeline:
    """Load what `open_model` returns."""
    parts = (path for path in weight_files(folder) if path.parent.name not in files)
    out_of_memory.require_address_space("loading", sum(path.stat().st_size for path in parts))
    saved = artifact.is_artifact(folder)
    pipe = _load_artifact(folder, asked) if saved else _load_folder(folder, files, asked)
    out_of_memory.require_address_space("generating, after loading,", threads=False)
    return pipe


@dataclass(frozen=True)
class Asked:
    """`LoadOptions` checked for this machine, in the types that loading works with. dtype, loras, budget: None where
    nothing is asked for. captures: what records the stages, or None."""

    options: LoadOptions
    device: torch.device
    dtype: str | torch.dtype | None
    captures: Captures | None
    loras: tuple[tuple[Path, float], ...] | None
    budget: int | None

    @classmethod
    def of(cls, options: LoadOptions) -> Asked:
        """Check what can be checked without the model. Raise ConfigError, DeviceError."""
        resolve_sampler(options.nfe, options.sampler)
        device = resolve_device(options.device)
        _, dtype = resolve_precision(options.precision, options.dtype)
        check_choice("capture", options.capture, CAPTURES)
        loras = None if options.loras is None else resolve_loras(options.loras)
        budget = parse_bytes(options.memory_budget)
        return cls(options, device, dtype, open_captures(options.capture, device), loras, budget)

    def text_options(self, captures: Captures | None = None) -> StageOptions:
        """Return how the text stage is read where memory allows."""
        options = self.options
        return StageOptions(
            captures, precision=options.text_precision, skip_layers=tuple(options.text_skip_layers)
        )

    def progress(self, part: str) -> Progress | None:
        """Return what is told of the bytes of `part` as they arrive."""
        return self.options.progress and partial(self.options.progress, part)


@dataclass(frozen=True)
class Model:
    """A model whose files are open and compared, none of its weights read: the stages around its network, and the
    sampler it is to be compiled for, whose evaluations are at `times`. scheduler: an ordinary flow model's."""

    folder: Path
    checkpoint: Checkpoint
    family: Family
    text: TextStage
    vae: VaeDecoder
    sizes: SizeRule
    dtype: torch.dtype
    sampler: SamplerConfig
    scheduler: Scheduler | None
    times: Schedule

    @classmethod
    def open(
        cls, folder: Path, checkpoint: Checkpoint, family: Family, dtype: torch.dtype, asked: Asked,
        scheduler: Scheduler | None, files: Files = OWN_FILES, saved: SamplerConfig | None = None,
    ) -> Model:  # fmt: skip
        """Open the stages in `folder` beside the network in `checkpoint`. files: in place of the folder's. saved: a
        program's sampler."""
        options = asked.options
        text, vae, sizes = family.open(folder, checkpoint.config, files)
        text.require_precision(options.text_precision, options.text_skip_layers, asked.device, dtype)
        resolve_largest(options.largest, sizes)
        if options.tile is not None:
            check_tile(vae.network, options.tile)
        tokens = sizes.tokens(*sizes.resolve(None, None))
        given = options.sampler or (saved if options.nfe is None else None)
        sampler = sampler_of(options.nfe, given, PRESETS["1"], scheduler, tokens)
        if scheduler is not None:  # calls that name no steps make as many by it, unless the sampler is not its own
            steps = sampler.sampling_steps
            own = steps <= MAX_EVALUATIONS and scheduler.sampler(steps, tokens) == sampler
            scheduler = replace(scheduler, steps=steps if own else None)
        times = schedule(sampler, dtype)
        return cls(folder, checkpoint, family, text, vae, sizes, dtype, sampler, scheduler, times)

    def plan_memory(self, asked: Asked, **network: Any) -> MemoryPlan | None:
        """Return what streams, and the side of tiles, so that the budget holds; None without one. network: its
        precision, and whether it is a saved program's, as `memory_plan.plan_memory` takes them. Raise ConfigError."""
        if asked.budget is None:
            return None
        self.text.max_tokens = min(self.text.max_tokens, PROMPT_TOKENS)
        guided = self.scheduler is not None and not self.scheduler.distilled
        memory = plan_memory(
            self.text, self.vae, self.checkpoint, self.family, self.times, asked.device, self.dtype, asked.budget,
            resolve_largest(asked.options.largest, self.sizes), asked.options.tile,
            text_options=asked.text_options(), guided=guided, **network,
        )  # fmt: skip
        unrecorded = ["blocks stream"] * (memory.text_streams or memory.streamed > 0)
        unrecorded += [f"{stage}: {why}" for stage, why in memory.unrecorded().items()]
        if asked.captures is not None and asked.captures.strict and unrecorded:
            raise ConfigError(
                f"capture='graphs' records every stage; within memory_budget {asked.options.memory_budget} not all are "
                f"({'; '.join(unrecorded)}): use capture='auto', or a larger budget"
            )
        return memory


def _load_folder(folder: Path, files: Files, asked: Asked) -> Pipeline:
    """Load a folder in diffusers' layout, with `files` in place of its own: the passes compile its network."""
    options, network = asked.options, folder / "transformer"
    if asked.loras:
        checkpoint: Checkpoint = Merged.of_part(network, files, asked.loras, options.check_finite)
    else:
        checkpoint = Checkpoint.of_part(network, files)
    family = family_of(checkpoint.config)
    scheduler = family.scheduler(folder, checkpoint)
    dtype = resolve_dtype(asked.dtype, asked.device, checkpoint.main_dtype())
    arithmetic = precisions.resolve(
        checkpoint, options.precision, options.skip_layers, options.fp8_attention, asked.device, dtype,
        free=asked.dtype is None,
    )  # fmt: skip
    model = Model.open(folder, checkpoint, family, arithmetic.dtype, asked, scheduler, files)

    def plan(some: precisions.Arithmetic) -> MemoryPlan | None:
        return model.plan_memory(asked, precision=some.precision, skip_layers=some.skip_layers)

    if options.precision == "auto" and asked.budget is not None:
        arithmetic, memory = mixed_precision.fit(arithmetic, checkpoint, asked.device, asked.budget, plan)
    else:
        memory = plan(arithmetic)
    streamed = 0 if memory is None else memory.streamed
    plain = () if scheduler is None else (f"an ordinary flow model, sampled by {scheduler.kind}",)
    notes = (*plain, *(f"{part} from {file.folder}" for part, file in files.items()), *arithmetic.notes)
    budgeted, cpu = asked.budget is not None, asked.device.type == "cpu"
    recipe = Recipe(
        checkpoint, family, asked.device, **vars(replace(arithmetic, notes=notes)), streamed=streamed,
        tables_bytes=0 if budgeted and cpu else TABLES, tables_on_host=budgeted,
    )  # fmt: skip
    return _assemble(model, asked, memory, partial(compile_network, recipe, model.times))


def _load_artifact(folder: Path, asked: Asked) -> Pipeline:
    """Load a folder that `Pipeline.save` wrote: its plan says what the passes made of its network."""
    options, saved = asked.options, artifact.read(folder)
    plan = Plan.from_dict(saved["plan"])
    require_same(plan.loras, asked.loras)
    _require_precision(plan, folder, options)
    checkpoint = Checkpoint(folder / "transformer", quantized=plan.precision is not None)
    family = family_of(checkpoint.config)
    dtype = resolve_dtype(asked.dtype, asked.device, DTYPES[plan.dtype])
    scheduler = family.scheduler(folder, checkpoint) if checkpoint.config.get("twinflow") is False else None
    model = Model.open(folder, checkpoint, family, dtype, asked, scheduler, saved=saved["sampler"])
    memory = model.plan_memory(asked, precision=plan.precision, skip_layers=plan.skip_layers, saved=True)

    def program(progress: Progress | None) -> Program:
        made = load_program(checkpoint, family, plan, device=asked.device, dtype=dtype, progress=progress)
        made.refold(model.times)  # refuses another schedule than the saved one
        return made

    return _assemble(model, asked, memory, program)


def _assemble(
    model: Model, asked: Asked, memory: MemoryPlan | None, compile: Callable[[Progress | None], Program]
) -> Pipeline:
    """Read the weights, part by part, and return the pipeline of them. compile(progress): the network's program."""
    options, device, dtype, text, vae = asked.options, asked.device, model.dtype, model.text, model.vae
    captures = asked.captures if memory is None or device.type == "cuda" else None  # a CPU's budget counts every byte
    recorders = _recorders(captures, memory)
    text_options, network_options = asked.text_options(recorders["text"]), StageOptions(recorders["sample"])
    tile, preview = options.tile, None
    if memory is not None:
        text_options = replace(text_options, streams=memory.text_streams)
        network_options, tile = replace(network_options, streams=memory.streamed > 0), memory.tile
    text.materialize(device, dtype, text_options, asked.progress("text encoder"))
    program = compile(asked.progress("transformer"))
    velocity = VelocityStage(program, device, dtype, network_options, options.prompt_cache)
    vae.materialize(device, dtype, StageOptions(recorders["decode"], tile=tile), asked.progress("vae"))
    if options.preview is not None:
        preview = PreviewDecoder(Path(options.preview), vae)
        preview.materialize(device, dtype, StageOptions(recorders["decode"]), asked.progress("preview"))
    pipe = Pipeline(
        text, velocity, vae, model.sizes, model.sampler, model.folder, preview=preview, memory=memory,
        batch_invariant=options.batch_invariant, check_finite=options.check_finite, scheduler=model.scheduler,
    )  # fmt: skip
    if options.check_finite and (found := pipe.damaged(SMALL)) is not None:
        raise CheckpointError(
            f"{found[0]}: {found[1]} holds NaN or infinity: damaged, or beyond what {dtype_name(dtype)} holds; get the "
            "files again, load in another precision, or pass check_finite=False"
        )
    pipe.warm_up()
    if device.type == "cpu":
        library.release_threads()  # calls may come from other threads than this one
        if memory is None:
            keep_freed_memory()
    return pipe


def _recorders(captures: Captures | None, memory: MemoryPlan | None) -> dict[str, Captures | None]:
    """Return what records each stage: within a budget, graphs have what the plan leaves, and a stage that would need
    more is not recorded."""
    recorders: dict[str, Captures | None] = dict.fromkeys(("text", "sample", "decode"), captures)
    if captures is not None and memory is not None:
        captures.budget = min(captures.budget, memory.graphs)
        for stage, why in memory.unrecorded().items():
            recorders[stage] = None
            captures.refuse(stage, why)
    return recorders


def _require_precision(plan: Plan, folder: Path, options: LoadOptions) -> None:
    """Raise ConfigError where another precision is asked for than the program saved in `folder` has."""
    quantized, _ = resolve_precision(options.precision, None)
    other = options.precision not in (None, "auto") and quantized != plan.precision
    skipped = options.skip_layers and precisions.skipped(options.skip_layers, plan.precision)[0]
    if other or (skipped and skipped != plan.skip_layers):
        raise ConfigError(
            f"{folder} was saved with linear layers in {plan.precision or 'its dtype'}, for good; "
            "load the model folder for another precision"
        )
    if options.fp8_attention and not plan.fp8_attention:
        raise ConfigError(f"{folder} was saved without fp8_attention; load the model folder for it")


def resolve_largest(largest: tuple[int | None, int | None, int] | None, sizes: SizeRule) -> tuple[int, int, int]:
    """Return height, width and images of the largest call, checked; None: one image of the default size."""
    check_batch(1 if largest is None else largest[2])
    if largest is None:
        return (*sizes.resolve(None, None), 1)
    return (*sizes.resolve(largest[0], largest[1]), largest[2])


def model_path(path: str | Path, download: bool = False, without: Collection[str] = ()) -> Path:
    """Return the local folder, or file, that `load` takes for `path`. without: parts of a model of the hub whose
    weights are not to be fetched."""
    path = check_path("path", path)
    return DEMO if path == "demo" else hub.folder(path, download, without)
