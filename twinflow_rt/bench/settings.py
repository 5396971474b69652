"""What one run of the bench is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import check_count
from ..errors import ConfigError
from ..options import check_fields
from . import peers


@dataclass(frozen=True)
class Settings:
    """What to measure. size: (width, height), None for the model's default. random_weights: the name of a
    published model instead of `model`, with `scale` and `layers` as `random_weights.skeleton` takes them. base, files,
    precision, dtype: as `twinflow_rt.load` takes them. backend: an implementation to prefer (`figures.prefer`).
    batches, evaluations: the sweeps; empty ones are left out. cold_runs: 0 leaves out cold starts.
    check: compare outputs with the float32 reference; without it no speed-up is stated. tolerance:
    replaces the error rule by an rms bound. max_seconds: per figure group, after which no round begins.
    """

    model: str = "demo"
    base: str | Path | None = None
    files: Sequence[str | Path] = ()
    random_weights: str | None = None
    scale: float = 1.0
    layers: int | None = None
    size: tuple[int, int] | None = None
    batch: int = 1
    nfe: int = 1
    dtype: str | None = None
    precision: str | None = None
    device: str | None = None
    backend: str = "auto"
    peers: tuple[str, ...] = ()
    prompt: str | None = None
    seed: int = 0
    repeats: int = 20
    warmup: int = 3
    batches: tuple[int, ...] = (1, 2, 4)
    evaluations: tuple[int, ...] = (1, 2, 4)
    cold_runs: int = 3
    check: bool = True
    tolerance: float | None = None
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batch", "repeats"):
            check_count(name, getattr(self, name))
        for name in self.peers:
            if name not in peers.NAMES:
                raise ConfigError(f"no peer {name!r}; use some of {', '.join(peers.NAMES)}")
        if self.peers and not self.check:
            raise ConfigError("peers are compared only where outputs are checked; drop peers or keep the check")

    @property
    def name(self) -> str:
        """The model's name, without the folders it lies in."""
        return f"random-{self.random_weights}" if self.random_weights else Path(self.model).name
