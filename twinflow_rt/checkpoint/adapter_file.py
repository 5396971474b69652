"""Files of adapters: for which layers they hold what, by names, headers and configuration; no factor is read.

    LoRA   B A                          A [rank, in], B [out, rank]                     (arXiv 2106.09685)
    LoHa   (w1_a w1_b) * (w2_a w2_b)    elementwise                                     (arXiv 2108.06098)
    LoKr   kron(w1, w2)                 each whole, or the product of its a and b       (arXiv 2309.14859)
    diff   the difference itself

each times alpha / rank (not the last). With DoRA (arXiv 2402.09353) the sum with the weight gets new magnitudes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import number
from ..errors import CheckpointError
from .files import WEIGHTS, is_folder, parse_json, read_json, some
from .names import CONTAINERS, WRAPPERS, Names
from .quantized_files import dense_files
from .tensor_files import TensorFile, open_file, read_tensor

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
NUMBERS = ("F32", "F16", "BF16", "F64")  # how factors may be stored, besides scaled 8 bits
PEFT, PEFT_CONFIG = "base_model.model.", "adapter_config.json"  # PEFT's names of tensors, and its file beside them
PREFIXES = re.compile(rf"(?:{re.escape(PEFT)})?(?:{CONTAINERS['transformer']}|unet\.)?{WRAPPERS}")
FLAT = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_+")  # before names with "_" in place of "."
TEXT = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?_|text_encoders?(?:_\d)?\.|(?:clip_[lg]|t5xxl|text_model)\.).*"
)
# ends of names -> what that is; of a name, so that it may be followed by the adapter's and by .weight
ENDS = {
    "lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude", "alpha": "alpha", "diff": "diff", "w_norm": "diff",
    "diff_b": "diff_b", "b_norm": "diff_b",
    **{f"hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{part}": f"k{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}  # fmt: skip
KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, ENDS))})(?:\.(?!weight$|bias$)([^.]+))?(\.weight|\.bias)?")
KINDS = {
    "LoRA": ({"A", "B"},), "LoHa": ({"w1_a", "w1_b", "w2_a", "w2_b"},), "diff": ({"diff"},),
    "LoKr": (
        {"kw1", "kw2"}, {"kw1", "kw2_a", "kw2_b"}, {"kw1_a", "kw1_b", "kw2"}, {"kw1_a", "kw1_b", "kw2_a", "kw2_b"},
    ),
}  # fmt: skip
REFUSED = {
    r"\.(oft|boft)_": "OFT, which rotates weights",
    r"\.(hada_t\d|lokr_t\d|lora_mid)\b": "Tucker factors of convolutions",
    r"\.ia3_|\.on_input$": "(IA)3, which scales activations", r"\.(set_weight|reshape_weight)$": "a replaced weight",
    r"\.vera_|\.lora_embedding_": "factors of embeddings or VeRA's shared ones", r"\.[ab][12]\.weight$": "GLoRA",
    r"\.(glora|norm_scale|scalar)\b": "a variant of LyCORIS",
}  # fmt: skip
METADATA, ROOT = "lora_adapter_metadata", "transformer."  # diffusers' header entry, and our keys in it
REBASED = ("pissa", "olora", "corda")  # initialisations after which A and B belong to other base weights


def product(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what factors add to a weight before any scale: a matrix, or of a `diff` its shape. tensors: of one kind of
    `KINDS`, on any device, meta too. Raises RuntimeError where shapes do not fit."""
    if "diff" in tensors:
        return tensors["diff"]
    if "A" in tensors:
        return tensors["B"].flatten(1) @ tensors["A"].flatten(1)
    if "w1_a" in tensors:
        return (tensors["w1_a"] @ tensors["w1_b"]) * (tensors["w2_a"] @ tensors["w2_b"])
    first, second = (
        tensors[x] if x in tensors else tensors[f"{x}_a"].flatten(1) @ tensors[f"{x}_b"].flatten(1)
        for x in ("kw1", "kw2")
    )  # fmt: skip
    return torch.kron(first.reshape(first.shape + (1,) * (second.ndim - first.ndim)), second)


@dataclass
class Module:
    """What a file has for one layer, by `ENDS`: keys and shapes. name: as the file has it. kind: of `KINDS`; "diff",
    too, where there are differences of biases alone."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kind: str = "diff"

    @property
    def rank(self) -> int | None:
        """The rank; None for what has none: differences, and LoKr of two whole matrices."""
        part = next((self.shapes[x] for x in ("A", "w1_b", "kw2_b", "kw1_b") if x in self.shapes), None)
        return part[0] if part else None

    @property
    def factors(self) -> dict[str, str]:
        """The keys of what `product` takes."""
        parts = set().union(*KINDS[self.kind])
        return {part: key for part, key in self.keys.items() if part in parts}

    def shape(self) -> tuple[int, ...]:
        """Return the shape that `product` has. Raises RuntimeError where shapes do not fit."""
        shapes = {part: self.shapes[part] for part in self.factors}
        if any(0 in shape or (part != "diff" and len(shape) < 2) for part, shape in shapes.items()):
            raise RuntimeError("no matrices, or nothing in them")
        tensors = {part: torch.empty(shape, device="meta") for part, shape in shapes.items()}
        return tuple(product(tensors).shape)


def is_adapter(path: Path) -> bool:
    """Return whether a file, or the folder that holds it, is an adapter's, by names of tensors."""
    if is_folder(path):
        return any((path / name).is_file() for name in FILE_NAMES)
    found = map(KEY.fullmatch, open_file(path).keys()) if path.suffix.lower() in WEIGHTS and path.is_file() else ()
    return any(match is not None and ENDS[match[2]] != "alpha" for match in found)


class AdapterFile:
    """An adapter's file: its modules by name, its configuration, and how many tensors of text encoders it has.

    Raises CheckpointError for a missing or damaged file, one of several adapters, an incomplete module, and kinds that
    are not merged, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = open_file(path)
        self._metadata: dict[str, str] = getattr(opened, "metadata", dict)() or {}
        files = dense_files([(opened, list(opened.keys()))], path)
        self.tensors: TensorFile
        self.tensors, self._keys = files[0]
        self.text = tuple(key for key in self._keys if TEXT.fullmatch(key))
        self.modules = self._modules()
        self.config = self._config()
        for module in self.modules.values():
            self._complete(module)
        if not self.modules:
            text = f"{len(self.text)} tensors of text encoders, which are not changed" if self.text else "no adapter"
            raise CheckpointError(f"{path} holds no LoRA tensors (lora_A and lora_B), but {text}")

    def read(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Return a factor in float32."""
        return read_tensor(self.tensors, key).to(device).float()

    def alpha(self, module: Module, target: str) -> float | None:
        """Return alpha of a module that changes tensor `target`: stored, else by the configuration; None without.
        Raises CheckpointError for one that is no number."""
        alpha: Any = self._configured(target.removesuffix(".weight"))
        if "alpha" in module.keys:
            stored = read_tensor(self.tensors, module.keys["alpha"])
            alpha = stored.item() if stored.numel() == 1 else f"of shape {tuple(stored.shape)}"
        if alpha is not None and number(alpha) is None:
            raise CheckpointError(
                f"{self.path}: the alpha of {module.name} is {alpha!r:.40}, not a finite number; save it again"
            )
        return None if alpha is None else float(alpha)

    def scale(self, module: Module, target: str) -> float:
        """Return what multiplies the product: alpha / rank, alpha / sqrt(rank) for rank-stabilised adapters, 1 without
        alpha or rank: diffusers' and LyCORIS's rules."""
        alpha, rank = self.alpha(module, target), number(module.rank)
        if rank is None and module.kind == "LoKr":  # PEFT's are scaled all the same
            rank = number(self.config.get("r"))
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _modules(self) -> dict[str, Module]:
        """Return by module, as the file names it, what there is of it."""
        modules: dict[str, Module] = {}
        others, adapters = [], set()
        for key in sorted({*self._keys}.difference(self.text)):
            if (match := KEY.fullmatch(key)) is None or (match[4] == ".bias" and ENDS[match[2]] != "B"):
                others.append(key)
                continue
            part, stored = ENDS[match[2]] if match[4] != ".bias" else "bias", self.tensors.get_slice(key)
            module = modules.setdefault(match[1], Module(match[1]))
            if part in module.keys and match[3] is None:
                raise CheckpointError(f"{self.path} has two adapters for {match[1]}; keep one")
            if (code := stored.get_dtype()) not in NUMBERS:
                raise CheckpointError(f"{self.path}: {key} is stored as {code}; save it as one of {', '.join(NUMBERS)}")
            module.keys[part], module.shapes[part] = key, tuple(stored.get_shape())
            if part in ("A", "B"):
                adapters.add(match[3] or "default")
        if others:
            what = next((what for p, what in REFUSED.items() if any(re.search(p, key) for key in others)), None)
            raise CheckpointError(
                f"{self.path} holds {some(others)}, which is no LoRA factor{f', but {what}' * (what is not None)}: "
                "LoRA, DoRA, LoHa, LoKr and differences of weights can be merged"
            )
        if len(adapters) > 1:
            raise CheckpointError(f"{self.path} holds several adapters ({some(adapters)}); save each in its own file")
        return modules

    def _complete(self, module: Module) -> None:
        """Find the kind of a module. Raises CheckpointError for a part that is missing or another's."""
        parts = module.keys.keys() - {"alpha", "magnitude", "bias", "diff_b"}
        for kind, forms in KINDS.items():
            if parts in forms:
                module.kind = kind
            elif lacking := [min(form - parts) for form in forms if parts and parts < form]:
                missing = next(end for end, part in ENDS.items() if part == lacking[0])
                raise CheckpointError(f"{self.path}: {module.name} lacks {missing}; the file is incomplete")
        if not (parts or "diff_b" in module.keys):
            raise CheckpointError(f"{self.path}: {module.name} lacks lora_A; the file is incomplete")
        if parts and parts not in KINDS[module.kind]:
            raise CheckpointError(f"{self.path}: {module.name} has {some(module.keys.values())}: several kinds")
        if self.config.get("use_dora") and module.kind == "LoRA" and "magnitude" not in module.keys:
            raise CheckpointError(f"{self.path}: {module.name} is a DoRA adapter's and lacks lora_magnitude_vector")

    def _config(self) -> dict[str, Any]:
        """Return the adapter's configuration: from the file's header (diffusers) or beside it (PEFT), or empty.

        In a header its keys follow `transformer.` where the file may hold adapters of other parts too
        (diffusers' save_lora_weights), or stand alone (save_lora_adapter)."""
        config: dict[str, Any] = {}
        if raw := self._metadata.get(METADATA):
            try:
                found = parse_json(raw)
                config = {k.removeprefix(ROOT): v for k, v in found.items() if k.startswith(ROOT)}
                config = config or {k: v for k, v in found.items() if "." not in k}
            except (ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{self.path}: its {METADATA} is not readable JSON ({error}); save it again"
                ) from None
        elif (beside := self.path.with_name(PEFT_CONFIG)).is_file() and self._is_peft():
            config = read_json(beside)
        kind, start = config.get("peft_type") or "LORA", config.get("init_lora_weights")
        if kind not in ("LORA", "LOHA", "LOKR"):
            raise CheckpointError(f"{self.path} is an adapter of type {kind!r:.40}; LoRA, LoHa and LoKr are merged")
        if isinstance(start, str) and start.lower().startswith(REBASED):
            raise CheckpointError(
                f"{self.path} began as {start!r:.40}, which changed the base weights as well: convert it to a plain "
                "LoRA (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))"
            )
        return config

    def _is_peft(self) -> bool:
        """Return whether a configuration beside the file is about it: by the names of its tensors, or as the only
        safetensors file there."""
        named = self.path.name == FILE_NAMES[1] or any(name.startswith(PEFT) for name in self.modules)
        return named or [*self.path.parent.glob("*.safetensors")] == [self.path]

    def _configured(self, module: str) -> Any:
        """Return alpha by the configuration; None: it says nothing. Patterns are matched as PEFT does."""
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.path}: alpha_pattern is {patterns!r:.60}, no object of names; save it again")
        for pattern, alpha in patterns.items():
            # what may take exponential time is not tried
            if len(re.findall(r"[*+{]", pattern)) > 4 or re.search(r"[()]", pattern):
                raise CheckpointError(
                    f"{self.path}: alpha_pattern {pattern!r:.80} is a regular expression with groups; name modules"
                )
            try:
                if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                    return alpha
            except re.error as error:
                raise CheckpointError(f"{self.path}: alpha_pattern {pattern!r:.80}: {error}; save it again") from None
        return self.config.get("lora_alpha", self.config.get("alpha"))


class Targets:
    """Finds the tensors of a network that modules of adapters change, whatever those are called.

    names: the network's tensors, as diffusers calls them. rules: how its other files name them (`names.names_of`).
    """

    def __init__(self, names: Mapping[str, Any], rules: Names) -> None:
        self.names, self.rules = names, rules
        modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        self._flat = {module.replace(".", "_"): module for module in modules}
        # words of dotted names that have a "_" themselves: the network's, and those of its other names
        said = " ".join(str(pattern) for pattern, _ in rules.renames) + " ".join((*rules.splits, rules.swaps or ""))
        words = {word for module in modules for word in module.split(".") if "_" in word}
        words |= set(re.findall(r"(?<![a-z_)\]])[A-Za-z]\w*_\w+", said))
        words |= {"t_embedder", "y_embedder", "inverted_conv", "depth_conv", "point_conv"}  # which patterns abbreviate
        longest = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
        self._words = re.compile(rf"(?:(?:{longest})(?=_|$))|[^_]+")

    def find(self, module: str) -> tuple[tuple[str, ...], bool, int] | None:
        """Return the weights that `module` changes, one after the other by rows; whether the halves of their rows
        trade places; how far the name is from diffusers' own (0: it is that). None: the network has no such layer."""
        bare = PREFIXES.sub("", module, count=1).removesuffix(".weight")
        if match := FLAT.match(bare):
            flat = PREFIXES.sub("", bare[match.end() :], count=1)
            bare = self._flat.get(flat) or ".".join(self._words.findall(flat))
        for own in (f"{bare}.weight", bare):
            if own in self.names:
                return (own,), False, 0
        found = self.rules.targets(f"{bare}.weight")
        if not found or not all(name in self.names for name in found):
            return None
        return found, self.rules.swapped(f"{bare}.weight"), len(found)
