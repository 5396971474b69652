"""Whether two sets of samples differ: bootstrap intervals and the Mann-Whitney test, by scipy.stats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import extra_missing

RESAMPLES = 2000


def library() -> Any:
    """Return scipy.stats. Raises ConfigError naming the extra to install where there is none."""
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise extra_missing(f"comparing samples needs {error.name}", "report") from None
    return stats


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, paired: bool = False, level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Return the bootstrap percentile interval of median(numerator) / median(denominator).

    paired: sample k of both was taken in the same round, so rounds are resampled together and what slowed a whole
    round cancels. Raises ValueError where paired samples are not equally many. One sample has no spread: the
    interval is the ratio itself.
    """
    if paired and len(numerator) != len(denominator):
        raise ValueError(f"paired samples must be equally many; got {len(numerator)} and {len(denominator)}")
    if min(len(numerator), len(denominator)) < 2:
        return (float(_ratio(numerator, denominator)),) * 2
    low, high = library().bootstrap(
        (numerator, denominator), _ratio, paired=paired, vectorized=True, n_resamples=RESAMPLES,
        confidence_level=level, method="percentile", random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(low), float(high)


def _ratio(numerator: Any, denominator: Any, axis: int = -1) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.median(numerator, axis) / np.median(denominator, axis)
    return ratio


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided p-value of samples of `a` being neither larger nor smaller than those of `b`.

    By the normal approximation, corrected for ties and continuity: good from about 8 samples each.
    """
    if len({*a, *b}) == 1:
        return 1.0  # the approximation's variance is 0
    return float(library().mannwhitneyu(a, b, method="asymptotic").pvalue)
