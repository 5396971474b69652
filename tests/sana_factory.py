"""Tiny SANA networks with random weights: diffusers' own as the oracle, and whole folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from hypothesis import assume
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import networks
from tests.factory import WEIGHTS, randomize
from tests.factory import tokenizer as qwen_tokenizer
from twinflow_rt.models.text_encoders.openuni import ConnectorConfig
from twinflow_rt.models.transformers.sana import GUIDANCE, SanaConfig
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


class TwinFlowReference(networks.Reference):
    """diffusers' network; its time embedding replaced by TwinFlow's formula, term by term. SANA-Sprint's takes t
    alone."""

    prefix = "time_embed_2"

    def __init__(self, config: SanaConfig = SMALL, seed: int = 1) -> None:
        from diffusers import SanaTransformer2DModel
        from diffusers.models.normalization import AdaLayerNormSingle

        raw = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        network = randomize(SanaTransformer2DModel(**raw), seed)
        second = None if config.guidance_embeds else randomize(AdaLayerNormSingle(config.dim), seed + 1)
        super().__init__(network, second)

    def predict(self, args: networks.Inputs, t: float) -> Tensor:
        mask = (torch.arange(args.embeds.shape[1]) < torch.tensor(args.lengths)[:, None]).to(args.latents.dtype)
        time, guidance = torch.full((len(args.latents),), t, dtype=args.latents.dtype), None
        if self.second is None:
            guidance = torch.full_like(time, GUIDANCE * self.network.config.guidance_embeds_scale)
        else:
            time = time * 1000
        return self.network(args.latents, args.embeds, time, guidance, mask, return_dict=False)[0]

    def add_second(self, t: float, tt: float):
        return add_second(self.second, tt)


@st.composite
def configs(draw) -> SanaConfig:
    heads, head_dim, sprint = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.booleans())
    assume(heads * head_dim > 1)  # LayerNorm of one feature is 0 whatever it is
    channels = draw(st.integers(1, 3))
    return SanaConfig(
        in_channels=channels, out_channels=channels, num_attention_heads=heads, attention_head_dim=head_dim,
        num_layers=draw(st.integers(1, 3)), num_cross_attention_heads=draw(st.integers(1, 3)),
        cross_attention_head_dim=draw(st.integers(1, 6)), cross_attention_dim=heads * head_dim, caption_channels=5,
        mlp_ratio=draw(st.sampled_from([1.0, 2.5])), sample_size=2, guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint else None,
    )  # fmt: skip


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
