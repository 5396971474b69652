"""A small training loop: AdamW, Muon, EMA, atomic checkpoints, exact resume."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.atomic import replacing
from .muon import Muon

Loss = Callable[[nn.Module, nn.Module, int], tuple[Tensor, dict[str, Tensor]]]  # model, EMA, step


@dataclass(frozen=True)
class TrainerConfig:
    """How long and how fast to train. steps: optimiser steps; lr: AdamW's peak rate (warm-up, then cosine to `floor`
    of it); muon: Muon's, for the matrices of repeated layers (0: AdamW for all); ema: final decay."""

    steps: int
    lr: float
    ema: float
    seed: int
    muon: float = 0.0
    floor: float = 0.05
    warmup: int = 200
    save_every: int = 250
    clip: float = 1.0


class Trainer:
    """Minimises `loss(model, ema, step)`; state lives in `folder`/state.pt, curves in `folder`/curve.csv.

    A run killed at any moment resumes from its last checkpoint bit for bit: weights, optimiser, EMA
    and the random state are saved together, by one rename.
    """

    def __init__(
        self, name: str, model: nn.Module, loss: Loss, config: TrainerConfig, folder: Path, log: Callable[[str], None]
    ) -> None:
        self.name, self.model, self.loss, self.config, self.folder, self.log = name, model, loss, config, folder, log
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizers = _optimizers(model, config)
        self.step = 0

    def run(self) -> nn.Module:
        """Train to the end (or find it done) and return the EMA model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.config.seed)
        self._resume()
        start, first = time.monotonic(), self.step
        window: dict[str, list[Tensor]] = {}
        while self.step < self.config.steps:
            parts = self._one_step()
            for key, value in parts.items():
                window.setdefault(key, []).append(value)
            if self.step % 50 == 0 or self.step == self.config.steps:
                self._report(window, start, first)
                window = {}
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self._save()
        return self.ema

    def _one_step(self) -> dict[str, Tensor]:
        loss, parts = self.loss(self.model, self.ema, self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer, peak in self.optimizers:
            optimizer.param_groups[0]["lr"] = peak * self._rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return {"loss": loss.detach(), **parts}

    def _rate(self) -> float:
        """Return the share of the peak rates that applies now."""
        c = self.config
        cosine = c.floor + (1 - c.floor) * (0.5 + 0.5 * math.cos(math.pi * self.step / c.steps))
        return min(1.0, (self.step + 1) / c.warmup) * cosine

    def _report(self, window: dict[str, list[Tensor]], start: float, first: int) -> None:
        means = {k: torch.stack(v).mean().item() for k, v in window.items()}
        pace = (time.monotonic() - start) / (self.step - first)
        text = " ".join(f"{k} {v:.4f}" for k, v in means.items())
        self.log(f"{self.name} {self.step}/{self.config.steps} {text} {pace:.3f} s/step")
        with (self.folder / "curve.csv").open("a") as f:
            f.write(f"{self.step}," + ",".join(f"{k}={v:.5f}" for k, v in means.items()) + "\n")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with replacing(self.folder / "state.pt") as partial:
            torch.save(state, partial)

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        if state.get("cuda_rng"):
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step = state["step"]
        self.log(f"{self.name} resumes at step {self.step}")


def _optimizers(model: nn.Module, config: TrainerConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return pairs (optimiser, peak rate): Muon for the matrices inside numbered layers (`layers.3.attention.to_q`),
    except modulation, which is a function of the time alone; AdamW for the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    repeated = [
        name for name, p in trained.items()
        if config.muon and p.ndim == 2 and re.search(r"(layers|refiner)\.\d+\.", name) and "adaLN" not in name
    ]  # fmt: skip
    rest = [p for name, p in trained.items() if name not in repeated]
    adam = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adam, config.lr)]
    if repeated:
        optimizers.append((Muon([trained[name] for name in repeated], config.muon), config.muon))
    return optimizers
