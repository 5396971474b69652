"""Bodies of /v1/images/edits: multipart forms, as OpenAI's client sends them, read with the standard library."""

from __future__ import annotations

import io
import json
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError

from ..errors import ConfigError
from ..stages.image_input import decoding, transparent
from .requests import ImageRequest

FILES = ("image", "mask")
FORM = "multipart/form-data"


class EditRequest(ImageRequest):
    """The form's fields beside the files: those of /v1/images/generations and `strength`."""

    strength: float | None = Field(None, description="above 0 and up to 1, default 0.6")
    input_fidelity: Literal["low", "high"] | None = Field(None, description="ignored: strength says it")


def read_edit(kind: str, body: bytes, most: int) -> tuple[EditRequest, dict[str, bytes]]:
    """Return the fields and the files, image and perhaps mask, of a body whose Content-Type is `kind`. Without a mask,
    the image's own transparency is one. most: pixels of a picture. Raises RequestValidationError, ConfigError."""
    texts: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, content in read_form(kind, body):
        if (file := name.removesuffix("[]")) in FILES:
            if file in files:
                raise ConfigError(f"{file} was sent twice; give one picture")
            files[file] = content
        else:
            texts[name] = _value(name, content)
    if "image" not in files:
        raise ConfigError("image is missing: send the picture to start from as a file of that name")
    for file, content in files.items():
        _check_pixels(file, content, most)
    if "mask" not in files and transparent(files["image"]):
        files["mask"] = files["image"]
    try:
        return EditRequest.model_validate(texts), files
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


def read_form(kind: str, body: bytes) -> list[tuple[str, bytes]]:
    """Return names and contents of a multipart body's parts. Raises ConfigError for what is none, or not whole."""
    head = Message()
    head["Content-Type"] = kind
    boundary = head.get_boundary()
    if head.get_content_type() != FORM or not boundary:
        raise ConfigError(f"the body must be {FORM}, as OpenAI's client sends it, not {kind!r:.60}")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    if len(parts) < 2 or not parts.pop().startswith(b"--"):
        raise ConfigError(f"the {FORM} body is not whole: send it again, with its last boundary")
    found = []
    for part in parts:
        headers, _, content = part.lstrip(b" \t").removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = BytesHeaderParser().parsebytes(headers).get_param("name", header="content-disposition")
        if not isinstance(name, str):
            raise ConfigError(f"a part of the {FORM} body has no name: give each one in its Content-Disposition")
        found.append((name, content))
    return found


def _value(name: str, content: bytes) -> Any:
    """Return a field's value: what forms have as text alone is a number or a boolean where the field is one."""
    try:
        text = content.decode()
        kind = EditRequest.model_fields[name].annotation if name in EditRequest.model_fields else str
        return text if "str" in str(kind) or "'" in str(kind) else json.loads(text.lower())
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: a field must be UTF-8 text; files are image and mask") from None
    except ValueError:
        return text


def _check_pixels(name: str, content: bytes, most: int) -> None:
    from PIL import Image

    with decoding(name), Image.open(io.BytesIO(content)) as picture:  # its header alone
        if picture.width * picture.height > most:
            raise ConfigError(f"{name} has {picture.width}x{picture.height} pixels; at most {most} are taken")
