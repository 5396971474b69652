"""What SANA alone has: Sprint's two steps, the instruction before prompts, and OpenUni's way from prompt to network."""

from __future__ import annotations

import inspect
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.networks import relative
from tests.pipelines.references import MODELS, PROMPTS, images_of, open_reference
from tests.sana_factory import CONNECTOR, language_model, make_openuni, siglip_encoder
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.loading import load
from twinflow_rt.planning.description import describe
from twinflow_rt.sampling.noise import initial_noise
from twinflow_rt.sampling.sampler import sample
from twinflow_rt.sampling.schedule import SamplerConfig, schedule
from twinflow_rt.stages.text_encoders import INSTRUCTION


def default_of(pipe, argument):
    """What diffusers' call takes for an argument that is not given."""
    return inspect.signature(type(pipe).__call__).parameters[argument].default


def test_sprint_in_two_steps_is_ucgm_with_fresh_noise(tmp_path):
    """Its published schedule, angles pi/2 and 1.3, is a grid of two times of the linear flow."""
    folder, shape = MODELS["sana-sprint"].make(tmp_path / "m"), (4, 8, 8)
    pipe, peer = load(folder, device="cpu"), open_reference("sana-sprint", folder)
    time = math.sin(1.3) / (math.sin(1.3) + math.cos(1.3))
    config = SamplerConfig(2, stochast_ratio=1.0, rfba_gap_steps=(0.0, time))
    assert schedule(config, torch.float32) == ((1.0, 0.0), (pytest.approx(time), 0.0))
    noise, fresh = initial_noise([1, 2], shape), torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    expected = images_of(
        "sana-sprint", peer, PROMPTS[:2], (32, 32), "latent", noise, num_inference_steps=2,
        intermediate_timesteps=default_of(peer, "intermediate_timesteps"), generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    with torch.inference_mode():
        pipe.program.refold(schedule(config, torch.float32))
        network, embeds = pipe.program.network, pipe.text(PROMPTS[:2])
        context = network.encode_context(embeds.embeds, embeds.lengths)
        velocity = lambda x, step: network(x, network.step_modulation(step), context)
        ours = sample(velocity, noise, config, noise_fn=lambda step: fresh)
    assert relative(ours, expected) < 1e-5


@torch.no_grad()
def test_prompt_embeddings_equal_diffusers(tmp_path):
    """The instruction is diffusers'; a prompt has its own length here; the longest lose their tail."""
    folder, prompts = MODELS["sana"].make(tmp_path / "m"), [*PROMPTS, "z" * 400]
    peer = open_reference("sana", folder)
    default = default_of(peer, "complex_human_instruction")
    assert "\n".join(default) == INSTRUCTION
    embeds, mask, _, _ = peer.encode_prompt(prompts, False, complex_human_instruction=default)
    ours = load(folder, device="cpu").text(prompts)
    assert ours.lengths == tuple(mask.sum(1).tolist()) and ours.lengths[2:] == (2, 300)
    for i, n in enumerate(ours.lengths):
        assert relative(ours.embeds[i, :n], embeds[i, :n]) < 1e-5


# -- OpenUni: SANA behind a language model with learned queries -------------------------------------


@pytest.fixture(scope="module")
def openuni(tmp_path_factory):
    return make_openuni(tmp_path_factory.mktemp("openuni") / "m")


@torch.no_grad()
def test_openuni_embeddings_equal_its_parts_in_transformers(openuni):
    """As upstream runs it: prompts padded, masked, positions counted over what is not padding, queries last."""
    folder, tensors = openuni
    language, connector = language_model().model, siglip_encoder()
    text = load(folder, device="cpu").text
    rendered = text.tokenizer.render("a cat")
    assert rendered == "<|im_start|>user\nGenerate an image: a cat<|im_end|>\n<|im_start|>assistant\n<img>"
    prompts = [*PROMPTS, "never cut " * 230]
    ids = text.tokenizer(prompts, 10_000)
    assert max(map(len, ids)) > 2048
    longest, count = max(map(len, ids)), CONNECTOR.num_queries
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) + [1] * count for i in ids])
    padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
    queries = tensors["meta_queries"].expand(len(ids), -1, -1)
    embeds = torch.cat((language.embed_tokens(padded), queries), 1)
    states = language(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    states = connector(inputs_embeds=states.last_hidden_state[:, -count:]).last_hidden_state
    expected = states @ tensors["projector.weight"].T + tensors["projector.bias"]
    ours = text(prompts)
    assert ours.lengths == (count,) * 4 and not any(ours.truncated) and relative(ours.embeds, expected) < 1e-5


def test_openuni_from_folder_to_pixels(openuni, tmp_path):
    """The network and decoder are SANA's, so only the prompt's way to them differs."""
    pipe, args = load(openuni[0], device="cpu"), {"height": 16, "width": 24, "seed": 1, "output": "np"}
    images = pipe(PROMPTS, **args).images
    assert images.std() > 5 and not np.array_equal(images[0], images[1])
    assert np.array_equal(pipe(pipe.text(PROMPTS), **args).images, images)
    assert np.array_equal(load(pipe.save(tmp_path / "artifact"), device="cpu")(PROMPTS, **args).images, images)
    assert [part.name for part in describe(openuni[0]).parts] == ["text_encoder", "connector", "transformer", "vae"]
    assert all(stage.flops > 0 for stage in pipe.plan.stages)


def test_openuni_takes_internvl_as_it_is(openuni, tmp_path):
    """Config and names of a whole InternVLChatModel: its vision tower is not read."""
    folder = shutil.copytree(openuni[0], tmp_path / "m")
    file, path = folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "config.json"
    tensors = {f"language_model.{k}": v for k, v in load_file(file).items()}
    save_file({**tensors, "vision_model.x": torch.zeros(2), "mlp1.0.weight": torch.zeros(2)}, file)
    path.write_text(json.dumps({"model_type": "internvl_chat", "llm_config": json.loads(path.read_text())}))
    ours, expected = (load(f, device="cpu").text(PROMPTS).embeds for f in (folder, openuni[0]))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("part", "changes", "error", "match"),
    [
        ("connector", {"hidden_size": 24}, CheckpointError, "does not fit the connector's hidden_size 24"),
        ("connector", {"caption_channels": 8}, CheckpointError, "width of prompt embeddings 8 does not fit"),
        ("connector", {"hidden_act": "relu"}, ConfigError, "activation 'relu'"),
        ("connector", {"num_queries": 9}, CheckpointError, "meta_queries"),
        ("text_encoder", {"model_type": "llama"}, ConfigError, "model_type 'llama'"),
    ],
)
def test_other_openuni_parts_are_refused(openuni, tmp_path, part, changes, error, match):
    folder = shutil.copytree(openuni[0], tmp_path / "m")
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(error, match=match):
        load(folder, device="cpu")
