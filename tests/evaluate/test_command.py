"""`twinflow-rt eval` on a model of random weights: what it prints and writes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benches import score_plot as plot
from tests.factory import make_model
from twinflow_rt import cli
from twinflow_rt.errors import ConfigError
from twinflow_rt.training.scenes import KINDS

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("eval") / "m"))


def test_json_has_every_setting_and_both_kinds_of_captions(model, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    argv = ["eval", "--model", model, "--device", "cpu", "--nfe", "1", "2", "--per-kind", "2", "--json"]
    assert cli.main([*argv, "--diversity", "--data", "--sheet", str(sheet)]) == 0
    drawn, encoded, *rows = json.loads(capsys.readouterr().out)["rows"]
    assert drawn["mean"] == 1 and encoded["mean"] < 0.5  # a VAE of random weights
    assert [(r["nfe"], r["captions"]) for r in rows] == [(n, split) for n in (1, 2) for split in ("train", "heldout")]
    for row in rows:
        assert row["images"] == 2 * len(KINDS)
        assert row["mean"] == pytest.approx(sum(row[kind] for kind in KINDS) / len(KINDS))
    assert rows[1]["diversity_of_data"] > 0
    shapes = drawn["confusion"]["shape"]
    assert all(asked == shown for asked, shown, _ in shapes) and sum(n for *_, n in shapes) == 4
    assert sheet.stat().st_size > 1000


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp8"])
def test_every_precision_can_be_scored(model, capsys, precision):
    argv = ["eval", "--model", model, "--device", "cpu", "--precision", precision, "--per-kind", "1", "--json"]
    assert cli.main([*argv, "--nfe", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    quantized = precision if precision in ("int8", "fp8") else None
    assert report["precision"] == quantized and report["skip_layers"] == [] and len(report["rows"]) == 2
    assert report["dtype"] == ("bfloat16" if precision == "bf16" else "float32")


def test_guidance_extrapolates_from_the_empty_prompt(model):
    from twinflow_rt.evaluate.generator import Generator
    from twinflow_rt.loading import load
    from twinflow_rt.sampling.schedule import preset

    pipe = load(model, device="cpu")
    captions = ["a red circle", "two blue squares"]
    plain = Generator(pipe, preset(2, "multi"))(captions)
    almost = Generator(pipe, preset(2, "multi"), guidance=1 + 1e-6)(captions)
    assert np.abs(plain.astype(int) - almost.astype(int)).max() <= 1
    assert (plain != Generator(pipe, preset(2, "multi"), guidance=3.0)(captions)).any()


def test_table(model, capsys):
    assert cli.main(["eval", "--model", model, "--device", "cpu", "--per-kind", "1", "--confusion"]) == 0
    table, confusions = [], []
    for line in capsys.readouterr().out.splitlines():
        (confusions if line.startswith("     ") else table).append(line)
    header, train, heldout = table
    assert sum(line.split()[0] == "color" for line in confusions) == 2  # one image of kind "colors" a split
    assert header.split() == ["nfe", "captions", "mean", *KINDS]
    assert train.split()[:2] == ["1", "train"] and heldout.split()[:2] == ["1", "heldout"]


def test_plot_joins_files_of_one_name_and_refuses_others(tmp_path):
    rows = lambda *points: [{"nfe": n, "captions": "heldout", "mean": s} for n, s in points]
    for name, points in {"a": [(8, 0.5), (1, 0.25)], "b": [(50, 0.75)]}.items():
        (tmp_path / name).write_text(json.dumps({"schema": 1, "rows": rows(*points)}))
    pairs = [("flow", tmp_path / "a"), ("flow", tmp_path / "b"), ("one", tmp_path / "a")]
    axes = plot.draw(plot.read(pairs)).axes[0]
    drawn = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}
    assert drawn == {"flow: 0.75 at 50": [(1, 0.25), (8, 0.5), (50, 0.75)], "one: 0.50 at 8": [(1, 0.25), (8, 0.5)]}
    out, again = tmp_path / "scores.svg", tmp_path / "again.svg"
    for path in (out, again):
        assert plot.main([str(path), *(f"{name}={file}" for name, file in pairs)]) == 0
    assert out.read_bytes() == again.read_bytes() and "flow: 0.75 at 50" in "".join(ET.parse(out).getroot().itertext())
    assert ET.parse(out).getroot().attrib["aria-label"] == plot.LABEL == axes.get_title(loc="left")
    (tmp_path / "c").write_text("{}")
    with pytest.raises(ConfigError, match="is no report"):
        plot.read([("x", tmp_path / "c")])
    assert plot.main([str(out)]) == 2
