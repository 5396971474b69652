"""Token ids of prompts, written out as the model was trained on them.

Uses the `tokenizers` library directly: importing transformers would take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import file_type, is_folder, read_json, read_text, refuse_foreign, require_file
from ..config import resolve_prompts
from ..errors import CheckpointError

# how Qwen2 and later cut text before merging bytes: contractions, words with their leading mark, single
# digits, punctuation with its line ends, blanks (transformers: Qwen2Tokenizer)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# CLIP's: its own special tokens, contractions, words, single digits, punctuation; blanks are dropped
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# what a damaged file breaks with
BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Tokenizer:
    """Token ids of prompts as `render` writes them out; subclasses do so as a family wants it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.core = folder, read_core(folder)

    def __call__(self, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Return the ids of each prompt, at most `max_tokens` (the tail is cut). Raise ConfigError for no prompts."""
        texts = [self.render(prompt) for prompt in resolve_prompts(prompts)]
        self.core.no_padding()
        self.core.enable_truncation(max_tokens)
        if len(texts) == 1:  # a batch goes to the library's threads, and waking one takes longer than a prompt
            return [self.core.encode(texts[0]).ids]
        return [encoding.ids for encoding in self.core.encode_batch(texts)]

    def render(self, prompt: str) -> str:
        """Return what is tokenized for a prompt; here the prompt itself."""
        return prompt


class PaddingTokenizer(Tokenizer):
    """Token ids of prompts padded to one length with the folder's pad token."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        token = read_json(folder / "tokenizer_config.json").get("pad_token")
        self.pad = self.core.token_to_id(str(token.get("content") if isinstance(token, dict) else token))
        if self.pad is None:
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: pad_token {token!r} is not in the vocabulary")

    def __call__(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Return `length` ids of each prompt (the tail is cut, but for what ends a prompt)."""
        return [ids + [self.pad] * (length - len(ids)) for ids in super().__call__(prompts, length)]


class ChatTokenizer(Tokenizer):
    """Prompts as one user turn of the folder's chat template, generation prompt added, thinking on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from jinja2 import TemplateError

        self.template, self._failures = _chat_template(folder), (TemplateError, *BROKEN)

    def render(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            text: str = self.template.render(messages=messages, add_generation_prompt=True, enable_thinking=True)
            return text
        except self._failures as error:
            raise CheckpointError(f"{self.folder}: the chat template failed ({error}); download it again") from None


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


def _chat_template(folder: Path) -> Any:
    """Return the compiled chat template, in a sandbox, for templates are code from the checkpoint."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config, file = read_json(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
    source = read_text(file) if file_type(file) else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise CheckpointError(f"{folder} has no chat template; Z-Image prompts are written in chat form")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, *BROKEN) as error:
        raise CheckpointError(f"{folder}: the chat template does not compile ({error}); download it again") from None
