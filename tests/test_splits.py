"""Properties of every shift, the leakage rule, and a check that the leak would be caught."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causaldpo_lib import splits
from causaldpo_lib.cuts import flattest, latest
from causaldpo_lib.data import Interactions, load_dataset
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import data_folder
from causaldpo_lib.prompts import prompt_batches, prompt_table, prompt_text, response_text
from causaldpo_lib.splits import (
    SPLIT_NAMES,
    SPLITS,
    cut_inner,
    drop_unseen,
    histories,
    history_table,
    make_split,
    popularity_groups,
    select_positives,
)


def ratings(seed: int = 0, users: int = 60, items: int = 80, distinct_times: int = 40) -> Interactions:
    """Long-tailed ratings 1 to 5, of tastes that a model can find, with very many equal times, as in MovieLens."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, items + 1) ** 0.8
    tastes, traits = rng.normal(0, 1, (users, 2)), rng.normal(0, 1, (items, 2))
    rows = [
        (user, int(item), float(np.clip(np.rint(rng.normal(3.6 + tastes[user] @ traits[item], 0.5)), 1, 5)),
         int(rng.integers(distinct_times)) + 3 * user)
        for user in range(users)
        for item in rng.choice(items, size=rng.integers(12, 40), replace=False, p=odds / odds.sum())
    ]  # fmt: skip
    return interactions("ratings", pd.DataFrame(rows, columns=["user", "item", "rating", "time"]), items)


def interactions(name: str, table: pd.DataFrame, items: int) -> Interactions:
    """A dataset of a table, sorted as loaders leave it."""
    catalogue = pd.DataFrame({"item": range(items), "title": [f"Title {item}" for item in range(items)]})
    order = [column for column in ("user", "time", "item") if column in table]
    return Interactions(name, table.sort_values(order, ignore_index=True), catalogue)


def without_times(data: Interactions) -> Interactions:
    """The same with text ids and no times, as Book-Crossing has them."""
    table = data.table.drop(columns="time").astype({"user": str}).assign(item=data.table["item"].map("i{:03}".format))
    return Interactions("timeless", table, data.items.assign(item=data.items["item"].map("i{:03}".format)))


def small_users(data: Interactions) -> Interactions:
    """The same cut up into users of one to four interactions."""
    user = data.table["user"]
    part = user.groupby(user).cumcount() // (1 + user % 4)
    return interactions("small", data.table.assign(user=100 * user + part), len(data.items))


DATA = {
    "simulated": load_dataset("simulated", users=80, items=60, length=25),
    "ratings": ratings(),
    "timeless": without_times(ratings()),
    "sittings": ratings(distinct_times=2),  # a user has all interactions at one of two times
    "small": small_users(ratings()),
}
OPTIONS = {"small": {"min_user": 1}}
VARIANTS = {
    "popularity": [{}, {"cap": 2}],
    "temporal": [{}, {"scope": "user"}],
    "exposure": [{}, {"variant": "propensity"}],
}


def refusal(data: Interactions, shift: str, options: dict) -> str | None:
    """Why a shift has no meaning for a dataset, in a word of the message; None where it has."""
    lacking = {
        "column 'time'": shift in ("temporal", "mixed") and "time" not in data.table,
        "column 'regime'": shift == "environment" and "regime" not in data.table,
        "ratings are equal": shift == "exposure" and not options and data.table["rating"].nunique() == 1,
    }
    return next((word for word, holds in lacking.items() if holds), None)


# Every fixture under every shift: a newcomer in SPLITS is checked with its defaults.
EVERY = [(name, shift, variant) for name in DATA for shift in SPLITS for variant in VARIANTS.get(shift, [{}])]
over_settings = pytest.mark.parametrize(
    ("data", "shift", "options"),
    [pytest.param(DATA[name], shift, variant | OPTIONS.get(name, {}), id=f"{name}-{shift}-{[*variant.values()]}")
     for name, shift, variant in EVERY if not refusal(DATA[name], shift, variant)],
)  # fmt: skip


def positives_of(data: Interactions, shift: str, options: dict) -> pd.DataFrame:
    """What `make_split` cuts, with the default rule for positives."""
    table = data.table
    if "regime" in table and not SPLITS[shift].all_regimes:
        table = table[table["regime"].eq(0)]
    return select_positives(table, min_user=options.get("min_user", 5))


def leaks(split: pd.DataFrame, examples: pd.DataFrame, running_on: bool = False) -> set[str]:
    """The ways in which ``examples`` break the leakage rule; a test below shows that it sees each of them."""
    of_pair = split.set_index(["user", "item"])["split"]
    moment = split["time"] if "time" in split else pd.Series(np.arange(len(split)), index=split.index)
    when = pd.Series(moment.to_numpy(), index=of_pair.index)
    prompts = examples.explode("history").rename(columns={"item": "target", "history": "item"})
    source = of_pair.reindex(pd.MultiIndex.from_frame(prompts[["user", "item"]])).to_numpy()
    before = when.reindex(pd.MultiIndex.from_frame(prompts[["user", "item"]])).to_numpy()
    target = when.reindex(
        pd.MultiIndex.from_frame(prompts[["user", "target"]].rename(columns={"target": "item"}))
    ).to_numpy()
    ood_prompt = prompts["split"].eq("ood_test").to_numpy()
    allowed = (source == "train") | (running_on & ood_prompt & (source == "ood_test"))
    targets = of_pair.reindex(pd.MultiIndex.from_frame(examples[["user", "item"]])).to_numpy()
    found = {
        "a held-out pair in a prompt of train, validation or iid_test": (~allowed & ~ood_prompt).any(),
        "a held-out pair in a prompt of ood_test": (~allowed & ood_prompt).any(),
        "a pair of the future in a prompt": (before >= target).any(),
        "a held-out pair as a training target": (targets != examples["split"].to_numpy()).any(),
    }
    return {name for name, present in found.items() if present}


def gini(counts: pd.Series) -> float:
    """0: all items equally often; towards 1: one item takes all."""
    ordered = np.sort(counts.to_numpy(dtype=float))
    size = len(ordered)
    return float((2 * np.arange(1, size + 1) - size - 1) @ ordered / (size * ordered.sum()))


# --- Splits ---


@over_settings
def test_splits_are_disjoint_positive_and_none_is_empty(data, shift, options):
    split = make_split(shift, data, 0, **options)
    assert set(split["split"]) == set(SPLIT_NAMES)
    assert not split.duplicated(["user", "item"]).any()
    imputed = split["imputed"] if "imputed" in split else pd.Series(False, index=split.index)
    positives = positives_of(data, shift, options)
    shared = [column for column in ("user", "item", "time", "environment") if column in split]
    known = split[~imputed].merge(positives, on=shared)
    assert len(known) == (~imputed).sum()  # the very rows of the source
    invented = split[imputed].merge(data.table, on=["user", "item"])
    assert invented.empty and split.loc[imputed, "split"].eq("ood_test").all()
    assert set(split["user"]) <= set(positives["user"]) and set(split["item"]) <= set(positives["item"])
    if shift not in ("exposure", "mixed"):  # which use a part of their test
        assert len(split) == len(positives)
    expected = ["user", "item", *(c for c in ("time", "environment") if c in data.table), "split"]
    assert list(split.columns) == expected + ["imputed"] * (shift == "exposure")
    assert split.index.equals(pd.RangeIndex(len(split)))


@pytest.mark.parametrize(("name", "shift", "variant"), EVERY)
def test_a_shift_without_meaning_is_refused(name, shift, variant):
    word = refusal(DATA[name], shift, variant)
    if word:
        with pytest.raises(StudyError, match=word):
            make_split(shift, DATA[name], 0, **variant, **OPTIONS.get(name, {}))


@over_settings
def test_ratios(data, shift, options):
    split = make_split(shift, data, 0, **options)
    counts = split["split"].value_counts()
    if "cap" not in options and options.get("scope") != "user":  # fewer, and ties of small users weigh
        share = 0.1 if options.get("variant") == "propensity" else 0.2
        positives = len(positives_of(data, shift, options))
        assert counts["ood_test"] / positives == pytest.approx(share, abs=0.03)
    inner = counts[["train", "validation", "iid_test"]] / counts.drop("ood_test").sum()
    np.testing.assert_allclose(inner, [0.7, 0.1, 0.2], atol=0.03)
    other = make_split(shift, data, 0, inner=[5, 1, 4], **options)["split"].value_counts()
    assert other["iid_test"] == pytest.approx(4 * other["validation"], rel=0.15)


@over_settings
def test_same_seed_same_rows_other_seed_other_rows(data, shift, options):
    first, again, other = (make_split(shift, data, seed, **options) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


@over_settings
def test_rows_are_ordered_by_user_time_and_item(data, shift, options):
    split = make_split(shift, data, 0, **options)
    order = [column for column in ("user", "time", "item") if column in split]
    if "time" in order:
        pd.testing.assert_frame_equal(split, split.sort_values(order, ignore_index=True))
    else:  # a seeded random order within each user
        assert split["user"].is_monotonic_increasing
        assert split.groupby("user")["item"].apply(lambda items: items.is_monotonic_increasing).mean() < 0.1


@over_settings
def test_the_order_of_the_source_does_not_matter(data, shift, options):
    if "time" not in data.table:
        pytest.skip("without times the order of the source is all there is")
    shuffled = data.table.sample(frac=1, random_state=1).sort_values(["user", "time", "item"], ignore_index=True)
    pd.testing.assert_frame_equal(
        make_split(shift, data, 0, **options), make_split(shift, replace(data, table=shuffled), 0, **options)
    )


@pytest.mark.parametrize("name", ["simulated", "ratings", "timeless"])
def test_popularity_shift_flattens_the_test_and_leaves_every_item_trained(name):
    split = make_split("popularity", DATA[name], 0)
    counts = split.groupby("split")["item"].value_counts().unstack(0, fill_value=0)
    ood = counts.loc[counts["ood_test"] > 0, "ood_test"]
    iid = counts.loc[counts["iid_test"] > 0, "iid_test"]
    assert gini(ood) < 0.5 * gini(iid)
    assert (counts.loc[ood.index, "train"] >= 1).all()
    # as flat as can be: only an item that gave half of its interactions may give less than the cap and one
    short = ood < ood.max() - 1
    assert (ood[short] == counts.loc[ood.index].sum(axis=1)[short] // 2).all()


@pytest.mark.parametrize("name", ["ratings", "timeless"])
def test_cap_bounds_what_an_item_gives(name):
    capped = make_split("popularity", DATA[name], 0, cap=3, ood_share=0.4)
    counts = capped[capped["split"] == "ood_test"]["item"].value_counts()
    whole = capped["item"].value_counts()
    assert counts.max() == 3
    assert counts.reindex(whole.index, fill_value=0).equals((whole // 2).clip(upper=3).rename("count"))
    loose = make_split("popularity", DATA[name], 0, cap=1000)  # more than an item would give
    pd.testing.assert_frame_equal(loose, make_split("popularity", DATA[name], 0))


@settings(max_examples=60, deadline=None)
@given(
    item=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    least=st.integers(0, 3),
    target=st.integers(0, 40),
    seed=st.integers(0, 3),
)
def test_flattest_takes_from_every_item_alike(item, least, target, seed):
    item = pd.factorize(pd.Series(item))[0]
    most = np.maximum(np.bincount(item) - least, 0)
    taken = np.bincount(item[flattest(item, most, target, np.random.default_rng(seed))], minlength=len(most))
    assert taken.sum() == min(target, most.sum())
    assert (taken <= most).all()
    assert (taken[taken < most] >= taken.max() - 1).all()  # who could give more gives as much as anybody, up to one


def test_flattest_takes_any_row_of_an_item():
    item, most = np.repeat([0, 1], [10, 4]), np.array([5, 2])
    taken = sum(flattest(item, most, 4, np.random.default_rng(seed)).astype(int) for seed in range(400))
    np.testing.assert_allclose(taken / 400, np.repeat([2 / 10, 2 / 4], [10, 4]), atol=0.09)


@pytest.mark.parametrize("name", ["simulated", "ratings", "sittings"])
@pytest.mark.parametrize(("popular_share", "parts"), [(0.8, (4, 1)), (0.75, (3, 1)), (0.5, (1, 1))])
def test_mixed_test_has_exact_shares_of_both_pools(name, popular_share, parts):
    data = DATA[name]
    split = make_split("mixed", data, 0, popular_share=popular_share)
    late = positives_of(data, "mixed", {})[SPLITS["temporal"].rule(positives_of(data, "mixed", {}), None)]
    ood = split["split"].eq("ood_test")
    future = split["time"] >= late["time"].min()
    assert (ood & future).sum() * parts[0] == (ood & ~future).sum() * parts[1] > 0
    assert not (future & ~ood).any()  # nothing else is from the future window
    past = split[~future]
    counts = past.groupby("split")["item"].value_counts().unstack(0, fill_value=0)
    drawn = counts.loc[counts["ood_test"] > 0, "ood_test"]
    assert gini(drawn) < gini(counts.loc[counts["iid_test"] > 0, "iid_test"])
    assert (counts.loc[drawn.index, "train"] >= 1).all()
    unused = len(positives_of(data, "mixed", {})) - len(split)
    whole = 0.2 * len(positives_of(data, "mixed", {}))
    assert unused == pytest.approx(0.8 * whole if popular_share == 0.8 else unused, rel=0.1)


@pytest.mark.parametrize("name", ["simulated", "ratings"])
def test_iid_shift_is_none(name):
    means = []
    for seed in range(20):
        split = make_split("iid", DATA[name], seed)
        counts = split.groupby("split")["item"].value_counts().unstack(0, fill_value=0)
        assert (counts["train"] >= 1).all()
        popularity = split["item"].map(counts.sum(axis=1))
        means.append(popularity.groupby(split["split"]).mean())
    of_both = pd.DataFrame(means)[["ood_test", "iid_test"]].mean()
    assert of_both["ood_test"] == pytest.approx(of_both["iid_test"], rel=0.03)


@pytest.mark.parametrize("name", ["simulated", "ratings"])
def test_global_temporal_test_is_later_than_everything_else(name):
    split = make_split("temporal", DATA[name], 0)
    ood = split["split"].eq("ood_test")
    assert split[~ood]["time"].max() < split[ood]["time"].min()
    assert split.attrs["running_on"] is True


@pytest.mark.parametrize("name", ["simulated", "ratings"])
def test_temporal_test_by_user_is_later_than_the_rest_of_that_user(name):
    split = make_split("temporal", DATA[name], 0, scope="user")
    ood = split["split"].eq("ood_test")
    last, first = split[~ood].groupby("user")["time"].max(), split[ood].groupby("user")["time"].min()
    assert (last.reindex(first.index) < first).all()
    assert split.attrs["running_on"] is False


@settings(max_examples=40, deadline=None)
@given(
    times=st.lists(st.integers(0, 6), min_size=12, max_size=40),
    scope=st.sampled_from(["global", "user"]),
    seed=st.integers(0, 3),
)
def test_equal_times_are_never_cut_apart(times, scope, seed):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"user": np.arange(len(times)) % 2, "item": range(len(times)), "time": times})
    table = table.assign(rating=5.0).sample(frac=1, random_state=rng).reset_index(drop=True)
    ood = pd.Series(SPLITS["temporal"].rule(table, rng, scope=scope, ood_share=0.3), index=table.index)
    for _, part in table.groupby("user") if scope == "user" else [(0, table)]:
        late, early = part[ood[part.index]], part[~ood[part.index]]
        assert len(early) > 0
        assert late.empty or early["time"].max() < late["time"].min()
        if part["time"].nunique() == 1:
            assert late.empty


@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=30),
    share=st.sampled_from([0.1, 0.2, 0.5, 0.8]),
)
def test_latest_cuts_at_the_nearer_end_of_equal_times(times, share):
    group, time_ = pd.factorize(pd.Series([g for g, _ in times]))[0], np.array([t for _, t in times])
    late = latest(group, time_, share)
    for each in range(group.max() + 1):
        mine = np.sort(time_[group == each])
        wished = len(mine) - round(share * len(mine))
        ends = [cut for cut in range(1, len(mine)) if mine[cut - 1] < mine[cut]] + [len(mine)]
        cut = min(ends, key=lambda end: abs(end - wished)) if wished < len(mine) else len(mine)
        assert late[group == each].sum() == len(mine) - cut
        assert (np.sort(time_[(group == each) & late]) == mine[cut:]).all()


def test_environment_shift_is_the_simulators_second_regime():
    data = DATA["simulated"]
    split = make_split("environment", data, 0).merge(data.table, on=["user", "item"])
    assert split["regime"].eq(1).equals(split["split"].eq("ood_test"))
    for shift in ("iid", "popularity"):
        used = make_split(shift, data, 0).merge(data.table, on=["user", "item"])
        assert used["regime"].eq(0).all()


def test_positives_are_filtered_before_users_and_items():
    table = pd.DataFrame(
        {
            "user": ["a"] * 4 + ["b"] * 4 + ["c"] * 2,
            "item": [1, 2, 3, 4, 1, 2, 3, 5, 1, 2],
            "rating": [4, 5, 4, 5, 4, 4, 5, 3, 5, 5],
        }
    )
    assert len(select_positives(table, min_user=1)) == 9
    assert len(select_positives(table, min_user=1, strict=True)) == 5
    assert select_positives(table, min_user=3)["user"].unique().tolist() == ["a", "b"]
    # item 4 has one positive, without which user a keeps three; user c goes, items 1 and 2 keep two users
    assert set(select_positives(table, min_user=3, min_item=2)["item"]) == {1, 2, 3}


def test_filter_order_and_a_single_pass():
    table = pd.DataFrame(
        {
            "user": ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"],
            "item": [1, 2, 3, 4, 1, 2, 3, 1, 4, 4],
            "rating": [5, 5, 5, 5, 5, 2, 2, 5, 5, 5],
        }
    )
    left = {
        order: select_positives(table, min_user=3, filter_order=order) for order in ("positives_first", "users_first")
    }
    assert left["positives_first"]["user"].unique().tolist() == ["a"]
    assert left["users_first"]["user"].tolist() == ["a"] * 4 + ["b"]  # three ratings, one of them positive
    # Items 2 and 3 have one positive: without them a keeps items 1 and 4, d its one positive goes in both.
    once = select_positives(table, min_user=2, min_item=2, iterative=False)
    assert once[["user", "item"]].values.tolist() == [["a", 1], ["a", 4], ["c", 1], ["c", 4]]
    chain = pd.DataFrame({"user": [1, 1, 2, 2, 3, 3], "item": [1, 2, 2, 3, 3, 4], "rating": 5.0})
    assert len(select_positives(chain, min_user=1, min_item=2, iterative=False)) == 4
    with pytest.raises(StudyError, match="none of 6"):  # each pass takes the ends of the chain
        select_positives(chain, min_user=2, min_item=2)


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30),
    least=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_core_is_the_largest_table_that_satisfies_both_counts(pairs, least):
    table = pd.DataFrame(sorted(pairs), columns=["user", "item"]).assign(rating=5.0)
    core = set(pairs)
    while weak := {pair for pair in core if any(sum(pair[k] == other[k] for other in core) < least[k] for k in (0, 1))}:
        core.remove(min(weak))  # one at a time: the order makes no difference to a core
    if core:
        found = select_positives(table, min_user=least[0], min_item=least[1])
        assert set(zip(found["user"], found["item"], strict=True)) == core
    else:
        with pytest.raises(StudyError, match="lower these options"):
            select_positives(table, min_user=least[0], min_item=least[1])


def test_a_dataset_brings_its_own_rule_for_positives():
    rescaled = DATA["ratings"].table.assign(rating=2 * DATA["ratings"].table["rating"])
    own = replace(DATA["ratings"], table=rescaled, positive_threshold=6.0, strict=True)
    pd.testing.assert_frame_equal(make_split("iid", own, 0), make_split("iid", DATA["ratings"], 0))
    looser = make_split("iid", own, 0, strict=False)
    pd.testing.assert_frame_equal(looser, make_split("iid", DATA["ratings"], 0, positive_threshold=3))


def test_inner_cut_in_time():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"user": rng.integers(0, 40, 4000), "item": rng.integers(0, 5, 4000)})
    table["time"] = rng.integers(0, 900, 4000)
    ood = rng.random(4000) < 0.2
    split = cut_inner(table, ood, rng, inner=(5, 1, 2), inner_order="chronological")
    of = split.groupby("split")["time"]
    assert of.max()["train"] < of.min()["validation"] <= of.max()["validation"] < of.min()["iid_test"]
    shares = split[~ood]["split"].value_counts(normalize=True)[["train", "validation", "iid_test"]]
    np.testing.assert_allclose(shares, [0.625, 0.125, 0.25], atol=0.01)
    assert split["split"].eq("ood_test").equals(pd.Series(ood))


def test_unseen_items_are_kept_or_dropped():
    table = DATA["ratings"].table
    late = interactions("late", table.assign(time=table["time"] + 1000 * (table["item"] >= 60)), 80)
    kept, dropped = (make_split("temporal", late, 0, unseen=choice) for choice in ("keep", "drop"))
    unseen = kept["item"] >= 60  # what nobody had before the cut
    assert unseen.any() and kept[unseen]["split"].eq("ood_test").all()
    pd.testing.assert_frame_equal(dropped, kept[~unseen].reset_index(drop=True))
    pd.testing.assert_frame_equal(make_split("temporal", late, 0), kept)
    rows = pd.DataFrame({"item": [1, 2, 1, 3], "split": ["train", "iid_test", "ood_test", "ood_test"]})
    assert drop_unseen(rows, unseen="drop")["item"].tolist() == [1, 2, 1]  # the OOD test alone loses rows


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=60
    ),
    shift=st.sampled_from([*SPLITS]),
    timed=st.booleans(),
    seed=st.integers(0, 5),
    options=st.fixed_dictionaries(
        {
            "min_user": st.integers(1, 3),
            "min_item": st.integers(1, 3),
            "filter_order": st.sampled_from(["positives_first", "users_first"]),
            "iterative": st.booleans(),
            "inner_order": st.sampled_from(["random", "chronological"]),
            "unseen": st.sampled_from(["keep", "drop"]),
            "positive_threshold": st.integers(1, 5),
            "strict": st.booleans(),
        }
    ),
)
def test_any_table_is_split_without_leak_or_refused(rows, shift, timed, seed, options):
    table = pd.DataFrame(rows, columns=["user", "item", "rating", "time"]).drop_duplicates(["user", "item"])
    data = interactions("any", table.astype({"rating": float}).drop(columns=[] if timed else ["time"]), 9)
    try:
        split = make_split(shift, data, seed, **options)
        examples = histories(split)
    except StudyError as error:
        assert "\n" not in str(error)
    else:
        assert set(split["split"]) == set(SPLIT_NAMES)
        assert leaks(split, examples, running_on=split.attrs["running_on"]) == set()


@pytest.mark.parametrize(
    ("name", "shift", "options", "word"),
    [
        ("ratings", "time", {}, "unknown shift 'time'"),
        ("ratings", "iid", {"scope": "user"}, "unknown option of shift 'iid' 'scope'"),
        ("ratings", "temporal", {"scope": "users"}, "scope of shift 'temporal' 'users'.*global, user"),
        ("ratings", "iid", {"ood_share": 1.5}, "'ood_share'"),
        ("ratings", "iid", {"ood_share": "0.2"}, "'ood_share' of shift 'iid' must be a number"),
        ("ratings", "iid", {"inner": [7, 1]}, "'inner'"),
        ("ratings", "iid", {"inner": [7, 0, 3]}, "'inner'"),
        ("ratings", "iid", {"min_user": 1000}, "lower these options"),
        ("ratings", "iid", {"positive_threshold": 6}, "rating >= 6"),
        ("ratings", "environment", {}, "only dataset 'simulated' has"),
        ("timeless", "temporal", {}, "needs a column 'time'"),
        ("timeless", "mixed", {}, "shift 'mixed' needs a column 'time'"),
        ("timeless", "iid", {"inner_order": "chronological"}, "choose random"),
        ("ratings", "iid", {"inner_order": "time"}, "'inner_order' 'time'.*random, chronological"),
        ("ratings", "iid", {"filter_order": "items_first"}, "filter order 'items_first'.*positives_first, users_first"),
        ("ratings", "iid", {"unseen": "move"}, "'unseen' 'move'.*keep, drop"),
        ("ratings", "mixed", {"popular_share": 1.0}, "'popular_share'"),
        ("ratings", "mixed", {"popular_share": 0.001}, "'popular_share'"),
        ("ratings", "popularity", {"cap": 0.5}, "'cap' of shift 'popularity' must be a whole number"),
        ("ratings", "popularity", {"cap": -1}, "'cap'.*not -1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(name, shift, options, word):
    with pytest.raises(StudyError, match=word) as raised:
        make_split(shift, DATA[name], 0, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shift", SPLITS)
def test_a_shifts_functions_are_its_own_behind_those_of_every_split(shift):
    shared, (rule, *last) = splits.shift_functions(shift)[:3], splits.shift_functions(shift)[3:]
    assert shared == [select_positives, cut_inner, drop_unseen]
    assert rule is SPLITS[shift].rule and [*last, None][0] is SPLITS[shift].complete
    with pytest.raises(StudyError, match="unknown shift 'tmporal'"):
        splits.shift_functions("tmporal")


def test_too_little_data_is_refused():
    tiny = replace(DATA["ratings"], table=DATA["ratings"].table.head(12))
    with pytest.raises(StudyError, match=r"leaves no (train|validation|iid_test|ood_test)"):
        make_split("popularity", tiny, 0, min_user=1, positive_threshold=1)
    with pytest.raises(StudyError, match="seed"):
        make_split("iid", tiny, -1)


# --- Histories and the leakage rule ---


@over_settings
def test_no_prompt_leaks(data, shift, options):
    split = make_split(shift, data, 0, **options)
    examples = histories(split)
    assert leaks(split, examples, running_on=split.attrs["running_on"]) == set()
    assert set(examples["split"]) == set(SPLIT_NAMES)
    assert examples["history"].map(len).between(1, 10).all()
    assert examples["example"].tolist() == list(range(len(examples)))
    assert sum(examples.attrs["dropped"].values()) == len(split) - len(examples)


@over_settings
def test_the_leak_would_be_caught(data, shift, options):
    """The two mistakes people make: histories from all interactions, and histories that know the future."""
    split = make_split(shift, data, 0, **options)
    from_all = histories(split.assign(split="train"))
    from_all["split"] = from_all.merge(split, on=["user", "item"], how="left")["split_y"]
    assert "a held-out pair in a prompt of train, validation or iid_test" in leaks(split, from_all)

    training = split[split["split"] == "train"].groupby("user")["item"].agg(list)
    everything = split[["split", "user", "item"]].assign(history=split["user"].map(training))
    everything = everything[everything["history"].notna()]
    assert "a pair of the future in a prompt" in leaks(split, everything)

    as_training = histories(split).assign(split="train")
    assert "a held-out pair as a training target" in leaks(split, as_training)

    runs_on = histories(split, running_on=True)
    if not runs_on.equals(histories(split, running_on=False)):
        assert "a held-out pair in a prompt of ood_test" in leaks(split, runs_on)


def toy(**columns: list) -> pd.DataFrame:
    return pd.DataFrame(columns).assign(user=1)


def test_histories_by_hand():
    split = toy(
        item=[10, 11, 12, 13, 14, 15, 16],
        time=[1, 1, 2, 3, 4, 5, 6],
        split=["train", "train", "validation", "train", "ood_test", "iid_test", "ood_test"],
    )
    examples = histories(split, max_history=3)
    assert examples[["item", "history"]].values.tolist() == [
        [12, [10, 11]],  # equal times: by item; not each other's history
        [13, [10, 11]],  # the validation item is not there
        [14, [10, 11, 13]],
        [15, [10, 11, 13]],  # the test item before it is not there
        [16, [10, 11, 13]],
    ]
    assert examples.attrs["dropped"] == {"train": 2, "validation": 0, "iid_test": 0, "ood_test": 0}
    running = histories(split, max_history=3, running_on=True)
    assert running["history"].tolist()[:4] == examples["history"].tolist()[:4]
    assert running["history"].tolist()[4] == [11, 13, 14]  # the latest three, with the earlier test item


def test_without_times_the_rows_are_the_order():
    split = toy(item=["c", "a", "d", "b"], split=["train", "train", "iid_test", "train"])
    assert histories(split)[["item", "history"]].values.tolist() == [
        ["a", ["c"]],
        ["d", ["c", "a"]],
        ["b", ["c", "a"]],
    ]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 6), st.sampled_from(SPLIT_NAMES)),
        min_size=1,
        max_size=40,
        unique_by=lambda row: row[:2],
    ),
    longest=st.integers(1, 4),
    running_on=st.booleans(),
    timed=st.booleans(),
)
def test_histories_are_what_a_loop_over_the_rule_gives(rows, longest, running_on, timed):
    split = pd.DataFrame(rows, columns=["user", "item", "time", "split"])
    when = [time_ if timed else row for row, (_, _, time_, _) in enumerate(rows)]
    expected = []
    for row, (user, item, _, name) in enumerate(rows):
        seen = ("train", "ood_test") if running_on and name == "ood_test" else ("train",)
        earlier = [(when[other], rows[other][1]) for other in range(len(rows))
                   if rows[other][0] == user and rows[other][3] in seen and when[other] < when[row]]  # fmt: skip
        if earlier:
            expected.append([name, user, item, [known for _, known in sorted(earlier)[-longest:]]])
    split = split if timed else split.drop(columns="time")
    if expected:
        found = histories(split, longest, running_on)
        assert found[["split", "user", "item", "history"]].values.tolist() == expected
    else:
        with pytest.raises(StudyError, match="no prompt can be made"):
            histories(split, longest, running_on)


@pytest.mark.parametrize(("name", "kind"), [("ratings", pa.int64()), ("timeless", pa.large_string())])
def test_history_table_is_one_list_column_in_memory_and_on_disk(name, kind, tmp_path, monkeypatch):
    split = make_split("popularity", DATA[name], 0)
    small = histories(split)
    monkeypatch.setattr(splits, "CHUNK", 100)
    table = history_table(split)
    assert table["history"].num_chunks == -(-len(small) // 100)
    assert table.schema.field("history").type == pa.list_(kind)
    assert table["history"].to_pylist() == small["history"].tolist()

    pq.write_table(table, tmp_path / "arrow.parquet")
    small.to_parquet(tmp_path / "pandas.parquet")
    arrow, pandas = (pd.read_parquet(tmp_path / f"{kind}.parquet") for kind in ("arrow", "pandas"))
    pd.testing.assert_frame_equal(arrow, pandas)
    assert arrow["history"].map(len).tolist() == small["history"].map(len).tolist()
    assert arrow.explode("history")["history"].tolist() == small.explode("history")["history"].tolist()
    assert [list(history) for history in arrow["history"]] == small["history"].tolist()


def test_users_do_not_share_histories():
    split = pd.DataFrame({"user": [1, 2, 2], "item": [5, 6, 7], "time": [1, 2, 3], "split": "train"})
    assert histories(split)[["user", "item", "history"]].values.tolist() == [[2, 7, [6]]]


def test_no_history_at_all_is_refused():
    with pytest.raises(StudyError, match="no prompt can be made"):
        histories(toy(item=[1, 2], time=[1, 1], split=["train", "train"]))


def test_columns_of_examples():
    plain = histories(make_split("iid", DATA["ratings"], 0))
    assert list(plain.columns) == ["example", "split", "user", "item", "history", "time"]
    times = DATA["ratings"].table.set_index(["user", "item"])["time"]
    assert (times.reindex(pd.MultiIndex.from_frame(plain[["user", "item"]])).to_numpy() == plain["time"]).all()
    timeless = histories(make_split("iid", DATA["timeless"], 0))
    assert list(timeless.columns) == ["example", "split", "user", "item", "history"]
    simulated = histories(make_split("iid", DATA["simulated"], 0))
    assert list(simulated.columns) == ["example", "split", "user", "item", "history", "time", "environment"]
    truth = DATA["simulated"].table.set_index(["user", "item"])["environment"]
    pairs = pd.MultiIndex.from_frame(simulated[["user", "item"]])
    assert (truth.reindex(pairs).to_numpy() == simulated["environment"]).all()


def test_histories_survive_a_file(tmp_path):
    split = make_split("temporal", DATA["ratings"], 0)
    split.to_parquet(tmp_path / "split.parquet")
    again = pd.read_parquet(tmp_path / "split.parquet")
    pd.testing.assert_frame_equal(histories(split), histories(again, running_on=True))


def test_history_table_beats_a_loop_over_rows():
    split = make_split("temporal", ratings(users=1200, items=400, distinct_times=10_000), 0, positive_threshold=1)
    start = time.process_time()
    table = history_table(split, running_on=False)
    ours, start = time.process_time() - start, time.process_time()
    looped = []
    for _, mine in split.groupby("user"):
        train: list[tuple[int, int]] = []
        for item, moment, name in zip(mine["item"], mine["time"], mine["split"], strict=True):
            looped.append([known for earlier, known in train if earlier < moment][-10:])
            if name == "train":
                train.append((moment, item))
    loop = time.process_time() - start
    assert table["history"].to_pylist() == [history for history in looped if history]
    assert loop > 2 * ours, f"{loop:.2f} s of processor time in a loop, {ours:.2f} s in arrays"


# --- Prompts of histories ---


@pytest.mark.parametrize("name", ["ratings", "timeless"])
@pytest.mark.parametrize("size", [61, 1 << 16])
def test_prompts_are_those_of_a_loop_in_batches_of_any_size(name, size, tmp_path):
    split = make_split("iid", DATA[name], 0)
    titles = DATA[name].items.set_index("item")["title"]
    examples = histories(split)
    prompts = [prompt_text([titles[item] for item in history]) for history in examples["history"]]
    responses = [response_text(titles[item]) for item in examples["item"]]
    history_table(split).to_pandas().to_parquet(tmp_path / "examples.parquet")
    for given_ in (examples, history_table(split), pd.read_parquet(tmp_path / "examples.parquet")):
        batches = list(prompt_batches(given_, titles, size))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(examples) // size - (len(examples) % size == 0))
        whole = pa.concat_tables(batches)
        assert whole["prompt"].to_pylist() == prompts and whole["chosen"].to_pylist() == responses


def test_prompt_table_keeps_the_index_and_takes_an_empty_history():
    examples = pd.DataFrame({"history": [["b", "a"], [], ["a"]], "item": ["a", "b", "b"]}, index=[5, 3, 9])
    titles = {"a": "Über alles", "b": "B; or not"}
    table = prompt_table(examples, titles)
    assert table.index.tolist() == [5, 3, 9]
    assert table["prompt"].tolist() == [
        prompt_text(["B; or not", "Über alles"]),
        prompt_text([]),
        prompt_text(["Über alles"]),
    ]
    assert table["chosen"].tolist() == [" Über alles", " B; or not", " B; or not"]
    assert prompt_table(examples.iloc[2:], titles)["prompt"].tolist() == [prompt_text(["Über alles"])]
    none = prompt_table(examples.iloc[:0], titles)
    assert none.empty and list(none.columns) == ["prompt", "chosen"]
    for broken in ({"a": "A"}, {"b": "B"}):
        with pytest.raises(StudyError, match=r"item '[ab]' of an example has no title"):
            prompt_table(examples, broken)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("shift", "options"),
    [
        ("iid", {}),
        ("popularity", {}),
        ("temporal", {}),
        ("temporal", {"scope": "user"}),
        ("exposure", {}),
        ("mixed", {}),
    ],
)
def test_published_ml_100k_does_not_leak(shift, options):
    if not (data_folder() / "ml-100k").exists():
        pytest.skip("ml-100k is absent: set CAUSALDPO_DATA to the folder of the published datasets")
    split = make_split(shift, load_dataset("ml-100k"), 0, **options)
    assert leaks(split, histories(split), running_on=split.attrs["running_on"]) == set()
    if shift not in ("exposure", "mixed"):  # which use a part of their test
        assert len(split) == 55_180 and split["user"].nunique() == 938
    assert split["split"].eq("ood_test").sum() / 55_180 == pytest.approx(0.2, abs=0.003)


# --- Popularity groups ---


def test_popularity_groups_by_hand():
    groups = popularity_groups(pd.Series({1: 1, 2: 20, 3: 0, 4: 9, 5: 10, 6: 20, 7: 40}))
    assert groups["item"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert groups["train_count"].tolist() == [1, 20, 0, 9, 10, 20, 40]
    # 7 (40 of 100) | 2, 6 (ties by item) | 5, 4, 1; item 7 holds the mass of two groups, so no item is in G2
    assert dict(zip(groups["item"], groups["group_mass"], strict=True)) == {
        7: "G1", 2: "G3", 6: "G4", 5: "G5", 4: "G5", 1: "G5", 3: "G5",
    }  # fmt: skip
    assert dict(zip(groups["item"], groups["group_items"], strict=True)) == {
        7: "G1", 2: "G1", 6: "G2", 5: "G3", 4: "G4", 1: "G5", 3: "G5",
    }  # fmt: skip


def test_popularity_groups_have_equal_mass_and_equal_counts():
    split = make_split("iid", load_dataset("simulated"), 0)
    counts = split[split["split"] == "train"]["item"].value_counts()
    groups = popularity_groups(counts)
    assert groups["item"].tolist() == counts.index.tolist()
    mass = groups.groupby("group_mass")["train_count"].sum() / counts.sum()
    np.testing.assert_allclose(mass, 0.2, atol=0.02)
    np.testing.assert_allclose(groups["group_items"].value_counts(), len(counts) / 5, atol=1)
    assert groups.groupby("group_mass")["train_count"].mean().is_monotonic_decreasing
    assert isinstance(groups["group_mass"].iloc[0], str)
