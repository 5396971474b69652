"""How files that are not in diffusers' layout name a network's tensors; adapters name them so, too.

The rules are facts about released files: the single files of ComfyUI and of the models' authors (for networks), LDM's
names (for the VAE of Stable Diffusion 3 and Z-Image), Wan's (for Qwen-Image's VAE). Names that no rule changes stay, so
files that already have diffusers' names pass through. Qwen-Image's network has the same names everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Rename = tuple[str, str | Callable[[re.Match[str]], str]]  # as for re.sub


@dataclass(frozen=True)
class Key:
    """What happens to one tensor of a file: its names afterwards, none if it is dropped; whether its row
    halves trade places."""

    source: str
    targets: tuple[str, ...]
    swapped: bool = False

    @property
    def action(self) -> str:
        if len(self.targets) != 1:
            return "split" if self.targets else "dropped"
        if self.swapped:
            return "swapped"
        return "kept" if self.targets[0] == self.source else "renamed"


@dataclass(frozen=True)
class Names:
    """renames: applied in order, each to the result of those before. splits: end of a merged tensor's
    name -> ends of its parts, in row order. drops: names that diffusers' network does not have, as
    regular expressions. swaps: names before renaming whose row halves trade places (shift | scale is
    scale | shift in diffusers' network). matrices: diffusers' names of matrices, 1x1 convolutions before."""

    renames: tuple[Rename, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    swaps: str | None = None
    matrices: str | None = None

    def targets(self, key: str) -> tuple[str, ...]:
        """diffusers' names of the tensor `key`: none if it is dropped, several if it is split."""
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        if any(re.search(pattern, key) for pattern in self.drops):
            return ()
        for merged, parts in self.splits.items():
            if key.endswith(merged):
                return tuple(key.removesuffix(merged) + part for part in parts)
        return (key,)

    def swapped(self, key: str) -> bool:
        """Whether the row halves of the tensor `key` trade places."""
        return self.swaps is not None and re.search(self.swaps, key) is not None


def _split(merged: str, parts: Sequence[str], leaves: Sequence[str] = ("weight", "bias")) -> dict[str, tuple[str, ...]]:
    return {f".{merged}.{leaf}": tuple(f".{part}.{leaf}" for part in parts) for leaf in leaves}


def z_image(config: dict[str, Any]) -> Names:
    """The network as its authors and ComfyUI store it."""
    return Names(
        (
            (r"^x_embedder\.", "all_x_embedder.2-1."),
            (r"^final_layer\.", "all_final_layer.2-1."),
            (r"\.attention\.out\.", ".attention.to_out.0."),
            (r"\.attention\.to\.([qkv])\.", r".attention.to_\1."),  # adapters
            (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
            (r"\.feed_forward\.net\.2\.", ".feed_forward.w2."),  # as diffusers' FeedForward, which other tools put in
        ),
        _split("attention.qkv", [f"attention.to_{x}" for x in "qkv"])
        | _split("feed_forward.net.0.proj", ("feed_forward.w3", "feed_forward.w1")),  # SwiGLU: the gate is last
        (r"^norm_final\.weight$",),
    )


def sd3(config: dict[str, Any]) -> Names:
    """The network of Stable Diffusion 3 and 3.5 as its authors store it."""
    embedders = {"t": "timestep", "y": "text"}
    last = config["num_layers"] - 1
    return Names(
        (
            (r"^pos_embed$", "pos_embed.pos_embed"),
            (r"^x_embedder\.proj\.", "pos_embed.proj."),
            (r"^([ty])_embedder\.mlp\.([02])\.",
             lambda m: f"time_text_embed.{embedders[m[1]]}_embedder.linear_{int(m[2]) // 2 + 1}."),
            (r"^joint_blocks\.", "transformer_blocks."),
            (r"\.x_block\.adaLN_modulation\.1\.", ".norm1.linear."),
            (r"\.context_block\.adaLN_modulation\.1\.", ".norm1_context.linear."),
            (r"\.x_block\.mlp\.", ".ff."),
            (r"\.context_block\.mlp\.", ".ff_context."),
            (r"\.fc1\.", ".net.0.proj."),
            (r"\.fc2\.", ".net.2."),
            (r"\.context_block\.attn\.proj\.", ".attn.to_add_out."),
            (r"\.context_block\.attn\.ln_", ".attn.norm_added_"),
            (r"\.context_block\.attn\.qkv\.", ".attn.add_qkv."),
            (r"\.x_block\.attn(2?)\.proj\.", r".attn\1.to_out.0."),
            (r"\.x_block\.attn(2?)\.ln_", r".attn\1.norm_"),
            (r"\.x_block\.attn(2?)\.qkv\.", r".attn\1.qkv."),
            (r"^final_layer\.linear\.", "proj_out."),
            (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
        ),
        _split("qkv", ("to_q", "to_k", "to_v")) | _split("add_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        swaps=rf"^(final_layer|joint_blocks\.{last}\.context_block)\.adaLN_modulation\.1\.",
    )  # fmt: skip


def sana(config: dict[str, Any]) -> Names:
    """The network of SANA as its authors store it."""
    return Names(
        (
            (r"^x_embedder\.proj\.", "patch_embed.proj."),
            (r"^t_embedder\.mlp\.0\.", "time_embed.emb.timestep_embedder.linear_1."),
            (r"^t_embedder\.mlp\.2\.", "time_embed.emb.timestep_embedder.linear_2."),
            (r"^t_block\.1\.", "time_embed.linear."),
            (r"^y_embedder\.y_proj\.fc([12])\.", r"caption_projection.linear_\1."),
            (r"^attention_y_norm\.", "caption_norm."),
            (r"^blocks\.", "transformer_blocks."),
            (r"\.attn\.proj\.", ".attn1.to_out.0."),
            (r"\.attn\.qkv\.", ".attn1.qkv."),
            (r"\.cross_attn\.proj\.", ".attn2.to_out.0."),
            (r"\.cross_attn\.q_linear\.", ".attn2.to_q."),
            (r"\.cross_attn\.kv_linear\.", ".attn2.kv."),
            (r"\.mlp\.(inverted|depth|point)_conv\.conv\.", r".ff.conv_\1."),
            (r"^final_layer\.linear\.", "proj_out."),
            (r"^final_layer\.scale_shift_table$", "scale_shift_table"),
        ),
        _split("attn1.qkv", [f"attn1.to_{x}" for x in "qkv"]) | _split("attn2.kv", ("attn2.to_k", "attn2.to_v")),
        # of training, and positions that the network computes itself or does not use
        (r"^y_embedder\.y_embedding$", r"^pos_embed$"),
    )


def flux2(config: dict[str, Any]) -> Names:
    """The network of FLUX.2 as its authors and ComfyUI store it."""
    mlp = {"0": "in", "2": "out"}
    return Names(
        (
            (r"^img_in\.", "x_embedder."),
            (r"^txt_in\.", "context_embedder."),
            (r"^time_in\.in_layer\.", "time_guidance_embed.timestep_embedder.linear_1."),
            (r"^time_in\.out_layer\.", "time_guidance_embed.timestep_embedder.linear_2."),
            (r"_modulation(_img|_txt|)\.lin\.", r"_modulation\1.linear."),
            (r"^final_layer\.linear\.", "proj_out."),
            (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
            (r"_norm\.scale$", "_norm.weight"),
            (r"^double_blocks\.", "transformer_blocks."),
            (r"^single_blocks\.", "single_transformer_blocks."),
            (r"\.linear1\.", ".attn.to_qkv_mlp_proj."),
            (r"\.linear2\.", ".attn.to_out."),
            (r"\.img_attn\.norm\.(query|key)_norm\.", lambda m: f".attn.norm_{m[1][0]}."),
            (r"\.txt_attn\.norm\.(query|key)_norm\.", lambda m: f".attn.norm_added_{m[1][0]}."),
            (r"(?<!attn)\.norm\.(query|key)_norm\.", lambda m: f".attn.norm_{m[1][0]}."),
            (r"\.img_attn\.proj\.", ".attn.to_out.0."),
            (r"\.txt_attn\.proj\.", ".attn.to_add_out."),
            (r"\.img_mlp\.([02])\.", lambda m: f".ff.linear_{mlp[m[1]]}."),
            (r"\.txt_mlp\.([02])\.", lambda m: f".ff_context.linear_{mlp[m[1]]}."),
        ),
        _split("img_attn.qkv", [f"attn.to_{x}" for x in "qkv"])
        | _split("txt_attn.qkv", [f"attn.add_{x}_proj" for x in "qkv"]),
        swaps=r"^final_layer\.adaLN_modulation\.1\.",
    )


def ldm_autoencoder(config: dict[str, Any]) -> Names:
    """AutoencoderKL in LDM's names (`ae.safetensors`)."""
    last = len(config["block_out_channels"]) - 1
    return Names(
        (
            (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
            (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
            (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
            (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
            (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
            (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
            # LDM counts the decoder's levels from the finest
            (r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{last - int(m[1])}.resnets."),
            (r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{last - int(m[1])}.upsamplers.0."),
            (r"\.nin_shortcut\.", ".conv_shortcut."),
            (r"^(en|de)coder\.((?:post_)?quant_conv)\.", r"\2."),  # FLUX.2's
            (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        ),
        matrices=r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$",
    )


def wan_autoencoder(config: dict[str, Any]) -> Names:
    """AutoencoderKLQwenImage in Wan's names: blocks numbered in sequence, layers by their place in it."""
    per_level = config["num_res_blocks"] + 2  # of the decoder: resnets, then an upsampling

    def up(match: re.Match[str]) -> str:
        level, place = divmod(int(match[1]), per_level)
        return f"decoder.up_blocks.{level}." + ("upsamplers.0." if place == per_level - 1 else f"resnets.{place}.")

    layers = (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2"))
    return Names((
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
        (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.([02])\.", lambda m: f".mid_block.resnets.{int(m[1]) // 2}."),
        (r"^encoder\.downsamples\.", "encoder.down_blocks."),
        (r"^decoder\.upsamples\.(\d+)\.", up),
        *((rf"\.residual\.{number}\.", f".{name}.") for number, name in layers),
        (r"\.shortcut\.", ".conv_shortcut."),
    ))  # fmt: skip


# what diffusers' fuse_qkv_projections merges in any network
FUSED = (
    _split("to_qkv", ("to_q", "to_k", "to_v")) | _split("to_kv", ("to_k", "to_v"))
    | _split("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
)  # fmt: skip
# what ComfyUI's files have beside every text encoder: a temperature of CLIP's training, and tokenizers
TEXT = Names(drops=(r"^logit_scale$", r"^(spiece_model|tekken_model)$"))

# by _class_name or model_type of config.json; of others the names are diffusers' or transformers' own
RULES: dict[str, Callable[[dict[str, Any]], Names]] = {
    "ZImageTransformer2DModel": z_image, "SD3Transformer2DModel": sd3, "SanaTransformer2DModel": sana,
    "Flux2Transformer2DModel": flux2, "AutoencoderKLFlux2": ldm_autoencoder,
    "AutoencoderKL": ldm_autoencoder, "AutoencoderKLQwenImage": wan_autoencoder,
}  # fmt: skip

# what single files put before the names of each of their networks; several text encoders by their names. Those of
# OpenUni's connector stand as they are in its files
CONTAINERS = {
    "transformer": r"(?:model\.)?diffusion_model\.", "vae": r"(?:first_stage_model|vae)\.",
    "text_encoder": r"(?:text_encoders\.(?P<name>[^.]+)\.(?:transformer\.)?|lmm\.)",
    "connector": r"(?=(?:connector|projector)\.|meta_queries$)",
}  # fmt: skip


def names_of(kind: str, config: dict[str, Any], wanted: Collection[str], default: Names = Names()) -> Names:
    """Return how files may name the tensors `wanted` of a network of this kind. default: of kinds not in `RULES`."""
    rules = RULES[kind](config) if kind in RULES else default
    fused = {end: parts for end, parts in FUSED.items() if not any(name.endswith(end) for name in wanted)}
    return replace(rules, splits={**fused, **rules.splits})


def class_of(name: str) -> str:
    """Return diffusers' class that a config.json's _class_name means: upstream's training writes its own classes'."""
    return name.removesuffix("Wrapper")


# what training and other tools put before all names, or before some
WRAPPERS = r"(?:(?:transformer|extended_weights|module|_orig_mod)\.)*"
