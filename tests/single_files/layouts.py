"""Original layouts of weight files, made from diffusers' by rules of their own."""

from __future__ import annotations

import re

import torch
from safetensors.torch import load_file, save_file

from tests import factory

WEIGHTS = factory.WEIGHTS


def comfy_z_image(tensors):
    """Fused attention, the authors' names, ComfyUI's container, and a norm that nothing reads."""
    out = {"model.diffusion_model.norm_final.weight": torch.ones(factory.DIM)}
    for name, tensor in tensors.items():
        if ".attention.to_q." in name:
            tensor = torch.cat([tensors[name.replace("to_q", f"to_{x}")] for x in "qkv"])
            name = name.replace("to_q", "qkv")
        elif re.search(r"attention\.to_[kv]\.", name):
            continue
        for new, old in (("all_x_embedder.2-1.", "x_embedder."), ("all_final_layer.2-1.", "final_layer."),
                         ("attention.to_out.0.", "attention.out."), ("attention.norm_q.", "attention.q_norm."),
                         ("attention.norm_k.", "attention.k_norm.")):  # fmt: skip
            name = name.replace(new, old)
        out["model.diffusion_model." + name] = tensor
    return out


def ldm_vae(tensors, levels=3):
    out = {}
    for name, tensor in tensors.items():
        if "attentions.0.to_" in name and name.endswith("weight"):
            tensor = tensor[..., None, None]
        name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        for new, old in (("down_blocks.", "down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
                         (".upsamplers.0.", ".upsample."), ("conv_shortcut", "nin_shortcut"),
                         ("conv_norm_out", "norm_out"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
                         ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
                         ("mid_block.attentions.0.to_", "mid.attn_1.")):  # fmt: skip
            name = name.replace(new, old)
        out[name] = tensor.contiguous()
    return out


LAYERS = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
          "conv_shortcut": "shortcut"}  # fmt: skip


def wan_vae(tensors, per_level=3):
    out = {}
    for name, tensor in tensors.items():
        name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.",
                      lambda m: f"decoder.upsamples.{int(m[1]) * per_level + int(m[2])}.", name)  # fmt: skip
        name = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.",
                      lambda m: f"decoder.upsamples.{(int(m[1]) + 1) * per_level - 1}.", name)  # fmt: skip
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"middle.{2 * int(m[1])}.", name)
        for new, old in (("mid_block.attentions.0.", "middle.1."), ("encoder.down_blocks.", "encoder.downsamples."),
                         ("coder.conv_in.", "coder.conv1."), ("coder.conv_out.", "coder.head.2."),
                         ("coder.norm_out.", "coder.head.0."), ("post_quant_conv.", "conv2."),
                         ("quant_conv.", "conv1.")):  # fmt: skip
            name = name.replace(new, old)
        parts = name.split(".")
        inside = "middle" in parts or "upsamples" in parts or "downsamples" in parts
        out[".".join(LAYERS.get(p, p) if inside else p for p in parts)] = tensor
    return out


def written(folder, part):
    return load_file(folder / part / WEIGHTS)


def to_file(path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def fuse(tensors, merged, *parts):
    """Stack `parts` of every module into `merged`, as names' last components but the leaf."""
    out = dict(tensors)
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if module.endswith("." + parts[0]):
            stem = module.removesuffix(parts[0])
            each = [f"{stem}{part}.{leaf}" for part in parts]
            if all(key in out for key in each):
                out[f"{stem}{merged}.{leaf}"] = torch.cat([out.pop(key) for key in each])
    return out


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], v) for k, v in b.items())
