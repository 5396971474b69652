"""Weights of 4 bits in whole networks: folded beside them, read from files' own blocks, saved, streamed, exported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests import gguf_factory, qwen_image_factory, sana_factory, sd3_factory, z_image_factory
from tests.factory import WEIGHTS, make_model
from tests.networks import ONE, family, inputs, relative, run_step, save
from twinflow_rt import load
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.checkpoint.fuse import sources
from twinflow_rt.checkpoint.lora import Merged
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.ops.int4 import dense
from twinflow_rt.passes.layers import KINDS, QuantizedLinear

CPU = torch.device("cpu")
HEADS = {"attention_head_dim": 32, "num_attention_heads": 2}
SANA = {**HEADS, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
FAMILIES = {  # whose layers have inputs in groups of 64
    "z-image": (z_image_factory, replace(
        z_image_factory.SMALL, dim=192, n_layers=2, axes_dims=(32, 32, 32), axes_lens=(256, 32, 32)
    )),
    "qwen-image": (qwen_image_factory, replace(qwen_image_factory.SMALL, **HEADS, axes_dims_rope=(8, 12, 12))),
    "sd3": (sd3_factory, replace(sd3_factory.SMALL, **HEADS, caption_projection_dim=64)),
    "sana": (sana_factory, replace(sana_factory.SMALL, **SANA)),
    "sprint": (sana_factory, replace(sana_factory.SPRINT, **SANA)),
}  # fmt: skip


def kind_of(name):
    """Types as files mix them: layers of 4 bits with and without minimums, sensitive ones in 8."""
    return "Q8_0" if "to_out" in name or "w2" in name else "Q4_1" if "mlp" in name or "w1" in name else "Q4_0"


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A family's reference, inputs, and its checkpoint in GGUF."""
    factory, config = FAMILIES[request.param]
    reference = factory.TwinFlowReference(config)
    folder = save(tmp_path_factory.mktemp("int4") / "transformer", {}, config)
    (folder / WEIGHTS).unlink()
    gguf_factory.write(folder / "model.gguf", reference.tensors(), kind_of)
    return reference, inputs(factory.SHAPES[0], config), Checkpoint(folder), family(config)


def compiled(case, precision, **how):
    *_, checkpoint, kind = case
    return compile_network(Recipe(checkpoint, kind, CPU, torch.float32, precision=precision, **how), ONE)


def quantized(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}


def test_folding_leaves_blocks_as_they_are(case):
    """The folded network equals diffusers' unfolded one on the same weights of 4 bits, W4A16 in float32."""
    reference, args, checkpoint, kind = case
    program = compiled(case, "w4a16")
    layers = quantized(program.network)
    assert layers and {layer.kind for layer in layers.values()} == {"w4a16"} and not program.plan.absorbed
    weights = {name: checkpoint.get(name, dtype=torch.float32) for name in checkpoint}
    for name, layer in layers.items():
        parts = sources(f"{name}.weight", kind.layout.fused)
        rows = [len(weights[part]) for part in parts]
        mine = dict(zip(parts, dense(layer.int4).split(rows), strict=True))
        if layer.origin == "the file's own":  # what it stands for, but for scales in float16
            assert all(relative(mine[part], weights[part]) < 2**-9 for part in parts)
        weights |= mine
    assert {layer.origin for layer in layers.values()} >= {"the file's own"}
    second = f"{reference.prefix}."
    reference.network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(second)})
    if reference.second is not None:
        reference.second.load_state_dict({k.removeprefix(second): v for k, v in weights.items() if k.startswith(second)})
    assert relative(run_step(program.network, args, 0), reference.velocity(args, *ONE[0])) < 1e-5
