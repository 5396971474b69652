"""Tiny model folders with random weights, in the layout diffusers itself saves: every family's by its name."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from twinflow_rt.families import family_of
from twinflow_rt.training.text import CHAT_TEMPLATE, SPECIAL

DIM, HEADS, TEXT_DIM, CHANNELS = 48, 2, 32, 4
TRANSFORMER = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=CHANNELS, dim=DIM, n_layers=2, n_refiner_layers=1,
    n_heads=HEADS, n_kv_heads=HEADS, norm_eps=1e-5, qk_norm=True, cap_feat_dim=TEXT_DIM, rope_theta=256.0,
    t_scale=1000.0, axes_dims=[8, 8, 8], axes_lens=[576, 32, 32],
)  # fmt: skip
VAE = dict(
    block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=CHANNELS,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, sample_size=64,
    scaling_factor=0.7, shift_factor=0.2, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
FAMILIES = ("z-image", "qwen-image", "sd3", "sana")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random and of a trained network's order, so that no term can hide at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and p.ndim == 1 and not name.endswith("bias"):
                p.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
    return module.eval()


def open_text(folder: Path):
    """The text stage of a model folder, unread."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    family = family_of(config)
    return family.text(folder, family.config.from_dict(config), {})


def read(stage, dtype: torch.dtype = torch.float32):
    """A stage with its weights read, on the CPU."""
    stage.materialize(torch.device("cpu"), dtype)
    return stage


def tokenizer():
    """Byte-level BPE without merges, special tokens and chat template in Qwen's style."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[2], padding_side="right", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def text_encoder(vocab: int = 259, head: bool = False):
    """A Qwen3Model of four layers with grouped key heads; `head`: inside Qwen3ForCausalLM."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocab, hidden_size=TEXT_DIM, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return (Qwen3ForCausalLM if head else Qwen3Model)(config)


def transformer():
    """diffusers' own network, random; without TwinFlow's second embedder, which diffusers lacks."""
    from diffusers import ZImageTransformer2DModel

    return randomize(ZImageTransformer2DModel(**TRANSFORMER), 1)


def second_embedder(network, kind: str) -> dict[str, torch.Tensor]:
    """The t_embedder_2 keys: "random", "zero", or "absent" (a checkpoint a community loader re-saved)."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "t_embedder_2." + k: torch.randn(v.shape, generator=generator) * 0.05
        for k, v in network.t_embedder.state_dict().items()
    }
    return {"random": tensors, "zero": {k: v * 0 for k, v in tensors.items()}, "absent": {}}[kind]


def make_model(folder: Path, family: str = "z-image", **options) -> Path:
    """A whole model folder of `FAMILIES`, SANA-Sprint ("sprint") or OpenUni ("openuni"), tiny and random."""
    from tests import flux2_factory, qwen_image_factory, sana_factory, sd3_factory

    make = {
        "z-image": make_z_image, "qwen-image": qwen_image_factory.make_model, "sd3": sd3_factory.make_model,
        "flux2": flux2_factory.make_model,
        "sana": sana_factory.make_model, "sprint": partial(sana_factory.make_model, config=sana_factory.SPRINT),
        "openuni": lambda folder: sana_factory.make_openuni(folder)[0],
    }[family]  # fmt: skip
    return make(folder, **options)


def make_z_image(
    folder: Path, *, dtype: torch.dtype = torch.float32, sharded: bool = False, second: str = "random",
    head: bool = False,
) -> Path:  # fmt: skip
    """Saves a whole model folder in `dtype`; `sharded` splits the transformer's weights in three."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline

    network, vae = transformer(), randomize(AutoencoderKL(**VAE), 3)
    encoder = randomize(text_encoder(head=head), 4)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = ZImagePipeline(scheduler, vae.to(dtype), encoder.to(dtype), tokenizer(), network.to(dtype))
        pipe.save_pretrained(folder)
    add_second_embedder(folder / "transformer", {k: v.to(dtype) for k, v in second_embedder(network, second).items()})
    if sharded:
        shard(folder / "transformer")
    return folder


def add_second_embedder(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, **extra}, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, parts: int = 3) -> None:
    """Splits a folder's single weight file into `parts` shards and an index, as the hub stores large models."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for i in range(parts):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(tensors)[i::parts]
        save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / (WEIGHTS + ".index.json")).write_text(json.dumps(index))
