"""The choice of a precision by what was measured here: pure on injected figures, then through files and `load`."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from tests.factory import make_model
from twinflow_rt import load
from twinflow_rt.bench.random_weights import skeleton
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.cli import main
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.families import family_of
from twinflow_rt.passes.layer_groups import Group
from twinflow_rt.plan import Plan
from twinflow_rt.planning import precision, sensitivity
from twinflow_rt.planning.memory_costs import GPU, Network, network_weights
from twinflow_rt.planning.precision import Measurement, choose

SENSITIVE = "layers.feed_forward.w2"
MADE_UP = Measurement(
    precision="int8", family="z-image", weights="w", device="a chip", torch="2", dtype="float32", budget=0.03,
    skip_layers=(), error=0.02, seconds=0.5, seconds_before=1.0, groups=(Group(SENSITIVE, 2, 10, 0.02),),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("precision") / "model")


@pytest.fixture(scope="module")
def measured(folder):
    """With half of what the worst kind costs as the budget, so that it must be left out."""
    pipe = load(folder, device="cpu", dtype="float32")
    first = sensitivity.of_pipeline(pipe, rounds=1)
    worst = first.groups[0].error
    others = sum(group.error**2 for group in first.groups[1:]) ** 0.5
    return sensitivity.of_pipeline(pipe, budget=(max(worst, others) + (worst**2 + others**2) ** 0.5) / 2, rounds=1)


@pytest.mark.parametrize(
    "change, taken",
    [
        ({}, True),
        ({"error": 0.031}, False),
        ({"seconds": 0.99}, False),  # a gain within noise is none
        ({"seconds": 1.5}, False),
        ({"budget": 0.01}, False),
    ],
)
def test_only_what_is_faster_and_accurate_is_taken(change, taken):
    found, said = choose({"int8": replace(MADE_UP, **change)})
    assert (found is not None) == taken and len(said) == 1
    assert ("not taken" in said[0]) != taken and "as fast" in said[0]


def test_the_fastest_of_several_is_taken():
    fp8 = replace(MADE_UP, precision="fp8", seconds=0.4)
    assert choose({"int8": MADE_UP, "fp8": fp8})[0] is fp8
    assert choose({"int8": MADE_UP, "fp8": replace(fp8, error=1.0)})[0] is MADE_UP
    found, said = choose({"int8": None, "fp8": None})
    assert found is None and all("not measured here" in one for one in said) and len(said) == 2
    assert choose({}) == (None, ())


def test_a_measurement_says_what_it_measured(measured, folder):
    assert measured.precision == "int8" and measured.family == "z-image" and measured.dtype == "float32"
    assert measured.weights == precision.fingerprint(Checkpoint(folder / "transformer"))
    assert measured.skip_layers == (measured.groups[0].name,) and 0 < measured.error <= 1.5 * measured.budget
    assert measured.seconds > 0 and measured.seconds_before > 0


def test_a_file_gives_exemptions_and_its_errors_to_the_plan(measured, folder, tmp_path):
    file = precision.save(measured, tmp_path / "int8.json")
    assert precision.read(file) == measured
    old = file.read_text().replace('"skip_layers"', '"exempt"')  # as earlier versions wrote it
    (tmp_path / "old.json").write_text(old)
    assert precision.read(tmp_path / "old.json") == measured
    pipe = load(folder, device="cpu", dtype="float32", precision="int8", skip_layers=file)
    assert pipe.plan.skip_layers == measured.skip_layers and pipe.plan.sensitivity == measured.groups
    assert f"{measured.groups[0]}  skipped" in str(pipe.plan)
    again = load(pipe.save(tmp_path / "saved"), device="cpu", skip_layers=file)
    assert again.plan.sensitivity == measured.groups and again.plan.skip_layers == measured.skip_layers
    pipe("a red square", nfe=2, height=16, width=24, seed=0)  # compiled again, from the checkpoint
    assert pipe.plan.sensitivity == measured.groups
    with pytest.raises(ConfigError, match="measured for precision int8, not fp8"):
        load(folder, device="cpu", precision="fp8", skip_layers=file)


def test_auto_reads_what_was_measured_here(measured, folder):
    options = {"device": "cpu", "dtype": "float32", "precision": "auto"}
    plan = load(folder, **options).plan
    assert plan.precision is None and any("int8 was not measured here" in note for note in plan.notes)
    assert not any("fp8" in note for note in plan.notes)  # a CPU emulates it: never a gain
    precision.save(replace(measured, seconds=1.0, seconds_before=2.0, error=0.0))
    plan = load(folder, **options).plan
    assert plan.precision == "int8" and plan.skip_layers == measured.skip_layers and plan.sensitivity == measured.groups
    assert any("2.00x as fast" in note for note in plan.notes)
    precision.save(replace(measured, seconds=2.0, seconds_before=1.0))
    plan = load(folder, **options).plan
    assert plan.precision is None and any("not taken" in note for note in plan.notes)
    assert load(folder, device="cpu", dtype="float32").plan.precision is None  # nothing asked, nothing looked up
    with pytest.raises(ConfigError, match="leave skip_layers"):
        load(folder, skip_layers=["w2"], **options)


def reload(folder):
    return lambda dtype: load(folder, device="cpu", dtype=dtype)


@pytest.fixture
def native_bfloat16(monkeypatch):
    """A CPU that says it multiplies bfloat16; one that does not takes its time over it."""
    flags = {**torch.cpu.get_capabilities(), "avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)


def test_auto_takes_bfloat16_where_it_measured_faster(folder, tmp_path, native_bfloat16):
    pipe = load(folder, device="cpu", dtype="float32")
    found = sensitivity.of_bfloat16(pipe, reload(folder), rounds=1)
    assert found.precision == "bf16" and found.dtype == "float32" and not found.skip_layers and not found.groups
    assert 0 < found.error < 0.03
    assert precision.read(precision.save(found, tmp_path / "bf16.json")) == found
    precision.save(replace(found, seconds=1.0, seconds_before=2.0))
    auto = load(folder, device="cpu", precision="auto")
    stored = auto.program.recipe.source.main_dtype()
    assert stored == torch.float32 and auto.dtype == torch.bfloat16 and auto.plan.dtype == "bfloat16"
    assert any("bf16 measured 2.00x as fast" in note for note in auto.plan.notes)
    assert {p.dtype for p in auto.program.network.parameters()} >= {torch.bfloat16}
    assert load(folder, device="cpu", precision="auto", dtype="float32").dtype == torch.float32  # asked for
    assert load(folder, device="cpu").dtype == torch.float32  # the default stays the checkpoint's
    precision.save(replace(found, seconds=1.0, seconds_before=2.0, error=0.1))
    assert load(folder, device="cpu", precision="auto").dtype == torch.float32
    with pytest.raises(ConfigError, match="against float32"):
        sensitivity.of_bfloat16(load(folder, device="cpu", dtype="bfloat16"), reload(folder))


def test_bfloat16_is_no_choice_where_it_is_emulated(folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    pipe = load(folder, device="cpu")
    with pytest.raises(ConfigError, match="only emulates bfloat16"):
        sensitivity.of_bfloat16(pipe, reload(folder))
    _, said = precision.automatic(Checkpoint(folder / "transformer"), pipe.device, pipe.dtype, free=True)
    assert not any("bf16" in one for one in said)


def test_measurements_hold_for_one_machine_and_dtype(measured, folder, monkeypatch):
    precision.save(measured)
    here = Checkpoint(folder / "transformer"), torch.device("cpu")
    assert not any("was not measured" in said for said in precision.automatic(*here, torch.float32)[1])
    assert "was not measured" in precision.automatic(*here, torch.bfloat16)[1][0]
    monkeypatch.setattr(precision, "device_name", lambda device: "another chip")
    assert "was not measured" in precision.automatic(*here, torch.float32)[1][0]


@pytest.mark.parametrize(
    "change, reason",
    [({"schema": 2}, "newer"), ({"precision": "int2"}, "none of int8, fp8, int4, bf16"),
     ({"error": "small"}, "measure again"), ({"more": 1}, "measure again")],
)  # fmt: skip
def test_other_files_are_refused(measured, tmp_path, change, reason):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({**measured.to_dict(), **change}))
    with pytest.raises(ConfigError, match=reason):
        precision.read(file)
    with pytest.raises(ConfigError, match="sensitivity"):
        precision.read(tmp_path / "absent.json")


def test_measurements_of_another_network_are_refused(measured, folder, tmp_path):
    wrong = replace(measured, groups=(replace(measured.groups[0], layers=99),))
    file = precision.save(wrong, tmp_path / "wrong.json")
    with pytest.raises(ConfigError, match="of another network: it has 99 layers"):
        load(folder, device="cpu", precision="int8", skip_layers=file)
    with pytest.raises(ConfigError, match="no linear layer is called nothing_like_it"):
        load(folder, device="cpu", precision="int8", skip_layers=["nothing_like_it"])


def test_plans_of_newer_versions_are_refused(folder):
    raw = load(folder, device="cpu").plan.to_dict()
    with pytest.raises(CheckpointError, match="newer than this version"):
        Plan.from_dict({**raw, "schema": raw["schema"] + 1})


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the list of users, as containers have."""
    import pwd

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.skipif(os.name == "nt", reason="users of Unix")
def test_without_a_home_nothing_was_measured_and_saving_asks_for_a_name(homeless, folder, tmp_path, capsys):
    notes = load(folder, device="cpu", precision="auto").plan.notes
    assert any("set HOME or XDG_CACHE_HOME" in note for note in notes)
    assert main(["sensitivity", "demo", "--device", "cpu", "--save"]) == 2
    assert "name a file (--save FILE)" in capsys.readouterr().err


def test_targets_are_checked_before_anything_is_measured(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("twinflow_rt.cli.sensitivity.load_model", None)  # nothing is loaded
    for save, why in (["--save"], "Not a directory"), (["--save", str(tmp_path / "no" / "f.json")], "does not exist"):
        assert main(["sensitivity", str(folder), *save]) == 2
        assert why in capsys.readouterr().err


def test_from_the_command_line(folder, tmp_path, capsys):
    file, image = tmp_path / "int8.json", tmp_path / "out.png"
    arguments = ["sensitivity", str(folder), "--device", "cpu", "--dtype", "float32"]
    assert main([*arguments, "--budget", "1", "--save", str(file)]) == 0
    assert SENSITIVE in (out := capsys.readouterr().out) and "as fast" in out and str(file) in out
    assert main([*arguments, "--precision", "fp8", "--json", "--save"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["precision"] == "fp8" and precision.read(Measurement(**_typed(found)).path).precision == "fp8"
    options = ["--model", str(folder), "--device", "cpu", "--precision", "int8", "--exempt", str(file)]
    assert main(["generate", "a red square", "-o", str(image), "--size", "24x16", *options]) == 0 and image.exists()


def _typed(found):
    groups = tuple(Group(**group) for group in found["groups"])
    return {**{k: v for k, v in found.items() if k != "schema"}, "groups": groups}


def test_attention_goes_float8_only_beside_fp8(folder, tmp_path):
    arguments = {"height": 16, "width": 24, "seed": 3, "output": "latent"}
    exact = load(folder, device="cpu", dtype="float32")("a red square", **arguments).images
    pipe = load(folder, device="cpu", dtype="float32", precision="fp8", fp8_attention=True)
    assert {c.op: c.chosen for c in pipe.plan.choices}["attention_fp8"] == "eager" and pipe.plan.fp8_attention
    got = pipe("a red square", **arguments).images
    plain = load(folder, device="cpu", dtype="float32", precision="fp8")("a red square", **arguments).images
    assert not torch.equal(got, plain) and float((got - exact).norm() / exact.norm()) < 0.06
    again = load(pipe.save(tmp_path / "saved"), device="cpu")
    assert again.plan.fp8_attention and torch.equal(again("a red square", **arguments).images, got)
    with pytest.raises(ConfigError, match="goes with precision 'fp8'"):
        load(folder, device="cpu", precision="int8", fp8_attention=True)


def held(checkpoint, dtype, kind, skip_layers=()):
    """Predicted bytes of a network's weights at one evaluation, on a GPU that need not be there."""
    family = family_of(checkpoint.config)
    module = family.build(family.config.from_dict(checkpoint.config), folded_steps=1)
    network = Network(module, checkpoint, family.layout, precision=kind, skip_layers=skip_layers)
    return network_weights(network, GPU, dtype).held(0, 0)


def test_qwen_image_fits_where_it_should(tmp_path):
    """Resident weights of the 20B transformer at one evaluation, from its config on the meta device."""
    checkpoint = Checkpoint(skeleton("qwen-image", tmp_path / "m") / "transformer")
    sizes = {kind: held(checkpoint, torch.bfloat16, kind) for kind in (None, "fp8", "int4")}
    assert sizes[None] <= 27.5e9 and sizes["fp8"] <= 14.5e9 and sizes["int4"] <= 7.4e9, sizes
    assert sizes["fp8"] > 13.4e9  # nothing of its 13.5B parameters is forgotten
    kept = held(checkpoint, torch.bfloat16, "fp8", ["transformer_blocks.img_mlp.net.2"])
    assert kept - sizes["fp8"] == 60 * 3072 * (4 * 3072 - 4)  # a second byte for each of them, and no scales


@pytest.mark.parametrize("kind", [None, "int8", "fp8", "int4"])
def test_predicted_bytes_are_those_held(folder, kind):
    pipe = load(folder, device="cpu", dtype="float32", precision=kind)
    assert pipe.plan.bytes_after == held(pipe.program.recipe.source, torch.float32, kind)
