"""Arguments callers give, checked: what cannot work is a ConfigError that names the nearest thing that can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from .errors import ConfigError, DeviceError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = {"auto": None, "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": None, "fp8": None}
ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
ON_OOM = ("raise", "split")
OUTPUTS = ("pil", "np", "pt", "latent")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
MAX_PROMPT = 100_000  # characters; models read at most some thousand tokens of a prompt


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device; None: the first CUDA device if there is one, else the CPU. Raise DeviceError if absent."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r} is not a device; use 'cpu', 'cuda' or 'cuda:N'") from None
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
    name = dtype_name(dtype)
    name = ALIASES.get(name, name)
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_precision(precision: str | None, dtype: str | torch.dtype | None) -> tuple[str | None, Any]:
    """Return what linear layers are quantized to ("int8", "fp8" or None), and the dtype asked for.

    "fp32", "fp16" and "bf16" are dtypes, "auto" is what None is: the dtype that suits checkpoint and
    device. Beside "int8" and "fp8", dtype is that of activations and of the layers that are not quantized.
    """
    if precision is None:
        return None, dtype
    check_choice("precision", precision, tuple(PRECISIONS))
    implied = PRECISIONS[precision]
    name = None if dtype is None else dtype_name(dtype)
    if implied and name and ALIASES.get(name, name) != implied:
        raise ConfigError(f"precision {precision} is dtype {implied}, not {name}; give one of the two")
    return (precision if precision in ("int8", "fp8") else None), implied or dtype


def resolve_prompts(prompt: str | Sequence[str]) -> tuple[str, ...]:
    """Return the prompts, one or several; an empty string is a prompt, an empty list is not."""
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise ConfigError(f"prompt must be a string or a list of strings, not {prompt!r:.80}")
    if not prompts:
        raise ConfigError("prompt is an empty list; give at least one prompt ('' is one)")
    for p in prompts:
        if len(p) > MAX_PROMPT:
            raise ConfigError(f"a prompt has {len(p):,} characters; at most {MAX_PROMPT:,} are taken: shorten it")
        try:
            p.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"prompt {p!r:.80} holds half a surrogate pair, which is no text; remove it") from None
    return tuple(prompts)


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
        if not is_integer(value):
            raise ConfigError(f"{name} must be an integer number of pixels, not {value!r}")
        if value % self.multiple or not 0 < value <= most:
            nearest = min(max(round(value / self.multiple), 1) * self.multiple, most)
            raise ConfigError(
                f"{name} {value} must be a multiple of {self.multiple} from {self.multiple} to {most}; "
                f"the nearest is {nearest}"
            )
        return value


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite float or an integer."""
    return (is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_count(name: str, value: object) -> None:
    if not is_integer(value) or value < 1:
        raise ConfigError(f"{name} must be a positive integer; got {value!r}")


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
            raise ConfigError(f"{what} {value!r} is no size; give bytes, or text like '12GB' or '900MiB'") from None
    if not is_integer(value) or value <= 0:
        raise ConfigError(f"{what} must be a positive number of bytes, or text like '12GB'; got {value!r}")
    return value
