"""A pipeline that only counts, for testing what stands around one."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from PIL import Image

from twinflow_rt.config import SizeRule
from twinflow_rt.errors import CancelledError, CheckpointError, ConfigError, DeviceError, NonFiniteError
from twinflow_rt.sampling.schedule import preset


class FakePipe:
    """Images hold prompt and seed in `info`; `gate` closed holds a run back; prompts name what should go wrong."""

    def __init__(self) -> None:
        self.sizes, self.sampler, self.scheduler = SizeRule(16, 64, 64, default=32), preset(1), None
        self.calls: list[dict] = []
        self.gate, self.entered, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, prompts, *, seed, cancel, height, width, sampler, **picture):
        self.calls.append({"prompts": prompts, "size": (width, height), "sampler": sampler, **picture})
        self.entered.set()
        while not self.gate.wait(0.01):
            if cancel():
                self.cancelled.set()
                raise CancelledError("stopped")
        for prompt in prompts:
            if prompt == "bad":
                raise ConfigError("a bad prompt")
            if prompt == "nan":
                raise NonFiniteError("the image is not finite")
            if prompt == "file":
                raise CheckpointError("/a/secret/path is damaged")
            if prompt == "shapeless":
                return SimpleNamespace(images=[object()] * len(prompts), timings={}, truncated=[False] * len(prompts))
            if prompt == "crash":
                raise ZeroDivisionError("a secret")
            if prompt == "big" or (prompt == "wide" and len(prompts) > 1):
                raise DeviceError("out of memory")
        images = [self.image(*made, width, height) for made in zip(prompts, seed, strict=True)]
        images, truncated = images[1:] if "lose" in prompts else images, [prompt == "long" for prompt in prompts]
        return SimpleNamespace(images=images, timings={"total": 0.5}, truncated=truncated)

    @staticmethod
    def image(prompt: str, seed: int, width: int, height: int) -> Image.Image:
        image = Image.new("RGB", (width, height), (seed % 256, seed // 256 % 256, len(prompt)))
        image.info = {"made": (prompt, seed)}
        return image

    @property
    def batches(self) -> list[int]:
        return [len(call["prompts"]) for call in self.calls]
