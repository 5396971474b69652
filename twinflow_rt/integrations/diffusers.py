"""A loaded diffusers pipeline, sped up in place.

    handle = twinflow_rt.accelerate(pipe)       # of Z-Image, Qwen-Image, Stable Diffusion 3.5 or SANA
    pipe("a red circle", num_inference_steps=8)
    handle.restore()                            # or: with twinflow_rt.accelerate(pipe): ...

The velocity network and the VAE's decoder are replaced by compiled ones, built from the weights that the pipeline
holds. Prompt encoding, scheduler, guidance, callbacks, tiling and slicing stay diffusers' own.

Which function is computed. A diffusers pipeline gives its network one time t. TwinFlow's has two, (t, tt), and adds a
second time embedder to the first with a weight that is zero at tt = t: in every family the plain network is TwinFlow's
at (t, t), whatever the second embedder holds. So a pipeline is compiled for the (t, t) of its scheduler, and computes
what it did before.

diffusers drops the second embedder of a TwinFlow checkpoint on loading, with no more than a log line; what is left is
the checkpoint's slow, many-step model. With `twinflow=folder` those tensors are read from there, and the step from t to
t' is evaluated at (t, t'): the any-step rule, of which Euler's step is exactly the update, and at one step TwinFlow's
one-step generation, (1, 0). (For Z-Image alone the second embedder vanishes at (1, 0), too, so there one step is the
same with and without it.)
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import some
from ..checkpoint.reading import materialize
from ..compile import Recipe, compile_network
from ..config import check_path
from ..errors import CheckpointError, ConfigError
from ..families import FAMILIES, Family, family_of
from ..models.architecture import Architecture
from ..models.meta_device import meta_device
from ..ops import Target, select
from ..passes.convolutions import convert_convolutions, fold_upsampling
from ..plan import Plan
from ..runtime.host_state import isolated
from .diffusers_modules import CALLS, Compiled, CompiledDecoder


@isolated()
def accelerate(pipe: Any, *, twinflow: str | Path | Literal[False] | None = None) -> Accelerated:
    """Replace `pipe.transformer` and `pipe.vae.decoder` by compiled ones; return what can restore them.

    pipe: a diffusers pipeline, loaded, on its device, in its dtype; both are kept. Its parts may differ in dtype
    (float32, bfloat16, float16): the network and the decoder compute in their own, whatever they are given, and the
    network answers in the latents', also where diffusers' would refuse. twinflow: the model folder of the
    TwinFlow checkpoint that the pipeline was loaded from, to evaluate (t, t'); False or None: what the pipeline
    computes now. None refuses a pipeline that was loaded from a local folder with a second embedder: say which of the
    two you want.

    A call with other times than the last (another number of steps; for Qwen-Image, whose scheduler shifts times by
    image size, another size) folds its tables anew. The originals stay in memory, those of a GPU in the host's. Raises
    ConfigError for a pipeline that cannot be compiled (unknown network, offloaded, unmerged LoRA layers, accelerated
    already), CheckpointError for weights that do not fit.
    """
    if twinflow is not None and twinflow is not False:
        twinflow = check_path("twinflow", twinflow)
    original: Any = getattr(pipe, "transformer", None)
    if isinstance(original, Compiled):
        raise ConfigError("this pipeline is accelerated already; restore() it first")
    name = type(original).__name__
    if name not in CALLS:
        raise ConfigError(f"{type(pipe).__name__} has a {name} as its transformer; supported are {', '.join(FAMILIES)}")
    if not isinstance(getattr(getattr(pipe, "vae", None), "decoder", None), nn.Module):
        raise ConfigError(f"{type(pipe).__name__} has no vae with a decoder; give a whole diffusers pipeline")
    for module in (original, pipe.vae):
        _require_plain(module)
    family = family_of({"_class_name": name})
    second, decoder = _second(original, family, twinflow), _decoder(pipe.vae, family.autoencoder)
    device, dtype, first_times = original.device, original.dtype, ((1.0, 0.0 if twinflow else 1.0),)
    handle = Accelerated(pipe, original, pipe.vae.decoder)
    try:
        handle.park()
        config = _config(original) | {"twinflow": bool(second)}
        source = Checkpoint.of({**original.state_dict(), **second}, config, name)
        program = compile_network(Recipe(source, family, device, dtype, absorb=False), first_times)
    except BaseException:
        handle.restore()
        raise
    pipe.transformer = CALLS[name](pipe, original, program, bool(twinflow))
    pipe.vae.decoder = decoder
    return handle


class Accelerated:
    """A pipeline with compiled parts; as a context manager it restores the pipeline on leaving."""

    def __init__(self, pipe: Any, transformer: nn.Module, decoder: nn.Module) -> None:
        self.pipe = pipe
        self._originals = transformer, decoder
        self._device = next(transformer.parameters()).device

    @property
    def plan(self) -> Plan:
        """The plan of the velocity network, for the times last used."""
        if not isinstance(self.pipe.transformer, Compiled):
            raise ConfigError("this pipeline has been restored and has no plan any more")
        return self.pipe.transformer.program.plan

    def park(self) -> None:
        """Move the originals from a GPU to the host."""
        if self._device.type != "cpu":
            for module in self._originals:
                module.to("cpu")

    def restore(self) -> None:
        """Put the original network and decoder back, on the device they were on."""
        self.pipe.transformer, self.pipe.vae.decoder = self._originals
        for module in self._originals:
            module.to(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _decoder(vae: Any, model: Architecture) -> CompiledDecoder:
    """Return the decoder of a diffusers VAE, compiled as this architecture."""
    config = model.config.from_dict(_config(vae))
    with meta_device():
        network = model.network(config)
    weights = model.read.of(vae.state_dict(), _config(vae), type(vae).__name__)
    materialize(network, weights, model.layout(config), vae.device, vae.dtype)
    target = Target.of(vae.device, vae.dtype)
    network.ops, choices = select(target)
    fold_upsampling(network, choices)
    if getattr(network, "post_quant_conv", None) is not None:
        network.post_quant_conv = nn.Identity()  # diffusers applies its own before the decoder
    network.to(memory_format=torch.channels_last)
    convert_convolutions(network, target, weights.get)
    return CompiledDecoder(network, vae.dtype)


def _config(module: Any) -> dict[str, Any]:
    return {**module.config, "_class_name": type(module).__name__}


def _require_plain(module: Any) -> None:
    """Raise ConfigError for a module whose weights are elsewhere or changed as it runs."""
    names = list(module.state_dict())
    if any("lora_" in name or ".base_layer." in name for name in names):
        raise ConfigError("the pipeline has LoRA layers: fuse_lora() and unload_lora_weights() first, or unload them")
    if module.config.get("quantization_config"):
        raise ConfigError("the pipeline's weights are quantized: accelerate it in bfloat16, or load() its folder")
    registries = [getattr(m, "_diffusers_hook", None) for m in module.modules()]
    hooked = any(registry is not None and registry.hooks for registry in registries)
    if hooked or any(hasattr(m, "_hf_hook") for m in module.modules()) or any(p.is_meta for p in module.parameters()):
        name = type(module).__name__
        raise ConfigError(f"{name} is offloaded or cached by hooks: accelerate the pipeline without them")


def _second(original: Any, family: Family, twinflow: str | Path | Literal[False] | None) -> dict[str, Tensor]:
    """Return the tensors of TwinFlow's second time embedder, read from its folder, or none."""
    with meta_device():
        wanted = family.network(family.config.from_dict(_config(original))).state_dict()
    second = family.network.second_embedder
    names = [name for name in wanted if name.startswith(second + ".")]
    if not names:
        raise ConfigError(f"this {type(original).__name__} has another kind of second embedder and is not supported")
    if twinflow:
        checkpoint = Checkpoint(Path(twinflow) / "transformer")
        if missing := set(names) - set(checkpoint.keys()):
            raise CheckpointError(f"{checkpoint.folder} lacks {some(missing)}: no TwinFlow checkpoint")
        held = original.state_dict()
        for name in names:
            first = name.replace(second, second.removesuffix("_2"), 1)
            if not torch.equal(checkpoint.get(first, dtype=original.dtype), held[first].cpu()):
                raise CheckpointError(f"{checkpoint.folder} has another {first} than the pipeline: another model")
        return {name: checkpoint.get(name) for name in names}
    origin = Path(str(original.config.get("_name_or_path") or ""))
    if twinflow is None and (origin / "config.json").is_file() and not set(names).isdisjoint(Checkpoint(origin)):
        raise ConfigError(
            f"this pipeline is what diffusers left of the TwinFlow checkpoint in {origin}: pass "
            f"twinflow={str(origin.parent)!r} to use it as TwinFlow, or twinflow=False for the many-step model "
            "that the pipeline is now"
        )
    return {}
