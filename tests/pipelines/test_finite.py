"""NaN and infinity, wherever they come from, are errors that say so, not black images."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import FAMILIES, make_model
from twinflow_rt import loading
from twinflow_rt.cli import main
from twinflow_rt.errors import CheckpointError, NonFiniteError
from twinflow_rt.integrations.comfyui import Decode
from twinflow_rt.loading import load

Q = "transformer.layers.0.attention.to_q"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("finite") / "m", family)
        return made[family]

    return of


@pytest.fixture
def altered(folders, tmp_path):
    """A copy of Z-Image's folder with one tensor's first element changed."""

    def make(part, name, value):
        folder = shutil.copytree(folders("z-image"), tmp_path / "altered")
        file = next((folder / part).glob("*.safetensors"))
        tensors = load_file(file)
        tensors[name].view(-1)[0] = value
        save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return make


def small(pipe, images=1):
    return {"prompt": "a", "height": pipe.sizes.multiple, "width": pipe.sizes.multiple, "seed": 5, "num_images": images}


def spoil(network, value=math.nan):
    """Put `value` into the last layer's bias, or what a family has there; return what undoes it."""
    with torch.no_grad():
        (*_, last) = (p for p in network.parameters() if p.ndim == 1)
        before = last.clone()
        last[0] = value
    return lambda: last.data.copy_(before)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("part", "name", "said"),
    [
        ("transformer", "layers.0.attention.norm_q.weight", "norm_q.weight"),
        ("transformer", "t_embedder.mlp.0.bias", "norm_table"),  # folded into the constants
        ("transformer", "t_embedder_2.mlp.2.bias", "norm_table"),
        ("vae", "decoder.conv_in.bias", "decoder.conv_in.bias"),
        ("text_encoder", "layers.0.input_layernorm.weight", "input_layernorm.weight"),
    ],
)
def test_what_is_small_is_checked_when_it_is_read(altered, part, name, said, value):
    folder = altered(part, name, value)
    with pytest.raises(CheckpointError, match=f"{part}: .*{said} holds NaN or infinity"):
        load(folder, device="cpu")
    pipe = load(folder, device="cpu", check_finite=False)
    assert len(pipe(**small(pipe))) == 1


@pytest.mark.parametrize("family", [*FAMILIES, "openuni"])
def test_latents_are_checked_always(folders, family):
    pipe = load(folders(family), device="cpu")
    undo = spoil(pipe.program.network)
    for output in ("pil", "np", "pt", "latent"):
        with pytest.raises(NonFiniteError, match=r"latents of 2 of 2 images .* of the transformer does, so its"):
            pipe(**small(pipe, 2), output=output)
    pipe.check_finite = False
    assert pipe(**small(pipe), output="latent").images.isnan().any()
    pipe.check_finite = True
    undo()
    assert pipe(**small(pipe), output="latent").images.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_message_says_which_image(folders, monkeypatch, value):
    """... and every one of a batch is looked at, in however many parts it goes through the networks."""
    import twinflow_rt.pipeline as module

    draw = module.initial_noise

    def drawn(*args):
        noise = draw(*args)
        noise[1, 0, 1, 1] = value
        return noise

    monkeypatch.setattr(module, "initial_noise", drawn)
    pipe = load(folders("z-image"), device="cpu")
    for invariant in (False, True):
        pipe.batch_invariant = invariant
        with pytest.raises(NonFiniteError, match=r"1 of 3 images \(number 1 of seed 6\).*no weight does"):
            pipe(**small(pipe, 3))


@pytest.mark.parametrize("output", ["np", "pt"])
@pytest.mark.parametrize(("dtype", "cure"), [("float16", "'fp32' or 'bf16'"), ("bfloat16", "'fp32'")])
def test_pixels_are_checked_and_the_message_names_what_overflowed(folders, dtype, cure, output):
    """Finite latents and weights, but products beyond the dtype."""
    pipe = load(folders("z-image"), device="cpu", dtype=dtype, capture="off")
    for module in pipe.vae.network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.bias.data.fill_(torch.finfo(pipe.dtype).max / 1.1)
    with pytest.raises(NonFiniteError, match=f"the pixels of 1 of 1 .* beyond what {dtype} holds.*precision={cure}"):
        pipe(**small(pipe), output=output)
    assert pipe(**small(pipe), output="latent").images.isfinite().all()
    with pytest.raises(NonFiniteError, match="black"):
        Decode().decode(pipe, {"samples": torch.zeros(1, 4, 4, 4)})


@pytest.mark.parametrize("factor", ["A", "B"])
def test_adapters_are_checked_when_they_are_opened(folders, tmp_path, factor):
    good, bad = ({f"{Q}.lora_A.weight": torch.ones(1, 48), f"{Q}.lora_B.weight": torch.ones(48, 1)} for _ in "ab")
    bad[f"{Q}.lora_{factor}.weight"].view(-1)[7] = math.nan
    for name, tensors in {"good": good, "bad": bad}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = {name: [tmp_path / f"{name}.safetensors"] for name in ("good", "bad")}
    refused = pytest.raises(CheckpointError, match=r"bad.safetensors: what it adds to .*to_q.weight is NaN or infinity")
    with refused:
        load(folders("z-image"), device="cpu", loras=paths["bad"])
    pipe = load(folders("z-image"), device="cpu", loras=paths["good"])
    want = pipe(**small(pipe), output="latent").images
    with refused:
        pipe.set_loras(paths["bad"])
    with pytest.raises(CheckpointError, match="NaN or infinity"):  # of a multiplier
        pipe.set_loras([(paths["good"][0], 1e300)])
    assert torch.equal(pipe(**small(pipe), output="latent").images, want)
    pipe = load(folders("z-image"), device="cpu", loras=paths["bad"], check_finite=False)
    assert pipe(**small(pipe), output="latent").images.isnan().any()


def test_the_command_line_fails_and_writes_nothing(altered, tmp_path, monkeypatch, capsys):
    folder, out = altered("transformer", "layers.0.attention.to_out.0.weight", math.nan), tmp_path / "x.png"
    command = ["generate", "a", "--model", str(folder), "--device", "cpu", "-o", str(out)]
    assert main(command) != 0 and "holds NaN or infinity" in capsys.readouterr().err
    monkeypatch.setattr(loading, "SMALL", 1)  # as if the weight were a large model's
    assert main(command) != 0 and "would be black" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--no-check-finite"]) == 0 and out.exists()


def test_encoded_prompts_are_checked(altered, tmp_path, capsys):
    folder, out = altered("text_encoder", "layers.0.input_layernorm.weight", math.nan), tmp_path / "x.safetensors"
    command = ["encode", "a", "--model", str(folder), "--device", "cpu", "-o", str(out)]
    assert main(command) != 0 and "NaN or infinity" in capsys.readouterr().err and not out.exists()
