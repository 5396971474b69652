"""The HTTP side over a fake pipeline, through a real server."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading

import httpx
import pytest
from PIL import Image

from tests.serve.conftest import PATIENCE, eventually
from tests.serve.fake import FakePipe
from twinflow_rt.serve.app import PAGE, ImageRequest, encode
from twinflow_rt.serve.gate import MAX_BODY, MAX_READ

ROUTE = "/v1/images/generations"


def ask(client, prompt="a", **fields):
    return client.post(ROUTE, json={"prompt": prompt, **fields})


def image_of(entry) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def error_of(answer, status: int, code: str | None = None) -> dict:
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code
    return error


def background(target, *args, **options):
    """Runs it in a thread; its result, when asked for."""
    done = []
    thread = threading.Thread(target=lambda: done.append(target(*args, **options)))
    thread.start()

    def result():
        thread.join(PATIENCE)
        return done[0]

    return result


def hold(pipe, client):
    """Keeps the engine busy with one request; returns its answer, when asked for."""
    pipe.gate.clear()
    pipe.entered.clear()
    answer = background(ask, client, "held")
    assert pipe.entered.wait(PATIENCE)
    return answer


def test_images(start):
    client = start()
    answer = ask(client, "abc", n=3, size="48x32", seed=255, user="someone", response_format="b64_json", model="tiny")
    body = answer.json()
    assert answer.status_code == 200 and body["size"] == "48x32" and body["output_format"] == "png"
    assert [entry["seed"] for entry in body["data"]] == [255, 256, 257]
    assert [entry["truncated"] for entry in body["data"]] == [False] * 3
    for entry in body["data"]:
        image = image_of(entry)
        assert image.format == "PNG" and image.size == (48, 32)
        assert image.getpixel((0, 0)) == FakePipe.image("abc", entry["seed"], 48, 32).getpixel((0, 0))


def test_defaults(start):
    body = ask(start(), size="auto", n=None).json()
    assert body["size"] == "32x32" and len(body["data"]) == 1 and 0 <= body["data"][0]["seed"] < 2**32


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_formats(start, kind):
    body = ask(start(), output_format=kind).json()
    assert image_of(body["data"][0]).format == kind.upper() and body["output_format"] == kind


NEUTRAL = [
    {"quality": "auto", "style": "vivid", "background": "auto", "moderation": "auto", "stream": False},
    {"quality": "standard", "style": "natural", "background": "opaque", "moderation": "low", "partial_images": 0},
    {"output_format": "png", "output_compression": 100, "response_format": "b64_json", "safety_identifier": "x"},
    dict.fromkeys(set(ImageRequest.model_fields) - {"prompt"} | {"complexity", "svg"}),
]  # fmt: skip


@pytest.mark.parametrize("fields", NEUTRAL, ids=range(len(NEUTRAL)))
def test_neutral_values_change_nothing(start, fields):
    client = start()
    plain, answer = ask(client, "abc", seed=3), ask(client, "abc", **{**fields, "seed": 3})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == plain.json()["data"] and answer.json()["output_format"] == "png"


def test_compression_is_the_quality_of_lossy_formats(pipe):
    noisy = Image.effect_noise((32, 32), 80).convert("RGB")
    for kind in ("jpeg", "webp"):
        poor, plain, best = (len(encode(noisy, kind, quality)) for quality in (0, None, 100))
        assert poor < plain < best


def test_prompts_that_are_cut_are_told(start):
    assert [entry["truncated"] for entry in ask(start(), "long", n=2).json()["data"]] == [True, True]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": 3}, "prompt", "valid string"),
        ({"prompt": "x" * 21}, None, "at most 20"),
        ({"size": "32"}, "size", "match"),
        ({"size": "-32x32"}, "size", "match"),
        ({"size": "32x99999"}, None, "nearest is 64"),
        ({"size": "64x64"}, None, "at most 2048 pixels"),
        ({"n": 0}, None, "positive"),
        ({"n": 3}, None, "at most 2"),
        ({"n": True}, "n", "valid integer"),
        ({"seed": -1}, None, "0 to 2^64"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"nfe": 9}, None, "nfe"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"quality": "hd"}, "quality", "'auto' or 'standard' (nfe is what"),
        ({"style": "cubist"}, "style", "'vivid' or 'natural'"),
        ({"background": "transparent"}, "background", "no transparency"),
        ({"moderation": "high"}, "moderation", "nothing is filtered"),
        ({"stream": True}, "stream", "False (an image is sent when it is done)"),
        ({"partial_images": 2}, "partial_images", "0 ("),
        ({"output_compression": 80}, "output_compression", "jpeg or webp"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "100"),
        ({"cfg": 7.5}, "cfg", "no such field; there are prompt, model, n, size, seed, nfe"),
    ],
)
def test_what_cannot_work_is_400(start, pipe, fields, param, message):
    error = error_of(ask(start(max_prompt=20, max_pixels=2048, max_images=2), **fields), 400)
    assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"
    assert pipe.calls == []


def test_bodies_that_are_no_request(start):
    client, json_type = start(), {"Content-Type": "application/json"}
    assert "not JSON" in error_of(client.post(ROUTE, content=b'{"prompt":', headers=json_type), 400)["message"]
    for content, headers in ((b"[]", json_type), (b'{"prompt": "a"}', {}), (b"", json_type)):
        assert "JSON object" in error_of(client.post(ROUTE, content=content, headers=headers), 400)["message"]
    assert error_of(client.post(ROUTE, json={}), 400)["param"] == "prompt"
    error_of(client.post(ROUTE, content=b" " * (MAX_BODY + 1), headers=json_type), 413, "body_too_large")
    error_of(client.post(ROUTE, content=iter([b" " * 200_000] * 2), headers=json_type), 413, "body_too_large")
    assert ask(client).status_code == 200


def sent(client, text: bytes) -> bytes:
    """What a server answers to these bytes before it closes the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port), PATIENCE) as connection:
        connection.sendall(text)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_chunked_bodies(start):
    client, json_type = start(), {"Content-Type": "application/json"}
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    body = json.dumps({"prompt": "abc", "seed": 3}).encode()
    streamed = client.post(ROUTE, content=iter([body[:5], body[5:]]), headers=json_type)
    assert streamed.json()["data"] == ask(client, "abc", seed=3).json()["data"]
    chunks = b"5;a=b\r\n%b\r\n%x\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    for length in (b"", b"Content-Length: 3\r\n"):  # which chunks override, for the limit on size too
        answer = sent(client, head.encode() + length + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert answer.startswith(b"HTTP/1.1 200") and streamed.json()["data"][0]["b64_json"].encode() in answer
        large = b"%x\r\n" % (MAX_READ + 1) + b" " * (MAX_READ + 1)  # the end of which is not waited for
        answer = sent(client, head.encode() + length + b"Transfer-Encoding: chunked\r\n\r\n" + large)
        assert answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer
    assert ask(client).status_code == 200


def test_a_body_that_does_not_come_is_408(start, pipe):
    client = start(timeout=1.0)
    for how in ("Content-Length: 100", "Transfer-Encoding: chunked"):
        answer = sent(client, f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\n{how}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 408") and b"within 1 seconds" in answer
    assert pipe.calls == [] and ask(client).status_code == 200


def test_head_answers_where_get_does(start):
    client = start(token="secret")
    for path in ("/", "/health", "/health/live", "/health/ready", "/v1/models", "/v1/models/tiny", "/v1/models/other",
                 "/metrics", "/openapi.json", "/nowhere", ROUTE):  # fmt: skip
        for headers in ({}, {"Authorization": "Bearer secret"}):
            get, answer = client.get(path, headers=headers), client.head(path, headers=headers)
            assert answer.status_code == get.status_code and answer.content == b"", path
            assert answer.headers["content-type"] == get.headers["content-type"]
            assert path == "/metrics" or answer.headers["content-length"] == get.headers["content-length"]


def test_unknown_models_and_routes(start):
    client = start()
    assert "this server has 'tiny'" in error_of(ask(client, model="dall-e-3"), 404, "model_not_found")["message"]
    error_of(client.get("/v1/models/other"), 404, "model_not_found")
    error_of(client.get("/v1/nowhere"), 404)
    error_of(client.get(ROUTE), 405)
    assert client.get("/v1/models").json()["data"][0]["id"] == client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_requests_share_batches(start, pipe):
    client = start()
    held = hold(pipe, client)
    answers = [background(ask, client, "b" * i, seed=i) for i in range(1, 5)]
    eventually(lambda: client.engine.waiting == 4)
    pipe.gate.set()
    for i, answer in enumerate(answers, 1):
        (entry,) = answer().json()["data"]
        assert image_of(entry).getpixel((0, 0)) == (i, 0, i)
    assert held().status_code == 200 and pipe.batches == [1, 4]


def test_full_queue_is_429(start, pipe):
    client = start(max_queue=2, max_images=2)
    held = hold(pipe, client)
    waiting = background(ask, client, n=2)
    eventually(lambda: client.engine.waiting == 2)
    answer = ask(client)
    assert error_of(answer, 429, "rate_limit_exceeded")["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1
    pipe.gate.set()
    assert held().status_code == waiting().status_code == 200


def test_late_requests_are_504_and_given_up(start, pipe):
    client = start(timeout=1.0)
    pipe.gate.clear()
    error_of(ask(client, "running"), 504, "timeout")
    assert pipe.cancelled.wait(PATIENCE)
    pipe.entered.clear()
    (held,) = client.engine.submit("held")
    assert pipe.entered.wait(PATIENCE)
    error_of(ask(client, "waiting"), 504, "timeout")
    assert client.engine.waiting == 0
    pipe.gate.set()
    held.future.result(PATIENCE)
    assert [call["prompts"] for call in pipe.calls] == [["running"], ["held"]]


def test_clients_that_leave_are_forgotten(start, pipe):
    client = start()

    def leave():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(client.base_url.join(ROUTE), json={"prompt": "left"}, timeout=httpx.Timeout(PATIENCE, read=1.0))

    pipe.gate.clear()
    leave()  # while it runs
    assert pipe.cancelled.wait(PATIENCE)
    held = hold(pipe, client)
    leave()  # while it waits
    eventually(lambda: client.engine.waiting == 0)
    pipe.gate.set()
    assert held().status_code == 200
    assert [call["prompts"] for call in pipe.calls] == [["left"], ["held"]]
    assert 'path="/v1/images/generations",status="499"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [
        ("bad", 400, "a bad prompt"), ("crash", 500, "generation failed"), ("big", 500, "out of memory"),
        ("nan", 500, "the image is not finite"), ("file", 500, "generation failed"),
        ("shapeless", 500, "the server failed"),
    ],
)  # fmt: skip
def test_failures(start, prompt, status, message):
    client = start()
    error = error_of(ask(client, prompt), status)
    assert error["message"] == message and ("server_error" in error["type"]) == (status == 500)
    assert ask(client).status_code == 200
    assert f'path="{ROUTE}",status="{status}"}} 1.0' in client.get("/metrics").text


def test_draining_is_503(start, pipe):
    client = start()
    held = hold(pipe, client)
    assert client.get("/health").json() == {"status": "ready", "waiting": 0, "running": 1}
    client.engine.close()
    answer = ask(client)
    error_of(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1" and answer.headers["connection"] == "close"
    assert client.get("/health").status_code == client.get("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200
    pipe.gate.set()
    assert held().status_code == 200


def test_token(start):
    client, token = start(token="sesam-öffne"), "Bearer sesam-öffne".encode()
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        for given in (None, b"Bearer", b"Bearer wrong", b"Basic sesam", token + b"x", token[7:]):
            answer = client.get(path, headers={} if given is None else {"Authorization": given})
            error_of(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get(path, headers={"Authorization": token}).status_code == 200
    error_of(ask(client), 401, "invalid_api_key")
    assert client.post(ROUTE, json={"prompt": "a"}, headers={"Authorization": token}).status_code == 200
    for path in ("/", "/health", "/health/live", "/health/ready"):
        assert client.get(path).status_code == 200


def test_metrics(start):
    client = start(max_batch=2)
    ask(client, n=3)
    ask(client, "bad")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert values["twinflow_images_total"] == "3.0" and values["twinflow_batch_images_count"] == "2.0"
    assert values["twinflow_failed_batches_total"] == "1.0" and values["twinflow_waiting_images"] == "0.0"
    assert values[f'twinflow_requests_total{{path="{ROUTE}",status="200"}}'] == "1.0"
    assert values["twinflow_request_seconds_count"] == "2.0"


def test_description(start):
    described = start().get("/openapi.json").json()
    fields = described["components"]["schemas"]["ImageRequest"]["properties"]
    assert {"prompt", "n", "size", "seed", "nfe", "response_format", "user"} <= set(fields)


def test_page_needs_nothing_from_elsewhere(start):
    answer = start().get("/")
    assert answer.headers["content-type"].startswith("text/html") and answer.text == PAGE.read_text()
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[a-z./]""", answer.text) == []
    assert "//" not in re.sub(r"<!--.*?-->", "", answer.text)
