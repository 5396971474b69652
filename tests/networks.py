"""Every family's velocity network beside diffusers' own, tiny and random, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.factory import WEIGHTS
from twinflow_rt.errors import CheckpointError
from twinflow_rt.families import Family, family_of
from twinflow_rt.passes.fold import absorb, fold

ONE, FOUR = ((1.0, 0.0),), ((0.999, 0.0), (0.75, 0.0), (0.5, 0.5), (0.25, 0.1))
WIDTHS = ("cap_feat_dim", "joint_attention_dim", "caption_channels")  # of prompt embeddings, by family


class Inputs(NamedTuple):
    """Latents, prompt embeddings, their lengths, and what else a family takes of a prompt."""

    latents: Tensor
    embeds: Tensor
    lengths: tuple[int, ...]
    extras: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> Inputs:
        extras = {name: tensor.to(dtype) for name, tensor in self.extras.items()}
        return self._replace(latents=self.latents.to(dtype), embeds=self.embeds.to(dtype), extras=extras)

    def one(self, i: int) -> Inputs:
        """Sample i alone, its prompt without padding."""
        n, extras = self.lengths[i], {name: tensor[i : i + 1] for name, tensor in self.extras.items()}
        return Inputs(self.latents[i : i + 1], self.embeds[i : i + 1, :n], (n,), extras)


class Reference(nn.Module):
    """diffusers' network, which TwinFlow's second embedder can be added to, term by term.

    prefix: the second embedder's name in a checkpoint. Subclasses say what diffusers' network predicts, and how the
    second embedder changes the output of the first, `network.get_submodule(prefix without "_2")`.
    """

    prefix = ""

    def __init__(self, network: nn.Module, second: nn.Module | None) -> None:
        super().__init__()
        self.network, self.second = network, second

    def predict(self, args: Inputs, t: float) -> Tensor:
        """diffusers' prediction as a velocity z - x."""
        raise NotImplementedError

    def add_second(self, t: float, tt: float) -> Callable[..., Any]:
        """A forward hook, with keywords, for diffusers' embedder of time."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint of a TwinFlow model."""
        second = {} if self.second is None else self.second.state_dict()
        return {**self.network.state_dict(), **{f"{self.prefix}.{k}": v for k, v in second.items()}}

    @torch.no_grad()
    def velocity(self, args: Inputs, t: float, tt: float | None = None) -> Tensor:
        """The velocity at (t, tt); tt=None, and where there is no second embedder: as diffusers has it."""
        if tt is None or self.second is None:
            return self.predict(args, t)
        embedder = self.network.get_submodule(self.prefix.removesuffix("_2"))
        handle = embedder.register_forward_hook(self.add_second(t, tt), with_kwargs=True)
        try:
            return self.predict(args, t)
        finally:
            handle.remove()


def family(config: Any) -> Family:
    return family_of({"_class_name": config.class_name})


def merge(tensors: Mapping[str, Tensor], fused: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Return tensors under checkpoint names as the module has them. Raises CheckpointError for a missing part."""
    owner = {part: (merged, parts) for merged, parts in fused.items() for part in parts}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        suffix = next((p for p in owner if name == p or name.endswith("." + p)), None)
        if suffix is None:
            out[name] = tensor
            continue
        prefix, (merged, parts) = name[: len(name) - len(suffix)], owner[suffix]
        if prefix + merged in out:
            continue
        missing = [prefix + p for p in parts if prefix + p not in tensors]
        if missing:
            raise CheckpointError(f"cannot merge {prefix}{merged}: missing {', '.join(missing)}")
        out[prefix + merged] = torch.cat([tensors[prefix + p] for p in parts])
    return out


def ours(tensors: dict[str, Tensor], config: Any) -> Any:
    """Our unfolded network with a checkpoint's tensors; norm weights keep the dtype they come in."""
    network = family(config).network(config)
    network.load_state_dict(merge(tensors, family(config).layout.fused), assign=True)
    return network.eval()


def folded(tensors: dict[str, Tensor], config: Any, schedule: Any, absorbed: bool = False) -> Any:
    """The same, compiled for a schedule."""
    build, weights = family(config).network, merge(tensors, family(config).layout.fused)
    with torch.device("meta"):
        shell = build(config)
    tables = fold(shell, weights.__getitem__, schedule)
    network = build(config, folded_steps=len(schedule), **({"absorbed": True} if absorbed else {}))
    if absorbed:
        dtype = weights["proj_out.weight"].dtype
        taken = absorb(network.absorptions(), tables, weights.__getitem__)
        weights |= {name: tensor.to(dtype) for name, tensor in taken}
    weights |= tables
    network.load_state_dict({k: weights[k] for k in network.state_dict()}, assign=True)
    return network.eval()


def inputs(shape: tuple[int, int, tuple[int, ...]], config: Any, dtype: torch.dtype = torch.float32) -> Inputs:
    """shape: latent height and width, and the prompt lengths of the batch."""
    height, width, lengths = shape
    g = torch.Generator().manual_seed(height * width)
    channels = getattr(config, "out_channels", config.in_channels)
    latents = torch.randn(len(lengths), channels, height, width, generator=g)
    features = next(getattr(config, name) for name in WIDTHS if hasattr(config, name))
    embeds = torch.randn(len(lengths), max(lengths), features, generator=g)
    pooled = getattr(config, "pooled_projection_dim", None)
    extras = {} if pooled is None else {"pooled": torch.randn(len(lengths), pooled, generator=g)}
    return Inputs(latents, embeds, lengths, extras).to(dtype)


def context_of(network: Any, args: Inputs) -> Any:
    return network.encode_context(args.embeds, args.lengths, **args.extras)


@torch.no_grad()
def run(network: Any, args: Inputs, t: Any, tt: Any) -> Tensor:
    """The unfolded network at (t, tt): numbers, or float tensors with one per sample."""
    context = context_of(network, args)
    times = [torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (t, tt)]
    of_prompt = "context" in signature(network.modulate).parameters
    modulation = network.modulate(*times, context) if of_prompt else network.modulate(*times)
    return network(args.latents, modulation, context)


@torch.no_grad()
def run_step(network: Any, args: Inputs, step: int) -> Tensor:
    """A folded network at its evaluation `step`."""
    return network(args.latents, network.step_modulation(step), context_of(network, args))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest error over all elements, relative to the largest magnitude."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def save(folder: Path, tensors: dict[str, Tensor], config: Any) -> Path:
    """A transformer folder as diffusers saves it."""
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder
