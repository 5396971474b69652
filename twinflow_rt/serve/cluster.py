"""An engine to its callers, whose images are made by the workers of a Ray Serve deployment (`serve.ray`).

An image whose worker is lost is asked of another one: what was accepted is answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NamedTuple

from PIL import Image
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from ..config import SizeRule
from ..errors import CancelledError, DeviceError, TwinFlowError
from ..sampling.schedule import SamplerConfig
from ..sampling.scheduler import Scheduler
from ..stages.image_input import arguments
from .engine import SMOOTHING, Batch, Engine, Job
from .settings import Limits

log = logging.getLogger(__name__)
LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError)
MAX_LOST = 5  # workers that one image may take down before it is to blame
RETRY_SECONDS = 0.2


class Model(NamedTuple):
    """What the front has to know of a model to check requests."""

    sizes: SizeRule
    sampler: SamplerConfig
    scheduler: Scheduler | None = None


class Cluster(Engine):
    """An engine whose images are made by the workers behind `handle`, a Ray Serve deployment handle.

    Every image is a request of its own; `Limits.max_queue` bounds those not finished, wherever they
    wait, and `waiting` counts them. `observe` is told of each image as a batch of one.
    """

    def __init__(self, handle: Any, limits: Limits | None = None) -> None:
        self._handle, self._loop, self._drained = handle, asyncio.new_event_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last = time.monotonic()
        super().__init__(None, limits)
        self.pipe = asyncio.run_coroutine_threadsafe(self._ask("describe"), self._loop).result()

    def submit(self, prompt: str, *, nfe: int | None = None, **options: Any) -> list[Job]:
        """As `Engine.submit`."""
        jobs = super().submit(prompt, nfe=nfe, **options)
        for job in jobs:
            self._loop.call_soon_threadsafe(self._start, job, nfe)
        return jobs

    def close(self) -> None:
        """As `Engine.close`."""
        super().close()
        self._loop.call_soon_threadsafe(self._check_drained)

    def _work(self) -> None:
        self._loop.run_until_complete(self._drained.wait())

    def _check_drained(self) -> None:
        with self._changed:
            if self._draining and not self._queue:
                self._drained.set()

    def _start(self, job: Job, nfe: int | None) -> None:
        task = self._loop.create_task(self._finish(job, nfe))
        self._tasks.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self._tasks.discard)
        job.future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(task.cancel))

    async def _finish(self, job: Job, nfe: int | None) -> None:
        """Have the image made and settle its future, unless the job was given up meanwhile."""
        height, width, *_, guided = job.kind
        outcome: Any = CancelledError("Ray gave this image up")
        try:
            more = arguments([job.given] if job.given is not None else []) | guided.given()
            pixels, job.truncated = await self._ask("generate", job.prompt, width, height, job.seed, nfe, more)
            outcome = Image.fromarray(pixels)
        except Exception as error:
            if not isinstance(error, TwinFlowError):
                log.error("generating failed", exc_info=error)
            outcome = error
        finally:
            self._settle(job, outcome)
            self._check_drained()

    def _settle(self, job: Job, outcome: Any) -> None:
        failed = isinstance(outcome, Exception)
        with self._changed:
            if job not in self._queue:
                return
            self._queue.remove(job)
            if not job.future.set_running_or_notify_cancel():
                return
            if failed:
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
            now = time.monotonic()
            spacing, self._last = now - max(self._last, job.queued), now
            self._seconds_per_image += SMOOTHING * (spacing - self._seconds_per_image)
        if self.observe is not None:
            seconds = now - job.queued
            self.observe(Batch(1, seconds, 0.0, {} if failed else {"total": seconds}))

    async def _ask(self, method: str, *args: Any) -> Any:
        """Call a worker's method; ask another worker where one is lost."""
        lost = 0
        while True:
            response = getattr(self._handle, method).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError as error:
                raise (error.cause or error) from None
            except LOST as error:
                lost += not isinstance(error, ActorUnavailableError)  # that may be the network, and pass
                log.warning("a worker was lost (%s); another one is asked", type(error).__name__)
                if lost >= MAX_LOST:
                    raise DeviceError(f"{lost} workers were lost over this request; see Ray's logs") from None
            await asyncio.sleep(RETRY_SECONDS)
