"""Names of original layouts, against diffusers' converters."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from tests import factory, qwen_image_factory
from tests.single_files.layouts import comfy_z_image, ldm_vae, same, to_file, wan_vae, written
from twinflow_rt.checkpoint import names
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.layout import Layout
from twinflow_rt.checkpoint.names import Key
from twinflow_rt.checkpoint.tensor_files import open_file
from twinflow_rt.single_files.networks import Converted


def ours(rules, tensors):
    """Names and tensors by our rules alone."""
    out = {}
    for key, tensor in tensors.items():
        targets = rules.targets(key)
        tensor = torch.cat(tensor.chunk(2)[::-1]) if rules.swapped(key) else tensor
        for target, part in zip(targets, tensor.chunk(max(len(targets), 1)), strict=False):
            out[target] = part.squeeze() if rules.matrices and re.search(rules.matrices, target) else part
    return out


def test_z_image_names_equal_diffusers(z_image):
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as theirs

    original = comfy_z_image(written(z_image, "transformer"))
    bare = {k.removeprefix("model.diffusion_model."): v for k, v in original.items()}
    same(ours(names.z_image({}), bare), theirs(dict(original)))


def test_ldm_names_equal_diffusers():
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint as theirs

    vae = AutoencoderKL(**{**factory.VAE, "use_quant_conv": True, "use_post_quant_conv": True})
    original = ldm_vae(vae.state_dict())
    same(ours(names.ldm_autoencoder(vae.config), original), theirs(dict(original), vae.config))


def test_wan_names_equal_diffusers():
    """Of a VAE with the released number of layers; diffusers' table holds for no other."""
    from diffusers import AutoencoderKLQwenImage
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers as theirs

    config = {**qwen_image_factory.VAE, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4]}
    original = wan_vae(AutoencoderKLQwenImage(**config).state_dict(), per_level=4)
    same(ours(names.wan_autoencoder(config), original), theirs(dict(original)))


def shapes(text):
    """Random tensors of the names in `text`: "name rows [columns]", {i} for each of two blocks, + for a layer's weight
    and a bias of as many rows."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, *size in (entry.split() for entry in text.split(",")):
        rows, *columns = map(int, size)
        leaves = {".weight": (rows, *columns), ".bias": (rows,)} if name.endswith("+") else {"": (rows, *columns)}
        for i in range(2 if "{i}" in name else 1):
            for leaf, shape in leaves.items():
                out[name.removesuffix("+").format(i=i) + leaf] = torch.randn(shape, generator=generator)
    return out


SD3 = """pos_embed 1 4 8, x_embedder.proj+ 8 2 2, t_embedder.mlp.0+ 8 4, t_embedder.mlp.2+ 8 8, y_embedder.mlp.0+ 8 4,
y_embedder.mlp.2+ 8 8, context_embedder+ 8 6, joint_blocks.{i}.x_block.attn.qkv+ 24 8,
joint_blocks.{i}.x_block.attn.ln_q.weight 4, joint_blocks.{i}.x_block.attn.ln_k.weight 4,
joint_blocks.{i}.x_block.attn.proj+ 8 8, joint_blocks.0.x_block.attn2.qkv+ 24 8,
joint_blocks.0.x_block.attn2.ln_q.weight 4, joint_blocks.0.x_block.attn2.ln_k.weight 4,
joint_blocks.0.x_block.attn2.proj+ 8 8, joint_blocks.{i}.x_block.adaLN_modulation.1+ 48 8,
joint_blocks.{i}.x_block.mlp.fc1+ 32 8, joint_blocks.{i}.x_block.mlp.fc2+ 8 32,
joint_blocks.{i}.context_block.attn.qkv+ 24 8, joint_blocks.{i}.context_block.attn.ln_q.weight 4,
joint_blocks.{i}.context_block.attn.ln_k.weight 4, joint_blocks.0.context_block.attn.proj+ 8 8,
joint_blocks.{i}.context_block.adaLN_modulation.1+ 16 8, joint_blocks.0.context_block.mlp.fc1+ 32 8,
joint_blocks.0.context_block.mlp.fc2+ 8 32, final_layer.linear+ 4 8, final_layer.adaLN_modulation.1+ 16 8"""

SANA = """pos_embed 1 4 8, x_embedder.proj+ 8 2 1 1, t_embedder.mlp.0+ 8 4, t_embedder.mlp.2+ 8 8, t_block.1+ 48 8,
y_embedder.y_embedding 3 6, y_embedder.y_proj.fc1+ 8 6, y_embedder.y_proj.fc2+ 8 8, attention_y_norm.weight 8,
blocks.{i}.scale_shift_table 6 8, blocks.{i}.attn.qkv.weight 24 8, blocks.{i}.attn.proj+ 8 8,
blocks.{i}.cross_attn.q_linear+ 8 8, blocks.{i}.cross_attn.kv_linear+ 16 8, blocks.{i}.cross_attn.proj+ 8 8,
blocks.{i}.mlp.inverted_conv.conv+ 40 8 1 1, blocks.{i}.mlp.depth_conv.conv+ 40 1 3 3,
blocks.{i}.mlp.point_conv.conv.weight 8 20 1 1, final_layer.linear+ 4 8, final_layer.scale_shift_table 2 8"""


FLUX2 = """img_in.weight 8 4, txt_in.weight 8 6, time_in.in_layer.weight 8 4, time_in.out_layer.weight 8 8,
double_stream_modulation_img.lin.weight 48 8, double_stream_modulation_txt.lin.weight 48 8,
single_stream_modulation.lin.weight 24 8, final_layer.linear.weight 4 8, final_layer.adaLN_modulation.1.weight 16 8,
double_blocks.{i}.img_attn.qkv.weight 24 8, double_blocks.{i}.txt_attn.qkv.weight 24 8,
double_blocks.{i}.img_attn.norm.query_norm.scale 4, double_blocks.{i}.img_attn.norm.key_norm.scale 4,
double_blocks.{i}.txt_attn.norm.query_norm.scale 4, double_blocks.{i}.txt_attn.norm.key_norm.scale 4,
double_blocks.{i}.img_attn.proj.weight 8 8, double_blocks.{i}.txt_attn.proj.weight 8 8,
double_blocks.{i}.img_mlp.0.weight 48 8, double_blocks.{i}.img_mlp.2.weight 8 24,
double_blocks.{i}.txt_mlp.0.weight 48 8, double_blocks.{i}.txt_mlp.2.weight 8 24,
single_blocks.{i}.linear1.weight 72 8, single_blocks.{i}.linear2.weight 8 32,
single_blocks.{i}.norm.query_norm.scale 4, single_blocks.{i}.norm.key_norm.scale 4"""


@pytest.mark.parametrize(
    ("theirs", "rules", "original"),
    [
        ("convert_sd3_transformer_checkpoint_to_diffusers", names.sd3({"num_layers": 2}), SD3),
        ("convert_sana_transformer_to_diffusers", names.sana({}), SANA),
        ("convert_flux2_transformer_checkpoint_to_diffusers", names.flux2({}), FLUX2),
    ],
)
def test_network_names_equal_diffusers(theirs, rules, original):
    from diffusers.loaders import single_file_utils

    same(ours(rules, shapes(original)), getattr(single_file_utils, theirs)(shapes(original)))


def test_halves_are_swapped_in_the_file_written(tmp_path):
    """Stable Diffusion 3's closing norm: shift | scale becomes scale | shift."""
    file = to_file(tmp_path / "f.safetensors", shapes(SD3))
    slot = SimpleNamespace(rules=names.sd3({"num_layers": 2}), bare=lambda name: name, layout=Layout())
    stored = "final_layer.adaLN_modulation.1.weight"
    key = Key(stored, slot.rules.targets(stored), slot.rules.swapped(stored))
    network = Converted(slot)
    network.add(Checkpoint(file, files=[open_file(file)], config={}), [key])
    shift, scale = shapes(SD3)[stored].chunk(2)
    assert key.action == "swapped"
    assert torch.equal(network.get_tensor("norm_out.linear.weight"), torch.cat((scale, shift)))


@pytest.mark.parametrize(
    "rules", [names.z_image({}), names.ldm_autoencoder(factory.VAE), names.wan_autoencoder(qwen_image_factory.VAE)]
)
def test_names_that_are_diffusers_already_stay(rules, z_image, qwen):
    part, folder = ("transformer", z_image) if rules.splits else ("vae", z_image if rules.matrices else qwen)
    assert all(rules.targets(k) == (k,) for k in written(folder, part))
