"""Tiny SD3.5 networks with random weights: diffusers' own as the oracle, and ours beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.factory import VAE, WEIGHTS, randomize
from twinflow_rt.checkpoint.fuse import merge
from twinflow_rt.models.transformers.sd3 import FUSED, SD3Config, SD3Transformer

SMALL = SD3Config(
    sample_size=8, in_channels=4, num_layers=3, attention_head_dim=6, num_attention_heads=2, joint_attention_dim=20,
    caption_projection_dim=12, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=9,
    dual_attention_layers=(0, 1),
)  # fmt: skip
CLIP_TOKENS = 12
# (latent height, width, batch, prompt tokens)
SHAPES = ((8, 8, 1, 7), (2, 14, 2, 1), (10, 6, 3, 9))


def add_second(second: nn.Module, tt: float):
    """A hook that adds TwinFlow's term to diffusers' conditioning: (t - tt) * (e2(1000 tt) + g2(pooled))."""

    def hook(module, args, output):
        timestep, pooled = args
        target = torch.full_like(timestep, tt * 1000)
        return output + second(target, pooled) * ((timestep - target)[:, None] / 1000)

    return hook


class TwinFlowReference(nn.Module):
    """diffusers' network; its conditioning replaced by TwinFlow's formula, term by term."""

    def __init__(self, config: SD3Config = SMALL, seed: int = 1) -> None:
        super().__init__()
        from diffusers import SD3Transformer2DModel
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        self.network = randomize(SD3Transformer2DModel(**raw), seed)
        # positions are read from the checkpoint, so let them be any
        self.network.pos_embed.pos_embed.normal_(generator=torch.Generator().manual_seed(seed))
        self.second = randomize(CombinedTimestepTextProjEmbeddings(config.dim, config.pooled_projection_dim), seed + 1)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint of a TwinFlow model."""
        second = {f"time_text_embed_2.{k}": v for k, v in self.second.state_dict().items()}
        return {**self.network.state_dict(), **second}

    @torch.no_grad()
    def velocity(self, latents: Tensor, embeds: Tensor, pooled: Tensor, t: float, tt: float | None = None) -> Tensor:
        """diffusers' prediction; tt=None: without the second embedder's term."""
        handles = []
        if tt is not None:
            handles.append(self.network.time_text_embed.register_forward_hook(add_second(self.second, tt)))
        timestep = torch.full((len(latents),), t * 1000, dtype=latents.dtype)
        try:
            return self.network(latents, embeds, pooled, timestep, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()


def ours(tensors: dict[str, Tensor], config: SD3Config = SMALL) -> SD3Transformer:
    """Our unfolded network with a checkpoint's tensors."""
    network = SD3Transformer(config)
    network.load_state_dict(merge(tensors, FUSED), assign=True)
    return network.eval()


def inputs(shape, config: SD3Config = SMALL, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, prompt embeddings, pooled prompts."""
    height, width, batch, tokens = shape
    g = torch.Generator().manual_seed(height * width)
    latents = torch.randn(batch, config.in_channels, height, width, generator=g)
    embeds = torch.randn(batch, tokens, config.joint_attention_dim, generator=g)
    pooled = torch.randn(batch, config.pooled_projection_dim, generator=g)
    return latents.to(dtype), embeds.to(dtype), pooled.to(dtype)


def context_of(network: SD3Transformer, args):
    _, embeds, pooled = args
    return network.encode_context(embeds, (embeds.shape[1],) * len(embeds), pooled=pooled)


@torch.no_grad()
def run(network: SD3Transformer, args, t: float, tt: float) -> Tensor:
    """The unfolded network at (t, tt)."""
    context = context_of(network, args)
    times = (torch.tensor([v], dtype=torch.float64) for v in (t, tt))
    return network(args[0], network.modulate(*times, context), context)


@torch.no_grad()
def run_step(network: SD3Transformer, args, step: int) -> Tensor:
    """A folded network at its evaluation `step`."""
    return network(args[0], network.step_modulation(step), context_of(network, args))


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


def make_model(folder: Path, *, with_t5: bool = True) -> Path:
    """A whole TwinFlow-SD3.5 folder as diffusers saves it, every part tiny and random."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    reference = TwinFlowReference()
    pipe = StableDiffusion3Pipeline(
        transformer=reference.network, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomize(AutoencoderKL(**VAE), 3),
        text_encoder=randomize(clip_encoder(8, 4, "quick_gelu", False), 4), tokenizer=clip_tokenizer("<|endoftext|>"),
        text_encoder_2=randomize(clip_encoder(10, 6, "gelu", True), 5), tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=randomize(t5_encoder(), 6) if with_t5 else None, tokenizer_3=t5_tokenizer() if with_t5 else None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    file = folder / "transformer" / WEIGHTS
    save_file({**load_file(file), **reference.tensors()}, file, metadata={"format": "pt"})
    return folder
