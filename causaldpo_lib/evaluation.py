"""What the predictions of one setting and split say: scores per example, and rows of the result tables.

The independent unit is the user: every interval resamples training seeds and users together (``stats``). What only a
set of lists has as a whole (``LIST_METRICS``) has an interval over seeds alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from causaldpo_lib import metrics, stats
from causaldpo_lib.errors import StudyError, pick

K = 10  # of the shares, the group-wise and the causal metric, and of what describes the lists
CUTOFFS = (10, 20)
GROUPINGS = ("mass", "items")
PERIODS = ("count", "length")  # T1 ... T5: equally many examples, equal length
LIST_METRICS = (f"ORRatio@{K}", f"DivRatio@{K}", f"coverage@{K}", f"Gini@{K}")
LIFT = f"popularity_lift@{K}"
KL = "causal_KL"  # Eq. 3's error against the interventional preference, in nats; smaller is better
# Stated before any result was looked at: half of the mean relative gain that the paper claims, 17.17 %. Two methods
# whose means differ by less than this factor (of the baseline's mean; of the probability, where the metric is a
# log-probability) cannot show an effect of the claimed kind, whatever the p-value of their difference.
MARGIN = 0.1717 / 2
ENDS = ("G1", "G5")  # the groups whose shares and accuracies are compared in pairs
BASELINES = ("sft", "dpo", "shuffled", "causal_dpo")  # a method is compared with those that come before it here
# Besides, a method is compared with what it changes or is controlled by, each at the same value of a sweep.
COUNTERPARTS = {
    "dynamic_dmpo": ("dmpo",),
    "dynamic_s_dpo": ("s_dpo",),
    "dynamic_mppo": ("mppo",),
    "dr_dpo_causal": ("dr_dpo",),
    "cpo_causal": ("cpo",),
    "simpo_causal": ("simpo",),
    "causal_negatives": ("popularity_negatives", "causal_negatives_shuffled"),
    "causal_negatives_oracle": ("causal_negatives",),
    "causal_dpo": ("dpo",),
    "shuffled": ("dpo",),
    "dpo": ("sft",),
}
FLOORS = ("random", "popular")
ACCURACY = {"HR": metrics.hits, "NDCG": metrics.gains, "MRR": metrics.reciprocals}

Frame = pd.DataFrame


@dataclass(frozen=True)
class Panel:
    """One split of one setting: N examples, and every method's predictions for them, aligned, by seed.

    Shapes: ``users`` and ``targets`` (N,); ``ranks[m]`` and ``logps[m]`` (S, N); ``lists[m]`` (S, N, L) ids.
    ``preferences`` (N, items) in the order of ``items``, ``catalogue_logps[m]`` (S, N, items) likewise; ``times`` of
    the targets, ``environments`` they were made in and ``profile_popularity``, the mean training count of each
    history, (N,); None where unknown. ``candidates`` (N, C) ids where only these were ranked, else None.
    """

    setting: str
    split: str
    items: Frame
    users: np.ndarray
    targets: np.ndarray
    ranks: Mapping[str, np.ndarray]
    logps: Mapping[str, np.ndarray]
    lists: Mapping[str, np.ndarray]
    preferences: np.ndarray | None = None
    catalogue_logps: Mapping[str, np.ndarray] | None = None
    times: np.ndarray | None = None
    environments: np.ndarray | None = None
    profile_popularity: np.ndarray | None = None
    candidates: np.ndarray | None = None

    @cached_property
    def position(self) -> dict[Any, int]:
        """Where each item stands in ``items``."""
        return {item: index for index, item in enumerate(self.items["item"].tolist())}

    def places(self, ids: np.ndarray) -> np.ndarray:
        """The positions in ``items`` of item ids of any shape."""
        return pd.Series(ids.ravel()).map(self.position).to_numpy().reshape(ids.shape)

    def groups(self, grouping: str) -> dict[Any, str]:
        """Item id to popularity group."""
        return dict(zip(self.items["item"].tolist(), self.items[f"group_{grouping}"], strict=True))

    @cached_property
    def example_groups(self) -> dict[str, np.ndarray]:
        """Each grouping's label of each example, (N,): its target's popularity, true environment and period."""
        found = {g: pd.Series(self.targets).map(self.groups(g)).to_numpy() for g in GROUPINGS}
        if self.environments is not None:
            found["environment"] = np.asarray(self.environments).astype(str)
        if self.times is not None:
            found |= {by: metrics.periods(self.times, by) for by in PERIODS}
        return found

    def group_names(self, grouping: str) -> list[str]:
        """All groups of a grouping, in order, with or without examples."""
        known = self.items[f"group_{grouping}"] if grouping in GROUPINGS else self.example_groups[grouping]
        return sorted(set(known))

    def popularity(self, ids: np.ndarray) -> np.ndarray:
        """Training interactions of item ids of any shape."""
        return self.items["train_count"].to_numpy(float)[self.places(ids)]


def accuracies() -> list[tuple[str, Any, int]]:
    """(name, score of ranks, cut-off) of every accuracy; at 1 all are the hit rate."""
    return [("HR@1", metrics.hits, 1), *((f"{name}@{k}", ACCURACY[name], k) for k in CUTOFFS for name in ACCURACY)]


def popular_order(items: Frame) -> np.ndarray:
    """Item ids by training interactions, most first, ties by id: the list of the most-popular floor."""
    return items.sort_values(["train_count", "item"], ascending=[False, True])["item"].to_numpy()


def floor_scores(panel: Panel) -> dict[str, dict[str, np.ndarray]]:
    """Per metric, what the floors reach at each example, (1, N): ``random`` expected, ``popular`` played.

    A uniformly random order of V items has HR@K = K/V, NDCG@K = sum_{r<K} 1/log2(r+2) / V, MRR@K = sum_{r<K}
    1/(r+1) / V and log-probability -log V. The most-popular list is the same for everybody; its log-probability is
    the log of the add-one-smoothed share of training interactions. Where candidates were ranked, V is their number and
    both floors are among them.
    """
    order = popular_order(panel.items)
    place = {item: r for r, item in enumerate(order.tolist())}
    rank = pd.Series(panel.targets).map(place).to_numpy()[None]
    smoothed = panel.items.set_index("item")["train_count"] + 1.0
    size, count = len(panel.items), len(panel.users)
    if panel.candidates is not None:
        size = panel.candidates.shape[1]
        places = pd.Series(panel.candidates.ravel()).map(place).to_numpy().reshape(count, size)
        weights = pd.Series(panel.candidates.ravel()).map(smoothed).to_numpy().reshape(count, size)
        rank = (places < rank.T).sum(axis=1)[None]
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, score, k in accuracies():
        even = np.full((1, count), score(np.arange(min(k, size)), k).sum() / size)
        scores[name] = {"random": even, "popular": score(rank, k)}
    whole = smoothed.sum() if panel.candidates is None else weights.sum(axis=1)
    popular = np.log(pd.Series(panel.targets).map(smoothed).to_numpy(float) / whole)[None]
    scores["target_logp"] = {"random": np.full((1, count), -np.log(size)), "popular": popular}
    if panel.preferences is not None:
        typical = np.repeat(panel.preferences.mean(axis=1, keepdims=True), K, axis=1)
        shown_to_all = panel.preferences[:, panel.places(order[:K])]
        scores[f"causal_NDCG@{K}"] = {
            "random": metrics.causal_gains(typical, panel.preferences, K)[None],
            "popular": metrics.causal_gains(shown_to_all, panel.preferences, K)[None],
        }
    if panel.preferences is not None and panel.catalogue_logps is not None:
        share = np.log((smoothed / smoothed.sum()).to_numpy())
        for method, logps in {"random": np.zeros(size), "popular": share}.items():
            error = metrics.interventional_kl(np.tile(logps, (count, 1)), panel.preferences)
            scores.setdefault(KL, {})[method] = error[None]
    if panel.profile_popularity is not None:
        counts = panel.items["train_count"].to_numpy(float)
        shown = {"random": np.repeat(counts.mean(), K), "popular": -np.sort(-counts)[:K]}
        scores[LIFT] = {
            m: metrics.popularity_lifts(np.tile(row, (count, 1)), panel.profile_popularity, len(row))[None]
            for m, row in shown.items()
        }
    return scores


def example_scores(panel: Panel) -> dict[str, dict[str, np.ndarray]]:
    """Per metric and trained method, the score of every seed and example, (S, N)."""
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, score, k in accuracies():
        scores[name] = {m: score(ranks, k) for m, ranks in panel.ranks.items()}
    scores["target_logp"] = dict(panel.logps)
    if panel.preferences is not None:
        rows = np.arange(len(panel.users))[:, None]
        scores[f"causal_NDCG@{K}"] = {
            m: np.stack(
                [
                    metrics.causal_gains(panel.preferences[rows, panel.places(seed)], panel.preferences, K)
                    for seed in lists[:, :, :K]
                ]
            )
            for m, lists in panel.lists.items()
        }
    if panel.preferences is not None and panel.catalogue_logps is not None:
        scores[KL] = {
            m: np.stack([metrics.interventional_kl(seed, panel.preferences) for seed in logps])
            for m, logps in panel.catalogue_logps.items()
        }
    if panel.profile_popularity is not None:
        scores[LIFT] = {
            m: np.stack(
                [metrics.popularity_lifts(panel.popularity(seed[:, :K]), panel.profile_popularity, K) for seed in lists]
            )
            for m, lists in panel.lists.items()
        }
    return scores


def list_scores(panel: Panel) -> dict[str, dict[str, np.ndarray]]:
    """Per metric of ``LIST_METRICS`` and method, one number per seed, (S,).

    The random floor is one uniformly random list per example, drawn by a fixed generator.
    """
    rng = np.random.default_rng(0)
    size, count = len(panel.items), len(panel.users)
    long = min(K, size)
    chance = np.stack([rng.choice(size, long, replace=False, shuffle=False) for _ in range(count)])
    same = np.tile(panel.places(popular_order(panel.items)[:long]), (count, 1))
    shown = {m: [panel.places(seed[:, :long]) for seed in lists] for m, lists in panel.lists.items()}
    shown |= {"random": [chance], "popular": [same]}

    def describe(places: np.ndarray) -> tuple[float, ...]:
        counts = np.bincount(places.ravel(), minlength=size)
        ratios = metrics.or_ratio(places, long), metrics.div_ratio(places, long)
        return *ratios, metrics.coverage(places, size, long), metrics.gini(counts)

    found = {m: np.array([describe(places) for places in seeds]) for m, seeds in shown.items()}
    return {metric: {m: table[:, i] for m, table in found.items()} for i, metric in enumerate(LIST_METRICS)}


def slot_scores(panel: Panel, grouping: str) -> dict[str, dict[str, np.ndarray]]:
    """Per group and trained method, the fraction of each example's first K slots in the group, (S, N)."""
    groups = panel.groups(grouping)
    by_method = {m: [metrics.group_slots(seed, groups, K) for seed in lists] for m, lists in panel.lists.items()}
    names = sorted(set(groups.values()))
    return {g: {m: np.stack([seed[g] for seed in seeds]) for m, seeds in by_method.items()} for g in names}


# --- rows of the result tables ---


def metric_rows(panel: Panel) -> list[dict[str, Any]]:
    """Rows of metrics.csv: every metric of every method and floor."""
    floors = floor_scores(panel)
    rows = []
    for metric, trained in example_scores(panel).items():
        for method, values in {**trained, **floors[metric]}.items():
            rows.append(_metric_row(panel, method, metric, stats.interval(values, panel.users), len(values)))
    for metric, by_method in list_scores(panel).items():
        for method, numbers in by_method.items():
            found = stats.seed_interval(numbers)
            if method in FLOORS:
                found = stats.Interval(found.mean, found.mean, found.mean)
            rows.append(_metric_row(panel, method, metric, found, len(numbers)))
    return rows


def _metric_row(panel: Panel, method: str, metric: str, found: stats.Interval, seeds: int) -> dict[str, Any]:
    key = {"setting": panel.setting, "split": panel.split, "method": method, "metric": metric}
    seeds = 0 if method in FLOORS else seeds
    return {**key, **found._asdict(), "seeds": seeds, "examples": len(panel.users)}


def compared(methods: Sequence[str]) -> list[tuple[str, str]]:
    """The (method, baseline) pairs that are tested: a method against all of ``BASELINES`` that precede it, but for the
    shuffled control only what it controls, CausalDPO; and against its ``COUNTERPARTS``, for a method of a sweep
    (``<method>-<key>-<value>``) at the same value."""
    order = {name: index for index, name in enumerate(BASELINES)}
    found = [
        (method, baseline)
        for method in methods
        for baseline in BASELINES
        if baseline in methods and order[baseline] < order.get(method, len(order))
        if baseline != "shuffled" or method == "causal_dpo"
    ]
    for method in methods:
        base, mark, value = method.partition("-")
        others = (other + mark + value for other in COUNTERPARTS.get(base, ()))
        found += [(method, other) for other in others if other in methods]
    return list(dict.fromkeys(found))


def paired_rows(panel: Panel, comparisons: Sequence[tuple[str, str]] = ()) -> list[dict[str, Any]]:
    """Rows of paired.csv: differences in each metric, in the shares and accuracies of the end groups, in slopes.

    ``p_equivalent`` tests that the difference lies within ``margin`` (``MARGIN``, in the metric's unit); both kinds of
    p-values are corrected after Holm over the methods that are compared with one baseline in one metric.
    ``p_mcnemar`` stands beside hit rates only. ``comparisons`` are tested beside those of ``compared``.
    """
    everyone = np.ones(len(panel.users), dtype=bool)
    endpoints = [(metric, values, everyone) for metric, values in example_scores(panel).items()]
    gains = {m: metrics.gains(ranks, K) for m, ranks in panel.ranks.items()}
    for grouping in GROUPINGS:
        slots, target_group = slot_scores(panel, grouping), panel.example_groups[grouping]
        for group in ENDS:
            if group in slots:
                endpoints.append((share_metric(grouping, group), slots[group], everyone))
            if (target_group == group).any():
                endpoints.append((ndcg_metric(grouping, group), gains, target_group == group))
    pairs = list(dict.fromkeys([*compared(list(panel.ranks)), *comparisons]))
    rows = []
    for metric, values, chosen in endpoints:
        users = panel.users[chosen]
        family = []
        for method, baseline in pairs:
            left, right = values[method][:, chosen], values[baseline][:, chosen]
            found = {**stats.paired(left, right, users)._asdict(), **_equivalence(metric, left, right, users)}
            if metric.startswith("HR@"):
                found["p_mcnemar"] = stats.mcnemar(left, right)
            family.append(found)
        rows += _corrected(panel, metric, pairs, family)
    for grouping, positions in ordered_groups(panel).items():
        family = [stats.slope(gains[m] - gains[b], positions, panel.users)._asdict() for m, b in pairs]
        rows += _corrected(panel, slope_metric(grouping), pairs, family)
    return rows


def _equivalence(metric: str, values: np.ndarray, baseline: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """The margin of a comparison and the p-value of equivalence within it."""
    if metric == LIFT:  # already relative, and 0 for lists like the histories: a ratio of lifts says nothing
        below, above = baseline - MARGIN, baseline + MARGIN
    elif metric in ("target_logp", KL):
        below, above = baseline - np.log1p(MARGIN), baseline + np.log1p(MARGIN)
    else:
        below, above = (1 - MARGIN) * baseline, (1 + MARGIN) * baseline
    return {
        "margin": float((above - baseline).mean()),
        "p_equivalent": stats.equivalence(values, below, above, users),
    }


def _corrected(
    panel: Panel, metric: str, pairs: Sequence[tuple[str, str]], found: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    """The rows of one metric in one split of one setting. All methods against one baseline are a family of Holm's."""
    rows = []
    for (method, baseline), numbers in zip(pairs, found, strict=True):
        key = {"setting": panel.setting, "split": panel.split, "metric": metric, "method": method, "baseline": baseline}
        rows.append({**key, **numbers, "difference": numbers["mean"]})
        rows[-1].pop("mean")
    return stats.with_holm(rows)


def ordered_groups(panel: Panel) -> dict[str, np.ndarray]:
    """Per grouping with an order, each example's position 0 ... 4 of G1 ... G5 or T1 ... T5, where there are two."""
    found = {
        grouping: np.array([int(label[1:]) - 1 for label in labels.tolist()])
        for grouping, labels in panel.example_groups.items()
        if grouping in (*GROUPINGS, *PERIODS)
    }
    return {grouping: positions for grouping, positions in found.items() if len(np.unique(positions)) > 1}


def share_metric(grouping: str, group: str) -> str:
    """The name in paired.csv of a group's share of the recommendation slots."""
    return f"share@{K}_{grouping}_{group}"


def ndcg_metric(grouping: str, group: str) -> str:
    """The name in paired.csv of NDCG over the examples whose target is in a group."""
    return f"NDCG@{K}_{grouping}_{group}"


def slope_metric(grouping: str) -> str:
    """The name in paired.csv of the slope of NDCG over the groups of a grouping, per step."""
    return f"slope_NDCG@{K}_{grouping}"


def share_rows(panel: Panel) -> list[dict[str, Any]]:
    """Rows of shares.csv: each group's share of the first K slots, by method, beside two references.

    ``training`` is the group's share of training interactions (a fact of the data, without interval),
    ``targets`` its share of this split's targets: what a list in proportion to the truth would show.
    """
    rows = []
    for grouping in GROUPINGS:
        slots = slot_scores(panel, grouping)
        target_group = panel.example_groups[grouping]
        counts = panel.items.groupby(f"group_{grouping}")["train_count"].sum()
        for group, by_method in slots.items():
            values = {**by_method, "targets": (target_group == group)[None].astype(float)}
            found = {method: stats.interval(array, panel.users) for method, array in values.items()}
            training = float(counts.get(group, 0) / counts.sum())
            found["training"] = stats.Interval(training, training, training)
            for method, (mean, low, high) in found.items():
                key = {"setting": panel.setting, "split": panel.split, "grouping": grouping, "group": group}
                rows.append({**key, "method": method, "share": mean, "low": low, "high": high})
    return rows


def group_rows(panel: Panel) -> list[dict[str, Any]]:
    """Rows of groups.csv: NDCG@K over the examples whose target is in the group; NaN for empty groups.

    Groups of the target's popularity, and the true environment where the data are simulated.
    """
    return _accuracy_rows(panel, (*GROUPINGS, "environment"), {f"NDCG@{K}": metrics.gains}, named=False)


def time_rows(panel: Panel) -> list[dict[str, Any]]:
    """Rows of times.csv: HR@K and NDCG@K over the periods T1 (earliest) ... T5; none where times are unknown."""
    return _accuracy_rows(panel, PERIODS, {f"HR@{K}": metrics.hits, f"NDCG@{K}": metrics.gains}, named=True)


def _accuracy_rows(
    panel: Panel, groupings: Sequence[str], scores: Mapping[str, Any], named: bool
) -> list[dict[str, Any]]:
    rows = []
    for grouping in (name for name in groupings if name in panel.example_groups):
        label = panel.example_groups[grouping]
        for (metric, score), group in product(scores.items(), panel.group_names(grouping)):
            chosen = label == group
            for method, ranks in panel.ranks.items():
                found = stats.Interval(np.nan, np.nan, np.nan)
                if chosen.any():
                    found = stats.interval(score(ranks[:, chosen], K), panel.users[chosen])
                key = {"setting": panel.setting, "split": panel.split, "grouping": grouping, "group": group}
                key |= {"metric": metric} if named else {}
                rows.append({**key, "method": method, **found._asdict(), "examples": int(chosen.sum())})
    return rows


def slope_rows(panel: Panel) -> list[dict[str, Any]]:
    """Rows of slopes.csv: the slope of NDCG@K from G1 to G5 and from T1 to T5, per step, of every method."""
    rows = []
    for grouping, positions in ordered_groups(panel).items():
        for method, ranks in panel.ranks.items():
            found = stats.slope(metrics.gains(ranks, K), positions, panel.users)
            key = {"setting": panel.setting, "split": panel.split, "grouping": grouping, "metric": f"NDCG@{K}"}
            numbers = {"slope": found.mean, "low": found.low, "high": found.high}
            rows.append({**key, "method": method, **numbers, "groups": len(np.unique(positions))})
    return rows


# --- model selection ---


class Rule(NamedTuple):
    """How one of several candidates is chosen: the largest mean of a metric on a split."""

    split: str
    metric: str
    text: str  # stands above the table


SELECTION = {
    "iid_validation_logp": Rule("validation", "target_logp", "largest mean log-probability on IID validation"),
    "iid_validation_ndcg": Rule("validation", f"NDCG@{K}", f"largest NDCG@{K} on IID validation"),
    "oracle_ood": Rule("ood_test", "target_logp", "largest mean log-probability on the OOD test: LOOKS AT THE TEST"),
}


def select(rows: Frame, rule: str) -> dict[str, str]:
    """Per setting the candidate that a named rule chooses among the methods in ``rows``; the first of equals.

    Invariance can lower the fit to the training environments, and selection on IID validation would then favour its
    absence; so the whole path is shown beside a selection, and ``oracle_ood`` only as a labelled extra.

    Args:
        rows: columns setting, split, method, metric, mean; floors are no candidates.
        rule: a name in ``SELECTION``.

    Raises:
        StudyError: an unknown rule, or no row of its split and metric.
    """
    by = pick(SELECTION, rule, "selection rule")
    fits = rows[(rows["split"] == by.split) & (rows["metric"] == by.metric) & ~rows["method"].isin(FLOORS)]
    if fits.empty:
        raise StudyError(
            f"selection rule {rule!r} needs {by.metric} on {by.split}, which no row has: rank that split too, "
            "or choose another rule"
        )
    best = fits.loc[fits.groupby("setting", sort=False)["mean"].idxmax()]
    return dict(zip(best["setting"], best["method"], strict=True))
