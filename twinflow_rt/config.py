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
from typing import Any, ParamSpec, TypeGuard, TypeVar

import numpy as np
import torch

from .errors import ConfigError, DeviceError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = {"auto": None, "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": None, "fp8": None}
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


# -- one value of a kind: returned as Python's own type, or refused with its name -------------------------------------


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


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite float or an integer, as JSON has them."""
    return isinstance(value, (int, float)) and number(value) is not None


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return `value` as an int from `least` to `most`. Raise ConfigError for anything else, as all of these do."""
    found = integer(value)
    if found is None or found < least or (most is not None and found > most):
        wanted = {0: "0 or a positive integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        wanted = wanted if most is None else f"an integer from {least} to {most}"
        raise ConfigError(f"{name} must be {wanted}; got {shown(value)}")
    return found


def check_count(name: str, value: object) -> int:
    return check_integer(name, value, 1)


def check_counts(name: str, value: object) -> tuple[int, ...]:
    if (found := items(value)) is None:
        raise ConfigError(f"{name} must be a list of positive integers; got {shown(value)}")
    return tuple(check_count(f"each of {name}", item) for item in found)


def check_number(name: str, value: object) -> float:
    if (found := number(value)) is None:
        raise ConfigError(f"{name} must be a finite number; got {shown(value)}")
    return found


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"{name} must be True or False; got {shown(value)}")
    return bool(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
    return str(value)


def check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text; got {shown(value)}")
    return str(value)


def check_path(name: str, value: object) -> str:
    """Return the text of a path: a str, or any os.PathLike of one."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except Exception:
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a path, as text or a pathlib.Path; got {shown(value)}")
    return text


def check_names(name: str, value: object) -> tuple[str, ...]:
    """Return a tuple of texts, none of them empty."""
    found = items(value)
    if found is None or not all(isinstance(item, str) and item.strip() for item in found):
        example = f"; write [{shown(value)}]" if isinstance(value, str) and value.strip() else ""
        raise ConfigError(f"{name} must be a list of names, none of them empty; got {shown(value)}{example}")
    return tuple(map(str, found))


def check_names_or_file(name: str, value: object) -> tuple[str, ...] | str:
    """Return the names of a list, or the path of a file of them."""
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.strip()):
        return check_path(name, value)
    return check_names(name, value)


def check_callable(name: str, value: Any, parameters: Sequence[str]) -> Any:
    """Return what can be called with `parameters`, as far as its signature tells."""
    try:
        if callable(value):
            inspect.signature(value).bind(*parameters)
            return value
    except TypeError:
        pass
    except Exception:  # some builtins tell no signature
        return value
    raise ConfigError(f"{name} must be a function of ({', '.join(parameters)}); got {shown(value)}")


def check_sides(name: str, value: object, *more: str) -> tuple[Any, ...]:
    """Return (height, width), whose values are a model's to judge or None, and a count for each of `more`."""
    found = items(value) or []
    sides = [integer(side) for side in found[:2]]
    if len(found) != 2 + len(more) or any(
        side is None and given is not None for side, given in zip(sides, found, strict=False)
    ):
        raise ConfigError(f"{name} must be ({', '.join(('height', 'width', *more))}); got {shown(value)}")
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
    """Return what linear layers are quantized to ("int8", "fp8" or None), and the dtype asked for.

    "fp32", "fp16" and "bf16" are dtypes, "auto" is what None is: the dtype that suits checkpoint and
    device. Beside "int8" and "fp8", dtype is that of activations and of the layers that are not quantized.
    """
    if precision is None:
        return None, dtype
    check_choice("precision", precision, tuple(PRECISIONS))
    implied = PRECISIONS[precision]
    name = None if dtype is None else check_dtype("dtype", dtype)
    if implied and name and name != implied:
        raise ConfigError(f"precision {precision} is dtype {implied}, not {name}; give one of the two")
    return (precision if precision in ("int8", "fp8") else None), implied or dtype


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
    if found is None or found <= 0:
        raise ConfigError(f"{what} must be a positive number of bytes, or text like '12GB'; got {shown(value)}")
    return found


# -- names that callers know from elsewhere ---------------------------------------------------------------------------


def is_none(value: object) -> bool:
    return value is None


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
    idle: Callable[[Any], bool] = is_none
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


def _no_guidance(value: object) -> bool:
    strength = number(value)
    return value is None or (strength is not None and strength <= 1)


def _no_text(value: object) -> bool:
    texts = items(value) or [value]
    return all(text is None or (isinstance(text, str) and not text.strip()) for text in texts)


def _is_embeds(value: object) -> bool:
    return type(value).__name__ == "PromptEmbeds"  # of the text stage, which lies above


def _is(*values: object) -> Callable[[object], bool]:
    return lambda value: any(value is one or (isinstance(value, str) and value == one) for one in values)


GUIDED = "TwinFlow's models need no guidance, one evaluation makes the image; leave it out"
SCHEDULED = "give nfe=, or sampler=SamplerConfig(...)"
ADAPTED = "adapters are merged: load(..., loras={path: weight}), or pipe.set_loras"
WATCHED = "give callback=f(done, total, x0), and cancel=f() to stop"
OFFLOADED = "load(..., memory_budget='8GB') streams what does not fit"
CALL_NAMES = {
    "num_inference_steps": Elsewhere("nfe"),
    "num_images_per_prompt": Elsewhere("num_images"),
    "generator": Elsewhere("seed"),
    "prompt_embeds": Elsewhere("prompt", "give what pipe.text or pipe.read_embeds returns", _is_embeds),
    "output_type": Elsewhere(
        "output", "give output='pil', 'np' (uint8 here), 'pt' or 'latent' (normalised)", _is("pil", "pt")
    ),
    "guidance_scale": Elsewhere(instead=GUIDED, idle=_no_guidance),
    "true_cfg_scale": Elsewhere(instead=GUIDED, idle=_no_guidance),
    "negative_prompt": Elsewhere(instead=GUIDED, idle=_no_text),
    "negative_prompt_embeds": Elsewhere(instead=GUIDED),
    "return_dict": Elsewhere(instead="a Result is indexed: pipe(...)[0] is an image", idle=_is(None, True)),
    "latents": Elsewhere(instead="noise follows from seed=, one for each image"),
    "max_sequence_length": Elsewhere(instead="prompts are read to pipe.text.max_tokens tokens; leave it out"),
    "timesteps": Elsewhere(instead=SCHEDULED), "sigmas": Elsewhere(instead=SCHEDULED),
    "attention_kwargs": Elsewhere(instead=ADAPTED), "joint_attention_kwargs": Elsewhere(instead=ADAPTED),
    "cross_attention_kwargs": Elsewhere(instead=ADAPTED), "callback_on_step_end": Elsewhere(instead=WATCHED),
    "callback_on_step_end_tensor_inputs": Elsewhere(instead=WATCHED),
}  # fmt: skip
LOAD_NAMES = {
    "exempt": Elsewhere("skip_layers", old=True), "text_exempt": Elsewhere("text_skip_layers", old=True),
    "pretrained_model_name_or_path": Elsewhere("path"),
    "torch_dtype": Elsewhere("dtype", idle=_is(None, "auto")),
    "device_map": Elsewhere("device", f"one device, device='cuda:0'; {OFFLOADED}", _is("cpu", "cuda")),
    "revision": Elsewhere(instead="write it behind the name, hf://owner/name@revision", idle=_is(None, "main")),
    "subfolder": Elsewhere(instead="write it into the path, hf://owner/name/subfolder", idle=_is(None, "")),
    "local_files_only": Elsewhere(instead="download=True fetches; nothing else does", idle=_is(None, True)),
    "cache_dir": Elsewhere(instead="set HF_HOME in the environment"),
    "token": Elsewhere(instead="set HF_TOKEN in the environment"),
    "variant": Elsewhere(instead="a variant is read where a folder has nothing else; leave it out"),
    "use_safetensors": Elsewhere(instead="only safetensors are read; convert the model", idle=_is(None, True)),
    "trust_remote_code": Elsewhere(instead="no code of a model is run; leave it out", idle=_is(None, False)),
    "quantization_config": Elsewhere(instead="give precision='int8' or 'fp8'"),
    "max_memory": Elsewhere(instead=OFFLOADED), "offload_folder": Elsewhere(instead=OFFLOADED),
    "low_cpu_mem_usage": Elsewhere(instead="it always is", idle=_is(None, True, False)),
    "safety_checker": Elsewhere(instead="there is none; leave it out"),
}  # fmt: skip
METHODS = {
    "enable_model_cpu_offload": OFFLOADED, "enable_sequential_cpu_offload": OFFLOADED,
    "enable_vae_tiling": "load(..., tile=512) decodes in tiles", "enable_vae_slicing": "pipe(..., on_oom='split')",
    "enable_attention_slicing": "pipe(..., on_oom='split')", "load_lora_weights": "pipe.set_loras({path: weight})",
    "unload_lora_weights": "pipe.set_loras()", "set_adapters": "pipe.set_loras({path: weight})",
    "fuse_lora": "pipe.set_loras({path: weight}), which merges", "save_pretrained": "pipe.save(folder)",
    "encode_prompt": "pipe.text([prompt])", "scheduler": "pipe.sampler, or nfe= of a call",
    "transformer": "pipe.program.network", "tokenizer": "pipe.text.tokenizer", "text_encoder": "pipe.text",
    "set_progress_bar_config": "callback= of a call",
    "cuda": "load(..., device='cuda')", "cpu": "load(..., device='cpu')",
    "enable_xformers_memory_efficient_attention": "print(pipe.plan): the fastest attention here is chosen",
}  # fmt: skip
