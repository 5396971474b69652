"""Plans: counted work against closed forms, the roofline, and what is printed."""

from __future__ import annotations

import json

import pytest
import torch

from tests.factory import TRANSFORMER, make_model
from tests.qwen_image_factory import SMALL
from twinflow_rt.errors import CheckpointError
from twinflow_rt.loading import load
from twinflow_rt.models.transformers.qwen_image import QwenImageTransformer
from twinflow_rt.models.transformers.z_image import ZImageConfig, ZImageTransformer, pad_length
from twinflow_rt.plan import Plan
from twinflow_rt.planning.footprint import work_of
from twinflow_rt.planning.parameters import group_parameters
from twinflow_rt.planning.roofline import CEILINGS, Ceiling, StageWork, duration

HEIGHT, WIDTH, PROMPT = 12, 20, 40


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load(make_model(tmp_path_factory.mktemp("plan") / "m"), device="cpu", dtype="float16", nfe=2)


def counted(network, channels, width):
    """FLOPs of one evaluation and of the prompt's side."""
    with torch.device("meta"):
        latents = torch.empty(1, channels, HEIGHT, WIDTH)
        embeds = torch.empty(1, PROMPT, width)
    context = network.encode_context(embeds, (PROMPT,))
    velocity = work_of(lambda: network(latents, network.step_modulation(0), context))
    return velocity.flops, work_of(lambda: network.encode_context(embeds, (PROMPT,))).flops


def test_z_image_work_is_the_closed_form():
    """The last block: keys and values of all tokens, everything else of image tokens only."""
    config = ZImageConfig.from_dict(TRANSFORMER)
    with torch.device("meta"):
        network = ZImageTransformer(config, folded_steps=1)
    d, hidden, image = config.dim, config.hidden, HEIGHT * WIDTH // 4
    s, text = pad_length(image), pad_length(PROMPT)

    def block(tokens, rows=None):
        rows = tokens if rows is None else rows
        return 2 * tokens * 3 * d * d + 4 * rows * tokens * d + 2 * rows * (d * d + 3 * d * hidden)

    ends = 2 * image * 2 * 4 * config.in_channels * d
    layers = (config.n_layers - 1) * block(s + text) + block(s + text, image)
    expected = ends + config.n_refiner_layers * block(s) + layers
    context = 2 * PROMPT * config.cap_feat_dim * d + config.n_refiner_layers * block(text)
    assert counted(network, config.in_channels, config.cap_feat_dim) == (expected, context)


@pytest.mark.parametrize("absorbed", [False, True])
def test_qwen_image_work_is_the_closed_form(absorbed):
    with torch.device("meta"):
        network = QwenImageTransformer(SMALL, folded_steps=1, absorbed=absorbed)
    d, image = SMALL.dim, HEIGHT * WIDTH // 4
    both = image + PROMPT
    block = 2 * both * 3 * d * d + 4 * both * both * d + 2 * both * 9 * d * d
    last = 2 * both * 3 * d * d + 4 * image * both * d + 2 * image * 9 * d * d
    ends = 2 * image * 2 * SMALL.in_channels * d
    expected = ends + (SMALL.num_layers - 1) * block + last, 2 * PROMPT * SMALL.joint_attention_dim * d
    assert counted(network, SMALL.out_channels, SMALL.joint_attention_dim) == expected


def test_traffic_is_what_products_read_and_write():
    """Weights apart, expanded operands once, attention without its scores, whatever runs between left out."""
    with torch.device("meta"):
        linear, conv, x = torch.nn.Linear(8, 6), torch.nn.Conv2d(3, 5, 3, padding=1), torch.empty(2, 7, 8)
        image, q, k = torch.empty(1, 3, 4, 4), torch.empty(1, 2, 9, 8), torch.empty(1, 1, 10, 8)

    def run():
        y = linear(x.sin()).relu()
        torch.nn.functional.scaled_dot_product_attention(q, *[k.expand(1, 2, 10, 8)] * 2)
        return y, conv(image)

    work = work_of(run, [*linear.parameters(), *conv.parameters()], [linear.weight])
    products = 2 * 14 * 8 * 6, 2 * 2 * 9 * 10 * 16, 2 * 16 * 5 * 3 * 9
    assert (work.flops, work.eight_bit_flops) == (sum(products), products[0])
    assert work.moved == 4 * (14 * (8 + 6) + (2 * 2 * 9 * 8 + 2 * 10 * 8) + 16 * (3 + 5))
    assert work_of(run).moved == work.moved + sum(p.nbytes for m in (linear, conv) for p in m.parameters())


def test_layers_of_8_bits_are_told_apart(tmp_path):
    folder = make_model(tmp_path / "m")
    plain, narrow = (load(folder, device="cpu", **how) for how in ({}, {"precision": "int8", "text_precision": "int8"}))
    for before, after in zip(plain.plan.stages, narrow.plan.stages, strict=True):
        assert (before.flops, before.activation_bytes) == (after.flops, after.activation_bytes)
        assert not before.eight_bit_flops and after.eight_bit_flops <= after.flops
        assert bool(after.eight_bit_flops) is (after.name in ("text", "velocity"))
        assert after.weight_bytes <= before.weight_bytes
    assert "h200 unknown" in str(narrow.plan) and "h200 unknown" not in str(plain.plan)


def test_a_stage_takes_what_the_slower_of_work_and_traffic_takes():
    ceiling = Ceiling(flops=1e12, bandwidth=1e9)
    assert StageWork("a", flops=2 * 10**12, weight_bytes=10**9).seconds(ceiling) == 2.0
    assert StageWork("b", flops=10**12, weight_bytes=3 * 10**9).seconds(ceiling) == 3.0
    assert StageWork("c", flops=10**12, weight_bytes=10**9, activation_bytes=4 * 10**9).seconds(ceiling) == 5.0
    narrow = StageWork("d", flops=4 * 10**12, weight_bytes=10**9, eight_bit_flops=3 * 10**12)
    assert narrow.seconds(ceiling) is None and duration(None) == "unknown"
    assert [duration(t) for t in (0.0123, 1.5)] == ["12.3 ms", "1.5 s"]
    assert narrow.seconds(Ceiling(1e12, 1e9, eight_bit=2e12)) == 2.5


def test_everything_is_printed(pipe):
    text, plan = str(pipe.plan), pipe.plan
    assert f"parameters   {plan.parameters_before / 1e3:.2f}K -> {plan.parameters_after / 1e3:.2f}K" in text
    assert f"bytes        {plan.bytes_before / 1e6:.2f} MB -> {plan.bytes_after / 1e6:.2f} MB" in text
    assert "constants    tables of 2 row(s)" in text and "schedule     (0.999023, 0) " in text
    assert all(name in text for name in plan.folded)
    for choice in plan.choices:
        assert f"op           {choice.op:<20} {choice.chosen}" in text
    refused = [c for c in plan.choices if c.refused]
    assert refused  # the native kernels do not store float16
    assert all(f"not {name}: {reason}" in text for c in refused for name, reason in c.refused)
    for stage in plan.stages:
        line = next(line for line in text.splitlines() if line.startswith(f"stage        {stage.name}"))
        assert f"{stage.flops / 1e9:,.2f} GFLOP  {stage.weight_bytes / 1e6:.2f} MB of weights" in line
        assert f"{stage.activation_bytes / 1e6:.2f} MB of activations" in line
        assert all(f"{name} {stage.seconds(c) * 1e3:.3g} ms" in line for name, c in CEILINGS.items())
    loads = [line for line in text.splitlines() if "loaded in" in line]
    assert [line.split()[1] for line in loads] == ["transformer", "text_encoder", "vae"]
    assert all("MB read" in line and "host memory rose by" in line for line in loads)


def test_plans_survive_json(pipe):
    plan = pipe.plan
    raw = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(raw) == plan
    for change in ({"schema": 1}, {"more": 0}):
        with pytest.raises(CheckpointError, match="compile again"):
            Plan.from_dict({**raw, **change})


def test_fields_have_had_other_names(pipe):
    text = json.dumps(pipe.plan.to_dict())
    old = text.replace('"skip_layers"', '"exempt"').replace('"eight_bit_flops"', '"narrow_flops"')
    assert old != text and Plan.from_dict(json.loads(old)) == pipe.plan
    with pytest.warns(DeprecationWarning, match="skip_layers"):
        assert pipe.plan.exempt == pipe.plan.skip_layers


def test_parameters_are_grouped_by_what_they_are():
    names = ("a.0.mod.weight", "a.1.mod.bias", "a.0.norm_q.weight", "a.1.norm2.weight", "norm_out.linear.weight")
    sizes = dict(zip(names, (3, 4, 5, 6, 7), strict=True))
    assert group_parameters(sizes) == {"a.mod": 7, "norm weights": 11, "norm_out.linear": 7}
