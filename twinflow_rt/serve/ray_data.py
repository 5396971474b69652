"""A file of prompts made by the workers of a Ray cluster, with Ray Data.

Workers give files back instead of writing them, so machines need no folder in common. A batch whose
worker is lost runs again on another one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from ..errors import DeviceError, TwinFlowError
from ..options import LoadOptions
from .batch import Request, Written, paint
from .ray import for_workers, model_path, plan_workers, session
from .settings import RayOptions

MAX_BLOCKS = 10_000  # Ray's driver keeps a reference to each


class Painter:
    """A worker: loads the model once, then makes batch after batch. What `load` refuses is raised by the first of
    them, as Ray starts a worker that cannot start again and again."""

    def __init__(self, model: str, options: LoadOptions, on_oom: str) -> None:
        from ..loading import load

        self.on_oom = on_oom
        self.refusal: TwinFlowError | None = None
        try:
            self.pipe = load(model, **vars(options))
        except TwinFlowError as error:
            self.refusal = error

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if self.refusal is not None:
            raise self.refusal
        requests = [Request(**request) for request in json.loads(row["requests"])]
        return [{"file": file, "content": content} for file, content in paint(self.pipe, requests, self.on_oom)]


@contextmanager
def painted(
    groups: list[list[Request]], model: str, options: LoadOptions, on_oom: str, asked: RayOptions
) -> Iterator[Iterator[Written]]:
    """Yield the images of all groups as workers finish them. Raises the TwinFlowError that a worker raised,
    DeviceError for what else becomes of it."""
    with session(asked.ray or ""):
        workers = plan_workers(options.device, asked)
        # as text, for seeds may be wider than Arrow's integers
        rows = [{"requests": json.dumps([asdict(request) for request in requests])} for requests in groups]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).flat_map(
            Painter,
            fn_constructor_args=(model_path(model), for_workers(options, workers.device), on_oom),
            compute=ray.data.ActorPoolStrategy(min_size=workers.least, max_size=min(workers.most, len(rows))),
            num_gpus=workers.gpus,
            num_cpus=workers.cpus,
        )
        yield _files(dataset)


def _files(dataset: ray.data.Dataset) -> Iterator[Written]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        for row in dataset.iter_rows():
            yield row["file"], row["content"]
    except RayError as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, TwinFlowError):
            reason = getattr(reason, "cause", None) or reason.__cause__
        raise reason or DeviceError(f"a Ray worker failed: {error}") from None
