"""Model folders without weights: published configurations, to be measured with no download.

`skeleton` writes what a downloaded folder holds but for the safetensors, in whose place
`random_file` makes tensors on demand. Everything else, the compile path included, is what a real
checkpoint meets. `scale` narrows every network and `layers` shortens the deep ones, for small machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..checkpoint.atomic import write_json
from ..checkpoint.fuse import sources
from ..checkpoint.layout import Layout
from ..errors import ConfigError
from ..families import FAMILIES, family_of
from ..models.meta_device import meta_device
from ..training.text import CHAT_TEMPLATE, SPECIAL
from . import random_file
from .blueprints import BLUEPRINTS, EULER, Blueprint

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# one token a word, number, mark or line end, which is about what large vocabularies reach on English
TOKENS = r"<\|[a-z_]+\|>|\w+|[^\w\s]|\n"
WORDS = (
    "a", "an", "the", "of", "in", "on", "with", "and", "above", "below", "left", "right", "to", "red", "green",
    "blue", "yellow", "circle", "square", "triangle", "cross", "two", "three", "user", "assistant", "variation",
    "photograph", "lighthouse", "storm", "at", "dusk",
)  # fmt: skip


def skeleton(
    name: str, folder: Path, *, scale: float = 1.0, layers: int | None = None, dtype: str = "bfloat16",
    plain: bool = False,
) -> Path:  # fmt: skip
    """Write the folder of model `name` with random weights; kilobytes, whatever the model's size.

    scale: factor on all widths, in (0, 1]. layers: at most so many in each deep stack. dtype: of the
    declared weights. plain: the ordinary flow model, without TwinFlow's second time embedder. Raises ConfigError for a
    model that this build has no network of.
    """
    blueprint = _blueprint(name, scale, layers)
    if plain and blueprint.scheduler is None:
        blueprint = replace(blueprint, transformer=blueprint.transformer | {"twinflow": False}, scheduler=EULER)
    family = family_of(blueprint.transformer)
    with meta_device():
        network = family.network(family.config.from_dict(blueprint.transformer))
    _write_part(folder / "transformer", blueprint.transformer, network, family.layout, dtype)
    for part, (config, module) in blueprint.parts.items():
        network, layout = import_module(f"twinflow_rt.models.{module}").MODEL.declare(config)
        _write_part(folder / part, config, network, layout, dtype)
        if part.startswith("text_encoder"):
            _write_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
    if blueprint.scheduler is not None:
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", blueprint.scheduler)
    write_json(folder / "model_index.json", {"_class_name": "random weights", "_name": name})
    return folder


@contextmanager
def temporary(name: str, **options: Any) -> Iterator[Path]:
    """Write `skeleton` into a folder of the model's name that is removed afterwards."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / f"random-{name}"
        yield skeleton(name, folder, **options)


def _blueprint(name: str, scale: float, layers: int | None) -> Blueprint:
    if name not in BLUEPRINTS:
        raise ConfigError(f"no random weights for {name!r}; use one of {', '.join(BLUEPRINTS)}")
    if not 0 < scale <= 1 or (layers is not None and layers < 1):
        raise ConfigError(f"scale must be in (0, 1] and layers at least 1; got {scale} and {layers}")
    blueprint = BLUEPRINTS[name](scale, layers)
    if blueprint.transformer["_class_name"] not in FAMILIES:
        raise ConfigError(f"this build has no network of {name}; it has {', '.join(FAMILIES)}")
    return blueprint


def _write_part(folder: Path, config: dict[str, Any], network: nn.Module, layout: Layout, dtype: str) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    random_file.write(folder, checkpoint_shapes(network, layout, config), CODES[dtype])


def checkpoint_shapes(network: nn.Module, layout: Layout, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a checkpoint that `network` (on the meta device) is read from."""
    shapes = {}
    for name, tensor in network.state_dict().items():
        names = sources(name, layout.fused)
        rows = [tensor.shape[0] // len(names) if tensor.ndim else 0] * len(names)
        if "qkv" in name and config.get("num_key_value_heads"):  # grouped heads: fewer rows of keys and values
            heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
            size = tensor.shape[0] // (heads + 2 * groups)
            rows = [heads * size, groups * size, groups * size]
        for part, n in zip(names, rows, strict=True):
            shapes[part] = (n, *tensor.shape[1:]) if len(names) > 1 else tuple(tensor.shape)
    return shapes


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = [chr(c) for c in range(33, 127)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL, "<|other|>", "\n", *letters, *WORDS)))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|other|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKENS), behavior="removed", invert=True)
    core.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True)
    core.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    write_json(folder / "tokenizer_config.json", {**kind, "chat_template": CHAT_TEMPLATE})
