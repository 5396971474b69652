"""One pipeline shared by many callers: a bounded queue and a worker thread that batches it.

The unit is an image, a `Job`. Jobs of one size and one sampler run together, oldest first, up to `Limits.max_batch`.
Every job carries its own seed, and noise depends on that alone, so what runs beside an image changes nothing of it but
the last bits of its arithmetic. Plain Python: HTTP (`serve.app`) or anything else that has callers goes on top.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..config import check_count, resolve_prompts, shown
from ..errors import CancelledError, ConfigError, TwinFlowError
from ..options import GuidanceOptions
from ..runtime.forks import reopen_in_children
from ..sampling.noise import resolve_seeds
from ..sampling.scheduler import sampler_of
from ..stages.image_input import ImageInput, arguments, resolve_images
from .settings import Limits

log = logging.getLogger(__name__)
SMOOTHING = 0.2  # weight of the newest batch in the running mean of seconds per image


class QueueFullError(TwinFlowError):
    """The queue has no room for a request. retry_after: seconds until it should."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(TwinFlowError):
    """The engine takes no more requests: it is shutting down."""


@dataclass(eq=False)
class Job:
    """One image on its way. `future` gives the PIL image, or raises what went wrong; once it does, `truncated` says
    whether its prompt is longer than the model reads.

    kind: (height, width, sampler, strength, masked, guidance); only jobs alike in it share a batch. given: the picture
    to start from, or None.
    """

    prompt: str
    seed: int
    kind: tuple[Any, ...]
    given: ImageInput | None = None
    future: Future[Any] = field(default_factory=Future)
    truncated: bool = False
    abandoned: bool = False
    queued: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Batch:
    """What one run took. wait: seconds its oldest job had waited; timings: as in `pipeline.Result`,
    empty where the run failed."""

    size: int
    seconds: float
    wait: float
    timings: dict[str, float]


class Engine:
    """Runs `pipe` for many callers. `submit` and `cancel` may be called from any thread.

    pipe: called like `pipeline.Pipeline`, with its `sizes`, `sampler` and `scheduler`. observe(batch): told of
    every run, from the worker thread; it must not raise.
    """

    def __init__(self, pipe: Any, limits: Limits | None = None, observe: Callable[[Batch], None] | None = None) -> None:
        self.pipe, self.limits, self.observe = pipe, limits or Limits(), observe
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._draining = False
        self._seconds_per_image = 1.0
        self._worker = threading.Thread(target=self._work, name="twinflow-engine", daemon=True)
        self._worker.start()
        reopen_in_children(self)

    # -- callers --------------------------------------------------------------------------------

    def submit(
        self, prompt: str, *, width: int | None = None, height: int | None = None, seed: int | None = None,
        num_images: int = 1, nfe: int | None = None, image: Any = None, mask: Any = None, strength: float | None = None,
        guidance: float | None = None, negative_prompt: str | None = None,
    ) -> list[Job]:  # fmt: skip
        """Queue a request, all of it or nothing; image k gets seed + k (None: a random seed). image, mask, strength,
        guidance, negative_prompt: as for `Pipeline`, the same for all images.

        Raises ConfigError for what cannot work or exceeds the limits, QueueFullError, DrainingError.
        """
        given, size = resolve_images(image, mask, strength, 1, 1, self.pipe.sizes, (height, width))
        start = (None, False) if given is None else (given.strength, given.mask is not None)
        guided = GuidanceOptions(guidance, negative_prompt)
        self._check_prompt(negative_prompt or "")
        kind = (*self._kind(prompt, size, num_images, nfe), *start, guided)
        jobs = [Job(prompt, s, kind, given) for s in resolve_seeds(seed, num_images)]
        with self._changed:
            if not self.accepting:
                raise DrainingError("the server is shutting down and takes no more requests; ask another one")
            if len(self._queue) + len(jobs) > self.limits.max_queue:
                waiting = len(self._queue) + len(self._running)
                raise QueueFullError(
                    f"{len(self._queue)} images are waiting, {len(jobs)} more exceed the queue of "
                    f"{self.limits.max_queue}; try again later",
                    retry_after=max(1, math.ceil(waiting * self._seconds_per_image)),
                )
            self._queue.extend(jobs)
            self._changed.notify_all()
        return jobs

    def reopen_in_child(self) -> None:
        """In a forked child, which has no worker: refuse requests (`DrainingError`) whoever held the queue."""
        self._changed = threading.Condition()

    def warm_up(self) -> None:
        """Make one image of the default size, so that the first caller does not pay for first uses."""
        (job,) = self.submit("warm-up", seed=0)
        job.future.result()

    def cancel(self, jobs: list[Job]) -> None:
        """Give jobs up: those waiting leave the queue, a run that nobody waits for any more stops
        at its next stage. Finished jobs are left as they are."""
        with self._changed:
            for job in jobs:
                job.abandoned = True
                if job.future.cancel() and job in self._queue:
                    self._queue.remove(job)
            self._changed.notify_all()

    @property
    def accepting(self) -> bool:
        """Whether `submit` takes requests."""
        return not self._draining and self._worker.is_alive()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Images being generated."""
        return len(self._running)

    def close(self) -> None:
        """Take no more requests; those accepted are finished."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Close and wait until everything accepted is finished. After `timeout` seconds the rest is
        given up, its futures raise CancelledError, and False is returned."""
        self.close()
        self._worker.join(timeout)
        if not self._worker.is_alive():
            return True
        with self._changed:
            for job in self._running:
                job.abandoned = True
            for job in self._queue:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(CancelledError("the server shut down before this image's turn"))
            self._queue.clear()
        return False

    def _kind(self, prompt: str, size: tuple[int, int], num_images: int, nfe: int | None) -> tuple[Any, ...]:
        limits = self.limits
        self._check_prompt(prompt)
        if check_count("num_images", num_images) > limits.max_images:
            raise ConfigError(f"{shown(num_images)} images in one request; at most {limits.max_images} are taken")
        pipe = self.pipe
        sampler = sampler_of(nfe, None, pipe.sampler, pipe.scheduler, pipe.sizes.tokens(*size))
        if nfe is not None and nfe > limits.max_nfe:
            raise ConfigError(f"nfe {nfe}: at most {limits.max_nfe} evaluations per image are taken")
        if size[0] * size[1] > limits.max_pixels:
            raise ConfigError(f"size {size[1]}x{size[0]}: at most {limits.max_pixels} pixels are taken")
        return (*size, sampler)

    def _check_prompt(self, prompt: str) -> None:
        resolve_prompts(prompt)
        if len(prompt) > self.limits.max_prompt:
            raise ConfigError(f"prompt has {len(prompt)} characters; at most {self.limits.max_prompt} are taken")

    # -- worker ---------------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next():
            self._generate(batch)
            with self._changed:
                self._running = []

    def _next(self) -> list[Job]:
        """Return the next batch, once there is one; empty when draining is done."""
        with self._changed:
            while True:
                alike = [job for job in self._queue if job.kind == self._queue[0].kind][: self.limits.max_batch]
                if not alike:
                    if self._draining:
                        return []
                    self._changed.wait()
                    continue
                left = alike[0].queued + self.limits.max_wait - time.monotonic()
                if left > 0 and len(alike) < self.limits.max_batch and not self._draining:
                    self._changed.wait(left)
                    continue
                for job in alike:
                    self._queue.remove(job)
                self._running = [job for job in alike if job.future.set_running_or_notify_cancel()]
                if self._running:
                    return self._running

    def _generate(self, batch: list[Job]) -> None:
        """Run a batch. If it fails, its jobs run one by one: what is wrong with one is not the others' fault."""
        began = time.monotonic()
        timings: dict[str, float] = {}
        try:
            images, timings = self._call(batch)
        except Exception as error:  # whatever it is, the next batch must run
            if len(batch) > 1 and not isinstance(error, CancelledError):
                log.warning("a batch of %d failed (%s); its images run one by one", len(batch), error)
                for job in batch:
                    self._generate([job])
                return
            if not isinstance(error, TwinFlowError):
                log.error("generating failed", exc_info=error)
            elif not isinstance(error, (CancelledError, ConfigError)):
                log.error("generating failed: %s", error)
            for job in batch:
                job.future.set_exception(error)
        else:
            for job, image in zip(batch, images, strict=True):
                job.future.set_result(image)
        seconds = time.monotonic() - began
        self._seconds_per_image += SMOOTHING * (seconds / len(batch) - self._seconds_per_image)
        if self.observe is not None:
            self.observe(Batch(len(batch), seconds, began - batch[0].queued, timings))

    def _call(self, batch: list[Job]) -> tuple[list[Any], dict[str, float]]:
        """Return the images of a batch, and the pipeline's timings."""
        height, width, sampler, *_, guided = batch[0].kind
        given = [job.given for job in batch if job.given is not None]
        result = self.pipe(
            [job.prompt for job in batch], height=height, width=width, seed=[job.seed for job in batch],
            sampler=sampler, cancel=lambda: all(job.abandoned for job in batch), **arguments(given),
            **guided.given(),
        )  # fmt: skip
        if len(result.images) != len(batch):
            raise RuntimeError(f"the pipeline gave {len(result.images)} images for {len(batch)} prompts")
        for job, truncated in zip(batch, result.truncated, strict=True):
            job.truncated = truncated
        return result.images, result.timings
