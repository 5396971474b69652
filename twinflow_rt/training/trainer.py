"""A small training loop: AdamW, EMA, atomic checkpoints, exact resume."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, nn.Module, int], tuple[Tensor, dict[str, Tensor]]]  # model, EMA, step


@dataclass(frozen=True)
class TrainerConfig:
    """steps: optimiser steps; lr: peak rate (warm-up, then cosine to a twentieth); ema: final decay."""

    steps: int
    lr: float
    ema: float
    seed: int
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
        trained = [p for p in model.parameters() if p.requires_grad]
        # AdamW, not Muon: torch's Muon iterates in bfloat16, 100 times slower than float32 on such CPUs
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0

    def run(self) -> nn.Module:
        """Trains to the end (or finds it done) and returns the EMA model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.config.seed)
        self._resume()
        start, first, window = time.monotonic(), self.step, {}
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
        rate = self._rate()
        loss, parts = self.loss(self.model, self.ema, self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return {"loss": loss.detach(), **parts}

    def _rate(self) -> float:
        c = self.config
        cosine = 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * self.step / c.steps))
        return c.lr * min(1.0, (self.step + 1) / c.warmup) * cosine

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
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        partial = self.folder / "state.tmp"
        torch.save(state, partial)
        partial.replace(self.folder / "state.pt")

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state.get("cuda_rng"):
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step = state["step"]
        self.log(f"{self.name} resumes at step {self.step}")
