"""What the compiled pipeline is measured against, on the same weights.

    eager      our network unfolded, on eager ops: time embedders and modulation run in every call
    compile    the same through torch.compile
    diffusers  diffusers' own pipeline (Z-Image, one evaluation: all its classes can express)

A peer is a callable `call(output) -> images` for outputs "pil", "latent" and "pt".
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import artifact
from ..checkpoint.checkpoint import Checkpoint, Files
from ..checkpoint.reading import materialize
from ..errors import ConfigError, require_extra
from ..families import Family, family_of
from ..ops import EAGER
from ..pipeline import Pipeline
from ..sampling.noise import initial_noise
from ..sampling.schedule import preset
from ..stages.velocity import VelocityStage
from .random_file import random_tensor
from .workload import Workload

NAMES = ("eager", "compile", "diffusers")


class Unfolded:
    """A network as it is trained, behind the interface of a compiled one: constants are made per call."""

    def __init__(self, network: Any, forward: Callable[..., Tensor] | None = None) -> None:
        self.network, self.config, self.ops = network, network.config, network.ops
        self.encode_context, self.forward = network.encode_context, network if forward is None else forward
        self.by_prompt = "context" in inspect.signature(network.modulate).parameters  # SD3.5: also by its pooled form
        self.times: tuple[tuple[float, float], ...] = ()

    def step_modulation(self, step: int) -> tuple[float, float]:
        return self.times[step]

    def __call__(self, latents: Tensor, times: tuple[float, float], context: Any) -> Tensor:
        t, tt = (torch.tensor([time], dtype=torch.float64, device=latents.device) for time in times)
        modulation = self.network.modulate(t, tt, *([context] if self.by_prompt else []))
        return self.forward(latents, modulation, context)


class UnfoldedProgram:
    """Stands where a pipeline has its compiled program; any schedule is free."""

    sequence = None

    def __init__(self, network: Unfolded) -> None:
        self.network = network

    def refold(self, times: Any) -> None:
        self.network.times = tuple(times)


def uncompiled(folder: Path, files: Files, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """Open a model folder with no pass run over it: the unfolded network, eager ops throughout. files: see `load`."""
    source = Checkpoint.of_part(folder / "transformer", files)
    scheduler = family_of(source.config).scheduler(folder, source)
    network, family = _network(source, device, dtype)
    text, vae, sizes = family.open(folder, source.config, files)
    with torch.no_grad():
        text.materialize(device, dtype)
        vae.materialize(device, dtype)
    text, vae = _eager_stage(text), _eager_stage(vae)
    program: Any = UnfoldedProgram(Unfolded(network))
    velocity = VelocityStage(program, device, dtype)
    return Pipeline(text, velocity, vae, sizes, preset(1), folder, scheduler=scheduler)


def unfolded(pipe: Pipeline, compiled: bool = False) -> Pipeline:
    """Return the same for a loaded pipeline; it shares the text encoder's and the decoder's weights."""
    network, _ = _network(pipe.source, pipe.device, pipe.dtype)
    program: Any = UnfoldedProgram(Unfolded(network, torch.compile(network) if compiled else None))
    text, vae = _eager_stage(pipe.text), _eager_stage(pipe.vae)
    velocity = VelocityStage(program, pipe.device, pipe.dtype)
    return Pipeline(text, velocity, vae, pipe.sizes, pipe.sampler, pipe.folder, scheduler=pipe.scheduler)


def _network(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Family]:
    if artifact.is_artifact(folder := checkpoint.folder.parent):
        raise ConfigError(f"{folder} is an artifact, without the unfolded network: measure the model folder it is from")
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        network = family.network(family.config.from_dict(checkpoint.config))
    materialize(network, checkpoint, family.layout, device, dtype)
    network.ops = EAGER
    return network, family


def _eager_stage(stage: Any) -> Any:
    """Return a copy of a stage that shares its weights and runs on eager ops."""
    twin = copy.copy(stage)
    twin.options = replace(stage.options, captures=None)  # recordings are of the stage's own ops
    if hasattr(stage, "ops"):
        twin.ops = EAGER
    if hasattr(getattr(stage, "network", None), "ops"):
        twin.network = copy.copy(stage.network)
        twin.network.ops = EAGER
    return twin


def build(name: str, pipe: Pipeline, work: Workload) -> Callable[[str], Any]:
    """Return the peer's call of `work`. Raises ConfigError where the peer cannot do it or is not installed."""
    if name not in NAMES:
        raise ConfigError(f"no peer {name!r}; use some of {', '.join(NAMES)}")
    if name == "diffusers":
        return _diffusers(pipe, work)
    twin = unfolded(pipe, compiled=name == "compile")
    if name == "compile":
        _compile_now(twin, work)
    return partial(work.call, twin)


def _compile_now(twin: Pipeline, work: Workload) -> None:
    """Make the first call, in which torch compiles for minutes. Raises ConfigError where it finds no compiler."""
    try:
        work.call(twin, "latent")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what torch raises here has no common class
        raise ConfigError(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error


def _diffusers(pipe: Pipeline, work: Workload) -> Callable[[str], Any]:
    """Return a call of diffusers' ZImagePipeline: of TwinFlow, one Euler step from t = 1 to 0 is x0 = z - F(z, 1, 0),
    where the second time embedder is multiplied by 0."""
    require_extra("the diffusers peer", "train", "diffusers", "transformers")
    family = family_of(pipe.source.config).name
    if family != "z-image" or (work.nfe != 1 and pipe.scheduler is None):
        raise ConfigError(
            f"the diffusers peer runs z-image at 1 evaluation, or as an ordinary flow model, not {family} at "
            f"{work.nfe}: its schedulers have no any-step sampler and its networks no second time embedder"
        )
    theirs = _z_image_pipeline(pipe)
    shape = work.shape(pipe)

    def call(output: str = "pil") -> Any:
        noise = initial_noise(work.seeds, shape, pipe.dtype, pipe.device)
        return theirs(
            list(work.prompts), height=work.height, width=work.width, num_inference_steps=work.nfe,
            guidance_scale=0.0, latents=noise.float(), output_type=output,
        ).images  # fmt: skip

    return torch.no_grad()(call)


def _z_image_pipeline(pipe: Pipeline) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    checkpoints = {"transformer": pipe.source, **{p.name: p.checkpoint for p in (*pipe.text.parts, *pipe.vae.parts)}}
    transformer, text, vae = (checkpoints[name].config for name in ("transformer", "text_encoder", "vae"))
    with torch.device("meta"):
        parts = {
            "transformer": ZImageTransformer2DModel.from_config(transformer),
            "text_encoder": AutoModel.from_config(AutoConfig.for_model(**text)),
            "vae": AutoencoderKL.from_config(vae),
        }
    for name, module in parts.items():
        _fill(module, checkpoints[name], pipe)
    said = {"num_train_timesteps": 1000, "shift": 1.0} if pipe.scheduler is None else dict(pipe.scheduler.settings)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(said)
    tokenizer = AutoTokenizer.from_pretrained(str(pipe.folder / "tokenizer"))
    theirs: Any = ZImagePipeline(scheduler=scheduler, tokenizer=tokenizer, **parts)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def _fill(module: nn.Module, checkpoint: Checkpoint, pipe: Pipeline) -> None:
    """Give a module on the meta device the checkpoint's weights. Parts that image generation never reads
    (the VAE's encoder) may be absent from declared random weights; they get others of their kind."""
    tensors = {
        name: checkpoint.get(name, pipe.device, pipe.dtype)
        if name in checkpoint
        else random_tensor(name, tuple(meta.shape), pipe.dtype).to(pipe.device)
        for name, meta in module.state_dict().items()
    }
    module.load_state_dict(tensors, assign=True)
    for name, child in list(module.named_modules()):
        if any(buffer.is_meta for buffer in child.buffers(recurse=False)):  # computed, not stored: rope frequencies
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, type(child)(child.config).to(pipe.device))
    module.eval().requires_grad_(False)
