"""Every family with quantized layers: fused is what the layers do for themselves, and close to the plain network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import qwen_image_factory, sana_factory, sd3_factory
from tests.factory import randomize
from tests.networks import family, inputs, run_step
from twinflow_rt.ops import QuantizedRows, Target, select
from twinflow_rt.passes import quantize
from twinflow_rt.passes.layers import QuantizedLinear

CPU = torch.device("cpu")
SD3 = replace(sd3_factory.SMALL, attention_head_dim=24, caption_projection_dim=48)
SANA = {"attention_head_dim": 16, "cross_attention_head_dim": 24, "cross_attention_dim": 48}
FAMILIES = {  # wide enough to be quantized, and the shape whose prompts differ in length
    "qwen-image": (qwen_image_factory, qwen_image_factory.SMALL, 3),
    "sd3": (sd3_factory, SD3, 2),
    "sana": (sana_factory, replace(sana_factory.SMALL, **SANA), 3),
    "sana-sprint": (sana_factory, replace(sana_factory.SPRINT, **SANA), 3),
}
BAR = {"int8": 0.05, "fp8": 0.12}


def folded(name):
    """A network of one evaluation with random weights and constants, and one evaluation of it."""
    factory, config, shape = FAMILIES[name]
    network = randomize(family(config).network(config, folded_steps=1), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for buffer in network.buffers():
        buffer.copy_(0.5 + 0.3 * torch.randn(buffer.shape, generator=generator))
    args = inputs(factory.SHAPES[shape], config)
    return network, config, args, lambda args=args: run_step(network, args, 0)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_is_as_exact_as_layer_by_layer(name, precision):
    network, config, _, run = folded(name)
    exact = run()
    quantize.convert_layers(network, CPU, precision)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers
    reference = run()  # with the references, each layer quantizing for itself
    target = Target.of_network(config, CPU, torch.float32)
    network.ops, _ = select(target)
    choices = quantize.bind_quantized(network, target)
    given: dict[str, list[bool]] = {n: [] for n in layers}
    for n, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, x, n=n: given[n].append(isinstance(x[0], QuantizedRows)))
    got = run()
    fused = {n for n, seen in given.items() if seen and all(seen)}
    assert fused == {n for n in layers if "qkv" in n or n.split(".")[-1] in ("proj", "2")}
    assert {c.op for c in choices} >= {"linear_quantized", "layer_norm_quantized"}
    error, bar = distance(got, exact), distance(reference, exact)
    assert 1e-4 < error <= 2 * bar and bar < BAR[precision], (error, bar)


def test_rows_of_bfloat16_come_out_in_bfloat16():
    """Rows remember the storage dtype of what they were made from."""
    network, config, args, run = folded("qwen-image")
    exact = run()
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()
    quantize.convert_layers(network, CPU, "fp8")
    target = Target.of_network(config, CPU, torch.bfloat16)
    network.ops, _ = select(target)
    quantize.bind_quantized(network, target)
    got = run(args.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16 and distance(got, exact) < BAR["fp8"]
