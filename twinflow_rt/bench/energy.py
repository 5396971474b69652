"""Energy per image from the GPU's own counter (NVML), or the reason why there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..runtime.timer import synchronize

SECONDS = 3.0  # the counter moves every 20 to 100 ms


def per_image(call: Callable[[], Any], images: int, device: torch.device) -> dict[str, Any]:
    """{"joules_per_image", "watts", "images"} of repeating `call`, which makes `images`, for some seconds;
    {"reason"} where nothing measures energy. The GPU's energy: not the host's."""
    if device.type != "cuda":
        return {"reason": "energy is measured on NVIDIA GPUs only"}
    if find_spec("pynvml") is None:
        return {"reason": "the package nvidia-ml-py (module pynvml) is not installed"}
    pynvml = import_module("pynvml")

    try:
        pynvml.nvmlInit()
        handle = _handle(pynvml, device)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return {"reason": f"NVML does not tell this GPU's energy ({error})"}
    synchronize(device)
    start, before, done = time.perf_counter(), pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 0
    while time.perf_counter() - start < SECONDS:
        call()
        done += images
    synchronize(device)
    joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
    return {"joules_per_image": joules / done, "watts": joules / (time.perf_counter() - start), "images": done}


def _handle(nvml: Any, device: torch.device) -> Any:
    """By uuid, as CUDA_VISIBLE_DEVICES renumbers devices for CUDA but not for NVML."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return nvml.nvmlDeviceGetHandleByUUID(uuid)
