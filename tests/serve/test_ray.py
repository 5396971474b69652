"""Ray on this machine: a head and two workers' nodes. A node killed in the middle of its work costs nothing.

Runs where ray is installed (extra: ray); the whole file shares one cluster.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray", reason="needs ray: pip install '.[ray]'")

import ray
from ray import serve
from ray.cluster_utils import Cluster as LocalCluster
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from benches import load as bench
from twinflow_rt import cli
from twinflow_rt.cli import batch as command
from twinflow_rt.cli.prompt_file import read_rows
from twinflow_rt.config import SizeRule
from twinflow_rt.errors import CancelledError, ConfigError, DeviceError
from twinflow_rt.loading import LoadOptions, load
from twinflow_rt.sampling.schedule import preset
from twinflow_rt.serve import batch, ray_data, server
from twinflow_rt.serve import cluster as cluster_module
from twinflow_rt.serve import ray as on_ray
from twinflow_rt.serve.engine import DrainingError, QueueFullError
from twinflow_rt.serve.settings import RayOptions, Settings

ROUTE = "/v1/images/generations"
PATIENCE = 300
KINDS = 6


def complete(cluster, tries: int = 3) -> None:
    """Brings the cluster to two workers' nodes. Ray gives one 30 seconds to start, which a busy machine exceeds."""
    while len(cluster.worker_nodes) < 2:
        try:
            cluster.add_node(num_cpus=1)
        except Exception as error:
            tries -= 1
            if not tries or "timed out during startup" not in str(error):
                raise


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # 5: too little for a busy machine
    local = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    complete(local)
    ray.init(address=local.address, log_to_driver=False, logging_level=logging.WARNING)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    local.url = f"http://127.0.0.1:{port}"
    yield local
    serve.shutdown()
    ray.shutdown()
    local.shutdown()


@pytest.fixture(scope="module")
def alone():
    """What the model makes of each kind of request on its own."""
    pipe = load("demo", device="cpu")
    return [pipe(f"a red circle, {k}", seed=k, output="np").images[0].astype(int) for k in range(KINDS)]


def eventually(condition, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.3)


def kill_a_node(cluster) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


def settings(*words: str) -> Settings:
    argv = ["serve", "demo", "--device", "cpu", "--ray", "", "--workers", "1", *words]
    return Settings.of(cli.build_parser(argv).parse_args(argv))


def running() -> int:
    """Workers of the application that take requests."""
    deployments = serve.status().applications["served"].deployments
    return deployments[on_ray.NAME].replica_states.get("RUNNING", 0)


def test_the_front_in_this_process(cluster, alone):
    """`twinflow-rt serve --ray`: the engine it opens takes, refuses, gives up and drains like the local one."""
    asked = settings("--max-batch", "2", "--max-wait", "0", "--max-queue", "8", "--max-images", "4")
    with server.open_engine(asked, load) as engine:
        jobs = [job for k in range(KINDS) for job in engine.submit(f"a red circle, {k}", seed=k)]
        with pytest.raises(QueueFullError) as caught:
            engine.submit("too many", num_images=4)
        assert caught.value.retry_after >= 1
        for job, want in zip(jobs, alone, strict=True):
            assert np.abs(np.asarray(job.future.result(PATIENCE)) - want).max() <= 1
        with pytest.raises(ConfigError, match="nearest is 64"):
            engine.submit("a", width=65)
        given_up = engine.submit("a", nfe=8, num_images=4)
        engine.cancel(given_up)
        assert engine.waiting == 0 and all(job.future.cancelled() for job in given_up)
        (job,) = engine.submit("a red circle, 3", seed=3, width=64, height=64)
        assert engine.drain(PATIENCE) and np.abs(np.asarray(job.future.result(0)) - alone[3]).max() <= 1
        with pytest.raises(DrainingError):
            engine.submit("late")
    assert not serve.status().applications


def test_a_worker_that_cannot_start(cluster):
    refused = pytest.raises(DeviceError, match=r"could not start the workers[\s\S]*dtype 'int4' is not supported")
    with refused, server.open_engine(settings("--dtype", "int4"), load):
        pass
    assert not serve.status().applications


def test_the_command(cluster, alone):
    """As a process of its own: it joins the cluster, serves, drains on SIGTERM, takes its workers away."""
    with bench.served("demo", "--device", "cpu", "--ray", cluster.address, "--workers", "1") as url:
        answer = httpx.post(url + ROUTE, json={"prompt": "a red circle, 2", "seed": 2, "n": 2}, timeout=PATIENCE)
        assert [entry["seed"] for entry in answer.json()["data"]] == [2, 3]
        assert np.abs(bench.read_image(answer.json()["data"][0]["b64_json"]) - alone[2]).max() <= 1
    assert not serve.status().applications


def test_a_killed_node_loses_no_request(cluster, alone, monkeypatch):
    """HTTP through Ray Serve: under load a second worker appears; its node or the first one's is killed; every
    request is answered, with its own image."""
    monkeypatch.setattr(on_ray, "AUTOSCALING", {"upscale_delay_s": 0, "look_back_period_s": 11})
    application = on_ray.build({"device": "cpu", "max_batch": 2, "max_wait": 0, "timeout": PATIENCE})
    serve.run(application, name="served", route_prefix="/")
    answers, stop = Counter(), threading.Event()
    client = httpx.Client(base_url=cluster.url, timeout=PATIENCE)

    def ask(k: int) -> None:
        answer = client.post(ROUTE, json={"prompt": f"a red circle, {k}", "seed": k, "model": "demo"})
        assert answer.status_code == 200, answer.text
        image = bench.read_image(answer.json()["data"][0]["b64_json"]).astype(int)
        assert np.abs(image - alone[k]).max() <= 1
        answers[k] += 1

    def keep_asking(k: int) -> None:
        while not stop.is_set():
            ask(k)

    with client, ThreadPoolExecutor(KINDS) as pool:
        callers = [pool.submit(keep_asking, k) for k in range(KINDS)]
        try:
            eventually(lambda: running() == 2, "a second worker")
            kill_a_node(cluster)
            eventually(lambda: running() == 1, "the loss of a worker")
            before = answers.copy()
            eventually(lambda: len(answers - before) == KINDS, "more answers to each caller")
        finally:
            stop.set()
        for caller in callers:
            caller.result(PATIENCE)
        same_as_without_ray(client)
    serve.delete("served")


def same_as_without_ray(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ready", "waiting": 0, "running": 0}
    wrong = client.post(ROUTE, json={"prompt": "a", "size": "65x64"})
    assert wrong.status_code == 400 and "nearest is 64" in wrong.json()["error"]["message"]
    assert client.post(ROUTE, json={"prompt": "a", "model": "other"}).status_code == 404
    text = client.get("/metrics").text
    assert float(re.search(r"^twinflow_images_total (.+)$", text, re.M)[1]) >= 2 * KINDS


def test_a_killed_node_loses_no_prompt(cluster, alone, tmp_path):
    complete(cluster)
    rows = [{"prompt": f"a red circle, {k % KINDS}", "seed": k % KINDS} for k in range(24)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["batch", "demo", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--ray", "", "--device", "cpu"]
    argv += ["--min-workers", "2", "--batch-size", "2"]
    args = cli.build_parser(argv).parse_args(argv)
    groups = batch.group(batch.plan_requests(read_rows(args.prompts), "demo"), args.batch_size)
    names = set()
    with command.painted(groups, args) as images:
        for name, _ in images:
            names.add(name)
            if len(names) == 3:
                kill_a_node(cluster)
    assert len(names) == len(rows)

    (tmp_path / "out").mkdir()
    (kept,) = batch.paint(load("demo", device="cpu"), groups[0][:1], "raise")
    (tmp_path / "out" / kept[0]).write_bytes(kept[1])
    argv[argv.index("--min-workers") + 1] = "1"
    assert cli.main([*argv, "--resume"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [row["seed"] for row in rows]
    for line in lines:
        image = np.asarray(Image.open(tmp_path / "out" / line["file"]))
        assert np.abs(image - alone[line["seed"]]).max() <= 1


def test_what_a_worker_refuses_is_told(cluster, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "width": 65}')
    argv = ["batch", "demo", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), "--ray", "", "--device", "cpu"]
    assert cli.main(argv) == 2
    assert "width 65 must be a multiple" in capsys.readouterr().err


def test_a_model_that_a_worker_cannot_load_is_told_by_its_first_batch():
    """Ray itself would start such a worker again and again."""
    painter = ray_data.Painter("demo", LoadOptions(device="cpu", dtype="int4"), "raise")
    with pytest.raises(ConfigError, match="dtype 'int4' is not supported"):
        painter({"requests": "[]"})


class Handle:
    """A deployment's handle whose worker answers as told: an exception is raised, the last answer repeated."""

    def __init__(self, *answers) -> None:
        self.answers, self.asked, self.cancelled = list(answers), 0, 0
        self.describe = SimpleNamespace(remote=lambda: self.response(on_ray.Model(SizeRule(16, 64, 64, 32), preset(1))))
        self.generate = SimpleNamespace(remote=self.ask)

    def ask(self, *request):
        self.asked += 1
        return self.response(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])

    def response(self, answer):
        handle = self

        class Response:
            def __await__(self):
                if answer is None:
                    yield from asyncio.sleep(PATIENCE).__await__()
                if isinstance(answer, Exception):
                    raise answer
                return answer
                yield

            def cancel(self):
                handle.cancelled += 1

        return Response()


@pytest.fixture
def ask(monkeypatch):
    """Has one image made by a worker that answers so; (handle, engine, job)."""
    monkeypatch.setattr(cluster_module, "RETRY_SECONDS", 0)
    engines = []

    def make(*answers):
        handle = Handle(*answers)
        engines.append(on_ray.Cluster(handle))
        return handle, engines[-1], engines[-1].submit("a", seed=1)[0]

    yield make
    assert all(engine.drain(60) for engine in engines)


PIXELS = np.full((32, 32, 3), 7, np.uint8)


def test_lost_workers_are_made_up_for(ask):
    lost, away = ActorDiedError(), ActorUnavailableError("away", b"0" * 16)
    handle, engine, job = ask(lost, *[away] * 20, lost, lost, lost, (PIXELS, True))
    assert np.array_equal(job.future.result(60), PIXELS) and job.truncated
    assert handle.asked == 25 and engine.waiting == 0


def test_an_image_that_kills_its_workers_is_given_up(ask):
    handle, engine, job = ask(ActorDiedError())
    with pytest.raises(DeviceError, match="5 workers were lost"):
        job.future.result(60)
    assert handle.asked == cluster_module.MAX_LOST and engine.accepting


def test_what_a_worker_raises_comes_back(ask):
    for cause in (ConfigError("no such size"), ZeroDivisionError("a bug")):
        _, _, job = ask(RayTaskError("generate", "traceback", cause))
        with pytest.raises(type(cause), match=str(cause)):
            job.future.result(60)


def test_drain_gives_up_what_takes_too_long(ask):
    handle, engine, job = ask(None)
    eventually(lambda: handle.asked, "the request")
    assert engine.drain(0.05) is False and engine.waiting == 0
    with pytest.raises(CancelledError):
        job.future.result(60)
    eventually(lambda: handle.cancelled, "the worker being told")


def test_workers_fit_the_cluster(monkeypatch):
    plan = lambda device=None, **asked: on_ray.plan_workers(device, RayOptions(**asked))
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 4.0, "GPU": 8.0}}])
    assert plan() == on_ray.Workers(1, 2, gpus=1, cpus=1) and plan().device == "cuda" and plan("cpu").device == "cpu"
    assert plan("cpu") == on_ray.Workers(1, 2, gpus=0, cpus=4.0)
    assert plan("cuda", workers=8, min_workers=2, worker_cpus=3) == on_ray.Workers(2, 8, gpus=1, cpus=3)
    with pytest.raises(ConfigError, match="--worker-cpus 0"):
        plan(worker_cpus=0)
    with pytest.raises(ConfigError, match="--device cuda:1 with --ray"):
        plan("cuda:1")
    with pytest.raises(ConfigError, match="3 to 2 workers"):
        plan(min_workers=3)
    nodes[0]["Resources"] = {}
    with pytest.raises(DeviceError, match="no GPU yet"):
        plan("cuda")


def test_options_of_an_application():
    with pytest.raises(ConfigError, match="port: set by Ray Serve"):
        on_ray.build({"port": 8000})
    with pytest.raises(ConfigError, match=r"--max-bach.*options are those"):
        on_ray.build({"max_bach": 4})
    options = {"max_batch": "4", "download": "true", "batch_invariant": True, "memory_budget": "1GB", "lora": "a:2"}
    options |= {"base": "b", "files": ["c", "hf://d/e/f.gguf"]}
    parsed = on_ray.parse({"model": "hf://a/b", **options})
    assert (parsed.model, parsed.limits.max_batch, parsed.server.timeout) == ("hf://a/b", 4, 120)
    changed = {"download": True, "batch_invariant": True, "memory_budget": "1GB", "loras": [("a", 2.0)]}
    changed |= {"base": "b", "files": ("c", "hf://d/e/f.gguf")}
    assert parsed.load == LoadOptions(**changed, largest=(None, None, 4))
    there = on_ray.for_workers(parsed.load, "cuda")
    elsewhere = {"base": str(Path("b").resolve()), "files": (str(Path("c").resolve()), "hf://d/e/f.gguf")}
    assert there == replace(parsed.load, device="cuda", loras=[(Path("a").resolve(), 2.0)], **elsewhere)
    assert on_ray.model_path("hf://a/b") == "hf://a/b" and on_ray.model_path("demo") == "demo"
    assert on_ray.model_path("m") == str(Path("m").resolve())
