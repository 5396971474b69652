"""One module per model family: its velocity network, and what else differs between families.

A family is found by the `_class_name` of its transformer's config.json; its module is imported only
then. The networks have in common:

    encode_context(embeds, lengths, **extras) -> Context    the prompts' side, once per prompt
    step_modulation(step)                                   the folded constants of one evaluation
    network(latents, modulation, context) -> velocity       in latent space, as the VAE has it
    network.patches(...) -> (velocity's patches, sign)      the same before unpacking, for `ops.x0_to_vae`
    prompt_modules                                          names of the modules encode_context runs
    prompt_multiple, all_rows                               where prompts have only such lengths, or the longest

`encode_context` takes lengths on the host, or as a tensor on the device, where they shape nothing (`export`).

What depends on the prompt and time together (SD3.5's modulation takes the pooled prompt) belongs in the
context, with one row per evaluation; `step_modulation` then says which row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .checkpoint.layout import Layout
from .config import SizeRule
from .errors import CheckpointError
from .models.config import reading

FAMILIES = {
    "ZImageTransformer2DModel": "z_image",
    "QwenImageTransformer2DModel": "qwen_image",
    "SD3Transformer2DModel": "sd3",
    "SanaTransformer2DModel": "sana",
}


@dataclass(frozen=True)
class Family:
    """What differs between families.

    config, network, layout: the velocity network's config class, class, and how its files are read.
    text, vae: open the stages of a model folder (see `text.TextEncoder` and `vae.VaeDecoder`), unread.
    fit(config, text, vae): the sizes the three make together; sets text.max_tokens where the network
        limits it. Raises CheckpointError where they belong to different models.
    """

    name: str
    config: Any
    network: Callable[..., Any]
    layout: Layout
    text: Callable[[Path], Any]
    vae: Callable[[Path], Any]
    fit: Callable[[Any, Any, Any], SizeRule]

    def build(self, config: Any, **options: Any) -> Any:
        """`network(config, **options)` on the meta device. Raises ConfigError for a config that builds none."""
        with reading("transformer/config.json"), torch.device("meta"):
            return self.network(config, **options)

    def open(self, folder: Path, raw: dict[str, Any]) -> tuple[Any, Any, SizeRule]:
        """Text stage, VAE and sizes of a model folder whose transformer/config.json holds `raw`; no weight is
        read. Raises CheckpointError, ConfigError."""
        config, text, vae = self.config.from_dict(raw), self.text(folder), self.vae(folder)
        with reading(f"{folder}: the parts' config.json"):
            return text, vae, self.fit(config, text, vae)


def must_equal(*pairs: tuple[str, int, str, int]) -> None:
    """For `Family.fit`: raises CheckpointError unless each (name, value, other name, value) agrees."""
    for name, value, other, wanted in pairs:
        if value != wanted:
            raise CheckpointError(
                f"{name} {value} does not fit the transformer's {other} {wanted}: parts of two models; "
                "download one whole"
            )


def family_of(config: dict[str, Any]) -> Family:
    """The family of a transformer's config.json content; raises CheckpointError for any other."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"transformer/config.json says _class_name {name!r}, which is none of the supported families: "
            + ", ".join(FAMILIES)
        )
    family: Family = import_module(f".models.transformers.{FAMILIES[name]}", __package__).FAMILY
    return family
