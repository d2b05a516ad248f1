"""Ranking metrics: how far down the target is, how good the list is under intervention, whom it shows.

Ranks are 0-based (0 = top of the list). A miss is any rank >= k, so the rank that a truncated list gives an
absent target (its own length, or infinity) needs no special value. Fractional ranks (average ranks of exact
ties) are allowed. What is a mean over examples has a function per example beside it (``hits``, ``gains``,
``reciprocals``, ``popularity_lifts`` ...), from which intervals are made; what only a whole set of lists has
(``or_ratio``, ``div_ratio``, ``coverage``, ``gini``) is one number.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, xlogy

FloatArray = NDArray[np.float64]


def _cutoff(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be a whole number >= 1, got {k!r}")
    return int(k)


def _ranks(ranks: ArrayLike) -> FloatArray:
    array = np.asarray(ranks, dtype=np.float64)
    if np.isnan(array).any():
        raise ValueError("ranks contain NaN: give a missing target a rank >= k instead")
    if (array < 0).any():
        raise ValueError("ranks are 0-based, never negative: give a missing target a rank >= k instead")
    return array


def discounts(k: int) -> FloatArray:
    """The logarithmic position weights 1 / log2(r + 2) for r = 0 ... k-1: 1, 0.6309, 0.5, ...

    Source: Jarvelin and Kekalainen, ACM TOIS 20(4), 2002; base-2 logarithms, first position undiscounted.
    """
    return 1.0 / np.log2(np.arange(_cutoff(k), dtype=np.float64) + 2.0)


def hits(ranks: ArrayLike, k: int) -> FloatArray:
    """Per example: 1 if its target is among the first k, else 0. Same shape as ``ranks``.

    Raises:
        ValueError: a rank is NaN or negative, or k is not a whole number >= 1.
    """
    return (_ranks(ranks) < _cutoff(k)).astype(np.float64)


def gains(ranks: ArrayLike, k: int) -> FloatArray:
    """Per example: 1 / log2(rank + 2) if its target is among the first k, else 0. Same shape as ``ranks``.

    With a single relevant item the ideal discounted gain is 1, so this is the example's NDCG@k.

    Raises:
        ValueError: a rank is NaN or negative, or k is not a whole number >= 1.
    """
    array = _ranks(ranks)
    return np.where(array < _cutoff(k), 1.0 / np.log2(array + 2.0), 0.0)


def reciprocals(ranks: ArrayLike, k: int) -> FloatArray:
    """Per example: 1 / (rank + 1) if its target is among the first k, else 0. Same shape as ``ranks``.

    Raises:
        ValueError: a rank is NaN or negative, or k is not a whole number >= 1.
    """
    array = _ranks(ranks)
    return np.where(array < _cutoff(k), 1.0 / (array + 1.0), 0.0)


def hit_rate_at_k(ranks: ArrayLike, k: int) -> float:
    """HR@k = (1/N) sum_u 1[rank_u < k], a fraction over all N examples, unranked targets included.

    Shapes:  ranks: any shape, N = its size.
    Raises:  ValueError as in ``hits``, or if there is no example.
    Checked: tests/test_metrics.py, against hand values and a loop.
    """
    return _mean(hits(ranks, k))


def ndcg_at_k(ranks: ArrayLike, k: int) -> float:
    """NDCG@k = (1/N) sum_u 1[rank_u < k] / log2(rank_u + 2), a fraction; one relevant item each.

    HR@k / log2(k + 1) <= NDCG@k <= HR@k always holds.

    Shapes:  ranks: any shape, N = its size.
    Raises:  ValueError as in ``gains``, or if there is no example.
    Checked: tests/test_metrics.py, against a loop and hand values (ranks 0, 1, 4, 9 give 1, .630930,
             .386853, .289065).
    """
    return _mean(gains(ranks, k))


def mrr_at_k(ranks: ArrayLike, k: int) -> float:
    """MRR@k = (1/N) sum_u 1[rank_u < k] / (rank_u + 1), a fraction; MRR@k <= NDCG@k <= HR@k.

    Shapes:  ranks: any shape, N = its size.
    Raises:  ValueError as in ``reciprocals``, or if there is no example.
    Checked: tests/test_metrics.py, against a loop; HR, NDCG and MRR against ranx to 1e-9.
    """
    return _mean(reciprocals(ranks, k))


def list_ndcg(labels: ArrayLike, k: int) -> FloatArray:
    """Per list: NDCG@k of many relevant items, sum_{i<=k} (2^{y_i} - 1) / log2(i + 1) over its value in the best order.

    Source: Jarvelin and Kekalainen, ACM TOIS 20(4), 2002, with the exponential gain of Burges et al., ICML 2005.
    Shapes:  labels: (..., n), the labels y of lists in ranked order, best first, 0 where padded; result (...,). A list
             shorter than k is taken as it is. NaN for a list without a positive, which has no best order.
    Raises:  ValueError if a label is NaN or negative, or k is not a whole number >= 1.
    Checked: tests/test_metrics.py, against hand values and scikit-learn; tests/test_metrics_ranx.py, against ranx.
    """
    found = np.exp2(_labels(labels)) - 1.0
    weights = discounts(k)[: found.shape[-1]]
    ideal = np.flip(np.sort(found, axis=-1), axis=-1)
    value, best = (each[..., : len(weights)] @ weights for each in (found, ideal))
    return np.divide(value, best, out=np.full_like(best, np.nan), where=best > 0)


def list_average_precision(labels: ArrayLike, k: int) -> FloatArray:
    """Per list: AP@k = sum_{i<=k} y_i Prec@i / min(k, sum y) over labels 0 and 1; its mean over lists is MAP@k.

    Shapes:  labels: (..., n) in ranked order, 0 where padded; result (...,), NaN for a list without a positive. Some
             libraries divide by sum y whatever k, with which a short list of hits never reaches 1.
    Raises:  ValueError if a label is neither 0 nor 1, or k is not a whole number >= 1.
    Checked: tests/test_metrics.py, against hand values and a loop; tests/test_metrics_ranx.py, against ranx.
    """
    array, first = _labels(labels), _cutoff(k)
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError("average precision needs labels 0 and 1: threshold graded labels first")
    positives = np.minimum(array.sum(axis=-1), first)
    array = array[..., :first]
    precisions = np.cumsum(array, axis=-1) / np.arange(1, array.shape[-1] + 1)
    value = (array * precisions).sum(axis=-1)
    return np.divide(value, positives, out=np.full_like(positives, np.nan), where=positives > 0)


def _labels(labels: ArrayLike) -> FloatArray:
    array = np.asarray(labels, dtype=np.float64)
    if array.ndim == 0 or not (array >= 0).all():
        raise ValueError("labels are lists of numbers >= 0: give padded places the label 0")
    return array


def _mean(values: FloatArray) -> float:
    if values.size == 0:
        raise ValueError("no example to average over")
    return float(values.mean())


def causal_gains(recommended_preferences: ArrayLike, ideal_preferences: ArrayLike, k: int) -> FloatArray:
    """Per example (N,): NDCG@k with the interventional preference as gain; see ``causal_ndcg_at_k``."""
    k = _cutoff(k)
    recommended = _preferences(recommended_preferences, "recommended_preferences")[:, :k]
    everything = _preferences(ideal_preferences, "ideal_preferences")
    if len(recommended) != len(everything):
        raise ValueError(f"{len(recommended)} recommended lists but {len(everything)} ideal lists")
    ideal = -np.sort(-everything, axis=1)[:, :k]
    best = ideal @ discounts(k)[: ideal.shape[1]]
    if (best <= 0).any():
        raise ValueError("an example has no positive preference: its ideal gain is 0 and NDCG is undefined")
    return (recommended @ discounts(k)[: recommended.shape[1]]) / best


def causal_ndcg_at_k(recommended_preferences: ArrayLike, ideal_preferences: ArrayLike, k: int) -> float:
    """How much interventional preference the first k recommendations collect, as a fraction of the best.

        causal NDCG@k = (1/N) sum_u [ sum_{r<k} p(i_{u,r} | do(history), u) / log2(r + 2) ]
                                   / [ sum_{r<k} p_(r)(u)                  / log2(r + 2) ]

    averaged over examples u. i_{u,r} is the item recommended at position r, and p_(0) >= p_(1) >= ... are the
    user's preferences in descending order. The gain is graded and needs no observed target, so a confounded
    target cannot reward a confounded list; it exists only where p(item | do(history), user) is known, i.e. on
    simulated data.

    Shapes:  recommended_preferences (N, >= k) in list order (empty positions of shorter lists gain 0);
             ideal_preferences (N, >= k), the preferences of all recommendable items, in any order.
    Raises:  ValueError if a preference is NaN or negative, a user prefers nothing, or the lengths N differ.
    Checked: tests/test_metrics.py, against a loop; the ideal order gives exactly 1.
    """
    return _mean(causal_gains(recommended_preferences, ideal_preferences, k))


def _preferences(preferences: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(preferences, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} must be a table of examples x positions, got shape {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} must be finite and not negative")
    return array


def interventional_kl(logps: ArrayLike, preferences: ArrayLike, renormalise: bool = True) -> FloatArray:
    """Per example (N,): Eq. 3's error in nats with the interventional preference as the truth.

        KL(p || M) = sum_i p(i | do(history), u) [ log p(i | do(history), u) - log M(i | history) ]

    A language model spends probability on texts outside the catalogue. Renormalised over the catalogue, the
    error says how the titles are weighed against each other; without, it is larger by -log of the mass that
    the catalogue has. The paper's Eq. 3 averages over test environments E'; ``preferences`` may be p(i | x, e').

    Shapes:  logps (N, V) natural-log probabilities of every item; preferences (N, V), not negative, rescaled
             to sum 1 per example.
    Raises:  ValueError if the shapes differ, a log-probability is NaN or +inf, no item of an example is
             possible, or an example prefers nothing.
    Checked: tests/test_metrics.py, against scipy.stats.entropy; 0 for M = p, the mass identity.
    """
    truth = _preferences(preferences, "preferences")
    scores = np.asarray(logps, dtype=np.float64)
    if scores.shape != truth.shape:
        raise ValueError(f"log-probabilities of shape {scores.shape} but preferences of shape {truth.shape}")
    if np.isnan(scores).any() or (scores == np.inf).any() or np.isneginf(scores).all(axis=1).any():
        raise ValueError("log-probabilities must not be NaN or +inf, nor -inf for the whole catalogue")
    total = truth.sum(axis=1, keepdims=True)
    if (total <= 0).any():
        raise ValueError("an example has no positive preference: its error is undefined")
    truth = truth / total
    mass = logsumexp(scores, axis=1) if renormalise else np.zeros(len(scores))
    # 0 log 0 = 0, on both sides: an item that nobody prefers costs nothing, whatever the model gives it.
    cross = np.where(truth > 0, truth * np.where(truth > 0, scores, 0.0), 0.0).sum(axis=1) - mass
    return xlogy(truth, truth).sum(axis=1) - cross


def group_slots(items: ArrayLike, groups: Mapping[Hashable, str], k: int) -> dict[str, FloatArray]:
    """Per group and example: the fraction of the example's first k recommendations that belong to the group.

    Shapes:  items (N, >= k) item ids in list order; groups maps every id to a group name. Returns one (N,)
             array per group name in sorted order; the arrays sum to 1 at every example.
    Raises:  ValueError if a list is shorter than k or holds an item without a group.
    """
    known, slot = np.unique(_top(items, k), return_inverse=True)
    missing = [item for item in known.tolist() if item not in groups]
    if missing:
        raise ValueError(f"{len(missing)} recommended items have no group, the first is {missing[0]!r}")
    group_of = np.array([groups[item] for item in known.tolist()], dtype=object)[slot].reshape(-1, k)
    return {name: (group_of == name).mean(axis=1) for name in sorted(set(groups.values()))}


def gini(counts: ArrayLike) -> float:
    """Gini coefficient of the items' recommendation counts: 0 = all equal, (n-1)/n = one item has all.

        G = sum_i (2 i - n - 1) c_(i) / (n sum_i c_i),   c_(1) <= ... <= c_(n)

    Shapes:  counts (n,), one entry per catalogue item, never-recommended items included as 0.
    Raises:  ValueError if counts are empty, negative, not finite, or all 0.
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64).ravel())
    if ordered.size == 0 or not np.isfinite(ordered).all() or ordered[0] < 0 or ordered[-1] == 0:
        raise ValueError("counts must be finite, not negative, and not all 0")
    n = ordered.size
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def _top(items: ArrayLike, k: int) -> NDArray:
    array = np.asarray(items)
    if array.ndim != 2 or array.shape[1] < _cutoff(k) or array.size == 0:
        raise ValueError(f"items must hold at least k = {k} recommendations each, got shape {array.shape}")
    return array[:, :k]


def or_ratio(items: ArrayLike, k: int, top: int = 3) -> float:
    """ORRatio@k: the share of all k N recommendation slots that the ``top`` most-recommended items take.

    Each k is counted from scratch. (The published evaluator keeps its counter from k = 10 when it goes on to
    k = 20, which halves the second number.)

    Source:  SPRec's evaluator, top = 3.
    Shapes:  items (N, >= k) item ids in list order.
    Raises:  ValueError if there is no list, or one is shorter than k.
    Checked: tests/test_metrics.py, against a loop and hand values.
    """
    _, counts = np.unique(_top(items, k), return_counts=True)
    return float(np.sort(counts)[-top:].sum() / counts.sum())


def div_ratio(items: ArrayLike, k: int) -> float:
    """DivRatio@k: different items among all k N slots, divided by the number of slots.

    It falls as N grows, since a catalogue is finite: compare it only between equal N (see ``coverage``).

    Shapes, errors:  as in ``or_ratio``.
    """
    shown = _top(items, k)
    return np.unique(shown).size / shown.size


def popularity_lifts(list_popularity: ArrayLike, profile_popularity: ArrayLike, k: int) -> FloatArray:
    """Per example (N,): by how much its first k recommendations are more popular than what people had chosen.

        lift_u = (1/k) sum_{r<k} pop(i_{u,r}) / mean_u pop(profile_u) - 1,   pop = training interactions

    Its mean is the popularity lift GAP(lists) / GAP(profiles) - 1 of one user group: 0 keeps the popularity of
    the histories, 1 doubles it. The denominator is a constant of the examples, the same for every method.

    Source:  Abdollahpouri et al., RecSys 2020 (The connection between popularity bias, calibration and fairness).
    Shapes:  list_popularity (N, >= k) training counts in list order; profile_popularity (N,) mean training count
             of each example's history.
    Raises:  ValueError if lengths differ, a list is shorter than k, or all histories have popularity 0.
    Checked: tests/test_metrics.py, hand values.
    """
    shown, profiles = _top(list_popularity, k), np.asarray(profile_popularity, dtype=np.float64)
    if profiles.shape != (len(shown),) or not profiles.mean() > 0:
        raise ValueError(f"{len(shown)} lists need as many histories with popular items, got shape {profiles.shape}")
    return shown.mean(axis=1) / profiles.mean() - 1.0


def periods(times: ArrayLike, by: str = "count", parts: int = 5) -> NDArray[np.str_]:
    """T1 (earliest) ... T5 of each example, (N,): periods of equally many examples, or of equal length.

    ``count``: equal times are never cut apart, so sizes can differ by a block of them: an example is where the
    examples strictly before it leave off. ``length``: the span from the first to the last time in equal parts.

    Shapes:  times (N,) in any unit, such as seconds since 1970.
    Raises:  ValueError if a time is missing or ``by`` is neither ``count`` nor ``length``.
    Checked: tests/test_metrics.py, hand values, order and sizes for any times.
    """
    moments = np.asarray(times, dtype=np.float64)
    if moments.ndim != 1 or moments.size == 0 or not np.isfinite(moments).all():
        raise ValueError("times must be a list of finite numbers")
    if by == "count":
        index = parts * np.searchsorted(np.sort(moments), moments, side="left") // len(moments)
    elif by == "length":
        since = moments - moments.min()
        index = np.minimum(parts * since // (since.max() or 1.0), parts - 1).astype(int)
    else:
        raise ValueError(f"periods are cut by 'count' or 'length', not by {by!r}")
    return np.array([f"T{number + 1}" for number in range(parts)])[index]


def coverage(items: ArrayLike, catalogue_size: int, k: int) -> float:
    """The fraction of the catalogue that appears among the first k recommendations of at least one example.

    Shapes:  items (N, >= k) item ids in list order.
    Raises:  ValueError if the catalogue is smaller than what was recommended.
    """
    shown = np.unique(_top(items, k)).size
    if catalogue_size < max(shown, 1):
        raise ValueError(f"a catalogue of {catalogue_size} items cannot show {shown} different ones")
    return shown / catalogue_size
