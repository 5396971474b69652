"""Published configurations of the models that the bench can make without their files.

Each function takes `scale`, a factor on all widths (and on vocabularies), and `layers`, the most per
deep stack (None: all), and gives config.json's content of every part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
EULER: Config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@dataclass(frozen=True)
class Blueprint:
    """The configs of one model. parts: folder -> config, and the module of `twinflow_rt.models` whose MODEL reads
    it. scheduler: of an ordinary flow model."""

    transformer: Config
    parts: dict[str, tuple[Config, str]]
    scheduler: Config | None = None


def z_image(scale: float, layers: int | None) -> Blueprint:
    """Z-Image 6.15B: 30 layers of 30 heads x 128, Qwen3-4B, Flux's 16-channel VAE."""
    heads, groups, width = _part(30, scale), _part(8, scale), _rounded(2560, scale, 64)
    transformer = {
        "_class_name": "ZImageTransformer2DModel", "dim": 128 * heads, "n_heads": heads, "n_kv_heads": heads,
        "n_layers": _depth(30, layers), "n_refiner_layers": _depth(2, layers), "cap_feat_dim": width,
        "in_channels": 16, "axes_dims": [32, 48, 48], "axes_lens": [1024, 512, 512],
    }  # fmt: skip
    text = {
        "model_type": "qwen3", "vocab_size": _rounded(151936, scale, 256), "hidden_size": width, "head_dim": 128,
        "intermediate_size": _rounded(9728, scale, 64), "num_hidden_layers": _depth(35, layers) + 1,
        "num_attention_heads": 4 * groups, "num_key_value_heads": groups, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    vae = _kl_vae(scale, scaling_factor=0.3611, shift_factor=0.1159)
    return Blueprint(
        transformer, {"text_encoder": (text, "text_encoders.qwen3"), "vae": (vae, "autoencoders.autoencoder_kl")}
    )  # fmt: skip


def qwen_image(scale: float, layers: int | None) -> Blueprint:
    """Qwen-Image 20.4B: 60 two-stream layers of 24 heads x 128, Qwen2.5-VL-7B, its video VAE."""
    groups, width = _part(4, scale), _rounded(3584, scale, 64)
    transformer = {
        "_class_name": "QwenImageTransformer2DModel", "patch_size": 2, "in_channels": 64, "out_channels": 16,
        "num_layers": _depth(60, layers), "attention_head_dim": 128, "num_attention_heads": _part(24, scale),
        "joint_attention_dim": width, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
    text = {
        "model_type": "qwen2_5_vl", "vocab_size": _rounded(152064, scale, 256), "hidden_size": width, "head_dim": 128,
        "intermediate_size": _rounded(18944, scale, 64), "num_hidden_layers": _depth(28, layers),
        "num_attention_heads": 7 * groups, "num_key_value_heads": groups, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    vae = {
        "_class_name": "AutoencoderKLQwenImage", "base_dim": _rounded(96, scale, 32), "z_dim": 16,
        "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * 16, "latents_std": [2.0] * 16,
    }  # fmt: skip
    return Blueprint(
        transformer, {"text_encoder": (text, "text_encoders.qwen2_5_vl"), "vae": (vae, "autoencoders.autoencoder_qwen")}
    )  # fmt: skip


def sd35_medium(scale: float, layers: int | None) -> Blueprint:
    """Stable Diffusion 3.5 Medium: 24 layers of 24 heads x 64, two CLIP towers, T5-XXL."""
    heads, first, second, depth = _part(24, scale), _part(12, scale), _part(20, scale), _depth(24, layers)
    far = max(_part(64, scale), first + second)  # CLIP's features stand in T5's
    transformer = {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16,
        "out_channels": 16, "num_layers": depth, "attention_head_dim": 64, "num_attention_heads": heads,
        "joint_attention_dim": 64 * far, "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 64 * (first + second), "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(min(13, depth))),
    }  # fmt: skip
    far_text = {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "vocab_size": _rounded(32128, scale, 256),
        "d_model": 64 * far, "d_kv": 64, "num_heads": far, "d_ff": _rounded(10240, scale, 64),
        "num_layers": _depth(24, layers),
    }  # fmt: skip
    return Blueprint(transformer, {
        "text_encoder": (_clip(first, _depth(12, layers), scale, "quick_gelu"), "text_encoders.clip_text"),
        "text_encoder_2": (_clip(second, _depth(32, layers), scale, "gelu"), "text_encoders.clip_text"),
        "text_encoder_3": (far_text, "text_encoders.t5"),
        "vae": (_kl_vae(scale, scaling_factor=1.5305, shift_factor=0.0609), "autoencoders.autoencoder_kl"),
    })  # fmt: skip


def sana(scale: float, layers: int | None) -> Blueprint:
    """SANA 1.6B: 20 linear-attention layers, Gemma 2 2B, a VAE of 32 pixels a latent."""
    # one width, 2240 = 70 x 32 = 20 x 112, is split in two ways: even numbers of the wider heads keep both whole
    cross, groups, width = 2 * _part(10, scale), _part(4, scale), _rounded(2304, scale, 64)
    transformer = {
        "_class_name": "SanaTransformer2DModel", "in_channels": 32, "out_channels": 32,
        "num_layers": _depth(20, layers), "num_attention_heads": 112 * cross // 32, "attention_head_dim": 32,
        "num_cross_attention_heads": cross, "cross_attention_head_dim": 112, "cross_attention_dim": 112 * cross,
        "caption_channels": width, "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1,
    }  # fmt: skip
    text = {
        "model_type": "gemma2", "vocab_size": _rounded(256000, scale, 256), "hidden_size": width, "head_dim": 256,
        "intermediate_size": _rounded(9216, scale, 64), "num_hidden_layers": _depth(26, layers),
        "num_attention_heads": 2 * groups, "num_key_value_heads": groups, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "sliding_window": 4096, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    vae = {
        "_class_name": "AutoencoderDC", "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32,
        "decoder_block_out_channels": [_rounded(c, scale, 32) for c in (128, 256, 512, 512, 1024, 1024)],
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, "decoder_layers_per_block": [3] * 6,
        "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "decoder_conv_act_fn": "relu",
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_in_shortcut": True,
        "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
    }  # fmt: skip
    return Blueprint(
        transformer, {"text_encoder": (text, "text_encoders.gemma2"), "vae": (vae, "autoencoders.autoencoder_dc")}
    )  # fmt: skip


def sana_sprint(scale: float, layers: int | None) -> Blueprint:
    """SANA-Sprint 1.6B: SANA with normalised queries and keys, and a guidance embedder for TwinFlow's second."""
    base = sana(scale, layers)
    sprint = {"guidance_embeds": True, "guidance_embeds_scale": 0.1, "qk_norm": "rms_norm_across_heads"}
    return Blueprint({**base.transformer, **sprint}, base.parts, {"_class_name": "SCMScheduler"})


def flux2_klein(scale: float, layers: int | None) -> Blueprint:
    """FLUX.2-klein 4B: 5 two-stream and 20 one-stream layers of 24 heads x 128, 27 of Qwen3-4B's, 32-channel VAE."""
    base = z_image(scale, layers)
    text, vae = (base.parts[part][0] for part in ("text_encoder", "vae"))
    transformer = {
        "_class_name": "Flux2Transformer2DModel", "twinflow": False, "num_layers": _depth(5, layers),
        "num_single_layers": _depth(20, layers), "num_attention_heads": _part(24, scale),
        "joint_attention_dim": 3 * text["hidden_size"],
    }  # fmt: skip
    vae = {**vae, "_class_name": "AutoencoderKLFlux2", "latent_channels": 32}
    vae |= {"use_quant_conv": True, "use_post_quant_conv": True}
    del vae["scaling_factor"], vae["shift_factor"]
    return Blueprint(transformer, {
        "text_encoder": ({**text, "num_hidden_layers": 36}, "text_encoders.qwen3"),
        "vae": (vae, "autoencoders.autoencoder_flux2"),
    }, EULER | {"use_dynamic_shifting": True})  # fmt: skip


BLUEPRINTS: dict[str, Callable[[float, int | None], Blueprint]] = {
    "z-image": z_image, "qwen-image": qwen_image, "sd3.5-m": sd35_medium, "sana": sana, "sana-sprint": sana_sprint,
    "flux2-klein": flux2_klein,
}  # fmt: skip


def _clip(heads: int, depth: int, scale: float, activation: str) -> Config:
    return {
        "model_type": "clip_text_model", "vocab_size": _rounded(49408, scale, 256), "hidden_size": 64 * heads,
        "projection_dim": 64 * heads, "intermediate_size": 256 * heads, "num_hidden_layers": depth,
        "num_attention_heads": heads, "max_position_embeddings": 77, "hidden_act": activation, "eos_token_id": 2,
    }  # fmt: skip


def _kl_vae(scale: float, **factors: float) -> Config:
    channels = [_rounded(c, scale, 32) for c in (128, 256, 512, 512)]
    return {
        "_class_name": "AutoencoderKL", "block_out_channels": channels, "layers_per_block": 2,
        "norm_num_groups": 32, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False,
        "use_post_quant_conv": False, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, **factors,
    }  # fmt: skip


def _part(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _rounded(width: int, scale: float, multiple: int) -> int:
    return width if scale == 1 else max(1, round(width * scale / multiple)) * multiple


def _depth(count: int, layers: int | None) -> int:
    return min(count, layers or count)
