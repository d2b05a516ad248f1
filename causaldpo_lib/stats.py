"""Uncertainty: hierarchical bootstrap over seeds and users, paired differences, equivalence, Holm's correction.

One resample draws S seeds from the S trained models and U users from the U test users, both with replacement,
each user with all of their examples, and recomputes the statistic: the independent unit is the user, not an
example. Resampling works through counts (how often a user was drawn) on per-user sums, which equals copying
rows and is much faster.

Percentiles of such resamples are far too narrow for three seeds: resampling S seeds shows (S - 1) / S of the
variance between seeds, and knows nothing of how uncertain a variance from three values is. Where seeds vary
ten times as much as the users' standard error, nominal 95 % covered 74 %. Intervals here are therefore

    mean +- t_nu sqrt(V),   V = V_boot + V_seed / S,   nu = V^2 / (V_seed^2 / (S - 1) + (V - V_seed)^2 / (U - 1)),

V_boot the variance of the resamples, V_seed = s^2 / S with s^2 the variance of the seeds' means, and nu
Satterthwaite's degrees of freedom: close to the bootstrap where users dominate, to Student's t over the seeds
where seeds do. In the same simulations they cover at least 90 %. More seeds, not more resamples, make them shorter.

A slope over ordered groups (G1 ... G5, T1 ... T5) is a weighted sum of the groups' means. Its resamples draw users
once for all groups, since a user has examples in several, and it is judged by the same formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from scipy.stats import t as student

FloatArray = NDArray[np.float64]
LEVEL = 0.95  # of every interval in this study
RESAMPLES = 2000
BLOCK = 1 << 18  # counts that are floats at a time: 2 MB


class Interval(NamedTuple):
    """A mean with its 95 % interval, in the values' own unit."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference with its 95 % interval and two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


@lru_cache(maxsize=8)
def draw_counts(size: int, resamples: int, seed: int) -> NDArray[np.unsignedinteger]:
    """How often each of ``size`` units occurs among ``size`` draws with replacement: (resamples, size).

    Multinomial counts with equal probabilities; rows sum to ``size``. The same arguments give the same draws,
    so methods compared on the same users share their resamples. As small integers, an eighth of what floats take: the
    tables of several sizes are kept, each of 40 MB for 2000 resamples of 20,000 users.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, size]))
    counts = np.empty((resamples, size), dtype=np.uint8)
    for index in range(resamples):
        row = np.bincount(rng.integers(0, size, size), minlength=size)
        # Among thousands of units one is drawn some ten times, but nothing forbids more than a byte holds.
        counts = counts.astype(np.promote_types(counts.dtype, np.min_scalar_type(row.max())), copy=False)
        counts[index] = row
    counts.setflags(write=False)  # shared through the cache
    return counts


def resampled_means(sums: FloatArray, sizes: FloatArray, seed_counts: ArrayLike, user_counts: ArrayLike) -> FloatArray:
    """The mean under given draws: over drawn seeds, of the mean over all examples of the drawn users.

    Shapes:  per-user sums (S, U) and numbers of examples (U,); seed_counts (R, S); user_counts (R, U). Returns (R,).
    Checked: tests/test_stats.py, against loops over copied rows.
    """
    counts = np.asarray(user_counts)
    # BLAS takes a few rows at a time and rounds what is left over otherwise: by 64, blocks give what the whole would.
    step = max(64, BLOCK // counts.shape[1] // 64 * 64)
    per_seed, floats = np.empty((len(counts), len(sums))), np.empty((min(step, len(counts)), counts.shape[1]))
    for start in range(0, len(counts), step):
        part = counts[start : start + step]
        block = floats[: len(part)]
        block[:] = part
        per_seed[start : start + step] = (block @ sums.T) / (block @ sizes)[:, None]
    return (seed_counts * per_seed).sum(axis=1) / seed_counts.sum(axis=1)


class _Estimate(NamedTuple):
    mean: float
    error: float  # standard error
    freedom: float  # degrees of freedom; 0 where nothing tells how far the mean could be off


def _checked(values: ArrayLike, users: ArrayLike) -> tuple[FloatArray, NDArray[np.int64]]:
    """values as a table (S, N) of seeds x examples, and each example's user as a number 0 ... U-1."""
    table, ids = np.atleast_2d(np.asarray(values, dtype=np.float64)), np.asarray(users)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"values must be a non-empty table of seeds x examples, got shape {table.shape}")
    if ids.shape != table.shape[1:]:
        raise ValueError(f"{table.shape[1]} examples but users of shape {ids.shape}")
    if np.isnan(table).any():
        raise ValueError("values contain NaN")
    return table, np.unique(ids, return_inverse=True)[1]


def _estimate(table: FloatArray, user: NDArray[np.int64], resamples: int, seed: int) -> _Estimate:
    """The mean of values (S, N), its standard error and degrees of freedom: the formulas in the module's docstring."""
    return _contrast(table, user, np.zeros(table.shape[1], dtype=np.int64), np.ones(1), resamples, seed)


def _contrast(
    table: FloatArray,
    user: NDArray[np.int64],
    group: NDArray[np.int64],
    weights: FloatArray,
    resamples: int,
    seed: int,
) -> _Estimate:
    """The same of sum_g weights_g mean_g, mean_g over the examples of group g; every group has examples."""
    seeds, count = len(table), int(user.max()) + 1
    seed_counts = draw_counts(seeds, resamples, seed + 1)  # its own stream, in case S = U
    user_counts = draw_counts(count, resamples, seed)
    per_seed, resampled, freedom = np.zeros(seeds), np.zeros(resamples), count
    for index, weight in enumerate(weights):
        chosen = group == index
        sizes = np.bincount(user[chosen], minlength=count).astype(float)
        sums = np.stack([np.bincount(user[chosen], weights=row[chosen], minlength=count) for row in table])
        per_seed += weight * table[:, chosen].mean(axis=1)
        with np.errstate(invalid="ignore"):  # a resample without any user of a small group has no mean there
            resampled += weight * resampled_means(sums, sizes, seed_counts, user_counts)
        freedom = min(freedom, int((sizes > 0).sum()))
    within = float(resampled[np.isfinite(resampled)].var())
    between = float(per_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    total = within + between / seeds
    rest = max(total - between, 0.0)
    doubt = (between**2 / (seeds - 1) if seeds > 1 else 0.0) + (rest**2 / (freedom - 1) if freedom > 1 else 0.0)
    mean = float(per_seed.mean())
    if freedom <= 1 and np.ptp(per_seed) == 0:
        # One user, and one seed or several that agree to the last digit: no spread was observed, not a spread of 0.
        return _Estimate(mean, total**0.5, 0)
    return _Estimate(mean, total**0.5, total**2 / doubt if doubt else np.inf)


def _reach(found: _Estimate) -> float:
    if found.freedom == 0:
        return np.nan
    return float(student.ppf((1 + LEVEL) / 2, found.freedom) * found.error)


def _two_sided(found: _Estimate) -> float:
    if found.freedom == 0:
        return 1.0
    if found.error == 0:
        return float(found.mean == 0)
    return float(2 * student.sf(abs(found.mean) / found.error, found.freedom))


def interval(values: ArrayLike, users: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over seeds and examples, with a 95 % interval for other seeds and other users.

    With one seed only users are resampled, and the interval says nothing about training noise. With one user besides
    there is no interval: low and high are NaN. The interval is cut at the smallest and the largest value, so that a
    share stays between 0 and 1.

    Shapes:  values (S, N) seeds x examples, or (N,) for one seed; users (N,) ids, one per example.
    Raises:  ValueError on NaN, no example, or mismatched lengths.
    Checked: tests/test_stats.py, by coverage on simulated data and by row-copying loops.
    """
    table, user = _checked(values, users)
    found = _estimate(table, user, resamples, seed)
    ends = np.clip([found.mean - _reach(found), found.mean + _reach(found)], table.min(), table.max())
    return Interval(found.mean, *ends.tolist())


def _difference_of(found: _Estimate) -> Difference:
    """With its interval, which is cut nowhere: it leaves 0 out exactly where p is below 0.05."""
    return Difference(found.mean, found.mean - _reach(found), found.mean + _reach(found), _two_sided(found))


def seed_interval(values: ArrayLike) -> Interval:
    """Mean over training seeds with a 95 % Student interval; for what a set of lists has as a whole, such as coverage.

    Resampling users would be wrong there: a resample repeats lists, so that it shows fewer different items than the
    data do. With one seed there is no interval: low and high are NaN.

    Shapes:  values (S,).
    Raises:  ValueError on NaN or no value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or np.isnan(numbers).any():
        raise ValueError("values must be one number per seed, without NaN")
    if numbers.size == 1:
        return Interval(float(numbers[0]), np.nan, np.nan)
    found = _Estimate(float(numbers.mean()), float(numbers.std(ddof=1)) / numbers.size**0.5, numbers.size - 1)
    return Interval(found.mean, found.mean - _reach(found), found.mean + _reach(found))


def paired(
    values: ArrayLike, baseline: ArrayLike, users: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Mean of (values - baseline), paired by seed and example, with interval and two-sided p-value.

    p = 2 P(T_nu >= |mean| / sqrt(V)), which is below 0.05 exactly where the interval leaves 0 out. So the interval is
    not cut at the largest differences observed. With one seed and one user there is none, low and high are NaN, and p
    is 1.

    Shapes:  values, baseline (S, N) with the same seeds and examples in the same order; users (N,).
    Raises:  ValueError if the shapes differ, and as in ``interval``.
    """
    difference, user = _checked(_difference(values, baseline), users)
    return _difference_of(_estimate(difference, user, resamples, seed))


def _difference(values: ArrayLike, baseline: ArrayLike) -> FloatArray:
    left, right = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"not paired: shapes {left.shape} and {right.shape} differ")
    return left - right


def slope(
    values: ArrayLike, positions: ArrayLike, users: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """The least-squares slope of the groups' means against their position, its 95 % interval, and p for no slope.

        slope = sum_g (g - mean g) mean_g / sum_g (g - mean g)^2,   over the positions g that have examples

    Every group counts once, however many examples it has: the slope is that of the drawn curve. The slope of
    ``values - baseline`` is the paired difference of two slopes. With one seed and a group of one user there is no
    interval, as in ``paired``.

    Shapes:  values (S, N) or (N,); positions (N,) whole numbers, such as 0 for G1 ... 4 for G5; users (N,).
             The unit is the values' per step.
    Raises:  ValueError if fewer than two positions have examples, and as in ``interval``.
    Checked: tests/test_stats.py, against numpy.polyfit, by coverage, and against copied rows.
    """
    table, user = _checked(values, users)
    present, group = np.unique(np.asarray(positions), return_inverse=True)
    if group.shape != user.shape or len(present) < 2:
        raise ValueError(f"a slope needs a position for each example, and two at least: {len(present)} found")
    centred = present - present.mean()
    return _difference_of(_contrast(table, user, group, centred / (centred @ centred), resamples, seed))


def equivalence(
    values: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    users: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """p of two one-sided tests that the mean of ``values`` lies between those of ``lower`` and ``upper``.

    The larger p of mean(values - lower) <= 0 and of mean(values - upper) >= 0: small only where both are refuted.
    With lower = (1 - m) baseline and upper = (1 + m) baseline the ratio of the means is tested against 1 +- m, and
    the uncertainty of the baseline is in it. With one seed and one user nothing is refuted: 1.

    Source:  Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987; for the ratio Sasabuchi, Biometrika 67, 1980.
    Shapes:  values, lower, upper (S, N), paired by seed and example; users (N,).
    Raises:  ValueError as in ``paired``.
    Checked: tests/test_stats.py, by its error rate at the margin, and against the interval.
    """
    tests = []
    for left, right in ((values, lower), (upper, values)):
        found = _estimate(*_checked(_difference(left, right), users), resamples, seed)
        if found.freedom == 0:
            tests.append(1.0)
        elif found.error == 0:
            tests.append(float(found.mean <= 0))
        else:
            tests.append(float(student.sf(found.mean / found.error, found.freedom)))
    return max(tests)


def outcome(p: float, p_equivalent: float, level: float = 1 - LEVEL) -> str:
    """``equivalent``, ``different`` or ``undecided``, from the (corrected) p-values of both questions.

    A difference that is detected and yet shown to be smaller than the margin is ``equivalent``: the margin was chosen
    as the size below which a difference does not matter.
    """
    if p_equivalent <= level:
        return "equivalent"
    return "different" if p <= level else "undecided"


def mcnemar(hits: ArrayLike, baseline: ArrayLike) -> float:
    """Exact two-sided p of: the one alone hits as many examples as the other alone. A check beside ``paired``.

    It takes examples for independent and seeds as given, so it is no substitute. Several seeds share their examples;
    twice the median of their p-values holds under any dependence between them.

    Source:  McNemar, Psychometrika 12, 1947, exact binomial form; Vovk and Wang, Biometrika 107, 2020, for the median.
    Shapes:  hits, baseline (S, N) or (N,), 0 or 1.
    Raises:  ValueError if the shapes differ or a value is neither 0 nor 1.
    Checked: tests/test_stats.py, against a hand value and enumeration.
    """
    difference = np.atleast_2d(_difference(hits, baseline))
    if not np.isin(np.asarray(hits, dtype=np.float64), (0, 1)).all() or not np.isin(difference, (-1, 0, 1)).all():
        raise ValueError("hits are 0 or 1")
    p = [
        float(binomtest(int((row > 0).sum()), int((row != 0).sum())).pvalue) if row.any() else 1.0 for row in difference
    ]
    return p[0] if len(p) == 1 else min(1.0, 2 * float(np.median(p)))


def one_hit(examples: int) -> float:
    """By how much one hit more changes a hit rate over ``examples`` examples: a fraction."""
    if examples < 1:
        raise ValueError(f"a hit rate needs an example, got {examples}")
    return 1.0 / examples


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


def with_holm(rows: Sequence[Mapping[str, Any]], family: str = "baseline") -> list[dict[str, Any]]:
    """Copies of rows of tests with ``p_holm`` and, of those with equivalence tests, ``p_equivalent_holm``.

    Rows that are alike in ``family`` are one family of Holm's; all or none of them have a ``p_equivalent``.

    Raises:  ValueError as ``holm``.
    """
    found = [dict(row) for row in rows]
    for name in dict.fromkeys(row[family] for row in found):
        members = [row for row in found if row[family] == name]
        for p in ("p", "p_equivalent"):
            if p in members[0]:
                for row, adjusted in zip(members, holm([row[p] for row in members]), strict=True):
                    row[f"{p}_holm"] = adjusted
    return found
