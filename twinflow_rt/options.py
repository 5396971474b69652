"""The options of `load`, declared once: name, type, default and help; and dataclasses as options of a command.

The signature of `load`, the options of every command, the server, Ray, the ComfyUI nodes, the bench and the table in
docs/api.md are made from the fields of `LoadOptions`, or compared with them by a test. Imports nothing heavy, so that
the command line prints its help at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    from .checkpoint.lora import Loras
    from .sampling.schedule import SamplerConfig

T = TypeVar("T")

CAPTURES = ("auto", "graphs", "off")


def about(
    help: str, otherwise: str = "", *, flag: str | None = "", old_flag: str = "", page: str = "", **argparse: Any
) -> dict[str, Any]:
    """Return the metadata of a dataclass's field that is an option.

    otherwise: what the default comes to, in words. flag: how the command line writes it, "" for the name with dashes,
    None where no command takes it; old_flag: how it did before. page: the page of docs/ to read on. argparse: what
    `ArgumentParser.add_argument` is told, beside what follows from the field's type.
    """
    return {
        "help": help, "otherwise": otherwise, "flag": flag, "old_flag": old_flag, "page": page, "argparse": argparse
    }  # fmt: skip


def parse_lora(text: str) -> tuple[str, float]:
    """ "PATH" or "PATH:WEIGHT" -> (path, weight)."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0  # the colon is part of the path


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model. Raises ConfigError for values of another kind, and holds the others as Python's own types;
    what they mean for a machine and a model, `load` checks. Can be pickled where its values can."""

    base: str | Path | None = field(default=None, metadata=about(
        "where `path` is the weights of one network, a file or a folder of them: the model folder, or hf://owner/name, "
        "whose configs, tokenizer and other networks go with it", "none", metavar="FOLDER", page="models.md",
    ))  # fmt: skip
    files: Sequence[str | Path] = field(default=(), metadata=about(
        "more weights that take the place of the base's: GGUF or safetensors files of a network, text encoder, VAE or "
        "second time embedder, told apart by their names and shapes", "none", metavar="FILE", page="models.md",
    ))  # fmt: skip
    device: str | torch.device | None = field(
        default=None, metadata=about("cpu, cuda or cuda:N", "the GPU if there is one")
    )
    dtype: str | torch.dtype | None = field(default=None, metadata=about(
        "float32, bfloat16 or float16 (or torch's own): what the model computes in",
        "the checkpoint's, or float32 where the device cannot compute in that at full rate",
    ))  # fmt: skip
    nfe: int | None = field(default=None, metadata=about(
        "network evaluations per image that the network is folded for", "1, or what was saved", metavar="N",
    ))  # fmt: skip
    sampler: SamplerConfig | str | None = field(
        default=None, metadata=about("instead of `nfe`: a preset's name or a `SamplerConfig`", flag=None)
    )
    loras: Loras | None = field(default=None, metadata=about(
        "LoRA adapters to merge: {path: weight} or [path or (path, weight), ...]; on a command line, one each time",
        "none; of an artifact, those it was saved with", flag="--lora", metavar="PATH[:WEIGHT]",
        type=parse_lora, action="append",
    ))  # fmt: skip
    progress: Callable[[str, int], None] | None = field(
        default=None, metadata=about("called with (part, bytes) as tensors arrive", flag=None)
    )
    precision: str | None = field(default=None, metadata=about(
        "fp32, fp16 or bf16, as `dtype`; int8 (CPUs, NVIDIA GPUs from compute capability 8.0 on) or fp8 (GPUs from 8.9 "
        "on; a CPU emulates it, slowly): linear layers of the transformer's blocks with 8-bit weights and activations; "
        "int4: likewise, weights in 4 bits; w4a16: weights in 4 bits, activations in the dtype; nvfp4: 4-bit floats "
        "(GPUs of 12.0); auto: int8, fp8 or bf16 if it measured faster and accurate here (`twinflow-rt sensitivity`); "
        "also int8 or int4 within a `memory_budget` that the network exceeds otherwise",
        "what suits checkpoint and device; of quantized files int4 or int8", page="precision.md",
    ))  # fmt: skip
    skip_layers: Sequence[str] | str | Path = field(default=(), metadata=about(
        "parts of names of layers kept out of `precision`, because they measured sensitive, or with another one "
        "(NAME:int8), or one .json file of `twinflow-rt sensitivity --save`", "none", old_flag="--exempt",
        metavar="NAME", page="precision.md",
    ))  # fmt: skip
    fp8_attention: bool = field(default=False, metadata=about(
        "with precision fp8: attention's scores are float8 products as well", "no", page="precision.md",
    ))  # fmt: skip
    text_precision: str | None = field(default=None, metadata=about(
        "int8, fp8, int4 or w4a16: the linear layers of the text encoders' blocks, where `precision` never reaches",
        "their dtype", page="precision.md",
    ))  # fmt: skip
    text_skip_layers: Sequence[str] = field(default=(), metadata=about(
        "parts of names of layers kept out of `text_precision`", "none", metavar="NAME", page="precision.md",
    ))  # fmt: skip
    prompt_cache: int = field(default=0, metadata=about(
        "bytes of device memory that keep prompts seen before, as the network reads them (`Pipeline.prompts` counts "
        "hits)", "none", metavar="BYTES",
    ))  # fmt: skip
    download: bool = field(default=False, metadata=about(
        "fetch a model hf://owner/name[@revision][/subfolder] and check its files' hashes; nothing else opens a "
        "connection", "no",
    ))  # fmt: skip
    capture: str = field(default="auto", metadata=about(
        "graphs: every stage is recorded once per shape and replayed, as a CUDA graph; auto: so where it pays, and as "
        "CPU graphs on a CPU; off: never", "auto", choices=CAPTURES, page="stages.md",
    ))  # fmt: skip
    batch_invariant: bool = field(default=False, metadata=about(
        "an image's bits do not depend on the images beside it, at the price of what batching gains", "no",
        page="reliability.md",
    ))  # fmt: skip
    check_finite: bool = field(default=True, metadata=about(
        "refuse NaN and infinity by name instead of making black images: in constants, small tensors and adapters when "
        "they are read, in the latents and pixels of every call", "yes", flag="--no-check-finite", action="store_false",
        page="reliability.md",
    ))  # fmt: skip
    memory_budget: int | str | None = field(default=None, metadata=about(
        "bytes, or text like 12GB, of device memory (on a CPU: anonymous memory) that the model may take at its peak: "
        "streams weights and decodes in tiles as it takes, decided before anything is loaded", "none", metavar="SIZE",
        page="stages.md",
    ))  # fmt: skip
    largest: tuple[int | None, int | None, int] | None = field(default=None, metadata=about(
        "(height, width, images) of the largest call that `memory_budget` must hold for",
        "one image of the default size", flag=None, page="stages.md",
    ))  # fmt: skip
    tile: int | None = field(default=None, metadata=about(
        "decode larger images in tiles of this side", "whole, or as the budget needs", metavar="PIXELS",
        page="stages.md",
    ))  # fmt: skip
    preview: str | Path | None = field(default=None, metadata=about(
        "folder of an AutoencoderTiny (taef1, taesd3, ...) that calls with preview=True decode with, not exactly",
        "none", metavar="FOLDER", page="stages.md",
    ))  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class GuidanceOptions:
    """How a call is guided; of generate, requests to a server and the ComfyUI node. Raises ConfigError."""

    guidance: float | None = field(default=None, metadata=about(
        "scale of classifier-free guidance, for ordinary flow models that are not distilled: diffusers' "
        "guidance_scale, of Qwen-Image true_cfg_scale", "none", metavar="SCALE", page="models.md",
    ))  # fmt: skip
    negative_prompt: str | None = field(default=None, metadata=about(
        "with guidance: what images are led away from", "the empty prompt", metavar="TEXT", page="models.md",
    ))  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)

    def given(self) -> dict[str, Any]:
        """Return those that are asked for, as arguments of a call."""
        return {name: value for name, value in vars(self).items() if value is not None}


def check_fields(options: Any) -> None:
    """Check every field of a dataclass of options by its annotation, and give it the value that the check returns.
    Raise ConfigError."""
    checks = _checks()
    for option in fields(options):
        value = getattr(options, option.name)
        if value is not None or "None" not in str(option.type):
            object.__setattr__(options, option.name, checks[str(option.type)](option.name, value))


def _checks() -> dict[str, Callable[[str, Any], Any]]:
    """Return, for each type that an option is annotated with, what checks a value and returns it. What is resolved on
    the machine that loads stays as it was given."""
    from . import config
    from .checkpoint.lora import resolve_loras
    from .sampling.schedule import resolve_sampler

    def kept(check: Callable[[str, Any], object]) -> Callable[[str, Any], Any]:
        return lambda name, value: (check(name, value), value)[1]

    return {
        "bool": config.check_flag,
        "float": config.check_number,
        "float | None": config.check_number,
        "int": partial(config.check_integer, least=0),
        "int | None": config.check_count,
        "int | str | None": kept(lambda name, value: config.parse_bytes(value, name)),
        "str": config.check_text,
        "str | None": config.check_text,
        "Path | None": lambda name, value: Path(config.check_path(name, value)),
        "str | Path | None": kept(config.check_path),
        "str | torch.device | None": kept(config.check_device),
        "str | torch.dtype | None": kept(config.check_dtype),
        "Sequence[str]": config.check_names,
        "Sequence[str | Path]": config.check_paths,
        "tuple[str, ...]": config.check_names,
        "tuple[int, ...]": config.check_counts,
        "tuple[int, int] | None": config.check_sides,
        "Sequence[str] | str | Path": config.check_names_or_file,
        "Callable[[str, int], None] | None": partial(config.check_callable, parameters=("part", "bytes")),
        "SamplerConfig | str | None": kept(lambda name, value: resolve_sampler(None, value)),
        "Loras | None": kept(lambda name, value: resolve_loras(value)),
        "tuple[int | None, int | None, int] | None": lambda name, value: config.check_sides(name, value, "images"),
    }


def flag(option: Field[Any]) -> str | None:
    """Return how the command line writes an option; None where no command takes it."""
    written: str | None = option.metadata["flag"]
    return f"--{option.name.replace('_', '-')}" if written == "" else written


def otherwise(option: Field[Any]) -> str:
    """Return what holds where an option is not given, in words; "" where nothing is to be said."""
    return option.metadata["otherwise"] or ("" if option.default in (None, False, ()) else str(option.default))


def describe(option: Field[Any]) -> str:
    """Return an option's help and what its default comes to, in one line."""
    default = otherwise(option)
    return f"{option.metadata['help']}; default: {default}" if default else str(option.metadata["help"])


def table() -> str:
    """Return the options of `load` as the table in docs/api.md; `python -m twinflow_rt.options` prints it."""
    rows = ["| option | meaning | default |", "|---|---|---|"]
    for option in fields(LoadOptions):
        page, default = option.metadata["page"], otherwise(option)
        more = f" ([{page}]({page}))" if page else ""
        rows.append(f"| `{option.name}` | {option.metadata['help']}{more} | {default} |")
    return "\n".join(rows)


def add_arguments(
    parser: argparse._ActionsContainer, options: Any, only: Collection[str] = (), skip: Collection[str] = ()
) -> None:
    """Declare the fields of `options`, a dataclass, to a parser: those in `only`, or all but those in `skip`."""
    for option in fields(options):
        written = flag(option)
        if written is None or option.name in skip or (only and option.name not in only):
            continue
        told = {"dest": option.name, **_by_type(str(option.type)), **option.metadata["argparse"]}
        parser.add_argument(written, default=option.default, help=describe(option).replace("%", "%%"), **told)
        if old := option.metadata["old_flag"]:
            parser.add_argument(old, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **told)


def read_arguments(args: argparse.Namespace, options: Callable[..., T], **others: Any) -> T:
    """Return the dataclass `options` of parsed arguments; fields not declared have their defaults, or `others`."""
    names: list[str] = [option.name for option in fields(options)]  # type: ignore[arg-type]
    return options(**({name: getattr(args, name) for name in names if hasattr(args, name)} | others))


def _by_type(kind: str) -> dict[str, Any]:
    """Return what argparse is told of a field of this type, as its annotation reads."""
    if kind == "bool":
        return {"action": "store_true"}
    if kind.startswith("Sequence["):
        return {"nargs": "+"}
    kinds = [name for name in kind.split(" | ") if name != "None"]
    return {"type": {"int": int, "float": float, "Path": Path}.get(kinds[0], str) if len(kinds) == 1 else str}


if __name__ == "__main__":
    print(table())
