"""Arguments callers give, checked: what cannot work is a ConfigError that names the nearest thing that can."""

from __future__ import annotations

import inspect
import math
import operator
import os
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from .errors import ConfigError, DeviceError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTIZED = ("int8", "fp8", "int4", "w4a16", "nvfp4")  # what linear layers can be, see passes.layers.KINDS
PRECISIONS = {"auto": None, "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"} | dict.fromkeys(QUANTIZED)
ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
ON_OOM = ("raise", "split")
OUTPUTS = ("pil", "np", "pt", "latent")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
MAX_PROMPT = 100_000  # characters; models read at most some thousand tokens of a prompt

P = ParamSpec("P")
T = TypeVar("T")


def shown(value: object) -> str:
    """Return any value as messages quote it: short, in one line, whatever its own repr does."""
    try:
        text = _QUOTE.repr(value)
    except Exception:  # its own, or Python's for an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return f"{' '.join(text.split()):.120}"


_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 80


# -- one value of a kind: returned as Python's own type, or (check_*) a ConfigError that names it ----------------------


def integer(value: object) -> int | None:
    """Return the int that Python, numpy and torch say `value` is; None for anything else, True and False included."""
    try:
        boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
        return None if boolean else int(operator.index(value))  # type: ignore[arg-type]
    except Exception:  # whatever an object's own __index__ raises
        return None


def number(value: object) -> float | None:
    """Return the finite float that Python or numpy say `value` is; None for anything else."""
    try:
        found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        return found if math.isfinite(found) else None
    except Exception:  # an integer beyond floats
        return None


def items(value: object) -> list[Any] | None:
    """Return what a list, tuple, range, or an array of one axis holds; None for anything else."""
    try:
        if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1:
            return list(value.tolist())
        return list(value) if isinstance(value, (list, tuple, range)) else None
    except Exception:  # a tensor without values
        return None


def required(found: T | None, name: str, wanted: str, value: object) -> T:
    """Return `found`, what `value` was read as; raise ConfigError where that is None."""
    if found is None:
        raise ConfigError(f"{name} must be {wanted}; got {shown(value)}")
    return found


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    found = integer(value)
    fits = found is not None and least <= found and (most is None or found <= most)
    wanted = f"an integer of at least {least}" if least != 1 else "a positive integer"
    return required(found if fits else None, name, wanted + f", {most} at most" * (most is not None), value)


def check_count(name: str, value: object) -> int:
    return check_integer(name, value, 1)


def check_counts(name: str, value: object) -> tuple[int, ...]:
    found = required(items(value), name, "a list of positive integers", value)
    return tuple(check_count(f"each of {name}", item) for item in found)


def check_number(name: str, value: object) -> float:
    return required(number(value), name, "a finite number", value)


def check_flag(name: str, value: object) -> bool:
    return required(bool(value) if isinstance(value, (bool, np.bool_)) else None, name, "True or False", value)


def check_text(name: str, value: object) -> str:
    return required(str(value) if isinstance(value, str) else None, name, "text", value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    known = isinstance(value, str) and value in choices
    return required(str(value) if known else None, name, f"one of {', '.join(choices)}", value)


def check_path(name: str, value: object) -> str:
    """Return the text of a path: a str, or any os.PathLike of one."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except Exception:
        text = None
    return required(text if isinstance(text, str) else None, name, "a path, as text or a pathlib.Path", value)


def check_names(name: str, value: object) -> tuple[str, ...]:
    """Return a tuple of texts, none of them empty."""
    found = items(value)
    whole = found is not None and all(isinstance(item, str) and item.strip() for item in found)
    return required(tuple(found or ()) if whole else None, name, "a list of names, none of them empty", value)


def check_paths(name: str, value: object) -> tuple[str, ...]:
    """Return the paths of a list, as text."""
    found = required(items(value), name, "a list of paths", value)
    return tuple(check_path(f"a path in {name}", item) for item in found)


def check_names_or_file(name: str, value: object) -> tuple[str, ...] | str:
    """Return the names of a list, or the path of a file of them."""
    file = isinstance(value, os.PathLike) or (isinstance(value, str) and value.strip())
    return check_path(name, value) if file else check_names(name, value)


def check_callable(name: str, value: Any, parameters: Sequence[str]) -> Any:
    """Return what can be called with `parameters`, as far as its signature tells."""
    fits = callable(value)
    try:
        inspect.signature(value).bind(*parameters)
    except TypeError:
        fits = False
    except Exception:  # some builtins tell no signature
        pass
    return required(value if fits else None, name, f"a function of ({', '.join(parameters)})", value)


def check_sides(name: str, value: object, *more: str) -> tuple[Any, ...]:
    """Return (height, width), whose values are a model's to judge or None, and a count for each of `more`."""
    found = items(value) or []
    sides = [integer(side) for side in found[:2]]
    strange = any(side is None and given is not None for side, given in zip(sides, found, strict=False))
    fits = len(found) == 2 + len(more) and not strange
    required(sides if fits else None, name, f"({', '.join(('height', 'width', *more))})", value)
    return *sides, *(check_count(f"{what} in {name}", item) for what, item in zip(more, found[2:], strict=True))


def check_device(name: str, value: Any) -> torch.device:
    """Return the device that torch understands by `value`; whether it is there, `resolve_device` says."""
    try:
        return torch.device(value)
    except Exception:
        raise ConfigError(f"{name} {shown(value)} is not a device; use 'cpu', 'cuda' or 'cuda:N'") from None


def check_dtype(name: str, value: object) -> str:
    """Return the name of a dtype that models compute in."""
    text = dtype_name(value) if isinstance(value, (str, torch.dtype)) else ""
    text = ALIASES.get(text, text)
    if text not in DTYPES:
        raise ConfigError(f"{name} {shown(value)} is not supported; use one of {', '.join(DTYPES)}")
    return text


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device; None: the first CUDA device if there is one, else the CPU. Raise DeviceError if absent."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = check_device("device", device)
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(resolved)!r} is not supported; use 'cpu', 'cuda' or 'cuda:N'")
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        if (resolved.index or 0) >= count:
            raise DeviceError(f"{resolved} is absent: this machine has {count} usable CUDA devices; use device='cpu'")
    return resolved


def has_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `device` multiplies matrices in `dtype` at full rate.

    Without AVX512-BF16 or AMX a CPU emulates bfloat16 about a hundred times slower than float32.
    """
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    flags = torch.cpu.get_capabilities()
    names = ("amx_bf16", "avx512_bf16") if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16")
    return any(flags.get(name, False) for name in names)


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return its name without the module, as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: as asked for, or (None) that of the weights, `stored`, where the device has
    arithmetic of it, else float32."""
    if dtype is None:
        return stored if has_native(stored, device) else torch.float32
    return DTYPES[check_dtype("dtype", dtype)]


def resolve_precision(precision: str | None, dtype: str | torch.dtype | None) -> tuple[str | None, Any]:
    """Return what linear layers are quantized to (one of `QUANTIZED` or None), and the dtype asked for.

    "fp32", "fp16" and "bf16" are dtypes, "auto" is what None is: the dtype that suits checkpoint and
    device. Beside those of `QUANTIZED`, dtype is that of activations and of the layers that are not quantized.
    """
    if precision is None:
        return None, dtype
    check_choice("precision", precision, tuple(PRECISIONS))
    implied = PRECISIONS[precision]
    name = None if dtype is None else check_dtype("dtype", dtype)
    if implied and name and name != implied:
        raise ConfigError(f"precision {precision} is dtype {implied}, not {name}; give one of the two")
    return (precision if precision in QUANTIZED else None), implied or dtype


def resolve_prompts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    """Return the prompts, one or several; an empty string is a prompt, an empty list is not."""
    prompts = [prompt] if isinstance(prompt, str) else items(prompt)
    if prompts is None or not all(isinstance(p, str) for p in prompts):
        raise ConfigError(f"prompt must be a string or a list of strings, not {shown(prompt)}")
    if not prompts:
        raise ConfigError("prompt is an empty list; give at least one prompt ('' is one)")
    for p in prompts:
        if len(p) > MAX_PROMPT:
            raise ConfigError(f"a prompt has {len(p):,} characters; at most {MAX_PROMPT:,} are taken: shorten it")
        try:
            p.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"prompt {shown(p)} holds half a surrogate pair, which is no text; remove it") from None
    return tuple(map(str, prompts))


@dataclass(frozen=True)
class SizeRule:
    """Image sizes a model takes: multiples of `multiple` pixels, at most max_height x max_width."""

    multiple: int
    max_height: int
    max_width: int
    default: int

    def __post_init__(self) -> None:
        most = min(self.max_height, self.max_width)
        if self.multiple < 1 or not self.multiple <= self.default <= most or self.default % self.multiple:
            raise ConfigError(
                f"images of {self.default} pixels, of multiples of {self.multiple} up to {most}, are none: the model's "
                "configs do not fit each other; download them again"
            )

    def tokens(self, height: int, width: int) -> int:
        """Return how many tokens an image of this many pixels has, by which schedulers shift times."""
        return (height // self.multiple) * (width // self.multiple)

    def resolve(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in pixels; None means the model's default size."""
        return self._axis("height", height, self.max_height), self._axis("width", width, self.max_width)

    def _axis(self, name: str, value: int | None, most: int) -> int:
        if value is None:
            return self.default
        pixels = integer(value)
        if pixels is None:
            raise ConfigError(f"{name} must be an integer number of pixels, not {shown(value)}")
        if pixels % self.multiple or not 0 < pixels <= most:
            nearest = max(round(min(max(pixels, 0), most) / self.multiple), 1) * self.multiple
            raise ConfigError(
                f"{name} {shown(pixels)} must be a multiple of {self.multiple} from {self.multiple} to {most}; "
                f"the nearest is {nearest}"
            )
        return pixels


def parse_bytes(value: int | str | None, what: str = "memory_budget") -> int | None:
    """Return the bytes of an int or of text like "12GB", "900 MiB"; None stays None. Raise ConfigError for others."""
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
        unit = text[len(number) :].strip()
        try:
            value = round(float(number) * UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            message = f"{what} {shown(value)} is no size; give bytes, or text like '12GB' or '900MiB'"
            raise ConfigError(message) from None
    found = integer(value)
    fits = found is not None and found > 0
    return required(found if fits else None, what, "a positive number of bytes, or text like '12GB'", value)


# -- names that callers know from elsewhere ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Elsewhere:
    """An argument of diffusers' pipelines, or an old one of ours.

    name: what it is called here, "" where there is no such argument. same: whether a value means the same under that
    name. idle: whether a value asks for nothing, and is left out. instead: what to do with any other value. old: the
    name was ours.
    """

    name: str = ""
    instead: str = ""
    same: Callable[[Any], bool] = lambda value: True
    idle: Callable[[Any], bool] = lambda value: value is None
    old: bool = False


def understands(table: Mapping[str, Elsewhere]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function so that keywords named in `table` are taken under their names here. Raises ConfigError where
    a value means something else here, or nothing, and TypeError where an argument is given by both names."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> T:
            for other in [name for name in given if name in table]:
                value, known = given.pop(other), table[other]
                if known.idle(value):
                    continue
                if not known.name or not known.same(value):
                    raise ConfigError(f"{other}={shown(value)} is not taken: {known.instead}")
                if known.name in given:
                    raise TypeError(f"{other}= is another name of {known.name}=: give one of the two")
                if known.old:
                    warnings.warn(f"{other}= is called {known.name}= now", DeprecationWarning, stacklevel=2)
                given[known.name] = value
            return function(*args, **given)

        return call

    return decorate


def _is(*values: object) -> Callable[[object], bool]:
    return lambda value: any(value is one or (isinstance(value, str) and value == one) for one in values)


def _each(names: str, meant: Elsewhere) -> dict[str, Elsewhere]:
    return dict.fromkeys(names.split(), meant)


OFFLOADED = "load(..., memory_budget='8GB') streams what does not fit"
CALL_NAMES = {
    "num_inference_steps": Elsewhere("nfe"), "num_images_per_prompt": Elsewhere("num_images"),
    "generator": Elsewhere("seed"), "mask_image": Elsewhere("mask"),
    "prompt_embeds": Elsewhere(
        "prompt", "give what pipe.text or pipe.read_embeds returns", lambda value: "Embeds" in type(value).__name__
    ),
    "output_type": Elsewhere(
        "output", "give output='pil', 'np' (uint8 here), 'pt' or 'latent' (normalised)", _is("pil", "pt")
    ),
    **_each("guidance_scale true_cfg_scale", Elsewhere("guidance")),
    "negative_prompt_embeds": Elsewhere(
        "negative_prompt", "give what pipe.text returns", lambda value: "Embeds" in type(value).__name__
    ),
    "return_dict": Elsewhere(instead="a Result is indexed: pipe(...)[0] is an image", idle=_is(None, True)),
    "latents": Elsewhere(instead="noise follows from seed=, one for each image"),
    "max_sequence_length": Elsewhere(instead="prompts are read to pipe.text.max_tokens tokens; leave it out"),
    **_each("timesteps sigmas", Elsewhere(instead="give nfe=, or sampler=SamplerConfig(...)")),
    **_each("attention_kwargs joint_attention_kwargs cross_attention_kwargs", Elsewhere(
        instead="adapters are merged: load(..., loras={path: weight}), or pipe.set_loras"
    )),
    **_each("callback_on_step_end callback_on_step_end_tensor_inputs", Elsewhere(
        instead="give callback=f(done, total, x0), and cancel=f() to stop"
    )),
}  # fmt: skip
LOAD_NAMES = {
    "exempt": Elsewhere("skip_layers", old=True), "text_exempt": Elsewhere("text_skip_layers", old=True),
    "pretrained_model_name_or_path": Elsewhere("path"), "torch_dtype": Elsewhere("dtype", idle=_is(None, "auto")),
    "device_map": Elsewhere("device", f"one device, device='cuda:0'; {OFFLOADED}", _is("cpu", "cuda")),
    "revision": Elsewhere(instead="write it behind the name, hf://owner/name@revision", idle=_is(None, "main")),
    "subfolder": Elsewhere(instead="write it into the path, hf://owner/name/subfolder", idle=_is(None, "")),
    "local_files_only": Elsewhere(instead="download=True fetches; nothing else does", idle=_is(None, True)),
    "cache_dir": Elsewhere(instead="set HF_HOME in the environment"),
    "token": Elsewhere(instead="set HF_TOKEN in the environment"),
    "variant": Elsewhere(instead="a variant is read where a folder has nothing else; leave it out"),
    "use_safetensors": Elsewhere(instead="only safetensors are read; convert the model", idle=_is(None, True)),
    "trust_remote_code": Elsewhere(instead="no code of a model is run; leave it out", idle=_is(None, False)),
    "quantization_config": Elsewhere(instead="give precision='int8', 'fp8' or 'int4'"),
    "low_cpu_mem_usage": Elsewhere(instead="it always is", idle=_is(None, True, False)),
    "safety_checker": Elsewhere(instead="there is none; leave it out"),
    **_each("max_memory offload_folder", Elsewhere(instead=OFFLOADED)),
}  # fmt: skip
METHODS = {
    "enable_model_cpu_offload": OFFLOADED, "enable_sequential_cpu_offload": OFFLOADED,
    "enable_vae_tiling": "load(..., tile=512) decodes in tiles", "enable_vae_slicing": "pipe(..., on_oom='split')",
    "enable_attention_slicing": "pipe(..., on_oom='split')", "load_lora_weights": "pipe.set_loras({path: weight})",
    "unload_lora_weights": "pipe.set_loras()", "set_adapters": "pipe.set_loras({path: weight})",
    "fuse_lora": "pipe.set_loras({path: weight}), which merges", "save_pretrained": "pipe.save(folder)",
    "encode_prompt": "pipe.text([prompt])",
    "transformer": "pipe.program.network", "tokenizer": "pipe.text.tokenizer", "text_encoder": "pipe.text",
    "set_progress_bar_config": "callback= of a call",
    "cuda": "load(..., device='cuda')", "cpu": "load(..., device='cpu')",
    "enable_xformers_memory_efficient_attention": "print(pipe.plan): the fastest attention here is chosen",
}  # fmt: skip
