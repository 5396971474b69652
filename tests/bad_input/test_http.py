"""HTTP: 4xx with OpenAI's error object for every bad request, never 500, and the server goes on."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from tests.serve.fake import FakePipe
from twinflow_rt.serve.app import create_app
from twinflow_rt.serve.engine import Engine, Limits
from twinflow_rt.serve.gate import MAX_BODY

ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def client():
    engine = Engine(FakePipe(), Limits(max_wait=0.0, max_prompt=100, max_pixels=2048))
    with TestClient(create_app(engine, "tiny"), raise_server_exceptions=False) as client:
        yield client
    assert engine.drain(30), "the worker hangs"


def refused(answer, status: int, message: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"], error
    assert "Traceback" not in answer.text and "File \"" not in answer.text


FIELDS = [
    {"prompt": None}, {"prompt": 3}, {"prompt": ["a"]}, {"prompt": {}}, {"prompt": True}, {"prompt": "x" * 101},
    {"prompt": "\ud800"}, {"prompt": "a\udfffb"}, {"n": 0}, {"n": -1}, {"n": 11}, {"n": 10**9}, {"n": 10**30},
    {"n": 1.5}, {"n": "1"}, {"n": True}, {"n": []}, {"n": float("nan")}, {"n": float("inf")}, {"size": "0x0"},
    {"size": "31x32"}, {"size": "32x"}, {"size": "x32"}, {"size": "32"}, {"size": ""}, {"size": "32X32"},
    {"size": "32x32x32"}, {"size": "٣٢x٣٢"}, {"size": "1e1x32"}, {"size": "-32x32"}, {"size": "99999x99999"},
    {"size": "9" * 50 + "x32"}, {"size": 32}, {"size": [32, 32]}, {"size": "32x32\n"}, {"size": "64x64"}, {"seed": -1},
    {"seed": 2**64}, {"seed": 2**65}, {"seed": 1.0}, {"seed": "1"}, {"seed": True}, {"seed": [1]},
    {"seed": float("nan")}, {"nfe": 0}, {"nfe": -1}, {"nfe": 9}, {"nfe": 10**20}, {"nfe": 1.5}, {"nfe": "1"},
    {"nfe": False}, {"response_format": "url"}, {"response_format": 1}, {"output_format": "gif"},
    {"output_format": "../png"}, {"output_format": None, "quality": "hd"}, {"user": 3}, {"user": {"a": 1}},
    {"style": "Vivid"}, {"background": "transparent"}, {"stream": True}, {"stream": "false"}, {"partial_images": 1},
    {"__class__": "x"}, {"": 1}, {"\ud800": 1}, {"a\0b": 1}, {"latents": [[0.0]]},
    {"prompt_embeds": [[0.0]]}, {"guidance": "7.5"}, {"negative_prompt": 3},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: ascii(fields)[:60])
def test_fields(client, fields):
    body = json.dumps({"prompt": "a", **fields}).encode()  # not the client's encoder, which refuses some itself
    refused(client.post(ROUTE, content=body, headers={"Content-Type": "application/json"}), 400, "")


BODIES = {
    "nothing": b"", "null": b"null", "a list": b"[]", "text": b'"a"', "a number": b"1", "cut": b'{"prompt": "a"',
    "two objects": b"{}{}", "not UTF-8": b'{"prompt": "\xff"}',
    "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 40_000, "NaN": b'{"prompt": "a", "seed": NaN}',
    "a huge number": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "infinite": b'{"prompt": "a", "seed": 1e999}',
    "a form": b"prompt=a&n=1", "XML": b"<prompt>a</prompt>", "NUL": bytes(100), "a pickle": b"\x80\x04N.",
    "missing prompt": b'{"n": 1}', "bare surrogate": b'{"prompt": "\\ud83d"}',
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-16"])
def test_bodies(client, body, kind):
    refused(client.post(ROUTE, content=body, headers={"Content-Type": kind}), 400, "")


KINDS = ["", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "x" * 500]


@pytest.mark.parametrize("kind", KINDS)
def test_content_types(client, kind):
    refused(client.post(ROUTE, content=b'{"prompt": "a"}', headers={"Content-Type": kind}), 400, "JSON object")


LENGTHS = [
    (str(MAX_BODY + 1), 413), ("9" * 18, 413), ("9" * 5000, 413), ("-1", 400), ("", 400), ("1e3", 400), ("0x10", 400),
    ("\xb2", 400),
]  # fmt: skip


@pytest.mark.parametrize(("length", "status"), LENGTHS)
def test_lengths(client, length, status):
    headers = {"Content-Type": "application/json", "Content-Length": length.encode("latin-1")}
    refused(client.post(ROUTE, content=b'{"prompt": "a"}', headers=headers), status, "")


@pytest.mark.parametrize(("size", "status"), [(2, 400), (MAX_BODY + 1, 413)])
def test_bodies_without_a_length(client, size, status):
    body = iter([b"{", b"}".rjust(size - 1)])
    answer = client.post(ROUTE, content=body, headers={"Content-Type": "application/json"})
    refused(answer, status, "prompt" if status == 400 else "more than")


PATHS = [
    "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/%ED%A0%80",
    "/v1/models/" + "x" * 5000, "/v1/models/a/b/c", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/../../x",
    "/v1/images/edits", "/docs", "/v1/images/generations/", "/v1//models", "/%", "/?a=%00",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_paths(client, path):
    answer = client.get(path, follow_redirects=False)
    if path == "/?a=%00":
        assert answer.status_code == 200
    elif answer.status_code != 307:  # to the same path without its slash
        refused(answer, answer.status_code, "")
        assert answer.status_code in (404, 405)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"])
def test_methods(client, method):
    headers = {"Content-Length": "0"}
    assert client.request(method, ROUTE, headers=headers).status_code in (405, 400)


def test_models_by_odd_names(client):
    for name in ("", "x" * 10_000, "\ud800", "tiny\0", "../tiny"):
        body = json.dumps({"prompt": "a", "model": name}).encode()
        answer = client.post(ROUTE, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 404) and answer.json()["error"]["message"]


def test_the_server_goes_on(client):
    answer = client.post(ROUTE, json={"prompt": "a", "size": "32x32", "seed": 2**64 - 1, "n": 1})
    assert answer.status_code == 200 and answer.json()["data"][0]["seed"] == 2**64 - 1
