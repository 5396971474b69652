"""twinflow_rt: a runtime for TwinFlow one-step image generators.

    import twinflow_rt
    pipe = twinflow_rt.load("demo")
    pipe("a green triangle", seed=0).images[0].save("out.png")

Importing this package imports nothing heavy; names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "loading", "LoadOptions": "options", "Pipeline": "pipeline", "Result": "stages.result",
    "accelerate": "integrations.diffusers", "export_model": "export.program", "load_exported": "export.runtime",
    "PromptEmbeds": "stages.text", "SamplerConfig": "sampling.schedule", "PRESETS": "sampling.schedule",
    "preset": "sampling.schedule", "Guidance": "sampling.guidance", "TwinFlowError": "errors",
    "CheckpointError": "errors", "ConfigError": "errors", "DeviceError": "errors", "OutOfMemoryError": "errors",
    "NonFiniteError": "errors", "StorageError": "errors", "CancelledError": "errors",
    "PromptTruncatedWarning": "errors",
}  # fmt: skip
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        hint = "; twinflow_rt.load opens a model" if name.startswith(("from_", "load", "Auto", "Diffusion")) else ""
        raise AttributeError(f"module 'twinflow_rt' has no attribute {name!r}{hint}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
