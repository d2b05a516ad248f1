"""What the predictions of one setting and split say: scores per example, and rows of the result tables.

The independent unit is the user: every interval resamples training seeds and users together (``stats``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib import metrics, stats

K = 10  # of the shares, the group-wise and the causal metric
GROUPINGS = ("mass", "items")
ENDS = ("G1", "G5")  # the groups whose shares and accuracies are compared in pairs
BASELINES = ("sft", "dpo", "shuffled")  # a method is compared with those that come before it here
FLOORS = ("random", "popular")

Frame = pd.DataFrame


@dataclass(frozen=True)
class Panel:
    """One split of one setting: N examples, and every method's predictions for them, aligned, by seed.

    Shapes: ``users`` and ``targets`` (N,); ``ranks[m]`` and ``logps[m]`` (S, N); ``lists[m]`` (S, N, L) ids.
    ``preferences`` (N, items) in the order of ``items``, or None where the truth is unknown.
    """

    setting: str
    split: str
    items: Frame
    users: np.ndarray
    targets: np.ndarray
    ranks: Mapping[str, np.ndarray]
    logps: Mapping[str, np.ndarray]
    lists: Mapping[str, np.ndarray]
    preferences: np.ndarray | None

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


def popular_order(items: Frame) -> np.ndarray:
    """Item ids by training interactions, most first, ties by id: the list of the most-popular floor."""
    return items.sort_values(["train_count", "item"], ascending=[False, True])["item"].to_numpy()


def floor_scores(panel: Panel) -> dict[str, dict[str, np.ndarray]]:
    """Per metric, what the floors reach at each example, (1, N): ``random`` expected, ``popular`` played.

    A uniformly random order of V items has HR@K = K/V, NDCG@K = sum_{r<K} 1/log2(r+2) / V and log-probability
    -log V. The most-popular list is the same for everybody; its log-probability is the log of the
    add-one-smoothed share of training interactions.
    """
    size, count = len(panel.items), len(panel.users)
    order = popular_order(panel.items)
    rank = pd.Series(panel.targets).map({item: r for r, item in enumerate(order.tolist())}).to_numpy()[None]
    smoothed = panel.items.set_index("item")["train_count"] + 1.0
    scores: dict[str, dict[str, np.ndarray]] = {}
    for k in (10, 20):
        even = np.full((1, count), min(k, size) / size)
        scores[f"HR@{k}"] = {"random": even, "popular": metrics.hits(rank, k)}
        even = np.full((1, count), metrics.discounts(min(k, size)).sum() / size)
        scores[f"NDCG@{k}"] = {"random": even, "popular": metrics.gains(rank, k)}
    popular = np.log(pd.Series(panel.targets).map(smoothed / smoothed.sum()).to_numpy(float))[None]
    scores["target_logp"] = {"random": np.full((1, count), -np.log(size)), "popular": popular}
    if panel.preferences is not None:
        typical = np.repeat(panel.preferences.mean(axis=1, keepdims=True), K, axis=1)
        shown_to_all = panel.preferences[:, panel.places(order[:K])]
        scores[f"causal_NDCG@{K}"] = {
            "random": metrics.causal_gains(typical, panel.preferences, K)[None],
            "popular": metrics.causal_gains(shown_to_all, panel.preferences, K)[None],
        }
    return scores


def example_scores(panel: Panel) -> dict[str, dict[str, np.ndarray]]:
    """Per metric and trained method, the score of every seed and example, (S, N)."""
    scores: dict[str, dict[str, np.ndarray]] = {}
    for k in (10, 20):
        scores[f"HR@{k}"] = {m: metrics.hits(ranks, k) for m, ranks in panel.ranks.items()}
        scores[f"NDCG@{k}"] = {m: metrics.gains(ranks, k) for m, ranks in panel.ranks.items()}
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
    return scores


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
            rows.append(
                {
                    "setting": panel.setting,
                    "split": panel.split,
                    "method": method,
                    "metric": metric,
                    **stats.interval(values, panel.users)._asdict(),
                    "seeds": 0 if method in FLOORS else len(values),
                    "examples": len(panel.users),
                }
            )
    return rows


def compared(methods: Sequence[str]) -> list[tuple[str, str]]:
    """The (method, baseline) pairs that are tested: a method against all of ``BASELINES`` that precede it."""
    order = {name: index for index, name in enumerate(BASELINES)}
    return [(m, b) for m in methods for b in BASELINES if b in methods and order[b] < order.get(m, len(order))]


def paired_rows(panel: Panel) -> list[dict[str, Any]]:
    """Rows of paired.csv: differences in each metric, and in the shares and accuracies of the end groups."""
    everyone = np.ones(len(panel.users), dtype=bool)
    endpoints = [(metric, values, everyone) for metric, values in example_scores(panel).items()]
    gains = {m: metrics.gains(ranks, K) for m, ranks in panel.ranks.items()}
    for grouping in GROUPINGS:
        slots = slot_scores(panel, grouping)
        target_group = pd.Series(panel.targets).map(panel.groups(grouping)).to_numpy()
        for group in ENDS:
            if group in slots:
                endpoints.append((share_metric(grouping, group), slots[group], everyone))
            if (target_group == group).any():
                endpoints.append((ndcg_metric(grouping, group), gains, target_group == group))
    rows = []
    for metric, values, chosen in endpoints:
        family = [
            {
                "setting": panel.setting,
                "split": panel.split,
                "metric": metric,
                "method": method,
                "baseline": baseline,
                **stats.paired(values[method][:, chosen], values[baseline][:, chosen], panel.users[chosen])._asdict(),
            }
            for method, baseline in compared(list(values))
        ]
        for row, adjusted in zip(family, stats.holm([row["p"] for row in family]), strict=True):
            row["difference"] = row.pop("mean")
            rows.append({**row, "p_holm": adjusted})
    return rows


def share_metric(grouping: str, group: str) -> str:
    """The name in paired.csv of a group's share of the recommendation slots."""
    return f"share@{K}_{grouping}_{group}"


def ndcg_metric(grouping: str, group: str) -> str:
    """The name in paired.csv of NDCG over the examples whose target is in a group."""
    return f"NDCG@{K}_{grouping}_{group}"


def share_rows(panel: Panel) -> list[dict[str, Any]]:
    """Rows of shares.csv: each group's share of the first K slots, by method, beside two references.

    ``training`` is the group's share of training interactions (a fact of the data, without interval),
    ``targets`` its share of this split's targets: what a list in proportion to the truth would show.
    """
    rows = []
    for grouping in GROUPINGS:
        slots = slot_scores(panel, grouping)
        target_group = pd.Series(panel.targets).map(panel.groups(grouping)).to_numpy()
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
    """Rows of groups.csv: NDCG@K over the examples whose target is in the group; NaN for empty groups."""
    rows = []
    for grouping in GROUPINGS:
        groups = panel.groups(grouping)
        target_group = pd.Series(panel.targets).map(groups).to_numpy()
        for group in sorted(set(groups.values())):
            chosen = target_group == group
            for method, ranks in panel.ranks.items():
                found = stats.Interval(np.nan, np.nan, np.nan)
                if chosen.any():
                    found = stats.interval(metrics.gains(ranks[:, chosen], K), panel.users[chosen])
                key = {"setting": panel.setting, "split": panel.split, "grouping": grouping, "group": group}
                rows.append({**key, "method": method, **found._asdict(), "examples": int(chosen.sum())})
    return rows
