"""Whether two sets of samples differ: bootstrap intervals and the Mann-Whitney test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, paired: bool = False, level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Bootstrap percentile interval of median(numerator) / median(denominator).

    paired: sample k of both was taken in the same round, so rounds are resampled together and what
    slowed a whole round cancels. Needs equally many samples then.
    """
    rng = np.random.default_rng(seed)
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if paired and len(top) != len(bottom):
        raise ValueError(f"paired samples must be equally many; got {len(top)} and {len(bottom)}")
    rows = rng.integers(len(top), size=(RESAMPLES, len(top)))
    columns = rows if paired else rng.integers(len(bottom), size=(RESAMPLES, len(bottom)))
    ratios = np.median(top[rows], axis=1) / np.median(bottom[columns], axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that samples of `a` are neither larger nor smaller than those of `b`.

    Normal approximation with correction for ties and continuity: good from about 8 samples each.
    """
    n, m = len(a), len(b)
    values = np.concatenate([np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank
    u = ranks[:n].sum() - n * (n + 1) / 2
    total = n + m
    ties = float((counts**3 - counts).sum())
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))
