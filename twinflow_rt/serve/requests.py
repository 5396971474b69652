"""What a request for images may say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
