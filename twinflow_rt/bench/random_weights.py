"""Model folders without weights: published configurations, to be measured with no download.

`skeleton` writes what a downloaded folder holds but for the safetensors, in whose place
`passes/random.py` makes tensors on demand. Everything else, the compile path included, is what a real
checkpoint meets. `scale` narrows every network and `layers` shortens the deep ones, for small machines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..models import FAMILIES, family_of
from ..passes import random
from ..passes.fuse import sources
from ..passes.load import Layout

NAMES = ("z-image", "qwen-image", "sd3.5-m", "sana")
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# one token a word, which is about what large vocabularies reach on English; words beyond these are
# spelled in letters
WORDS = (
    "a", "an", "the", "of", "in", "on", "with", "and", "above", "below", "left", "right", "to", "red", "green",
    "blue", "yellow", "circle", "square", "triangle", "cross", "two", "three", "user", "assistant", "variation",
    "photograph", "lighthouse", "storm", "at", "dusk",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A stage's network: config.json of its folder, and the module whose MODEL reads it."""

    config: dict[str, Any]
    module: str


@dataclass(frozen=True)
class Blueprint:
    """A published model: class of its transformer, config.json of every part."""

    transformer: dict[str, Any]
    parts: dict[str, Part]


def z_image(scale: float, layers: int | None) -> Blueprint:
    """Z-Image 6.15B: 30 layers of 30 heads x 128, Qwen3-4B, Flux's 16-channel VAE."""
    heads, width = _part(30, scale), _rounded(2560, scale, 64)
    transformer = {
        "_class_name": "ZImageTransformer2DModel", "dim": 128 * heads, "n_heads": heads, "n_kv_heads": heads,
        "n_layers": _depth(30, layers), "n_refiner_layers": _depth(2, layers), "cap_feat_dim": width,
        "in_channels": 16, "axes_dims": [32, 48, 48], "axes_lens": [1024, 512, 512],
    }  # fmt: skip
    text = {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": width, "head_dim": 128,
        "intermediate_size": _rounded(9728, scale, 64), "num_hidden_layers": _depth(35, layers) + 1,
        "num_attention_heads": 4 * _part(8, scale), "num_key_value_heads": _part(8, scale),
        "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    parts = {"text_encoder": Part(text, "qwen3"), "vae": Part(_flux_vae(scale), "autoencoder_kl")}
    return Blueprint(transformer, parts)


def _flux_vae(scale: float) -> dict[str, Any]:
    channels = [_rounded(c, scale, 32) for c in (128, 256, 512, 512)]
    return {
        "_class_name": "AutoencoderKL", "block_out_channels": channels, "layers_per_block": 2,
        "norm_num_groups": 32, "latent_channels": 16, "sample_size": 1024, "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip


BLUEPRINTS: dict[str, Callable[[float, int | None], Blueprint]] = {"z-image": z_image}


def skeleton(
    name: str, folder: Path, *, scale: float = 1.0, layers: int | None = None, dtype: str = "bfloat16"
) -> Path:  # fmt: skip
    """Writes the folder of model `name` with random weights; kilobytes, whatever the model's size.

    scale: factor on all widths, in (0, 1]. layers: at most so many in each deep stack. dtype: of the
    declared weights. Raises ConfigError for a model that this build has no network of.
    """
    blueprint = _blueprint(name, scale, layers)
    family = family_of(blueprint.transformer)
    config = family.config.from_dict(blueprint.transformer)
    with torch.device("meta"):
        network = family.network(config)
    _write_part(folder / "transformer", blueprint.transformer, network, family.layout, dtype)
    for part, declared in blueprint.parts.items():
        model = import_module(f"twinflow_rt.models.{declared.module}").MODEL
        config = model.config.from_dict(declared.config)
        with torch.device("meta"):
            network = model.network(config)
        _write_part(folder / part, declared.config, network, model.layout(config), dtype)
    _write_tokenizer(folder / "tokenizer")
    _write_json(folder / "model_index.json", {"_class_name": "random weights", "_name": name})
    return folder


@contextmanager
def temporary(name: str, **options: Any) -> Iterator[Path]:
    """`skeleton` in a folder that is removed afterwards; its name is the model's."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / f"random-{name}"
        yield skeleton(name, folder, **options)


def _blueprint(name: str, scale: float, layers: int | None) -> Blueprint:
    if name not in NAMES:
        raise ConfigError(f"no random weights for {name!r}; use one of {', '.join(NAMES)}")
    if not 0 < scale <= 1 or (layers is not None and layers < 1):
        raise ConfigError(f"scale must be in (0, 1] and layers at least 1; got {scale} and {layers}")
    blueprint = BLUEPRINTS[name](scale, layers) if name in BLUEPRINTS else None
    if blueprint is None or blueprint.transformer["_class_name"] not in FAMILIES:
        raise ConfigError(f"this build cannot generate with {name}; it has {', '.join(BLUEPRINTS)}")
    return blueprint


def _part(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _rounded(width: int, scale: float, multiple: int) -> int:
    return max(1, round(width * scale / multiple)) * multiple


def _depth(count: int, layers: int | None) -> int:
    return min(count, layers or count)


def _write_part(folder: Path, config: dict[str, Any], network: nn.Module, layout: Layout, dtype: str) -> None:
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    random.write(folder, checkpoint_shapes(network, layout, config), CODES[dtype])


def checkpoint_shapes(network: nn.Module, layout: Layout, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint that `network` (on the meta device) is read from."""
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
    vocab = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL, "<|other|>", *letters, *WORDS)))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|other|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    core.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True)
    core.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    _write_json(folder / "tokenizer_config.json", {**kind, "chat_template": CHAT_TEMPLATE})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
