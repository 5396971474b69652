"""Calls recorded as CUDA graphs: on a GPU, one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARMUP = 2  # runs before recording: libraries choose kernels and allocate workspaces in the first


class CudaGraphs:
    """The `capture.Backend` of one CUDA device, by torch.cuda.CUDAGraph."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side, self._done = torch.cuda.Stream(device), torch.cuda.Event()
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Any], inputs: list[Tensor]) -> tuple[Any, Any, int]:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self._side.wait_stream(here)
            with torch.cuda.stream(self._side):
                for _ in range(WARMUP):
                    run()
            here.wait_stream(self._side)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile: only this one's calls are recorded
            mode: dict[str, Any] = {"pool": self._pool, "stream": self._side, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **mode):
                outputs = run()
            return graph, outputs, max(torch.cuda.memory_reserved() - before, 0)

    def enter(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._done)

    def replay(self, graph: Any) -> None:
        graph.replay()

    def leave(self) -> None:
        self._done.record(torch.cuda.current_stream(self.device))

    def reset(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()
