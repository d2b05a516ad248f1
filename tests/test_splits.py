"""Properties of every shift, the leakage rule, and a check that the leak would be caught."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causaldpo_lib.data import Interactions, load_dataset
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import data_folder
from causaldpo_lib.splits import (
    SPLIT_NAMES,
    SPLITS,
    histories,
    make_split,
    popularity_groups,
    select_positives,
)


def ratings(seed: int = 0, users: int = 60, items: int = 80, distinct_times: int = 40) -> Interactions:
    """Long-tailed ratings 1 to 5 with very many equal times, as in MovieLens."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, items + 1) ** 0.8
    rows = [
        (user, int(item), float(rng.integers(2, 6)), int(rng.integers(distinct_times)) + 3 * user)
        for user in range(users)
        for item in rng.choice(items, size=rng.integers(8, 40), replace=False, p=odds / odds.sum())
    ]
    table = pd.DataFrame(rows, columns=["user", "item", "rating", "time"]).sort_values(["user", "time", "item"])
    catalogue = pd.DataFrame({"item": range(items), "title": [f"Title {item}" for item in range(items)]})
    return Interactions("ratings", table.reset_index(drop=True), catalogue)


def without_times(data: Interactions) -> Interactions:
    """The same with text ids and no times, as Book-Crossing has them."""
    table = data.table.drop(columns="time").astype({"user": str}).assign(item=data.table["item"].map("i{:03}".format))
    return Interactions("timeless", table, data.items.assign(item=data.items["item"].map("i{:03}".format)))


DATA = {
    "simulated": load_dataset("simulated", users=80, items=60, length=25),
    "ratings": ratings(),
    "timeless": without_times(ratings()),
}
SETTINGS = [
    ("simulated", "iid", {}),
    ("simulated", "popularity", {}),
    ("simulated", "temporal", {}),
    ("simulated", "temporal", {"scope": "user"}),
    ("simulated", "environment", {}),
    ("ratings", "iid", {}),
    ("ratings", "popularity", {}),
    ("ratings", "temporal", {}),
    ("ratings", "temporal", {"scope": "user"}),
    ("timeless", "iid", {}),
    ("timeless", "popularity", {}),
]
over_settings = pytest.mark.parametrize(
    ("data", "shift", "options"),
    [pytest.param(DATA[name], shift, options, id="-".join([name, shift, *options.values()]))
     for name, shift, options in SETTINGS],
)  # fmt: skip


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
def test_splits_are_disjoint_and_none_is_empty(data, shift, options):
    split = make_split(shift, data, 0, **options)
    assert set(split["split"]) == set(SPLIT_NAMES)
    assert not split.duplicated(["user", "item"]).any()
    merged = split.merge(data.table, on=["user", "item"])
    assert len(merged) == len(split) and merged["rating"].ge(4).all()
    assert split.groupby("user").size().min() >= 5
    expected = [c for c in ("user", "item", "time", "environment", "split") if c == "split" or c in data.table]
    assert list(split.columns) == expected


@over_settings
def test_ratios(data, shift, options):
    share = make_split(shift, data, 0, **options)["split"].value_counts(normalize=True)
    assert share["ood_test"] == pytest.approx(0.2, abs=0.03)
    inner = share[["train", "validation", "iid_test"]] / (1 - share["ood_test"])
    np.testing.assert_allclose(inner, [0.7, 0.1, 0.2], atol=0.02)
    other = make_split(shift, data, 0, inner=[5, 1, 4], **options)["split"].value_counts()
    assert other["iid_test"] == pytest.approx(4 * other["validation"], rel=0.1)


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
        assert not split.groupby("user")["item"].apply(lambda items: items.is_monotonic_increasing).any()


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
    ],
)
def test_bad_input_is_refused_in_one_sentence(name, shift, options, word):
    with pytest.raises(StudyError, match=word) as raised:
        make_split(shift, DATA[name], 0, **options)
    assert "\n" not in str(raised.value)


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
    assert examples["history"].str.len().between(1, 10).all()
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
    if runs_on["history"].tolist() != histories(split, running_on=False)["history"].tolist():
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


def test_users_do_not_share_histories():
    split = pd.DataFrame({"user": [1, 2, 2], "item": [5, 6, 7], "time": [1, 2, 3], "split": "train"})
    assert histories(split)[["user", "item", "history"]].values.tolist() == [[2, 7, [6]]]


def test_no_history_at_all_is_refused():
    with pytest.raises(StudyError, match="no prompt can be made"):
        histories(toy(item=[1, 2], time=[1, 1], split=["train", "train"]))


def test_columns_of_examples():
    plain = histories(make_split("iid", DATA["ratings"], 0))
    assert list(plain.columns) == ["example", "split", "user", "item", "history"]
    simulated = histories(make_split("iid", DATA["simulated"], 0))
    assert list(simulated.columns) == ["example", "split", "user", "item", "history", "environment"]
    truth = DATA["simulated"].table.set_index(["user", "item"])["environment"]
    pairs = pd.MultiIndex.from_frame(simulated[["user", "item"]])
    assert (truth.reindex(pairs).to_numpy() == simulated["environment"]).all()


def test_histories_survive_a_file(tmp_path):
    split = make_split("temporal", DATA["ratings"], 0)
    split.to_parquet(tmp_path / "split.parquet")
    again = pd.read_parquet(tmp_path / "split.parquet")
    pd.testing.assert_frame_equal(histories(split), histories(again, running_on=True))


def test_sixty_thousand_rows_take_about_a_second():
    data = ratings(users=2500, items=400, distinct_times=10_000)
    start = time.perf_counter()
    examples = histories(make_split("temporal", data, 0, positive_threshold=1))
    assert len(examples) > 45_000
    assert time.perf_counter() - start < 3


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("shift", "options"), [("iid", {}), ("popularity", {}), ("temporal", {}), ("temporal", {"scope": "user"})]
)
def test_published_ml_100k_does_not_leak(shift, options):
    if not (data_folder() / "ml-100k").exists():
        pytest.skip("ml-100k is absent: set CAUSALDPO_DATA to the folder of the published datasets")
    split = make_split(shift, load_dataset("ml-100k"), 0, **options)
    assert leaks(split, histories(split), running_on=split.attrs["running_on"]) == set()
    assert len(split) == 55_180 and split["user"].nunique() == 938
    assert split["split"].value_counts(normalize=True)["ood_test"] == pytest.approx(0.2, abs=0.003)


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
