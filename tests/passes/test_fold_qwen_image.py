"""Qwen-Image folded into tables, and absorbed into weights, against the network it came from."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factory import randomize
from tests.networks import FOUR, ONE, inputs, merge, ours, relative, run, run_step, save
from tests.qwen_image_factory import SHAPES, SMALL, TwinFlowReference
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.compile import Recipe, compile_network
from twinflow_rt.errors import ConfigError
from twinflow_rt.families import qwen_image
from twinflow_rt.models.folding import Absorption
from twinflow_rt.models.layers import EPS, Constants
from twinflow_rt.models.transformers.qwen_image import FUSED, QwenImageConfig, QwenImageTransformer
from twinflow_rt.ops import EAGER, OpTable
from twinflow_rt.passes.fold import absorb, fold, folded_away
from twinflow_rt.planning.parameters import parameter_bytes


def tables_of(weights, config, schedule):
    with torch.device("meta"):
        shell = QwenImageTransformer(config)
    return fold(shell, weights.__getitem__, schedule)


def fill(network, weights):
    wanted = network.state_dict()
    network.load_state_dict({k: v for k, v in weights.items() if k in wanted}, assign=True)
    return network.eval()


def folded(weights, config, schedule):
    network = QwenImageTransformer(config, folded_steps=len(schedule))
    return fill(network, {**weights, **tables_of(weights, config, schedule)})


def absorbed(weights, config, schedule=ONE):
    network = QwenImageTransformer(config, folded_steps=1, absorbed=True)
    taken = absorb(network.absorptions(), tables_of(weights, config, schedule), weights.__getitem__)
    return fill(network, {**weights, **{k: v.to(weights[k].dtype) for k, v in taken}})


@pytest.fixture(scope="module")
def reference():
    return TwinFlowReference()


@pytest.fixture(scope="module")
def weights(reference):
    return merge(reference.tensors(), FUSED)


WIDE = QwenImageConfig(
    in_channels=16, out_channels=4, num_layers=2, num_attention_heads=2, joint_attention_dim=20
)  # heads as released


def bfloat16_errors(config: QwenImageConfig, seed: int) -> torch.Tensor:
    """Mean square errors of one random network against float32 on the same bf16 weights and inputs,
    summed over SHAPES: unfolded, tables, absorbed, diffusers."""
    peer = TwinFlowReference(config, seed).bfloat16()
    half = peer.tensors()
    exact, plain = ours({k: v.float() for k, v in half.items()}, config), merge(half, FUSED)
    unfolded, tables, inside = ours(half, config), folded(plain, config, ONE), absorbed(plain, config)
    errors = torch.zeros(4, dtype=torch.float64)
    for shape in SHAPES:
        args = inputs(shape, config, dtype=torch.bfloat16)
        truth = run(exact, args.to(torch.float32), 1.0, 0.0)
        outs = (
            run(unfolded, args, 1.0, 0.0), run_step(tables, args, 0), run_step(inside, args, 0),
            peer.velocity(args, 1.0, 0.0),
        )  # fmt: skip
        assert all(out.dtype == torch.bfloat16 for out in outs)
        errors += torch.stack([(out.double() - truth).square().mean() for out in outs])
    return errors


@pytest.mark.parametrize(("config", "networks"), [(SMALL, 6), (WIDE, 2)], ids=["narrow", "wide"])
def test_bfloat16_errors_of_all_layouts(config, networks):
    """Over several networks. Tables round nothing more than the unfolded network does; absorbing
    rounds scale * weight anew, which costs some percent (more in narrow networks), and stays well
    below the error of diffusers' own bf16 network."""
    errors = torch.stack([bfloat16_errors(config, seed) for seed in range(networks)]).sum(0).sqrt()
    unfolded, tables, inside, diffusers = errors.tolist()
    assert tables <= 1.01 * unfolded
    assert inside <= 1.1 * unfolded
    assert inside <= 0.95 * diffusers


def block_outputs(network, modulation, image, prompt):
    """Each block's residual streams (image, and prompt where there is one), all from the same input."""
    following = (*modulation.blocks[1:], (modulation.final, None))
    rope = network._rope(4, 6, prompt.shape[1], image.device)
    with torch.no_grad():
        for block, now, after in zip(network.transformer_blocks, modulation.blocks, following, strict=True):
            streams = [
                (x, network.ops.layer_norm(x, c.scale_a, EPS, c.shift_a))
                for x, c in zip((image, prompt), now, strict=True)
            ]
            out = block(*streams, now, after, rope, None, network.ops)
            yield [stream[0].double() for stream in out if stream is not None]


@pytest.mark.parametrize(("config", "networks"), [(SMALL, 6), (WIDE, 2)], ids=["narrow", "wide"])
def test_each_block_in_bfloat16_is_as_exact_as_unfolded(config, networks):
    """Mean square errors per block and stream, over several networks."""
    times, errors = (torch.ones(1), torch.zeros(1)), 0
    for seed in range(networks):
        half = {k: v.bfloat16() for k, v in randomize(QwenImageTransformer(config), seed).state_dict().items()}
        exact = fill(QwenImageTransformer(config), {k: v.float() for k, v in half.items()})
        unfolded, inside = fill(QwenImageTransformer(config), half), absorbed(half, config)
        g = torch.Generator().manual_seed(seed)
        image, prompt = (torch.randn(2, n, config.dim, generator=g).bfloat16() for n in (24, 9))
        with torch.no_grad():
            runs = (
                block_outputs(exact, exact.modulate(*times), image.float(), prompt.float()),
                block_outputs(inside, inside.step_modulation(0), image, prompt),
                block_outputs(unfolded, unfolded.modulate(*times), image, prompt),
            )
            errors = errors + torch.tensor([
                [(out - truth).square().mean() for out in outs]
                for block in zip(*runs, strict=True) for truth, *outs in zip(*block, strict=True)
            ])  # fmt: skip
    assert len(errors) == 2 * config.num_layers - 1
    assert (errors[:, 0].sqrt() <= 1.1 * errors[:, 1].sqrt()).all(), errors.sqrt()


def test_absorbed_network_has_no_constants_left(weights):
    """No modulation tensor in the module, and none in any op it calls."""
    network = absorbed(weights, SMALL)
    assert not list(network.buffers())
    assert not [n for n, _ in network.named_parameters() if "_mod" in n or "norm_out" in n or "time" in n]
    extras = []

    def spied(name, op):
        def call(*args):
            if name == "layer_norm":
                extras.extend((args[1], args[3]))
            if name == "residual_layer_norm":
                extras.extend(args[2:5])
            return op(*args)

        return call

    network.ops = OpTable(**{f.name: spied(f.name, getattr(EAGER, f.name)) for f in fields(OpTable)})
    run_step(network, inputs(SHAPES[0], SMALL), 0)
    # two opening norms; per block two closings per stream, but for the last one's prompt
    assert len(extras) == 2 * 2 + 3 * (4 * SMALL.num_layers - 2)
    assert all(value is None for value in extras)
    assert all(c == Constants() for pair in network.step_modulation(0).blocks for c in pair)


def test_absorb_is_the_layer_between_its_constants():
    """gate * (W (scale * x + shift) + b) in float64, for every combination of rows."""
    g = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*s, generator=g) for s in ((7, 7), (7,), (5, 7)))
    table = torch.randn(1, 3, 7, generator=g)
    for mask in range(8):
        rows = {name: i if mask >> i & 1 else None for i, name in enumerate(("shift", "scale", "gate"))}
        shift, scale, gate = (
            table[0, i].double() if mask >> i & 1 else torch.full((7,), float(i > 0)).double() for i in range(3)
        )
        read = {"at.weight": weight.bfloat16(), "at.bias": bias.bfloat16()}
        out = dict(absorb({"at": Absorption("t", **rows)}, {"t": table}, read.__getitem__))
        w, b = (read[k].double() for k in read)
        expected = gate * ((scale * x.double() + shift) @ w.T + b)
        assert out["at.weight"].dtype == out["at.bias"].dtype == torch.float32
        assert relative(x.double() @ out["at.weight"].double().T + out["at.bias"].double(), expected) < 1e-6


def test_several_steps_cannot_be_absorbed(weights):
    with pytest.raises(ConfigError, match="constants of 4 steps cannot be absorbed"):
        QwenImageTransformer(SMALL, folded_steps=4, absorbed=True)
    network = QwenImageTransformer(SMALL, folded_steps=1, absorbed=True)
    with pytest.raises(ConfigError, match="proj_out cannot absorb the constants of 4 steps"):
        next(absorb(network.absorptions(), tables_of(weights, SMALL, FOUR), weights.__getitem__))


def test_modulation_layers_are_never_resident_together(weights):
    with torch.device("meta"):
        shell = QwenImageTransformer(SMALL)
    resident, read_names = [], []

    def read(name):
        resident.append({n for n, p in shell.named_parameters() if not p.is_meta} | {name})
        read_names.append(name)
        return weights[name]

    fold(shell, read, FOUR)
    owners = [{n.partition("_mod.")[0] if "_mod." in n else n.partition(".")[0] for n in s} for s in resident]
    assert all(len(who) == 1 or who == {"time_text_embed", "time_text_embed_2"} for who in owners)
    assert len(read_names) == len(set(read_names))  # each parameter is read once
    network = QwenImageTransformer(SMALL, folded_steps=4)
    assert {n for n in folded_away(shell, network) if "to_add_out" not in n and "txt_mlp" not in n} == set(read_names)


@pytest.fixture
def source(reference, tmp_path):
    return Checkpoint(save(tmp_path / "model" / "transformer", reference.tensors(), SMALL))


def compiled(source, schedule, **options):
    return compile_network(Recipe(source, qwen_image(), torch.device("cpu"), torch.float32, **options), schedule)


def test_one_evaluation_is_absorbed_and_others_refold(reference, source):
    """Absorbed -> absorbed at another time -> tables -> one table row; each equals diffusers."""
    program, args = compiled(source, ONE), inputs(SHAPES[-1], SMALL)
    for schedule, absorbed in ((ONE, True), (((0.5, 0.5),), True), (FOUR, False), (ONE, False)):
        program.refold(schedule)
        assert program.network.absorbed == program.plan.absorbed == absorbed and program.plan.schedule == schedule
        for step, times in enumerate(schedule):
            assert relative(run_step(program.network, args, step), reference.velocity(args, *times)) < 1e-5
        assert program.plan.bytes_after == parameter_bytes(program.network)
    assert "img_mod" in str(program.plan) and "txt_mod" in str(program.plan)
    assert "constants    tables of 1 row(s)" in str(program.plan)
    assert "constants    inside the weights" in str(compiled(source, ONE).plan)


def test_the_plan_tells_folded_from_pruned(source):
    plan, dim = compiled(source, ONE).plan, SMALL.dim
    gone = plan.parameters_before - plan.parameters_after
    assert gone == sum(plan.folded.values()) + sum(plan.pruned.values())
    assert plan.folded["transformer_blocks.txt_mod"] == SMALL.num_layers * 6 * (dim + 1) * dim
    # of the last block's prompt stream only keys and values are read
    dead = ("attn.to_add_out", "txt_mlp.net.proj", "txt_mlp.net")
    assert set(plan.pruned) == {f"transformer_blocks.{name}" for name in dead}
    assert plan.pruned["transformer_blocks.attn.to_add_out"] == (dim + 1) * dim


@pytest.mark.parametrize("schedule", [ONE, FOUR])
def test_every_tensor_is_read_once(source, schedule, monkeypatch):
    """And the last block's dead prompt layers never."""
    read, get = [], Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda *args, **kwargs: read.append(args[1]) or get(*args, **kwargs))
    compiled(source, schedule)
    dead = tuple(f"transformer_blocks.{SMALL.num_layers - 1}.{n}" for n in ("attn.to_add_out", "txt_mlp"))
    assert sorted(read) == sorted(name for name in source if not name.startswith(dead))


def test_absorbing_can_be_declined(source):
    program = compiled(source, ONE, absorb=False)
    assert not program.plan.absorbed and not program.network.absorbed


def test_absorbed_weights_are_rounded_once(source):
    half, exact = (
        compile_network(Recipe(source, qwen_image(), torch.device("cpu"), dtype), ONE).network.state_dict()
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert all(torch.equal(tensor, exact[name].to(tensor.dtype)) for name, tensor in half.items())


def test_a_failed_recompilation_is_made_good(source, monkeypatch):
    """The old network is gone by then; the next call that needs one compiles it."""
    program = compiled(source, ONE)
    expected = program.network.state_dict()
    monkeypatch.setattr(Checkpoint, "get", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        program.refold(FOUR)
    monkeypatch.undo()
    program.refold(ONE)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in program.network.state_dict().items())


def test_full_size_keeps_at_most_13_65_billion():
    from diffusers import QwenImageTransformer2DModel

    def count(module):
        return sum(p.numel() for p in module.parameters())

    config = QwenImageConfig()
    with torch.device("meta"):
        full, peer = QwenImageTransformer(config), QwenImageTransformer2DModel()
        tables, inside = (QwenImageTransformer(config, folded_steps=1, absorbed=a) for a in (False, True))
    assert count(full.time_text_embed_2) == 10_229_760
    assert count(full) - count(full.time_text_embed_2) == count(peer) == 20_430_401_088
    assert count(full) == 20_440_630_848
    assert sum(count(b.img_mod) + count(b.txt_mod) for b in full.transformer_blocks) == 6_796_984_320
    assert count(tables) == count(inside) == 13_519_353_408 <= 13.65e9
    assert sum(b.numel() for b in tables.buffers()) == (60 * 12 + 2) * 3072
    assert not list(inside.buffers())
    assert sum(folded_away(full, tables).values()) == count(full) - count(tables)


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 3), axes=st.tuples(*[st.integers(1, 3)] * 3), layers=st.integers(1, 3),
    times=st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_network_folds_and_absorbs(heads, axes, layers, times, lengths, seed):
    config = QwenImageConfig(
        in_channels=8, out_channels=2, num_layers=layers, num_attention_heads=heads, joint_attention_dim=5,
        attention_head_dim=2 * sum(axes), axes_dims_rope=tuple(2 * a for a in axes),
    )  # fmt: skip
    network = randomize(QwenImageTransformer(config), seed)
    weights, args = network.state_dict(), inputs((4, 6, tuple(lengths)), config)
    program = folded(weights, config, times)
    for step, pair in enumerate(times):
        assert relative(run_step(program, args, step), run(network, args, *pair)) < 1e-5
    assert relative(run_step(absorbed(weights, config, times[:1]), args, 0), run(network, args, *times[0])) < 1e-5
