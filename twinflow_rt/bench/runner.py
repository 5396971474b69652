"""One run of the bench: everything that is measured, in the order in which it disturbs itself least.

    cold starts                           in processes of their own, before this one holds the model
    reference outputs                     float32, unfolded; its memory is freed again
    memory per stage                      with nothing loaded but the model
    stages, whole calls and peers         in turns, between two measurements of the machine's ceilings
    batch sizes, evaluations     in turns
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..config import dtype_name, resolve_device, resolve_dtype, resolve_precision
from ..errors import ConfigError
from ..loading import load, open_model
from ..ops.selection import Choice
from ..options import LoadOptions
from ..pipeline import Pipeline
from . import facts, peers, random_weights, stats, sweeps
from .ceilings import Ceilings
from .ceilings import measure as measure_ceilings
from .correctness import Verdict, judge
from .figures import describe, efficiency, prefer, speedup
from .memory import stage_peaks
from .probe import PHASES, Task
from .probe import run as run_probe
from .record import Record
from .schema import VERSION, validate
from .settings import Settings
from .timing import Samples, interleave
from .workload import STAGES, Workload, batch_of, exact_outputs, outputs, stages

Contender = Callable[..., Any]
UNCHECKED = Verdict({}, False, "not checked in this run")


def run(
    model: str | Path = "demo", *, command: str | None = None, say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Record:  # fmt: skip
    """Measure a model and return the record (`schema.RecordFields`; `record.save` writes it).

    options: the fields of `Settings`. command: kept in the record, for others to repeat. say(text):
    told what is being measured. Raises ConfigError, CheckpointError, DeviceError.
    """
    settings = Settings(model=str(model), **options)
    if settings.peers:
        stats.library()  # a missing one is told before anything is measured
    with ExitStack() as stack:
        if settings.random_weights:
            options = {"scale": settings.scale, "layers": settings.layers}
            model = stack.enter_context(random_weights.temporary(settings.random_weights, **options))
        command = command or f"twinflow_rt.bench.run({settings.name!r}, ...)"
        stack.enter_context(_float32_is_float32())
        return _Run(settings, str(model), say).record(command)


class _Run:
    """The state that the parts of one run share."""

    def __init__(self, settings: Settings, model: str, say: Callable[[str], None]) -> None:
        self.settings, self.model, self.say = settings, model, say
        self.beside: dict[str, Any] = {"base": settings.base, "files": settings.files}
        self.opened = open_model(model, LoadOptions(**self.beside))
        self.device = resolve_device(settings.device)
        self.notes: list[str] = []
        stored = Checkpoint.of_part(self.opened[0] / "transformer", self.opened[1]).main_dtype()
        self.quantized, dtype = resolve_precision(settings.precision, settings.dtype)
        self.dtype = resolve_dtype(dtype, self.device, stored)
        self.dtype_name = dtype_name(self.dtype)

    def record(self, command: str) -> Record:
        machine = facts.machine(self.device)
        if (machine["load_average"] or 0) > machine["cores"]:
            self._note(f"the machine was busy: load {machine['load_average']} on {machine['cores']} cores")
        cold = self._cold()
        exact = self._exact()
        pipe, choices = self._load()
        work = self._work(pipe)
        memory = self._memory(pipe, work)
        contenders = self._contenders(pipe, work)
        verdicts = self._verdicts(contenders, exact)
        timed, ceiling, drift = self._time(pipe, work, contenders)
        compared = self._compare(timed, verdicts)
        contenders.clear()
        _free()
        record = {
            "schema": VERSION, "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"), "command": command,
            "machine": machine, "settings": self._settings(work), "model": describe(pipe, work, choices),
            "ceilings": {**ceiling.to_dict(), "drift": drift}, "correctness": verdicts["ours"].to_dict(),
            "stages": {name: timed[name].to_dict() for name in (*STAGES, "total")},
            "efficiency": efficiency(pipe, work, timed, ceiling, self.dtype_name), "memory": memory,
            "cold_start": cold, **self._sweep(pipe, work), "peers": compared, "notes": self.notes,
        }  # fmt: skip
        validate(record)
        return record

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.say(f"note: {text}")

    # -- in processes of their own ----------------------------------------------------------------

    def _cold(self) -> dict[str, Any] | None:
        runs = self.settings.cold_runs
        if not runs:
            return None
        self.say(f"{runs} cold starts")
        settings, (width, height) = self.settings, self.settings.size or (None, None)
        task = Task(
            self.model, str(self.device), self.dtype_name, self.quantized, settings.nfe,
            batch_of(settings.prompt, 1)[0], settings.seed, width, height, torch.get_num_threads(),
            **self.beside,
        )  # fmt: skip
        results = [run_probe(task) for _ in range(runs)]
        phases = {name: [r["phases"][name] for r in results] for name in results[0]["phases"]}
        phases["total"] = [sum(r["phases"][name] for name in PHASES) for r in results]
        summary = {name: Samples(tuple(seconds)).to_dict() for name, seconds in phases.items()}
        return {"runs": runs, "phases": summary}

    # -- outputs ----------------------------------------------------------------------------------

    def _exact(self) -> tuple[Tensor, Tensor] | None:
        """Return the reference outputs in float32; None where not wanted or where they do not fit in memory."""
        if not self.settings.check:
            return None
        self.say("reference outputs in float32")
        reference: Pipeline | None = None
        try:
            reference = peers.uncompiled(*self.opened, self.device, torch.float32)
            return exact_outputs(reference, self._work(reference), self.dtype)
        except torch.OutOfMemoryError:
            self._note(f"the float32 reference does not fit in {self.device}'s memory: outputs are unchecked")
            return None
        finally:
            reference = None
            _free()

    def _load(self) -> tuple[Pipeline, tuple[Choice, ...]]:
        self.say("compiling")
        options: dict[str, Any] = {"dtype": self.dtype, "precision": self.quantized, "nfe": self.settings.nfe}
        pipe = load(self.model, device=self.device, **self.beside, **options)
        if self.settings.backend == "auto":
            return pipe, pipe.program.plan.choices
        return pipe, prefer(pipe, self.settings.backend)

    def _work(self, pipe: Pipeline) -> Workload:
        settings = self.settings
        width, height = settings.size or (None, None)
        height, width = pipe.sizes.resolve(height, width)
        return Workload(batch_of(settings.prompt, settings.batch), height, width, settings.seed, settings.nfe)

    def _contenders(self, pipe: Pipeline, work: Workload) -> dict[str, Contender]:
        """Return name -> call(output): ours, the peers, and below float32 the eager network that sets the bar."""
        found: dict[str, Contender] = {"ours": lambda output="pil": work.call(pipe, output)}
        judged = self.settings.check and self.dtype != torch.float32 and self.settings.tolerance is None
        for name in dict.fromkeys((*self.settings.peers, *(("eager",) if judged else ()))):
            self.say(f"building peer {name}")
            try:
                found[name] = peers.build(name, pipe, work)
            except (ConfigError, torch.OutOfMemoryError) as error:
                self._note(f"peer {name}: {str(error).splitlines()[0]}")
        return found

    def _verdicts(self, contenders: dict[str, Contender], exact: tuple[Tensor, Tensor] | None) -> dict[str, Verdict]:
        if exact is None:
            return dict.fromkeys(contenders, UNCHECKED)
        self.say("checking outputs")
        got = {name: outputs(call) for name, call in contenders.items()}
        eager, tolerance = got.get("eager"), self.settings.tolerance
        if self.dtype != torch.float32 and eager is None and tolerance is None:
            missing = replace(UNCHECKED, reason="the eager network that sets the bar is missing")
            return dict.fromkeys(contenders, missing)
        rule = partial(judge, dtype=self.dtype_name, eager=eager, tolerance=tolerance)
        return {name: rule(out, exact, ours=name == "ours") for name, out in got.items()}

    # -- time and memory --------------------------------------------------------------------------

    def _memory(self, pipe: Pipeline, work: Workload) -> dict[str, Any]:
        self.say("memory of each stage")
        loaded = stage_peaks(lambda: None, self.device)
        calls = {**stages(pipe, work), "total": lambda: work.call(pipe)}
        return {"loaded": loaded, "stages": {name: stage_peaks(call, self.device) for name, call in calls.items()}}

    def _time(
        self, pipe: Pipeline, work: Workload, contenders: dict[str, Contender]
    ) -> tuple[dict[str, Samples], Ceilings, float]:
        """Time stages, whole calls and peers in turns; measure ceilings before and after (the better counts).

        Returns the ratio of the later ceiling to the earlier, too: how much the machine changed meanwhile.
        """
        settings = self.settings
        asked = {f"peer {name}": contenders[name] for name in settings.peers if name in contenders}
        calls = {**stages(pipe, work), "total": contenders["ours"], **asked}
        self.say("ceilings of this machine")
        before = measure_ceilings(self.device, [self.dtype_name])
        self.say(f"{len(calls)} figures, {settings.repeats} rounds in turns")
        timed = interleave(
            calls, device=self.device, repeats=settings.repeats, warmup=settings.warmup,
            max_seconds=settings.max_seconds,
        )  # fmt: skip
        after = measure_ceilings(self.device, [self.dtype_name])
        drift = after.gemm[self.dtype_name] / before.gemm[self.dtype_name]
        if abs(drift - 1) > 0.1:
            self._note(f"not a quiet machine: matrix products after the timing ran at {drift:.2f}x the speed before")
        return timed, before.best(after), drift

    def _compare(self, timed: dict[str, Samples], verdicts: dict[str, Verdict]) -> list[dict[str, Any]]:
        """Return the peers' part of the record: a speed-up stands only where both outputs passed."""
        rows = []
        for name in self.settings.peers:
            samples, verdict = timed.get(f"peer {name}"), verdicts.get(name)
            row = {"name": name, "seconds": samples and samples.to_dict(), "correctness": verdict and verdict.to_dict()}
            rows.append({**row, **speedup(timed["total"], samples, verdicts["ours"], verdict)})
        return rows

    def _sweep(self, pipe: Pipeline, work: Workload) -> dict[str, Any]:
        settings, few = self.settings, max(3, self.settings.repeats // 2)
        self.say(f"batches of {settings.batches or 'no size'}")
        batches = sweeps.batches(pipe, work, settings.batches, few, settings.max_seconds)
        self.say(f"{settings.evaluations or 'no'} evaluations")
        evaluations = sweeps.evaluations(pipe, work, settings.evaluations, few, settings.max_seconds)
        return {"batches": batches, "evaluations": evaluations}

    def _settings(self, work: Workload) -> dict[str, Any]:
        kept = (
            "random_weights", "scale", "layers", "batch", "nfe", "backend", "seed", "repeats", "warmup", "tolerance",
        )  # fmt: skip
        return {
            "model": self.settings.name, **{name: getattr(self.settings, name) for name in kept}, "width": work.width,
            "height": work.height, "device": str(self.device), "dtype": self.dtype_name, "precision": self.quantized,
            "prompts": list(work.prompts),
        }  # fmt: skip


@contextmanager
def _float32_is_float32() -> Iterator[None]:
    """Keep cuDNN's convolutions from rounding float32 to TF32: the reference must not, nor what is held to it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
