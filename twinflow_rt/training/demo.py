"""`twinflow-rt train demo`: the shipped miniature from nothing, on two CPU cores.

Stages, each resumable: tokenizer -> autoencoder -> latents -> text (the encoder learns to say what a caption asks for,
as a big model's comes pretrained) -> pretrained (flow matching, network and text encoder together, half as deep) ->
settled (every layer doubled; more of it, at falling rates) -> samples, warm (regression on its own guided samples) ->
the recipe's own objective: TwinFlow, RCGM, or from "settled" yet more flow matching for comparison. The result is
written in the Z-Image diffusers layout. Everything drawn at random follows from `seed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.atomic import replacing, write_json
from ..checkpoint.files import read_json
from ..config import has_native
from ..models.transformers.z_image import ZImageConfig, ZImageTransformer
from .export import save_model
from .objective import ObjectiveConfig, TwinFlowObjective, flow_matching_loss
from .own_samples import own_samples, warm_loss
from .text import Captions, build_text_encoder, build_tokenizer, pretrain_text_encoder
from .trainer import Loss, Trainer, TrainerConfig

CPU = torch.device("cpu")
TRANSFORMER = ZImageConfig(
    in_channels=4, dim=144, n_layers=8, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=96,
    axes_dims=(8, 8, 8), axes_lens=(576, 64, 64),
)  # fmt: skip

OBJECTIVE = ObjectiveConfig(parts=(2, 1, 2, 1))  # more jumps than the published recipe: better at every nfe here


@dataclass(frozen=True)
class Recipe:
    """What one run trains, on which budget."""

    name: str
    seed: int = 0
    scenes: int = 40_000
    autoencoder_steps: int = 1_200
    text_steps: int = 300
    flow_layers: int = 4  # of the first flow stage, which costs half of what all layers would
    flow_steps: int = 6_000
    flow_batch: int = 32
    flow_shift: float = 2.0  # t -> s t / (1 + (s-1) t): more of the budget where the prompt decides, at high noise
    drop_prompt: float = 0.1
    settle_steps: int = 4_000  # what holds which colour and where is learnt late, and only as the rates fall
    settle_batch: int = 48
    samples: int = 24_576  # own guided trajectories; each costs about five samples of training
    sample_steps: int = 8
    sample_guidance: float = 2.0
    warm_steps: int = 3_000  # of regression on them; 0: no warm start
    warm_batch: int = 48
    last_steps: int = 1_500
    last_batch: int = 48
    objective: ObjectiveConfig | None = OBJECTIVE  # of the last stage; None: flow

    def part(self, stage: str) -> dict[str, Any]:
        """Return what decides the stages up to "settled" ("pretrained") or "warm", which recipes share if they agree on
        it, or the recipe's last, under its name."""
        own = ("name", "last_steps", "last_batch", "objective")
        warm = ("samples", "sample_steps", "sample_guidance", "warm_steps", "warm_batch")
        later = {"pretrained": own + warm, "warm": own}.get(stage, ())
        return {k: v for k, v in asdict(self).items() if k not in later}


RECIPES = {
    "twinflow": Recipe("twinflow"),
    "cold": Recipe("cold", warm_steps=0),  # TwinFlow without the warm start
    "rcgm": Recipe("rcgm", objective=ObjectiveConfig(parts=(2, 1, 2, 0), rectify=0.0)),
    # the same time spent on flow matching alone: the warm start and the last stage cost about as many of these steps
    "flow": Recipe("flow", last_steps=8_700, objective=None, warm_steps=0),
}


def init_weights(network: ZImageTransformer) -> None:
    """Give linear layers Xavier weights, modulation and output zeros, so that every block starts as the identity."""
    for name, p in network.named_parameters():
        if "adaLN" in name or "all_final_layer" in name or name.endswith("bias"):
            torch.nn.init.zeros_(p)
        elif "pad_token" in name:
            torch.nn.init.normal_(p, std=0.02)
        elif p.ndim == 2:
            torch.nn.init.xavier_uniform_(p)


class BFloat16Linear(torch.nn.Linear):
    """A layer that multiplies in bfloat16 and keeps its weight, bias and what it returns in float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).float()
        return y if self.bias is None else y + self.bias


class DemoModel(torch.nn.Module):
    """Network + text encoder as one trainable thing: velocity(x_t, t, tt, (embeds, lengths)). The layers of its blocks
    multiply in bfloat16 where `device` does so at full rate: a step then takes 0.6 of the time on a CPU with AMX."""

    def __init__(self, vocab: int, layers: int, device: torch.device = CPU) -> None:
        super().__init__()
        self.network = ZImageTransformer(replace(TRANSFORMER, n_layers=layers))
        init_weights(self.network)
        self.text_encoder = build_text_encoder(vocab, TRANSFORMER.cap_feat_dim)
        for name, layer in list(self.network.named_modules()) if has_native(torch.bfloat16, device) else ():
            if isinstance(layer, torch.nn.Linear) and ("attention." in name or "feed_forward." in name):
                fast = BFloat16Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
                fast.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
                self.network.set_submodule(name, fast)
        self.to(device)

    def embed(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (prompt_embeds [B, L, D], lengths) of token ids [B, L] and lengths [B], which are on the CPU."""
        longest = int(lengths.max())
        ids = ids[:, :longest]
        mask = torch.arange(longest) < lengths[:, None]
        device = self.text_encoder.device
        out = self.text_encoder(input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True)
        return out.hidden_states[-2], lengths

    def forward(self, x: Tensor, t: Tensor, tt: Tensor, cond: tuple[Tensor, Tensor]) -> Tensor:
        context = self.network.encode_context(cond[0], cond[1].tolist())
        return self.network(x, self.network.modulate(t, tt), context)


@torch.no_grad()
def deepen(model: DemoModel, layers: int) -> DemoModel:
    """Return the model with `layers` layers, the same function: each is followed by copies of itself with gates 0."""
    deep = DemoModel(model.text_encoder.config.vocab_size, layers, model.text_encoder.device)
    deep.text_encoder.load_state_dict(model.text_encoder.state_dict())
    shallow, old = model.network.state_dict(), len(model.network.layers)
    state = {k: v for k, v in shallow.items() if not k.startswith("layers.")}
    for i in range(layers):
        source = i * old // layers
        for k, v in model.network.layers[source].state_dict().items():
            copied = i and source == (i - 1) * old // layers
            if copied and "adaLN_modulation" in k:  # rows: scale, gate of the attention, scale, gate of the MLP
                v = v.clone()
                v.view(4, -1)[1::2] = 0
            state[f"layers.{i}.{k}"] = v
    deep.network.load_state_dict(state)
    return deep


@dataclass(frozen=True)
class LatentData:
    """Normalised latents [N, C, H, W] (float16) with their tokenised captions (`ids[i]` is row i's), all on
    the CPU; batches of latents are drawn to `device`."""

    latents: Tensor
    ids: Tensor
    lengths: Tensor
    empty: tuple[Tensor, Tensor]
    device: torch.device = CPU

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return `batch` latents and their rows."""
        i = torch.randint(len(self.latents), (batch,))
        return self.latents[i].to(self.device).float(), i


class Prompts:
    """(prompt_embeds, lengths) of rows of the data, -1 being the empty prompt, by a text encoder that trains no more:
    each caption is encoded once."""

    @torch.no_grad()
    def __init__(self, model: DemoModel, data: LatentData) -> None:
        width = data.ids.shape[1]
        ids, self.caption = torch.unique(torch.cat((data.ids, data.empty[0][:, :width])), dim=0, return_inverse=True)
        self.lengths = torch.zeros(len(ids), dtype=torch.int64)
        self.lengths[self.caption] = torch.cat((data.lengths, data.empty[1]))
        parts = zip(ids.split(256), self.lengths.split(256), strict=True)
        embeds = [model.embed(*part)[0] for part in parts]
        self.embeds = torch.cat([torch.nn.functional.pad(e, (0, 0, 0, width - e.shape[1])) for e in embeds])

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        i = self.caption[rows]
        lengths = self.lengths[i]
        return self.embeds[i.to(self.embeds.device), : int(lengths.max())], lengths


def encode_scenes(
    out: Path, vae_dir: Path, tokenizer: object, recipe: Recipe, log: Callable, device: torch.device
) -> LatentData:
    """Render and encode the training scenes once; cached in `out`/latents.pt."""
    cache = out / "latents.pt"
    captions = Captions(tokenizer)
    if not cache.exists():
        from .autoencoder import encode_images, load_autoencoder
        from .scenes import render, sample_scene

        vae, rng = load_autoencoder(vae_dir).to(device), np.random.default_rng(recipe.seed)
        latents, texts = [], []
        for start in range(0, recipe.scenes, 256):
            scenes = [sample_scene(rng) for _ in range(min(256, recipe.scenes - start))]
            latents.append(encode_images(vae, np.stack([render(s) for s in scenes])).half().cpu())
            texts += [s.caption for s in scenes]
            if start % 4096 == 0:
                log(f"latents {start}/{recipe.scenes}")
        ids, lengths = captions.tokenize(texts)
        with replacing(cache) as partial:
            torch.save({"latents": torch.cat(latents), "ids": ids, "lengths": lengths}, partial)
    return LatentData(**torch.load(cache, weights_only=True), empty=captions.tokenize([""]), device=device)


def _stage(
    name: str, model: DemoModel, loss: Loss, config: TrainerConfig, folder: Path, log: Callable, compile: bool
) -> DemoModel:  # fmt: skip
    """Run or resume one stage; return its EMA model, whose parameters are trainable again."""
    trainer = Trainer(name, model, loss, config, folder, log)
    if compile:
        torch.compiler.reset()  # graphs of one stage count against the limit of the next
        for each in (trainer.model, trainer.ema):
            each.network.compile(dynamic=False)
    return trainer.run().requires_grad_(True)


def _flow_loss(data: LatentData, recipe: Recipe, batch: int) -> Loss:
    """Return the loss of flow matching at tt = t, with prompts dropped at random (for guidance)."""

    def loss(current: DemoModel, _: DemoModel, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, rows = data.draw(batch)
        dropped = torch.rand(len(x)) < recipe.drop_prompt
        ids = torch.where(dropped[:, None], data.empty[0][:, : data.ids.shape[1]], data.ids[rows])
        lengths = torch.where(dropped, data.empty[1], data.lengths[rows])
        cond = current.embed(ids, lengths)
        t, shift = torch.rand(len(x)).to(x.device), recipe.flow_shift
        return flow_matching_loss(current, x, shift * t / (1 + (shift - 1) * t), cond), {}

    return loss


def _objective_loss(prompts: Prompts, data: LatentData, objective: ObjectiveConfig, batch: int) -> Loss:
    """Return the loss of TwinFlow's objective (and RCGM's: the same without the twin) on frozen prompt embeddings."""

    def pick(rows: Tensor, mask: Tensor) -> Tensor:
        return rows[mask.cpu()]

    def drop(rows: Tensor, mask: Tensor) -> Tensor:
        return rows.masked_fill(mask.cpu(), -1)

    def loss(current: DemoModel, target: DemoModel, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, rows = data.draw(batch)
        online = lambda x, t, tt, rows: current(x, t, tt, prompts(rows))
        ema = lambda x, t, tt, rows: target(x, t, tt, prompts(rows))
        return TwinFlowObjective(online, ema, objective, pick, drop)(x, rows)

    return loss


def _warm_start(
    model: DemoModel, prompts: Prompts, data: LatentData, recipe: Recipe, folder: Path, log: Callable
) -> Loss:
    """Return the loss of regression on the model's own guided samples, which are made now."""
    samples = own_samples(
        model.network, prompts, data.latents, folder, count=recipe.samples, steps=recipe.sample_steps,
        guidance=recipe.sample_guidance, seed=recipe.seed + 1, log=log, device=data.device,
    )  # fmt: skip
    return lambda current, *_: (warm_loss(current, samples, prompts, recipe.warm_batch, data.device), {})


def _falling(recipe: Recipe, steps: int, seed: int, lr: float) -> TrainerConfig:
    """Return a stage at rates that fall to nearly nothing."""
    return TrainerConfig(steps=steps, lr=lr, muon=10 * lr, ema=0.995, seed=recipe.seed + seed)


def _flow(
    out: Path, recipe: Recipe, data: LatentData, tokenizer: Any, log: Callable, stage: Callable[..., DemoModel]
) -> DemoModel:
    """Run the stages that all recipes share, from the text encoder to the settled flow."""
    torch.manual_seed(recipe.seed)
    model = DemoModel(len(tokenizer), recipe.flow_layers, data.device)
    pretrain_text_encoder(model.text_encoder, tokenizer, out / "text", recipe.text_steps, recipe.seed, log)
    # rates stay high to the end of the pretraining, as another stage follows
    config = TrainerConfig(steps=recipe.flow_steps, lr=3e-3, muon=0.03, floor=0.3, ema=0.999, seed=recipe.seed)
    model = stage("flow", model, _flow_loss(data, recipe, recipe.flow_batch), config, "pretrained")
    model = deepen(model, TRANSFORMER.n_layers)
    if recipe.settle_steps:
        loss = _flow_loss(data, recipe, recipe.settle_batch)
        model = stage("settle", model, loss, _falling(recipe, recipe.settle_steps, 1, lr=2e-3), "settled")
    return model


def train(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print, compile: bool = False,
    device: torch.device = CPU,
) -> Path:  # fmt: skip
    """Run or resume `recipe` in folder `out`; return the finished model folder `out`/`recipe.name`/model.

    The same seed on the same device and machine gives the same model, interrupted or not.
    `compile` runs the network through torch.compile: 1.6 times as fast on two cores after a minute or
    two of compilation per stage; results then differ from an uncompiled run's in rounding.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part in ("pretrained", *(["warm"] if recipe.warm_steps else []), recipe.name):
        _same_recipe(out / f"{part}.json", recipe.part(part))
    torch.manual_seed(recipe.seed)
    vae_dir = out / "vae" / "final"
    if not (vae_dir / "config.json").exists():
        from .autoencoder import train_autoencoder

        train_autoencoder(out / "vae", steps=recipe.autoencoder_steps, seed=recipe.seed, log=log, device=device)
    tokenizer = build_tokenizer(recipe.seed)
    data = encode_scenes(out, vae_dir, tokenizer, recipe, log, device)
    stage = lambda name, model, loss, config, folder: _stage(name, model, loss, config, out / folder, log, compile)
    model = _flow(out, recipe, data, tokenizer, log, stage)
    if recipe.objective:  # what follows leaves the text encoder as it is
        prompts = Prompts(model, data)
        model.text_encoder.requires_grad_(False)
    if recipe.warm_steps:
        loss = _warm_start(model, prompts, data, recipe, out / "samples", log)
        model = stage("warm", model, loss, _falling(recipe, recipe.warm_steps, 3, lr=2e-3), "warm")
    if recipe.last_steps:
        loss = _flow_loss(data, recipe, recipe.last_batch)
        if recipe.objective:
            model.text_encoder.requires_grad_(False)
            loss = _objective_loss(prompts, data, recipe.objective, recipe.last_batch)
        model = stage(recipe.name, model, loss, _falling(recipe, recipe.last_steps, 2, lr=1e-3), recipe.name)
    return save_model(out / recipe.name / "model", model.network, model.text_encoder, tokenizer, vae_dir)


def _same_recipe(path: Path, described: dict[str, Any]) -> None:
    """A folder belongs to one pretraining, and one run of each objective from it: others would mix two runs."""
    from ..errors import ConfigError

    described = json.loads(json.dumps(described))
    if path.exists() and read_json(path) != described:
        raise ConfigError(f"{path} records another recipe; train into a new folder or repeat its options")
    write_json(path, described)
