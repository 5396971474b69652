"""How files that are not in diffusers' layout name a network's tensors.

The rules are facts about released files: the single files of ComfyUI and of the models' authors (for
networks), LDM's names (for the VAE of Stable Diffusion 3 and Z-Image), Wan's (for Qwen-Image's VAE).
Names that no rule changes stay, so files that already have diffusers' names pass through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Rename = tuple[str, str | Callable[[re.Match], str]]  # as for re.sub


@dataclass(frozen=True)
class Names:
    """renames: applied in order, each to the result of those before. splits: end of a merged tensor's
    name -> ends of its parts, in row order. drops: names that diffusers' network does not have, as
    regular expressions. matrices: names whose 1x1 convolutions are matrices in diffusers' network."""

    renames: tuple[Rename, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
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


def z_image(config: dict[str, Any]) -> Names:
    """The network as its authors and ComfyUI store it."""
    return Names(
        (
            (r"^x_embedder\.", "all_x_embedder.2-1."),
            (r"^final_layer\.", "all_final_layer.2-1."),
            (r"\.attention\.out\.", ".attention.to_out.0."),
            (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
        ),
        {".attention.qkv.weight": tuple(f".attention.to_{x}.weight" for x in "qkv")},
        (r"^norm_final\.weight$",),
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
            (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        ),
        matrices=r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$",
    )


def wan_autoencoder(config: dict[str, Any]) -> Names:
    """AutoencoderKLQwenImage in Wan's names: blocks numbered in sequence, layers by their place in it."""
    per_level = config["num_res_blocks"] + 2  # of the decoder: resnets, then an upsampling

    def up(match: re.Match) -> str:
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


def unchanged(config: dict[str, Any]) -> Names:
    """Files whose names are diffusers' or transformers' own."""
    return Names()


# by _class_name or model_type of config.json
RULES: dict[str, Callable[[dict[str, Any]], Names]] = {
    "ZImageTransformer2DModel": z_image,
    "AutoencoderKL": ldm_autoencoder,
    "AutoencoderKLQwenImage": wan_autoencoder,
}

# what single files with several networks put before the names of each
CONTAINERS = {
    "transformer": (r"model\.diffusion_model\.", r"diffusion_model\."),
    "vae": (r"first_stage_model\.", r"vae\."),
    "text_encoder": (r"text_encoders\.[^.]+\.transformer\.", r"text_encoders\.[^.]+\.", r"cond_stage_model\."),
}
