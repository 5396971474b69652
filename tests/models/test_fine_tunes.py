"""TwinFlow without a second embedder, as trainers make it: SimpleTuner's sign of time, upstream's LoRA."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import flux2_factory, qwen_image_factory, sana_factory, sd3_factory, z_image_factory
from tests.factory import WEIGHTS, make_model
from tests.networks import folded, inputs, ours, relative, run, run_step
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import load

# factory, name of the embedding of signs, and of the module whose output (the last, of several) it is added to
CASES = {
    "z-image": (z_image_factory, "t_embedder.time_sign_embed", "t_embedder"),
    "qwen-image": (qwen_image_factory, "time_text_embed.time_sign_embed", "time_text_embed"),
    "sd3": (sd3_factory, "time_sign_embed", "time_text_embed"), "sana": (sana_factory, "time_sign_embed", "time_embed"),
    "flux2": (flux2_factory, "time_sign_embed", "time_guidance_embed"),
}  # fmt: skip
ARGS = {"height": 64, "width": 64, "seed": 3, "output": "latent"}


def plain(reference):
    """The tensors without a second embedder."""
    return {k: v for k, v in reference.tensors().items() if not k.startswith(reference.prefix + ".")}


@pytest.mark.parametrize("name", CASES)
def test_the_sign_of_time_is_added_where_simpletuner_adds_it(name):
    """Its first row, of positive times, whatever the target: the network's own time is t alone."""
    factory, key, owner = CASES[name]
    reference = factory.TwinFlowReference(factory.SMALL)
    args = inputs(factory.SHAPES[0], factory.SMALL)
    width = {"z-image": min(factory.SMALL.dim, 256)}.get(name, factory.SMALL.dim)
    sign = torch.randn(2, width, generator=torch.Generator().manual_seed(9)) * 0.3
    without = reference.velocity(args, 0.6)

    def add(module, given, output):
        return (*output[:-1], output[-1] + sign[0]) if isinstance(output, tuple) else output + sign[0]

    reference.network.get_submodule(owner).register_forward_hook(add)
    config = replace(factory.SMALL, twinflow=False, enable_time_sign_embed=True)
    tensors = plain(reference) | {f"{key}.weight": sign}
    expected = reference.velocity(args, 0.6)
    assert relative(without, expected) > 1e-3
    assert relative(run(ours(tensors, config), args, 0.6, 0.0), expected) < 1e-5
    assert relative(run_step(folded(tensors, config, ((1.0, 0.0), (0.6, 0.3))), args, 1), expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_upstreams_lora_sees_one_time_for_two(name):
    factory = CASES[name][0]
    reference, args = factory.TwinFlowReference(factory.SMALL), inputs(factory.SHAPES[0], factory.SMALL)
    network = ours(plain(reference), replace(factory.SMALL, twinflow=False, averaged_time=True))
    for t, tt, seen in ((0.8, 0.0, 0.8), (0.8, 0.3, 0.65), (0.8, 0.8, 0.8)):
        assert relative(run(network, args, t, tt), reference.velocity(args, seen)) < 1e-5


def change(folder, **changes):
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def test_upstreams_class_names_load(tmp_path):
    folder = make_model(tmp_path / "m")
    expected = load(folder, device="cpu")("a red square", **ARGS).images
    change(folder, _class_name="ZImageTransformer2DModelWrapper")
    assert torch.equal(load(folder, device="cpu")("a red square", **ARGS).images, expected)


def test_simpletuners_folders_load_and_are_sampled_as_twinflow(tmp_path):
    folder = make_model(tmp_path / "m", second="absent")
    file = folder / "transformer" / WEIGHTS
    tensors, sign = load_file(file), torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
    save_file(tensors | {"t_embedder.time_sign_embed.weight": sign}, file)
    change(folder, enable_time_sign_embed=True, musubi_blocks_to_swap=0, musubi_block_swap_device="cpu")
    pipe = load(folder, device="cpu")
    assert pipe.scheduler is None and pipe.program.schedule == ((1.0, 0.0),)
    made = {nfe: pipe("a red square", **ARGS, nfe=nfe).images for nfe in (1, 2)}
    saved = load(pipe.save(tmp_path / "saved"), device="cpu")
    assert torch.equal(saved("a red square", **ARGS).images, made[1])
    # row 0 inside the embedder's last bias, of a network whose second embedder is silent
    bias = "t_embedder.mlp.2.bias"
    zero = {f"t_embedder_2.{k.removeprefix('t_embedder.')}": 0 * v for k, v in tensors.items() if "t_embedder." in k}
    save_file(tensors | zero | {bias: tensors[bias] + sign[0]}, file)
    change(folder, enable_time_sign_embed=False)
    for nfe, expected in made.items():
        assert relative(load(folder, device="cpu", nfe=nfe)("a red square", **ARGS).images, expected) < 1e-5


def test_adapters_of_upstream_run_on_plain_checkpoints_by_twinflows_samplers(tmp_path):
    """As on the same checkpoint with a second embedder of zeros, which few-step mode does not ask."""
    g = torch.Generator().manual_seed(0)
    factors = {"A": torch.randn(2, 48, generator=g), "B": torch.randn(48, 2, generator=g)}
    name = "transformer.layers.0.attention.to_k"
    save_file({f"{name}.lora_{k}.weight": v for k, v in factors.items()}, tmp_path / "a.safetensors")
    plain, zero = (make_model(tmp_path / kind, second=kind) for kind in ("absent", "zero"))
    with pytest.raises(ConfigError, match="no second time embedder"):
        load(plain, device="cpu", sampler="2")("a red square", **ARGS)
    ours = load(plain, device="cpu", loras=[tmp_path / "a.safetensors"])
    theirs = load(zero, device="cpu", loras=[tmp_path / "a.safetensors"])
    assert ours.scheduler is not None
    for sampler in ("1", "2", "4"):
        got, expected = (pipe("a red square", **ARGS, sampler=sampler).images for pipe in (ours, theirs))
        assert relative(got, expected) < 1e-6
