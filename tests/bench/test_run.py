"""A whole run: every figure there, speed-ups only behind the error rule, the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.factory import make_model
from twinflow_rt import bench, cli, load
from twinflow_rt.bench import correctness, peers, probe, workload
from twinflow_rt.bench import record as records
from twinflow_rt.bench.schema import RecordFields, validate
from twinflow_rt.bench.workload import STAGES
from twinflow_rt.errors import ConfigError, TwinFlowError

QUICK = {"repeats": 3, "warmup": 0, "cold_runs": 0, "batches": (), "evaluations": ()}


def test_every_figure_is_there(record):
    validate(record)
    assert list(record["stages"]) == [*STAGES, "total"]
    assert {len(s["samples"]) for s in record["stages"].values()} == {5}
    assert record["correctness"]["passed"], record["correctness"]
    assert record["settings"]["width"] == 32 and record["settings"]["height"] == 24
    phases = record["cold_start"]["phases"]
    assert set(phases) == {"start", "import", "load", "compile", "first_image", "warm_image", "total"}
    assert phases["import"]["median"] > phases["compile"]["median"] > 0
    assert phases["total"]["median"] > 5 * record["stages"]["total"]["median"]
    assert min(samples["min"] for samples in phases.values()) > 0
    assert [row["batch"] for row in record["batches"]] == [1, 2]
    assert record["batches"][1]["images_per_second"] == pytest.approx(2 / record["batches"][1]["seconds"]["median"])
    assert [row["nfe"] for row in record["evaluations"]] == [1, 2]
    names = {name for name, _ in records.timings(record)}
    assert {"stage total", "cold import", "batch 2", "nfe 2", "peer diffusers"} <= names


def test_stages_are_parts_of_the_call(record):
    """Their fastest times together do not exceed a call's by much, whatever else the machine does."""
    low = {name: s["min"] for name, s in record["stages"].items()}
    assert 0 < sum(low[name] for name in STAGES) < 1.5 * low["total"]


def test_efficiency_is_below_the_ceilings(record):
    for name, stage in record["efficiency"].items():
        assert 0 < stage["fraction_of_floor"] < 1.2, name
        assert stage["flops_per_second"] == pytest.approx(stage["flops"] / record["stages"][name]["median"])
    assert record["efficiency"]["velocity"]["flops"] > record["efficiency"]["context"]["flops"]


def test_peers_passed_and_have_a_speedup(record):
    for peer in record["peers"]:
        assert peer["correctness"]["passed"], peer
        assert peer["interval"][0] <= peer["speedup"] <= peer["interval"][1]
    diffusers = record["peers"][1]["correctness"]["errors"]
    assert 0 < diffusers["latents"]["worst"] < 1e-5  # another implementation, so not bit-equal


def test_no_machine_or_folder_names(record):
    assert "/" not in record["settings"]["model"] and "tmp" not in json.dumps(record)


@pytest.mark.parametrize("liar", ["ours", "peer"])
def test_wrong_outputs_get_no_speedup(tiny, monkeypatch, capsys, liar):
    """A contender that is off by a thousandth is timed, but no speed-up is computed, stored or shown."""
    build = peers.build

    def wrong(name, pipe, work):
        if liar == "ours":
            with torch.no_grad():
                next(iter(pipe.program.network.all_final_layer.parameters())).mul_(1.001)
            return build(name, pipe, work)
        call = build(name, pipe, work)
        return lambda output="pil": call(output) * 1.001 if output != "pil" else call(output)

    monkeypatch.setattr(peers, "build", wrong)
    record = bench.run(tiny, device="cpu", size=(16, 16), peers=("eager",), **QUICK)
    (peer,) = record["peers"]
    assert peer["speedup"] is None and peer["interval"] is None and peer["seconds"]
    assert "error of latents" in peer["reason"]
    assert record["correctness"]["passed"] == (liar == "peer")
    from twinflow_rt.bench import html, terminal

    terminal.show(record)
    shown = capsys.readouterr().out
    assert "refused" in shown and "refused" in html.render(record)
    assert ("NOT KNOWN TO BE CORRECT" in shown) == (liar == "ours")


def test_half_precision_is_judged_against_eager(tiny):
    # large enough that the ratio of two rms is one: at 16x16 it spreads from 0.8 to 1.4 over seeds
    record = bench.run(tiny, device="cpu", dtype="bf16", size=(64, 64), peers=("eager",), nfe=2, **QUICK)
    assert record["settings"]["dtype"] == "bfloat16" and record["correctness"]["passed"], record["correctness"]
    assert 1e-4 < record["correctness"]["errors"]["latents"]["rms"] < 0.1
    assert record["peers"][0]["speedup"] > 0


def test_error_rule():
    reference = (torch.ones(1000, 1000), torch.ones(1000, 1000))
    off = lambda by: tuple(x + by for x in reference)
    judge = correctness.judge
    assert judge(off(9e-6), reference, dtype="float32").passed
    assert not judge(off(2e-5), reference, dtype="float32").passed
    eager = off(0.010)
    assert judge(off(0.0109), reference, dtype="bfloat16", eager=eager).passed
    assert not judge(off(0.0112), reference, dtype="bfloat16", eager=eager).passed
    assert judge(off(0.019), reference, dtype="bfloat16", eager=eager, ours=False).passed
    assert not judge(off(0.021), reference, dtype="bfloat16", eager=eager, ours=False).passed
    assert judge(off(0.05), reference, dtype="float8", tolerance=0.06).passed
    few = (torch.ones(64), torch.ones(64))  # an rms of few values is uncertain: 1.1 x 1.25
    assert judge([x + 0.013 for x in few], few, dtype="bfloat16", eager=[x + 0.01 for x in few]).passed
    assert not judge([x + 0.014 for x in few], few, dtype="bfloat16", eager=[x + 0.01 for x in few]).passed
    for broken in ((reference[0] * float("nan"), reference[1]), (torch.ones(2, 2), reference[1])):
        verdict = judge(broken, reference, dtype="float32")
        assert not verdict.passed and verdict.to_dict()["errors"]["latents"] == {"worst": None, "rms": None}
    with pytest.raises(ValueError, match="eager"):
        judge(eager, reference, dtype="bfloat16")


def test_batches_hold_different_prompts():
    assert len(set(workload.batch_of(None, 9))) == 9 and len(set(workload.batch_of("x", 3))) == 3
    assert workload.batch_of("x", 3)[0] == "x"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ("fast",)}, "no peer 'fast'"),
        ({"peers": ("eager",), "check": False}, "only where outputs are checked"),
        ({"repeats": 0}, "repeats"),
        ({"backend": "warp"}, "none of that name"),
        ({"backend": "triton"}, "NVIDIA"),
    ],
)
def test_impossible_settings(tiny, options, message):
    with pytest.raises(ConfigError, match=message):
        bench.run(tiny, **{"device": "cpu", "size": (16, 16), "check": False, **QUICK, **options})


def test_backend_is_preferred_and_recorded(tiny):
    record = bench.run(tiny, device="cpu", size=(16, 16), backend="eager", check=False, **QUICK)
    assert set(record["model"]["ops"].values()) == {"eager"}
    assert record["correctness"] == {"errors": {}, "passed": False, "reason": "not checked in this run"}


def test_artifacts_are_measured_without_peers(tiny, tmp_path):
    load(tiny, device="cpu").save(tmp_path / "saved")
    options = {**QUICK, "evaluations": (1, 2)}
    record = bench.run(tmp_path / "saved", device="cpu", size=(16, 16), check=False, **options)
    assert "folded for 1 evaluation" in record["evaluations"][1]["reason"]
    with pytest.raises(ConfigError, match="is an artifact"):
        bench.run(tmp_path / "saved", device="cpu", size=(16, 16), **QUICK)


def test_a_failing_process_says_why(tiny):
    task = probe.Task(str(tiny), "cpu", None, None, 1, "x", 0, 16, 16, 1)
    with pytest.raises(TwinFlowError, match="status 3: no such luck"):
        probe.run(task, ("sh", "-c", "echo no such luck >&2; exit 3"))


def test_command_line(tiny, tmp_path, capsys):
    a, b, page = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "a.html"
    common = ["--device", "cpu", "--size", "16", "--repeats", "5", "--cold-runs", "0", "--batches", "",
              "--evaluations", "", "--peers", "eager"]  # fmt: skip
    assert cli.main(["bench", str(tiny), *common, "--json", str(a), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "velocity" in out and "speed-up" in out and page.read_text().startswith("<!doctype html>")
    command = records.load(a)["command"]
    assert command == (
        "twinflow-rt bench tiny --size 16x16 --device cpu --peers eager --repeats 5 --batches '' "
        "--evaluations '' --cold-runs 0"
    )
    shutil.copy(a, b)
    assert cli.main(["bench", "compare", str(a), str(b), "--gate"]) == 0
    assert "speed-up over eager (gate)" in capsys.readouterr().out
    worse = records.load(b)
    worse["peers"][0].update(speedup=0.01, interval=[0.01, 0.01])
    records.save(worse, b)
    assert cli.main(["bench", "compare", str(a), str(b)]) == 0
    assert cli.main(["bench", "compare", str(a), str(b), "--gate"]) == 1
    assert cli.main(["bench", "show", str(a)]) == 0
    capsys.readouterr()
    for argv, message in (
        (["bench", "compare", str(a)], "two records"),
        (["bench", "show"], "one record"),
        (["bench", str(tiny), "other"], "one model"),
        (["bench", str(tiny), "--random-weights", "sana"], "not both"),
        (["bench", "--random-weights", "dalle"], "use one of z-image, qwen-image, sd3.5-m, sana"),
        (["bench", str(tiny), "--json", str(tmp_path / "no" / "x.json")], "does not exist"),
    ):
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err


def test_options_are_all_settings():
    from twinflow_rt.bench.settings import Settings
    from twinflow_rt.cli.bench import SETTINGS

    assert {*SETTINGS, "model", "max_seconds"} == set(Settings.__dataclass_fields__)


def test_documentation_explains_every_field():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "benchmarking.md").read_text()
    missing = [key for key in RecordFields.__annotations__ if f"`{key}`" not in text]
    assert not missing


@pytest.mark.full
def test_compiled_peer(tmp_path):
    """torch.compile's network gives the same images."""
    folder = make_model(tmp_path / "m")
    record = bench.run(folder, device="cpu", size=(16, 16), peers=("compile",), **QUICK)
    assert record["peers"][0]["correctness"]["passed"], record["notes"]
