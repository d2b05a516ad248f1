"""What a split of a dataset is like, in numbers, and what kind of shift these numbers show.

Nothing here looks at the name of a dataset or shift: a popularity shift is one because the tests' targets differ in
training popularity, a temporal one because of the times. Popularity groups come from training counts
(`splits.popularity_groups`); shares are fractions; times are Unix seconds, and without a column ``time`` the numbers
about it are NaN. Imputed rows of an exposure test count as targets, but not for the times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib.metrics import gini
from causaldpo_lib.splits import GROUPS, SPLIT_NAMES, temporal

SITTING = 3600  # seconds: a shorter gap to the user's previous interaction is the same sitting
# When a difference between the two tests is called a shift; two random halves stay below these from about 500
# interactions each on.
ALL = 0.99  # share of the OOD targets that are later than training: a cut in time, a few equal times aside
SOME = 0.05  # share of the OOD targets more than of the IID ones that are late, new or imputed
APART = 0.1  # total variation distance between two distributions over groups or environments


def describe_by_split(split: pd.DataFrame, items: pd.DataFrame, examples: pd.DataFrame | None = None) -> pd.DataFrame:
    """The numbers of each split, a row each in the order of ``SPLIT_NAMES``.

    Args:
        split: a table of `splits.make_split`.
        items: its catalogue with ``train_count``, ``group_mass`` and ``group_items``.
        examples: of `splits.histories`, for two more columns: ``examples``, and ``history``, their mean length.

    Returns:
        split, interactions, users, items, density (of users x items of the split), gini (of the items that occur),
        kl_mass and kl_items (nats: Kullback-Leibler divergence from the uniform distribution over G1-G5 of the
        interactions' groups, of equal training mass or of equally many items), popularity (median training count of
        the targets), new_items and new_users (share of the interactions whose item or user has no training
        interaction), later and later_than_own (share of the interactions later than all training, and than all of
        their user's training, if any), imputed (share).
    """
    train = split[split["split"] == "train"]
    catalogue = items.set_index("item")
    imputed = split["imputed"].eq(True) if "imputed" in split else pd.Series(False, index=split.index)
    times = split["time"] if "time" in split else pd.Series(np.nan, index=split.index)
    latest = train.assign(time=times).groupby("user")["time"].max()
    own = split["user"].map(latest).fillna(-np.inf)
    known = times.notna() & ~imputed
    numbers = split[["split", "user", "item"]].assign(
        popularity=split["item"].map(catalogue["train_count"]),
        new_items=~split["item"].isin(train["item"]),
        new_users=~split["user"].isin(train["user"]),
        later=times.gt(latest.max()).where(known).astype(float),
        later_than_own=times.gt(own).where(known).astype(float),
        imputed=imputed,
    )
    rows = []
    for name, part in numbers.groupby("split", sort=False):
        counts = part["item"].value_counts()
        row = {"split": name, "interactions": len(part), "users": part["user"].nunique(), "items": len(counts)}
        row |= {"density": len(part) / (row["users"] * row["items"]), "gini": gini(counts)}
        for grouping in ("mass", "items"):
            row[f"kl_{grouping}"] = kl_to_uniform(group_shares(part["item"], catalogue[f"group_{grouping}"]))
        row["popularity"] = part["popularity"].median()
        row |= part[["new_items", "new_users", "later", "later_than_own", "imputed"]].mean().to_dict()
        if examples is not None:
            mine = examples[examples["split"] == name]
            row |= {"examples": len(mine), "history": mine["history"].map(len).astype(float).mean()}
        rows.append(row)
    return pd.DataFrame(rows).set_index("split").reindex(SPLIT_NAMES).reset_index()


def describe(split: pd.DataFrame, items: pd.DataFrame, examples: pd.DataFrame | None = None) -> dict[str, Any]:
    """All numbers of one split table as scalars.

    Those of `describe_by_split` as ``<split>_<number>``; of everything kept: interactions, users, items, density,
    timed (whether there are times); how far the OOD from the IID test is, total variation distances of group_mass
    (``popularity_distance``) and of the simulator's environments (``environment_distance``, else NaN); and
    ``cuts`` and ``sitting`` of `sittings`.
    """
    by_split = describe_by_split(split, items, examples).set_index("split")
    users, kept = split["user"].nunique(), split["item"].nunique()
    found: dict[str, Any] = {"interactions": len(split), "users": users, "items": kept}
    found |= {"density": len(split) / (users * kept), "timed": "time" in split}
    iid, ood = (split[split["split"] == name] for name in ("iid_test", "ood_test"))
    group = items.set_index("item")["group_mass"]
    found["popularity_distance"] = _distance(iid["item"].map(group), ood["item"].map(group))
    known = "environment" in split
    found["environment_distance"] = _distance(iid["environment"], ood["environment"]) if known else np.nan
    found["cuts"], found["sitting"] = sittings(split)
    return found | {
        f"{name}_{column}": value for name, row in by_split.iterrows() for column, value in row.to_dict().items()
    }


def group_shares(targets: pd.Series, group: pd.Series) -> np.ndarray:
    """The share of interactions in each of G1-G5, (5,); ``group`` maps an item to its group."""
    return targets.map(group).value_counts(normalize=True).reindex(GROUPS, fill_value=0).to_numpy()


def kl_to_uniform(shares: np.ndarray) -> float:
    """KL(shares || uniform) in nats, with 0 log 0 = 0: 0 for equal shares, log n if one of n has all."""
    some = shares[shares > 0]
    return float((some * np.log(some * len(shares))).sum())


def sittings(split: pd.DataFrame) -> tuple[int, float]:
    """How many users a cut in their own time would cut, and the share of these cuts that fall inside one sitting.

    The cut is that of shift ``temporal`` with scope ``user``: each user's latest 20 %. It falls inside a sitting if
    the first interaction after it comes less than ``SITTING`` after the last one before it. A user whose
    interactions all have one time cannot be cut. (0, NaN) without times.
    """
    if "time" not in split:
        return 0, np.nan
    real = split[~split["imputed"].eq(True)] if "imputed" in split else split
    real = real.reset_index(drop=True)
    late = temporal(real, np.random.default_rng(0), scope="user")  # draws nothing
    gap = real[late].groupby("user")["time"].min() - real[~late].groupby("user")["time"].max()
    gap = gap.dropna()
    return len(gap), float(gap.lt(SITTING).mean())


def kinds_of_shift(description: dict[str, Any]) -> dict[str, str]:
    """The kinds of shift that the numbers of `describe` show: name -> its evidence. Empty: none.

    The OOD test is compared with the IID test, which is drawn as training is. The thresholds are ``ALL``, ``SOME``
    and ``APART``; several kinds can hold at once, and each holds whatever made it.
    """
    iid, ood = (
        {key.removeprefix(f"{name}_"): value for key, value in description.items() if key.startswith(f"{name}_")}
        for name in ("iid_test", "ood_test")
    )
    found = {}
    if ood["later"] >= ALL:
        found["temporal, one cut for all"] = f"{ood['later']:.0%} of the OOD targets are later than all training"
    elif ood["later_than_own"] >= ALL and iid["later_than_own"] < ALL:
        found["temporal, a cut per user"] = (
            f"{ood['later_than_own']:.0%} of the OOD targets are later than their user's training, {ood['later']:.0%} "
            f"later than all training; {description['sitting']:.0%} of such cuts fall inside one sitting"
        )
    elif ood["later"] - iid["later"] >= SOME:
        found["partly temporal"] = (
            f"{ood['later']:.0%} of the OOD targets are later than all training, {iid['later']:.0%} of the IID ones"
        )
    if description["popularity_distance"] >= APART:
        less = "less" if ood["popularity"] < iid["popularity"] else "more"
        found[f"towards {less} popular items"] = (
            f"the median target has {ood['popularity']:.0f} training interactions instead of {iid['popularity']:.0f}, "
            f"the Gini coefficient of items is {ood['gini']:.2f} instead of {iid['gini']:.2f}"
        )
    if description["environment_distance"] >= APART:
        moved = description["environment_distance"]
        found["other environments"] = f"{moved:.0%} of the interactions would have to change their environment"
    for what in ("items", "users"):
        if ood[f"new_{what}"] - iid[f"new_{what}"] >= SOME:
            share = ood[f"new_{what}"]
            found[f"new {what}"] = f"{share:.0%} of the OOD interactions are of {what} without training"
    if ood["imputed"] >= SOME:
        found["imputed exposure"] = f"{ood['imputed']:.0%} of the OOD targets come from a model, not from users"
    return found


def kind_of_shift(description: dict[str, Any]) -> str:
    """`kinds_of_shift` as one sentence, without a full stop."""
    found = kinds_of_shift(description)
    if not found:
        return "no shift to be seen: the OOD test looks like the IID test"
    return "; ".join(f"{name} ({evidence})" for name, evidence in found.items())


def _distance(first: pd.Series, second: pd.Series) -> float:
    """Total variation distance of two samples of categories: the share that would have to move, 0 to 1."""
    shares = [part.value_counts(normalize=True) for part in (first, second)]
    return float(shares[0].sub(shares[1], fill_value=0).abs().sum() / 2)
