"""Ordinary flow models: the miniatures without TwinFlow's second embedder, and diffusers' pipelines for them."""

from __future__ import annotations

import json
import warnings
from itertools import count

import diffusers
from safetensors.torch import load_file, save_file

from tests.factory import WEIGHTS
from tests.pipelines.references import MODELS, PROMPTS, images_of
from twinflow_rt.sampling.noise import initial_noise, step_noise

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SHIFTS = FLOW | {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "time_shift_type": "exponential",
}  # fmt: skip
SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
    "flow_shift": 3.0, "algorithm_type": "dpmsolver++", "solver_order": 2, "lambda_min_clipped": float("-inf"),
}  # fmt: skip
PUBLISHED = {
    "z-image": FLOW | {"shift": 3.0}, "qwen-image": SHIFTS, "sd3-without-t5": FLOW | {"shift": 3.0}, "sana": SOLVER,
    "sana-sprint": {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5},
}  # fmt: skip


def plain_model(name, folder):
    """The miniature without its second embedder, with a scheduler as published."""
    MODELS[name].make(folder)
    file = folder / "transformer" / WEIGHTS
    kept = {k: v for k, v in load_file(file).items() if not k.startswith(MODELS[name].second)}
    save_file(kept, file, metadata={"format": "pt"})
    schedule_by(folder, PUBLISHED[name])
    return folder


def schedule_by(folder, settings):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", settings["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))


def peer_of(name, folder, kind=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = getattr(diffusers, kind or MODELS[name].peer).from_pretrained(folder, **MODELS[name].load)
    peer.set_progress_bar_config(disable=True)
    return peer


def theirs(name, peer, seeds, size, steps, monkeypatch, **more):
    """diffusers' latents from our noise, what its scheduler draws included."""
    shape = (4, *(n // MODELS[name].scale for n in size))
    drawn = count(1)
    for module in ("scheduling_scm", "scheduling_flow_match_euler_discrete"):
        draw = lambda *_, **__: step_noise(seeds, next(drawn), shape)
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)
    if name == "sana-sprint":
        more |= {"max_timesteps": 1.57080, "intermediate_timesteps": 1.3 if steps == 2 else None}
    noise, prompts = initial_noise(seeds, shape), PROMPTS[: len(seeds)]
    return images_of(name, peer, prompts, size, "latent", noise, num_inference_steps=steps, **more)
