"""The whole server over a tiny model: the official client, the command and its signals, the page in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from fastapi.responses import HTMLResponse
from PIL import Image

from tests.factory import make_model
from tests.serve.conftest import PATIENCE, eventually, served
from twinflow_rt import cli
from twinflow_rt.loading import load
from twinflow_rt.serve.app import PAGE, PAGE_HEADERS
from twinflow_rt.serve.settings import Limits, ServerOptions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("serve") / "tiny-model")


@pytest.fixture(scope="module")
def tiny(folder):
    return load(folder, device="cpu")


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64)))).astype(int)


def test_official_client(tiny):
    want = tiny("a red circle", seed=[7, 8], num_images=2, width=32, height=24, output="np").images
    with served(tiny, token="secret", limits=Limits(max_queue=2, max_images=2)) as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="secret", max_retries=0)
        answer = client.images.generate(
            model="tiny", prompt="a red circle", n=2, size="32x24", response_format="b64_json", extra_body={"seed": 7},
            quality="standard", style="vivid", background="auto", moderation="low", output_format="png",
            output_compression=100, partial_images=0, stream=False, user="someone",
        )  # fmt: skip
        assert answer.size == "32x24" and [image.seed for image in answer.data] == [7, 8]
        for image, expected in zip(answer.data, want, strict=True):
            assert np.abs(pixels(image.b64_json) - expected).max() <= 1
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "twinflow_rt"
        with pytest.raises(openai.NotFoundError) as caught:
            client.images.generate(model="dall-e-3", prompt="a")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="nearest is 32"):
            client.images.generate(prompt="a", size="33x32")
        for field, value in (("quality", "hd"), ("background", "transparent"), ("stream", True)):
            with pytest.raises(openai.BadRequestError) as caught:
                client.images.generate(prompt="a", **{field: value})
            assert caught.value.param == field
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        http.engine.close()
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="a")
        assert caught.value.status_code == 503


def test_batching_mixes_nothing_up(tiny):
    """Concurrent requests of two sizes and two schedules: each image is the one its seed gives alone."""
    requests = [
        {"prompt": f"{'a very long prompt ' * (i % 3)}{i}", "seed": 10 * i, "size": ("16x16", "24x16")[i % 2],
         "n": 1 + i % 2, "nfe": 1 + (i % 4 == 3)}
        for i in range(16)
    ]  # fmt: skip
    with served(tiny, limits=Limits(max_wait=0.05)) as http:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: http.post(ROUTE, json=body).json(), requests))
        text = http.get("/metrics").text
    assert float(re.search(r"^twinflow_batch_images_count (.+)$", text, re.M)[1]) < len(requests)
    for request, answer in zip(requests, answers, strict=True):
        width, height = map(int, request["size"].split("x"))
        alone = tiny(
            request["prompt"], width=width, height=height, seed=request["seed"], num_images=request["n"],
            nfe=request["nfe"], output="np",
        ).images  # fmt: skip
        for entry, expected in zip(answer["data"], alone, strict=True):
            assert np.abs(pixels(entry["b64_json"]) - expected).max() <= 1


@pytest.fixture
def process(folder, tmp_path):
    """Starts `twinflow-rt serve` and waits until it serves; yields (process, address, log)."""
    started = []

    def start(*options):
        log = tmp_path / "log"
        command = [sys.executable, "-m", "twinflow_rt.cli", "serve", str(folder), "--device", "cpu", "--port", "0"]
        with log.open("w") as file:
            started.append(subprocess.Popen([*command, *options], stderr=file, stdout=file))
        found = lambda: re.search(r"serving (\S+) on (http://\S+)", log.read_text())
        eventually(lambda: found() or started[0].poll() is not None, "serving")
        assert found(), log.read_text()
        return started[0], found()[2], log

    yield start
    for child in started:
        child.kill()
        child.wait(PATIENCE)


def test_sigterm_finishes_what_was_accepted(process):
    child, address, log = process("--max-wait", "0", "--drain-timeout", "300", "--timeout", "300")
    slow = {"prompt": "slow", "size": "128x128", "n": 2, "nfe": 8}
    with httpx.Client(base_url=address, timeout=300) as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny-model"
        answer = pool.submit(client.post, ROUTE, json=slow)
        eventually(lambda: client.get("/health").json()["running"] > 0, "running")
        child.send_signal(signal.SIGTERM)
        eventually(lambda: client.get("/health").status_code == 503, "draining")
        assert client.post(ROUTE, json={"prompt": "late"}).status_code == 503
        assert answer.result().status_code == 200 and len(answer.result().json()["data"]) == 2
    assert child.wait(PATIENCE) == 0, log.read_text()
    assert "SIGTERM: finishing" in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.full
def test_drain_timeout_gives_up(process):
    child, address, _ = process("--max-wait", "0", "--drain-timeout", "0.2", "--max-batch", "1")
    slow = {"prompt": "slow", "size": "256x256", "n": 10, "nfe": 8}
    with httpx.Client(base_url=address, timeout=300) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, ROUTE, json=slow)
        eventually(lambda: client.get("/health").json()["running"] > 0, "running")
        child.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 503
    assert child.wait(PATIENCE) == 1


def test_command_refuses_what_cannot_work(folder, tmp_path, capsys, monkeypatch):
    empty = tmp_path / "token"
    empty.write_text("\n")
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, code, message in (
            (["--port", port], 1, f"cannot bind 127.0.0.1:{port}"),
            (["--port", "70000"], 2, "--port 70000"),
            (["--token-file", str(empty)], 2, "holds no token"),
            (["--token-file", str(tmp_path / "absent")], 2, "absent"),
            (["--token-env", "NO_TOKEN"], 2, "--token-env NO_TOKEN holds no token"),
            (["--timeout", "0"], 2, "--timeout"),
            (["--max-batch", "0"], 2, "max_batch"),
            (["--port", "0", "--dtype", "int4"], 2, "dtype"),
        ):
            assert cli.main(["serve", str(folder), "--device", "cpu", *options]) == code
            assert message in capsys.readouterr().err


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv("SOME_TOKEN", "from-env")
    assert ServerOptions(token_file=tmp_path / "token").token() == "from-file"
    assert ServerOptions(token_env="SOME_TOKEN").token() == "from-env" and ServerOptions().token() is None


# a user: a request that works, then one that does not
DRIVE = """<script>
addEventListener("load", async () => {
  const pause = () => new Promise(done => setTimeout(done, 20));
  for (const fields of [{ prompt: "<b>abc", size: "32x24", seed: "5", n: "2" }, { size: "33x32" }]) {
    for (const [id, value] of Object.entries(fields)) at(id).value = value;
    at("form").requestSubmit();
    while (at("go").disabled) await pause();
    document.body.append("said: " + at("status").textContent);
  }
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_in_a_browser(tiny, tmp_path):
    """The page, with a script added that uses it: what it shows is what the API gives."""
    driven = PAGE.read_text().replace("</body>", DRIVE + "</body>")
    add_route = lambda app: app.add_api_route("/driven", lambda: HTMLResponse(driven, headers=PAGE_HEADERS))
    with served(tiny, change=add_route) as http:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            f"--user-data-dir={tmp_path}", "--virtual-time-budget=60000", "--dump-dom", f"{http.base_url}/driven",
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE).stdout
        want = http.post(ROUTE, json={"prompt": "<b>abc", "size": "32x24", "seed": 5, "n": 2}).json()
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', shown)
    assert images == [entry["b64_json"] for entry in want["data"]]
    assert "&lt;b&gt;abc · 32x24 · seed 5" in shown and "said: 2 images in" in shown
    assert '<span id="model">tiny</span>' in shown
    assert re.search(r"said: width 33 must be .* the nearest is 32", shown)
