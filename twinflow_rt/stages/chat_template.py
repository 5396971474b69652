"""Chat templates: how a checkpoint's own Jinja template is compiled and called, as transformers does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from ..checkpoint.files import file_type, read_json, read_text
from ..errors import CheckpointError
from ..models.config import BROKEN

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def chat_template(folder: Path, thinking: bool = True) -> Callable[[str], str]:
    """Return what writes a prompt as one user turn of a tokenizer folder's template, generation prompt added.

    thinking: what the template is told as `enable_thinking`. Raises CheckpointError, as does what is returned, for
    templates that are absent or fail."""
    from jinja2 import TemplateError

    config, file = read_json(folder / "tokenizer_config.json"), folder / "chat_template.jinja"
    source = read_text(file) if file_type(file) else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    if not isinstance(source, str):
        raise CheckpointError(f"{folder} has no chat template; this model's prompts are written in chat form")
    try:
        template = _environment().from_string(source)
    except (TemplateError, *BROKEN) as error:
        raise CheckpointError(f"{folder}: the chat template does not compile ({error}); download it again") from None
    tokens = {name: token_text(config[name]) for name in SPECIAL if config.get(name) is not None}

    def render(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            text: str = template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, enable_thinking=thinking,
                **tokens,
            )  # fmt: skip
            return text
        except (TemplateError, *BROKEN) as error:
            raise CheckpointError(f"{folder}: the chat template failed ({error}); download it again") from None

    return render


def token_text(token: Any) -> str:
    """Return a special token of tokenizer_config.json, which is there by itself or with its flags."""
    return str(token.get("content") if isinstance(token, dict) else token)


def _environment() -> Any:
    """Return where templates run: in a sandbox, for they are code from the checkpoint, with what transformers gives
    them."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which marks a model's own words for training: writes them."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Callable[[], str]) -> str:
            return caller()

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Return JSON; jinja2's own filter escapes what HTML reads otherwise."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment
