"""The memory a model will need: chosen within a budget, predicted before loading, and measured."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.factory import VAE, make_model
from tests.memory import run_script
from twinflow_rt.bench.random_weights import skeleton
from twinflow_rt.checkpoint.checkpoint import Checkpoint
from twinflow_rt.config import parse_bytes
from twinflow_rt.errors import ConfigError
from twinflow_rt.loading import _recorders, load
from twinflow_rt.passes.layers import QuantizedLinear
from twinflow_rt.planning.footprint import peak_of
from twinflow_rt.planning.memory_costs import Costs, Weights
from twinflow_rt.planning.memory_plan import choose
from twinflow_rt.runtime.capture import Captures
from twinflow_rt.runtime.cpu_graph import CpuGraphs

LARGEST = (1024, 1024, 1)
EIGHT_BITS, FOUR_BITS = ({"precision": kind, "text_precision": kind} for kind in ("int8", "int4"))
MIXED = {"precision": "int4", "text_precision": "int8"}


def costs(slots=2, **changes):
    weights = {
        "text": Weights(10, (20,) * 5, (20,) * 5),
        "network": Weights(30, (40, 40, 40, 60), (40, 40, 40, 60)),
        "vae": Weights(5),
    }
    decode = {None: 500, 1024: 400, 768: 300, 512: 200, 384: 150, 256: 100, 192: 90, 128: 80}
    return Costs(weights, 15, 5, 70, decode.__getitem__, 128, slots)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, (False, 0, None)),
        (830, (False, 0, None)),  # 325 of weights, 505 of work
        (829, (False, 0, 1024)),
        (530, (False, 0, 512)),
        (411, (False, 0, 128)),
        (409, (True, 0, 256)),  # a smaller tile alone would not do: 410
        (340, (True, 3, 192)),
    ],
)
def test_the_cheapest_measures_come_first(budget, expected):
    plan = choose(costs(), budget, LARGEST)
    assert (plan.text_streams, plan.streamed, plan.tile) == expected
    assert budget is None or plan.peak <= budget
    assert plan.peak == max(plan.stages.values()) and "predicted peak" in plan.notes()[0]


def test_no_more_blocks_stream_than_have_to():
    held = [costs().weights["network"].held(n, 2) for n in range(5)]
    assert held == [210, 210, 230, 190, 150]  # two buffers of the largest streaming block
    assert [costs().weights["network"].held(n, 1) for n in (1, 4)] == [210, 90]


def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_would():
    with pytest.raises(ConfigError, match=r"needs 0\.0 MB"):
        choose(costs(), 200, LARGEST)
    assert choose(costs(), 330, LARGEST).streamed == 3 and choose(costs(), 329, LARGEST).streamed == 4


@pytest.mark.parametrize(
    ("budget", "left", "recorded"),
    [(830, 0, set()), (905, 75, {"text", "sample"}), (1335, 505, {"text", "sample", "decode"})],
)
def test_graphs_have_what_the_plan_leaves(budget, left, recorded):
    """A stage is recorded if what it works in, which its graph keeps, fits beside the largest stage."""
    plan, captures = choose(costs(), budget, LARGEST), Captures(CpuGraphs())
    recorders = _recorders(captures, plan)
    assert (plan.tile, plan.graphs, captures.budget) == (None, left, left)
    assert {stage for stage, one in recorders.items() if one is captures} == recorded
    refused = {stage for stage, stats in captures.stats().items() if "graph would hold" in stats.refused}
    assert refused == plan.work.keys() - recorded and set(_recorders(None, plan).values()) == {None}


def test_a_settled_tile_is_kept():
    assert choose(costs(), None, LARGEST, 256).tile == 256
    assert choose(costs(), 420, LARGEST, 256) == choose(costs(), 420, LARGEST, 256)


@pytest.mark.parametrize(
    ("text", "expected"), [("12GB", 12_000_000_000), ("1.5 GiB", 3 << 29), ("900mb", 900_000_000), ("7", 7), (5, 5)]
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected and parse_bytes(None) is None


@pytest.mark.parametrize("text", ["", "GB", "1 XB", "1e", "nan", "inf GB", "-1GB", 0, -5, 1.5, True])
def test_impossible_sizes(text):
    with pytest.raises(ConfigError, match="memory_budget"):
        parse_bytes(text)


def test_peak_of_live_tensors():
    def run():
        a = torch.zeros(10, device="meta")  # 40 bytes
        b = a + 1  # 80
        a = b[:5] * 2  # 100, then the first 40 go
        c = torch.zeros(5, device="meta")  # 80
        return (a + c).view(5, 1), b  # 100

    assert peak_of(run)[1] == 100
    q = torch.zeros(1, 2, 1000, 8, device="meta")
    assert peak_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))[1] == q.nbytes


def test_calls_beyond_the_plan_are_refused(tmp_path):
    folder = make_model(tmp_path / "m")
    pipe = load(folder, device="cpu", memory_budget="1GB", largest=(32, 32, 2))
    assert pipe.memory.largest == (32, 32, 2) and not pipe.memory.streamed and pipe.memory.tile is None
    assert pipe("x", height=32, width=32, num_images=2, seed=0).images
    with pytest.raises(ConfigError, match=r"3 x 32x32 exceeds the 2 x 32x32 .* planned for"):
        pipe("x", height=32, width=32, num_images=3, seed=0)
    for largest in ((32, 32), "big", (33, 32, 1), (32, 32, 0)):
        with pytest.raises(ConfigError):
            load(folder, device="cpu", memory_budget="1GB", largest=largest)
    with pytest.raises(ConfigError, match="tile must be"):
        load(folder, device="cpu", tile=1)
    assert load(folder, device="cpu", tile=64).vae.options.tile == 64


def test_a_saved_program_is_planned_for_too(tmp_path):
    load(make_model(tmp_path / "m"), device="cpu").save(tmp_path / "saved")
    pipe = load(tmp_path / "saved", device="cpu", memory_budget="1GB")
    assert pipe.memory.peak < 1e9 and pipe.memory.blocks == 0
    assert pipe("x", height=16, width=16, seed=0).images


def test_8_bits_are_planned_for(tmp_path):
    """A weight of them and a scale per row, but none of a saved program's, which are used as their file has them."""
    folder, how = make_model(tmp_path / "m"), {"device": "cpu", "memory_budget": "1GB"}
    pipe = load(folder, precision="int8", **how)
    held = {name: pipe.memory.weights[name] for name in ("text", "network")}
    plain = load(folder, **how).memory.weights
    narrow = [m for m in pipe.program.network.modules() if isinstance(m, QuantizedLinear)]
    saved = sum(3 * m.weight.numel() - 4 * m.out_features for m in narrow)
    assert saved > 0 and held == {"text": plain["text"], "network": plain["network"] - saved}
    load(folder, precision="int8", device="cpu").save(tmp_path / "saved")
    again = load(tmp_path / "saved", **how).memory
    mapped = sum(m.weight.numel() + 4 * m.out_features for m in narrow)
    assert again.weights["network"] <= held["network"] - mapped


SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from PIL import Image
from tests.memory import Peak, least
from twinflow_rt.host_memory import return_freed_memory
from twinflow_rt.loading import load

folder, tight, size = sys.argv[1], sys.argv[2] == "tight", int(sys.argv[3])
options = {"device": "cpu", "dtype": "float32", "largest": (size, size, 1), **json.loads(sys.argv[4])}
return_freed_memory()
load("demo", **json.loads(sys.argv[4]))("a", seed=0)  # what any model imports and libraries allocate is there, then
smallest = least(folder, **options)
budget = smallest if tight else 4_000_000_000
with Peak(0.002) as peak:
    pipe = load(folder, memory_budget=budget, **options)
    pipe("a red circle " * 300, height=size, width=size, seed=0)
m = pipe.memory
print(json.dumps({"predicted": m.peak, "measured": peak.bytes, "streamed": m.streamed, "tile": m.tile,
                  "text": m.text_streams, "stages": dict(m.stages), "weights": dict(m.weights)}))
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """A Z-Image of some size, in files that can be mapped."""
    folder = skeleton("z-image", tmp_path_factory.mktemp("medium") / "m", scale=0.13, layers=5, dtype="float32")
    for part in ("transformer", "text_encoder", "vae"):
        checkpoint = Checkpoint(folder / part)
        save_file({name: checkpoint.get(name).contiguous() for name in checkpoint}, folder / part / "w.safetensors")
        (folder / part / "random_weights.json").unlink()
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("budget", "options"),
    [
        pytest.param("ample", {}, marks=pytest.mark.full),
        ("tight", {}),
        pytest.param("ample", EIGHT_BITS, marks=pytest.mark.full),
        pytest.param("ample", FOUR_BITS, marks=pytest.mark.full),
        ("tight", MIXED),
    ],
)
def test_the_prediction_is_what_is_measured(medium, budget, options):
    """Within 10 %, with everything resident and with as little as possible."""
    seen = json.loads(run_script(SCRIPT, medium, budget, 512, json.dumps(options)))
    assert (seen["streamed"] > 0) is (seen["tile"] is not None) is seen["text"] is (budget == "tight"), seen
    assert abs(seen["measured"] - seen["predicted"]) <= 0.1 * seen["predicted"], seen


ENCODING = """
import dataclasses, json, sys, torch
from pathlib import Path
from tests.memory import Peak
from twinflow_rt.host_memory import return_freed_memory
from twinflow_rt.models.autoencoders import autoencoder_kl
from twinflow_rt.planning import encoder_costs
from twinflow_rt.stages.vae import VaeDecoder
return_freed_memory()  # as loading within a budget does
vae, size = VaeDecoder(Path(sys.argv[1]) / "vae", autoencoder_kl.MODEL), (512, 384)
vae.materialize(torch.device("cpu"), torch.float32)
picture = torch.zeros(1, 3, *size)
for tile in (None, 256):
    vae.options = dataclasses.replace(vae.options, tile=tile)
    weights, work = encoder_costs.costs(vae, size, tile)
    with Peak() as peak, torch.inference_mode(), encoder_costs.opened(vae, None, size) as encoder:
        encoder.encode(picture)
    vae.close_encoder()
    print(json.dumps([weights + work, peak.bytes]))
"""


def test_what_pictures_take_is_what_is_measured(tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(**{**VAE, "block_out_channels": (64, 128, 128)}).save_pretrained(tmp_path / "vae")
    for line in run_script(ENCODING, tmp_path).splitlines():
        predicted, measured = json.loads(line)
        assert abs(measured - predicted) <= 0.1 * predicted, line
