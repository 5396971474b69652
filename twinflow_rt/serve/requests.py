"""What a request for images may say, in JSON or, with pictures, as a form: read with the standard library."""

from __future__ import annotations

import io
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigError
from ..stages.image_input import decoding, transparent

FORM = "multipart/form-data"


class ImageRequest(BaseModel):
    """Body of /v1/images/generations: OpenAI's fields and `seed` (image k gets seed + k), `nfe` (network evaluations
    per image; default: what the server was started with), `guidance` and `negative_prompt`. Of OpenAI's those for which
    there is no choice here take the values that agree with what is done; null is as if a field were not sent. Refusals
    quote descriptions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: int | None = Field(None, description="images, default 1")
    size: str | None = Field(None, description="WxH in pixels, or auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    seed: int | None = None
    nfe: int | None = None
    guidance: float | None = Field(None, description="scale of classifier-free guidance, for models not distilled")
    negative_prompt: str | None = Field(None, description="with guidance: what images are led away from")
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, description="quality of jpeg and webp, default 95", ge=0, le=100)
    response_format: Literal["b64_json"] | None = Field(None, description="images are not kept, so there are no links")
    quality: Literal["auto", "standard"] | None = Field(None, description="nfe is what changes an image's quality")
    style: Literal["vivid", "natural"] | None = Field(None, description="ignored: the prompt says the style")
    background: Literal["auto", "opaque"] | None = Field(None, description="images have no transparency")
    moderation: Literal["auto", "low"] | None = Field(None, description="nothing is filtered here")
    stream: Literal[False] | None = Field(None, description="an image is sent when it is done")
    partial_images: Literal[0] | None = Field(None, description="an image is sent when it is done")
    user: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")

    @model_validator(mode="before")
    @classmethod
    def _sent(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class EditRequest(ImageRequest):
    """The form of /v1/images/edits, without its files: the same and `strength`. All its fields are texts, read as
    numbers where these are asked for."""

    model_config = ConfigDict(extra="forbid", strict=False)

    strength: float | None = Field(None, description="above 0 and up to 1, default 0.6")
    input_fidelity: Literal["low", "high"] | None = Field(None, description="ignored: strength says it")


def read_edit(kind: str, body: bytes, most: int) -> tuple[EditRequest, dict[str, bytes]]:
    """Return the fields and the files, image and perhaps mask, of a body whose Content-Type is `kind`. Without a mask,
    the image's own transparency is one. most: pixels of a picture. Raises RequestValidationError, ConfigError."""
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    for name, content in read_form(kind, body):
        if (file := name.removesuffix("[]")) in ("image", "mask"):
            if file in files:
                raise ConfigError(f"{file} was sent twice; give one picture")
            files[file] = content
            continue
        try:
            fields[name] = content.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{name}: a field must be UTF-8 text; files are image and mask") from None
    if "image" not in files:
        raise ConfigError("image is missing: send the picture to start from as a file of that name")
    clear = [name for name in files if _is_transparent(name, files[name], most)]
    if "mask" not in files and clear:
        files["mask"] = files["image"]
    for name, idle in (("stream", "false"), ("partial_images", "0")):
        if fields.get(name) == idle:
            del fields[name]
    try:
        return EditRequest.model_validate(fields), files
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


def _is_transparent(name: str, content: bytes, most: int) -> bool:
    from PIL import Image

    with decoding(name), Image.open(io.BytesIO(content)) as picture:  # its header alone, until its size is known
        if picture.width * picture.height > most:
            raise ConfigError(f"{name} has {picture.width}x{picture.height} pixels; at most {most} are taken")
        return transparent(picture)
