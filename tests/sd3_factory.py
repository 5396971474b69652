"""Tiny SD3.5 networks with random weights: diffusers' own as the oracle, and whole folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import assume
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import networks
from tests.factory import VAE, WEIGHTS, randomize
from twinflow_rt.models.transformers.sd3 import SD3Config

SMALL = SD3Config(
    sample_size=8, in_channels=4, num_layers=3, attention_head_dim=6, num_attention_heads=2, joint_attention_dim=20,
    caption_projection_dim=12, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=9,
    dual_attention_layers=(0, 1),
)  # fmt: skip
CLIP_TOKENS = 12
# latent height, width, prompt lengths of the batch, which are all alike
SHAPES = ((8, 8, (7,)), (2, 14, (1, 1)), (10, 6, (9, 9, 9)))


def add_second(second: nn.Module, tt: float):
    """A hook that adds TwinFlow's term to diffusers' conditioning: (t - tt) * (e2(1000 tt) + g2(pooled))."""

    def hook(module, args, output):
        timestep, pooled = args
        target = torch.full_like(timestep, tt * 1000)
        return output + second(target, pooled) * ((timestep - target)[:, None] / 1000)

    return hook


class TwinFlowReference(networks.Reference):
    """diffusers' network; its conditioning replaced by TwinFlow's formula, term by term."""

    prefix = "time_text_embed_2"

    def __init__(self, config: SD3Config = SMALL, seed: int = 1) -> None:
        from diffusers import SD3Transformer2DModel
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        network = randomize(SD3Transformer2DModel(**raw), seed)
        # positions are read from the checkpoint, so let them be any
        network.pos_embed.pos_embed.normal_(generator=torch.Generator().manual_seed(seed))
        second = CombinedTimestepTextProjEmbeddings(config.dim, config.pooled_projection_dim)
        super().__init__(network, randomize(second, seed + 1))

    def predict(self, args: networks.Inputs, t: float) -> Tensor:
        timestep = torch.full((len(args.latents),), t * 1000, dtype=args.latents.dtype)
        return self.network(args.latents, args.embeds, args.extras["pooled"], timestep, return_dict=False)[0]

    def add_second(self, t: float, tt: float):
        return lambda module, args, kwargs, output: add_second(self.second, tt)(module, args, output)


@st.composite
def configs(draw) -> SD3Config:
    heads, half, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    channels, dual = draw(st.integers(1, 3)), draw(st.sets(st.integers(0, layers - 1)))
    assume(half * heads % 2 == 0)  # diffusers' own positions need it
    return SD3Config(
        sample_size=8, in_channels=channels, out_channels=channels, num_layers=layers, attention_head_dim=2 * half,
        num_attention_heads=heads, joint_attention_dim=5, caption_projection_dim=2 * half * heads,
        pooled_projection_dim=3, pos_embed_max_size=5, dual_attention_layers=tuple(dual),
    )  # fmt: skip


def clip_tokenizer(pad: str):
    """CLIP's, over bytes alone: lower case, start and end tokens, word ends marked."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*alphabet, *(c + "</w>" for c in alphabet), "re", "re" + "d</w>", "<|startoftext|>", "<|endoftext|>")
    merges = [("r", "e"), ("re", "d</w>")]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab, merges, pad_token=pad, model_max_length=CLIP_TOKENS)


def clip_encoder(width: int, pooled: int, act: str, legacy: bool):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=516, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=pooled, max_position_embeddings=CLIP_TOKENS, hidden_act=act, bos_token_id=514, pad_token_id=1,
        eos_token_id=2 if legacy else 515,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def t5_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 127) if chr(c) != " "]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in (chr(0x2581), *letters))]
    core = Tokenizer(models.Unigram(scores, unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def t5_encoder(d_model: int = SMALL.joint_attention_dim):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=128, d_model=d_model, d_kv=4, d_ff=24, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    return T5EncoderModel(config)


def make_model(folder: Path, *, with_t5: bool = True, channels: int = 4) -> Path:
    """A whole TwinFlow-SD3.5 folder as diffusers saves it, every part tiny and random."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    reference = TwinFlowReference(replace(SMALL, in_channels=channels, out_channels=channels))
    pipe = StableDiffusion3Pipeline(
        transformer=reference.network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomize(AutoencoderKL(**{**VAE, "latent_channels": channels}), 3),
        text_encoder=randomize(clip_encoder(8, 4, "quick_gelu", False), 4), tokenizer=clip_tokenizer("<|endoftext|>"),
        text_encoder_2=randomize(clip_encoder(10, 6, "gelu", True), 5), tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=randomize(t5_encoder(), 6) if with_t5 else None, tokenizer_3=t5_tokenizer() if with_t5 else None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    file = folder / "transformer" / WEIGHTS
    save_file({**load_file(file), **reference.tensors()}, file, metadata={"format": "pt"})
    return folder
