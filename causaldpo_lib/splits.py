"""Shifts between training and test, as data: one table of positive interactions with a column ``split``.

Every shift marks the interactions of the out-of-distribution test; the rest is cut at random into train,
validation and iid test. Sources: CausalDPO's Appendix B.1 (arXiv 2603.22335), with the readings stated at
each shift.

The leakage rule (`histories`): prompts hold training interactions of strictly earlier time only, so no
held-out (user, item) pair appears in any prompt or training target of train, validation and iid test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib.data.interactions import Interactions
from causaldpo_lib.data.options import check_options, options_of
from causaldpo_lib.errors import StudyError, pick

SPLIT_NAMES = ("train", "validation", "iid_test", "ood_test")
GROUPS = ("G1", "G2", "G3", "G4", "G5")


# --- Shifts: positives -> which of them are the out-of-distribution test ---


def iid(positives: pd.DataFrame, rng: np.random.Generator, *, ood_share: float = 0.2) -> np.ndarray:
    """No shift, the control: ``ood_share`` of the interactions at random."""
    ood = np.zeros(len(positives), dtype=bool)
    ood[rng.choice(len(positives), round(ood_share * len(positives)), replace=False)] = True
    return ood


def popularity(positives: pd.DataFrame, rng: np.random.Generator, *, ood_share: float = 0.2) -> np.ndarray:
    """Balanced popularity in the test: as few interactions of each item as reach ``ood_share`` together.

    Item i with n_i interactions gives min(c, n_i // 2) at random, with the smallest cap c whose sum reaches
    the target; the surplus is taken back at random from the items that gave c. So the test's histogram over
    items is as flat as it can be while every item keeps at least half of its interactions. (The paper:
    "maintaining a balanced distribution of item popularity", no rule given.)
    """
    counts = positives["item"].value_counts()
    target = round(ood_share * len(positives))
    caps = np.arange(1, max(2, int(counts.max()) // 2 + 1))
    reached = np.array([np.minimum(cap, counts.to_numpy() // 2).sum() for cap in caps])
    cap = caps[np.argmax(reached >= target)] if reached[-1] >= target else caps[-1]

    rank = _rank_within_item(positives, rng)
    half = positives["item"].map(counts).to_numpy() // 2
    ood = rank < np.minimum(cap, half)
    surplus = max(int(ood.sum()) - target, 0)
    last = np.flatnonzero(ood & (rank == cap - 1))  # removing one of these keeps every count at c or c - 1
    ood[rng.choice(last, min(surplus, len(last)), replace=False)] = False
    return ood


def temporal(
    positives: pd.DataFrame, rng: np.random.Generator, *, ood_share: float = 0.2, scope: str = "global"
) -> np.ndarray:
    """The latest ``ood_share`` of all interactions (scope ``global``) or of each user's (``user``, as B.1).

    Interactions of the same time are never cut apart: the cut moves to the nearer end of theirs, so the share
    is approximate, and a user whose interactions all have one time gives none.

    Raises:
        StudyError: the data have no times, or an unknown scope.
    """
    scopes = {"global": pd.Series(0, index=positives.index), "user": positives["user"]}
    group = pick(scopes, scope, "scope of shift 'temporal'")
    if "time" not in positives:
        raise StudyError("shift 'temporal' needs a column 'time', which the data lack: choose another shift")
    ordered = positives.assign(group=group).sort_values(["group", "time", "item"], kind="stable")
    groups = ordered.groupby("group", sort=False)
    position, size = groups.cumcount(), groups["item"].transform("size")
    ties = position.groupby([ordered["group"], ordered["time"]])
    begin, end = ties.transform("min"), ties.transform("max") + 1
    wished = size - (ood_share * size).round().astype(int)
    nearer = begin.where((wished - begin <= end - wished) & (begin > 0), end)  # read at the wished cut only
    cut = nearer.where(position.eq(wished)).groupby(ordered["group"]).transform("max").fillna(size)
    return (position >= cut).reindex(positives.index).to_numpy()


def environment(positives: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """The simulator's regime 1: reversed environment frequencies, redrawn boosted items, unchanged tastes.

    Raises:
        StudyError: the data have no regimes.
    """
    if "regime" not in positives:
        raise StudyError("shift 'environment' needs a column 'regime', which only dataset 'simulated' has")
    return positives["regime"].eq(1).to_numpy()


@dataclass(frozen=True)
class Shift:
    """A way to make the out-of-distribution test.

    Attributes:
        rule: ``(positives, rng, **options) -> (N,) bool``.
        all_regimes: it sees the simulator's regime 1 too.
        exchangeable: its ood_test is drawn as its iid_test is, and is to stay so.
    """

    rule: Callable[..., np.ndarray]
    all_regimes: bool = False
    exchangeable: bool = False


SPLITS: dict[str, Shift] = {
    "iid": Shift(iid, exchangeable=True),
    "popularity": Shift(popularity),
    "temporal": Shift(temporal, all_regimes=True),
    "environment": Shift(environment, all_regimes=True),
}


def make_split(shift: str, interactions: Interactions, seed: int, **options: Any) -> pd.DataFrame:
    """Cut the positive interactions into train, validation, iid_test and ood_test.

    Args:
        shift: a name in ``SPLITS``.
        interactions: the data. On ``simulated``, ``iid`` and ``popularity`` use regime 0 only.
        seed: same seed, same rows; a study fixes one.
        options: those of `select_positives`, `cut_inner` and the shift's own function.

    Returns:
        columns user, item, time (where it exists), environment (simulator) and split, sorted by user, time,
        item. Without times each user's rows come in a seeded random order, which stands for time in
        `histories`. ``attrs["running_on"]`` tells `histories` whether a global cut in time was made.

    Raises:
        StudyError: an unknown shift or option, or data of which a split would be empty.
    """
    chosen = pick(SPLITS, shift, "shift")
    functions = (select_positives, cut_inner, chosen.rule)
    known = {name: default for function in functions for name, default in options_of(function).items()}
    options = known | check_options(options, known, f"shift {shift!r}")
    filters, inner, own = ({name: options[name] for name in options_of(function)} for function in functions)
    if not 0 < own.get("ood_share", 0.5) < 1:
        raise StudyError(f"option 'ood_share' must lie between 0 and 1, not {own['ood_share']}")
    if seed < 0:
        raise StudyError(f"the seed of a split must be 0 or more, not {seed}")
    rng = np.random.default_rng(seed)

    table = interactions.table
    if "regime" in table and not chosen.all_regimes:
        table = table[table["regime"].eq(0)]
    positives = select_positives(table, **filters)
    if "time" not in positives:  # a seeded order takes its place
        positives = positives.sample(frac=1, random_state=rng)
        positives = positives.sort_values("user", kind="stable", ignore_index=True)
    ood = chosen.rule(positives, rng, **own)
    split = cut_inner(positives, ood, rng, chosen.exchangeable, **inner)
    columns = [name for name in ("user", "item", "time", "environment", "split") if name in split]
    result = split[columns]
    for name in SPLIT_NAMES:
        if not result["split"].eq(name).any():
            raise StudyError(
                f"shift {shift!r} leaves no {name} among the {len(result)} positive interactions of dataset "
                f"{interactions.name!r}: use more data or other options"
            )
    result.attrs["running_on"] = shift == "temporal" and own["scope"] == "global"
    return result


def select_positives(
    table: pd.DataFrame,
    *,
    positive_threshold: float = 4.0,
    strict: bool = False,
    min_user: int = 5,
    min_item: int = 1,
) -> pd.DataFrame:
    """Keep the positive interactions of users and items that have enough of them.

    Positive: a rating of at least ``positive_threshold``, or above it if ``strict`` (the paper's rule).
    Enough: ``min_user`` a user and ``min_item`` an item, applied until both hold.

    Raises:
        StudyError: nothing is left.
    """
    rating = table["rating"]
    kept = table[rating > positive_threshold if strict else rating >= positive_threshold]
    while True:
        of_user = kept.groupby("user")["item"].transform("size")
        of_item = kept.groupby("item")["user"].transform("size")
        enough = (of_user >= min_user) & (of_item >= min_item)
        if enough.all():
            break
        kept = kept[enough]
    if kept.empty:
        rule = f"rating {'>' if strict else '>='} {positive_threshold:g}"
        raise StudyError(
            f"none of {len(table)} interactions is left after the filters ({rule}, then min_user={min_user} "
            f"and min_item={min_item}): lower these options"
        )
    return kept.reset_index(drop=True)


def cut_inner(
    positives: pd.DataFrame,
    ood: np.ndarray,
    rng: np.random.Generator,
    exchangeable: bool = False,
    *,
    inner: tuple[float, ...] = (7, 1, 2),
) -> pd.DataFrame:
    """Add ``split``: ood_test where ``ood``, else train, validation, iid_test at random, as ``inner``.

    An item of the OOD test that has interactions in the rest has one in train: if chance gave it none, one
    moves there. Where both tests are to stay exchangeable, every item has one, taken from whichever part.

    Raises:
        StudyError: ``inner`` is not three positive numbers.
    """
    if len(inner) != 3 or not all(isinstance(part, int | float) and part > 0 for part in inner):
        raise StudyError(f"option 'inner' must be three positive numbers (train, validation, iid_test), not {inner}")
    rest = rng.permutation(np.flatnonzero(~ood))
    edges = np.rint(np.cumsum(inner) / np.sum(inner) * len(rest)).astype(int)
    names = np.empty(len(positives), dtype=object)
    names[ood] = "ood_test"
    for name, part in zip(SPLIT_NAMES, np.split(rest, edges[:2]), strict=False):
        names[part] = name

    item = positives["item"]
    untrained = ~item.isin(item[names == "train"])
    movable = untrained if exchangeable else untrained & item.isin(item[ood]) & ~ood
    moved = item[movable].sample(frac=1, random_state=rng).drop_duplicates().index
    names[moved] = "train"
    return positives.assign(split=names.astype(str))


# --- Prompts' histories ---


def histories(split: pd.DataFrame, max_history: int = 10, running_on: bool | None = None) -> pd.DataFrame:
    """One example a row of ``split``: its item is the target, its history the user's earlier training items.

    Earlier means strictly earlier in time; in a table without times, in an earlier row of the user (see
    `make_split`). With ``running_on`` the histories of ood_test also hold the user's own earlier ood_test
    items: under a global cut in time the test period goes on for weeks, and a recommender would have seen its
    earlier part. Those pairs lie later than all training, and enter no prompt of another split.

    Args:
        split: a table of `make_split`.
        max_history: longest history, the latest items stay.
        running_on: None takes ``split.attrs["running_on"]``, which only the global temporal shift sets.

    Returns:
        columns example (0, 1, ...), split, user, item, history (list, oldest first) and environment
        (simulator), in the order of ``split``. Rows with an empty history are left out; ``attrs["dropped"]``
        counts them by split.

    Raises:
        StudyError: no history is left.
    """
    if running_on is None:
        running_on = bool(split.attrs.get("running_on", False))
    user = pd.factorize(split["user"], sort=True)[0].astype(np.int64)
    moment = pd.factorize(split["time"], sort=True)[0] if "time" in split else np.arange(len(split))
    key = user * (len(split) + 1) + moment  # orders by user, then time
    ood = split["split"].eq("ood_test").to_numpy()
    train = split["split"].eq("train").to_numpy()

    item = split["item"].to_numpy()
    item_order = pd.factorize(item, sort=True)[0]
    history = np.empty(len(split), dtype=object)
    for target, source in ((~ood, train), (ood, train | ood if running_on else train)):
        rows = np.flatnonzero(source)
        rows = rows[np.lexsort((item_order[rows], key[rows]))]
        end = np.searchsorted(key[rows], key[target], side="left")  # left: strictly earlier
        first_of_user = np.searchsorted(key[rows], user[target] * (len(split) + 1), side="left")
        begin = np.maximum(first_of_user, end - max_history)
        items = item[rows].tolist()
        found = [items[first:last] for first, last in zip(begin, end, strict=True)]
        history[target] = pd.Series(found, dtype=object).to_numpy()

    columns = [name for name in ("split", "user", "item", "environment") if name in split]
    examples = split[columns].assign(history=history)
    empty = np.array([not items for items in history], dtype=bool)
    dropped = split["split"][empty].value_counts()
    examples = examples[~empty].reset_index(drop=True)
    if examples.empty:
        raise StudyError("no interaction has an earlier training interaction of its user: no prompt can be made")
    examples.insert(0, "example", np.arange(len(examples)))
    examples = examples[["example", "split", "user", "item", "history", *columns[3:]]]
    examples.attrs["dropped"] = {name: int(dropped.get(name, 0)) for name in SPLIT_NAMES}
    return examples


# --- Popularity groups ---


def popularity_groups(train_counts: pd.Series) -> pd.DataFrame:
    """Cut a catalogue into G1 (most popular) to G5, by training counts, ties by item id.

    Args:
        train_counts: training interactions of every item (0 where there are none), indexed by item id.

    Returns:
        item, train_count, ``group_mass`` (five groups of equal training mass: an item belongs where the items
        before it leave off, at 20, 40, 60, 80 %) and ``group_items`` (the trained items in five groups of
        equal size), in the index's order. Items never trained on are in G5 of both.
    """
    counts = train_counts.rename("train_count").rename_axis("item").reset_index()
    ranked = counts[counts["train_count"] > 0].sort_values(["train_count", "item"], ascending=[False, True])
    before = ranked["train_count"].cumsum() - ranked["train_count"]
    names = np.array(GROUPS)
    by_mass = pd.Series(names[5 * before // ranked["train_count"].sum()], index=ranked.index, dtype=object)
    place = np.arange(len(ranked))
    by_items = pd.Series(names[5 * place // max(len(ranked), 1)], index=ranked.index, dtype=object)
    return counts.assign(
        group_mass=by_mass.reindex(counts.index, fill_value="G5").astype(str),
        group_items=by_items.reindex(counts.index, fill_value="G5").astype(str),
    )


# --- Helpers ---


def _rank_within_item(positives: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """(N,) random order 0, 1, ... among the interactions of the same item."""
    shuffled = positives["item"].iloc[rng.permutation(len(positives))]
    return shuffled.groupby(shuffled).cumcount().reindex(positives.index).to_numpy()
