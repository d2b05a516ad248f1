"""Shifts between training and test, as data: one table of positive interactions with a column ``split``.

Every shift marks the interactions of the out-of-distribution test; the rest is cut into train, validation and iid
test. Sources: CausalDPO's Appendix B.1 (arXiv 2603.22335), with the readings stated at each shift. What the paper
leaves open is a named option with a default: those of `select_positives`, `cut_inner`, `drop_unseen` and the shift.

The leakage rule (`histories`): prompts hold training interactions of strictly earlier time only, so no
held-out (user, item) pair appears in any prompt or training target of train, validation and iid test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from causaldpo_lib.cuts import codes, flattest, latest, run_starts
from causaldpo_lib.data.interactions import Interactions
from causaldpo_lib.data.options import check_options, options_of
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.exposure import expose

SPLIT_NAMES = ("train", "validation", "iid_test", "ood_test")
GROUPS = ("G1", "G2", "G3", "G4", "G5")
CHUNK = 1 << 20  # examples whose histories are gathered at a time, which bounds what is held beside the result


# --- Shifts: positives -> which of them are the out-of-distribution test ---


def iid(positives: pd.DataFrame, rng: np.random.Generator, *, ood_share: float = 0.2) -> np.ndarray:
    """No shift, the control: the test is drawn at random.

    Options:
        ``ood_share``: share of the interactions, drawn at random, that make the out-of-distribution test.
    """
    ood = np.zeros(len(positives), dtype=bool)
    ood[rng.choice(len(positives), round(ood_share * len(positives)), replace=False)] = True
    return ood


def popularity(
    positives: pd.DataFrame, rng: np.random.Generator, *, ood_share: float = 0.2, cap: int = 0
) -> np.ndarray:
    """Balanced popularity in the test: as few interactions of each item as reach ``ood_share`` together.

    Item i with n_i interactions gives min(c, n_i // 2) at random, with the smallest c whose sum reaches the
    target; the surplus is taken back at random from the items that gave c. So the test's histogram over
    items is as flat as it can be while every item keeps at least half of its interactions. (The paper:
    "maintaining a balanced distribution of item popularity", no rule given.)

    Options:
        ``ood_share``: share of the interactions that the test aims at, as evenly over items as they allow.
        ``cap``: most test interactions of an item, which may leave the test smaller than its share; 0: no bound.

    Raises:
        StudyError: a negative cap.
    """
    if cap < 0:
        raise StudyError(f"option 'cap' of shift 'popularity' must be 0 (no cap) or more, not {cap}")
    item = codes(positives["item"])
    most = np.bincount(item) // 2
    return flattest(item, np.minimum(most, cap) if cap else most, round(ood_share * len(positives)), rng)


def temporal(
    positives: pd.DataFrame, rng: np.random.Generator, *, ood_share: float = 0.2, scope: str = "global"
) -> np.ndarray:
    """The latest ``ood_share`` of all interactions (scope ``global``) or of each user's (``user``, as B.1).

    Interactions of the same time are never cut apart: the cut moves to the nearer end of theirs, so the share
    is approximate, and a user whose interactions all have one time gives none.

    Options:
        ``ood_share``: share of the interactions, the latest ones, that make the test.
        ``scope``: whose latest: ``global``, one cut in time for all, or ``user``, a cut for each user (B.1).

    Raises:
        StudyError: the data have no times, or an unknown scope.
    """
    column = pick({"global": None, "user": "user"}, scope, "scope of shift 'temporal'")
    time = _times(positives, "shift 'temporal'", "choose another shift")
    return latest(codes(positives[column]) if column else np.zeros(len(time), dtype=int), time, ood_share)


def _times(table: pd.DataFrame, what: str, remedy: str) -> np.ndarray:
    """(N,) the column ``time``, which ``what`` cannot do without."""
    if "time" not in table:
        raise StudyError(f"{what} needs a column 'time', which the data lack: {remedy}")
    return table["time"].to_numpy()


def environment(positives: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """The simulator's regime 1: reversed environment frequencies, redrawn boosted items, unchanged tastes.

    Raises:
        StudyError: the data have no regimes.
    """
    if "regime" not in positives:
        raise StudyError("shift 'environment' needs a column 'regime', which only dataset 'simulated' has")
    return positives["regime"].eq(1).to_numpy()


def mixed(positives: pd.DataFrame, rng: np.random.Generator, *, ood_share: float = 0.2) -> np.ndarray:
    """Both pools of the mixed test: the latest ``ood_share`` of all, and `popularity`'s share of what is earlier.

    The pools are disjoint, as one lies after the global cut in time and one before it; `draw_mixture` draws the test
    from them. Training is what is earlier than the cut and in neither pool.

    Options:
        ``ood_share``: size of each pool: this share of all interactions, the latest ones, and then this share of the
            earlier ones, balanced over items.

    Raises:
        StudyError: the data have no times.
    """
    _times(positives, "shift 'mixed'", "choose another shift")
    ood = temporal(positives, rng, ood_share=ood_share)
    ood[~ood] = popularity(positives[~ood], rng, ood_share=ood_share)
    return ood


# --- Shifts whose test is completed once the rest is cut: (split, all ratings, rng, **options) -> split ---


def draw_mixture(
    split: pd.DataFrame,
    ratings: pd.DataFrame,
    rng: np.random.Generator,
    *,
    ood_share: float = 0.2,
    popular_share: float = 0.8,
) -> pd.DataFrame:
    """Draw the mixed test without replacement: ``popular_share`` from the popularity pool, the rest from the future.

    The shares are exact: with popular_share = a / b, b at most 100, the test has b k interactions for the largest k
    that both pools can serve, T = min(|O1| / share, |O2| / (1 - share)) up to that rounding. What is not drawn is in
    no split. (B.1: 80 % and 20 %; that interactions are its unit is this study's reading.)

    Options:
        ``ood_share``: that of `mixed`, by which the pool of the future is found again.
        ``popular_share``: share of the test that comes from the popularity pool; the rest comes from the future.

    Raises:
        StudyError: ``popular_share`` is not between 0.01 and 0.99.
    """
    share = Fraction(popular_share).limit_denominator(100)
    if not 0 < share < 1:
        raise StudyError(f"option 'popular_share' must lie between 0.01 and 0.99, not {popular_share}")
    parts = (share.numerator, share.denominator - share.numerator)
    future = temporal(split, rng, ood_share=ood_share)
    ood = split["split"].eq("ood_test").to_numpy()
    pools = [np.flatnonzero(ood & ~future), np.flatnonzero(future)]
    times = min(len(pool) // part for pool, part in zip(pools, parts, strict=True))
    kept = ~ood
    for pool, part in zip(pools, parts, strict=True):
        kept[rng.choice(pool, times * part, replace=False)] = True
    return split[kept]


@dataclass(frozen=True)
class Shift:
    """A way to make the out-of-distribution test.

    Attributes:
        rule: ``(positives, rng, **options) -> (N,) bool``.
        complete: ``(split, ratings, rng, **options) -> split``, what is done to the test once the rest is cut;
            ``ratings`` are all of the data's, positive or not. None: nothing.
        all_regimes: it sees the simulator's regime 1 too.
        exchangeable: its ood_test is drawn as its iid_test is, and is to stay so.
    """

    rule: Callable[..., np.ndarray]
    complete: Callable[..., pd.DataFrame] | None = None
    all_regimes: bool = False
    exchangeable: bool = False


SPLITS: dict[str, Shift] = {
    "iid": Shift(iid, exchangeable=True),
    "popularity": Shift(popularity),
    "temporal": Shift(temporal, all_regimes=True),
    "environment": Shift(environment, all_regimes=True),
    "exposure": Shift(iid, complete=expose),
    "mixed": Shift(mixed, complete=draw_mixture, all_regimes=True),
}


def shift_functions(shift: str) -> list[Callable[..., Any]]:
    """The functions whose keyword-only arguments are the options of a shift: those of every split, then its own.

    Raises:
        StudyError: an unknown shift.
    """
    chosen = pick(SPLITS, shift, "shift")
    return [select_positives, cut_inner, drop_unseen, chosen.rule, *filter(None, [chosen.complete])]


def make_split(shift: str, interactions: Interactions, seed: int, **options: Any) -> pd.DataFrame:
    """Cut the positive interactions into train, validation, iid_test and ood_test.

    Args:
        shift: a name in ``SPLITS``.
        interactions: the data. On ``simulated``, ``iid``, ``popularity`` and ``exposure`` use regime 0 only.
        seed: same seed, same rows; a study fixes one.
        options: those of `select_positives` (whose rule for positives is by default the dataset's own),
            `cut_inner`, `drop_unseen` and the shift's own function or functions.

    Returns:
        columns user, item, time (where it exists), environment (simulator), split and, under ``exposure``,
        imputed; sorted by user, time, item. Without times each user's rows come in a seeded random order, which
        stands for time in `histories`. ``attrs["running_on"]`` tells `histories` whether a global cut in time was
        made.

    Raises:
        StudyError: an unknown shift or option, or data of which a split would be empty.
    """
    functions, chosen = shift_functions(shift), SPLITS[shift]
    known = {name: default for function in functions for name, default in options_of(function).items()}
    known |= {"positive_threshold": interactions.positive_threshold, "strict": interactions.strict}
    options = known | check_options(options, known, f"shift {shift!r}")
    filters, inner, unseen, own, *last = (
        {name: options[name] for name in options_of(function)} for function in functions
    )
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
    if chosen.complete:
        split = chosen.complete(split, table, rng, **last[0])
    split = drop_unseen(split, **unseen)
    columns = [name for name in ("user", "item", "time", "environment", "split", "imputed") if name in split]
    result = split[columns].reset_index(drop=True)
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
    filter_order: str = "positives_first",
    iterative: bool = True,
) -> pd.DataFrame:
    """Keep the positive interactions of users and items that have enough of them.

    Options:
        ``positive_threshold``: the least rating that is positive; a dataset's own rule comes before the default.
        ``strict``: whether a positive rating has to be above ``positive_threshold`` (the paper's rule).
        ``min_user``: interactions that a user needs to be kept.
        ``min_item``: positive interactions that an item needs to be kept.
        ``filter_order``: ``positives_first``: ``min_user`` counts positive interactions; ``users_first``: those of
            any rating, before the positive ones are taken.
        ``iterative``: whether ``min_user`` and ``min_item`` are applied until both hold, or once to the same counts.

    Raises:
        StudyError: an unknown order, or nothing is left.
    """
    users_first = pick({"positives_first": False, "users_first": True}, filter_order, "filter order")
    kept = _with_enough(table, min_user, 1, False) if users_first else table
    rating = kept["rating"]
    kept = kept[rating > positive_threshold if strict else rating >= positive_threshold]
    kept = _with_enough(kept, 1 if users_first else min_user, min_item, iterative)
    if kept.empty:
        rule = f"rating {'>' if strict else '>='} {positive_threshold:g}"
        raise StudyError(
            f"none of {len(table)} interactions is left after the filters ({rule}, min_user={min_user}, "
            f"min_item={min_item}, {filter_order}): lower these options"
        )
    return kept.reset_index(drop=True)


def _with_enough(table: pd.DataFrame, min_user: int, min_item: int, iterative: bool) -> pd.DataFrame:
    """Rows of users with ``min_user`` rows and items with ``min_item``, once or until both hold (a k-core)."""
    user, item = codes(table["user"]), codes(table["item"])
    rows = np.arange(len(table))
    while True:
        enough = (np.bincount(user)[user] >= min_user) & (np.bincount(item)[item] >= min_item)
        if enough.all():
            return table.iloc[rows] if len(rows) < len(table) else table
        rows, user, item = rows[enough], user[enough], item[enough]
        if not iterative:
            return table.iloc[rows]


def cut_inner(
    positives: pd.DataFrame,
    ood: np.ndarray,
    rng: np.random.Generator,
    exchangeable: bool = False,
    *,
    inner: tuple[float, ...] = (7, 1, 2),
    inner_order: str = "random",
) -> pd.DataFrame:
    """Add ``split``: ood_test where ``ood``, else train, validation, iid_test in the shares of ``inner``.

    Options:
        ``inner``: parts that train, validation and iid_test get of what is not ood_test. (Those of the paper; its
            authors' released splits of a sibling project are 5:1:2.)
        ``inner_order``: how these are cut: ``random``, which makes iid_test what its name says, or ``chronological``:
            train before validation before iid_test, for all users at once. (The paper does not say.)

    An item of the OOD test that has interactions in the rest has one in train: if the cut gave it none, one
    moves there. Where both tests are to stay exchangeable, every item has one, taken from whichever part.

    Raises:
        StudyError: ``inner`` is not three positive numbers, an unknown order, or no times for the chronological one.
    """
    if len(inner) != 3 or not all(isinstance(part, int | float) and part > 0 for part in inner):
        raise StudyError(f"option 'inner' must be three positive numbers (train, validation, iid_test), not {inner}")
    rest = np.flatnonzero(~ood)
    part = np.full(len(positives), SPLIT_NAMES.index("ood_test"))
    if pick({"random": False, "chronological": True}, inner_order, "option 'inner_order'"):
        time = _times(positives, "'inner_order' chronological", "choose random")[rest]
        tested = latest(np.zeros(len(rest), dtype=int), time, inner[2] / sum(inner))
        early = np.flatnonzero(~tested)
        part[rest] = 2 * tested
        part[rest[early]] = latest(np.zeros(len(early), dtype=int), time[early], inner[1] / sum(inner[:2]))
    else:
        edges = np.rint(np.cumsum(inner) / np.sum(inner) * len(rest)).astype(int)
        part[rng.permutation(rest)] = np.repeat([0, 1, 2], np.diff(edges, prepend=0))

    item = codes(positives["item"])
    trained, tested = np.zeros((2, item.max() + 1), dtype=bool)
    trained[item[part == 0]] = True
    tested[item[ood]] = True
    movable = ~trained[item] if exchangeable else ~trained[item] & tested[item] & ~ood
    moved = positives["item"][movable].sample(frac=1, random_state=rng).drop_duplicates().index
    part[moved] = 0
    return positives.assign(split=pd.Index(SPLIT_NAMES).take(part).array)


def drop_unseen(split: pd.DataFrame, *, unseen: str = "keep") -> pd.DataFrame:
    """What becomes of OOD interactions whose item has none in train, such as a new item of the test period.

    Under ``popularity`` there are none (see `cut_inner`).

    Options:
        ``unseen``: OOD interactions of items without training: ``keep``, as a new item is part of a shift in time, or
            ``drop``, as the authors' released splits of a sibling project do.

    Raises:
        StudyError: an unknown choice.
    """
    if not pick({"keep": False, "drop": True}, unseen, "option 'unseen'"):
        return split
    trained = split["item"].isin(split.loc[split["split"].eq("train"), "item"].unique())
    return split[trained | split["split"].ne("ood_test")]


# --- Prompts' histories ---


def histories(split: pd.DataFrame, max_history: int = 10, running_on: bool | None = None) -> pd.DataFrame:
    """`history_table` in pandas, where a Python list an example is no burden.

    Returns:
        its columns; ``attrs["dropped"]`` counts the rows left out by split.
    """
    table = history_table(split, max_history, running_on)
    examples = table.drop_columns("history").to_pandas()
    examples.insert(table.schema.get_field_index("history"), "history", table["history"].to_pylist())
    dropped = split["split"].value_counts().sub(examples["split"].value_counts(), fill_value=0)
    examples.attrs["dropped"] = {name: int(dropped.get(name, 0)) for name in SPLIT_NAMES}
    return examples


def history_table(split: pd.DataFrame, max_history: int = 10, running_on: bool | None = None) -> pa.Table:
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
        columns example (0, 1, ...), split, user, item, history (list of item ids, oldest first), time (the target's,
        where it exists) and environment (simulator), in the order of ``split``. Rows with an empty history are left
        out. In Arrow: a history costs its ids and one offset, and the table is written to Parquet as it is.

    Raises:
        StudyError: no history is left.
    """
    if running_on is None:
        running_on = bool(split.attrs.get("running_on", False))
    source, begin, end = _windows(split, max_history, running_on)
    kept = np.flatnonzero(end > begin)
    if not len(kept):
        raise StudyError("no interaction has an earlier training interaction of its user: no prompt can be made")
    item = pa.table({"item": split["item"]})["item"].combine_chunks()
    chunks = []
    for rows in np.split(kept, range(CHUNK, len(kept), CHUNK)):
        offsets = np.concatenate([[0], np.cumsum(end[rows] - begin[rows])])
        place = np.arange(offsets[-1]) + np.repeat(begin[rows] - offsets[:-1], np.diff(offsets))
        chunks.append(pa.ListArray.from_arrays(offsets.astype(np.int32), item.take(pa.array(source[place]))))
    names = [name for name in ("split", "user", "item", "time", "environment") if name in split]
    table = pa.table({"example": np.arange(len(kept)), **{name: split[name].take(kept) for name in names}})
    return table.add_column(4, "history", pa.chunked_array(chunks))


def _windows(split: pd.DataFrame, max_history: int, running_on: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Histories as windows of one list of rows by user, time and item: rows source[begin[n]:end[n]] precede row n.

    The list holds all training rows and, where ood_test runs on, then a second time with the rows of ood_test.
    """
    size = len(split)
    user = codes(split["user"])
    moment = split["time"].to_numpy() if "time" in split else np.arange(size)
    order = np.lexsort((pd.factorize(split["item"], sort=True)[0], moment, user))
    of_user = run_starts(user[order])
    of_moment = np.maximum(of_user, run_starts(moment[order]))
    ood = split["split"].eq("ood_test").to_numpy()[order]
    train = split["split"].eq("train").to_numpy()[order]

    begin, end = np.empty((2, size), dtype=np.int64)
    source = np.empty(0, dtype=np.int64)
    for mine, seen in ((~ood, train), (ood, train | ood)) if running_on else ((np.ones(size, dtype=bool), train),):
        before = np.concatenate([[0], np.cumsum(seen)])  # rows of this part of the list before each position
        last = before[of_moment[mine]]
        end[order[mine]] = len(source) + last
        begin[order[mine]] = len(source) + np.maximum(before[of_user[mine]], last - max_history)
        source = np.concatenate([source, order[seen]])
    return source, begin, end


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
