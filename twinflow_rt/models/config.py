"""Reading and checking config.json, and the base of the transformers' config classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from ..checkpoint.typed_json import hints_of, typed
from ..errors import ConfigError, TwinFlowError

MOST, MOST_LAYERS = 1 << 22, 1000  # a size, or a number of layers, beyond is no network's
# numbers that a network divides by or raises to a power; an epsilon may be 0
POSITIVE = (
    "rope_theta", "t_scale", "scaling_factor", "latents_std", "query_pre_attn_scalar", "attn_logit_softcapping",
    "mlp_ratio", "interpolation_scale", "head_dim", "sliding_window",
)  # fmt: skip
OF_TRAINING = ("musubi_blocks_to_swap", "musubi_block_swap_device")  # keys that SimpleTuner leaves in config.json
EPSILONS = ("eps", "epsilon")
COUNTS = {3: "three", 4: "four"}
# what a damaged file breaks with, when its content is used
BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever breaks over a config.json's content into a ConfigError. where: what its message calls the file."""
    try:
        yield
    except TwinFlowError:
        raise
    except BROKEN as error:
        if "allocate memory" in str(error):  # which is not the file's fault
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{where} describes no network that can be built ({reason:.200}); download it again"
        ) from error


def check_fields(kind: Any, given: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError unless the values given for fields of the config dataclass `kind` have their declared types,
    sizes that networks have (a typo must not build a billion layers), and the sign that their formula needs."""
    hints = hints_of(kind)
    for name in given:
        try:
            value = typed(given[name], hints[name], name)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; download it again") from None
        most = MOST_LAYERS if any(word in name for word in ("layers", "depth", "res_blocks")) else MOST
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > most for number in numbers) or len(numbers) > MOST_LAYERS:
            raise ConfigError(f"{where}: {name} is {value!r:.80}, beyond any network's {most:,}; download it again")
        given_numbers = [number for number in numbers if number is not None]
        if name in POSITIVE and any(number <= 0 for number in given_numbers):
            raise ConfigError(f"{where}: {name} is {value!r:.80}; it must be positive: download it again")
        if name.endswith(EPSILONS) and any(number < 0 for number in given_numbers):
            raise ConfigError(f"{where}: {name} is {value!r:.80}; it must not be negative: download it again")


def rope_theta(raw: Mapping[str, Any], otherwise: float, kinds: Sequence[str] = ("default",)) -> Any:
    """Return the base of the rotary frequencies that a text encoder's config.json asks for, as transformers reads it:
    what `rope_scaling` or `rope_parameters` holds, else what stands beside them, else `otherwise`.

    kinds: types of rotary embeddings that are the plain one for this model. Raises ConfigError for others, and for
    what is no object; the value itself is for `check_fields` to judge.
    """
    where = "text_encoder/config.json"
    name, rope = next(
        ((key, raw[key]) for key in ("rope_scaling", "rope_parameters") if raw.get(key) not in (None, {})), ("", {})
    )
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}: {name} is {rope!r:.60}, no object; download it again")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) not in kinds:
        raise ConfigError(f"{where} asks for rope of type {kind!r:.40}; this model's encoders have none scaled")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError(f"{where}: {name} differs between kinds of layers; this model's encoders have one for all")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
        raise ConfigError(f"{where} asks for a partial_rotary_factor; this model's encoders turn whole heads")
    given = rope.get("rope_theta", raw.get("rope_theta"))
    return otherwise if given is None else given


class Heads:
    """Of configs that state heads as diffusers does: the width is theirs together."""

    num_attention_heads: int
    attention_head_dim: int

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def head_dim(self) -> int:
        """Features of a head of softmax attention."""
        return self.attention_head_dim

    def require_axes(self, axes: tuple[int, ...], wanted: int) -> None:
        """Raise ConfigError unless rope turns `wanted` axes by pairs of features, a head's together."""
        if len(axes) != wanted or any(d % 2 for d in axes) or sum(axes) != self.attention_head_dim:
            raise ConfigError(
                f"axes_dims_rope {axes} must be {COUNTS[wanted]} even numbers that add up to attention_head_dim = "
                f"{self.attention_head_dim}; check transformer/config.json"
            )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Base of the transformers' config dataclasses: fields are config.json's keys, defaults the release's.

    twinflow: whether the network has TwinFlow's second time embedder; False: an ordinary flow model, whose target time
    is always t. enable_time_sign_embed: of SimpleTuner's TwinFlow, which marks the twin by an embedding of the sign of
    time in place of a second embedder; inference takes the first row, of positive times. averaged_time: see
    `VelocityNetwork.times`.
    class_name: diffusers' network class. unread: keys that files have and inference does not need. variants: keys that,
    where set, make another network; variant_hint: which.
    """

    class_name: ClassVar[str]
    unread: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ()
    variant_hint: ClassVar[str] = ""

    twinflow: bool = True
    enable_time_sign_embed: bool = False
    averaged_time: bool = False

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Build from config.json's content, without diffusers' bookkeeping keys (`_*`). Raises ConfigError for keys
        that the family does not know."""
        if active := [k for k in cls.variants if raw.get(k)]:
            raise ConfigError(f"transformer/config.json sets {', '.join(active)}: {cls.variant_hint}")
        known = {f.name for f in fields(cls)}
        skipped = {*known, *cls.variants, *cls.unread, "quantization_config", *OF_TRAINING}
        if unknown := [k for k, v in raw.items() if k not in skipped and not k.startswith("_") and v is not None]:
            raise ConfigError(f"transformer/config.json has keys this family does not know: {unknown}; remove them")
        where = "transformer/config.json"
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known}
        check_fields(cls, given, where)
        with reading(where):
            return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return config.json's content, which diffusers' class of that name loads."""
        out = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        plain = {"twinflow": True, "enable_time_sign_embed": False, "averaged_time": False}  # as its files have it
        return {"_class_name": self.class_name, **{k: v for k, v in out.items() if (k, v) not in plain.items()}}


def second_embedder(name: str, family: str) -> Callable[[set[str]], str | None]:
    """Return a `Layout.absent` that explains missing keys where all are of the second time embedder `name`."""

    def absent(missing: set[str]) -> str | None:
        if any(not key.startswith(name + ".") for key in missing):
            return None
        return (
            f"{name} is missing, though this is called TwinFlow: community loaders drop TwinFlow's second time "
            "embedder; get the original TwinFlow files, or give what has it beside these (files=, --files): a file, or "
            f"the released transformer's folder. For an ordinary {family} model, sampled by its own scheduler, set "
            '"twinflow": false in transformer/config.json'
        )

    return absent
