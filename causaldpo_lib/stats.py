"""Uncertainty: hierarchical bootstrap over training seeds and users, paired differences, Holm's correction.

One resample draws S seeds from the S trained models and U users from the U test users, both with replacement,
each user with all of their examples, and recomputes the statistic: the independent unit is the user, not an
example. Resampling works through counts (how often a user was drawn) on per-user sums, which equals copying
rows and is much faster.

With few seeds the interval is slightly too narrow: resampling S seeds shows (S-1)/S of the true variance
between seeds (two thirds at S = 3), and no resample can show a seed that was never trained. More seeds, not
more resamples, are the remedy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
LEVEL = 0.95  # of every interval in this study
RESAMPLES = 2000


class Interval(NamedTuple):
    """A statistic with its percentile bootstrap interval, in the statistic's own unit."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference with its percentile bootstrap interval and two-sided bootstrap p-value."""

    mean: float
    low: float
    high: float
    p: float


@lru_cache(maxsize=8)
def draw_counts(size: int, resamples: int, seed: int) -> FloatArray:
    """How often each of ``size`` units occurs among ``size`` draws with replacement: (resamples, size).

    Multinomial counts with equal probabilities; rows sum to ``size``. The same arguments give the same draws,
    so methods compared on the same users share their resamples.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, size]))
    counts = np.empty((resamples, size))
    for row in counts:
        row[:] = np.bincount(rng.integers(0, size, size), minlength=size)
    counts.setflags(write=False)  # shared through the cache
    return counts


def weighted_ratio(
    numerators: FloatArray, denominators: FloatArray, seed_counts: FloatArray, user_counts: FloatArray
) -> FloatArray:
    """The statistic under given draws: mean over drawn seeds of (sum of a) / (sum of b) over the drawn users.

    Shapes:  per-user sums numerators a, denominators b (S, U); seed_counts (R, S); user_counts (R, U).
             Returns (R,).
    Checked: tests/test_stats.py, against loops over copied rows.
    """
    per_seed = (user_counts @ numerators.T) / (user_counts @ denominators.T)
    return (seed_counts * per_seed).sum(axis=1) / seed_counts.sum(axis=1)


def ratio_resamples(
    numerators: ArrayLike,
    denominators: ArrayLike,
    users: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, FloatArray]:
    """A ratio of sums, averaged over seeds, on the data and on bootstrap resamples of seeds and users.

    Shapes:  numerators (S, N) seeds x examples; denominators (S, N) or (N,), not negative; users (N,) ids.
             Returns the statistic and its (resamples,) replicates.
    Raises:  ValueError on NaN, wrong shapes, no example, or a user whose denominators sum to 0.
    """
    top = np.atleast_2d(np.asarray(numerators, dtype=np.float64))
    bottom = np.broadcast_to(np.asarray(denominators, dtype=np.float64), top.shape)
    ids = np.asarray(users)
    if top.ndim != 2 or top.size == 0:
        raise ValueError(f"values must be a non-empty table of seeds x examples, got shape {top.shape}")
    if ids.shape != top.shape[1:]:
        raise ValueError(f"{top.shape[1]} examples but users of shape {ids.shape}")
    if np.isnan(top).any() or np.isnan(bottom).any():
        raise ValueError("values contain NaN")
    _, position = np.unique(ids, return_inverse=True)
    sums = _sums_by_user(top, position)
    weights = _sums_by_user(bottom, position)
    if (weights <= 0).any():
        raise ValueError("every user needs a positive denominator: leave users without one out")
    seed_counts = draw_counts(len(sums), resamples, seed + 1)  # its own stream, in case S = U
    user_counts = draw_counts(sums.shape[1], resamples, seed)
    statistic = float((sums.sum(axis=1) / weights.sum(axis=1)).mean())
    return statistic, weighted_ratio(sums, weights, seed_counts, user_counts)


def _sums_by_user(values: FloatArray, position: NDArray[np.intp]) -> FloatArray:
    size = int(position.max()) + 1
    return np.stack([np.bincount(position, weights=row, minlength=size) for row in values])


def _percentiles(replicates: FloatArray) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def interval(values: ArrayLike, users: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over seeds and examples, with a 95 % percentile interval from resampling seeds and users together.

    With one seed only users are resampled, and the interval says nothing about training noise.

    Shapes:  values (S, N) seeds x examples, or (N,) for one seed; users (N,) ids, one per example.
    Raises:  ValueError on NaN, no example, or mismatched lengths.
    Checked: tests/test_stats.py, by coverage on simulated data and by row-copying loops.
    """
    statistic, replicates = ratio_resamples(values, 1.0, users, resamples, seed)
    return Interval(statistic, *_percentiles(replicates))


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    users: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """As ``interval`` for a ratio of sums whose parts both vary, e.g. slots taken by a group / slots shown.

    Shapes:  numerators (S, N); denominators (S, N) or (N,); users (N,).
    Raises:  ValueError as in ``ratio_resamples``.
    """
    statistic, replicates = ratio_resamples(numerators, denominators, users, resamples, seed)
    return Interval(statistic, *_percentiles(replicates))


def paired(
    values: ArrayLike, baseline: ArrayLike, users: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Mean of (values - baseline), paired by seed and example, with interval and two-sided bootstrap p-value.

        p = min(1, 2 min(#{d* <= 0} + 1, #{d* >= 0} + 1) / (R + 1))

    over the R replicates d* of the difference: never 0, and it agrees with the percentile interval (p < 0.05
    where the interval leaves 0 out, up to the resolution of R).

    Shapes:  values, baseline (S, N) with the same seeds and examples in the same order; users (N,).
    Raises:  ValueError if the shapes differ, and as in ``interval``.
    """
    left, right = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"not paired: shapes {left.shape} and {right.shape} differ")
    statistic, replicates = ratio_resamples(left - right, 1.0, users, resamples, seed)
    below, above = int((replicates <= 0).sum()), int((replicates >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (len(replicates) + 1))
    return Difference(statistic, *_percentiles(replicates), p)


def holm(p: ArrayLike) -> FloatArray:
    """Holm's step-down adjusted p-values of one family of m tests, in the given order.

        p_holm(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),   p_(1) <= ... <= p_(m)

    Source:  Holm, Scand. J. Statist. 6, 1979: controls the family-wise error under any dependence.
    Shapes:  p (m,) -> (m,).
    Raises:  ValueError if a value is NaN or outside 0...1.
    Checked: tests/test_stats.py, against hand values.
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values must be a list of numbers between 0 and 1")
    order = np.argsort(values, kind="stable")
    stepped = np.minimum(1.0, values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted
