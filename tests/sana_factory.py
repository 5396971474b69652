"""Tiny SANA networks with random weights: diffusers' own as the oracle, and ours beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.factory import WEIGHTS, randomize
from tests.factory import tokenizer as qwen_tokenizer
from twinflow_rt.checkpoint.fuse import merge
from twinflow_rt.models.text_encoders.openuni import ConnectorConfig
from twinflow_rt.models.transformers.sana import FUSED, GUIDANCE, SanaConfig, SanaTransformer
from twinflow_rt.stages.text_encoders import INSTRUCTION

SMALL = SanaConfig(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=4, num_layers=3,
    num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=12, caption_channels=20,
    sample_size=2,
)  # fmt: skip
SPRINT = replace(SMALL, guidance_embeds=True, qk_norm="rms_norm_across_heads")
VOCABULARY = 600
# (latent height, width, prompt lengths of the batch)
SHAPES = ((4, 4, (7,)), (1, 5, (1,)), (3, 2, (9, 9)), (5, 3, (3, 11, 5)))


def add_second(second: nn.Module, tt: float):
    """A hook that adds TwinFlow's term to both results of diffusers' embedder: (t - tt) * (m2, e2)(1000 tt)."""

    def hook(module, args, kwargs, output):
        target = torch.full_like(args[0], tt * 1000)
        gap = (args[0] - target)[:, None] / 1000
        return tuple(a + b * gap for a, b in zip(output, second(target, **kwargs), strict=True))

    return hook


class TwinFlowReference(nn.Module):
    """diffusers' network; its time embedding replaced by TwinFlow's formula, term by term."""

    def __init__(self, config: SanaConfig = SMALL, seed: int = 1) -> None:
        super().__init__()
        from diffusers import SanaTransformer2DModel
        from diffusers.models.normalization import AdaLayerNormSingle

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        self.network = randomize(SanaTransformer2DModel(**raw), seed)
        self.second = None if config.guidance_embeds else randomize(AdaLayerNormSingle(config.dim), seed + 1)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint of a TwinFlow model, or of SANA-Sprint."""
        second = {} if self.second is None else self.second.state_dict()
        return {**self.network.state_dict(), **{f"time_embed_2.{k}": v for k, v in second.items()}}

    @torch.no_grad()
    def velocity(
        self, latents: Tensor, embeds: Tensor, lengths: Sequence[int], t: float, tt: float | None = None
    ) -> Tensor:
        """diffusers' prediction; tt=None: without the second embedder's term. SANA-Sprint's takes t alone."""
        mask = (torch.arange(embeds.shape[1]) < torch.tensor(lengths)[:, None]).to(latents.dtype)
        time, guidance, handles = torch.full((len(latents),), t, dtype=latents.dtype), None, []
        if self.second is None:
            guidance = torch.full_like(time, GUIDANCE * self.network.config.guidance_embeds_scale)
        else:
            time = time * 1000
        if tt is not None and self.second is not None:
            hook = add_second(self.second, tt)
            handles.append(self.network.time_embed.register_forward_hook(hook, with_kwargs=True))
        try:
            return self.network(latents, embeds, time, guidance, mask, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()


def ours(tensors: dict[str, Tensor], config: SanaConfig = SMALL) -> SanaTransformer:
    """Our unfolded network with a checkpoint's tensors."""
    network = SanaTransformer(config)
    network.load_state_dict(merge(tensors, FUSED), assign=True)
    return network.eval()


def inputs(shape, config: SanaConfig = SMALL, dtype=torch.float32) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    height, width, lengths = shape
    g = torch.Generator().manual_seed(height * width)
    latents = torch.randn(len(lengths), config.in_channels, height, width, generator=g)
    embeds = torch.randn(len(lengths), max(lengths), config.caption_channels, generator=g)
    return latents.to(dtype), embeds.to(dtype), lengths


@torch.no_grad()
def run(network: SanaTransformer, args, t: float, tt: float) -> Tensor:
    """The unfolded network at (t, tt)."""
    latents, embeds, lengths = args
    times = (torch.tensor([v], dtype=torch.float64) for v in (t, tt))
    return network(latents, network.modulate(*times), network.encode_context(embeds, lengths))


@torch.no_grad()
def run_step(network: SanaTransformer, args, step: int) -> Tensor:
    """A folded network at its evaluation `step`."""
    latents, embeds, lengths = args
    return network(latents, network.step_modulation(step), network.encode_context(embeds, lengths))


def tokenizer():
    """Byte-level BPE with a start token in front, which knows the words of SANA's instruction."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=1, special_tokens=["<pad>", "<bos>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([INSTRUCTION], trainer)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", padding_side="right")


def text_encoder(head: bool = False, width: int = SMALL.caption_channels):
    """A Gemma 2 of two layers whose soft cap bites; `head`: inside Gemma2ForCausalLM."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=7, attn_logit_softcapping=1.5,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return randomize((Gemma2ForCausalLM if head else Gemma2Model)(config), 4)


def autoencoder(**changes):
    """A DC-AE of three levels, four pixels a latent."""
    from diffusers import AutoencoderDC

    blocks = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    config = dict(
        in_channels=3, latent_channels=SMALL.in_channels, attention_head_dim=4, encoder_block_types=blocks,
        decoder_block_types=blocks, encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 2, 1),
        encoder_qkv_multiscales=((), (5,), (5,)), decoder_qkv_multiscales=((), (5,), (3, 5)),
        upsample_block_type="interpolate", scaling_factor=0.41,
    )  # fmt: skip
    return randomize(AutoencoderDC(**{**config, **changes}), 3)


def make_model(folder: Path, config: SanaConfig = SMALL) -> Path:
    """A whole TwinFlow-SANA folder, or one of SANA-Sprint, as diffusers saves it, every part tiny and random."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaSprintPipeline, SCMScheduler

    reference = TwinFlowReference(config)
    parts = tokenizer(), text_encoder(), autoencoder(), reference.network
    if config.guidance_embeds:
        pipe = SanaSprintPipeline(*parts, SCMScheduler())
    else:
        scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        pipe = SanaPipeline(*parts, scheduler)
    pipe.save_pretrained(folder)
    file = folder / "transformer" / WEIGHTS
    save_file({**load_file(file), **reference.tensors()}, file, metadata={"format": "pt"})
    return folder


CONNECTOR = ConnectorConfig(
    hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3, num_queries=5,
    caption_channels=SMALL.caption_channels,
)  # fmt: skip


def language_model():
    """The Qwen2 of an InternVL, with a head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=300, hidden_size=CONNECTOR.hidden_size, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return randomize(Qwen2ForCausalLM(config), 5)


def siglip_encoder():
    """transformers' encoder of the connector's shape; OpenUni's has the same names and arithmetic."""
    from transformers import SiglipTextConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoder

    ours = ("num_queries", "caption_channels")
    shape = {name: value for name, value in asdict(CONNECTOR).items() if name not in ours}
    return randomize(SiglipEncoder(SiglipTextConfig(**shape, attn_implementation="eager")), 6)


def make_openuni(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """`make_model` with OpenUni's text stage in place of SANA's; also the connector's tensors."""
    make_model(folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    language_model().save_pretrained(folder / "text_encoder")
    qwen_tokenizer().save_pretrained(folder / "tokenizer")
    generator = torch.Generator().manual_seed(7)
    width, captions = CONNECTOR.hidden_size, CONNECTOR.caption_channels
    tensors = {
        "meta_queries": torch.randn(CONNECTOR.num_queries, width, generator=generator),
        "projector.weight": torch.randn(captions, width, generator=generator),
        "projector.bias": torch.randn(captions, generator=generator),
        **{f"connector.{k}": v for k, v in siglip_encoder().state_dict().items()},
    }
    (folder / "connector").mkdir()
    save_file(tensors, folder / "connector" / "model.safetensors")
    (folder / "connector" / "config.json").write_text(json.dumps(asdict(CONNECTOR)))
    return folder, tensors
