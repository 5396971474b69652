"""The first stage: prompts to embeddings, each prompt at its own length.

Prompts are padded to the longest of the batch instead of a fixed length; encoders are causal, so padding on the right
changes nothing. For the same reason the beginning that a model's template puts before every prompt is read once: later
prompts attend to its keys and values (`Prefix`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.checkpoint import Files
from ..checkpoint.reading import Progress
from ..config import check_flag, integer, items, resolve_prompts, shown
from ..errors import CheckpointError, ConfigError, PromptTruncatedWarning
from ..models.architecture import Architecture
from ..models.context import bucket
from ..models.text_encoders.language_model import Past
from ..runtime.host_state import isolated
from .stage import DEFAULTS, Part, Stage, StageOptions, open_part
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptEmbeds:
    """What a network takes of B prompts.

    embeds: [B, L, D]; prompt b's first lengths[b] rows count, the others hold anything finite. extras: more that a
    network's `encode_context` takes, by keyword, e.g. a pooled vector [B, P]. truncated: of each prompt whether it is
    longer than the model reads; () if unknown.
    """

    embeds: Tensor
    lengths: tuple[int, ...]
    extras: dict[str, Tensor] = field(default_factory=dict)
    truncated: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def check(self, probe: PromptEmbeds, max_tokens: int) -> PromptEmbeds:
        """Return these, lengths as a tuple. Raise ConfigError unless they are embeddings as a text stage makes them.

        probe: what its `probe` returns. max_tokens: the longest prompt it takes. Waits for a GPU, as it reads values.
        """
        shape = tuple(self.embeds.shape) if isinstance(self.embeds, Tensor) else ()
        wanted = probe.embeds.shape[-1]
        longest = max(max_tokens, probe.embeds.shape[1])
        if len(shape) != 3 or shape[2] != wanted or not 1 <= shape[1] <= longest or not shape[0]:
            raise ConfigError(
                f"embeds must be a tensor [prompts, 1 to {longest} tokens, {wanted}], not "
                f"{shape or type(self.embeds)}; make them with pipe.text"
            )
        given = items(self.lengths) or []
        counts = tuple(n for item in given if (n := integer(item)) is not None and 1 <= n <= shape[1])
        if not len(counts) == len(given) == shape[0]:
            raise ConfigError(
                f"lengths must be {shape[0]} numbers from 1 to {shape[1]}, one per prompt, not {shown(self.lengths)}"
            )
        if not isinstance(self.extras, dict) or set(self.extras) != set(probe.extras):
            named = list(map(str, self.extras)) if isinstance(self.extras, dict) else [shown(self.extras)]
            names = [f"{', '.join(sorted(extras)) or 'empty':.200}" for extras in (probe.extras, named)]
            raise ConfigError("extras must be {}, not {}; make them with pipe.text".format(*names))
        cut = items(self.truncated)
        if cut is None or len(cut) not in (0, shape[0]):
            raise ConfigError(f"truncated must be {shape[0]} booleans, one per prompt, not {shown(self.truncated)}")
        for name, tensor in {"embeds": self.embeds, **self.extras}.items():
            alike = (shape[0], *probe.extras[name].shape[1:]) if name in probe.extras else shape
            plain = isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta
            if not plain or tuple(tensor.shape) != alike:
                raise ConfigError(f"{name} must be a floating-point tensor {alike}; make it with pipe.text")
            if not torch.isfinite(tensor).all():
                raise ConfigError(f"{name} holds NaN or infinity; make it again with pipe.text")
        return replace(self, lengths=counts, truncated=tuple(check_flag("truncated", one) for one in cut))

    def select(self, prompts: Sequence[int]) -> PromptEmbeds:
        """Return the embeddings of these prompts, cut to the longest of them."""
        index, lengths = torch.tensor(prompts, device=self.embeds.device), tuple(self.lengths[i] for i in prompts)
        extras = {name: tensor[index] for name, tensor in self.extras.items()}
        truncated = tuple(self.truncated[i] for i in prompts) if self.truncated else ()
        return PromptEmbeds(self.embeds[index, : max(lengths)], lengths, extras, truncated)

    def joined(self, other: PromptEmbeds) -> PromptEmbeds:
        """Return these embeddings, and behind them the other's, on the same device."""
        length = max(self.embeds.shape[1], other.embeds.shape[1])
        other = other.to(self.embeds.device, self.embeds.dtype)
        embeds = (F.pad(one.embeds, (0, 0, 0, length - one.embeds.shape[1])) for one in (self, other))
        extras = {name: torch.cat((tensor, other.extras[name])) for name, tensor in self.extras.items()}
        return PromptEmbeds(torch.cat([*embeds]), self.lengths + other.lengths, extras)

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """Return these on a device and in a dtype."""
        extras = {name: tensor.to(device, dtype) for name, tensor in self.extras.items()}
        return PromptEmbeds(self.embeds.to(device, dtype), self.lengths, extras, self.truncated)


PREFIX_FLOOR = 16  # tokens: reading fewer again costs less than joining keys and values in every layer
PROBES = ("a", "Z 1", ".")  # prompts that begin unlike each other


@dataclass(frozen=True)
class Prefix:
    """The tokens that all prompts begin with: their states [1, P, width], and their keys and values."""

    ids: list[int]
    states: Tensor
    past: Past


class TextStage(Stage):
    """Prompts to `PromptEmbeds`; the base of all text stages.

    width: features of an embedding. max_tokens: longer prompts lose their tail, and `truncated` says so.
    """

    width: int
    max_tokens: int

    @isolated()
    def __call__(self, prompts: str | Sequence[str]) -> PromptEmbeds:
        """Return the embeddings of these prompts, in the weights' dtype, and warn of those that are cut. Raises
        ConfigError for what is no prompt."""
        texts = resolve_prompts(prompts)
        truncated = self.truncated(texts)
        return replace(self.encode(texts), truncated=truncated)

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Return the same without a word about prompts that are cut; for callers that are isolated themselves."""
        raise NotImplementedError

    def encode_negative(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Return the embeddings of negative prompts, which guidance leads away from."""
        return self.encode(prompts)

    def readers(self) -> Sequence[tuple[str, Tokenizer, int]]:
        """Return what reads a prompt: (name, its tokenizer, the tokens it takes at most)."""
        raise NotImplementedError

    def truncated(self, prompts: Sequence[str]) -> tuple[bool, ...]:
        """Return which prompts are longer than a reader takes. Issues a PromptTruncatedWarning for each, once."""
        distinct, readers = list(dict.fromkeys(prompts)), self.readers()
        each = zip(*(tokenizer.losses(distinct, most) for _, tokenizer, most in readers), strict=True)
        cut = {}
        for prompt, losses in zip(distinct, each, strict=True):
            found = [(r[0], r[2], *loss) for r, loss in zip(readers, losses, strict=True) if loss is not None]
            cut[prompt] = bool(found)
            if found:
                warn_caller(too_long(prompt, found))
        return tuple(cut[prompt] for prompt in prompts)

    def probe(self, tokens: int, networks: Sequence[Any] = ()) -> PromptEmbeds:
        """Do the stage's work for one prompt of `tokens` tokens on the meta device, to be counted.

        networks: `meta_networks()`, made if not given.
        """
        raise NotImplementedError


class TextEncoder(TextStage):
    """Prompts to the hidden states that one causal language model has of them, each prompt at its own length.

    model: the architecture in `text_encoder`. tokenizer: class that writes prompts out and cuts them into tokens.
    files: of networks that come from elsewhere. dropped: tokens of the prompt's fixed beginning, which the model reads
    but whose embeddings are left out. least_prefix: see `PREFIX_FLOOR`. The network is recorded per bucket of lengths.
    """

    def __init__(
        self, folder: Path, model: Architecture, tokenizer: type[Tokenizer], files: Files, *, max_tokens: int,
        dropped: int = 0,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer(folder / "tokenizer")
        self.parts = (open_part(folder / "text_encoder", model, files),)
        self.network = self.parts[0].network
        check_vocabulary(self.tokenizer, self.parts[0])
        self.width, self.max_tokens, self.dropped = self.network.config.hidden_size, max_tokens, dropped
        self.least_prefix = PREFIX_FLOOR
        self._prefix: Prefix | None = None

    def materialize(
        self, device: torch.device, dtype: torch.dtype, options: StageOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        super().materialize(device, dtype, options, progress)
        self._prefix = None

    @property
    def device(self) -> torch.device:
        """Where the network runs: a norm's device, as token embeddings may lie on the host."""
        device: torch.device = self.network.layers[0].input_layernorm.weight.device
        return device

    def readers(self) -> Sequence[tuple[str, Tokenizer, int]]:
        return [("the model", self.tokenizer, self.max_tokens + self.dropped)]

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Return embeddings [B, L, width] in the weights' dtype, L the longest prompt's token count."""
        ids = self.tokenizer(prompts, self.max_tokens + self.dropped)
        lengths = tuple(len(i) - self.dropped for i in ids)
        if min(lengths, default=0) <= 0:
            raise ConfigError(
                "a prompt has no tokens; the model's chat template must write at least one: download it again"
            )
        prefix = self.prefix(ids)
        start = 0 if prefix is None else len(prefix.ids)
        return PromptEmbeds(self.kept(self._states(self.padded(ids, start), prefix)), lengths)

    def padded(self, ids: Sequence[list[int]], start: int) -> Tensor:
        """Return the tokens from number `start` on, int64 [B, L] on the device, L the longest prompt's, or its bucket
        where graphs are recorded."""
        longest = max(len(i) for i in ids) - start
        if self.options.captures is not None and self.options.captures.buckets:
            longest = bucket(longest)
        return torch.tensor([i[start:] + [0] * (longest + start - len(i)) for i in ids], device=self.device)

    def _states(self, ids: Tensor, prefix: Prefix | None) -> Tensor:
        """Return the model's states of whole prompts, of which ids [B, L] come after `prefix`."""

        def run(ids: Tensor) -> Tensor:
            states: Tensor = self.network(ids) if prefix is None else self.network(ids, prefix.past)
            return states

        states: Tensor
        if prefix is None:
            states = self.captured("text", run, ids)
            return states
        states = self.captured("text after prefix", run, ids, owner=prefix)
        return torch.cat((prefix.states.expand(len(states), -1, -1), states), 1)

    def prefix(self, ids: Sequence[list[int]]) -> Prefix | None:
        """Return what the template puts before every prompt, read on first use; None where it is short, or where one
        of these token lists begins otherwise or has nothing behind it."""
        fixed = self.prefix_ids
        if len(fixed) < self.least_prefix or not all(len(i) > len(fixed) and i[: len(fixed)] == fixed for i in ids):
            return None
        if self._prefix is None:
            self._prefix = Prefix(fixed, *self.network.read(torch.tensor([fixed], device=self.device)))
        return self._prefix

    def shared(self, length: int) -> int:
        """Return how many of a prompt's `length` tokens, instruction included, `prefix` has read before."""
        fixed = len(self.prefix_ids)
        return fixed if self.least_prefix <= fixed < length else 0

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The tokens that all prompts begin with, as far as `PROBES` tell; `prefix` compares every prompt."""
        probes = self.tokenizer(PROBES, self.max_tokens + self.dropped)
        same = (len(set(column)) == 1 for column in zip(*probes, strict=False))
        return probes[0][: sum(1 for _ in takewhile(bool, same))]

    def kept(self, states: Tensor) -> Tensor:
        """Return those of the model's states [B, dropped + L, width] that are embeddings."""
        return states[:, self.dropped :]

    def probe(self, tokens: int, networks: Sequence[Any] = ()) -> PromptEmbeds:
        (network,), start = networks or self.meta_networks(), self.shared(self.dropped + tokens)
        ids = torch.zeros(1, self.dropped + tokens - start, dtype=torch.int64, device="meta")
        states = network(ids, network.blank_past(start)) if start else network(ids)
        return PromptEmbeds(self.kept(F.pad(states, (0, 0, start, 0))), (tokens,))


def too_long(prompt: str, losses: Sequence[tuple[str, int, int, str]]) -> PromptTruncatedWarning:
    """Return the warning about a prompt, given (reader, the tokens it takes, the tokens there are, the text beyond)."""

    def quoted(text: str, most: int) -> str:
        return repr(text if len(text) <= most else f"{text[: 3 * most // 4]} ... {text[-most // 4 :]}")

    reading = "; ".join(
        f"{name} reads {most} of {tokens} tokens, without {quoted(lost, 400) if lost else 'the end of its template'}"
        for name, most, tokens, lost in losses
    )
    longest = max((lost for *_, lost in losses), key=len)
    return PromptTruncatedWarning(f"the prompt {quoted(prompt, 40)} is too long: {reading}; shorten it", longest)


def warn_caller(warning: Warning) -> None:
    """Issue a warning that names the line outside this package, and what decorates its functions, that it is for."""
    frame, level, inside = sys._getframe(), 1, (__name__.partition(".")[0], "contextlib", "torch")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(warning, stacklevel=level)


def check_vocabulary(tokenizer: Tokenizer, encoder: Part) -> None:
    """Raise CheckpointError if the tokenizer has more tokens than the encoder embeds."""
    known, embedded = tokenizer.core.get_vocab_size(), encoder.network.config.vocab_size
    if known > embedded:
        raise CheckpointError(
            f"{tokenizer.folder} knows {known} tokens, {encoder.checkpoint.folder} embeds {embedded}; "
            "they belong to different models"
        )
