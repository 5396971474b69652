"""/v1/images/edits: what OpenAI's client sends, and bodies that are no such form."""

from __future__ import annotations

import base64
import io

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.factory import make_model
from tests.serve.conftest import served
from tests.serve.fake import FakePipe
from twinflow_rt.loading import load
from twinflow_rt.serve.app import create_app
from twinflow_rt.serve.engine import Engine, Limits
from twinflow_rt.serve.gate import EDITS, MAX_PICTURES

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (24, 32, 3), np.uint8))
LEFT = np.zeros((24, 32), np.uint8)
LEFT[:, :16] = 255


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def with_hole() -> Image.Image:
    """The picture, transparent where LEFT is white."""
    image = PICTURE.copy()
    image.putalpha(Image.fromarray(255 - LEFT))
    return image


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64)))).astype(int)


def test_official_client(tmp_path):
    pipe = load(make_model(tmp_path / "m"), device="cpu")
    given, keep = np.asarray(PICTURE), LEFT == 0
    with served(pipe, limits=Limits(max_images=2)) as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
        edit = lambda **how: client.images.edit(prompt="a red circle", response_format="b64_json", **how)
        answer = edit(
            image=png(PICTURE), n=2, size="32x24", extra_body={"seed": 7, "strength": 0.4}, stream=False,
            quality="auto", background="auto", output_format="png", input_fidelity="high", user="me",
        )  # fmt: skip
        expected = pipe("a red circle", image=PICTURE, strength=0.4, seed=7, num_images=2, output="np").images
        assert answer.size == "32x24" and [one.seed for one in answer.data] == [7, 8]
        for one, other in zip(answer.data, expected, strict=True):
            assert np.abs(pixels(one.b64_json) - other).max() <= 1
        expected = pipe("a red circle", image=PICTURE, mask=LEFT, seed=7, output="np").images[0]
        hole = png(with_hole())
        for how in ({"image": [png(PICTURE)], "mask": hole}, {"image": png(PICTURE), "mask": hole}):
            made = pixels(edit(extra_body={"seed": 7}, **how).data[0].b64_json)
            assert np.abs(made - expected).max() <= 1 and np.array_equal(made[keep], given[keep])
        made = pixels(edit(image=hole, extra_body={"seed": 7}).data[0].b64_json)  # its own transparency is the mask
        assert np.array_equal(made[keep], given[keep]) and not np.array_equal(made[~keep], given[~keep])
        with pytest.raises(openai.BadRequestError, match="strength must be a number above 0"):
            edit(image=png(PICTURE), extra_body={"strength": 0})
        with pytest.raises(openai.BadRequestError, match="mask has 16x16 pixels, its image 32x24"):
            edit(image=png(PICTURE), mask=png(PICTURE.resize((16, 16))))
        with pytest.raises(openai.BadRequestError, match="image was sent twice"):
            edit(image=[png(PICTURE)] * 2)
        with pytest.raises(openai.BadRequestError) as caught:
            edit(image=png(PICTURE), background="transparent")
        assert caught.value.param == "background"


@pytest.fixture(scope="module")
def client():
    engine = Engine(FakePipe(), Limits(max_wait=0.0, max_pixels=2048))
    with TestClient(create_app(engine, "tiny"), raise_server_exceptions=False) as client:
        client.pipe = engine.pipe
        yield client
    assert engine.drain(30), "the worker hangs"


def message(answer, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


FIELDS = [
    ({"n": "0"}, "num_images"), ({"n": "two"}, "n: "), ({"n": "1.5"}, "n: "), ({"seed": "-1"}, "seed"),
    ({"strength": "nan"}, "strength"),
    ({"strength": "1.5"}, "strength"), ({"strength": "much"}, "strength"), ({"size": "32x"}, "size"),
    ({"size": "31x32"}, "width 31"), ({"nfe": "9"}, "nfe 9"), ({"stream": "true"}, "stream"),
    ({"zoom": "1"}, "no such field"),
    ({"response_format": "url"}, "no links"), ({"model": "dall-e-2"}, "does not exist"),
    ({"output_format": "gif"}, "output_format"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "wanted"), FIELDS)
def test_wrong_fields(client, fields, wanted):
    answer = client.post(EDITS, data={"prompt": "a", **fields}, files={"image": png(PICTURE)})
    assert wanted in message(answer, 404 if "model" in fields else 400)


def form(*parts: bytes, boundary: bytes = b"B", end: bytes = b"--B--\r\n") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + end


PROMPT = b'Content-Disposition: form-data; name="prompt"\r\n\r\na'
FILE = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
KIND = "multipart/form-data; boundary=B"
BODIES = [
    (b"", KIND, "not whole"), (form(PROMPT), KIND, "image is missing"), (form(FILE + png(PICTURE)), KIND, "prompt"),
    (form(PROMPT, FILE + png(PICTURE), end=b""), KIND, "not whole"), (b"\0" * 999, KIND, "not whole"),
    (form(PROMPT, FILE + png(PICTURE)[:100]), KIND, "image cannot be read"),
    (form(PROMPT, FILE), KIND, "cannot be read"),
    (form(PROMPT, FILE + b"GIF89a"), KIND, "image cannot be read"), (form(b"\r\n\r\n", b""), KIND, "has no name"),
    (form(PROMPT, FILE + png(Image.new("L", (9000, 9000)))), KIND, "9000x9000 pixels; at most 8192"),
    (form(PROMPT, FILE + png(Image.new("L", (8, 8)))), KIND, "a side must have 16"),
    (form(PROMPT + b"\xff\xfe", FILE + png(PICTURE)), KIND, "UTF-8"),
    (b'{"prompt": "a"}', "application/json", FORM := "must be multipart"),
    (form(PROMPT), "multipart/form-data", FORM), (form(PROMPT), "", FORM),
    (form(PROMPT), "text/plain; boundary=B", FORM),
    (form(PROMPT), "multipart/form-data; boundary=C", "not whole"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "kind", "wanted"), BODIES)
def test_wrong_bodies(client, body, kind, wanted):
    assert wanted in message(client.post(EDITS, content=body, headers={"Content-Type": kind}))


def test_bodies_are_bounded(client):
    too_long = b"\0" * (MAX_PICTURES + 1)
    assert "more than 33554432 bytes" in message(
        client.post(EDITS, content=too_long, headers={"Content-Type": KIND}), 413
    )
    assert message(client.post("/v1/images/generations", content=too_long), 413)
    assert client.post("/v1/images/generations", json={"prompt": "a"}).status_code == 200


def test_any_bytes_pass_through_a_form(client):
    """Files may hold line ends and dashes; a prompt may have several lines."""
    image = Image.fromarray(np.frombuffer(b"\r\n--B\r\n-\r\n"[:9] * 256, np.uint8).reshape(16, 48, 3))
    tiff = io.BytesIO()
    image.save(tiff, format="TIFF")  # uncompressed
    answer = client.post(EDITS, data={"prompt": "two\r\nlines"}, files={"image": tiff.getvalue()})
    assert answer.status_code == 200, answer.text
    call = client.pipe.calls[-1]
    assert call["prompts"] == ["two\r\nlines"] and call["strength"] == 0.6 and call["mask"] is None
    assert np.array_equal((call["image"][0] * 255).round().byte().movedim(0, -1).numpy(), np.asarray(image))


def test_only_like_pictures_share_a_batch():
    """Pictures of one strength run together, each with its own; plain prompts and masks apart."""
    pipe = FakePipe()
    engine = Engine(pipe, Limits(max_wait=0.0))
    pipe.gate.clear()
    first = engine.submit("held", seed=0)
    assert pipe.entered.wait(60)
    pictures = [np.full((32, 32, 3), value, np.uint8) for value in (10, 20)]
    jobs = [engine.submit("a", seed=0, image=picture)[0] for picture in pictures]
    jobs += engine.submit("b", seed=0) + engine.submit("c", seed=0, image=pictures[0], strength=0.5)
    jobs += engine.submit("d", seed=0, image=pictures[0], mask=pictures[1][..., 0])
    pipe.gate.set()
    for job in (*first, *jobs):
        job.future.result(60)
    assert [call["prompts"] for call in pipe.calls[1:]] == [["a", "a"], ["b"], ["c"], ["d"]]
    assert (pipe.calls[1]["image"].mean((1, 2, 3)) * 255).round().tolist() == [10, 20]
    assert pipe.calls[4]["mask"].shape == (1, 1, 32, 32) and "image" not in pipe.calls[2]
    assert engine.drain(30)
