"""Token ids of prompts, written out as the model was trained on them.

Uses the `tokenizers` library directly: importing transformers would take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import file_type, is_folder, read_json, refuse_foreign, require_file
from ..errors import CheckpointError
from ..models.config import BROKEN
from .chat_template import chat_template, token_text

# how Qwen2 and later cut text before merging bytes: contractions, words with their leading mark, single
# digits, punctuation with its line ends, blanks (transformers: Qwen2Tokenizer)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# CLIP's: its own special tokens, contractions, words, single digits, punctuation; blanks are dropped
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

MARK = "\ue000"  # a private character, in place of a prompt: shows what is written around it


class Tokenizer:
    """Token ids of prompts as `render` writes them out; subclasses do so as a family wants it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.core = folder, read_core(folder)
        self._last: tuple[list[str], int, list[Any]] | None = None

    def __call__(self, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Return the ids of each prompt, at most `max_tokens` (the tail is cut)."""
        return [encoding.ids for encoding in self._encoded([self.render(p) for p in prompts], max_tokens)]

    def losses(self, prompts: Sequence[str], max_tokens: int) -> list[tuple[int, str] | None]:
        """Return for each prompt None, or where `max_tokens` do not hold it all, how many tokens it has and its text
        beyond (none of what is written around it)."""
        texts = [self.render(prompt) for prompt in prompts]
        return [self._loss(*each) for each in zip(texts, self._encoded(texts, max_tokens), strict=True)]

    def _loss(self, text: str, encoding: Any) -> tuple[int, str] | None:
        if not (rest := encoding.overflowing):
            return None
        own = [part.special_tokens_mask.count(0) for part in (encoding, *rest)]  # tokens of the text itself
        start = rest[0].offsets[rest[0].special_tokens_mask.index(0)][0]
        end = len(text.removesuffix(self.render(MARK).partition(MARK)[2]))
        return len(encoding) - own[0] + sum(own), text[start:end]

    def _encoded(self, texts: list[str], max_tokens: int) -> list[Any]:
        """Return what the library makes of each text; those of the last call are remembered."""
        last = self._last
        if last is None or last[:2] != (texts, max_tokens):
            self.core.no_padding()
            self.core.enable_truncation(max_tokens)
            # a batch goes to the library's threads, and waking one takes longer than a prompt
            made = [self.core.encode(texts[0])] if len(texts) == 1 else self.core.encode_batch(texts)
            self._last = last = texts, max_tokens, made
        return last[2]

    def render(self, prompt: str) -> str:
        """Return what is tokenized for a prompt; here the prompt itself."""
        return prompt


class PaddingTokenizer(Tokenizer):
    """Token ids of prompts padded to one length with the folder's pad token."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        token = read_json(folder / "tokenizer_config.json").get("pad_token")
        self.pad = self.core.token_to_id(token_text(token))
        if self.pad is None:
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: pad_token {token!r} is not in the vocabulary")

    def __call__(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Return `length` ids of each prompt (the tail is cut, but for what ends a prompt)."""
        return [ids + [self.pad] * (length - len(ids)) for ids in super().__call__(prompts, length)]


class ChatTokenizer(Tokenizer):
    """Prompts as one user turn of the folder's chat template."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.template = chat_template(folder)

    def render(self, prompt: str) -> str:
        return self.template(prompt)


def read_core(folder: Path) -> Any:
    """Return the `tokenizers` object of a folder: of tokenizer.json, or for some kinds vocab.json and merges.txt."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not file_type(path):
        if not is_folder(folder):
            raise CheckpointError(f"{folder} is missing; the model folder is incomplete")
        kind = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class", "")).removesuffix("Fast")
        if kind not in SLOW or not (folder / "vocab.json").is_file():
            raise CheckpointError(f"{path} is missing; save the tokenizer with its fast (tokenizers) form")
        return SLOW[kind](folder)
    require_file(path)
    refuse_foreign(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer ({error}); download it again") from None


def _qwen2(folder: Path) -> Any:
    """Return byte-level BPE over NFC text, from the files of the slow Qwen2Tokenizer, which Qwen-Image ships."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    core = _byte_pairs(folder)
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return _add_tokens(core, folder)


def _clip(folder: Path) -> Any:
    """Return lower-case byte-level BPE between start and end token, from the files of the slow CLIPTokenizer, which
    Stable Diffusion ships."""
    from tokenizers import Regex, normalizers, pre_tokenizers, processors

    core = _byte_pairs(folder, end_of_word_suffix="</w>", unk_token=CLIP_END)
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    core = _add_tokens(core, folder)
    ends = [(token, core.token_to_id(token)) for token in (CLIP_START, CLIP_END)]
    if None in (number for _, number in ends):
        raise CheckpointError(f"{folder}: vocab.json lacks {CLIP_START} or {CLIP_END}; it is no CLIP vocabulary")
    core.post_processor = processors.TemplateProcessing(single=f"{CLIP_START} $A {CLIP_END}", special_tokens=ends)
    return core


SLOW = {"Qwen2Tokenizer": _qwen2, "CLIPTokenizer": _clip}


def _byte_pairs(folder: Path, **options: Any) -> Any:
    """Return BPE of a folder's vocab.json and merges.txt."""
    from tokenizers import Tokenizer, models

    for name in ("vocab.json", "merges.txt"):
        refuse_foreign(folder / name)
    try:
        return Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), **options))
    except Exception as error:  # the library raises bare Exception
        reason = f"{folder}: vocab.json and merges.txt do not fit ({error}); download both"
        raise CheckpointError(reason) from None


def _add_tokens(core: Any, folder: Path) -> Any:
    """Return `core` with the added tokens of tokenizer_config.json, at the numbers it gives them."""
    from tokenizers import AddedToken

    path = folder / "tokenizer_config.json"
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        added = {int(number): token for number, token in read_json(path).get("added_tokens_decoder", {}).items()}
        tokens = {n: AddedToken(t["content"], **{f: t.get(f, False) for f in flags}) for n, t in added.items()}
    except BROKEN as error:
        raise CheckpointError(f"{path}: added_tokens_decoder is damaged ({error!r:.100}); download it again") from None
    for number, token in sorted(tokens.items()):
        core.add_tokens([token])
        if core.token_to_id(token.content) != number:
            raise CheckpointError(
                f"{folder}: token {token.content!r} should be {number}; vocab.json is another's: download both"
            )
    return core
