"""The engine on many machines: a Ray Serve deployment with one engine per GPU, and its front.

    Worker        the deployment: a model on one GPU (or some CPU cores) behind the ordinary `Engine`,
                  which batches what reaches it. Ray Serve adds and removes workers with the load.
    open_cluster  joins or starts a cluster and deploys; the front, an engine to its callers
                  (`serve.cluster`), stays in this process, so that `twinflow-rt serve MODEL --ray`
                  keeps its address, drain and exit status.
    build         the same with the front deployed too, for `serve run twinflow_rt.serve.ray:build
                  model=MODEL` and the config files of `serve deploy`.

Serve's own HTTP proxy gives up a request whose replica died. So the front has its own deployment
on the head node, which outlives every worker, and asks again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve

from ..checkpoint.lora import resolve_loras
from ..errors import ConfigError, DeviceError, PromptTruncatedWarning
from ..options import LoadOptions
from .cluster import Cluster, Model
from .engine import Engine
from .settings import Limits, RayOptions, Settings

NAME = "twinflow-worker"
HEAD = {"node:__internal_head__": 0.001}  # a sliver of the resource that only the head node has
AUTOSCALING = {"upscale_delay_s": 5, "downscale_delay_s": 300, "look_back_period_s": 15}


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each takes: `gpus` is 1, or 0 for CPU cores alone."""

    least: int
    most: int
    gpus: int
    cpus: float

    @property
    def device(self) -> str:
        """What a worker loads its model on: the one GPU that Ray shows it, or the CPU."""
        return "cuda" if self.gpus else "cpu"


def plan_workers(device: Any, asked: RayOptions) -> Workers:
    """Return how many workers fit the cluster that this process has joined.

    One worker per GPU where the cluster has GPUs or `device` is "cuda", else or with "cpu" one per node with
    CPUs; at most `asked.workers`, where given, for clusters that grow. A worker's cores: by default 1
    beside a GPU, and on CPUs all cores of the smallest node. Raises ConfigError, DeviceError.
    """
    most, least, cpus = asked.workers, asked.min_workers, asked.worker_cpus
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {device} with --ray: use cpu or cuda; which GPU a worker gets is Ray's choice")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    on_gpu = gpus > 0 if device is None else device == "cuda"
    found = gpus if on_gpu else len(cores)
    if most is None and not found:
        kind = "GPU" if on_gpu else "CPU"
        raise DeviceError(f"the Ray cluster has no {kind} yet; say with --workers how many to expect")
    most = found if most is None else most
    if not 1 <= least <= most:
        raise ConfigError(f"{least} to {most} workers: the least must be from 1 to the most")
    if cpus is None:
        cpus = 1 if on_gpu else min(cores, default=1)
    if not 0 < cpus < math.inf:
        raise ConfigError(f"--worker-cpus {cpus} must be more than 0")
    return Workers(least, most, int(on_gpu), cpus)


# -- workers --------------------------------------------------------------------------------------


class Worker:
    """A model behind an engine. model, options: as `twinflow_rt.load` takes them."""

    def __init__(self, model: str, options: LoadOptions, limits: Limits) -> None:
        from ..loading import load

        warnings.simplefilter("ignore", PromptTruncatedWarning)  # answers say it
        self.engine = Engine(load(model, **vars(options)), limits)
        self.engine.warm_up()

    async def describe(self) -> Model:
        """Return what requests to this model are checked against."""
        pipe = self.engine.pipe
        return Model(pipe.sizes, pipe.sampler, pipe.scheduler)

    async def generate(
        self, prompt: str, width: int, height: int, seed: int, nfe: int | None, more: dict[str, Any]
    ) -> tuple[np.ndarray, bool]:
        """Return one image, uint8 [height, width, 3], and whether its prompt was cut. more: of `Engine.submit`. Raises
        what that and its jobs raise."""
        jobs = self.engine.submit(prompt, width=width, height=height, seed=seed, nfe=nfe, **more)
        try:
            return np.asarray(await asyncio.wrap_future(jobs[0].future)), jobs[0].truncated
        finally:  # Ray cancels this coroutine when the caller has left
            self.engine.cancel(jobs)

    def check_health(self) -> None:
        """Ray Serve replaces a worker for which this raises."""
        if not self.engine.accepting:
            raise RuntimeError("the engine's thread has ended")


def deployment(model: str, options: LoadOptions, limits: Limits, workers: Workers) -> serve.Application:
    """Return the workers as a Ray Serve application without HTTP. Each holds one batch in work and one waiting."""
    held = 2 * limits.max_batch
    deployed = serve.deployment(
        name=NAME,
        max_ongoing_requests=held,
        ray_actor_options={"num_gpus": workers.gpus, "num_cpus": workers.cpus},
        autoscaling_config={
            "min_replicas": workers.least,
            "max_replicas": workers.most,
            "target_ongoing_requests": limits.max_batch,
            **AUTOSCALING,
        },
    )(Worker)
    return deployed.bind(model, options, replace(limits, max_queue=max(held, limits.max_queue)))


# -- the front ------------------------------------------------------------------------------------


@contextmanager
def open_cluster(settings: Settings) -> Iterator[Cluster]:
    """Yield the engine for `twinflow-rt serve --ray`: join the cluster and deploy the workers, which go in the end."""
    with session(settings.ray.ray or ""):
        serve.start(proxy_location="Disabled")
        name = f"twinflow-{settings.name}"
        try:
            yield Cluster(_run(_deployment(settings), name), settings.limits)
        finally:
            serve.delete(name)


def _run(application: serve.Application, name: str) -> Any:
    """Deploy and wait for the first worker. Raise DeviceError with what a worker raised."""
    try:
        return serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:  # its text names the deployment alone; the status ends with the worker's traceback
        deployments = serve.status().applications[name].deployments.values()
        reason = "\n".join([str(error), *(each.message for each in deployments)]).strip().splitlines()[-1]
        raise DeviceError(f"Ray could not start the workers: {reason}") from None


@contextmanager
def session(address: str) -> Iterator[None]:
    """Make this process a driver of the cluster at `address` ("": the one that RAY_ADDRESS names or that runs
    here, else a new one on this machine, which ends with the session). One already joined is used as it is."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise DeviceError(f"no Ray cluster at {address!r}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def model_path(model: str) -> str:
    """Return a model's name as the workers, which run elsewhere, are to open it."""
    return model if model == "demo" or model.startswith("hf://") else str(Path(model).resolve())


def for_workers(options: LoadOptions, device: str) -> LoadOptions:
    """Return the options for workers, which run elsewhere: their `device`, and files by their whole paths."""
    base, files = options.base and model_path(str(options.base)), tuple(model_path(str(file)) for file in options.files)
    loras = options.loras and [(Path(path).resolve(), weight) for path, weight in resolve_loras(options.loras)]
    return replace(options, base=base, files=files, device=device, loras=loras)


def build(args: dict[str, Any]) -> serve.Application:
    """Return the whole server as a Ray Serve application.

    args: the options of `twinflow-rt serve`, with underscores: {"model": "demo", "max_batch": 4}; not host,
    port, drain_timeout and ray, which are Ray Serve's to set. The token's file or variable is read by the
    front, on the head node. Raises ConfigError.
    """
    settings = parse(args)
    front = serve.deployment(
        serve.ingress(_front(settings))(),
        name="twinflow-http",
        max_ongoing_requests=settings.limits.max_queue + 1000,  # more than the engine takes: the refusal is its own
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
    )
    return front.bind(_deployment(settings))


def _front(settings: Settings) -> Any:
    """Return what makes the HTTP application, inside the front's replica."""

    def front() -> Any:
        from .app import create_app

        handle = serve.get_deployment_handle(NAME, serve.get_replica_context().app_name)
        token, timeout = settings.server.token(), settings.server.timeout
        return create_app(Cluster(handle, settings.limits), settings.name, token=token, timeout=timeout)

    return front


def _deployment(settings: Settings) -> serve.Application:
    workers = plan_workers(settings.load.device, settings.ray)
    options = for_workers(settings.load, workers.device)
    return deployment(model_path(settings.model), options, settings.limits, workers)


def parse(args: dict[str, Any]) -> Settings:
    """Return the settings of a server from names and values, as `twinflow-rt serve` has them. Raises ConfigError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigError(f"{message}; the options are those of `twinflow-rt serve`")

    parser = Parser("build", add_help=False, allow_abbrev=False)
    Settings.add_arguments(parser)
    refused = {"host", "port", "drain_timeout", "ray"} & set(args)
    if refused:
        raise ConfigError(f"{', '.join(sorted(refused))}: set by Ray Serve itself, in its http_options")
    words = [str(args.get("model", "demo"))]
    for name, value in args.items():
        if name != "model":
            flag = f"--{name.replace('_', '-')}"
            several = [flag, *map(str, value)] if isinstance(value, (list, tuple)) else [f"{flag}={value}"]
            words += [flag] if str(value).lower() == "true" else several
    return Settings.of(parser.parse_args(words))
