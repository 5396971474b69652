"""Builds one peer of one case: name of a figure -> what is timed.

    image cases   total(n): prompt n to pixels [1, 3, H, W] in [0, 1];  network(n): one evaluation of the transformer
    vae cases     total(n): raw latents to pixels in [-1, 1]

Everything runs in float32 on the CPU ("ours-int8" but for the linear layers of the blocks), the peers whose names
end in "-bf16" in bfloat16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinflow_rt import load
from twinflow_rt.bench import peers
from twinflow_rt.bench.workload import Workload, stages
from twinflow_rt.checkpoint.checkpoint import OWN_FILES, Checkpoint
from twinflow_rt.checkpoint.files import read_json
from twinflow_rt.families import family_of
from twinflow_rt.models.context import Context
from twinflow_rt.ops import EAGER
from twinflow_rt.ops.native import library
from twinflow_rt.passes.layers import unpack
from twinflow_rt.planning.footprint import work_of
from twinflow_rt.sampling.noise import initial_noise
from twinflow_rt.stages import vae as vae_stage
from twinflow_rt.stages.vae import VaeDecoder

from .cases import PROMPTS, SEED

INTERPOLATE = F.interpolate
CPU, DTYPE = torch.device("cpu"), torch.float32
Calls = dict[str, Callable[[int], Any]]


def build(peer: str, part: str, folder: Path, size: int | None, steps: int | None) -> Calls:
    """The calls of a peer, loaded and ready. steps: see `Case`. They compute with as many threads as torch has."""
    if peer.startswith("openvino"):  # has its own; torch's would spin between its steps and take their CPU
        Converted.threads = torch.get_num_threads()
        torch.set_num_threads(1)
    calls = image(peer, folder, size, steps) if part == "image" else decoder(peer, folder, size)
    mode = torch.inference_mode() if peer.startswith("ours") else torch.no_grad()  # diffusers' pipelines use no_grad
    calls = {name: mode(call) for name, call in calls.items()}
    if peer.startswith("ours"):  # as a pipeline's calls have it, also for a part of one
        return {name: library.threads_apart(CPU)(call) for name, call in calls.items()}
    return calls


# -- whole images ---------------------------------------------------------------------------------------


def image(peer: str, folder: Path, size: int | None, steps: int | None) -> Calls:
    if peer.startswith("diffusers"):
        return _diffusers(folder, size, steps, compiled=peer.endswith("compile"))
    if peer.startswith("openvino"):
        return _openvino(folder, size, steps, _dtype(peer))
    precision = "int8" if peer == "ours-int8" else None
    return _ours(load(folder, device=CPU, dtype=_dtype(peer), precision=precision), size, steps)


def _dtype(peer: str) -> torch.dtype:
    return torch.bfloat16 if peer.endswith("-bf16") else DTYPE


def _ours(pipe: Any, size: int | None, steps: int | None) -> Calls:
    side = pipe.sizes.resolve(size, size)[0]
    made: dict[str, Callable[[], Any]] = {}

    def total(n: int) -> Tensor:
        return pipe(PROMPTS.format(n=n), height=side, width=side, seed=SEED, nfe=steps, output="pt").images

    def network(n: int) -> Tensor:
        if not made:
            made.update(stages(pipe, Workload((PROMPTS.format(n=0),), side, side, SEED, steps or 1)))
        return made["velocity"]()

    return {"total": total, "network": network}


class Recorder:
    """A module's forward that keeps its last arguments, to be called alone with them."""

    def __init__(self, module: nn.Module, compiled: bool) -> None:
        self.forward = torch.compile(module.forward) if compiled else module.forward
        self.arguments: tuple[tuple, dict] = ((), {})
        # pipelines look at the signature for what a network takes
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.arguments = args, options
        return self.forward(*args, **options)

    def again(self, n: int) -> Any:
        args, options = self.arguments
        return self.forward(*args, **options)


def _diffusers(folder: Path, size: int | None, steps: int | None, compiled: bool) -> Calls:
    spec = _spec(folder)
    height, width = spec.sizes.resolve(size, size)
    theirs = peers._z_image_pipeline(spec)
    recorder = theirs.transformer.forward = Recorder(theirs.transformer, compiled)
    if compiled:
        theirs.vae.decoder.forward = torch.compile(theirs.vae.decoder.forward)
        theirs.text_encoder.forward = torch.compile(theirs.text_encoder.forward)
    shape = (spec.vae.channels, height // spec.vae.scale, width // spec.vae.scale)

    def total(n: int) -> Tensor:
        noise = initial_noise([SEED], shape, DTYPE, CPU)
        return theirs(
            PROMPTS.format(n=n), height=height, width=width, num_inference_steps=steps or 1, guidance_scale=0.0,
            latents=noise, output_type="pt",
        ).images  # fmt: skip

    return {"total": total, "network": recorder.again}


def _spec(folder: Path) -> SimpleNamespace:
    """What `bench.peers` asks of a pipeline, without loading one."""
    checkpoint = Checkpoint(folder / "transformer")
    family = family_of(checkpoint.config)
    scheduler = family.scheduler(folder, checkpoint)
    text, vae, sizes = family.open(folder, checkpoint.config)
    return SimpleNamespace(
        folder=folder, device=CPU, dtype=DTYPE, source=checkpoint, text=text, vae=vae, sizes=sizes, scheduler=scheduler
    )


# -- OpenVINO -------------------------------------------------------------------------------------------


class Converted:
    """A module's forward through OpenVINO, converted at the first call with tensors of these shapes. dtype: what it
    computes in; tensors and stored weights are float32."""

    threads = 1

    def __init__(self, module: nn.Module, dtype: torch.dtype = DTYPE) -> None:
        self.module, self.models = module, {}
        self.hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
        self.call = module.forward

    def __call__(self, *tensors: Tensor) -> Tensor:
        key = tuple(tuple(t.shape) for t in tensors)
        if key not in self.models:
            self.models[key] = self._convert(tensors)
        return torch.from_numpy(self.models[key]([t.numpy() for t in tensors])[0])

    def _convert(self, tensors: tuple[Tensor, ...]) -> Any:
        import openvino

        self.module.forward = self.call
        with patch.object(F, "interpolate", _nearest):  # convert_model's own trace is checked by several more runs
            traced = torch.jit.trace(self.module, tensors, check_trace=False, strict=False)
        model = openvino.convert_model(traced, example_input=tensors, input=[list(t.shape) for t in tensors])
        self.module.forward = self
        options = {"INFERENCE_PRECISION_HINT": self.hint, "INFERENCE_NUM_THREADS": self.threads}
        return openvino.Core().compile_model(model, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})


def _nearest(x: Tensor, *args: Any, mode: str = "nearest", **options: Any) -> Tensor:
    """OpenVINO has no "nearest-exact", which at whole factors is "nearest"."""
    return INTERPOLATE(x, *args, mode=mode.removesuffix("-exact"), **options)


class Velocity(nn.Module):
    """latents, prompt embeddings, t -> velocity at (1, 0), or of an ordinary flow model at t: the whole transformer as
    one graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, embeds: Tensor, t: Tensor) -> Tensor:
        context = self.network.encode_context(embeds, (embeds.shape[1],))
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        times = (one, zero) if self.network.config.twinflow else (t, t)
        return self.network(latents, self.network.modulate(*times), context)


class Graph:
    """Stands where a pipeline has its network."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.config, self.ops, self.last, self.times = network.config, EAGER, (), ()
        self.velocity = Converted(Velocity(network), dtype)

    def encode_context(self, embeds: Tensor, lengths: tuple[int, ...]) -> Context:
        return Context(embeds, tuple(lengths))

    def step_modulation(self, step: int) -> Tensor:
        return torch.tensor([self.times[step][0]])

    def __call__(self, latents: Tensor, t: Tensor, context: Context) -> Tensor:
        self.last = latents, context.tokens, t
        return self.velocity(*self.last)


def plain_convolutions() -> Any:
    """While entered, decoders are loaded with their convolutions as they are: OpenVINO arranges weights itself.
    Enlargements are folded; it is faster with them so."""
    return patch.object(vae_stage, "convert_convolutions", lambda *_: ())


def _openvino(folder: Path, size: int | None, steps: int | None, dtype: torch.dtype) -> Calls:
    with plain_convolutions():
        pipe = peers.uncompiled(folder, OWN_FILES, CPU, DTYPE)
    for network in (pipe.text.network, pipe.vae.network):
        unpack(network)
    graph = Graph(pipe.program.network.network, dtype)
    refold = lambda times: setattr(graph, "times", times)
    pipe.velocity.program = SimpleNamespace(network=graph, refold=refold, sequence=None)
    pipe.text.network.forward = Converted(pipe.text.network, dtype)
    pipe.vae.network.forward = Converted(pipe.vae.network, dtype)
    calls = _ours(pipe, size, steps)
    return {"total": calls["total"], "network": lambda n: graph.velocity(*graph.last)}


# -- decoders -------------------------------------------------------------------------------------------


def decoder(peer: str, folder: Path, size: int) -> Calls:
    checkpoint = Checkpoint(folder / "transformer")
    vae = VaeDecoder(folder / "vae", family_of(checkpoint.config).autoencoder)
    side = size // vae.scale
    raw = torch.randn(1, vae.channels, side, side, generator=torch.Generator().manual_seed(SEED))
    if peer.startswith("openvino"):
        with plain_convolutions():
            vae.materialize(CPU, DTYPE)
        unpack(vae.network)
        vae.network.ops = EAGER
        vae.network.forward = Converted(vae.network, _dtype(peer))
        return {"total": lambda n: vae.network(raw)}
    if peer.startswith("ours"):
        vae.materialize(CPU, _dtype(peer))
        laid_out = raw.to(_dtype(peer)).contiguous(memory_format=torch.channels_last)
        return {"total": lambda n: vae.network(laid_out)}
    theirs = _their_decoder(folder)
    if peer == "diffusers-compile":
        theirs.decode = torch.compile(theirs.decode)
    if "Qwen" in type(theirs).__name__:
        return {"total": lambda n: theirs.decode(raw[:, :, None], return_dict=False)[0][:, :, 0]}
    return {"total": lambda n: theirs.decode(raw, return_dict=False)[0]}


def _their_decoder(folder: Path) -> nn.Module:
    import diffusers

    config = read_json(folder / "vae" / "config.json")
    name = config.get("_class_name") or ("AutoencoderKLQwenImage" if "z_dim" in config else "AutoencoderKL")
    with torch.device("meta"):
        module = getattr(diffusers, name).from_config(config)
    module.encoder = nn.Identity()  # ours never loads it either: memory is compared
    checkpoint = Checkpoint(folder / "vae")
    tensors = {
        name: _as_video(checkpoint.get(name), meta) if name in checkpoint else torch.zeros(meta.shape)
        for name, meta in module.state_dict().items()
    }
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def _as_video(tensor: Tensor, like: Tensor) -> Tensor:
    """Declared random weights of a video decoder are those of one frame: its last temporal tap."""
    if tensor.ndim == like.ndim:
        return tensor
    if tensor.ndim == 3:
        return tensor[..., None]
    video = torch.zeros(like.shape)
    video[:, :, -1] = tensor
    return video


def flops(part: str, folder: Path, size: int | None) -> dict[str, int]:
    """FLOPs of each figure that is one network's: what its rate is computed from."""
    spec = _spec(folder)
    height, width = spec.sizes.resolve(size, size)
    if part == "vae":
        return {"total": work_of(lambda: spec.vae.probe(height, width)).flops}
    checkpoint = Checkpoint(folder / "transformer")
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        network = family.network(family.config.from_dict(checkpoint.config), folded_steps=1)
        latents = torch.zeros(1, spec.vae.channels, height // spec.vae.scale, width // spec.vae.scale)
        embeds = torch.zeros(1, 32, network.config.cap_feat_dim)
    context = network.encode_context(embeds, (32,))
    return {"network": work_of(lambda: network(latents, network.step_modulation(0), context)).flops}
